"""Measures how fast a language model's logits are recorded, and how fast they are read again.

    python -m benchmarks.recording
    python -m benchmarks.recording --tokens 64 --recorded 20000 --vocabularies 32000

Recording is compared with `torch.topk` of the same logits, whose result it needs, in addition to the sum of the rest.
All forms run in turn on one core. Reading is measured for one row per token, and for sequences of 512 tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import kdjax.teacher_cache
import kdtorch.teacher_cache
from kdtorch.teacher_cache import TeacherCache, record_teacher

TOP_K, BATCH, LENGTH = 64, 4096, 512


def seconds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of some calls of each function, in turn, after one call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(x) for name, x in times.items()}


def recording(vocabulary: int, tokens: int, repeats: int, folder: Path) -> None:
    """Print the milliseconds per token, and the ratio to `torch.topk`."""
    wide = 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(0))
    number = iter(range(10**9))
    for dtype in (torch.float32, torch.bfloat16):
        logits = wide.to(dtype)
        arrays = {kdtorch.teacher_cache: logits, kdjax.teacher_cache: jnp.asarray(wide.numpy(), str(dtype)[6:])}

        def record(module: Any, temperatures: Sequence[float], arrays: dict[Any, Any] = arrays) -> None:
            batch = {"index": np.arange(tokens), "logits": arrays[module]}
            module.record_teacher(folder / f"{next(number)}", [batch], top_k=TOP_K, temperatures=temperatures)

        ways: dict[str, Callable[[], Any]] = {"torch.topk": lambda logits=logits: logits.topk(TOP_K)}
        for module in arrays:
            for temperatures in ([1.0], [1.0, 4.0]):
                name = f"{module.__name__.partition('.')[0]}, rest at {len(temperatures)} temperature{'s'[: len(temperatures) - 1]}"
                ways[name] = lambda module=module, temperatures=temperatures: record(module, temperatures)
        found = seconds(ways, repeats)
        for name, x in found.items():
            print(
                f"vocabulary {vocabulary:,}, {str(dtype)[6:]:8}: {name:32} {1e3 * x / tokens:6.3f} ms per token, "
                f"{x / found['torch.topk']:5.2f} x torch.topk"
            )


def top_k(vocabulary: int, tokens: int, length: int | None) -> Iterator[dict[str, Any]]:
    """Batches of top-k logits as another program would give them: one row per token, or sequences."""
    rng, shape = np.random.default_rng(0), (BATCH, TOP_K) if length is None else (BATCH // length, length, TOP_K)
    for start in range(tokens // BATCH):
        first = rng.integers(vocabulary - TOP_K, size=(*shape[:-1], 1))
        batch = {
            "index": start * shape[0] + np.arange(shape[0]),
            "values": -np.sort(-rng.standard_normal(shape, np.float32)),
            "indices": first + np.arange(TOP_K),
            "rest": np.zeros(shape[:-1], np.float32),
        }
        yield batch if length is None else batch | {"lengths": np.full(shape[0], length)}


def reading(vocabulary: int, tokens: int, repeats: int, folder: Path) -> None:
    """Print how many tokens per second `TeacherCache.read` reads from memory."""
    for length in (None, LENGTH):
        where = folder / f"{vocabulary}-{length}"
        record_teacher(where, top_k(vocabulary, tokens, length), num_classes=vocabulary)
        cache, size = TeacherCache(where), (where / "rows").stat().st_size
        samples, batch = len(cache), BATCH // (length or 1)
        each = tokens // BATCH * BATCH
        what = "one row per token" if length is None else f"sequences of {length}"
        print(f"vocabulary {vocabulary:,}: {what}, {size / each:.0f} bytes a token, top {TOP_K} in float16")
        shuffled = np.random.default_rng(0).permutation(samples)

        def read(order: np.ndarray, cache: TeacherCache = cache, batch: int = batch) -> None:
            for i in range(0, len(order), batch):
                cache.read(order[i : i + batch], temperature=1.0)

        ways = {
            "in order": lambda read=read, n=samples: read(np.arange(n)),
            "shuffled": lambda read=read, x=shuffled: read(x),
        }
        for name, x in seconds(ways, repeats).items():
            print(f"vocabulary {vocabulary:,}: {what}, {name}: {each / x / 1e6:.2f} million tokens a second")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens whose logits are recorded")
    parser.add_argument("--recorded", type=int, default=1_000_000, help="tokens that are read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_256])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores")
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as folder:
            recording(vocabulary, options.tokens, options.repeats, Path(folder))
            reading(vocabulary, options.recorded, options.repeats, Path(folder))


if __name__ == "__main__":
    main()
