"""Several losses as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax._numerics import weigh
from kdjax._typing import Array, AxisName, Reduction, describe
from kdjax.nn.function import FunctionLoss
from kdlosses.config import check_weights, weight_at


class CombinedLoss(nnx.Module):
    """A weighted sum of losses over one batch; `make_loss` builds it from a configuration.

    Args:
        losses: the modules by name.
        weights: for each loss a number, or a function of the epoch that returns one, such as a schedule.
        reads: for each loss, where its inputs come from: keys of `feat`, `"target"`, `"epoch"`, or functions of a
            mapping of all of these. A key that ends in `?` may be missing; the input is then None.

    Attributes:
        losses: the modules by name.

    Raises:
        ValueError: a different number of weights or reads than of losses, a weight that is negative or not a number.

    >>> import jax.numpy as jnp
    >>> from kdjax import mse_loss
    >>> from kdjax.nn import CombinedLoss, FunctionLoss
    >>> loss = CombinedLoss({"mse": FunctionLoss(mse_loss)}, [0.5], [("stu", "tea")])
    >>> print(loss(feat={"stu": jnp.ones((2, 3)), "tea": jnp.zeros((2, 3))}))
    0.5
    """

    def __init__(
        self,
        losses: Mapping[str, nnx.Module],
        weights: Sequence[float | Callable[[Any], Any]],
        reads: Sequence[Sequence[str | Callable[[Mapping[str, Any]], Any]]],
    ) -> None:
        names = list(losses)
        if len(reads) != len(names) or any(isinstance(sources, str) for sources in reads):
            raise ValueError(
                f'`reads` must have one tuple per loss, as in [("stu", "tea")], {len(names)} for {names}, got {reads}'
            )
        self.losses = nnx.Dict(losses)
        self.names, self.reads = tuple(names), tuple(map(tuple, reads))
        self.weights = tuple(check_weights("`weights`", weights, names))
        self._takes = tuple(_options(loss) for loss in losses.values())

    def __call__(
        self,
        score: Array | None = None,
        feat: Mapping[str, Any] | None = None,
        fea: Array | None = None,
        target: Array | None = None,
        epoch: int | Array | None = None,
        *,
        where: Array | None = None,
        reduction: Reduction | None = None,
        axis_name: AxisName | None = None,
        class_axis_name: AxisName | None = None,
        update: bool = True,
    ) -> jax.Array:
        """The weighted sum of the losses of a batch.

        Args:
            score: not used; the founding code passes it.
            feat: the inputs of the losses, by name.
            fea: not used; the founding code passes it.
            target: `[*batch]`, the classes, for the losses that read them.
            epoch: of the training, for losses that use it (None counts as 0) and for weights that are functions of it.
            where: `[batch]`, False for examples that are left out. This and the arguments below are passed to the
                losses that have them.
            reduction: None uses the reduction of each loss, which is `"mean"` unless it was built with another one.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
            class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.
                A loss of `score_stu` and `score_tea` that needs all classes on one device raises an error.
            update: False leaves the states of the losses unchanged.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: a missing input, a missing epoch for a weight, values of different shapes, an input that a loss
                does not accept.
            TypeError: a `feat` that is not a mapping, an input that a loss does not accept.
        """
        options: dict[str, Any] = {
            "where": where,
            "reduction": reduction,
            "axis_name": axis_name,
            "class_axis_name": class_axis_name,
        }
        terms = self.terms(score, feat, fea, target, epoch, **options, update=update)
        return self.weigh(terms, epoch)

    def terms(
        self,
        score: Array | None = None,
        feat: Mapping[str, Any] | None = None,
        fea: Array | None = None,
        target: Array | None = None,
        epoch: int | Array | None = None,
        *,
        where: Array | None = None,
        reduction: Reduction | None = None,
        axis_name: AxisName | None = None,
        class_axis_name: AxisName | None = None,
        update: bool = True,
    ) -> dict[str, jax.Array]:
        """The value of each loss by name, not weighted. States are updated as in a call; `weigh` returns the weighted sum.

        Args:
            score: not used; the founding code passes it.
            feat: the inputs of the losses, by name.
            fea: not used; the founding code passes it.
            target: `[*batch]`, the classes, for the losses that read them.
            epoch: of the training, for losses that use it (None counts as 0) and for weights that are functions of it.
            where: `[batch]`, False for examples that are left out. This and the arguments below are passed to the
                losses that have them.
            reduction: None uses the reduction of each loss, which is `"mean"` unless it was built with another one.
            axis_name: the mesh axis that the batch is spread over, inside `shard_map`.
            class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.
                A loss of `score_stu` and `score_tea` that needs all classes on one device raises an error.
            update: False leaves the states of the losses unchanged.

        Returns:
            As many scalars as losses, or values of each example with `reduction="none"`.

        Raises:
            ValueError: a missing input, a `class_axis_name` for a loss of logits that has no such argument, an input that a loss
                does not accept.
            TypeError: a `feat` that is not a mapping, an input that a loss does not accept.
        """
        if not isinstance(feat, Mapping | None):
            raise TypeError(
                f"`feat` must be a mapping from names to the inputs of the losses, got {describe(feat)}; give it by name"
            )
        inputs = {**(feat or {}), "epoch": 0 if epoch is None else epoch}
        inputs |= {} if target is None else {"target": target}
        options: dict[str, Any] = {
            "where": where,
            "reduction": reduction,
            "axis_name": axis_name,
            "class_axis_name": class_axis_name,
        }
        options |= {} if update else {"update": False}
        options = {key: value for key, value in options.items() if value is not None}
        terms = {}
        for name, reads, takes in zip(self.names, self.reads, self._takes, strict=True):
            if (
                "class_axis_name" in options
                and "class_axis_name" not in takes
                and any(x in ("score_stu", "score_tea") for x in reads)
            ):
                raise ValueError(
                    f"the loss {name!r} has no `class_axis_name`, because it needs all classes of an example in one place; gather its logits "
                    "and call it separately"
                )
            given = (_read(name, source, inputs) for source in reads)
            terms[name] = self.losses[name](*given, **{key: x for key, x in options.items() if key in takes})
        return terms

    def weigh(self, terms: Mapping[str, Any], epoch: int | Array | None = None) -> jax.Array:
        """The weighted sum of the values that `terms` returns.

        Args:
            terms: the value of each loss by name.
            epoch: of the training, for weights that are functions of it.

        Returns:
            A scalar, or `[batch]` if the values have one for each example.

        Raises:
            ValueError: a missing epoch for a weight, values of different shapes.
        """
        values = {name: jnp.asarray(terms[name]) for name in self.names}
        shape = next(iter(values.values())).shape
        if any(value.shape != shape for value in values.values()):
            shapes = {name: list(value.shape) for name, value in values.items()}
            raise ValueError(
                f"the losses must give values of one shape to be summed, got {shapes}; use `terms` instead"
            )
        weights = (weight_at(name, weight, epoch) for name, weight in zip(self.names, self.weights, strict=True))
        total: Any = sum(
            weigh(_number(weight, value), value) for weight, value in zip(weights, values.values(), strict=True)
        )
        return total


def _options(loss: Any) -> tuple[str, ...]:
    """The keyword parameters of a loss at a call; for a function as a module, those of the function."""
    called = loss.function if isinstance(loss, FunctionLoss) else loss
    try:
        return tuple(inspect.signature(called).parameters)
    except (TypeError, ValueError):  # for functions that are not written in Python
        return ()


def _number(weight: Any, value: jax.Array) -> Any:
    return jnp.asarray(weight, value.dtype) if hasattr(weight, "dtype") else float(weight)


class _Inputs(dict):
    """The inputs of one loss; a missing one is an error that names it."""

    def __init__(self, name: str, inputs: Mapping[str, Any]) -> None:
        super().__init__(inputs)
        self.name = name

    def __missing__(self, key: str) -> Any:
        where = "`target`" if key == "target" else f"`feat[{key!r}]`"
        raise ValueError(f"the loss {self.name!r} reads {where}, which is missing; given are {sorted(self)}")


def _read(name: str, source: str | Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]) -> Any:
    named = _Inputs(name, inputs)
    if not isinstance(source, str):
        return source(named)
    return named.get(source[:-1]) if source.endswith("?") else named[source]
