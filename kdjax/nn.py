"""The losses that own parameters or state, as modules: thin holders that call the functions.

State moves in training mode only: `module.eval()` uses it as it stands, `module.train()` moves it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax._numerics import promote
from kdjax._typing import Array, AxisName, describe
from kdjax.features.dcn import dcn_loss
from kdjax.logits.uskd import uskd_loss
from kdjax.relations.crcd import CRCDState, crcd_init, crcd_loss, crcd_negatives
from kdjax.selfsupervised.dino import DINOState, check_views, dino_init, dino_loss, dino_teacher_temperature

__all__ = [
    "ABF",
    "CRCDLoss",
    "CombinedLoss",
    "DINOLoss",
    "DynamicCenterNormLoss",
    "FunctionLoss",
    "LossState",
    "ReviewKD",
    "USKDLoss",
]

_CONV_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")


class LossState(nnx.Variable):
    """What a loss carries from step to step and no optimiser touches.

    A step puts a new one in the place of the old, so that a module merged inside `jax.grad` from a state outside of it
    can move its state.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import DINOLoss, LossState
    >>> print(nnx.state(DINOLoss(3), LossState)["center"][...])
    [0. 0. 0.]
    """


class DINOLoss(nnx.Module):
    """`dino_loss` with its centre and the teacher's warm-up, on views stacked along the batch axis.

    Args:
        dim: the width of the outputs.
        views: the number of student views.
        teacher_views: the number of teacher views, the first of the student's.
        warmup_temperature: the teacher's temperature at epoch 0.
        teacher_temperature: the teacher's temperature from epoch `warmup_epochs - 1` on.
        warmup_epochs: how many epochs the warm-up takes.
        student_temperature: the student's temperature.
        center_momentum: of the centre.

    Raises:
        ValueError: a `dim` below 1, views that do not fit.

    >>> import jax.numpy as jnp
    >>> from kdjax.nn import DINOLoss
    >>> loss = DINOLoss(3)
    >>> print(f"{loss(jnp.eye(4, 3), jnp.eye(4, 3), epoch=0):.4f}")
    6.9414
    """

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
        check_views(views, teacher_views, f"views={views} and teacher_views={teacher_views}")
        self.views, self.teacher_views = views, teacher_views
        self.warmup_temperature, self.teacher_temperature = warmup_temperature, teacher_temperature
        self.warmup_epochs, self.student_temperature = warmup_epochs, student_temperature
        self.center_momentum = center_momentum
        self.center = LossState(dino_init(dim).center)
        self.use_running_average = False

    def __call__(self, student: Array, teacher: Array, epoch: int | Array = 0, **options: Any) -> jax.Array:
        """The loss of a batch; in training mode the centre moves.

        Args:
            student: `[views * batch, dim]`.
            teacher: `[teacher_views * batch, dim]`.
            epoch: of the training, for the warm-up.
            options: of `dino_loss`: `where`, `reduction`, `axis_name`, `update`.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: a batch axis that is not so many views; what `dino_loss` refuses.
            TypeError: a shape or dtype that does not fit.
        """
        temperature = dino_teacher_temperature(
            epoch, warmup=self.warmup_temperature, final=self.teacher_temperature, warmup_epochs=self.warmup_epochs
        )
        loss, state = dino_loss(
            _unstack("student", student, self.views),
            _unstack("teacher", teacher, self.teacher_views),
            DINOState(self.center[...]),
            teacher_temperature=temperature,
            student_temperature=self.student_temperature,
            center_momentum=self.center_momentum,
            **options,
        )
        if not self.use_running_average:
            self.center = LossState(state.center)
        return loss


def _unstack(name: str, x: Array, views: int) -> Array:
    if not hasattr(x, "shape"):
        raise TypeError(f"`{name}` must be an array [views * batch, dim], got {describe(x)}")
    if x.ndim != 2 or x.shape[0] % views:
        raise ValueError(
            f"`{name}` must be [views * batch, dim] with {views} views stacked on the batch axis, got {list(x.shape)}; stack "
            "the views of the same examples"
        )
    return x.reshape(views, -1, x.shape[1])


class DynamicCenterNormLoss(nnx.Module):
    """`dcn_loss` with its learned class centres, drawn from a normal distribution.

    Args:
        num_classes: the number of classes.
        dim: the width of the features.
        rngs: of Flax.

    >>> from flax import nnx
    >>> from kdjax.nn import DynamicCenterNormLoss
    >>> DynamicCenterNormLoss(10, 4, rngs=nnx.Rngs(0)).centers.shape
    (10, 4)
    """

    def __init__(self, num_classes: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.centers = nnx.Param(jax.random.normal(rngs.params(), (num_classes, dim), jnp.float32))

    def __call__(self, student: Array, teacher: Array, labels: Array, **options: Any) -> jax.Array:
        """The loss of a batch.

        Args:
            student: `[*batch, dim]`.
            teacher: the same shape; constant, its gradient is 0.
            labels: `[*batch]`, the class of each example.
            options: of `dcn_loss`: `where`, `reduction`, `axis_name`.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: an unknown reduction.
            TypeError: a shape or dtype that does not fit.
        """
        return dcn_loss(student, teacher, labels, self.centers[...], **options)


class USKDLoss(nnx.Module):
    """`uskd_loss` with its weak head, a linear layer on an intermediate feature of the student.

    Args:
        feature_dim: the width of the feature.
        num_classes: the number of classes.
        alpha: weight of the target part.
        beta: weight of the non-target part.
        mu: weight of the weak head's own cross-entropy.
        rngs: of Flax.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import USKDLoss
    >>> loss = USKDLoss(8, 10, rngs=nnx.Rngs(0))
    >>> loss(jnp.ones((2, 8)), jnp.zeros((2, 10)), jnp.array([3, 4])).shape
    ()
    """

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        rngs: nnx.Rngs,
    ) -> None:
        self.head = nnx.Linear(feature_dim, num_classes, rngs=rngs)
        self.feature_dim, self.alpha, self.beta, self.mu = feature_dim, alpha, beta, mu

    def __call__(self, features: Array, student_logits: Array, labels: Array, **options: Any) -> jax.Array:
        """The loss of a batch; the weak head learns from it too.

        Args:
            features: `[*batch, feature_dim]`, of the student.
            student_logits: `[*batch, num_classes]`.
            labels: `[*batch]`, the class of each example, or a distribution `[*batch, num_classes]`.
            options: of `uskd_loss`: `where`, `reduction`, `axis_name`.

        Returns:
            A scalar, or `[*batch]` with `reduction="none"`.

        Raises:
            ValueError: what `uskd_loss` refuses.
            TypeError: a shape or dtype that does not fit.
        """
        weak_logits = _through(self.head, "features", features, self.feature_dim)
        return uskd_loss(student_logits, weak_logits, labels, alpha=self.alpha, beta=self.beta, mu=self.mu, **options)


def _through(head: Callable, name: str, x: Array, dim: int, constant: bool = False) -> jax.Array:
    """What a head makes of features of its width."""
    if not (isinstance(x, Array) and jnp.issubdtype(x.dtype, jnp.floating) and x.shape[-1:] == (dim,)):
        raise TypeError(f"`{name}` must be Float[Array, '*batch {dim}'], got {describe(x)}")
    (x,) = promote(jax.lax.stop_gradient(x) if constant else x)
    return head(x)


class CRCDLoss(nnx.Module):
    """`crcd_loss` with its two heads and its two memories; negatives are drawn at each call.

    Args:
        student_dim: the width of the student's features.
        teacher_dim: the width of the teacher's features.
        dim: the width of the embeddings.
        num_data: the number of samples in the data set.
        num_negatives: K, the negatives of each sample.
        embed: the heads: `"linear"`, `"nonlinear"` (three linear layers with ReLU between), or `"none"`.
        temperature: τ.
        momentum: of the memories.
        rngs: of Flax, for heads, memories and negatives.

    Raises:
        ValueError: an unknown `embed`; `"none"` with widths that differ.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import CRCDLoss
    >>> loss = CRCDLoss(8, 6, 4, num_data=50, num_negatives=10, rngs=nnx.Rngs(0))
    >>> loss(jnp.ones((2, 8)), jnp.ones((2, 6)), jnp.array([7, 30])).shape
    ()
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        dim: int,
        num_data: int,
        *,
        num_negatives: int = 500,
        embed: Literal["linear", "nonlinear", "none"] = "linear",
        temperature: float = 0.05,
        momentum: float = 0.5,
        rngs: nnx.Rngs,
    ) -> None:
        self.student_head = _head("student_dim", student_dim, dim, embed, rngs)
        self.teacher_head = _head("teacher_dim", teacher_dim, dim, embed, rngs)
        for field, value in crcd_init(rngs.params(), num_data, dim)._asdict().items():
            setattr(self, field, LossState(value))
        self.key = LossState(rngs.negatives())
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.num_data, self.num_negatives = num_data, num_negatives
        self.temperature, self.momentum = temperature, momentum
        self.use_running_average = False

    def __call__(
        self, student: Array, teacher: Array, index: Array, negatives: Array | None = None, **options: Any
    ) -> jax.Array:
        """The loss of a batch; in training mode the memories move.

        Args:
            student: `[batch, student_dim]`.
            teacher: `[batch, teacher_dim]`; constant, though its head learns.
            index: `[batch]`, the samples' places in the data set.
            negatives: `[batch, num_negatives]`, places too; drawn if None.
            options: of `crcd_loss`: `where`, `reduction`, `axis_name`, `sharded_memory`, `update`.

        Returns:
            A scalar, or `[batch]` with `reduction="none"`.

        Raises:
            ValueError: what `crcd_loss` refuses.
            TypeError: a shape or dtype that does not fit.
        """
        student = _through(self.student_head, "student", student, self.student_dim)
        teacher = _through(self.teacher_head, "teacher", teacher, self.teacher_dim, constant=True)
        key, used = jax.random.split(self.key[...])
        if negatives is None:
            negatives = crcd_negatives(used, len(student), self.num_negatives, self.num_data)
        loss, state = crcd_loss(
            student,
            teacher,
            index,
            negatives,
            CRCDState(*(getattr(self, field)[...] for field in CRCDState._fields)),
            temperature=self.temperature,
            momentum=self.momentum,
            **options,
        )
        if not self.use_running_average:
            self.key = LossState(key)
            for field, value in zip(CRCDState._fields, state, strict=True):
                setattr(self, field, LossState(value))
        return loss


