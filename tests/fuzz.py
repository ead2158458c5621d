"""`make fuzz`: all properties in `laws.py` on 20,000 examples of each loss, and 10,000 steps of losses with a state."""

from __future__ import annotations

import argparse
import sys
import time
import warnings

import hypothesis
import jax
import laws
import long_run
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parity.__main__ import title
from parity.cases import LOSSES, Loss


def main() -> int:
    parser = argparse.ArgumentParser("fuzz.py", description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000, help="of each loss in each package")
    parser.add_argument("--steps", type=int, default=10_000, help="of the losses with state")
    parser.add_argument("--loss", nargs="+", type=title, help="only these losses")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    torch.set_num_threads(1)
    chosen = [loss for loss in LOSSES if not options.loss or loss.title in options.loss]
    table = Table("loss", "package", "examples", "laws", "seconds", "broken", title="laws")
    broken: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        total = progress.add_task("examples", total=len(chosen) * len(laws.PACKAGES) * options.examples)
        for loss in chosen:
            for name in laws.PACKAGES:
                progress.update(total, description=f"{loss.title} in {name}")
                start = time.perf_counter()
                tried, error = _drawn(name, loss, options.examples, options.seed, lambda: progress.advance(total))
                broken += [] if error is None else [f"{loss.title} in {name}: {error}"]
                number = len(laws.laws(loss)) + sum(bool(applies(name, loss)) for applies in laws.TOGETHER.values())
                seconds = f"{time.perf_counter() - start:.0f}"
                table.add_row(loss.title, name, f"{tried:,}", str(number), seconds, "" if error is None else "one")
    steps = Table(
        "loss", "steps", "state, ULP", "value, ULP", "growth, MiB", title="from step to step, package to package"
    )
    for loss in (x for x in chosen if x.state):
        figures = long_run.check(loss, options.steps)
        growth = max(figures["growth in JAX"], figures["growth in PyTorch"])
        steps.add_row(
            loss.title, f"{options.steps:,}", f"{figures['state']:.1f}", f"{figures['value']:.1f}", f"{growth:.1f}"
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table, steps)
    for text in broken:
        console.print(text, markup=False)
    return bool(broken)


def _drawn(name: str, loss: Loss, number: int, seed: int, advance) -> tuple[int, str | None]:
    """The number of examples that were tried, and the simplest one that violates a property, if there is one."""
    trials: list[laws.Trial] = []
    tried = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=number, deadline=None, database=None)
    @hypothesis.given(laws.RECIPES)
    def each(recipe: laws.Recipe) -> None:
        nonlocal tried
        tried += 1
        advance()
        trials.append(laws.Trial(name, loss, recipe))
        laws.obey(trials[-1])
        del trials[:-200]

    try:
        each()
        laws.obey_together(name, loss, trials)
    except Exception as error:
        return tried, "\n".join([str(error), *getattr(error, "__notes__", [])])
    return tried, None


if __name__ == "__main__":
    sys.exit(main())
