"""The JAX half of `digits.py`: Flax NNX and Optax, with a jitted step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kdjax import (
    alpha_beta_loss,
    bce_loss,
    difference_kl_loss,
    dist_loss,
    dkd_loss,
    euclidean_mse_loss,
    hcl_loss,
    jsd_loss,
    kl_loss,
    mse_loss,
    nkd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    smooth_l1_loss,
    standardize_logits,
    symmetric_kl_loss,
    taid_loss,
    tvd_loss,
    uld_loss,
)
from kdjax.nn import CRCDLoss, DINOLoss, DynamicCenterNormLoss, ReviewKD, USKDLoss

if TYPE_CHECKING:
    from digits import Plan, Setting


class Output(NamedTuple):
    """The outputs of a network for images: its logits, embedding and feature maps."""

    logits: jax.Array
    embedding: jax.Array
    maps: list[jax.Array]


class Net(nnx.Module):
    """Two convolutions and two linear layers, for the teacher and, narrower, for the student."""

    def __init__(self, channels: tuple[int, int], width: int, classes: int, *, rngs: nnx.Rngs) -> None:
        init: dict[str, Any] = {"kernel_init": nnx.initializers.he_uniform(), "rngs": rngs}
        self.conv1 = nnx.Conv(1, channels[0], (3, 3), **init)
        self.conv2 = nnx.Conv(channels[0], channels[1], (3, 3), **init)
        self.embed = nnx.Linear(16 * channels[1], width, **init)
        self.head = nnx.Linear(width, classes, **init)

    def __call__(self, images: jax.Array) -> Output:
        first = nnx.relu(self.conv1(images[..., None]))
        second = nnx.relu(self.conv2(nnx.max_pool(first, (2, 2), (2, 2))))
        embedding = self.embed(second.reshape(len(second), -1))
        return Output(self.head(nnx.relu(embedding)), embedding, [first, second])


class Batch:
    """A batch and the student's outputs for it; losses gather their other inputs from the data."""

    def __init__(self, net: Net, data: Mapping[str, Any], plan: Plan) -> None:
        self.net, self.data, self.index, self.shifts, self.negatives = net, data, *plan
        self.student = net(data["views"][0, self.index])

    def given(self, name: str) -> jax.Array:
        return self.data[name][self.index]

    def teacher(self, name: str) -> Any:
        return jax.tree.map(lambda x: x[self.index], self.data["teacher"][name])

    def two_views(self, views: jax.Array) -> jax.Array:
        """Each image under its two shifts, stacked along the batch axis."""
        return views[self.shifts.reshape(-1), jnp.tile(self.index, 2)]


class Loss(NamedTuple):
    """How a loss is called, and the module that holds its parameters or state, if it has any."""

    value: Callable[[Any, Batch], jax.Array]
    module: Callable[[Setting, nnx.Rngs], nnx.Module] | None = None


