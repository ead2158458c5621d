"""The JAX half of `tokens.py`: Flax NNX and Optax, with a jitted step."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kdjax import jsd_loss, kl_loss, linear_kl_loss, reverse_kl_loss, sampled_kl_loss, topk_kl_loss
from kdjax.interop import load, save
from kdjax.teacher_cache import TeacherCache, record_teacher

if TYPE_CHECKING:
    from tokens import Loss, Plan, Setting, Size

Memory = list[
    tuple[jax.Array, jax.Array]
]  # the keys and values of each layer, [batch, positions, heads, width / heads]

# defined once, so that models of the same architecture are equal for `jit`; uniform, because that compiles faster
IN = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform")
OUT = nnx.initializers.variance_scaling(1.0, "fan_out", "uniform")


class Layer(nnx.Module):
    """Causal attention and a perceptron."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        norm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=IN, rngs=rngs)
        self.norm1, self.norm2 = norm(width), norm(width)
        self.into, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(
        self, x: jax.Array, past: tuple[jax.Array, jax.Array] | None, first: jax.Array | int
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in jnp.split(self.into(self.norm1(x)), 3, -1))
        if past is not None:
            k, v = (jax.lax.dynamic_update_slice_in_dim(*pair, first, 1) for pair in zip(past, (k, v), strict=True))
        seen = jnp.arange(k.shape[1])[None] <= first + jnp.arange(q.shape[1])[:, None]
        # `jax.nn.dot_product_attention` computes in float32 for any input
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -jnp.inf))
        x += self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)))), (k, v)


class Model(nnx.Module):
    """A transformer over bytes, for the teacher and, smaller, for the student; `head` maps hidden states to logits."""

    def __init__(self, size: Size, length: int, classes: int, *, rngs: nnx.Rngs) -> None:
        embed = functools.partial(nnx.Embed, embedding_init=OUT, rngs=rngs)
        self.bytes, self.places = embed(classes, size.width), embed(length, size.width)
        self.layers = nnx.List([Layer(size.width, size.heads, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(size.width, classes, use_bias=False, kernel_init=IN, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, past: Memory | None = None, first: jax.Array | int = 0
    ) -> tuple[jax.Array, Memory]:
        """The hidden states of tokens, or of more tokens after the `first` ones, whose keys and values `past` has."""
        places = first + jnp.arange(tokens.shape[1])
        # indexed directly, because calling `nnx.Embed` returns the dtype that it was built with
        x = self.bytes.embedding[...][tokens] + self.places.embedding[...][places][None]
        memory = []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, past[i] if past else None, first)
            memory.append(pair)
        return self.norm(x), memory


class Text(NamedTuple):
    """Sequences of a batch, with the teacher's hidden states and, if they were recorded, its largest logits."""

    tokens: jax.Array  # [batch, length + 1], from the 0 before the first byte
    where: jax.Array  # [batch, length], True at the bytes that count
    hidden: jax.Array  # [batch, length, width of the teacher]
    values: jax.Array | None = None  # [batch, length, top_k]
    indices: jax.Array | None = None
    rest: jax.Array | None = None  # [batch, length]

    def parts(self, number: int) -> Text:
        """The same with a new first axis, of parts of the batch."""
        return jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), self)


# --8<-- [start:losses]
class Reading:
    """A text, and the student's outputs for it."""

    def __init__(self, student: Model, head: jax.Array, text: Text) -> None:
        self.text, self.targets, self.teacher_head = text, text.tokens[:, 1:], head
        self.hidden, _ = student(text.tokens[:, :-1])
        self.head = student.head.kernel[...].T
        self.logits = self.hidden @ self.head.T
        self.sum: dict[str, Any] = {"where": text.where, "reduction": "sum"}

    @property
    def teacher_logits(self) -> jax.Array:
        return self.text.hidden @ self.teacher_head.T

    def log_probs(self, logits: jax.Array) -> jax.Array:
        """The log-probabilities of the actual next bytes."""
        return jnp.take_along_axis(jax.nn.log_softmax(logits), self.targets[..., None], -1)[..., 0]

    def cross_entropy(self) -> jax.Array:
        return -jnp.sum(self.log_probs(self.logits), where=self.text.where)


