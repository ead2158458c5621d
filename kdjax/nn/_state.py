"""How a module holds and updates the state of a loss."""

from __future__ import annotations

from typing import Any

from flax import nnx
from flax.errors import TraceContextError


class LossState(nnx.Variable):
    """The state that a loss carries from step to step, and that no optimiser changes.

    A step changes the value of the Variable and keeps the Variable itself, as `nnx.BatchNorm` does with its averages.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import DINOLoss, LossState
    >>> print(nnx.state(DINOLoss(3), LossState)["center"][...])
    [0. 0. 0.]
    """


class Stateful(nnx.Module):
    """A loss with a state."""

    use_running_average: bool  # named as in Flax's normalisation layers, so that `train`, `eval` and `nnx.view` set it

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Called by `nnx.view`.

        Args:
          use_running_average: if True, the state stays as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _move(self, **values: Any) -> None:
        for name, value in values.items():
            movable(self, name).set_value(value)


def movable(module: nnx.Module, name: str) -> nnx.Variable:
    """A Variable of a module whose value can be changed inside the current transformation.

    Flax does not let a transformation change a Variable that was created outside of it. A module that was merged inside
    the transformation, but without `copy=True`, gets a new Variable.

    Raises:
        TraceContextError: the module itself was created outside.
    """
    variable = getattr(module, name)
    try:
        variable.set_value(variable.get_value())
    except TraceContextError:
        try:
            setattr(module, name, variable.copy())
        except TraceContextError as error:
            raise TraceContextError(
                f"the state of {type(module).__name__.lstrip('_')} cannot be updated here, because the module is from outside "
                "the transformation that calls it, such as jax.grad or jax.jit. Give it as an argument to nnx.grad or "
                "nnx.jit; or split it, merge it inside with nnx.merge(..., copy=True), and return its state; or keep "
                "its state constant with `module.eval()`"
            ) from error
    return getattr(module, name)
