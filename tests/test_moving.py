"""Migrating: checks each factor on the pages, with the other library if it is installed, or with its formula."""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import pathlib
import re
import runpy
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchdistill
from torch.nn import functional
from torchdistill.losses import mid_level

import kdjax
import kdtorch
import kdtorch.nn
from benchmarks import direct

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGES = pathlib.Path(__file__).parent.parent / "docs" / "moving"
FIGURES = pathlib.Path(__file__).parent / "golden"
BATCH, T, C, N, DELTA = 5, 4.0, 7, 4, 0.5
FACTORS = {"1": 1, "½": 0.5, "δ": DELTA, "1 / B²": 1 / BATCH**2, "1 / C": 1 / C, "1 / T²": 1 / T**2}
FACTORS |= {
    "1 / (C T²)": 1 / (C * T**2),
    "≈ 1": 1,
    "3 / 1000": 3 / 1000,
    "N": N,
    "α": 0.5,
    "β": 0.8,
}  # with the α and β of the published values

rng = np.random.default_rng(0)
S, TEACHER = rng.normal(size=(2, BATCH, C))
LABELS = rng.integers(C, size=5)
MAPS = [rng.normal(size=(2, 5, 3, 8, 8)), rng.normal(size=(2, 5, 4, 2, 2))]
CENTERS = rng.normal(size=(C, C))
s, t, labels = map(torch.from_numpy, (S, TEACHER, LABELS))
student_maps, teacher_maps = ([torch.from_numpy(maps[i]) for maps in MAPS] for i in range(2))
flat = [maps[0].flatten(1) for maps in (student_maps, teacher_maps)]
log_p, q = functional.log_softmax(s / T, 1), functional.softmax(t / T, 1)
memories = torch.from_numpy(rng.normal(size=(2, 9, C)))
state = kdtorch.CRCDState(*memories / memories.norm(dim=-1, keepdim=True), *torch.zeros(2, dtype=s.dtype))
crd_state = kdtorch.CRDState(*state)
index, negatives = torch.arange(5), torch.from_numpy(rng.integers(9, size=(5, 3)))


def rkd(distance_weight, angle_weight):
    weights = {"distance_weight": distance_weight, "angle_weight": angle_weight}
    return direct.rkd_loss(s, t, **weights), kdtorch.rkd_loss(s, t, **weights)


places = torch.cat([index[:, None], negatives], 1)


def kl():
    return kdtorch.kl_loss(s, t, temperature=T)


def longer():
    """The student's features, scaled to be longer than the teacher's."""
    return S * 10


# torchdistill's losses take the outputs of models by the paths of modules
A, B = 0.25, 0.4
PLACES = ("logits", "output", "logits", "output")
WRAPPED = {
    "input": {"is_from_teacher": False, "module_path": "logits", "io": "output"},
    "target": {"is_from_teacher": True, "module_path": "logits", "io": "output"},
}


PAIR = [{side: {"io": "output", "path": str(i)} for side in ("student", "teacher")} for i in range(2)]


def boundaries(x, y):
    """The sum over the entries of a map as in RepDistiller, averaged over the batch, with margin 1."""
    inactive = (x + 1) ** 2 * ((x > -1) & (y <= 0))
    return (inactive + (x - 1) ** 2 * ((x <= 1) & (y > 0))).sum() / len(x)


def factor(x):
    return functional.normalize(x.pow(2).mean(1).flatten(1))


def distilled(loss, student, teacher, targets=None):
    return loss({"logits": {"output": student}}, {"logits": {"output": teacher}}, targets)


def kd(targets, loss=mid_level.KDLoss, **options):
    return distilled(loss(*PLACES, temperature=T, **options), s, t, targets)


def crd():
    """torchdistill's loss, with the same memories and indices."""
    loss = mid_level.CRDLoss("student", "empty", "teacher", C, 9, 3, 9)
    loss.params = torch.tensor([3, 0.07, -1, -1, 0.5], dtype=s.dtype)
    loss.memory_v1, loss.memory_v2 = (x.clone() for x in memories / memories.norm(dim=-1, keepdim=True))
    embeddings = (functional.normalize(x) for x in (s, t))
    return sum(map(loss.compute_contrast_loss, loss.contrast_memory(*embeddings, index, places)))


def standardized(logits):
    """The standardisation of the authors' code."""
    return (logits - logits.mean(-1, keepdim=True)) / (1e-7 + logits.std(-1, keepdim=True))


# language models: three sequences of N tokens, some of them kept by the labels; TRL shifts labels, the others do not
BETA, SKEW, KEPT = 0.3, 0.2, 3
TOKENS = rng.normal(size=(2, 3, N, C))
s3, t3 = map(torch.from_numpy, TOKENS)
labels3 = torch.tensor([[-100, 2, 4, 1], [-100, -100, 0, 6], [-100, 5, 3, -100]])
kept3 = labels3 != -100
IGNORED = torch.full_like(labels3, -100)
log_softmax = functools.partial(functional.log_softmax, dim=-1)
log_p1, log_q1, log_p3, log_q3 = map(log_softmax, (s3, t3, s3 / T, t3 / T))


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in place of those that another library imports, but that its losses do not use."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__getattr__ = attribute


def trl(name):
    """The module of TRL."""
    return imported(f"trl.{name}")


def lightly(name):
    """The module of Lightly's losses."""
    return imported(f"lightly.loss.{name}", "torchvision", "pytorch_lightning", "hydra", "omegaconf", "timm")


@functools.cache
def imported(name, *missing):
    """Import a module, with empty modules in place of packages that are not installed."""
    stand_ins = StandIns(*missing)
    sys.meta_path.append(stand_ins)
    try:
        with warnings.catch_warnings(action="ignore"):  # trl.experimental warns that it is experimental
            return importlib.import_module(name)
    finally:
        sys.meta_path.remove(stand_ins)
        for module in [x for x, y in sys.modules.items() if getattr(y, "__loader__", None) is stand_ins]:
            del sys.modules[module]


def gkd(labels=labels3, trainer="gkd", **options):
    trainers = trl(f"experimental.{trainer}.{trainer}_trainer")
    loss = getattr(trainers, f"{trainer.upper()}Trainer").generalized_jsd_loss
    return loss(s3, t3, labels, **{"beta": BETA, "temperature": T} | options)


def jsd(**options):
    return kdtorch.jsd_loss(s3, t3, **{"beta": BETA, "temperature": T, "where": kept3} | options)


def step(trainer):
    """The loss of a trainer of TRL for the logits of two models, with the settings of the page."""
    cls = getattr(trl(f"experimental.{trainer}.{trainer}_trainer"), f"{trainer.upper()}Trainer")

    def model(logits):
        def call(**inputs):
            return types.SimpleNamespace(logits=logits)

        call.eval = lambda: None
        return call

    settings = {"beta": BETA, "temperature": T, "use_uld_loss": False, "teacher_model": model(t3)}
    self = types.SimpleNamespace(
        **settings,
        generalized_jsd_loss=cls.generalized_jsd_loss,
        _get_model_forward_kwargs=lambda inputs: {},
    )
    inputs = {"input_ids": labels3, "attention_mask": kept3, "labels": labels3}
    return cls.compute_loss(self, model(s3), inputs)


def shifted(**options):
    return kdtorch.jsd_loss(s3[:, :-1], t3[:, :-1], beta=BETA, where=kept3[:, 1:], **options)


