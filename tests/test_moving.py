"""Moving over: each factor on the pages, from Optax and torchdistill themselves, or from the other code's formula."""

import pathlib
import re
import sys
import types

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
T, C, DELTA = 4.0, 7, 0.5
FACTORS = {"1": 1, "½": 0.5, "δ": DELTA, "1 / C": 1 / C, "1 / T²": 1 / T**2, "1 / (C T²)": 1 / (C * T**2)}

rng = np.random.default_rng(0)
S, TEACHER = rng.normal(size=(2, 5, C))
LABELS = rng.integers(C, size=5)
MAPS = [rng.normal(size=(2, 5, 3, 8, 8)), rng.normal(size=(2, 5, 4, 2, 2))]
CENTERS = rng.normal(size=(C, C))
s, t, labels = map(torch.from_numpy, (S, TEACHER, LABELS))
student_maps, teacher_maps = ([torch.from_numpy(maps[i]) for maps in MAPS] for i in range(2))
log_p, q = functional.log_softmax(s / T, 1), functional.softmax(t / T, 1)
memories = torch.from_numpy(rng.normal(size=(2, 9, C)))
state = kdtorch.CRCDState(*memories / memories.norm(dim=-1, keepdim=True), *torch.zeros(2, dtype=s.dtype))
index, negatives = torch.arange(5), torch.from_numpy(rng.integers(9, size=(5, 3)))


def kl():
    return kdtorch.kl_loss(s, t, temperature=T)


def longer():
    """The student's features, made longer than the teacher's."""
    return S * 10


# torchdistill's losses take what the models gave by the paths of modules
A, B = 0.25, 0.4
PLACES = ("logits", "output", "logits", "output")
WRAPPED = {
    "input": {"is_from_teacher": False, "module_path": "logits", "io": "output"},
    "target": {"is_from_teacher": True, "module_path": "logits", "io": "output"},
}


def distilled(loss, student, teacher, targets=None):
    return loss({"logits": {"output": student}}, {"logits": {"output": teacher}}, targets)


def kd(targets, **options):
    return distilled(mid_level.KDLoss(*PLACES, temperature=T, **options), s, t, targets)


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
        "FitNet: `mse_loss` of maps": lambda: (
            functional.mse_loss(student_maps[0], teacher_maps[0]),
            kdtorch.mse_loss(student_maps[0], teacher_maps[0]),
        ),
    },
    "repdistiller": {
        "`DistillKL(T)(ys, yt)`": lambda: (T**2 * functional.kl_div(log_p, q, reduction="sum") / len(s), kl()),
        "`HintLoss()(fs, ft)`": lambda: (functional.mse_loss(s, t), kdtorch.mse_loss(s, t)),
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
        "`HierarchicalContextLoss`, one a map, weights 1, summed": lambda: (
            sum(
                distilled(mid_level.HierarchicalContextLoss(*PLACES), (x, None), y)
                for x, y in zip(student_maps, teacher_maps, strict=True)
            ),
            kdtorch.hcl_loss(student_maps, teacher_maps),
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
        "`cosine_distance(s, centers[y]).mean()`, students the longer": lambda: (
            optax.losses.cosine_distance(longer(), CENTERS[LABELS]).mean(),
            kdjax.dcn_loss(longer(), TEACHER, LABELS, CENTERS),
        ),
    },
}


def table(page):
    """The first cell and the factor of each row of the page's table of losses."""
    text = (PAGES / f"{page}.md").read_text()
    losses = re.search(r"^.* its number is ours times \|\n\|[- |]*\|\n((?:\|.*\n)*)", text, re.M)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in losses.splitlines()]
    return {row[0]: row[-1] for row in rows}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
@pytest.mark.parametrize("page", MOVES)
def test_factors(page):
    factors = {row: factor for row, factor in table(page).items() if factor != "–"}
    assert set(factors) == set(MOVES[page])
    for row, numbers in MOVES[page].items():
        *theirs, ours = map(float, numbers())
        assert theirs == pytest.approx([FACTORS[factors[row]] * ours] * len(theirs), rel=1e-10), row


def test_founding_conventions():
    """On the same inputs, features and scores alike, a term of one convention is the factor times that of the other."""
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
    """0 is not the limit of small ones: T² is lost; None needs a beta, and the call ignores it."""
    assert kd(labels, alpha=1e-9) == pytest.approx(float(kl()), rel=1e-6)
    assert kd(labels, alpha=0) == pytest.approx(float(kl()) / T**2)
    with pytest.raises(TypeError):
        kd(labels, alpha=None)
    one, other = (kd(labels, alpha=A, beta=beta) for beta in (1 - A, None))
    assert one == other


@pytest.fixture
def wrapper(monkeypatch):
    """torchdistill's connectors, without its own models, whose import needs torchvision; the connectors do not."""
    package = types.ModuleType("torchdistill.models")
    package.__path__ = [str(pathlib.Path(torchdistill.__file__).parent / "models")]
    monkeypatch.setitem(sys.modules, "torchdistill.models", package)
    monkeypatch.delitem(sys.modules, "torchdistill.models.wrapper", raising=False)
    from torchdistill.models import wrapper

    return wrapper


def test_weights_of_torchdistills_connectors(wrapper):
    """Under the names of the page, its connectors' weights make ours give its maps."""
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
    """In the cross-entropy it leaves the normaliser too; in `kl_divergence`, the sum alone."""
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
    ours = kdjax.kl_loss(S, jnp.log(q / 2))  # logits of any level
    assert ours == pytest.approx(float(optax.losses.kl_divergence(log_p, q).mean()))


@pytest.mark.parametrize("far", [-1, 1])
def test_dkd_of_mdistiller_is_inf_where_the_label_is_far_from_the_rest(far):
    """Its probabilities underflow in float32, whichever way."""
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
