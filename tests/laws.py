"""The properties that the losses of the table have for any finite inputs; `test_properties.py` and `fuzz.py` test them.

A recipe describes an example independently of its size and precision. So each property can use the shapes that it
needs, and all examples of a loss share a few compiled programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from frameworks import JAX, TORCH
from hypothesis import strategies as st

from parity import scales
from parity.arrays import HALVES, jax_array, numpy_dtype, to_numpy, torch_tensor
from parity.calls import per_example
from parity.cases import KINDS, LOSSES, MAPS, Case, Loss, Sizes, along, draw, each_array
from parity.run import run, upstream

PACKAGES = {"jax": JAX, "torch": TORCH}
LARGE = 1e4
HOSTILE: dict[str, Callable[[np.ndarray, np.random.Generator, Any], np.ndarray]] = {
    "ordinary": lambda x, rng, limits: x,
    "ties": lambda x, rng, limits: np.round(x),
    "equal rows": lambda x, rng, limits: np.broadcast_to(x[:1], x.shape),
    "a zero row": lambda x, rng, limits: np.concatenate([0 * x[:1], x[1:]]),
    "zero": lambda x, rng, limits: 0 * x,
    "1e4": lambda x, rng, limits: LARGE * _signs(rng, x),
    "largest": lambda x, rng, limits: _largest(limits) * _signs(rng, x),
    "subnormal": lambda x, rng, limits: 3 * float(limits.smallest_subnormal) * _signs(rng, x),
    "of all sizes": lambda x, rng, limits: rng.choice(
        [0.0, -0.0, 1.0, -LARGE, LARGE, -_largest(limits), float(limits.tiny), -float(limits.smallest_subnormal)], x.shape
    ),
}  # fmt: skip
RELATIONS = ("apart", "equal", "padded", "excluded", "lowest", "lowest in the student")
SETTINGS = ("ordinary", "drawn", "least", "most")


def _largest(limits: Any) -> float:
    """The largest entry: 1e-4 of the dtype's largest number, so that sums do not overflow; in float16 that number."""
    return float(limits.max) * (1 if float(limits.max) < 1e6 else 1e-4)