def uld_of_gold():
    """GOLD's loss of the sequences, with the same tokenizer on both sides."""
    settings = {f"uld_{side}_temperature": T for side in ("student", "teacher")}
    settings |= {f"uld_skip_{side}_eos": False for side in ("student", "teacher")}
    settings |= {"uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0}
    settings |= {"use_extended_uld": False, "uld_token_merge_strategy": "observed"}
    loss = trl("experimental.gold.gold_trainer").ULDLoss(types.SimpleNamespace(**settings))
    return loss(s3, t3, labels3, labels3, labels3, labels3)


def per_sequence(values):
    return ((values * kept3).sum(1) / kept3.sum(1)).mean()


def distillation_trainer():
    """TRL's loss from hidden states and heads, which is float32 for any input."""
    loss = trl("trainer.distillation_trainer")._chunked_divergence_loss
    return loss(s3, t3, *2 * [torch.eye(C, dtype=s3.dtype)], kept3, BETA, temperature=T)[0]


def sdpo(kind, student, teacher, trainer="sdpo", alpha=BETA, tokens=None, **options):
    loss = getattr(trl(f"experimental.{trainer}.loss_utils"), f"compute_{kind}_self_distillation_loss")
    return loss(student, teacher, *() if tokens is None else (tokens,), distillation_alpha=alpha, **options)


def served(tail):
    """TRL's loss on a teacher's k largest log-probabilities, as its server returns them."""
    module = trl("experimental.server_distillation.server_distillation_trainer")
    cls = module.ServerDistillationTrainer
    self = types.SimpleNamespace(loss_add_tail=tail, _reduce_divergence_loss=cls._reduce_divergence_loss)
    values, indices = log_q3.topk(KEPT)
    teacher = {"topk_logprobs": values, "topk_token_ids": indices}
    return cls._compute_server_forward_kl_loss(self, teacher, log_p3, labels3)


def top_k(chosen_by, temperature=T, **options):
    """Our loss on the k classes with the largest logits of one of the two, and one class for the rest."""
    indices = chosen_by.topk(KEPT).indices
    rest = temperature * (t3 / temperature).scatter(-1, indices, -torch.inf).logsumexp(-1)
    options |= {"temperature": temperature, "where": kept3}
    return kdtorch.topk_kl_loss(s3, t3.gather(-1, indices), indices, rest, **options)


def liger(weights=(0, 1), labels=labels3, student_head=None, kind="JSD", **options):
    """Liger's loss from hidden states and heads with the logits above; it accumulates in the default dtype."""
    from liger_kernel import chunked_loss

    head = torch.eye(C, dtype=s3.dtype)
    student_head = head if student_head is None else student_head
    loss = getattr(chunked_loss, f"LigerFusedLinear{kind}Loss")
    loss = loss(*weights, compiled=False, **{"beta": BETA, "temperature": T} | options)
    default = torch.get_default_dtype()
    torch.set_default_dtype(s3.dtype)
    try:
        return loss(s3.flatten(0, 1), student_head, t3.flatten(0, 1), head, labels.flatten())
    finally:
        torch.set_default_dtype(default)


def liger_function(student, teacher, **options):
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    return LigerFusedLinearJSDFunction.distillation_loss_fn(student, teacher, **options)


def liger_cosine(student, teacher, **options):
    from liger_kernel.chunked_loss.cosine_similarity_loss import LigerFusedLinearCosineSimilarityFunction

    return LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn(student, teacher, **options)


def mean_over_kept(values):
    """The sum of values over classes, then the mean over the tokens that the labels keep."""
    return values.sum(-1)[kept3].mean()


def mixture_divergence(beta, log_p, log_q):
    """The divergence for each class, as in Liger's kernels."""
    log_m = torch.logaddexp(log_p + np.log(1 - beta), log_q + np.log(beta))
    return beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)


def reverse_kl(student=s3, **options):
    return kdtorch.reverse_kl_loss(student, t3, **{"where": kept3} | options)


def forward_kl(student=s3):
    return kdtorch.kl_loss(student, t3, where=kept3)


@functools.cache
def torchtune():
    """torchtune's losses. Importing the package requires torchao, which the losses do not use."""
    (folder,) = importlib.util.find_spec("torchtune").submodule_search_locations
    return types.SimpleNamespace(**runpy.run_path(f"{folder}/modules/loss/kd_losses.py"))


def tuned(loss, *settings, student=s3, **options):
    return getattr(torchtune(), loss)(*settings)(student.flatten(0, 1), t3.flatten(0, 1), labels3.flatten(), **options)


def chunked(loss, *settings, student=s3):
    chunks = [x.chunk(2, 1) for x in (student, t3)]
    return getattr(torchtune(), loss)(2, *settings)(*chunks, labels3)


SCALES = torch.tensor([-2.0, 0.5, 3.0], dtype=s.dtype)


def vid_given():
    return student_maps[0], teacher_maps[0], SCALES


def vid():
    """The loss as in RepDistiller and mdistiller, for the regressor's output."""
    variance = (torch.log(1.0 + torch.exp(SCALES)) + 1e-5).view(1, -1, 1, 1)
    return torch.mean(0.5 * ((student_maps[0] - teacher_maps[0]) ** 2 / variance + torch.log(variance)))


def released(figure):
    """The result of published code, and that of this library for the same inputs."""
    with np.load(FIGURES / f"{figure}.npz") as file:
        meta = json.loads(file["meta"].tobytes())
        student, teacher = (torch.from_numpy(file[f"in_{name}_logits"]).double() for name in ("student", "teacher"))
        value = meta.get("released_value", float(file["out_loss"]))
    return value, getattr(kdtorch, meta["function"])(student, teacher, **meta["kwargs"])


