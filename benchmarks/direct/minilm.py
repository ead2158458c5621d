from torch import Tensor

from benchmarks.direct._plain import kl


def minilm_loss(student: Tensor, teacher: Tensor, relation_heads: int) -> Tensor:
    return kl(_products(teacher, relation_heads), _products(student, relation_heads)).mean((1, 2)).mean()


def _products(x: Tensor, heads: int) -> Tensor:
    """[batch, heads, positions, positions]"""
    x = x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)
    return x @ x.mT / x.shape[-1] ** 0.5
