"""On-policy distillation in JAX, from only the log-probabilities of sampled tokens.

    python examples/recipes/on_policy_jax.py

The student generates tokens, the teacher returns the log-probability of each, and `sampled_kl_loss` needs those two numbers.
Both are toy policies with 50 tokens, whose next token depends only on the last one, and the student is too small to match
its teacher. With 50 tokens, all means can be computed exactly, which gives the bias and the variance of the estimators.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen

from kdjax import kl_loss, reverse_kl_loss, sampled_kl_loss

TOKENS = 50
teacher = 1.5 * jax.random.normal(jax.random.key(0), (TOKENS, TOKENS))  # logits by the last token
student = linen.Sequential([linen.Embed(TOKENS, 8), linen.Dense(TOKENS)])
optimizer = optax.adam(0.02)


def write(params, key, batch=32, length=16):
    """Texts that the student samples, `[batch, length + 1]`."""

    def token(last, key):
        following = jax.random.categorical(key, student.apply(params, last))
        return following, following

    first, *keys = jax.random.split(key, length + 1)
    start = jax.random.randint(first, (batch,), 0, TOKENS)
    _, texts = jax.lax.scan(token, start, jnp.stack(keys))
    return jnp.concatenate([start[None], texts]).T


def log_probs(logits, tokens):
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


def sampled(**options):
    def loss(logits, last, tokens):
        return sampled_kl_loss(log_probs(logits, tokens), log_probs(teacher[last], tokens), **options)

    return loss


def all_logits(logits, last, tokens):
    return reverse_kl_loss(logits, teacher[last])


def train(loss, params, steps=400):
    def step(carry, key):
        params, moments = carry
        texts = write(params, key)
        last, tokens = texts[:, :-1], texts[:, 1:]
        gradient = jax.grad(lambda params: loss(student.apply(params, last), last, tokens))(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    keys = jax.random.split(jax.random.key(2), steps)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


@jax.jit
def divergence(params):
    """KL(p||q) and KL(q||p), computed exactly, averaged over all last tokens."""
    logits = student.apply(params, jnp.arange(TOKENS))
    return reverse_kl_loss(logits, teacher), kl_loss(logits, teacher)


WAYS = {
    "all logits, reverse_kl_loss": all_logits,
    "sampled tokens, the score": sampled(),
    "sampled tokens, k3 direct": sampled(gradient="direct"),
    "sampled tokens, k1 direct": sampled(estimator="k1", gradient="direct"),
}
students, divergences = {}, {}
first = student.init(jax.random.key(1), jnp.zeros((1,), jnp.int32))
for name, loss in WAYS.items():
    students[name] = jax.jit(train, static_argnums=0)(loss, first)
    divergences[name] = [[float(x) for x in divergence(params)] for params in (first, students[name])]
    (reverse, forward), (reverse_after, forward_after) = divergences[name]
    print(f"{name}: KL(p||q) {reverse:.2f} -> {reverse_after:.2f}, KL(q||p) {forward:.2f} -> {forward_after:.2f}")


def statistics(logits, log_q, **options):
    """Mean and deviation of the estimate for one token, and of its gradient with respect to the logits."""

    def values(logits):
        return sampled_kl_loss(jax.nn.log_softmax(logits), log_q, reduction="none", **options)

    weights, value, gradient = (
        jax.nn.softmax(logits),
        values(logits),
        jax.jacrev(values)(logits),
    )  # a row for each token
    mean, slope = weights @ value, weights @ gradient
    return (
        mean,
        jnp.sqrt(weights @ (value - mean) ** 2),
        slope,
        jnp.sqrt((weights @ (gradient - slope[None]) ** 2).sum()),
    )


last = 0
logits = student.apply(students["sampled tokens, the score"], jnp.array(last))
log_q = jax.nn.log_softmax(teacher[last])
exact, right = jax.value_and_grad(reverse_kl_loss)(logits, teacher[last])
print(f"one token after token {last}, in the mean over what the student samples: KL(p||q) is {exact:.3f}")
found = {}
for estimator in ("k1", "k2", "k3"):
    for gradient in ("score", "direct"):
        found[estimator, gradient] = statistics(logits, log_q, estimator=estimator, gradient=gradient)
        mean, spread, slope, slope_spread = found[estimator, gradient]
        length = jnp.linalg.norm(right)
        print(
            f"{estimator}, {gradient:6}: value {mean:.3f} ± {spread:.3f}, the gradient is off by "
            f"{jnp.linalg.norm(slope - right) / length:.0%} of its length, ± {slope_spread / length:.0%}"
        )