MOVES = {
    "mdistiller": {
        "`kd_loss(ls, lt, T)`": lambda: (T**2 * functional.kl_div(log_p, q, reduction="none").sum(1).mean(), kl()),
        "`dkd_loss(ls, lt, target, alpha, beta, T)`": lambda: (
            direct.dkd_loss(s, t, labels, 1.0, 8.0, T),
            kdtorch.dkd_loss(s, t, labels, alpha=1.0, beta=8.0, temperature=T),
        ),
        "`hcl_loss(fs, ft)`": lambda: (
            direct.hcl_loss(student_maps, teacher_maps),
            kdtorch.hcl_loss(student_maps, teacher_maps),
        ),
        "`kd_loss(ls, lt, T, logit_stand=True)`, of the fork sunshangquan/logit-standardization-KD": lambda: (
            direct.kl_loss(standardized(s), standardized(t), T),
            kdtorch.kl_loss(*map(kdtorch.standardize_logits, (s, t)), temperature=T),
        ),
        "`rkd_loss(fs, ft, squared=False, eps=1e-12, distance_weight=w_d, angle_weight=w_a)`": lambda: rkd(25.0, 50.0),
        "`sp_loss([fs], [ft])`": lambda: (direct.similarity_loss(*flat), kdtorch.similarity_loss(*flat)),
        "`pkt_loss(fs, ft)`": lambda: (direct.pkt_loss(s, t), kdtorch.pkt_loss(s, t)),
        "CRD: `CRDLoss` of `ContrastMemory`": lambda: (
            direct.crd_loss(s, t, index, negatives, crd_state)[0],
            kdtorch.crd_loss(s, t, index, negatives, crd_state)[0],
        ),
        "`vid_loss(regressor, log_scale, fs, ft, eps)`": lambda: (vid(), kdtorch.vid_loss(*vid_given())),
        "`at_loss(fs, ft, p)`, p even": lambda: (
            direct.attention_transfer_loss(student_maps, teacher_maps, p=4),
            kdtorch.attention_transfer_loss(student_maps, teacher_maps, p=4),
        ),
        "`nst_loss(fs, ft)`": lambda: (
            direct.nst_loss(student_maps, teacher_maps),
            kdtorch.nst_loss(student_maps, teacher_maps),
        ),
        "FitNet: `mse_loss` of maps": lambda: (
            functional.mse_loss(student_maps[0], teacher_maps[0]),
            kdtorch.mse_loss(student_maps[0], teacher_maps[0]),
        ),
    },
    "repdistiller": {
        "`DistillKL(T)(ys, yt)`": lambda: (T**2 * functional.kl_div(log_p, q, reduction="sum") / len(s), kl()),
        "`HintLoss()(fs, ft)`": lambda: (functional.mse_loss(s, t), kdtorch.mse_loss(s, t)),
        "`RKDLoss(w_d, w_a)(fs, ft)`": lambda: rkd(25.0, 50.0),
        "`Similarity()(fs, ft)`, a list of one for each pair": lambda: (
            direct.similarity_loss(*flat),
            kdtorch.similarity_loss(*flat),
        ),
        "`PKT()(fs, ft)`": lambda: (direct.pkt_loss(s, t), kdtorch.pkt_loss(s, t)),
        "`CRDLoss(opt)`": lambda: (
            direct.crd_loss(s, t, index, negatives, crd_state)[0],
            kdtorch.crd_loss(s, t, index, negatives, crd_state)[0],
        ),
        "`VIDLoss(…)(fs, ft)`, its regressor of maps of one size": lambda: (vid(), kdtorch.vid_loss(*vid_given())),
        "`FSP(…)(fs, ft)`, summed": lambda: (
            direct.fsp_loss(student_maps, teacher_maps),
            kdtorch.fsp_loss(student_maps, teacher_maps),
        ),
        "`sum(Attention(p)(fs, ft))`, p even": lambda: (
            direct.attention_transfer_loss(student_maps, teacher_maps, p=4),
            kdtorch.attention_transfer_loss(student_maps, teacher_maps, p=4),
        ),
        "`sum(NSTLoss()(fs, ft))`": lambda: (
            direct.nst_loss(student_maps, teacher_maps),
            kdtorch.nst_loss(student_maps, teacher_maps),
        ),
        "`sum(ABLoss(n)(fs, ft))`": lambda: (
            3
            / 1000
            * sum(w * boundaries(x, y) for w, x, y in zip((0.5, 1.0), student_maps, teacher_maps, strict=True)),
            kdtorch.ab_loss(student_maps, teacher_maps),
        ),
        "`FactorTransfer(p1, p2)(fs, ft)`, p2 1 or even": lambda: (
            (factor(student_maps[0]) - factor(teacher_maps[0])).abs().mean(),
            kdtorch.factor_transfer_loss(student_maps[0], teacher_maps[0], p1=2, channel_mean=True),
        ),
        "`CRCDLoss(opt)`, of the fork Lechatelia/CRCD": lambda: (
            direct.crcd_loss(s, t, index, negatives, state)[0],
            kdtorch.crcd_loss(s, t, index, negatives, state)[0],
        ),
    },
    "torchdistill": {
        "`KDLoss(temperature=T, alpha=a)` with targets, its soft part over 1 − a": lambda: (
            (kd(labels, alpha=A) - A * functional.cross_entropy(s, labels)) / (1 - A),
            kl(),
        ),
        "`KDLoss(temperature=T, alpha=a, beta=b)` with targets, its soft part over b": lambda: (
            (kd(labels, alpha=A, beta=B) - A * functional.cross_entropy(s, labels)) / B,
            kl(),
        ),
        "`KDLoss` with `alpha=0`, with `alpha=None`, or without targets": lambda: (
            kd(labels, alpha=0),
            kd(labels, alpha=0.0, beta=B),
            kd(labels, alpha=None, beta=B),
            kd(None, alpha=A),
            kl(),
        ),
        'the same, `reduction="mean"`': lambda: (
            kd(labels, alpha=0, reduction="mean"),
            kd(labels, alpha=None, beta=B, reduction="mean"),
            kd(None, alpha=A, reduction="mean"),
            kl(),
        ),
        "`LogitStdKDLoss(temperature=T, alpha=a)` with targets, its soft part over 1 − a": lambda: (
            (kd(labels, mid_level.LogitStdKDLoss, alpha=A) - A * functional.cross_entropy(s, labels)) / (1 - A),
            kdtorch.kl_loss(*map(kdtorch.standardize_logits, (s, t)), temperature=T),
        ),
        "`LogitStdKDLoss` with `alpha=0`, with `alpha=None`, or without targets": lambda: (
            kd(labels, mid_level.LogitStdKDLoss, alpha=0),
            kd(labels, mid_level.LogitStdKDLoss, alpha=None, beta=B),
            kd(None, mid_level.LogitStdKDLoss, alpha=A),
            kdtorch.kl_loss(*map(kdtorch.standardize_logits, (s, t)), temperature=T),
        ),
        "`DISTLoss(beta=b, gamma=g, tau=T)`": lambda: (
            distilled(mid_level.DISTLoss(*PLACES, beta=A, gamma=B, tau=T), 10 * s, 10 * t),
            kdtorch.dist_loss(10 * s, 10 * t, beta=A, gamma=B, temperature=T),
        ),
        "`RKDLoss(dist_factor=w_d, angle_factor=w_a)`": lambda: (
            distilled(mid_level.RKDLoss("logits", "logits", 1.0, 2.0, "mean"), student_maps[0], teacher_maps[0]),
            kdtorch.rkd_loss(*flat, distance_weight=1.0, angle_weight=2.0),
        ),
        "`PKTLoss`": lambda: (distilled(mid_level.PKTLoss(*PLACES), s.clone(), t.clone()), kdtorch.pkt_loss(s, t)),
        'the square of `CCKDLoss` on unit rows, gaussian, `reduction="batchmean"`': lambda: (
            distilled(
                mid_level.CCKDLoss("logits", "logits", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean"),
                *map(functional.normalize, (s, t)),
            )
            ** 2,
            kdtorch.correlation_loss(s, t, gamma=0.4, order=2),
        ),
        "`HierarchicalContextLoss`, one a map, weights 1, summed": lambda: (
            sum(
                distilled(mid_level.HierarchicalContextLoss(*PLACES), (x, None), y)
                for x, y in zip(student_maps, teacher_maps, strict=True)
            ),
            kdtorch.hcl_loss(student_maps, teacher_maps),
        ),
        "`CRDLoss`, given `contrast_idx`": lambda: (
            crd(),
            kdtorch.crd_loss(s, t, index, negatives, crd_state)[0],
        ),
        "`VIDLoss` of one pair, weight 1": lambda: (
            mid_level.VIDLoss({"pair": {side: {"path": "logits", "io": "output"} for side in ("student", "teacher")}})(
                {"logits": {"output": (student_maps[0], (1 + SCALES.exp()).log().reshape(1, -1, 1, 1) + 1e-5)}},
                {"logits": {"output": teacher_maps[0]}},
            ),
            kdtorch.vid_loss(*vid_given()),
        ),
        '`ATLoss`, mode `"code"`, weights 1': lambda: (
            mid_level.ATLoss({str(i): PAIR[i] for i in range(2)})(
                *({str(i): {"output": x} for i, x in enumerate(maps)} for maps in (student_maps, teacher_maps))
            ),
            kdtorch.attention_transfer_loss(student_maps, teacher_maps),
        ),
        "`FTLoss`, p = 1": lambda: (
            mid_level.FTLoss()(
                *({name: {"output": x[0]}} for name, x in (("translator", student_maps), ("paraphraser", teacher_maps)))
            ),
            kdtorch.factor_transfer_loss(student_maps[0], teacher_maps[0]),
        ),
        "`MSELoss` in a `SimpleLossWrapper`": lambda: (
            distilled(mid_level.SimpleLossWrapper(torch.nn.MSELoss(), **WRAPPED), s, t),
            kdtorch.mse_loss(s, t),
        ),
        "`SmoothL1Loss(beta=b)` in a `SimpleLossWrapper`": lambda: (
            distilled(mid_level.SimpleLossWrapper(torch.nn.SmoothL1Loss(beta=DELTA), **WRAPPED), s, t),
            kdtorch.smooth_l1_loss(s, t, beta=DELTA),
        ),
    },
    "optax": {
        "`kl_divergence(log_softmax(s / T), softmax(t / T)).mean()`": lambda: (
            optax.losses.kl_divergence(jax.nn.log_softmax(S / T), jax.nn.softmax(TEACHER / T)).mean(),
            kl(),
        ),
        "`kl_divergence_with_log_targets(…, log_softmax(t / T)).mean()`": lambda: (
            optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(S / T), jax.nn.log_softmax(TEACHER / T)
            ).mean(),
            kl(),
        ),
        "`generalized_kl_divergence(…).mean()` of the same": lambda: (
            optax.losses.generalized_kl_divergence(jax.nn.log_softmax(S / T), jax.nn.softmax(TEACHER / T)).mean(),
            kl(),
        ),
        "`kl_divergence(log_softmax(t / T), softmax(s / T)).mean()`, the arguments exchanged": lambda: (
            optax.losses.kl_divergence(jax.nn.log_softmax(TEACHER / T), jax.nn.softmax(S / T)).mean(),
            kdjax.reverse_kl_loss(S, TEACHER, temperature=T),
        ),
        "`sigmoid_binary_cross_entropy(s, t).mean()`": lambda: (
            optax.losses.sigmoid_binary_cross_entropy(S, TEACHER).mean(),
            kdjax.bce_loss(S, TEACHER),
        ),
        "`squared_error(s, t).mean()`": lambda: (
            optax.losses.squared_error(S, TEACHER).mean(),
            kdjax.mse_loss(S, TEACHER),
        ),
        "`l2_loss(s, t).mean()`": lambda: (optax.losses.l2_loss(S, TEACHER).mean(), kdjax.mse_loss(S, TEACHER)),
        "`huber_loss(s, t, delta=δ).mean()`": lambda: (
            optax.losses.huber_loss(S, TEACHER, delta=DELTA).mean(),
            kdjax.smooth_l1_loss(S, TEACHER, beta=DELTA),
        ),
        "`cosine_distance(s, t, epsilon=ε).mean()`": lambda: (
            optax.losses.cosine_distance(S, TEACHER, epsilon=1e-12).mean(),
            kdjax.cosine_loss(S, TEACHER),
        ),
        "`cosine_distance(s, centers[y]).mean()`, students the longer": lambda: (
            optax.losses.cosine_distance(longer(), CENTERS[LABELS]).mean(),
            kdjax.dcn_loss(longer(), TEACHER, LABELS, CENTERS),
        ),
    },
    "trl": {
        "`GKDTrainer.generalized_jsd_loss(s, t, labels, beta=b, temperature=T)`": lambda: (gkd(), jsd()),
        "`GOLDTrainer.generalized_jsd_loss`, the same arguments": lambda: (gkd(trainer="gold"), jsd()),
        "either with `beta=0`": lambda: (
            gkd(beta=0),
            gkd(trainer="gold", beta=0),
            kdtorch.kl_loss(s3, t3, temperature=T, where=kept3),
        ),
        "either with `beta=1`": lambda: (
            gkd(beta=1),
            gkd(trainer="gold", beta=1),
            kdtorch.reverse_kl_loss(s3, t3, temperature=T, where=kept3),
        ),
        "either without `labels`: ÷ sequences": lambda: (
            gkd(None),
            gkd(None, trainer="gold"),
            jsd(where=None),
        ),
        'either with `reduction="mean"`: ÷ classes too': lambda: (
            gkd(reduction="mean"),
            gkd(trainer="gold", reduction="mean"),
            jsd(),
        ),
        'either with `reduction="sum"`': lambda: (
            gkd(reduction="sum"),
            gkd(trainer="gold", reduction="sum"),
            jsd(reduction="sum"),
        ),
        "either with `num_items_in_batch=n`": lambda: (
            gkd(num_items_in_batch=11),
            gkd(trainer="gold", num_items_in_batch=torch.tensor(11)),
            jsd(reduction="sum") / 11,
        ),
        "`GKDTrainer`'s step, at any `temperature`": lambda: (step("gkd"), shifted()),
        "`GOLDTrainer`'s step": lambda: (step("gold"), shifted(temperature=T)),
        "`DistillationTrainer`'s step": lambda: (distillation_trainer(), jsd()),
        "`ServerDistillationTrainer`'s step with `beta=0` and `loss_top_k=k`": lambda: (served(True), top_k(t3)),
        "the same with `loss_add_tail=False`": lambda: (served(False), top_k(t3, tail="renormalize")),
        "SDPO's and SDFT's `compute_full_logit_self_distillation_loss(s, t, distillation_alpha=b)`": lambda: (
            *(sdpo("full_logit", s3 / T, t3 / T, trainer)[kept3].mean() for trainer in ("sdpo", "sdft")),
            jsd(),
        ),
        "their `compute_topk_self_distillation_loss`, `distillation_alpha=0`": lambda: (
            *(
                sdpo("topk", s3, t3, trainer, 0.0, distillation_topk=KEPT, distillation_add_tail=True)[kept3].mean()
                for trainer in ("sdpo", "sdft")
            ),
            top_k(s3, temperature=1.0),
        ),
        "GOLD's `ULDLoss` with `use_extended_uld=False`": lambda: (
            uld_of_gold(),
            per_sequence(kdtorch.uld_loss(s3 / T, t3 / T, reduction="none")),
        ),
    },
    "liger": {
        "`LigerFusedLinearJSDLoss(0, 1, beta=b, temperature=T)(h, W, g, V, labels)`": lambda: (liger(), jsd()),
        "the same with `beta=0`": lambda: (
            liger(beta=0),
            kdtorch.kl_loss(s3, t3, temperature=T, where=kept3),
        ),
        "the same with `beta=1`": lambda: (
            liger(beta=1),
            kdtorch.reverse_kl_loss(s3, t3, temperature=T, where=kept3),
        ),
        "the same with its default weights, less half of the cross-entropy": lambda: (
            liger(weights=()) - liger(weights=(1, 0)) / 2,
            jsd(),
        ),
        "the same with `return_soft_hard_loss=True`, the second of three": lambda: (
            liger(weights=(), return_soft_hard_loss=True)[1],
            jsd(),
        ),
        "`LigerFusedLinearJSDFunction.distillation_loss_fn(s, t, beta=b)`": lambda: (
            liger_function(s3 / T, t3 / T, beta=BETA),
            jsd(where=None, reduction="sum"),
        ),
        "`LigerFusedLinearCosineSimilarityLoss(0, 1, beta=b, temperature=T)(h, W, g, V, labels)`": lambda: (
            liger(kind="CosineSimilarity", beta=0.8),
            kdtorch.cosine_loss(s3, t3, where=kept3),
        ),
        "`LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn(s, t, beta=b)`": lambda: (
            liger_cosine(s3, t3, beta=0.8),
            kdtorch.cosine_loss(s3, t3, reduction="sum"),
        ),
        "`LigerFusedLinearJSD(b, temperature=T)(h, W, g, V, labels)`, Triton": lambda: (
            mean_over_kept(mixture_divergence(BETA, log_p3, log_q3)),
            jsd(),
        ),
        "`LigerJSD(b)(log_softmax(s / T), log_softmax(t / T), labels)`, Triton": lambda: (
            mean_over_kept(mixture_divergence(BETA, log_p3, log_q3)),
            jsd(),
        ),
        '`LigerKLDIVLoss(reduction="batchmean")(log_softmax(s / T), softmax(t / T))`, Triton': lambda: (
            (log_q3.exp() * (log_q3 - log_p3)).sum(-1).mean(),
            kdtorch.kl_loss(s3, t3, temperature=T),
        ),
        'the same with its default `reduction="mean"`': lambda: (
            (log_q3.exp() * (log_q3 - log_p3)).mean(),
            kdtorch.kl_loss(s3, t3, temperature=T),
        ),
        "`LigerFusedLinearKLDivLoss(temperature=T)(h, W, softmax(t / T), labels)`, Triton": lambda: (
            mean_over_kept(log_q3.exp() * (log_q3 - log_p3)),
            kdtorch.kl_loss(s3, t3, temperature=T, where=kept3),
        ),
        "`LigerTVDLoss()(softmax(s / T), softmax(t / T), labels)`, Triton": lambda: (
            mean_over_kept((log_p3.exp() - log_q3.exp()).abs() / 2),
            kdtorch.tvd_loss(s3 / T, t3 / T, where=kept3),
        ),
        'the same with `reduction="mean"`': lambda: (
            ((log_p3.exp() - log_q3.exp()).abs() / 2)[kept3].mean(),
            kdtorch.tvd_loss(s3 / T, t3 / T, where=kept3),
        ),
    },
    "torchtune": {
        "`ReverseKLLoss()(s, t, labels)`": lambda: (tuned("ReverseKLLoss"), reverse_kl()),
        "`ReverseKLLoss()(s, t, labels, normalize=False)`": lambda: (
            tuned("ReverseKLLoss", normalize=False),
            reverse_kl(reduction="sum"),
        ),
        "`SymmetricKLLoss(0)(s, t, labels)`": lambda: (tuned("SymmetricKLLoss", 0), reverse_kl()),
        "`ReverseKLWithChunkedOutputLoss(n)(chunks of s, chunks of t, labels)`": lambda: (
            chunked("ReverseKLWithChunkedOutputLoss"),
            reverse_kl(),
        ),
    },
    "distillm": {
        "`reverse_kl(s, t, batch)`": lambda: released("reverse_kl"),
        "`js_distance(s, t, batch, lam)`": lambda: (
            mean_over_kept(mixture_divergence(1 - SKEW, log_p1, log_q1)),
            kdtorch.jsd_loss(s3, t3, beta=1 - SKEW, where=kept3),
        ),
        "`tv_distance(s, t, batch)`": lambda: released("tvd_tokens"),
        "`skewed_reverse_kl(s, t, batch, lam)`": lambda: released("skew_reverse_kl"),
        "ABKD: `ab_div(s, t, batch, alpha, beta)`": lambda: released("alpha_beta_tokens"),
        "the same with `alpha=0`": lambda: released("alpha_beta_alpha0"),
        "the same with `beta=0`, or `alpha + beta == 0`": lambda: (
            *(theirs / ours for theirs, ours in map(released, ("alpha_beta_beta0", "alpha_beta_opposite"))),
            1.0,
        ),
    },
}