def _signs(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    return rng.choice([-1.0, 1.0], x.shape)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A description of an example.

    Attributes:
        seed: the seed of the random numbers.
        student: how the student's numbers are changed, a key of `HOSTILE`.
        teacher: the same for the other inputs.
        relation: the relation of the two, one of `RELATIONS`: `"equal"`; `"padded"`: a class at -inf in all logits;
            `"excluded"`: only in the student's; `"lowest"` and `"lowest in the student"`: the same with a large
            negative number instead of -inf.
        setting: the choice of the hyperparameters, one of `SETTINGS`.
        mask: which examples are kept, one bit for each.
        form: the index of its size and precision in `FORMS`.
    """

    seed: int
    student: str
    teacher: str
    relation: str
    setting: str
    mask: int
    form: int


RECIPES = st.builds(
    Recipe,
    seed=st.integers(0, 2**32 - 1),
    student=st.sampled_from(list(HOSTILE)),
    teacher=st.sampled_from(list(HOSTILE)),
    relation=st.sampled_from(RELATIONS),
    setting=st.sampled_from(SETTINGS),
    mask=st.sampled_from([255, 0]) | st.integers(0, 255),
    form=st.integers(0, 2**16),
)


# examples that once violated a property
KEPT = (
    Recipe(4135871039, "ties", "ordinary", "excluded", "least", 255, 4),  # a weight of 0 times an infinite part
    Recipe(1835295431, "ordinary", "largest", "excluded", "most", 255, 4),  # a probability of 0 at an excluded label
    Recipe(64890790, "ordinary", "zero", "apart", "least", 255, 0),  # NaN at the label that NKD ignored
    Recipe(0, "1e4", "1e4", "apart", "ordinary", 255, 0),  # digits of DKD's target part
    Recipe(3217372416, "of all sizes", "ordinary", "lowest", "drawn", 138, 4),  # a column whose sum overflows
    Recipe(2409223080, "ordinary", "ordinary", "equal", "least", 255, 4),  # CRCD's normaliser beyond float32
    Recipe(1, "ordinary", "ordinary", "lowest in the student", "drawn", 255, 0),  # β KL overflows, T² β KL does not
    Recipe(
        40180, "1e4", "ordinary", "lowest in the student", "drawn", 255, 0
    ),  # T² times a part overflows, and γ T² times it does not
    Recipe(6, "1e4", "of all sizes", "equal", "ordinary", 255, 0),  # a gradient of DCN near the largest number
    Recipe(1, "ordinary", "of all sizes", "apart", "least", 255, 0),  # a step of the oracle larger than the input
    Recipe(841277490, "ordinary", "largest", "padded", "least", 255, 5),  # p - q and log(p / q) of different signs
    Recipe(268, "ordinary", "1e4", "excluded", "most", 255, 0),  # an excluded class to which the teacher gives e^-200
)


@dataclasses.dataclass(frozen=True)
class Form:
    """The axes of the batch (flattened for losses without leading axes), the number of classes, and the precision."""

    batch: tuple[int, ...]
    classes: int
    dtype: str

    def sizes(self, loss: Loss) -> Sizes:
        batch = self.batch if loss.leading else (int(np.prod(self.batch)),)
        n = self.classes
        return Sizes(batch, n, max(n - 2, 1), 3, 2, ((2, n, n + 1), (1, 1, 2)), 7, 2)


WHOLE, SINGLE = Form((4,), 5, "float64"), Form((1, 1, 2), 2, "float32")
# JAX compiles each form, so it has few, some of them twice; PyTorch compiles nothing
FORMS = {
    "jax": (WHOLE, SINGLE, Form((), 4, "float16"), WHOLE, SINGLE, Form((), 4, "bfloat16")),
    "torch": tuple(
        Form(batch, classes, dtype)
        for batch in ((4,), (1,), (), (3,), (2, 2), (1, 3), (1, 1, 2), (2, 1, 2))
        for classes in (2, 3, 5, 11)
        for dtype in ("float32", "float64", "float16", "bfloat16")
    ),
}


@dataclasses.dataclass(frozen=True)
class Example:
    """Inputs in NumPy, rounded to their precision, settings, a mask, and the upstream gradient."""

    inputs: dict[str, Any]
    options: dict[str, Any]
    where: np.ndarray
    weights: np.ndarray
    dtype: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The value of each example, their sum and mean, the gradients of a weighted sum (as lists), and the state."""

    values: np.ndarray
    sum: np.ndarray
    mean: np.ndarray
    gradients: dict[str, list[np.ndarray]]
    state: dict[str, np.ndarray]


def _limits(dtype: str) -> Any:
    return ml_dtypes.finfo(numpy_dtype(dtype))


def _numbers(loss: Loss) -> dict[str, str]:
    """The inputs that may get extreme values, and whether each belongs to the student or the teacher."""
    return {
        name: "student" if name == loss.first else "teacher"
        for name, kind in loss.inputs.items()
        if KINDS[kind].numbers or KINDS[kind].fit
    }


def example(loss: Loss, recipe: Recipe, form: Form) -> Example:
    sizes = form.sizes(loss)
    rng = np.random.default_rng(recipe.seed)
    (inputs,) = draw(loss, sizes, recipe.seed)
    limits = _limits(form.dtype)
    for name, side in _numbers(loss).items():
        kind = loss.inputs[name]
        batched = bool(sizes.batch) or KINDS[kind].axis is None

        def spoil(x: np.ndarray, name: str = name, side: str = side, kind: str = kind, batched: bool = batched) -> Any:
            axis = (KINDS[kind].axis or 0) if batched else 0
            rows = np.moveaxis(x if batched else x[None], axis, 0)
            rows = np.moveaxis(HOSTILE[getattr(recipe, side)](rows, rng, limits), 0, axis)
            fit = KINDS[kind].fit
            return (fit(rows) if fit else rows).reshape(x.shape)

        inputs[name] = each_array(inputs[name], spoil)
    options = _options(loss, recipe, rng)
    # a logit that overflows when it is divided by T would exclude the class
    _relate(loss, inputs, recipe.relation, -float(limits.max) / 2 * min(1.0, options.get("temperature", 1.0)))
    if loss.state and recipe.seed % 2:
        inputs[loss.state] |= {k: np.array(v) for k, v in KINDS[loss.inputs[loss.state]].later.items()}
    if recipe.seed % 3 == 0 and "labels" in loss.inputs.values():  # the same class for all
        inputs["labels"] = np.zeros_like(inputs["labels"])

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(numpy_dtype(form.dtype)).astype(np.float64) if x.dtype.kind == "f" else x

    with np.errstate(under="ignore"):
        inputs = {k: v if k == loss.state else each_array(v, rounded) for k, v in inputs.items()}
    bits = np.array([recipe.mask >> i & 1 for i in range(int(np.prod(sizes.batch)))], bool).reshape(sizes.batch)
    weights = upstream(Case(loss, "", (), seed=recipe.seed), bits.shape)
    return Example(inputs, options, bits, weights, form.dtype)


def _relate(loss: Loss, inputs: dict[str, Any], relation: str, lowest: float) -> None:
    student = loss.first
    teacher = next(iter((*loss.constant, *loss.learns[1:])), student)
    if relation == "equal" and loss.inputs[student] == loss.inputs[teacher]:
        inputs[teacher] = inputs[student]
    if not loss.padding or relation in ("apart", "equal") or inputs[student].shape[-1] < 3:
        return
    both = relation in ("padded", "lowest")
    for name in [name for name, kind in loss.inputs.items() if kind == "logits"][: 2 if both else 1]:
        inputs[name] = inputs[name].copy()
        inputs[name][..., -1] = lowest if "lowest" in relation else -np.inf
    if both and "labels" in inputs:
        inputs["labels"] = np.minimum(inputs["labels"], inputs[student].shape[-1] - 2)


def _options(loss: Loss, recipe: Recipe, rng: np.random.Generator) -> dict[str, float]:
    """Settings that float32 can represent. The range of temperatures is wider than in the table."""
    ends = {k: (0.01, 100.0) if "temperature" in k else v for k, v in loss.ranges.items()}
    drawn = {
        "ordinary": lambda low, high: (low * high) ** 0.5 if low else 1.0 if high > 1 else 0.5,
        "drawn": lambda low, high: np.exp(rng.uniform(np.log(low), np.log(high))) if low else rng.uniform(low, high),
        "least": lambda low, high: low,
        "most": lambda low, high: high,
    }[recipe.setting]
    options = {k: float(np.float32(drawn(*v))) for k, v in ends.items()}
    place = {"least": lambda n: 0, "drawn": lambda n: 1, "ordinary": lambda n: n // 2, "most": lambda n: n - 1}
    return options | {k: v[place[recipe.setting](len(v))] for k, v in loss.forms.items()}


def evaluate(name: str, loss: Loss, given: Example) -> Outcome:
    """Run a loss in a package, with `jit` in JAX."""
    return outcome(
        name,
        loss,
        _program(loss.title, forms(loss, given))(*jax_arguments(loss, given)) if name == "jax" else _torch(loss, given),
    )


def forms(loss: Loss, given: Example) -> tuple[tuple[str, Any], ...]:
    """The settings that must not be arrays; each of their values needs its own program."""
    return tuple((k, given.options[k]) for k in loss.forms if k in given.options)


def outcome(name: str, loss: Loss, result: tuple[Any, ...]) -> Outcome:
    """A package's result in NumPy, with the channels of maps first."""
    values, total, mean, gradients, state = result

    def array(key: str, x: Any) -> np.ndarray:
        return np.moveaxis(to_numpy(x), -1, -3) if name == "jax" and loss.inputs[key] in MAPS else to_numpy(x)

    return Outcome(
        to_numpy(values),
        to_numpy(total),
        to_numpy(mean),
        {k: [array(k, x) for x in _leaves(v)] for k, v in gradients.items()},
        {} if state is None else {k: to_numpy(v) for k, v in state._asdict().items()},
    )


def _leaves(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]


def _arguments(loss: Loss, given: Example, kd: Any, array: Callable) -> dict[str, Any]:
    def convert(name: str, x: np.ndarray) -> Any:
        dtype = "float32" if name == loss.state and given.dtype in HALVES else given.dtype
        return array(x.astype(numpy_dtype(dtype)) if x.dtype.kind == "f" else x, dtype)

    with np.errstate(under="ignore"):
        arrays = {k: each_array(v, functools.partial(convert, k)) for k, v in given.inputs.items()}
    if loss.state:
        arrays[loss.state] = getattr(kd, loss.inputs[loss.state])(**arrays[loss.state])
    return arrays


def jax_arguments(loss: Loss, given: Example) -> tuple[Any, ...]:
    maps = [k for k, kind in loss.inputs.items() if kind in MAPS]
    last = {k: each_array(given.inputs[k], lambda x: np.moveaxis(x, 1, -1)) for k in maps}
    arrays = _arguments(loss, dataclasses.replace(given, inputs=given.inputs | last), JAX.kd, jax_array)
    wide = "float64" if given.dtype == "float64" else "float32"
    learns = loss.learns + loss.constant
    return (
        {k: arrays.pop(k) for k in learns},
        arrays,
        jnp.asarray(given.where),
        {k: jnp.asarray(v, wide) for k, v in given.options.items() if k not in loss.forms},
        jnp.asarray(given.weights, wide),
    )


def objective(title: str, fixed: tuple[tuple[str, Any], ...] = (), reductions: bool = False) -> Callable[..., Any]:
    """All results of kdjax as one function of trained inputs, other inputs, mask, settings and cotangent.

    The `fixed` settings are not arguments. Without `reductions` the values take the place of their sum and mean.
    """
    loss = next(x for x in LOSSES if x.title == title)

    def outcome(free: Any, others: Any, where: Any, options: Any, cotangent: Any) -> Any:
        def call(free: Any, reduction: str) -> tuple[Any, Any]:
            inputs = {**free, **others}
            arguments = (inputs[k] for k in loss.inputs)
            result = per_example(JAX.kd, loss)(*arguments, where=where, reduction=reduction, **options, **dict(fixed))
            return result if loss.state else (result, None)

        def weighted(free: Any) -> Any:
            values, state = call(free, "none")
            return (values * cotangent).sum(), (values, state)

        gradients, (values, state) = jax.grad(weighted, has_aux=True)(free)
        total, mean = (call(free, x)[0] if reductions else values for x in ("sum", "mean"))
        return values, total, mean, gradients, state

    return outcome


@functools.cache
def _program(title: str, fixed: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(objective(title, fixed, reductions=True))


def _torch(loss: Loss, given: Example) -> tuple[Any, ...]:
    arrays = _arguments(loss, given, TORCH.kd, torch_tensor)
    free = {k: arrays[k] for k in loss.learns + loss.constant}
    leaves = [x for v in free.values() for x in _leaves(v)]
    for x in leaves:
        x.requires_grad_()

    def call(reduction: str) -> tuple[Any, Any]:
        where = torch.from_numpy(given.where)
        result = per_example(TORCH.kd, loss)(*arrays.values(), where=where, reduction=reduction, **given.options)
        return result if loss.state else (result, None)

    values, state = call("none")
    weight = torch.as_tensor(given.weights, dtype=values.dtype)
    known = values.requires_grad  # False if the result is constant
    slopes = iter(torch.autograd.grad(values, leaves, weight, allow_unused=True) if known else [None] * len(leaves))

    def slope(x: torch.Tensor) -> torch.Tensor:
        found = next(slopes)
        return torch.zeros_like(x) if found is None else found

    gradients = {k: [slope(x) for x in _leaves(v)] for k, v in free.items()}
    with torch.no_grad():
        return values, call("sum")[0], call("mean")[0], gradients, state


@dataclasses.dataclass
class Trial:
    """A recipe for a loss in a package, and its results."""

    name: str
    loss: Loss
    recipe: Recipe

    @functools.cached_property
    def own(self) -> tuple[Example, Outcome]:
        """The example and its results in the recipe's own size and precision."""
        forms = FORMS[self.name]
        return self.tried(forms[self.recipe.form % len(forms)])

    @functools.cached_property
    def whole(self) -> tuple[Example, Outcome]:
        """The example and its results in float64 and without a mask, for comparisons."""
        given = example(self.loss, self.recipe, WHOLE)
        return self.run(given, where=np.ones_like(given.where))

    def tried(self, form: Form) -> tuple[Example, Outcome]:
        return self.run(example(self.loss, self.recipe, form))

    def run(self, given: Example, **changes: Any) -> tuple[Example, Outcome]:
        changed = dataclasses.replace(given, **changes)
        return changed, evaluate(self.name, self.loss, changed)


def _given(loss: Loss, given: Example) -> scales.Given:
    """What the scales of the loss's row depend on."""
    entries = [x for k in _numbers(loss) for x in _leaves(given.inputs[k])]
    largest = max(map(scales.size, entries), default=0.0)
    limits = _limits(given.dtype)
    return scales.Given(largest, given.inputs, given.options, float(limits.tiny), float(limits.eps))


def _scales(loss: Loss, given: Example) -> tuple[float, float]:
    """The smallest numbers that errors of value and gradient are measured relative to, by the inputs' rounding."""
    return loss.rounding(_given(loss, given))


def close(got: Any, want: Any, dtype: str, limit: float, scale: float = 0.0) -> None:
    """Check that `got` agrees within `limit` ULP of the largest finite entry or of `scale`, and in infinite entries."""
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    finite = np.isfinite(got) & np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite]), f"{got} is not {want}"
    if not finite.any():
        return
    with np.errstate(over="ignore"):
        allowed = limit * float(_limits(dtype).eps) * max(float(np.abs(want[finite]).max()), scale)
        error = float(np.abs(got[finite] - want[finite]).max())
    tiny = float(_limits(dtype).tiny)  # a processor may round smaller numbers to 0
    assert error <= allowed + 16 * tiny, f"{error:.3g} apart (limit {allowed:.3g}): {got} is not {want}"


VALUE, GRADIENT = 64, 256  # in ULP, as in `parity`


def _same(trial: Trial, given: Example, got: Outcome, want: Outcome) -> None:
    value, gradient = _scales(trial.loss, given)
    close(got.values, want.values, "float64", VALUE, value)
    for k in trial.loss.learns:
        for a, b in zip(got.gradients[k], want.gradients[k], strict=True):
            close(a, b, given.dtype, GRADIENT, gradient)
    _same_state(trial, given, got, want)


def _same_state(trial: Trial, given: Example, got: Outcome, want: Outcome) -> None:
    for k, v in want.state.items():
        close(got.state[k], v, "float64", VALUE, trial.loss.state_rounding(_given(trial.loss, given), v))


def finite(trial: Trial) -> None:
    """Value, gradient and state are finite, with the right dtype; inf only if the exact number nearly overflows."""
    given, got = trial.own
    assert str(got.values.dtype) == ("float64" if given.dtype == "float64" else "float32")
    assert all(np.isfinite(x).all() for x in got.state.values()), f"the state: {got.state}"
    gradients = {k: v for k, v in got.gradients.items() if not all(np.isfinite(x).all() for x in v)}
    for k, v in got.gradients.items():
        assert {str(x.dtype) for x in v} == {given.dtype}, k
    if np.isfinite(got.values).all() and not gradients and not _excluded(trial):
        return
    if not np.isfinite(got.values).all() and not np.isposinf(got.values[~np.isfinite(got.values)]).all():
        raise AssertionError(f"{got.values}")
    case = Case(trial.loss, "", (given.inputs,), given.options, given.where, "none", seed=trial.recipe.seed)
    with np.errstate(all="ignore"):
        exact = run("oracle", case, given.dtype, gradients=bool(gradients))
        value = exact.values[0].astype(got.values.dtype)
        near = np.abs(exact.values[0]) > 0.99 * float(_limits(str(got.values.dtype)).max)
        assert np.array_equal(got.values[~near], np.where(np.isfinite(got.values), got.values, value)[~near]), (
            f"{got.values} where the formula gives {value}"
        )
        assert (np.isfinite(got.values) | np.isposinf(got.values)).all(), got.values
        least = min(1.0, float(np.abs(given.weights).min()))  # gradients are stored before they are weighted
        rounding = GRADIENT * float(_limits(given.dtype).eps) * _scales(trial.loss, given)[1]  # left by cancellation
        for k in gradients:
            want = exact.gradients[0][k] if isinstance(exact.gradients[0][k], list) else [exact.gradients[0][k]]
            for a, b in zip(gradients[k], want, strict=True):
                beyond = np.abs(b) + rounding > 0.99 * least * float(_limits(given.dtype).max)
                assert (np.isfinite(a) | (np.isinf(a) & beyond)).all(), f"the gradient of {k}: {a} where it is {b}"


def _excluded(trial: Trial) -> bool:
    return trial.loss.padding and trial.recipe.relation == "excluded"


def teacher_is_constant(trial: Trial) -> None:
    """The gradient of the teacher is exactly 0."""
    _, got = trial.own
    for k in trial.loss.constant:
        assert all((x == 0).all() for x in got.gradients[k]), k


def reductions(trial: Trial) -> None:
    """The sum is the sum of the values, the mean their mean over kept examples."""
    given, got = trial.own
    values = got.values.astype(np.longdouble)
    dtype, scale = str(got.values.dtype), _scales(trial.loss, given)[0]  # three separate programs
    with np.errstate(all="ignore"):
        for got_one, want in ((got.sum, values.sum()), (got.mean, values.sum() / max(given.where.sum(), 1))):
            if np.abs(values).sum() < float(_limits(dtype).max):
                close(got_one, want, dtype, 16, max(scale, float(np.abs(values).max(initial=0))))


def masked_is_nothing(trial: Trial) -> None:
    """A masked example has value 0 and gradient 0, exactly."""
    given, got = trial.own
    assert (got.values[~given.where] == 0).all()
    for k in trial.loss.learns:
        axis = KINDS[trial.loss.inputs[k]].axis
        for x in got.gradients[k] if axis is not None else ():
            rows = np.moveaxis(x, range(axis, axis + given.where.ndim), range(given.where.ndim))
            assert (rows[~given.where] == 0).all(), k


def mask_is_drop(trial: Trial) -> None:
    """Masking examples that hold NaN or numbers out of range equals dropping them, in value, gradient and state."""
    loss = trial.loss
    given, _ = trial.whole
    rng = np.random.default_rng(trial.recipe.seed)
    kept = np.sort(rng.permutation(4)[:2])
    where = np.isin(np.arange(4), kept)

    def spoil(x: np.ndarray, axis: int) -> np.ndarray:
        x = np.moveaxis(x.copy(), axis, 0)
        x[~where] = rng.choice([np.nan, np.inf]) if x.dtype.kind == "f" else -100
        return np.moveaxis(x, 0, axis)

    _, masked = trial.run(given, inputs=along(loss, given.inputs, spoil), where=where)
    short, dropped = trial.run(
        given,
        inputs=along(loss, given.inputs, lambda x, axis: np.take(x, kept, axis)),
        where=np.ones(2, bool),
        weights=given.weights[kept],
    )
    assert (masked.values[~where] == 0).all()
    value, gradient = _scales(loss, short)
    close(masked.values[where], dropped.values, "float64", VALUE, value)
    total = float(np.abs(dropped.values).max())
    close(masked.sum, dropped.sum, "float64", VALUE, max(value, total))
    close(masked.mean, dropped.mean, "float64", VALUE, max(value, total))
    for k in loss.learns:
        axis = KINDS[loss.inputs[k]].axis
        for a, b in zip(masked.gradients[k], dropped.gradients[k], strict=True):
            close(a if axis is None else np.take(a, kept, axis), b, "float64", GRADIENT, gradient)
            assert axis is None or (np.compress(~where, a, axis) == 0).all()
    _same_state(trial, short, masked, dropped)


def permutation(trial: Trial) -> None:
    """Examples in another order give the same values in that order, and the same next state."""
    if trial.loss.first_of_ties and trial.recipe.student != "ordinary":
        return
    given, want = trial.whole
    order = np.random.default_rng(trial.recipe.seed).permutation(4)
    moved = along(trial.loss, given.inputs, lambda x, axis: np.take(x, order, axis))
    _, got = trial.run(given, inputs=moved)
    close(got.values, want.values[order], "float64", VALUE, _scales(trial.loss, given)[0])
    _same_state(trial, given, got, want)


def shift_of_logits(trial: Trial) -> None:
    """A number added to all logits of an example changes nothing."""
    given, want = trial.whole
    kinds = ("views",) if trial.loss.state else ("logits",)  # not the teacher's views, which also move the centre
    moved = {k: v + 8.0 if trial.loss.inputs[k] in kinds else v for k, v in given.inputs.items()}
    logits = [(moved[k], v) for k, v in given.inputs.items() if trial.loss.inputs[k] in kinds]
    if trial.loss.jumps and not all(np.array_equal(x - 8.0, v) for x, v in logits):
        return  # rounding has made some of them equal
    after, got = trial.run(given, inputs=moved)
    _same(trial, after, got, want)


def never_negative(trial: Trial) -> None:
    """A divergence is never negative, and it is exactly 0, without a gradient, if student and teacher are equal."""
    _, got = trial.own
    assert (got.values >= 0).all()
    loss, (given, _) = trial.loss, trial.own
    student, teacher = loss.first, loss.constant[0]
    _, equal = trial.run(given, inputs={**given.inputs, student: given.inputs[teacher]})
    assert (equal.values == 0).all(), equal.values
    scale = _scales(loss, given)[1]
    for x in equal.gradients[student]:
        close(x, np.zeros_like(x), given.dtype, GRADIENT, scale)


def hot_limit(trial: Trial) -> None:
    """For large T, KL is half the mean over classes of the squared difference of the centred logits."""
    given, _ = trial.whole
    s, t = (given.inputs[k] for k in ("student_logits", "teacher_logits"))
    used = ~(np.isneginf(s) | np.isneginf(t))
    size = max(1.0, *(float(np.abs(x[used]).max(initial=0)) for x in (s, t)))
    s, t = (np.where(used, x / size, -np.inf) for x in (s, t))
    _, got = trial.run(given, inputs={"student_logits": s, "teacher_logits": t}, options={"temperature": 1e5})
    with np.errstate(invalid="ignore"):
        difference = np.where(used, s - t, 0)
    number = used.sum(-1, keepdims=True)
    centered = np.where(used, difference - difference.sum(-1, keepdims=True) / number, 0)
    want = np.square(centered).sum(-1) / (2 * number[..., 0])
    assert np.abs(got.values - want).max() <= 1e-4 * want.max() + 1e-12, (got.values, want)


def dkd_is_kl(trial: Trial) -> None:
    """With alpha 1 and beta 1 - q_y, an example's DKD is its KL."""
    given, _ = trial.whole
    temperature = {"temperature": given.options["temperature"]}
    parts = [
        trial.run(given, options={**temperature, "alpha": alpha, "beta": 1 - alpha})[1].values for alpha in (1.0, 0.0)
    ]
    plain = next(x for x in LOSSES if x.name == "kl_loss")
    logits = {k: given.inputs[k] for k in plain.inputs}
    whole = Trial(trial.name, plain, trial.recipe).run(given, inputs=logits, options=temperature)[1].values
    with np.errstate(all="ignore"):
        t = logits["teacher_logits"].astype(np.longdouble) / temperature["temperature"]
        t = np.exp(t - t.max(-1, keepdims=True))
        label = np.arange(t.shape[-1]) == given.inputs["labels"][..., None]
        rest = np.where(label, 0, t).sum(-1) / t.sum(-1)
        joined = parts[0] + np.where(rest == 0, 0, rest * parts[1]).astype(np.float64)
    there = np.isfinite(parts[1]) | np.isinf(whole)  # times T², a part may overflow where the sum does not
    close(joined[there], whole[there], "float64", VALUE, _scales(trial.loss, given)[0])


def split(trial: Trial) -> None:
    """The results of two halves of a batch give those of the batch: values, sum, gradients, and mean of the states."""
    loss, (given, want) = trial.loss, trial.whole
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        inputs = along(loss, given.inputs, lambda x, axis, half=half: np.take(x, np.arange(4)[half], axis))
        halves.append(trial.run(given, inputs=inputs, where=np.ones(2, bool), weights=given.weights[half]))
    values = np.concatenate([x.values for _, x in halves])
    value, gradient = _scales(loss, given)
    close(values, want.values, "float64", VALUE, value)
    total = float(np.abs(np.where(np.isfinite(values), values, 0)).max())
    with np.errstate(over="ignore"):
        there = np.abs(values).sum() < float(_limits("float64").max)
    if there:
        close(sum(x.sum for _, x in halves), want.sum, "float64", VALUE, max(value, total))
    for k in loss.learns:
        axis = KINDS[loss.inputs[k]].axis
        for parts in zip(want.gradients[k], *(x.gradients[k] for _, x in halves), strict=True):
            whole, *pieces = parts
            close(sum(pieces) if axis is None else np.concatenate(pieces, axis), whole, "float64", GRADIENT, gradient)
    masks = [k for k, kind in loss.inputs.items() if kind == "patch_mask"]  # the state is a mean over patches
    shares = np.array([x.inputs[masks[0]].sum() if masks else 2 for x, _ in halves], float)
    for k, v in want.state.items() if shares.all() else ():
        middle = sum(x.state[k] * share for (_, x), share in zip(halves, shares / shares.sum(), strict=True))
        close(middle, v, "float64", VALUE, loss.state_rounding(_given(loss, given), v))


def scaled_gradient(trial: Trial) -> None:
    """The gradient of a multiple of the loss is that multiple of the gradient."""
    given, want = trial.whole
    _, got = trial.run(given, weights=-4.0 * given.weights)
    gradient = _scales(trial.loss, given)[1]
    for k in trial.loss.learns:
        for a, b in zip(got.gradients[k], want.gradients[k], strict=True):
            if np.abs(b).max(initial=0) < _largest(_limits(given.dtype)):  # else intermediate numbers may overflow
                close(a, -4.0 * b, "float64", 4, gradient)


def a_bad_batch(trial: Trial) -> None:
    """A teacher that is not finite and not masked gives NaN for its example, and leaves the state unchanged."""
    loss, (given, _) = trial.loss, trial.whole
    teacher = "teacher" if loss.state else loss.constant[0]
    rng = np.random.default_rng(trial.recipe.seed)
    bad = given.inputs[teacher]
    bad = each_array(bad, np.copy)
    rows = np.moveaxis(_leaves(bad)[0], KINDS[loss.inputs[teacher]].axis, 0)
    rows[(1, ..., 0) if rows.ndim > 1 else 1] = np.nan if not loss.state else rng.choice([np.nan, np.inf])
    _, got = trial.run(given, inputs={**given.inputs, teacher: bad})
    assert np.isnan(got.values[1]), got.values
    assert np.isnan(got.mean) and np.isnan(got.sum)  # noqa: PT018
    for k, v in got.state.items():
        assert np.array_equal(v, given.inputs["state"][k]), k


def _rows_of_logits(loss: Loss) -> list[tuple[str, ...]]:
    """The inputs whose rows are distributions; inputs that form one distribution are grouped."""
    kinds = ("logits", "views", "teacher_views")
    rows = [(name,) for name, kind in loss.inputs.items() if kind in kinds]
    kept = tuple(name for name, kind in loss.inputs.items() if kind in ("kept_logits", "rest"))
    return rows + ([kept] if kept else [])


def no_distribution(trial: Trial) -> None:
    """A row of logits that is all -inf makes value and gradient of its example NaN, and no others; a mask hides it."""
    loss, (given, _) = trial.loss, trial.whole
    for names in _rows_of_logits(loss):
        bad = {k: given.inputs[k].copy() for k in names}
        for k, x in bad.items():
            x[(0, 1) if "view" in loss.inputs[k] else 1] = -np.inf
        _, got = trial.run(given, inputs={**given.inputs, **bad})
        together = loss.name == "difference_kl_loss" or loss.value == "batch"  # every value depends on every example
        assert np.array_equal(np.isnan(got.values), np.arange(4) == 1) or (together and np.isnan(got.values).all()), (
            f"{names}: {got.values}"
        )
        assert np.isnan(got.sum) and np.isnan(got.mean), names  # noqa: PT018
        for k in loss.learns:
            (x,) = got.gradients[k]
            if KINDS[loss.inputs[k]].axis is None:  # its gradient depends on every example
                assert np.isnan(x).any(), f"{names}, the gradient of {k}: {x}"
                continue
            x = np.moveaxis(x, KINDS[loss.inputs[k]].axis, 0)
            row = x[1, 0] if "view" in loss.inputs[k] else x[1]
            assert np.isnan(row).all(), f"{names}, the gradient of {k}: {row}"
            assert together or not np.isnan(x[[0, 2, 3]]).any(), f"{names}, the gradient of {k}: {x}"
        for k in loss.constant:
            assert all((x == 0).all() for x in got.gradients[k]), k
        for k, v in got.state.items() if names == ("teacher",) else ():
            assert np.array_equal(v, given.inputs["state"][k]), k

        where = np.arange(4) != 1
        _, got = trial.run(given, inputs={**given.inputs, **bad}, where=where)
        assert got.values[1] == 0, names
        assert not np.isnan(got.values).any(), f"{names}: {got.values}"
        for k in loss.learns:
            if KINDS[loss.inputs[k]].axis is None:
                assert not np.isnan(got.gradients[k][0]).any(), f"{names}, the gradient of {k}"
                continue
            x = np.moveaxis(got.gradients[k][0], KINDS[loss.inputs[k]].axis, 0)
            assert (x[1] == 0).all(), f"{names}, the gradient of {k}: {x[1]}"
            assert not np.isnan(x).any(), f"{names}, the gradient of {k}: {x}"


def _always(loss: Loss) -> bool:
    return True


# each property, and the losses that have it
LAWS: dict[Callable[[Trial], None], Callable[[Loss], Any]] = {
    finite: _always,
    teacher_is_constant: lambda loss: loss.constant,
    reductions: _always,
    masked_is_nothing: _always,
    mask_is_drop: _always,
    permutation: _always,
    shift_of_logits: lambda loss: loss.shift_invariant,
    never_negative: lambda loss: loss.divergence,
    hot_limit: lambda loss: "hot_limit" in loss.laws,
    dkd_is_kl: lambda loss: "dkd_is_kl" in loss.laws,
    split: lambda loss: not loss.batch_coupled,
    scaled_gradient: _always,
    a_bad_batch: lambda loss: loss.constant or loss.state,
    no_distribution: lambda loss: loss.value != "array" and _rows_of_logits(loss),
}


# properties of many examples together


def vmap_is_a_loop(name: str, loss: Loss, tried: list[tuple[Example, Outcome]]) -> None:
    """A stack of examples with their settings under `vmap` gives the results of each example alone."""
    _alike(name, loss, tried, _stacked_jax(loss, tried, jax.jit) if name == "jax" else _stacked_torch(loss, tried))


def jit_is_eager(name: str, loss: Loss, tried: list[tuple[Example, Outcome]]) -> None:
    """Without `jit`, operation by operation, the results are those of the compiled program."""
    _alike(name, loss, tried, _stacked_jax(loss, tried, lambda function: function))


def state_goes_on(name: str, loss: Loss, tried: list[tuple[Example, Outcome]]) -> None:
    """Over one example after another, in JAX with `scan`, the state keeps its dtype and shape and stays finite."""
    state = _arguments(loss, tried[0][0], PACKAGES[name].kd, jax_array if name == "jax" else torch_tensor)[loss.state]
    if name == "jax":
        arrays = jax.tree.map(lambda *x: jnp.stack(x), *(jax_arguments(loss, given) for given, _ in tried))
        function = objective(loss.title)

        def step(state: Any, given: Any) -> tuple[Any, Any]:
            free, fixed, *others = given
            *_, state = function(free, {**fixed, loss.state: state}, *others)
            return state, state

        _, states = jax.jit(lambda state, arrays: jax.lax.scan(step, state, arrays))(state, arrays)
        assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), states) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert all(np.isfinite(x).all() for x in states)
        return
    kinds = [(x.dtype, x.shape) for x in state]
    for given, _ in tried:
        inputs = {**_arguments(loss, given, TORCH.kd, torch_tensor), loss.state: state}
        _, state = per_example(TORCH.kd, loss)(*inputs.values(), **given.options)
        assert [(x.dtype, x.shape) for x in state] == kinds
        assert all(x.isfinite().all() for x in state)


