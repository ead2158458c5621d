"""Shared by the modules that contrast an example with a memory: heads, memories and negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdlosses.settings import fraction, positive, whole
from kdtorch._typing import ProcessGroup, Reduction
from kdtorch.nn._heads import through
from kdtorch.nn._state import Stateful
from kdtorch.relations.crcd import crcd_negatives


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
        generator: torch.Generator | None,
    ) -> None:
        positive(temperature=temperature)
        fraction(momentum=momentum)
        whole(1, num_data=num_data, num_negatives=num_negatives)
        if embed not in self.heads:
            names = ", ".join(f'"{x}"' for x in self.heads)
            raise ValueError(f"`embed` must be one of {names}, got {embed!r}")
        self.student_head = _head("student_dim", student_dim, dim, embed)
        self.teacher_head = _head("teacher_dim", teacher_dim, dim, embed)
        for field, value in self.start(generator, num_data, dim)._asdict().items():
            self.register_buffer(field, value)
        self.generator = generator
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.num_data, self.num_negatives = num_data, num_negatives
        self.temperature, self.momentum = temperature, momentum

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        index: Tensor,
        negatives: Tensor | None = None,
        *,
        where: Tensor | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        sharded_memory: bool = False,
        update: bool = True,
    ) -> Tensor:
        """The loss of a batch; in training mode the memories are updated.

        Args:
            student: `[batch, student_dim]`.
            teacher: `[batch, teacher_dim]`; constant, but its head is trained.
            index: `[batch]`, the samples' positions in the data set.
            negatives: `[batch, num_negatives]`, also positions; drawn at random if None.
            where: `[batch]`, False for examples that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            group: the process group that the batch is spread over.
            sharded_memory: whether each device holds its own rows of the memories.
            update: False leaves the memories unchanged.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that the function does not accept.
            IndexError: an index outside `0 .. num_data - 1`.
            TypeError: a shape or dtype that does not fit.
        """
        student = through(self.student_head, "student", student, self.student_dim, where=where)
        teacher = through(self.teacher_head, "teacher", teacher, self.teacher_dim, constant=True, where=where)
        if negatives is None:
            negatives = crcd_negatives(self.generator, len(student), self.num_negatives, self.num_data)
            negatives = negatives.to(student.device)
        loss, state = self.function(
            student,
            teacher,
            index,
            negatives,
            self.held(*(getattr(self, field) for field in self.held._fields)),
            temperature=self.temperature,
            momentum=self.momentum,
            where=where,
            reduction=reduction,
            group=group,
            sharded_memory=sharded_memory,
            update=update and self.training,
        )
        if update and self.training:  # the memories were updated in place
            self._move(student_normalizer=state.student_normalizer, teacher_normalizer=state.teacher_normalizer)
        return loss


def _head(name: str, in_dim: int, dim: int, embed: str) -> nn.Module:
    if embed == "linear":
        return nn.Linear(in_dim, dim)
    if embed == "nonlinear":
        first, second = nn.Linear(in_dim, in_dim), nn.Linear(in_dim, dim)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(dim, dim))
    if in_dim != dim:
        raise ValueError(f'`{name}` must equal `dim` (={dim}) with embed="none", got {in_dim}')
    return nn.Identity()