def entropy(log_probabilities):
    return mean_over_kept(-log_probabilities.exp() * log_probabilities)


# losses with the same gradient: theirs and ours as functions of the student's logits, and the constant difference
MIXED = log_softmax((1 - SKEW) * s3 + SKEW * t3)
SAME_GRADIENT = {
    "trl": {
        "their `compute_sampled_token_self_distillation_loss`": (
            lambda x: sdpo("sampled_token", x, t3, alpha=1.0, tokens=labels3.clamp(min=0))[kept3].mean(),
            lambda x: kdtorch.sampled_kl_loss(of_labels(x), of_labels(t3), where=kept3),
            None,
        ),
    },
    "torchtune": {
        "`ForwardKLLoss()(s, t, labels)`": (
            lambda x: tuned("ForwardKLLoss", student=x),
            forward_kl,
            entropy(log_q1),
        ),
        "`SymmetricKLLoss(r)(s, t, labels)`": (
            lambda x: tuned("SymmetricKLLoss", 0.3, student=x),
            lambda x: 0.3 * forward_kl(x) + 0.7 * reverse_kl(x),
            0.3 * entropy(log_q1),
        ),
        "`ForwardKLWithChunkedOutputLoss(n)(chunks of s, chunks of t, labels)`": (
            lambda x: chunked("ForwardKLWithChunkedOutputLoss", student=x),
            forward_kl,
            entropy(log_q1),
        ),
        "`SymmetricKLWithChunkedOutputLoss(n, r)(chunks of s, chunks of t, labels)`": (
            lambda x: chunked("SymmetricKLWithChunkedOutputLoss", 0.3, student=x),
            lambda x: 0.3 * forward_kl(x) + 0.7 * reverse_kl(x),
            0.3 * entropy(log_q1),
        ),
    },
    "distillm": {
        "`forward_kl(s, t, batch)`": (
            lambda x: mean_over_kept(-log_q1.exp() * log_softmax(x)),
            forward_kl,
            entropy(log_q1),
        ),
        "`symmetric_kl(s, t, batch, lam)`": (
            lambda x: mean_over_kept(
                -0.7 * log_q1.exp() * log_softmax(x) + 0.3 * log_softmax(x).exp() * (log_softmax(x) - log_q1)
            ),
            lambda x: 0.7 * forward_kl(x) + 0.3 * reverse_kl(x),
            0.7 * entropy(log_q1),
        ),
        "`skewed_forward_kl(s, t, batch, lam)`": (
            lambda x: mean_over_kept(-log_q1.exp() * (SKEW * log_q1.exp() + (1 - SKEW) * log_softmax(x).exp()).log()),
            lambda x: kdtorch.skew_kl_loss(x, t3, skew=SKEW, where=kept3),
            entropy(log_q1),
        ),
        "TAID: its loss at an interpolation λ": (
            lambda x: mean_over_kept(-MIXED.exp() * log_softmax(x)),
            lambda x: kdtorch.taid_loss(x, t3, interpolation=SKEW, where=kept3),
            entropy(MIXED),
        ),
    },
}


