"""Measures the cost of a teacher in the other framework, and of reading a teacher's outputs from disk.

python -m benchmarks.interop                # a million samples, about 300 MB in the folder for temporary files
python -m benchmarks.interop --samples 10000
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from kdjax.interop import torch_teacher
from kdtorch.interop import jax_teacher
from kdtorch.teacher_cache import TeacherCache, record_teacher

CLASSES, TOP_K, BATCH = 1000, 64, 4096


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The time of the shortest of some calls, after one call that is not counted."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def teachers(calls: int) -> None:
    """Print the milliseconds per call of each way, for a light and a heavy teacher; PyTorch uses one core."""
    torch.set_num_threads(1)
    for width in (64, 1024):
        layers = [torch.nn.Linear(784, width), torch.nn.ReLU()] + [torch.nn.Linear(width, width), torch.nn.ReLU()] * 3
        net = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10)).eval()
        x = jax.random.normal(jax.random.key(0), (256, 784))
        tensor, teacher = torch.from_dlpack(x), torch_teacher(net, inside_jit=True)
        weights = [(jnp.asarray(m.weight.detach().numpy().T), jnp.asarray(m.bias.detach().numpy())) for m in net if hasattr(m, "weight")]  # fmt: skip

        def mlp(weights: Any, x: Any) -> Any:
            for w, b in weights[:-1]:
                x = jax.nn.relu(x @ w + b)
            return x @ weights[-1][0] + weights[-1][1]

        step = jax.jit(lambda x, logits: (x[:, :10] * logits).sum())
        inside = jax.jit(lambda x: (x[:, :10] * teacher(x)).sum())  # noqa: B023
        plain, jitted, theirs = torch.no_grad()(net), jax.jit(mlp), jax_teacher(mlp, weights)
        ways = {
            "PyTorch teacher, called in PyTorch": lambda: plain(tensor),  # noqa: B023
            "the same, from JAX, before a jitted step": lambda: step(x, teacher(x)),  # noqa: B023
            "the same, inside the jitted step": lambda: inside(x),  # noqa: B023
            "the jitted step alone": lambda: step(x, x[:, :10]),  # noqa: B023
            "JAX teacher, jitted, called in JAX": lambda: jitted(weights, x),  # noqa: B023
            "the same, from PyTorch": lambda: theirs(tensor),  # noqa: B023
        }
        for name, call in ways.items():
            print(f"width {width:4d}: {name:42s} {1e3 * seconds(call, calls):8.3f} ms")


def batches(samples: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for start in range(0, samples, BATCH):
        index = np.arange(start, min(start + BATCH, samples))
        yield {"index": index, "logits": 3 * rng.standard_normal((len(index), CLASSES), np.float32)}


def forget(file: Path) -> None:
    """Remove a file from the page cache, so that it is read from the disk."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(samples: int, folder: Path) -> None:
    """Print the GB/s of reading recorded outputs, compared with reading the same bytes from the file."""
    start = time.perf_counter()
    record_teacher(folder, batches(samples), top_k=TOP_K, temperatures=[1.0, 4.0])
    rows = folder / "rows"
    size, taken = rows.stat().st_size, time.perf_counter() - start
    print(
        f"recorded {samples:,} x top-{TOP_K} of {CLASSES} in {taken:.1f} s: {size / 1e6:.0f} MB, {size // samples} bytes each"
    )
    shuffled = np.random.default_rng(0).permutation(samples)

    def read_file() -> None:
        buffer = bytearray(size // samples * BATCH)
        with open(rows, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def read_map() -> None:
        mapped = np.memmap(rows, np.uint8, "r").reshape(samples, -1)
        for i in range(0, samples, BATCH):
            np.array(mapped[i : i + BATCH])

    def read_cache(order: np.ndarray) -> None:
        cache = TeacherCache(folder)
        for i in range(0, samples, BATCH):
            cache.read(order[i : i + BATCH], temperature=4.0)

    ways = {
        "plain reads of the file": read_file,
        "np.memmap, in order": read_map,
        "TeacherCache.read, in order": lambda: read_cache(np.arange(samples)),
        "TeacherCache.read, shuffled": lambda: read_cache(shuffled),
    }
    for where in ("from the disk", "from memory"):
        for name, read in ways.items():
            best, least = np.inf, np.inf
            for _ in range(3):
                if where == "from the disk":
                    forget(rows)
                start, used = time.perf_counter(), time.process_time()
                read()
                best = min(best, time.perf_counter() - start)
                least = min(least, time.process_time() - used)
            print(f"{where}: {name:34s} {size / best / 1e9:6.2f} GB/s; {size / least / 1e9:6.2f} GB per CPU second")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--calls", type=int, default=100, help="calls of each teacher, of which the shortest counts")
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores")
    teachers(options.calls)
    with tempfile.TemporaryDirectory() as folder:
        disk(options.samples, Path(folder) / "teacher")


if __name__ == "__main__":
    main()