LOSSES: dict[str, Callable[[Reading], jax.Array]] = {
    "kl": lambda r: kl_loss(r.logits, r.teacher_logits, **r.sum),
    "kl_t2": lambda r: kl_loss(r.logits, r.teacher_logits, temperature=2.0, **r.sum),
    "reverse_kl": lambda r: reverse_kl_loss(r.logits, r.teacher_logits, **r.sum),
    "jsd": lambda r: jsd_loss(r.logits, r.teacher_logits, **r.sum),
    "linear": lambda r: linear_kl_loss(r.hidden, r.head, r.text.hidden, r.teacher_head, **r.sum),
    "topk": lambda r: topk_kl_loss(r.logits, r.text.values, r.text.indices, r.text.rest, **r.sum),
    "gkd": lambda r: jsd_loss(r.logits, r.teacher_logits, **r.sum),
    "sampled": lambda r: sampled_kl_loss(r.log_probs(r.logits), r.log_probs(r.teacher_logits), **r.sum),
}


def objective(
    student: Model,
    head: jax.Array,
    losses: Mapping[str, Loss],
    real: Text,
    own: Text | None,
    totals: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of real text plus the weighted losses, and the cross-entropy alone.

    They are sums over the bytes of these sequences, divided by the number of bytes in the whole batch, which may have
    more sequences.
    """
    reading = Reading(student, head, real)
    writing = None if own is None else Reading(student, head, own)
    entropy = reading.cross_entropy() / totals[0]
    loss = entropy
    for name, term in losses.items():
        if writing is not None and term.texts != "real":
            loss += term.weight * LOSSES[name](writing) / totals[1]
        elif term.texts != "own":
            loss += term.weight * LOSSES[name](reading) / totals[0]
    return loss, entropy


# --8<-- [end:losses]
def kept(tokens: jax.Array) -> jax.Array:
    """True at every byte after the initial 0 and at the 0 that ends the text, False after that."""
    end = (tokens[:, 1:] == 0).astype("int32")
    return end.cumsum(1) == end


@functools.partial(jax.jit, static_argnums=0)
def write(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Texts continued by the student, with one byte drawn from its distribution for each number in `noise`.

    The mask that is returned keeps only these bytes.
    """
    student = nnx.merge(graph, params)
    batch, given = tokens.shape
    length, width = student.places.embedding.shape
    heads = student.layers[0].heads
    empty = jnp.zeros((batch, length, heads, width // heads), noise.dtype)
    _, memory = student(tokens[:, :-1], [(empty, empty)] * len(student.layers))

    def next_byte(carry: Any, u: jax.Array) -> Any:
        last, memory, place = carry
        hidden, memory = student(last[:, None], memory, place)
        odds = jax.nn.softmax(student.head(hidden[:, 0])).cumsum(-1)
        drawn = jnp.sum(odds < u[:, None] * odds[:, -1:], -1, dtype=last.dtype)
        return (drawn, memory, place + 1), drawn

    _, drawn = jax.lax.scan(next_byte, (tokens[:, -1], memory, jnp.int32(given - 1)), noise.T)
    tokens = jnp.concatenate([tokens, drawn.T], 1)
    return tokens, kept(tokens) & (jnp.arange(length) >= given - 1)[None]


@functools.partial(jax.jit, static_argnums=0)
def read(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The hidden states and logits of tokens."""
    model = nnx.merge(graph, params)
    hidden, _ = model(tokens[:, :-1])
    return hidden, model.head(hidden)


class Lessons(NamedTuple):
    """The training text with the teacher's outputs for it, and the teacher itself, for the student's own texts."""

    teacher: Model
    tokens: np.ndarray
    hidden: np.ndarray
    cache: TeacherCache

    def real(self, index: np.ndarray, recorded: bool) -> Text:
        tokens, hidden = self.tokens[index], self.hidden[index]
        if not recorded:
            return Text(tokens, kept(tokens), hidden)
        top = self.cache.read(index, temperature=1.0)
        values, rest = (np.asarray(x, hidden.dtype) for x in (top["values"], top["rest"]["1.0"]))
        return Text(tokens, kept(tokens), hidden, values, top["indices"], rest)

    def own(self, graph: nnx.GraphDef, params: nnx.State, prompts: np.ndarray, noise: np.ndarray) -> Text:
        """The prompts as the student continues them."""
        tokens, where = write(graph, params, prompts, noise.astype(self.hidden.dtype))
        return Text(tokens, where, read(*nnx.split(self.teacher), tokens)[0])


def listen(teacher: Model, tokens: np.ndarray, setting: Setting, folder: Path, dtype: str = "float32") -> Lessons:
    """Run the teacher on texts; its largest logits are recorded on disk."""
    hidden = []

    def batches() -> Iterator[dict[str, Any]]:
        for index in np.split(np.arange(len(tokens)), range(setting.batch, len(tokens), setting.batch)):
            states, logits = read(graph, params, tokens[index])
            hidden.append(np.asarray(states))
            yield {"index": index, "logits": logits}

    with jax.enable_x64(dtype == "float64"):
        cast(teacher, dtype)
        graph, params = nnx.split(teacher)
        cache = record_teacher(folder, batches(), top_k=setting.top_k)
    return Lessons(teacher, tokens, np.concatenate(hidden), cache)


@functools.partial(jax.jit, static_argnames=("graph", "value"))
def step(
    params: nnx.State, moments: Any, rates: jax.Array, parts: Any, whole: Any, *, graph: nnx.GraphDef, value: Any
) -> Any:
    """A step of Adam with the sum of the gradients of all parts of the batch."""

    def add(total: Any, part: Any) -> Any:
        lose = lambda params: value(nnx.merge(graph, params), part, whole)  # noqa: E731
        (loss, entropy), gradient = jax.value_and_grad(lose, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, (gradient, loss, entropy)), None

    nothing = jnp.zeros((), rates.dtype)
    (gradient, *values), _ = jax.lax.scan(add, (jax.tree.map(jnp.zeros_like, params), nothing, nothing), parts)
    updates, moments = adam(rates).update(gradient, moments, params)
    return optax.apply_updates(params, updates), moments, values


def adam(rates: jax.Array) -> optax.GradientTransformation:
    return optax.adam(lambda i: rates[i], b2=0.98)


@jax.jit
def no_moments(params: nnx.State) -> Any:
    return adam(jnp.zeros(1)).init(params)


def fit(
    model: Model, value: Callable[..., tuple[jax.Array, jax.Array]], texts: Callable[..., Any], rates: np.ndarray
) -> dict[str, Any]:
    """Train with Adam. `texts` returns the texts of a step, in parts, and other inputs of `value` for all parts.

    `value` returns the contribution of one part of the batch to the loss and to the cross-entropy; these are added.
    """
    graph, params = nnx.split(model)
    rates = rates.astype(params.head.kernel.dtype)
    moments, values, start = no_moments(params), [], time.perf_counter()
    for i in range(len(rates)):
        params, moments, new = step(params, moments, rates, *texts(i, graph, params), graph=graph, value=value)
        values.append([float(x) for x in new])
    seconds = time.perf_counter() - start
    nnx.update(model, params)
    losses, entropies = np.array(values).T
    return {"losses": losses, "entropies": entropies, "seconds": seconds}


def train_teacher(
    tokens: np.ndarray, plan: Plan, rates: np.ndarray, setting: Setting, tick: Callable[[], None]
) -> Model:
    """A teacher trained to predict the next byte."""
    teacher = new_model(setting.teacher, setting.length, setting.classes, generators(0))

    def value(teacher: Model, batch: jax.Array, whole: Any) -> tuple[jax.Array, jax.Array]:
        entropy = optax.losses.softmax_cross_entropy_with_integer_labels(
            teacher.head(teacher(batch[:, :-1])[0]), batch[:, 1:]
        )
        loss = entropy.mean(where=kept(batch))
        return loss, loss

    def texts(i: int, graph: nnx.GraphDef, params: nnx.State) -> Any:
        tick()
        return tokens[plan.index[i]][None], None

    fit(teacher, value, texts, rates)
    return teacher


def new_student(setting: Setting, seed: int) -> Model:
    return new_model(setting.student, setting.length, setting.classes, generators(seed))


def load_teacher(file: Path, setting: Setting) -> Model:
    teacher = nnx.eval_shape(lambda: Model(setting.teacher, setting.length, setting.classes, rngs=generators(0)))
    nnx.update(teacher, load(file))
    return teacher


@functools.partial(nnx.jit, static_argnums=(0, 1, 2))
def new_model(size: Size, length: int, classes: int, rngs: nnx.Rngs) -> Model:
    """A new model, built under `jit`, because one program compiles faster than one for each weight."""
    return Model(size, length, classes, rngs=rngs)


def train_students(
    losses: Mapping[str, Loss],
    lessons: Lessons,
    plans: Sequence[Plan],
    rates: np.ndarray,
    setting: Setting,
    tick: Callable[[], None],
    start: Path | None = None,
    parts: int = 1,
) -> list[dict[str, Any]]:
    """Train one student per plan; returns it with its losses, cross-entropies and time. A batch is split in `parts`."""
    writes = any(term.texts != "real" for term in losses.values())

    def value(student: Model, part: Any, whole: Any) -> tuple[jax.Array, jax.Array]:
        return objective(student, whole[0], losses, *part, whole[1])

    def train(student: Model, plan: Plan) -> dict[str, Any]:
        def texts(i: int, graph: nnx.GraphDef, params: nnx.State) -> Any:
            tick()
            real, own = lessons.real(plan.index[i], "topk" in losses), None
            if writes and plan.on_policy[i]:
                prompts = lessons.tokens[plan.index[i, : setting.written], : setting.prompt + 1]
                own = lessons.own(graph, params, prompts, plan.noise[i])
            totals = [np.sum(text.where) for text in (real, own) if text is not None]
            return (real.parts(parts), own and own.parts(parts)), (head, totals)

        return fit(student, value, texts, rates)

    runs, dtype = [], lessons.hidden.dtype.name
    with jax.enable_x64(dtype == "float64"):
        head = np.asarray(lessons.teacher.head.kernel[...]).T
        for seed, plan in enumerate(plans):
            student = new_student(setting, seed)
            if start:
                nnx.update(student, load(start))
            cast(student, dtype)
            runs.append({"student": student, **train(student, plan)})
    return runs


@functools.partial(jax.jit, static_argnums=0)
def entropy(graph: nnx.GraphDef, params: nnx.State, text: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    logits = model.head(model(text[:, :-1])[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean(where=kept(text))


def perplexity(model: Model, tokens: np.ndarray) -> float:
    """The perplexity of a byte."""
    return math.exp(entropy(*nnx.split(model), tokens))


def cast(model: Model, dtype: str) -> None:
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(np.asarray(x, dtype)), nnx.state(model)))


def compile_sooner() -> None:
    """Turn off XLA's optimisations, which take longer than they save if little is computed."""
    jax.config.update("jax_disable_most_optimizations", True)


def generators(seed: int) -> nnx.Rngs:
    return nnx.Rngs(jax.random.key(seed, impl="rbg"))  # compiles in half the time of the default


def count(model: Model) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


__all__ = [
    "compile_sooner",
    "count",
    "listen",
    "load_teacher",
    "new_student",
    "perplexity",
    "save",
    "train_students",
    "train_teacher",
]