def of_labels(logits):
    return log_softmax(logits).gather(-1, labels3.clamp(min=0)[..., None])[..., 0]


# self-supervision: views, patches (some of them masked), and prototypes
VIEWS = torch.from_numpy(rng.normal(size=(4, 5, C)))
PATCHES = torch.from_numpy(rng.normal(size=(2, 5, 6, C)))
MASK = (torch.arange(6) < torch.tensor([2, 4, 1, 2, 0])[:, None]).view(5, 2, 3)  # the others round 1 / 3 to float32
CENTER = torch.from_numpy(0.1 * rng.normal(size=C))
FLAT = MASK.flatten(1)


def dino(**options):
    return kdtorch.dino_loss(
        VIEWS, VIEWS[:2].flip(-1), kdtorch.DINOState(CENTER), teacher_temperature=0.0625, **options
    )[0]


def ibot(**options):
    state = kdtorch.IBOTState(CENTER)
    return kdtorch.ibot_loss(*PATCHES, FLAT, state, teacher_temperature=0.0625, **options)[0]


def lightly_dino():
    loss = lightly("dino_loss").DINOLoss(C).double()
    loss.center.copy_(CENTER)
    return loss([*VIEWS[:2].flip(-1)], [*VIEWS], teacher_temp=0.0625)


