"""DINO's loss with its centre."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdlosses.settings import fraction, non_negative, positive, whole
from kdtorch._typing import ProcessGroup, Reduction, describe
from kdtorch.nn._state import Stateful
from kdtorch.selfsupervised.dino import DINOState, check_views, dino_init, dino_loss, dino_teacher_temperature


class DINOLoss(Stateful):
    """`dino_loss` with its centre and the teacher's warm-up, on views stacked along the batch axis.

    Args:
        dim: the width of the outputs.
        views: the number of student views.
        teacher_views: the number of teacher views, which are the first of the student's views.
        warmup_temperature: the teacher's temperature at epoch 0.
        teacher_temperature: the teacher's temperature after the warm-up.
        warmup_epochs: how many epochs the warm-up takes.
        student_temperature: the student's temperature.
        center_momentum: of the centre.

    Raises:
        ValueError: a `dim` below 1, views that do not fit, a temperature that is not positive, a momentum outside
            [0, 1].

    >>> import torch
    >>> from kdtorch.nn import DINOLoss
    >>> loss = DINOLoss(3)
    >>> print(f"{loss(torch.eye(4, 3), torch.eye(4, 3), epoch=0):.4f}")
    6.9414
    """

    center: Tensor

    def __init__(
        self,
        dim: int,
        *,
        views: int = 2,
        teacher_views: int = 2,
        warmup_temperature: float = 0.04,
        teacher_temperature: float = 0.04,
        warmup_epochs: int = 30,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        whole(0, views=views, teacher_views=teacher_views)
        check_views(views, teacher_views, f"views={views} and teacher_views={teacher_views}")
        positive(
            warmup_temperature=warmup_temperature,
            teacher_temperature=teacher_temperature,
            student_temperature=student_temperature,
        )
        non_negative(warmup_epochs=warmup_epochs)
        fraction(center_momentum=center_momentum)
        self.views, self.teacher_views = views, teacher_views
        self.warmup_temperature, self.teacher_temperature = warmup_temperature, teacher_temperature
        self.warmup_epochs, self.student_temperature = warmup_epochs, student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", dino_init(dim).center)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        epoch: int | Tensor = 0,
        *,
        teacher_targets: Tensor | None = None,
        where: Tensor | None = None,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        update: bool = True,
    ) -> Tensor:
        """The loss of a batch; in training mode the centre is updated.

        Args:
            student: `[views * batch, dim]`.
            teacher: `[teacher_views * batch, dim]`.
            epoch: of the training, for the warm-up.
            teacher_targets: `[teacher_views * batch, dim]`, probabilities to use instead of the centred teacher's; the
                centre then does not change.
            where: `[batch]`, False for examples that are left out; or `[views * batch]`, stacked like the student's
                views: an example is kept if all its views are kept.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            group: the process group that the batch is spread over.
            update: False leaves the centre unchanged.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: a batch axis that does not contain this number of views, an input or setting that `dino_loss`
                does not accept.
            TypeError: a shape or dtype that does not fit.
        """
        temperature = dino_teacher_temperature(
            epoch, warmup=self.warmup_temperature, final=self.teacher_temperature, warmup_epochs=self.warmup_epochs
        )
        targets = teacher_targets
        if targets is not None:
            targets = _unstack("teacher_targets", targets, self.teacher_views)
        loss, state = dino_loss(
            _unstack("student", student, self.views),
            _unstack("teacher", teacher, self.teacher_views),
            DINOState(self.center),
            teacher_temperature=temperature,
            student_temperature=self.student_temperature,
            center_momentum=self.center_momentum,
            teacher_targets=targets,
            where=_every_view(where, student, self.views),
            reduction=reduction,
            group=group,
            update=update,
        )
        if update and self.training:
            self._move(center=state.center)
        return loss


def _unstack(name: str, x: Tensor, views: int) -> Tensor:
    if not hasattr(x, "shape"):
        raise TypeError(f"`{name}` must be an array [views * batch, dim], got {describe(x)}")
    if x.ndim != 2 or x.shape[0] % views:
        raise ValueError(
            f"`{name}` must be [views * batch, dim] with {views} views stacked on the batch axis, got {list(x.shape)}; stack "
            "the views of the same examples"
        )
    return x.reshape(views, -1, x.shape[1])


def _every_view(where: Any, student: Tensor, views: int) -> Any:
    """Convert a mask of the stacked views to a mask of the examples."""
    stacked = hasattr(where, "shape") and where.ndim == 1 and where.shape == student.shape[:1]
    return where.reshape(views, -1).all(0) if stacked else where