def _stacked_jax(loss: Loss, tried: list[tuple[Example, Outcome]], transform: Callable) -> tuple[Any, ...]:
    arrays = jax.tree.map(lambda *x: jnp.stack(x), *(jax_arguments(loss, given) for given, _ in tried))
    return transform(jax.vmap(objective(loss.title, forms(loss, tried[0][0]))))(*arrays)


def _stacked_torch(loss: Loss, tried: list[tuple[Example, Outcome]]) -> tuple[Any, ...]:
    arguments = [
        {
            "inputs": _arguments(loss, given, TORCH.kd, torch_tensor),
            "options": {
                k: torch.tensor(v, dtype=torch.float64) for k, v in given.options.items() if k not in loss.forms
            },
            "where": torch.from_numpy(given.where),
            "weights": torch.from_numpy(given.weights),
        }
        for given, _ in tried
    ]
    learns, fixed = loss.learns + loss.constant, dict(forms(loss, tried[0][0]))

    def one(given: dict[str, Any]) -> tuple[Any, ...]:
        def weighted(free: dict[str, Any]) -> Any:
            inputs = {**given["inputs"], **free}.values()
            function = per_example(TORCH.kd, loss)
            result = function(*inputs, where=given["where"], reduction="none", **given["options"], **fixed)
            values, state = result if loss.state else (result, {})
            return (values * given["weights"]).sum(), (values, state)

        free = {k: given["inputs"][k] for k in learns}
        gradients, (values, state) = torch.func.grad(weighted, has_aux=True)(free)
        return values, values, values, gradients, state

    stacked = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *arguments)
    return torch.func.vmap(one)(stacked)


