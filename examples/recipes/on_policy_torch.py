"""On-policy distillation in PyTorch, from only the log-probabilities of sampled tokens.

    python examples/recipes/on_policy_torch.py

The student generates tokens, the teacher returns the log-probability of each, and `sampled_kl_loss` needs those two numbers.
Both are toy policies with 50 tokens, whose next token depends only on the last one, and the student is too small to match
its teacher. With 50 tokens, all means can be computed exactly, which gives the bias and the variance of the estimators.
"""

import torch
from torch import nn
from torch.func import jacrev

from kdtorch import kl_loss, reverse_kl_loss, sampled_kl_loss

TOKENS = 50
teacher = 1.5 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))  # logits by the last token


def policy():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS))


@torch.no_grad()
def write(student, batch=32, length=16):
    """Texts that the student samples, `[batch, length + 1]`."""
    texts = [torch.randint(TOKENS, (batch,))]
    for _ in range(length):
        texts.append(torch.multinomial(student(texts[-1]).softmax(-1), 1)[:, 0])
    return torch.stack(texts, 1)


def log_probs(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def sampled(**options):
    def loss(logits, last, tokens):
        return sampled_kl_loss(log_probs(logits, tokens), log_probs(teacher[last], tokens), **options)

    return loss


def all_logits(logits, last, tokens):
    return reverse_kl_loss(logits, teacher[last])


WAYS = {
    "all logits, reverse_kl_loss": all_logits,
    "sampled tokens, the score": sampled(),
    "sampled tokens, k3 direct": sampled(gradient="direct"),
    "sampled tokens, k1 direct": sampled(estimator="k1", gradient="direct"),
}
students, divergences = {}, {}
for name, loss in WAYS.items():
    student = students[name] = policy()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)

    def divergence(student=student):
        """KL(p||q) and KL(q||p), computed exactly, averaged over all last tokens."""
        with torch.no_grad():
            logits = student(torch.arange(TOKENS))
            return reverse_kl_loss(logits, teacher).item(), kl_loss(logits, teacher).item()

    before = divergence()
    for _ in range(400):
        texts = write(student)
        last, tokens = texts[:, :-1], texts[:, 1:]
        optimizer.zero_grad()
        loss(student(last), last, tokens).backward()
        optimizer.step()
    divergences[name] = before, divergence()
    (reverse, forward), (reverse_after, forward_after) = divergences[name]
    print(f"{name}: KL(p||q) {reverse:.2f} -> {reverse_after:.2f}, KL(q||p) {forward:.2f} -> {forward_after:.2f}")


def statistics(logits, log_q, **options):
    """Mean and deviation of the estimate for one token, and of its gradient with respect to the logits."""

    def values(logits):
        return sampled_kl_loss(logits.log_softmax(-1), log_q, reduction="none", **options)

    weights, value, gradient = logits.softmax(-1), values(logits), jacrev(values)(logits)  # a row for each token
    mean, slope = weights @ value, weights @ gradient
    return mean, (weights @ (value - mean) ** 2).sqrt(), slope, (weights @ (gradient - slope) ** 2).sum().sqrt()


last = 0
with torch.no_grad():
    logits, log_q = students["sampled tokens, the score"](torch.tensor(last)), teacher[last].log_softmax(-1)
exact, right = reverse_kl_loss(logits, teacher[last]), torch.func.grad(reverse_kl_loss)(logits, teacher[last])
print(f"one token after token {last}, in the mean over what the student samples: KL(p||q) is {exact:.3f}")
found = {}
for estimator in ("k1", "k2", "k3"):
    for gradient in ("score", "direct"):
        found[estimator, gradient] = statistics(logits, log_q, estimator=estimator, gradient=gradient)
        mean, spread, slope, slope_spread = found[estimator, gradient]
        print(
            f"{estimator}, {gradient:6}: value {mean:.3f} ± {spread:.3f}, the gradient is off by "
            f"{(slope - right).norm() / right.norm():.0%} of its length, ± {slope_spread / right.norm():.0%}"
        )
