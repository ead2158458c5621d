"""iBOT's loss with its centre."""

from __future__ import annotations

from torch import Tensor

from kdlosses.settings import fraction, non_negative, positive
from kdtorch._typing import ProcessGroup, Reduction
from kdtorch.nn._state import Stateful
from kdtorch.selfsupervised.dino import dino_teacher_temperature
from kdtorch.selfsupervised.ibot import IBOTState, ibot_init, ibot_loss


class IBOTLoss(Stateful):
    """`ibot_loss` with its centre and the teacher's warm-up.

    Args:
        dim: the width of the outputs.
        warmup_temperature: the teacher's temperature at epoch 0.
        teacher_temperature: the teacher's temperature after the warm-up.
        warmup_epochs: how many epochs the warm-up takes.
        student_temperature: the student's temperature.
        center_momentum: of the centre.

    Raises:
        ValueError: a `dim` below 1, a temperature that is not positive, a momentum outside [0, 1].

    >>> import torch
    >>> from kdtorch.nn import IBOTLoss
    >>> loss, patches = IBOTLoss(3), torch.eye(3)[None]
    >>> print(f"{loss(patches, patches, torch.tensor([[True, False, True]]), epoch=0):.4f}")
    0.0001
    """

    center: Tensor

    def __init__(
        self,
        dim: int,
        *,
        warmup_temperature: float = 0.04,
        teacher_temperature: float = 0.04,
        warmup_epochs: int = 30,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        positive(
            warmup_temperature=warmup_temperature,
            teacher_temperature=teacher_temperature,
            student_temperature=student_temperature,
        )
        non_negative(warmup_epochs=warmup_epochs)
        fraction(center_momentum=center_momentum)
        self.warmup_temperature, self.teacher_temperature = warmup_temperature, teacher_temperature
        self.warmup_epochs, self.student_temperature = warmup_epochs, student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", ibot_init(dim).center)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
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
            student: `[batch, patches, dim]`, of the masked images.
            teacher: `[batch, patches, dim]`.
            mask: `[batch, patches]`, True for masked patches.
            epoch: of the training, for the warm-up.
            teacher_targets: `[batch, patches, dim]`, probabilities to use instead of the centred teacher's; the centre
                then does not change.
            where: `[batch]`, False for images that are left out.
            reduction: `"mean"`, `"sum"`, or `"none"` for `[batch]`.
            group: the process group that the batch is spread over.
            update: False leaves the centre unchanged.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: an input or setting that `ibot_loss` does not accept.
            TypeError: a shape or dtype that does not fit.
        """
        temperature = dino_teacher_temperature(
            epoch, warmup=self.warmup_temperature, final=self.teacher_temperature, warmup_epochs=self.warmup_epochs
        )
        loss, state = ibot_loss(
            student,
            teacher,
            mask,
            IBOTState(self.center),
            teacher_temperature=temperature,
            student_temperature=self.student_temperature,
            center_momentum=self.center_momentum,
            teacher_targets=teacher_targets,
            where=where,
            reduction=reduction,
            group=group,
            update=update,
        )
        if update and self.training:
            self._move(center=state.center)
        return loss