def _alike(name: str, loss: Loss, tried: list[tuple[Example, Outcome]], result: tuple[Any, ...]) -> None:
    *rest, state = result
    got = outcome(name, loss, (*rest, state or None))
    for i, (given, want) in enumerate(tried):
        gradients = {k: [x[i] for x in v] for k, v in got.gradients.items()}
        one = Outcome(got.values[i], got.sum[i], got.mean[i], gradients, {k: v[i] for k, v in got.state.items()})
        _same(Trial(name, loss, None), given, one, want)


# each property of many examples together, and where it is tested
TOGETHER: dict[Callable[..., None], Callable[[str, Loss], Any]] = {
    vmap_is_a_loop: lambda name, loss: True,
    jit_is_eager: lambda name, loss: name == "jax",
    state_goes_on: lambda name, loss: loss.state,
}


def obey(trial: Trial) -> None:
    """Test all properties of a trial's loss; an error says which one is violated."""
    for law in laws(trial.loss):
        _named(law, lambda law=law: law(trial))


def obey_together(name: str, loss: Loss, trials: list[Trial]) -> None:
    """Test the properties of many examples together."""
    alike: dict[tuple, list[tuple[Example, Outcome]]] = {}
    for trial in trials:
        alike.setdefault(forms(loss, trial.whole[0]), []).append(trial.whole)
    for law, applies in TOGETHER.items():
        if applies(name, loss):
            for tried in alike.values():
                _named(law, lambda law=law, tried=tried: law(name, loss, tried))


def _named(law: Callable, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        error.add_note(f"the law: {law.__name__}: {law.__doc__}")
        raise


def laws(loss: Loss) -> list[Callable[[Trial], None]]:
    return [law for law, applies in LAWS.items() if applies(loss)]
