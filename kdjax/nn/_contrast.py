"""Shared by the modules that contrast an example with a memory: heads, memories and negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from kdjax._typing import Array, AxisName, Reduction
from kdjax.nn._heads import through
from kdjax.nn._state import LossState, Stateful
from kdjax.relations.crcd import crcd_negatives
from kdlosses.settings import fraction, positive, whole


class Contrast(Stateful):
    """A loss with two heads and two memories; negatives are drawn at each call."""

    function: ClassVar[Callable[..., Any]]
    start: ClassVar[Callable[..., Any]]
    held: ClassVar[Any]
    heads: ClassVar[tuple[str, ...]]

    def _build(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int,
        num_data: int,
        num_negatives: int,
        embed: str,
        temperature: float,
        momentum: float,
        rngs: nnx.Rngs,
    ) -> None:
        positive(temperature=temperature)
        fraction(momentum=momentum)
        whole(1, num_data=num_data, num_negatives=num_negatives)
        if embed not in self.heads:
            names = ", ".join(f'"{x}"' for x in self.heads)
            raise ValueError(f"`embed` must be one of {names}, got {embed!r}")
        self.student_head = _head("student_dim", student_dim, dim, embed, rngs)
        self.teacher_head = _head("teacher_dim", teacher_dim, dim, embed, rngs)
        for field, value in self.start(rngs.params(), num_data, dim)._asdict().items():
            setattr(self, field, LossState(value))
        self.key = LossState(rngs.negatives())
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.num_data, self.num_negatives = num_data, num_negatives
        self.temperature, self.momentum = temperature, momentum
        self.use_running_average = False

    def __call__(
        self,
        student: Array,
        teacher: Array,
        index: Array,
        negatives: Array | None = None,
        *,
        where: Array | None = None,
        reduction: Reduction = "mean",
        axis_name: AxisName | None = None,
        sharded_memory: bool = False,
        update: bool = True,
    ) -> jax.Array:
        """The loss of a batch; in training mode the memories are updated.

        Args:
            student: `[batch, student_dim]`.
            teacher: `[batch, teacher_dim]`; constant, but its head is trained.
            index: `[batch]`, the samples' positions in the data set.
            negatives: `[batch, num_negatives]`, also positions; drawn at random if None.
            where: `[batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
            sharded_memory: whether each device holds its own rows of the memories.
            update: False leaves the memories unchanged.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that the function does not accept.
            TypeError: a shape or dtype that does not fit.
        """
        student = through(self.student_head, "student", student, self.student_dim, where=where)
        teacher = through(self.teacher_head, "teacher", teacher, self.teacher_dim, constant=True, where=where)
        key, used = jax.random.split(self.key[...])
        if negatives is None:
            negatives = crcd_negatives(used, len(student), self.num_negatives, self.num_data)
        loss, state = self.function(
            student,
            teacher,
            index,
            negatives,
            self.held(*(getattr(self, field)[...] for field in self.held._fields)),
            temperature=self.temperature,
            momentum=self.momentum,
            where=where,
            reduction=reduction,
            axis_name=axis_name,
            sharded_memory=sharded_memory,
            update=update,
        )
        if not self.use_running_average:
            self._move(key=key, **(state._asdict() if update else {}))
        return loss


def _identity(x: jax.Array) -> jax.Array:
    return x


def _head(name: str, in_dim: int, dim: int, embed: str, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    if embed == "linear":
        return nnx.Linear(in_dim, dim, rngs=rngs)
    if embed == "nonlinear":
        first, second = nnx.Linear(in_dim, in_dim, rngs=rngs), nnx.Linear(in_dim, dim, rngs=rngs)
        return nnx.Sequential(first, nnx.relu, second, nnx.relu, nnx.Linear(dim, dim, rngs=rngs))
    if in_dim != dim:
        raise ValueError(f'`{name}` must equal `dim` (={dim}) with embed="none", got {in_dim}')
    return _identity
