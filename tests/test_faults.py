"""Tests the comparison itself with faults in copies of the losses, all of which it must find."""

import dataclasses
import itertools
import pathlib
import sys
import types

import pytest

import kdjax
from parity.cases import LOSSES, cases
from parity.check import DTYPES, check

ROOT = pathlib.Path(kdjax.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """A copy of `package/path` in which `old` is replaced by `new`, so that a `loss` of the table is wrong.

    If the file has no loss, a copy of the file `user` is wrong, which takes its helpers from the first copy.
    """

    what: str
    file: str
    loss: str
    old: str
    new: str
    user: str = ""

    def __str__(self):
        return f"{self.file.split('/')[0]}-{self.loss}-{self.what}".replace(" ", "-")


KL, DKD, NKD, USKD = (f"kdtorch/logits/{x}.py" for x in ("kl", "dkd", "nkd", "uskd"))
TOPK = "kdtorch/logits/topk_kl.py"
REGRESSION, DCN, HCL = (f"kdtorch/features/{x}.py" for x in ("regression", "dcn", "hcl"))
DINO = "kdtorch/selfsupervised/dino.py"
DIFFERENCE, EUCLIDEAN = (f"kdjax/{x}.py" for x in ("logits/difference_kl", "relations/euclidean_mse"))
MEMORY, CRCD, CRD = (f"kdjax/relations/{x}.py" for x in ("_memory", "crcd", "crd"))
MINILM = "kdtorch/relations/minilm.py"
RETURN = "return reduce(times_square(temperature, divergence), where, reduction, group)"

FAULTS = [
    Fault("no T²", KL, "kl_loss", RETURN, "return reduce(divergence, where, reduction, group)"),
    Fault("T for T²", KL, "kl_loss", RETURN, "return reduce(temperature * divergence, where, reduction, group)"),
    Fault("sum for mean", KL, "kl_loss", RETURN, 'return reduce(times_square(temperature, divergence), where, "sum", group)'),
    Fault("mask forgotten", KL, "kl_loss", RETURN, "return reduce(times_square(temperature, divergence), None, reduction, group)"),
    Fault("mean over all where some are masked", KL, "kl_loss", RETURN, RETURN.replace("divergence),", "divergence) * (1 if where is None else where.double().mean().to(divergence)),")),
    Fault("float32 for float64", KL, "kl_loss", RETURN, RETURN + ".float()"),
    Fault("float64 for float32", KL, "kl_loss", RETURN, RETURN + ".double()"),
    Fault("rounded to half precision", KL, "kl_loss", "kl_divergence(student_logits, teacher_logits,", "kl_divergence(student_logits.half(), teacher_logits.half(),"),
    Fault("shape [1] for a scalar", KL, "kl_loss", RETURN, RETURN + ".reshape(-1)"),
    Fault("arguments swapped", KL, "kl_loss", "kl_divergence(student_logits, teacher_logits,", "kl_divergence(teacher_logits, student_logits,"),
    Fault("half the value", KL, "symmetric_kl_loss", "torch.linalg.vecdot(difference, tilted.d)", "(torch.linalg.vecdot(difference, tilted.d) / 2)"),
    Fault("no half", KL, "symmetric_kl_loss", "times_square(temperature, divergence / 2)", "times_square(temperature, divergence)"),
    Fault("gradient's other distribution", KL, "symmetric_kl_loss", "softmax_pulled_back(tilted.d, p)", "softmax_pulled_back(tilted.d, tilted.q)"),
    Fault("gradient without 1/T", KL, "symmetric_kl_loss", ".add_(difference).div_(temperature)", ".add_(difference)"),
    Fault("alpha and beta swapped", DKD, "dkd_loss", "weigh(square * alpha, target) + weigh(square * beta, others)", "weigh(square * beta, target) + weigh(square * alpha, others)"),
    Fault("next label", DKD, "dkd_loss", "_decoupled(*logits, labels,", "_decoupled(*logits, (labels + 1) % student_logits.shape[-1],"),
    Fault("T twice", DKD, "dkd_loss", "kl_and_gradient(x_binary, y_binary, 1.0)", "kl_and_gradient(x_binary, y_binary, temperature)"),
    Fault("student detached", DKD, "dkd_loss", "_decoupled(*logits, labels", "_decoupled(student_logits.detach(), teacher_logits, labels"),
    Fault("no gradient at the label", DKD, "dkd_loss", "gradient.scatter(-1, label, at_label)", "gradient"),
    Fault("no gradient of the target part", DKD, "dkd_loss", " - at_label * hat_p", ""),
    Fault("no gradient at the label", NKD, "nkd_loss", ".scatter_add_(-1, label, -q_y)", ""),
    Fault("sign", NKD, "nkd_loss", "target = -torch.where", "target = torch.where"),
    Fault("teacher without T", NKD, "nkd_loss", "cross_entropy_of_softmax(hat_p, x, hat_q.p, temperature)", "cross_entropy_of_softmax(hat_p, x, softmax(without_class(y, labels), 1.0, may_be_empty=True).p, temperature)"),
    Fault("eps inside a log", NKD, "nkd_loss", "log_p_y = x.gather(-1, label) - p.peak - p.log_total", "log_p_y = ((x.gather(-1, label) - p.peak - p.log_total).exp() + 1e-7).log()"),
    Fault("mask of -1000", NKD, "nkd_loss", "softmax(without_class(a, labels), temperature", "softmax(a - 1000.0 * x.new_zeros(x.shape).scatter(-1, label, 1.0), temperature"),
    Fault("least probable label", NKD, "nkd_loss-soft", "labels.argmax(-1)", "labels.argmin(-1)"),
    Fault("place off by one", USKD, "uskd_loss", "torch.arange(1, score.shape[-1] + 1", "torch.arange(2, score.shape[-1] + 2"),
    Fault("ties in the other order", USKD, "uskd_loss", "keys.argsort(dim=-1, stable=True)", "score.argsort(dim=-1, stable=True).flip(-1)"),
    Fault("ranked the wrong way", USKD, "uskd_loss", "(0 - score)", "(0 + score)"),
    Fault("no batch mean", USKD, "uskd_loss", "square + probabilities - mean", "square + probabilities"),
    Fault("masked examples in the batch mean", USKD, "uskd_loss", "present if where is None else present & where.unsqueeze(-1)", "present"),
    Fault("second label forgotten", USKD, "uskd_loss-soft", "torch.cat([first, second], -1)", "torch.cat([first, first], -1)"),
    Fault("padding counted in C", USKD, "uskd_loss", "0.1 / number", "0.1 / x.shape[-1]"),
    Fault("no bucket", TOPK, "topk_kl_loss", "if tail == \"renormalize\":\n        own", "if True:\n        own"),
    Fault("the rest without T", TOPK, "topk_kl_loss", "(math.log2(math.e) / temperature)", "math.log2(math.e)"),
    Fault("kept classes in the rest", TOPK, "topk_kl_loss", "torch.where(none, 0.0, -math.inf).to(x.dtype)", "0 * own"),
    Fault("one less the sum", TOPK, "topk_kl_loss", "    value, gradient = divergence_and_gradient(", "    p = (x / temperature).softmax(-1).gather(-1, places)\n    student = temperature * torch.cat([p.log(), (1 - p.sum(-1, keepdim=True)).log()], -1)\n    value, gradient = divergence_and_gradient("),
    Fault("gradient without targets", REGRESSION, "bce_loss", "(x.sigmoid() - y) / x.shape[-1]", "x.sigmoid() / x.shape[-1]"),
    Fault("sum over features", REGRESSION, "bce_loss", 'reduction="none").mean(-1)', 'reduction="none").sum(-1)'),
    Fault("n - 1 for n", "kdjax/features/regression.py", "mse_loss", "squared_error(student, jax.lax.stop_gradient(teacher))\n", "squared_error(student, jax.lax.stop_gradient(teacher)) * (student.shape[-1] / (student.shape[-1] - 1))\n"),
    Fault("NaN at zero", REGRESSION, "mse_loss", "difference = x - y", "difference = x * x / x - y"),
    Fault("no beta", REGRESSION, "smooth_l1_loss", "beta * (slope", "(slope"),
    Fault("the shorter of two norms", DCN, "dcn_loss", "square < teacher_square", "square > teacher_square"),
    Fault("centre not normalised", DCN, "dcn_loss", "unit(rows), teacher_square)", "rows, teacher_square)"),
    Fault("centre detached", DCN, "dcn_loss", "of_centers.to(centers.dtype)", "0 * of_centers.to(centers.dtype)"),
    Fault("no 1x1 level", HCL, "hcl_loss", "(4, 2, 1)", "(4, 2)"),
    Fault("weight", HCL, "hcl_loss", "0.5**level * height", "0.25**level * height"),
    Fault("layout", HCL, "hcl_loss", ".movedim(channel_axis, 1)", ".movedim(channel_axis, -1)"),
    Fault("width for height", HCL, "hcl_loss", "_sizes(x.shape[2])", "_sizes(x.shape[3])"),
    Fault("layout", "kdjax/features/hcl.py", "hcl_loss", "channel_axis: int = -1", "channel_axis: int = 1"),
    Fault("state updated before use", DINO, "dino_loss", "center = old.to(", "center = (momentum * old + (1 - momentum) * teacher.detach().double().mean((0, 1)).to(old.dtype)).to("),
    Fault("momentum of the other", DINO, "dino_loss", "momentum * center + (1 - momentum) * mean", "momentum * mean + (1 - momentum) * center"),
    Fault("state never updated", DINO, "dino_loss", "DINOState(moved_center(old, all_sum(total, group), kept * teacher_views, momentum))", "DINOState(old)"),
    Fault("a view with itself", DINO, "dino_loss", "(every - q).clamp(min=0)", "every.expand_as(q)"),
    Fault("number of pairs", DINO, "dino_loss", "views * teacher_views - teacher_views", "views * teacher_views"),
    Fault("teacher temperature for the student", DINO, "dino_loss", "teacher_temperature).p, temperature)", "teacher_temperature).p, teacher_temperature)"),
    Fault("columns for rows", DIFFERENCE, "difference_kl_loss", "pairs.sum(1)", "pairs.sum(0)"),
    Fault("n - 1 for n", DIFFERENCE, "difference_kl_loss", "count(kept, x.dtype)", "(count(kept, x.dtype) - 1)"),
    Fault("teacher not detached", EUCLIDEAN, "euclidean_mse_loss", "all_gather_constant(teacher, axis_name)", "all_gather(teacher, axis_name)"),
    Fault("absolute for square", EUCLIDEAN, "euclidean_mse_loss", "jnp.square(gap)", "jnp.abs(gap)"),
    Fault("near rows by products", EUCLIDEAN, "euclidean_mse_loss", "(~partners | (square * 64 > length.max(initial=0))).all()", "jnp.asarray(True)"),
    Fault("wrong memory", MEMORY, "crcd_loss", "old.teacher_memory, old.student_normalizer", "old.student_memory, old.student_normalizer", CRCD),
    Fault("wrong memory", MEMORY, "crd_loss", "old.teacher_memory, old.student_normalizer", "old.student_memory, old.student_normalizer", CRD),
    Fault("no 1e-7", MEMORY, "crcd_loss", "math.log(noise + 1e-7)", "math.log(noise)", CRCD),
    Fault("no 1e-7", MEMORY, "crd_loss", "math.log1p(1e-7 / noise)", "0.0", CRD),
    Fault("first of equal indices", MEMORY, "crcd_loss", "_last_of_equals(every_index, every_valid)", "jnp.argmax((every_index[:, None] == every_index[None]) & every_valid[None], 1)", CRCD),
    Fault("memory not normalised", MEMORY, "crcd_loss", "new = unit(momentum * old", "new = (momentum * old", CRCD),
    Fault("teacher's normaliser for both", MEMORY, "crcd_loss", "where(finite, student_normalizer", "where(finite, teacher_normalizer", CRCD),
    Fault("masked examples in the normaliser", CRD, "crd_loss", "jnp.where(known.kept[:, None], scores / temperature, -jnp.inf)", "scores / temperature"),
    Fault("negatives alone in the normaliser", CRD, "crd_loss", "log = jax.nn.logsumexp(logits, 1)", "log = jax.nn.logsumexp(logits[:, 1:], 1)"),
    Fault("no 1/T in the gradient", CRD, "crd_loss", "_pulled(slope, known) / temperature", "_pulled(slope, known)"),
    Fault("not by the width of a head", MINILM, "minilm_loss", "scale / math.sqrt(x.shape[-1])", "scale"),
    Fault("half the gradient", MINILM, "minilm_loss", "(slope + slope.mT)", "(slope + slope)"),
    Fault("masked columns", MINILM, "minilm_loss", "if columns is not None:", "if False:"),
    Fault("mean over all positions", MINILM, "minilm_loss", "kept.sum(-1, dtype=x.dtype).clamp(min=1)", "x.new_full(x.shape[:1], x.shape[1])"),
]  # fmt: skip


def copied(file, old="", new="", helpers=""):
    """A separate module from a file, with a change, or with helpers from the copy of another file."""
    source = (ROOT / file).read_text()
    assert old in source, f"{file} no longer reads {old!r}"
    if helpers:
        original = helpers.removesuffix(".py").replace("/", ".")
        assert f"from {original} import" in source
        source = source.replace(f"from {original} import", f"from copy_of_{pathlib.Path(helpers).stem} import")
    module = types.ModuleType(f"copy_of_{pathlib.Path(file).stem}")
    sys.modules[module.__name__] = module  # the annotations of a state are looked up there
    exec(compile(source.replace(old, new, 1) if old else source, file, "exec"), vars(module))
    return module


def differences(file, loss, package):
    """The differences between a module's loss and the oracle, for one case and dtype after another."""
    framework = {"kdjax": "jax", "kdtorch": "torch"}[file.split("/")[0]]
    row = next(x for x in LOSSES if x.title == loss)
    for dtype, case in itertools.product(DTYPES, cases(row)):
        yield from check(case, dtype, [framework], **{framework: package})


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=() if i % 12 == 0 else pytest.mark.slow, id=str(x)) for i, x in enumerate(FAULTS)]
)
def test_every_fault_is_found(fault):
    package = copied(fault.file, fault.old, fault.new)
    if fault.user:
        package = copied(fault.user, helpers=fault.file)
    found = next((x for x in differences(fault.file, fault.loss, package) if not x.passed), None)
    assert found is not None
    assert "raised" not in found.problem, found.problem  # a fault must be a wrong number, not a crash


@pytest.mark.parametrize(
    ("file", "loss"), [(KL, "kl_loss"), (DINO, "dino_loss"), ("kdjax/features/hcl.py", "hcl_loss")]
)
def test_a_copy_without_a_fault_passes(file, loss):
    for x in itertools.islice(differences(file, loss, copied(file)), 8):
        assert x.passed, str(x)
