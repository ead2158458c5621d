"""The comparer itself: faults planted in copies of the losses, each of which it must find."""

import dataclasses
import itertools
import pathlib
import types

import pytest

import kdjax
from parity.cases import LOSSES, cases
from parity.check import DTYPES, check

ROOT = pathlib.Path(kdjax.__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Fault:
    """A copy of `package/path`, in which `old` is `new`, is wrong as a `loss` of the table."""

    what: str
    file: str
    loss: str
    old: str
    new: str

    def __str__(self):
        return f"{self.file.split('/')[0]}-{self.loss}-{self.what}".replace(" ", "-")


KL, DKD, NKD, USKD = (f"kdtorch/logits/{x}.py" for x in ("kl", "dkd", "nkd", "uskd"))
REGRESSION, DCN, HCL = (f"kdtorch/features/{x}.py" for x in ("regression", "dcn", "hcl"))
DINO = "kdtorch/selfsupervised/dino.py"
DIFFERENCE, EUCLIDEAN, CRCD = (
    f"kdjax/{x}.py" for x in ("logits/difference_kl", "relations/euclidean_mse", "relations/crcd")
)
RETURN = "return reduce(temperature**2 * divergence, where, reduction)"

FAULTS = [
    Fault("no T²", KL, "kl_loss", RETURN, "return reduce(divergence, where, reduction)"),
    Fault("T for T²", KL, "kl_loss", RETURN, "return reduce(temperature * divergence, where, reduction)"),
    Fault("sum for mean", KL, "kl_loss", RETURN, 'return reduce(temperature**2 * divergence, where, "sum")'),
    Fault("mask forgotten", KL, "kl_loss", RETURN, "return reduce(temperature**2 * divergence, None, reduction)"),
    Fault("mean over all where some are masked", KL, "kl_loss", RETURN, RETURN.replace("divergence,", "divergence * (1 if where is None else where.double().mean().to(divergence)),")),
    Fault("float32 for float64", KL, "kl_loss", RETURN, RETURN + ".float()"),
    Fault("float64 for float32", KL, "kl_loss", RETURN, RETURN + ".double()"),
    Fault("computed in half precision", KL, "kl_loss", "*widen(student_logits, teacher_logits)", "student_logits, teacher_logits"),
    Fault("shape [1] for a scalar", KL, "kl_loss", RETURN, RETURN + ".reshape(-1)"),
    Fault("arguments swapped", KL, "kl_loss", "kl_divergence(student, teacher.detach(),", "kl_divergence(teacher, student.detach(),"),
    Fault("reverse KL's value", KL, "symmetric_kl_loss", "* r).sum(-1), gradient", "* r).sum(-1) / 2, gradient"),
    Fault("no half", KL, "symmetric_kl_loss", "temperature**2 / 2 * divergence", "temperature**2 * divergence"),
    Fault("gradient's other distribution", KL, "symmetric_kl_loss", "p * reverse.sum", "q * reverse.sum"),
    Fault("gradient without 1/T", KL, "symmetric_kl_loss", "gradient / temperature", "gradient"),
    Fault("alpha and beta swapped", DKD, "dkd_loss", "alpha * target + beta * others", "beta * target + alpha * others"),
    Fault("next label", DKD, "dkd_loss", "is_class(student, labels)", "is_class(student, (labels + 1) % student.shape[-1])"),
    Fault("T twice", DKD, "dkd_loss", "kl_divergence(student_binary, teacher_binary, 1.0)", "kl_divergence(student_binary, teacher_binary, temperature)"),
    Fault("student detached", DKD, "dkd_loss", "binary_and_others(student,", "binary_and_others(student.detach(),"),
    Fault("teacher not detached", NKD, "nkd_loss", "    teacher = teacher.detach()\n", ""),
    Fault("sign", NKD, "nkd_loss", "target = -take_class", "target = take_class"),
    Fault("teacher without T", NKD, "nkd_loss", "-math.inf, teacher), temperature)", "-math.inf, teacher))"),
    Fault("eps inside a log", NKD, "nkd_loss", "cross_entropy(log_q.exp(), log_p)", "cross_entropy(log_q.exp(), (log_p.exp() + 1e-7).log())"),
    Fault("mask of -1000", NKD, "nkd_loss", "torch.where(label, -math.inf, student)", "(student - 1000.0 * label)"),
    Fault("least probable label", NKD, "nkd_loss-soft", "labels.argmax(-1)", "labels.argmin(-1)"),
    Fault("place off by one", USKD, "uskd_loss", "(_place(score.detach()) + 1)", "(_place(score.detach()) + 2)"),
    Fault("ties in the other order", USKD, "uskd_loss", "(-score).argsort(dim=-1, stable=True)", "score.argsort(dim=-1, stable=True).flip(-1)"),
    Fault("ranked the wrong way", USKD, "uskd_loss", "(-score).argsort", "score.argsort"),
    Fault("soft label not detached", USKD, "uskd_loss", "square + probability - mean, 0).detach()", "square + probability - mean, 0)"),
    Fault("masked examples in the batch mean", USKD, "uskd_loss", "present if where is None else present & where", "present"),
    Fault("second label forgotten", USKD, "uskd_loss-soft", "classes = [first, second]", "classes = [first, first]"),
    Fault("padding counted in C", USKD, "uskd_loss", "used.sum(-1, keepdim=True, dtype=student.dtype)", "student.shape[-1]"),
    Fault("teacher not detached", REGRESSION, "bce_loss", "(student, teacher.detach(), r", "(student, teacher, r"),
    Fault("sum over features", REGRESSION, "bce_loss", "entries.mean(-1)", "entries.sum(-1)"),
    Fault("n - 1 for n", "kdjax/features/regression.py", "mse_loss", "squared_error(student, jax.lax.stop_gradient(teacher))\n", "squared_error(student, jax.lax.stop_gradient(teacher)) * (student.shape[-1] / (student.shape[-1] - 1))\n"),
    Fault("NaN at zero", REGRESSION, "mse_loss", "mse_loss(student, teacher.detach(),", "mse_loss(student * student / student, teacher.detach(),"),
    Fault("no beta", REGRESSION, "smooth_l1_loss", "beta * scaled", "scaled"),
    Fault("the shorter of two norms", DCN, "dcn_loss", "student_square < teacher_square", "student_square > teacher_square"),
    Fault("centre not normalised", DCN, "dcn_loss", "unit(centers[labels])", "centers[labels]"),
    Fault("centre detached", DCN, "dcn_loss", "unit(centers[labels])", "unit(centers[labels].detach())"),
    Fault("no 1x1 level", HCL, "hcl_loss", "(4, 2, 1)", "(4, 2)"),
    Fault("weight", HCL, "hcl_loss", "weight /= 2", "weight /= 4"),
    Fault("layout", HCL, "hcl_loss", ".movedim(channel_axis, 1)", ".movedim(channel_axis, -1)"),
    Fault("width for height", HCL, "hcl_loss", "size < difference.shape[2]", "size < difference.shape[3]"),
    Fault("layout", "kdjax/features/hcl.py", "hcl_loss", "channel_axis: int = -1", "channel_axis: int = 1"),
    Fault("state updated before use", DINO, "dino_loss", "q = log_softmax(teacher - old.to(teacher.dtype)", "q = log_softmax(teacher - (momentum * old + (1 - momentum) * teacher.mean((0, 1)).to(old.dtype)).to(teacher.dtype)"),
    Fault("momentum of the other", DINO, "dino_loss", "momentum * old + (1 - momentum) * mean", "momentum * mean + (1 - momentum) * old"),
    Fault("state never updated", DINO, "dino_loss", "DINOState(torch.where(usable, center, old))", "DINOState(old)"),
    Fault("a view with itself", DINO, "dino_loss", "cross_entropy(others, log_p[:teacher_views])", "cross_entropy(every.expand_as(q), log_p[:teacher_views])"),
    Fault("number of pairs", DINO, "dino_loss", "(views * teacher_views - teacher_views)", "(views * teacher_views)"),
    Fault("teacher temperature for the student", DINO, "dino_loss", "log_softmax(student, student_temperature)", "log_softmax(student, teacher_temperature)"),
    Fault("columns for rows", DIFFERENCE, "difference_kl_loss", "pairs.sum(1)", "pairs.sum(0)"),
    Fault("n - 1 for n", DIFFERENCE, "difference_kl_loss", "count(kept, x.dtype)", "(count(kept, x.dtype) - 1)"),
    Fault("teacher not detached", EUCLIDEAN, "euclidean_mse_loss", "jax.lax.stop_gradient(_distances(teacher, partners))", "_distances(teacher, partners)"),
    Fault("absolute for square", EUCLIDEAN, "euclidean_mse_loss", "jnp.square(gap)", "jnp.abs(gap)"),
    Fault("near rows by products", EUCLIDEAN, "euclidean_mse_loss", "(~partners | (square * 64 > length.max())).all()", "jnp.asarray(True)"),
    Fault("wrong memory", CRCD, "crcd_loss", "state.teacher_memory, state.student_normalizer", "state.student_memory, state.student_normalizer"),
    Fault("no 1e-7", CRCD, "crcd_loss", "jnp.log(noise + 1e-7)", "jnp.log(noise)"),
    Fault("first of equal indices", CRCD, "crcd_loss", "last = _last_of_equals(index, valid)", "last = jnp.argmax((index[:, None] == index[None]) & valid[None], 1)"),
    Fault("memory not normalised", CRCD, "crcd_loss", "new = unit(momentum * old", "new = (momentum * old"),
    Fault("teacher's normaliser for both", CRCD, "crcd_loss", "        student_normalizer,\n        teacher_normalizer,\n    )\n    return", "        teacher_normalizer,\n        teacher_normalizer,\n    )\n    return"),
]  # fmt: skip


def copied(file, old="", new=""):
    """The module of a file, with a change, beside the one that is imported."""
    source = (ROOT / file).read_text()
    assert old in source, f"{file} no longer reads {old!r}"
    module = types.ModuleType(f"copy_of_{pathlib.Path(file).stem}")
    exec(compile(source.replace(old, new, 1) if old else source, file, "exec"), vars(module))
    return module


def differences(file, loss, package):
    """Of a module's loss from the oracle, one case and dtype after another."""
    framework = {"kdjax": "jax", "kdtorch": "torch"}[file.split("/")[0]]
    row = next(x for x in LOSSES if x.title == loss)
    for dtype, case in itertools.product(DTYPES, cases(row)):
        yield from check(case, dtype, [framework], **{framework: package})


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_every_fault_is_found(fault):
    package = copied(fault.file, fault.old, fault.new)
    assert not all(x.passed for x in differences(fault.file, fault.loss, package))


@pytest.mark.parametrize(("file", "loss"), [(KL, "kl_loss"), ("kdjax/features/hcl.py", "hcl_loss")])
def test_a_copy_without_a_fault_passes(file, loss):
    for x in itertools.islice(differences(file, loss, copied(file)), 8):
        assert x.passed, str(x)