def lightly_ibot():
    loss = lightly("ibot_loss").IBOTPatchLoss(C).double()
    loss.center.center = CENTER[None]
    student, teacher = (x[FLAT] for x in PATCHES)
    return loss(teacher, student, MASK, teacher_temp=0.0625)


def lightly_targets():
    rows = VIEWS[:2].flatten(0, 1)
    return lightly("swav_loss").sinkhorn(rows, epsilon=0.1), kdtorch.sinkhorn_knopp(rows, temperature=0.1)


def weighed(assignments):
    """A weighted sum of an array of assignments."""
    return (assignments * torch.arange(assignments.numel()).cos().view_as(assignments)).sum()


def dinov2_dino():
    """DINOv2's loss over pairs of different views, added up as in its training loop: local views, and swapped global
    ones."""
    q = functional.softmax((VIEWS[:2].flip(-1) - CENTER) / 0.0625, -1)
    log_p = functional.log_softmax(VIEWS / 0.1, -1)
    local = -sum((a * b).sum(-1).mean() for a in q for b in log_p[2:])
    exchanged = -sum((a * b).sum(-1).mean() for a, b in zip(q.flip(0), log_p[:2], strict=True))
    return (local + exchanged) / 6


def dinov2_ibot():
    student, teacher = (x[FLAT] for x in PATCHES)
    q = functional.softmax((teacher - CENTER) / 0.0625, -1)
    values = (q * functional.log_softmax(student / 0.1, -1)).sum(-1)
    weights = (1 / FLAT.sum(-1).clamp(min=1.0)).unsqueeze(-1).expand_as(FLAT)[FLAT]
    return -(values * weights).sum() / len(FLAT)


def dinov2_koleo():
    x = functional.normalize(VIEWS[0], eps=1e-8)
    nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log(torch.nn.PairwiseDistance(2, eps=1e-8)(x, x[nearest]) + 1e-8).mean()


def dinov2_assignments():
    rows = (PATCHES[1][FLAT] / 0.1).exp().t()
    rows /= rows.sum()
    for _ in range(3):
        rows /= rows.sum(1, keepdim=True) * len(rows)
        rows /= rows.sum(0, keepdim=True) * rows.shape[1]
    return (rows * rows.shape[1]).t()


def our_assignments():
    return kdtorch.sinkhorn_knopp(PATCHES[1].flatten(0, 1), temperature=0.1, where=FLAT.flatten())


def dinov3_gram(**options):
    s, t = (functional.normalize(x, dim=-1) for x in PATCHES)
    s, t = s @ s.mT, t @ t.mT
    return functional.mse_loss(s.clamp(min=0), t.clamp(min=0)) if options else functional.mse_loss(s, t)


MOVES |= {
    "lightly": {
        "`DINOLoss(dim)(teachers, students, teacher_temp=τ)`": lambda: (lightly_dino(), dino()),
        "`IBOTPatchLoss(dim)(t[mask], s[mask], mask, teacher_temp=τ)`": lambda: (lightly_ibot(), ibot()),
        "`KoLeoLoss()(x)`": lambda: (lightly("koleo_loss").KoLeoLoss()(VIEWS[0]), kdtorch.koleo_loss(VIEWS[0])),
        "`swav_loss.sinkhorn(out, iterations, epsilon)`": lambda: map(weighed, lightly_targets()),
    },
    "dinov2": {
        "`DINOLoss` of local and exchanged global crops, over the number of pairs": lambda: (dinov2_dino(), dino()),
        "`iBOTPatchLoss.forward_masked(s, q, masks)`": lambda: (dinov2_ibot(), ibot()),
        "`KoLeoLoss()(x)`": lambda: (dinov2_koleo(), kdtorch.koleo_loss(VIEWS[0])),
        "`sinkhorn_knopp_teacher(t, temperature)` of the masked patches": lambda: (
            weighed(dinov2_assignments()),
            weighed(our_assignments()[FLAT.flatten()]),
        ),
        "DINOv3's `GramLoss(remove_neg=False)(s, t)`": lambda: (dinov3_gram(), kdtorch.gram_loss(*PATCHES)),
        "DINOv3's `GramLoss()(s, t)`": lambda: (
            dinov3_gram(remove_neg=True),
            kdtorch.gram_loss(*PATCHES, clip_negative="both"),
        ),
    },
}


def table(page):
    """The first cell and the factor of each row in a page's table of losses."""
    text = (PAGES / f"{page}.md").read_text()
    losses = re.search(r"^.* their value ÷ ours \|\n\|[- |]*\|\n((?:\|.*\n)*)", text, re.M)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in losses.splitlines()]
    return {row[0]: row[-1] for row in rows}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("page", MOVES)
def test_factors(page):
    factors = {row: factor for row, factor in table(page).items() if factor != "–"}
    assert set(factors) == set(MOVES[page])
    for row, numbers in MOVES[page].items():
        *theirs, ours = numbers()
        single = any(getattr(x, "dtype", None) == torch.float32 for x in theirs)
        rel = 1e-5 if single or factors[row].startswith("≈") else 1e-10
        expected = [FACTORS[factors[row]] * float(ours)] * len(theirs)
        assert [float(x) for x in theirs] == pytest.approx(expected, rel=rel), row


@pytest.mark.parametrize("page", SAME_GRADIENT)
def test_same_gradient(page):
    rows = re.findall(r"^\| (.*?) \| .*the gradient is the same", (PAGES / f"{page}.md").read_text(), re.M)
    assert set(rows) == set(SAME_GRADIENT[page])
    for row, (theirs, ours, larger) in SAME_GRADIENT[page].items():
        student = s3.clone().requires_grad_()
        values = [loss(student) for loss in (theirs, ours)]
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        rel = 1e-5 if values[0].dtype == torch.float32 else 1e-10
        torch.testing.assert_close(*gradients, rtol=rel, atol=rel * float(gradients[1].abs().max()), msg=row)
        if larger is not None:
            assert (values[0] - values[1]).item() == pytest.approx(float(larger), rel=10 * rel), row


