"""A teacher's outputs on disk: recorded once, by sample, and read by students of either framework."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from kdlosses import cache

__all__ = ["TeacherCache", "record_teacher"]


def record_teacher(
    path: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    *,
    top_k: int | None = None,
    num_classes: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    dtype: str = "float16",
    part: int | None = None,
    parts: int | None = None,
) -> TeacherCache:
    """Write a teacher's outputs to a folder, sample by sample; samples that are already there are skipped.

    Every batch is on disk before the next one is requested, so nothing of an earlier batch is lost if the process is
    killed or the disk is full. A second call with the same batches continues where the first one stopped.

    A batch is a mapping with `index`, `[batch]`, the positions of the samples in the data set, and

    - one of the following: `logits`, `[batch, ..., classes]`; or `values` and `indices`, `[batch, ..., kept]`, the largest
      logits and their classes, with `rest`, the logit of all other classes together, as arrays `[batch, ...]` by
      temperature, such as `{"1.0": ...}` (or one array if there is one temperature); or `log_probs` and `indices`,
      `[batch, ..., kept]`, log-probabilities over all classes, as serving engines return them. From these the rest at
      temperature 1 is computed, as the logarithm of 1 minus the sum of the probabilities. `kept`, booleans of the same
      shape, is False for entries that are padding.
    - `lengths`, `[batch]`, or `where`, booleans `[batch, length]`, if samples are sequences: `logits` are then `[batch,
      length, ..., classes]`, and padding is not stored.
    - further arrays `[batch, ...]`, such as features, under names of your choice; `[batch, length, ...]` for sequences.

    Args:
        path: of the folder.
        batches: mappings, as above.
        top_k: how many of the largest logits to keep; None keeps all.
        num_classes: the number of the teacher's classes; required with `values` and with `log_probs`.
        temperatures: with a top k, the temperatures for which the logit of all other classes together is stored, in float32.
        dtype: `"float16"` or `"float32"`, of the logits and of other floating-point arrays.
        part: the number of this writer if there are several, from 0 to `parts - 1`, such as the rank. Each writes its own
            folder inside that of the cache, and `TeacherCache` opens all of them as one.
        parts: the number of writers.

    Returns:
        The opened cache; with `part`, only the part of this writer.

    Raises:
        ValueError: a batch that does not fit, logits that are NaN or inf, numbers beyond float16, a folder that holds
            other things or was recorded in another way, or into which another writer is recording.
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
    folder = cache.record(path, batches, _numpy, _largest, top_k, num_classes, temperatures, dtype, part, parts)
    return TeacherCache(folder)


def _numpy(x: Any) -> np.ndarray:
    return np.asarray(x)


def _largest(
    logits: Any, places: tuple[np.ndarray, ...], top_k: int, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, ...]:
    """The largest logits at some places, their classes, the rest's logit at each temperature, and the largest logit."""
    if isinstance(logits, Array) and any(device.platform != "cpu" for device in logits.devices()):
        return _largest_on_device(logits, places, top_k, temperatures)
    return cache.largest_logits(_numpy(logits), places, top_k, temperatures, _numpy)


def _largest_on_device(
    logits: Array, places: tuple[np.ndarray, ...], top_k: int, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, ...]:
    """The same on an accelerator, one float32 block at a time, so that only the results are copied to the host."""
    number = len(places[0])
    size = max(1, min(2**26 // logits.shape[-1], 1 << (number - 1).bit_length()))  # so that few sizes are compiled
    found = []
    for start in range(0, number, size):
        at = [x[start : start + size] for x in places]
        at = [np.pad(x, (0, size - len(x)), mode="edge") for x in at]
        found.append([_numpy(x) for x in _largest_of(logits[tuple(at)], top_k, temperatures)])
    return tuple(np.concatenate(x)[:number] for x in zip(*found, strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _largest_of(x: Array, top_k: int, temperatures: tuple[float, ...]) -> tuple[Array, ...]:
    """The same for a block `[examples, classes]`."""
    x = x.astype(jnp.float32)
    values, indices = lax.top_k(x, top_k)
    others = x.at[jnp.arange(len(x))[:, None], indices].set(-jnp.inf)
    rest = [t * jax.nn.logsumexp(others / t, -1) for t in temperatures]
    return values, indices, jnp.stack(rest, -1), x.max(-1)


class TeacherCache(cache.Cache):
    """What `record_teacher` wrote, from either package; memory-mapped, so that opening reads the index alone.

    Args:
        path: of the folder.
        num_classes: of the student; opening fails if the teacher has another number.

    Attributes:
        index: the recorded samples, in the order of recording.
        lengths: the number of tokens of each recorded sample, or None if samples are not sequences.
        num_classes: of the teacher.
        top_k: how many logits are kept, or None for all.
        temperatures: those for which `rest` is kept.

    Raises:
        ValueError: no recorded teacher, one of another number of classes, or parts that are missing.

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

    def read(self, index: Any, *, temperature: float | None = None, where: Any = None) -> dict[str, Any]:
        """What was recorded of some samples, by name: `logits`, or `values`, `indices` and `rest`; and the other arrays.

        Args:
            index: `[batch]`, the samples.
            temperature: of the loss, for `rest`; without it there is none.
            where: `[batch, length]`, for sequences, True at the positions of the recorded tokens in the student's batch, in
                their order; by default these positions come first.

        Returns:
            Arrays `[batch, ...]` by name, in the order of `index`. `rest` is a mapping from the temperature, as text, to its
            array, as in `{"4.0": ...}`, from which `topk_kl_loss` takes the one it is called at. Sequences are padded with
            0, `[batch, length, ...]`, and `where`, `[batch, length]`, is False for padding.

        Raises:
            IndexError: a sample that is not there.
            ValueError: a temperature that was not recorded, or a mask that keeps a different number of tokens.
        """
        return self._read(index, temperature, where)

    def tokens(self, sample: Any, *, temperature: float | None = None) -> dict[str, Any]:
        """What was recorded of one sample, by name; for a sequence, of each of its tokens.

        Args:
            sample: the index of the sample, an integer.
            temperature: of the loss, for `rest`; without it there is none.

        Returns:
            Arrays `[length, ...]` by name, without padding; for samples that are not sequences, as `read` but without the batch axis.

        Raises:
            IndexError: a sample that is not there.
            ValueError: a temperature that was not recorded.
        """
        return self._tokens(sample, temperature)