def _identity(x: jax.Array) -> jax.Array:
    return x


def _head(name: str, in_dim: int, dim: int, embed: str, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    if embed == "linear":
        return nnx.Linear(in_dim, dim, rngs=rngs)
    if embed == "nonlinear":
        first, second = nnx.Linear(in_dim, in_dim, rngs=rngs), nnx.Linear(in_dim, dim, rngs=rngs)
        return nnx.Sequential(first, nnx.relu, second, nnx.relu, nnx.Linear(dim, dim, rngs=rngs))
    if embed != "none":
        raise ValueError(f'`embed` must be one of "linear", "nonlinear", "none", got {embed!r}')
    if in_dim != dim:
        raise ValueError(f'`{name}` must equal `dim` (={dim}) with embed="none", got {in_dim}')
    return _identity


class _BatchNorm(nnx.BatchNorm):
    """With PyTorch's running variance, that of a sample, so that what is trained here goes on there."""

    def __call__(self, x: Array, *args: Any, **options: Any) -> jax.Array:
        kept = self.momentum * self.var[...]
        normalised = super().__call__(x, *args, **options)
        if not self.use_running_average:
            number = x.size // x.shape[-1]
            self.var[...] = kept + (self.var[...] - kept) * (number / max(number - 1, 1))
        return normalised


class ABF(nnx.Module):
    """Attention-based fusion, ReviewKD's connector from one level of the student to the teacher's width.

    Args:
        in_channels: of the student's map.
        mid_channels: of the map that is handed on to the next level.
        out_channels: of the teacher's map.
        fuse: whether a map of the deeper level is fused in.
        rngs: of Flax.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import ABF
    >>> connector = ABF(8, 16, 32, False, rngs=nnx.Rngs(0))
    >>> output, fused = connector(jnp.ones((2, 4, 4, 8)))
    >>> output.shape, fused.shape
    ((2, 4, 4, 32), (2, 4, 4, 16))
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(in_channels, mid_channels, (1, 1), use_bias=False, kernel_init=_CONV_INIT, rngs=rngs)
        self.norm1 = _BatchNorm(mid_channels, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(mid_channels, out_channels, (3, 3), use_bias=False, kernel_init=_CONV_INIT, rngs=rngs)
        self.norm2 = _BatchNorm(out_channels, momentum=0.9, rngs=rngs)
        self.attention = nnx.Conv(2 * mid_channels, 2, (1, 1), rngs=rngs) if fuse else None

    def __call__(self, x: Array, deeper: Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Bring a map to the teacher's width.

        Args:
            x: `[batch, height, width, in_channels]`, the student's map.
            deeper: what the connector of the deeper level handed on, of any height and width; for `fuse=True`.

        Returns:
            The map for the teacher, `[batch, height, width, out_channels]`, and the map to hand on, of `mid_channels`.

        Raises:
            ValueError: no `deeper` where `fuse=True`.
        """
        x = self.norm1(self.conv1(x))
        if self.attention is not None:
            if deeper is None:
                raise ValueError("`deeper` must be given to a connector with `fuse=True`, got None")
            deeper = _resize(deeper, x.shape[1], x.shape[2])
            weight = nnx.sigmoid(self.attention(jnp.concatenate([x, deeper], -1)))
            x = x * weight[..., :1] + deeper * weight[..., 1:]
        return self.norm2(self.conv2(x)), x


def _resize(x: Array, height: int, width: int) -> jax.Array:
    """Nearest neighbour, each position taking the one at or before it."""
    rows, columns = (jnp.arange(n) * m // n for n, m in ((height, x.shape[1]), (width, x.shape[2])))
    return jnp.take(jnp.take(x, rows, axis=1), columns, axis=2)


class ReviewKD(nnx.Module):
    """The review connectors: a student's maps, each with the deeper ones fused in, brought to the teacher's widths.

    Compare the result with the teacher's maps by `hcl_loss`. Maps may have any sizes.

    Args:
        in_channels: of the student's maps, from the first to the deepest.
        out_channels: of the teacher's maps, in the same order.
        mid_channels: the width of the fused maps.
        rngs: of Flax.

    Raises:
        ValueError: numbers of channels that differ in length.

    Chen et al., *Distilling Knowledge via Knowledge Review*, CVPR 2021, https://arxiv.org/abs/2104.09044.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from kdjax.nn import ReviewKD
    >>> review = ReviewKD([4, 8], [16, 32], 8, rngs=nnx.Rngs(0))
    >>> maps = [jnp.ones((2, 8, 8, 4)), jnp.ones((2, 4, 4, 8))]
    >>> [x.shape for x in review(maps)]
    [(2, 8, 8, 16), (2, 4, 4, 32)]
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: Sequence[int], mid_channels: int, *, rngs: nnx.Rngs
    ) -> None:
        if not in_channels or len(in_channels) != len(out_channels):
            raise ValueError(
                "`in_channels` and `out_channels` must have one entry a map, at least one, got "
                f"{list(in_channels)} and {list(out_channels)}"
            )
        deepest = len(in_channels) - 1
        self.connectors = nnx.List(
            ABF(i, mid_channels, o, level < deepest, rngs=rngs)
            for level, (i, o) in enumerate(zip(in_channels, out_channels, strict=True))
        )

    def __call__(self, maps: Sequence[Array]) -> list[jax.Array]:
        """Bring the student's maps to the teacher's widths.

        Args:
            maps: of the student, `[batch, height, width, channels]`, from the first to the deepest.

        Returns:
            As many maps in the same order, of the teacher's channels and the student's heights and widths.

        Raises:
            ValueError: another number of maps than of connectors.
        """
        if len(maps) != len(self.connectors):
            raise ValueError(f"`maps` must hold {len(self.connectors)} maps, got {len(maps)}")
        outputs: list[jax.Array] = []
        fused = None
        for connector, x in zip(reversed(self.connectors), reversed(maps), strict=True):
            output, fused = connector(x, fused)
            outputs.insert(0, output)
        return outputs


class FunctionLoss(nnx.Module):
    """A loss without parameters or state, with its options.

    Args:
        function: the loss.
        options: its settings by name.

    >>> import jax.numpy as jnp
    >>> from kdjax.nn import FunctionLoss
    >>> from kdjax import mse_loss
    >>> print(FunctionLoss(mse_loss)(jnp.ones((2, 3)), jnp.zeros((2, 3))))
    1.0
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, tuple(options.items())

    def __call__(self, *inputs: Any, **options: Any) -> jax.Array:
        """The function's value.

        Args:
            inputs: of the function.
            options: beside those that it was built with.

        Returns:
            What the function gives.
        """
        return self.function(*inputs, **dict(self.options), **options)


class CombinedLoss(nnx.Module):
    """A weighted sum of losses over one batch; `make_loss` builds it from a configuration.

    Args:
        losses: the modules by name.
        weights: one number a loss.
        reads: for each loss where its inputs come from: keys of `feat`, `"target"`, `"epoch"`, or functions of a
            mapping of all these.

    Attributes:
        losses: the modules by name.

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
        weights: Sequence[float],
        reads: Sequence[Sequence[str | Callable[[Mapping[str, Any]], Any]]],
    ) -> None:
        self.losses = nnx.Dict(losses)
        self.names, self.weights, self.reads = tuple(losses), tuple(weights), tuple(map(tuple, reads))

    def __call__(
        self,
        score: Array | None = None,
        feat: Mapping[str, Any] | None = None,
        fea: Array | None = None,
        target: Array | None = None,
        epoch: int | Array = 0,
        *,
        axis_name: AxisName | None = None,
        update: bool = True,
    ) -> jax.Array:
        """The weighted sum of the losses of a batch.

        Args:
            score: taken as the founding code passes it, and not used.
            feat: what the losses read, by name.
            fea: as `score`.
            target: `[*batch]`, the classes, for the losses that read them.
            epoch: of the training, for the losses that read it.
            axis_name: for every loss.
            update: for the losses with a state; False leaves it as it was.

        Returns:
            A scalar.

        Raises:
            ValueError: an input that a loss reads is absent; what a loss refuses.
            TypeError: a `feat` that is no mapping; what a loss refuses.
        """
        return self.weigh(self.terms(score, feat, fea, target, epoch, axis_name=axis_name, update=update))

    def terms(
        self,
        score: Array | None = None,
        feat: Mapping[str, Any] | None = None,
        fea: Array | None = None,
        target: Array | None = None,
        epoch: int | Array = 0,
        *,
        axis_name: AxisName | None = None,
        update: bool = True,
    ) -> dict[str, jax.Array]:
        """The value of each loss by name, not weighted. States move as in a call; `weigh` makes the sum of it.

        Args:
            score: taken as the founding code passes it, and not used.
            feat: what the losses read, by name.
            fea: as `score`.
            target: `[*batch]`, the classes, for the losses that read them.
            epoch: of the training, for the losses that read it.
            axis_name: for every loss.
            update: for the losses with a state; False leaves it as it was.

        Returns:
            As many scalars as losses.

        Raises:
            ValueError: an input that a loss reads is absent; what a loss refuses.
            TypeError: a `feat` that is no mapping; what a loss refuses.
        """
        if not isinstance(feat, Mapping | None):
            raise TypeError(f"`feat` must be a mapping of what the losses read, got {describe(feat)}; give it by name")
        inputs = {**(feat or {}), "epoch": epoch, **({} if target is None else {"target": target})}
        terms = {}
        for name, reads in zip(self.names, self.reads, strict=True):
            loss, given = self.losses[name], (_read(name, source, inputs) for source in reads)
            stateful = {"update": update} if isinstance(loss, DINOLoss | CRCDLoss) else {}
            terms[name] = loss(*given, axis_name=axis_name, **stateful)
        return terms

    def weigh(self, terms: Mapping[str, Any]) -> jax.Array:
        """The weighted sum of what `terms` gives.

        Args:
            terms: the value of each loss by name.

        Returns:
            A scalar.
        """
        return sum(weight * terms[name] for name, weight in zip(self.names, self.weights, strict=True))


class _Inputs(dict):
    """The inputs of one loss, which say what is missing."""

    def __init__(self, name: str, inputs: Mapping[str, Any]) -> None:
        super().__init__(inputs)
        self.name = name

    def __missing__(self, key: str) -> Any:
        where = "`target`" if key == "target" else f"`feat[{key!r}]`"
        raise ValueError(f"the loss {self.name!r} reads {where}, which is absent; given are {sorted(self)}")


def _read(name: str, source: str | Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any]) -> Any:
    named = _Inputs(name, inputs)
    return named[source] if isinstance(source, str) else source(named)
