"""iBOT's loss with its centre."""

from __future__ import annotations

import jax

from kdjax._typing import Array, AxisName, Reduction
from kdjax.nn._state import LossState, Stateful
from kdjax.selfsupervised.dino import dino_teacher_temperature
from kdjax.selfsupervised.ibot import IBOTState, ibot_init, ibot_loss
from kdlosses.settings import fraction, non_negative, positive


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

    >>> import jax.numpy as jnp
    >>> from kdjax.nn import IBOTLoss
    >>> loss, patches = IBOTLoss(3), jnp.eye(3)[None]
    >>> print(f"{loss(patches, patches, jnp.array([[True, False, True]]), epoch=0):.4f}")
    0.0001
    """

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
        self.center = LossState(ibot_init(dim).center)
        self.use_running_average = False

    def __call__(
        self,
        student: Array,
        teacher: Array,
        mask: Array,
        epoch: int | Array = 0,
        *,
        teacher_targets: Array | None = None,
        where: Array | None = None,
        reduction: Reduction = "mean",
        axis_name: AxisName | None = None,
        update: bool = True,
    ) -> jax.Array:
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
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
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
            IBOTState(self.center[...]),
            teacher_temperature=temperature,
            student_temperature=self.student_temperature,
            center_momentum=self.center_momentum,
            teacher_targets=teacher_targets,
            where=where,
            reduction=reduction,
            axis_name=axis_name,
            update=update,
        )
        if update and not self.use_running_average:
            self._move(center=state.center)
        return loss