def projection(setting: Setting, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's initialisation
    return nnx.Linear(setting.student[1], setting.teacher[1], kernel_init=init, rngs=rngs)


def review(setting: Setting, rngs: nnx.Rngs) -> ReviewKD:
    return ReviewKD(setting.student[0], setting.teacher[0], 16, rngs=rngs)


def projection_and_centers(setting: Setting, rngs: nnx.Rngs) -> nnx.Dict:
    centers = DynamicCenterNormLoss(setting.classes, setting.teacher[1], rngs=rngs)
    return nnx.Dict(projection=projection(setting, rngs), loss=centers)


def crcd(setting: Setting, rngs: nnx.Rngs) -> CRCDLoss:
    return CRCDLoss(setting.student[1], setting.teacher[1], 32, setting.images, rngs=rngs)


def dino(setting: Setting, rngs: nnx.Rngs) -> DINOLoss:
    return DINOLoss(setting.classes, warmup_temperature=0.5, teacher_temperature=0.5, student_temperature=1.0)


def uskd(setting: Setting, rngs: nnx.Rngs) -> USKDLoss:
    return USKDLoss(setting.student[1], setting.classes, rngs=rngs)


def standardized(batch: Batch) -> list[jax.Array]:
    """The standardised logits of student and teacher, which have the same scale."""
    return [standardize_logits(x) for x in (batch.student.logits, batch.teacher("logits"))]


LOSSES = {
    "kl": Loss(lambda _, b: kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "skl": Loss(lambda _, b: symmetric_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "diff": Loss(lambda _, b: difference_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "dkd": Loss(lambda _, b: dkd_loss(b.student.logits, b.teacher("logits"), b.given("labels"), where=b.given("sure"))),
    "nkd": Loss(lambda _, b: nkd_loss(b.student.logits, b.teacher("logits"), b.given("labels"), where=b.given("sure"))),
    "uskd": Loss(lambda m, b: m(b.student.embedding, b.student.logits, b.given("labels"), where=b.given("sure")), uskd),
    "reverse_kl": Loss(lambda _, b: reverse_kl_loss(b.student.logits, b.teacher("logits"), temperature=4.0)),
    "jsd": Loss(lambda _, b: jsd_loss(b.student.logits, b.teacher("logits"))),
    "tvd": Loss(lambda _, b: tvd_loss(b.student.logits, b.teacher("logits"))),
    "skew_kl": Loss(lambda _, b: skew_kl_loss(b.student.logits, b.teacher("logits"))),
    "skew_reverse_kl": Loss(lambda _, b: skew_reverse_kl_loss(b.student.logits, b.teacher("logits"))),
    "alpha_beta": Loss(lambda _, b: alpha_beta_loss(b.student.logits, b.teacher("logits"))),
    "taid": Loss(lambda _, b: taid_loss(b.student.logits, b.teacher("logits"), interpolation=0.5)),
    "uld": Loss(lambda _, b: uld_loss(b.student.logits, b.teacher("logits"))),
    "dist": Loss(lambda _, b: dist_loss(b.student.logits, b.teacher("logits"))),
    "std_kl": Loss(lambda _, b: kl_loss(*standardized(b), temperature=2.0)),
    "mse": Loss(lambda m, b: mse_loss(m(b.student.embedding), b.teacher("embedding")), projection),
    "sml": Loss(lambda m, b: smooth_l1_loss(m(b.student.embedding), b.teacher("embedding")), projection),
    "bce": Loss(lambda m, b: bce_loss(m(b.student.embedding), nnx.sigmoid(b.teacher("embedding"))), projection),
    "eu_mse": Loss(lambda _, b: euclidean_mse_loss(b.student.embedding, b.teacher("embedding"))),
    "dcn": Loss(
        lambda m, b: m.loss(
            m.projection(b.student.embedding), b.teacher("embedding"), b.given("labels"), where=b.given("sure")
        ),
        projection_and_centers,
    ),
    "hcl": Loss(lambda m, b: hcl_loss(m(b.student.maps), b.teacher("maps")), review),
    "crcd": Loss(lambda m, b: m(b.student.embedding, b.teacher("embedding"), b.index, b.negatives), crcd),
    "dino": Loss(
        lambda m, b: m(b.net(b.two_views(b.data["views"])).logits, b.two_views(b.data["teacher"]["views"])), dino
    ),
}


class Distiller(nnx.Module):
    """A student with the parameters and states of its losses."""

    def __init__(self, weights: Mapping[str, float], setting: Setting, rngs: nnx.Rngs) -> None:
        self.student = Net(*setting.student, setting.classes, rngs=rngs)
        self.extras = nnx.Dict({n: LOSSES[n].module(setting, rngs) for n in weights if LOSSES[n].module})
        self.weights = tuple(weights.items())

    def __call__(self, data: Mapping[str, Any], plan: Plan) -> jax.Array:
        """The cross-entropy of labelled images, and the weighted losses."""
        batch = Batch(self.student, data, plan)
        labelled, labels = batch.given("labelled"), batch.given("labels")
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels(batch.student.logits, labels)
        loss = jnp.mean(entropy, where=labelled)
        for name, weight in self.weights:
            loss += weight * LOSSES[name].value(self.extras.get(name), batch)
        return loss


def label_loss(teacher: Net, data: Mapping[str, Any], plan: Plan) -> jax.Array:
    """The teacher's objective, on images under their first shift."""
    logits = teacher(data["views"][plan.shifts[0], plan.index]).logits
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, data["labels"][plan.index]).mean()


def fit(
    modules: Sequence[nnx.Module], objective: Callable[..., jax.Array], data: Any, plans: Sequence[Plan], rate: float
) -> list[dict[str, Any]]:
    """Train modules of the same architecture, each with its own plan; the step is compiled once."""
    steps = len(plans[0].index)
    cosine = lambda step: rate / 2 * (1 + jnp.cos(np.pi / steps * jnp.asarray(step, float)))  # noqa: E731
    optimiser = optax.sgd(cosine, momentum=0.9)
    graph = nnx.graphdef(modules[0])

    @jax.jit
    def step(carry: Any, data: Any, plan: Plan, i: jax.Array) -> Any:
        params, state, moments = carry

        def value(params: Any) -> Any:
            module = nnx.merge(graph, params, state, copy=True)  # updates its state
            loss = objective(module, data, jax.tree.map(lambda x: x[i], plan))
            return loss, nnx.state(module, nnx.Not(nnx.Param))

        (loss, state), gradient = jax.value_and_grad(value, has_aux=True)(params)
        updates, moments = optimiser.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), state, moments), loss

    runs = []
    for module, plan in zip(modules, plans, strict=True):
        params, state = nnx.state(module, nnx.Param, ...)
        carry, losses = (params, state, optimiser.init(params)), []
        plan = jax.tree.map(jnp.asarray, plan)
        jax.block_until_ready(step(carry, data, plan, np.int32(0)))  # compile
        start = time.perf_counter()
        for i in range(steps):
            carry, loss = step(carry, data, plan, np.int32(i))
            losses.append(loss)
        jax.block_until_ready(carry)
        seconds = time.perf_counter() - start
        nnx.update(module, *carry[:2])
        runs.append({"losses": np.array([float(loss) for loss in losses]), "seconds": seconds})
    return runs


def predict(module: Net, images: np.ndarray) -> Output:
    """Outputs as NumPy arrays."""
    return jax.tree.map(np.asarray, nnx.jit(module)(images))


def generators(seed: int) -> nnx.Rngs:
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))  # compiles in half the time of the default


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def make_teacher(data: Mapping[str, Any], plan: Plan, setting: Setting) -> Net:
    """A trained teacher."""
    teacher = Net(*setting.teacher, setting.classes, rngs=generators(0))
    fit([teacher], label_loss, jax.tree.map(jnp.asarray, data), [plan], setting.teacher_rate)
    return teacher


