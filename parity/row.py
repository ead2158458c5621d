"""The row of a loss, which has what the tests need to know about it; it is in `parity/losses`, below the formula."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from parity import scales
from parity.kinds import Sizes

# the sizes that `Memory` refers to by default
MEMORY_SIZES = Sizes((96,), 700, 64, 6, 2, ((20, 12, 12),), 4000, 300, kept=64, teacher_dim=64, patches=12)


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory that the loss may use, forward and backward, for float32 inputs.

    Attributes:
        jax: how many arrays of the size of the largest input XLA may use in addition to the inputs and the results.
        torch: how many such arrays kdtorch may use at the same time, including the gradients.
        sizes: what differs from `MEMORY_SIZES`.
        largest: the number of four-byte entries of the largest array that is allowed; None means that of the largest
            input.
        factors: factors for the inputs that require a gradient, tested one after another, if large numbers are computed
            in a different way.
    """

    jax: float
    torch: float
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    largest: Callable[[Sizes], int] | None = None
    factors: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Sizes at which the loss is timed, and the speed that is claimed there, compared with the direct form.

    Attributes:
        title: a title of the sizes, shown after the loss's short name.
        sizes: the sizes of the inputs.
        torch: how many times faster eager kdtorch must be; None if nothing is claimed.
        jax: the same for kdjax under `jit`.
        memory: the fraction of the direct form's memory that each may use.
        options: the settings of the loss.
        factor: a factor for the logits.
        direct: whether the direct form fits a common machine.
        compiles: whether `torch.compile` can compile the direct form within minutes; it cannot if the form loops over a
            batch.
        dtype: the dtype of the inputs; the direct form converts them to float32 first, as training code usually does.
        masked: whether every fifth example is masked, which the direct form removes by indexing.
    """

    title: str
    sizes: Sizes
    torch: float | None = None
    jax: float | None = None
    memory: float | None = None
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    factor: float = 1.0
    direct: bool = True
    compiles: bool = True
    dtype: str = "float32"
    masked: bool = False


@dataclasses.dataclass(frozen=True)
class Growth:
    """How time and memory grow: the loss is timed once for each value of a size.

    Attributes:
        axis: the field of `Sizes` that grows.
        values: the values that it takes.
        sizes: the other sizes.
    """

    axis: str
    values: tuple[int, ...]
    sizes: Sizes


@dataclasses.dataclass(frozen=True)
class IllConditioned:
    """Wider limits for a case in which the formula itself amplifies the rounding errors of its inputs.

    Attributes:
        bounds: the limits of (value, gradient, state) for each dtype, in ULP; a dtype that is missing has those of
            `parity.check`.
        why: the reason why the formula is ill-conditioned there.
        scale: the smallest number that the error of the gradient is measured relative to, if its terms cancel.
    """

    bounds: dict[str, tuple[float, float, float]]
    why: str
    scale: float = 0.0


# for two unit rows that nearly coincide, in losses of distances or directions between rows
NEAR_ROWS = IllConditioned(
    {"float64": (64, 512, 64), "float32": (16, 512, 64)},
    "the rows are rounded once they have unit length, and two of them differ by a thousandth of that",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of the table. The defaults are right for an ordinary loss of single examples.

    What goes in:

    Attributes:
        formula: in plain loops, with the name of the loss; `parity.losses` explains how to write it.
        inputs: the kind of each input, a key of `parity.kinds.KINDS`, by name, in order.
        learns: the inputs that have a gradient; none if the result is constant.
        constant: the inputs whose gradient must be exactly 0.
        options: settings, each of which is one case; the first is the ordinary one.
        ranges: the range of random draws for each setting that may be a number or an array.
        forms: values of each option that determines the formula and is therefore not an array: a number or a text.
            Random draws use the values at the same position together.

        value: what the function returns: a value per example, with the reduction; the value of the whole batch, which
            cannot be divided among the examples; or an array per example, for a function whose result goes into a loss.
        leading: whether it accepts any number of leading axes.
        batch_coupled: whether the value of an example depends on the other examples.
        shift_invariant: whether adding a number to all logits of an example changes nothing.
        divergence: whether it is 0 if student and teacher are equal, and never negative.
        padding: whether a class at -inf in all logits contributes nothing.
        infinite: whether it is infinite where the student excludes, by a logit of -inf, a class that the teacher does not.
        other_maps: sizes of the teacher's maps, as in `Sizes`, for a case in which they differ from the student's.
        jumps: whether its gradient jumps where two logits, or two probabilities, are equal, so rounding may decide
            which.
        first_of_ties: whether the order of the examples decides which of two equal ones is used.
        partly_constant: whether a part that depends on the student is constant for the gradient.
        second_derivative: whether kdtorch has one, or raises an error; kdjax always has.
        laws: properties that only this loss has, by the names of their functions in `tests/laws.py`.

        scale: the size of the terms whose difference is the value: the smallest number that its error is measured
            relative to.
        gradient_scale: the same for the gradient.
        rounding: the smallest numbers that the errors of value and gradient are measured relative to, for difficult
            inputs.
        state_rounding: the same for a field of the state, given its value.
        ill_conditioned: wider limits, by the name of a perturbation in `parity.perturbations`, or of another case.

        memory: how much memory it may use.
        collectives: the collectives that each device takes part in if no example is masked, with XLA's names.
        depends_on_threads: whether sums are divided among threads, so the number of threads changes the last bits.
        benchmarks: where it is timed.
        growth: how its time and memory grow with a size.
    """

    formula: Callable[..., Any]
    inputs: dict[str, str]
    learns: tuple[str, ...]
    constant: tuple[str, ...] = ()
    options: tuple[dict[str, Any], ...] = ({},)
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    forms: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    value: Literal["example", "batch", "array"] = "example"
    leading: bool = True
    batch_coupled: bool = False
    shift_invariant: bool = False
    divergence: bool = False
    padding: bool = False
    infinite: bool = False
    other_maps: tuple[tuple[int, int, int], ...] = ()
    jumps: bool = False
    first_of_ties: bool = False
    partly_constant: bool = False
    second_derivative: bool = True
    laws: tuple[str, ...] = ()

    scale: float = 0.0
    gradient_scale: float = 0.0
    rounding: scales.Rounding = scales.of_logits
    state_rounding: Callable[[scales.Given, np.ndarray], float] = lambda given, value: 0.0
    ill_conditioned: dict[str, IllConditioned] = dataclasses.field(default_factory=dict)

    memory: Memory
    collectives: tuple[str, ...] = ()
    depends_on_threads: bool = False
    benchmarks: tuple[Benchmark, ...] = ()
    growth: Growth | None = None

    @property
    def name(self) -> str:
        """The name of the function in kdjax, in kdtorch and in `parity.losses`."""
        return self.formula.__name__

    @property
    def required(self) -> dict[str, Any]:
        """The settings without a default, with their values in the ordinary case."""
        parameters = inspect.signature(self.formula).parameters.values()
        return {
            x.name: self.options[0][x.name] for x in parameters if x.default is x.empty and x.name in self.options[0]
        }

    def of(self, package: Any) -> Callable[..., Any]:
        """The function in kdjax or kdtorch, with the settings that have no default."""
        function = getattr(package, self.name)
        return _with(function, tuple(self.required.items()))

    @property
    def first(self) -> str:
        """The first input, which is the student's if there is a student."""
        return next(iter(self.inputs))

    @property
    def title(self) -> str:
        """The name, with an addition if several rows have the same name."""
        return self.name + ("-soft" if "distribution" in self.inputs.values() else "")

    @property
    def state(self) -> str | None:
        return next((name for name, kind in self.inputs.items() if kind.endswith("State")), None)


@functools.cache
def _with(function: Callable[..., Any], settings: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """A function with settings; it is the same object for the same settings, so that it is compiled only once."""
    return functools.partial(function, **dict(settings)) if settings else function
