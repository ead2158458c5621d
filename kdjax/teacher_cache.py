"""A teacher's outputs on disk: recorded once, by sample, and read by students of either framework."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kdlosses import cache

__all__ = ["TeacherCache", "record_teacher"]


def record_teacher(
    path: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    *,
    top_k: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    dtype: str = "float16",
) -> TeacherCache:
    """Write a teacher's outputs to a folder, sample by sample; samples that are already there are skipped.

    Every batch is on the disk before the next is asked for, so that after a kill, or on a full disk, nothing of an earlier
    batch is lost, and a second call with the same batches goes on where the first one stopped. One writer at a time.

    Args:
        path: of the folder.
        batches: mappings of `index`, `[batch]`, the samples' places in the data set; `logits`, `[batch, ..., classes]`;
            and any further arrays `[batch, ...]`, such as features, by names of their own.
        top_k: how many of the largest logits to keep; None keeps all.
        temperatures: for which, with `top_k`, the logit of all other classes together is kept, in float32.
        dtype: `"float16"` or `"float32"`, of the logits and of other floating-point arrays.

    Returns:
        The cache, opened.

    Raises:
        ValueError: a batch that does not fit, logits that are NaN or inf, numbers beyond float16, a folder that holds
            other things or was recorded in another way.
        OSError: the disk is full or cannot be written; the message says how many samples are kept.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from kdjax.teacher_cache import record_teacher
    >>> logits = jnp.array([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])
    >>> batch = {"index": jnp.array([7, 3]), "logits": logits}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = record_teacher(f"{folder}/teacher", [batch], top_k=1)
    ...     print(len(cache), cache.read([3], temperature=1.0)["indices"].tolist())
    2 [[2]]
    """
    cache.record(path, batches, np.asarray, top_k, temperatures, dtype)
    return TeacherCache(path)


class TeacherCache(cache.Cache):
    """What `record_teacher` wrote, from either package; memory-mapped, so that opening reads the index alone.

    Args:
        path: of the folder.
        num_classes: of the student; opening fails if the teacher has another number.

    Attributes:
        index: the recorded samples, in the order of recording.
        num_classes: of the teacher.
        top_k: how many logits are kept, or None for all.
        temperatures: those for which `rest` is kept.

    Raises:
        ValueError: no recorded teacher, or one of another number of classes.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from kdjax.teacher_cache import TeacherCache, record_teacher
    >>> batch = {"index": jnp.array([7]), "logits": jnp.array([[1.0, 2.0]])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = record_teacher(f"{folder}/teacher", [batch])
    ...     print(TeacherCache(f"{folder}/teacher", num_classes=2).read([7])["logits"].tolist())
    [[1.0, 2.0]]
    """

    _array = staticmethod(jnp.asarray)

    def __init__(self, path: str | os.PathLike[str], *, num_classes: int | None = None) -> None:
        super().__init__(path, num_classes)

    def read(self, index: Any, *, temperature: float | None = None) -> dict[str, Any]:
        """What was recorded of some samples, by name: `logits`, or `values`, `indices` and `rest`; and the other arrays.

        Args:
            index: `[batch]`, the samples.
            temperature: of the loss, for `rest`; without it there is none.

        Returns:
            Arrays `[batch, ...]` by name, in the order of `index`. `rest` is a mapping from the temperature, as text, to its
            array, as in `{"4.0": ...}`, from which `topk_kl_loss` takes the one it is called at.

        Raises:
            IndexError: a sample that is not there.
            ValueError: a temperature that was not recorded.
        """
        return self._read(index, temperature)
