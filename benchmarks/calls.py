"""The overhead of one call of kdtorch, without its kernels: `python -m benchmarks.calls`.

It measures `kl_loss` at 128×10, forward and backward, in eager PyTorch on one thread of a CPU. Each part is timed
alone, in turn with the others, and the shortest of many times counts. The overhead is the time of the whole call minus
that of the kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import kdtorch
from kdtorch._numerics import kl_and_gradient
from kdtorch._reduce import reduce
from kdtorch._rowwise import kl_divergence

BATCH, CLASSES, TEMPERATURE = 128, 10, 4.0


class _Nothing(torch.autograd.Function):
    """Returns a value and a gradient that are already computed, to time `torch.autograd` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.saved_tensors[0], None, None


def parts() -> dict[str, Callable[[], Any]]:
    """The functions that are timed, by name."""
    x, y = torch.randn(BATCH, CLASSES, requires_grad=True), torch.randn(BATCH, CLASSES)
    fixed = x.detach()
    value, gradient = kl_and_gradient(fixed, y, TEMPERATURE)
    above = torch.ones(BATCH)
    learns, one = value.clone().requires_grad_(), torch.ones(())
    unchecked = kdtorch.kl_loss.__wrapped__  # type: ignore[attr-defined]

    def reduced(values: Tensor) -> Tensor:
        return reduce(TEMPERATURE**2 * values, None, "mean")

    def kernels() -> None:
        with torch.no_grad():
            value, gradient = kl_and_gradient(fixed, y, TEMPERATURE)
            (TEMPERATURE**2 * value).sum() / BATCH
            TEMPERATURE**2 * (one / BATCH).expand(BATCH)
            gradient.mul_(above.unsqueeze(-1))

    return {
        "all": lambda: torch.autograd.grad(kdtorch.kl_loss(x, y, temperature=TEMPERATURE), x),
        "kernels": kernels,
        "unchecked": lambda: torch.autograd.grad(unchecked(x, y, temperature=TEMPERATURE), x),
        "rows": lambda: torch.autograd.grad(kl_divergence(x, y, TEMPERATURE), x, above),
        "function of rows": lambda: kl_and_gradient(fixed, y, TEMPERATURE),
        "autograd": lambda: torch.autograd.grad(_Nothing.apply(x, value, gradient), x, above),
        "product": lambda: gradient.mul_(above.unsqueeze(-1)),
        "reduction": lambda: torch.autograd.grad(reduced(learns), learns, one),
        "reduction's kernels": lambda: (reduced(value), TEMPERATURE**2 * (one / BATCH).expand(BATCH)),
    }


def measure(rounds: int, calls: int = 30) -> dict[str, float]:
    """The microseconds of each part: the shortest mean over `calls` calls."""
    shortest: dict[str, float] = {}
    for _ in range(rounds):
        for name, part in parts().items():
            part()
            start = time.perf_counter()
            for _ in range(calls):
                part()
            taken = 1e6 * (time.perf_counter() - start) / calls
            shortest[name] = min(taken, shortest.get(name, taken))
    return shortest


def shares(us: dict[str, float]) -> dict[str, float]:
    """How the time of the whole is divided among its parts."""
    rows = us["rows"] - us["function of rows"] - us["product"] - us["autograd"]
    graph = us["reduction"] - us["reduction's kernels"]
    found = {
        "kernels, without autograd": us["kernels"],
        "check of the arguments": us["all"] - us["unchecked"],
        "an empty autograd.Function, and autograd's engine": us["autograd"],
        "the rest of `rowwise`": rows,
        "T² and the mean as nodes of the graph": graph,
    }
    found["settings and everything else"] = us["all"] - sum(found.values())
    return {"forward and backward": us["all"], **found, "all but the kernels": us["all"] - us["kernels"]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="number of rounds, of which the shortest counts")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {options.rounds}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = shares(measure(options.rounds))
    finally:
        torch.set_num_threads(threads)
    table = Table("part", title=f"kl_loss {BATCH}×{CLASSES}, forward and backward, one thread")
    table.add_column("µs", justify="right")
    for name, time_taken in found.items():
        table.add_row(name, f"{time_taken:.1f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