def test_founding_conventions():
    """With the same arrays as features and scores, a term of one convention is the factor times that of the other."""
    names = [name for row in table("founding") for name in re.findall(r"`(\w+)`", row)]
    model = {"METRIC_LOSS_TYPE": "-".join(["kd", *names]), "KD_LOSS_WEIGHT": [1.0] * len(names)}
    config = {"MODEL": model | {"FEAT_DIM": C, "CLS_FEA_NUM": C}}
    student, teacher = s[:4], t[:4]
    feat = {"stu": student, "score_stu": student, "fea_stu": student, "feats_stu": student_maps}
    feat |= {"tea": teacher, "score_tea": teacher, "feats_tea": teacher_maps}
    target = torch.tensor([0, 3, 1, 6])
    terms = {}
    for conventions in ("founding", "published"):
        torch.manual_seed(0)
        loss = kdtorch.make_loss(config, C, 9, conventions=conventions).double()
        with torch.no_grad():
            terms[conventions] = loss.terms(feat=feat | {"index": target}, target=target)
    for row, factor in table("founding").items():
        for name in re.findall(r"`(\w+)`", row):
            founding, published = (float(terms[convention][name]) for convention in ("founding", "published"))
            if factor == "–":
                assert founding != pytest.approx(published)
            else:
                assert founding == pytest.approx(FACTORS[factor] * published, rel=1e-10), name


def test_cross_entropy_of_optax_has_the_gradient_of_kl():
    def theirs(x):
        return optax.losses.softmax_cross_entropy(x / T, jax.nn.softmax(TEACHER / T)).mean()

    ours = jax.grad(lambda x: kdjax.kl_loss(x, TEACHER, temperature=T))(S)
    np.testing.assert_allclose(jax.grad(theirs)(S), ours / T**2, rtol=1e-10)


def test_an_excluded_class_in_optax():
    x, y = (jnp.array([[1.0, value, -jnp.inf]]) for value in (0.0, 2.0))
    assert jnp.isnan(optax.losses.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y))).all()
    assert jnp.isnan(optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(x), jax.nn.log_softmax(y))).all()
    assert jnp.isfinite(optax.losses.safe_softmax_cross_entropy(x, jax.nn.softmax(y))).all()
    assert kdjax.kl_loss(x, y) == pytest.approx(float(kdjax.kl_loss(x[:, :2], y[:, :2])))


def test_alpha_of_torchdistill():
    """alpha=0 is not the limit of small alphas, because T² is lost; None needs a beta, which the call ignores."""
    assert kd(labels, alpha=1e-9) == pytest.approx(float(kl()), rel=1e-6)
    assert kd(labels, alpha=0) == pytest.approx(float(kl()) / T**2)
    with pytest.raises(TypeError):
        kd(labels, alpha=None)
    one, other = (kd(labels, alpha=A, beta=beta) for beta in (1 - A, None))
    assert one == other


@pytest.fixture
def wrapper(monkeypatch):
    """torchdistill's connectors, imported without its models, which need torchvision."""
    package = types.ModuleType("torchdistill.models")
    package.__path__ = [str(pathlib.Path(torchdistill.__file__).parent / "models")]
    monkeypatch.setitem(sys.modules, "torchdistill.models", package)
    monkeypatch.delitem(sys.modules, "torchdistill.models.wrapper", raising=False)
    from torchdistill.models import wrapper

    return wrapper


def test_weights_of_torchdistills_connectors(wrapper):
    """With its weights, renamed as on the page, our connectors return its maps."""
    page = (PAGES / "torchdistill.md").read_text().partition("## Weights of the connectors")[2]
    names = dict(re.findall(r"^\| `([\w.]+)` \| `(\w+)` \|$", page, re.M))
    widths, sizes = [(2, 5), (3, 4), (4, 3)], (8, 4, 2)
    configs = [
        {"io": "output", "path": str(i), "kwargs": {"in_channels": a, "mid_channels": 6, "out_channels": b}}
        for i, (a, b) in enumerate(widths)
    ]
    cpu = torch.device("cpu")
    theirs = wrapper.Student4KnowledgeReview(torch.nn.Identity(), configs, cpu, None, False, sizes=[*sizes[::-1]])
    ours = kdtorch.nn.ReviewKD([a for a, _ in widths], [b for _, b in widths], 6)
    weights = {}
    for i, connector in enumerate(theirs.abf_modules):
        for name, x in connector.state_dict().items():
            layer, _, weight = name.rpartition(".")
            weights[f"connectors.{len(widths) - 1 - i}.{names[layer]}.{weight}"] = x
    ours.load_state_dict(weights)
    maps = [torch.from_numpy(rng.normal(size=(2, a, n, n))).float() for (a, _), n in zip(widths, sizes, strict=True)]
    outputs = []
    for connector in theirs.abf_modules:
        connector.register_forward_hook(lambda module, inputs, output: outputs.insert(0, output[0]))
    theirs.secondary_forward({str(i): {"output": x} for i, x in enumerate(maps)})
    for a, b in zip(ours(maps), outputs, strict=True):
        torch.testing.assert_close(a, b)


def test_where_of_optax_masks_classes():
    """In the cross-entropy it removes classes from the normaliser too; in `kl_divergence` only from the sum."""
    kept = jnp.arange(C) % 3 > 0
    x, y = S / T, TEACHER / T
    left_out = [jnp.where(kept[None], z, -jnp.inf) for z in (x, y)]
    q = jax.nn.softmax(left_out[1])
    entropy = -jnp.where(q > 0, q * jnp.log(jnp.where(q > 0, q, 1)), 0).sum(-1)
    theirs = optax.losses.softmax_cross_entropy(x, q, where=jnp.broadcast_to(kept[None], x.shape)) - entropy
    np.testing.assert_allclose(theirs, kdjax.kl_loss(*left_out, reduction="none"), rtol=1e-10)
    log_p, q = jax.nn.log_softmax(x), jax.nn.softmax(y)
    theirs = optax.losses.kl_divergence(log_p, q, where=kept[None])
    np.testing.assert_allclose(theirs, (q * (jnp.log(q) - log_p))[:, kept].sum(-1), rtol=1e-10)
    assert not np.allclose(theirs, kdjax.kl_loss(*left_out, reduction="none"))


def test_targets_of_optax_need_not_be_a_distribution():
    log_p, q = jax.nn.log_softmax(S), jax.nn.softmax(TEACHER)
    assert optax.losses.kl_divergence(log_p, jnp.exp(log_p) / 2).max() < 0
    assert optax.losses.generalized_kl_divergence(log_p, jnp.exp(log_p) / 2).min() > 0
    unchanged = optax.losses.generalized_kl_divergence(log_p, q)
    np.testing.assert_allclose(unchanged, optax.losses.kl_divergence(log_p, q), rtol=1e-10)
    ours = kdjax.kl_loss(S, jnp.log(q / 2))  # logits up to a constant
    assert ours == pytest.approx(float(optax.losses.kl_divergence(log_p, q).mean()))


@pytest.mark.parametrize("far", [-1, 1])
def test_dkd_of_mdistiller_is_inf_where_the_label_is_far_from_the_rest(far):
    """Its probabilities underflow in float32, in either direction."""
    label = torch.tensor([0])
    for distance, finite in ((95, True), (104, False), (1000, False)):
        student, teacher = torch.zeros(2, 1, C)
        student[0, 0] = far * distance * T
        assert direct.dkd_loss(student, teacher, label, 1.0, 8.0, T).isfinite() == finite
        ours = kdtorch.dkd_loss(student, teacher, label, alpha=1.0, beta=8.0, temperature=T)
        assert ours.isfinite()
        assert ours == pytest.approx(
            float(kdtorch.dkd_loss(student.double(), teacher.double(), label, alpha=1.0, beta=8.0, temperature=T)),
            rel=1e-5,
        )