def train_teacher(data: Mapping[str, Any], plan: Plan, setting: Setting, views: np.ndarray) -> dict[str, Any]:
    """A teacher's outputs for all images: logits for every shift, embeddings and maps without a shift."""
    teacher = make_teacher(data, plan, setting)
    shifts, images, *shape = views.shape
    output = predict(teacher, views.reshape(-1, *shape))
    return {
        "logits": output.logits.reshape(shifts, images, -1),
        "embedding": output.embedding[:images],
        "maps": [x[:images] for x in output.maps],
        "parameters": count(teacher),
    }


def train_students(
    weights: Mapping[str, float],
    data: Mapping[str, Any],
    plans: Sequence[Plan],
    setting: Setting,
    images: np.ndarray,
    dtype: str = "float32",
    start: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Train one student per plan, with weighted losses; returns its logits for `images`, its losses and the time."""
    modules = [Distiller(weights, setting, generators(seed)) for seed in range(len(plans))]
    with jax.enable_x64(dtype == "float64"):
        for module in modules:
            load(module, start or {}, dtype)
        runs = fit(modules, Distiller.__call__, cast(data, dtype), plans, setting.student_rate)
        for module, run in zip(modules, runs, strict=True):
            run["logits"] = predict(module.student, images.astype(dtype)).logits
            run["parameters"] = count(module.student)
            run["parameters_of_losses"] = count(module) - count(module.student)
    return runs


def cast(tree: Any, dtype: str) -> Any:
    """A tree of arrays for JAX, with floating-point arrays in `dtype`."""

    def one(x: Any) -> jax.Array:
        return jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)

    return jax.tree.map(one, tree)


TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
TORCH_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # for kernels of linear layers and convolutions


def load(module: nnx.Module, weights: Mapping[str, np.ndarray], dtype: str) -> None:
    """Load weights that have PyTorch's names and axes, and convert everything to `dtype`."""

    def one(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        *parents, last = map(str, path)
        value = weights.get(".".join([*parents, TORCH_NAMES.get(last, last)]), variable[...])
        if last == "kernel" and isinstance(value, np.ndarray):
            value = value.transpose(TORCH_AXES[value.ndim])
        return variable.replace(cast(value, dtype))

    nnx.update(module, nnx.map_state(one, nnx.state(module)))