def test_the_ends_of_beta():
    """Near the ends it is about that fraction of a KL divergence, at the ends the whole; in TRL, Liger and kdlosses."""
    small = 1e-5
    for beta, kl in ((0, forward_kl()), (1, reverse_kl())):
        near = abs(beta - small)
        ends = [f(beta=beta, temperature=1.0) for f in (gkd, liger, jsd)]
        assert [float(x) for x in ends] == pytest.approx([float(kl)] * 3)
        close = [f(beta=near, temperature=1.0) for f in (gkd, liger, jsd)]
        assert [float(x) for x in close] == pytest.approx([small * float(kl)] * 3, rel=1e-2)


EXCLUDED, BOTH, ALL = (torch.tensor([[*x]]) for x in ((1, 0, -np.inf, 2), (0, 1, -np.inf, 1), (0, 1, 0.5, 1)))


@pytest.mark.parametrize("theirs", ["trl", "liger"])
def test_an_excluded_class_in(theirs):
    """It has a term of 0 times infinity, which is NaN; at the ends of beta, where the loss is inf, it has no such
    term."""
    loss = trl("experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss if theirs == "trl" else liger_function
    for student, teacher in ((EXCLUDED, BOTH), (EXCLUDED, ALL), (ALL, EXCLUDED)):
        for beta in (0, BETA, 1):
            x = student.clone().requires_grad_()
            ours, value = kdtorch.jsd_loss(x, teacher, beta=beta), loss(student, teacher, beta=beta)
            assert value == ours == torch.inf if ours.isinf() else value.isnan()
            if ours.isfinite():
                assert torch.autograd.grad(ours, x)[0].isfinite().all()
            else:
                assert beta in (0, 1)
    kept = [x[:, [0, 1, 3]] for x in (EXCLUDED, BOTH)]
    assert kdtorch.jsd_loss(EXCLUDED, BOTH) == pytest.approx(float(loss(*kept)))


def test_an_excluded_class_in_torchtune():
    """Its reverse KL removes the class from the value, but not from the gradient."""
    for student, teacher in ((EXCLUDED, BOTH), (EXCLUDED, ALL), (ALL, EXCLUDED)):
        x = student.clone().requires_grad_()
        theirs, ours = torchtune().ReverseKLLoss()(x, teacher, torch.tensor([0])), kdtorch.reverse_kl_loss(x, teacher)
        assert theirs.isfinite()
        assert torch.autograd.grad(theirs, x)[0].isnan().any()
        if teacher is EXCLUDED:
            assert ours == torch.inf
        else:
            assert theirs.item() == pytest.approx(ours.item())
            assert torch.autograd.grad(ours, x)[0].isfinite().all()


def test_tokens_ignored_throughout():
    every = {loss: getattr(torchtune(), loss)()(s3, t3, IGNORED) for loss in ("ForwardKLLoss", "ReverseKLLoss")}
    chunks = [x.chunk(2, 1) for x in (s3, t3)]
    for loss in ("Forward", "Reverse", "Symmetric"):
        every[loss] = getattr(torchtune(), f"{loss}KLWithChunkedOutputLoss")(2)(*chunks, IGNORED)
    assert [name for name, x in every.items() if x.isnan()] == ["Reverse", "Symmetric"]
    assert all(x == 0 for x in every.values() if not x.isnan())
    assert gkd(IGNORED) == liger(labels=IGNORED) == jsd(where=IGNORED > 0) == 0


def test_vocabularies_in_liger():
    """The student's shorter vocabulary is padded with logits of 0, which affect the loss."""
    head = torch.eye(C, dtype=s3.dtype)
    filled = torch.cat([s3[..., :-1], torch.zeros(3, N, 1, dtype=s3.dtype)], -1)
    ours = kdtorch.jsd_loss(filled, t3, beta=BETA, temperature=T, where=kept3)
    assert float(liger(student_head=head[:-1])) == pytest.approx(float(ours))
    with pytest.raises(TypeError):
        kdtorch.jsd_loss(s3[..., :-1], t3)
    cut = kdtorch.jsd_loss(s3[..., :-1], t3[..., :-1], where=kept3)
    excluded = [torch.where(torch.arange(C) < C - 1, x, -torch.inf) for x in (s3, t3)]
    assert float(kdtorch.jsd_loss(*excluded, where=kept3)) == pytest.approx(float(cut))


def test_settings_of_trl():
    """The defaults that the page mentions."""
    page = (PAGES / "trl.md").read_text()
    for name, module in (
        ("GKDConfig", "experimental.gkd.gkd_config"),
        ("GOLDConfig", "experimental.gold.gold_config"),
        ("DistillationConfig", "trainer.distillation_config"),
    ):
        fields = getattr(trl(module), name).__dataclass_fields__
        for setting in ("beta", "temperature"):
            assert re.search(rf"^\| `{setting}`.*`{name}`.*", page, re.M)
            (row,) = [x for x in page.splitlines() if x.startswith(f"| `{setting}`") and f"`{name}`" in x]
            named = re.search(rf"`{name}`[^|]*?, ([\d.]+)|([\d.]+) in [^,|]*`{name}`", row)
            assert fields[setting].default == float(named[1] or named[2]), (name, setting)


def test_js_distance_of_distillm_underflows():
    """In float32, for a class whose logits are 104 below the others in both."""
    student = teacher = torch.tensor([[0.0, -104.0]])
    mixture = 0.5 * functional.softmax(student, -1) + 0.5 * functional.softmax(teacher, -1)
    assert (functional.softmax(student, -1) * mixture.log()).isnan().any()
    assert kdtorch.jsd_loss(student, teacher) == kdtorch.skew_kl_loss(student, teacher) == 0


def test_trl_leaves_no_stand_ins():
    from transformers.utils import is_datasets_available, is_pandas_available

    trl("experimental.gkd.gkd_trainer")
    assert not any(isinstance(finder, StandIns) for finder in sys.meta_path)
    assert not any(isinstance(getattr(x, "__loader__", None), StandIns) for x in sys.modules.values())
    assert is_datasets_available() == (importlib.util.find_spec("datasets") is not None)
    assert is_pandas_available() == (importlib.util.find_spec("pandas") is not None)


def test_lightly_leaves_no_stand_ins():
    lightly("koleo_loss")
    assert not any(isinstance(finder, StandIns) for finder in sys.meta_path)
    assert not any(isinstance(getattr(x, "__loader__", None), StandIns) for x in sys.modules.values())


def test_no_masked_patch_in_lightly():
    """Its centre becomes NaN and stays NaN; ours does not change."""
    loss = lightly("ibot_loss").IBOTPatchLoss(C).double()
    nothing = torch.zeros_like(MASK)
    loss(*(x[nothing.flatten(1)] for x in PATCHES), nothing)
    assert loss.center.value.isnan().all()
    _, after = kdtorch.ibot_loss(*PATCHES, nothing.flatten(1), kdtorch.IBOTState(CENTER))
    assert torch.equal(after.center, CENTER)


def test_large_logits_in_lightly():
    """In float32 its exponentials overflow from t / T = 88.7 on, and its assignments become NaN."""
    rows = torch.tensor([[3.6, 0.0], [0.0, 1.0]])
    assert lightly("swav_loss").sinkhorn(rows, epsilon=0.04).isnan().any()
    assert kdtorch.sinkhorn_knopp(rows, temperature=0.04).sum(1).tolist() == pytest.approx([1, 1])
