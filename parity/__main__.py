"""`python -m parity`: compares every loss of the table in kdjax, kdtorch and the oracle."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress

from kdlosses import pages
from parity import report
from parity.cases import LOSSES, Case, Loss, cases, random_case
from parity.check import DTYPES, check
from parity.compare import Comparison, Difference
from parity.run import forget

TITLES = [loss.title for loss in LOSSES]
SHORT = {title.replace("_loss", ""): title for title in TITLES}  # "dkd", "nkd-soft"


def title(name: str) -> str:
    """The row of the loss that `python -m kdlosses show` shows, or another row of that loss, such as nkd-soft."""
    if "-" in name and (row := SHORT.get(name.lower(), name.lower())) in TITLES:
        return row
    try:
        row = pages.named(name)
    except LookupError as error:
        raise argparse.ArgumentTypeError(error.args[0]) from None
    if row not in TITLES:
        raise argparse.ArgumentTypeError(f"{row} is not compared; there are {', '.join(SHORT)}")
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and write the reports; the exit status is 0 if all is within its limits, 1 if not, 2 for bad usage."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tries is not None and options.tries < 1:
        parser.error(f"argument --tries: must be 1 or more, got {options.tries}")
    for flag in ("json", "html"):
        try:
            report.check_writable(getattr(options, flag))
        except OSError as error:
            parser.error(f"argument --{flag}: cannot write {getattr(options, flag)!r}: {error.strerror}")
    for framework in options.framework:
        try:
            _prepare(framework)
        except ImportError as error:
            print(
                f"parity: {framework} cannot be imported ({error}): pip install 'kdlosses[{framework}]'. "
                "A comparison needs both; --framework NAME holds one against the oracle alone.",
                file=sys.stderr,
            )
            return 1

    console = Console(width=None if sys.stdout.isatty() else 160)
    frameworks = [*options.framework, *(["torch-compiled"] if options.compile else [])]
    differences: list[Difference] = []
    commands: dict[str, None] = {}
    work = [
        (case, dtype, again)
        for loss in LOSSES
        if loss.title in options.loss
        for case, again in _cases(loss, options.seed, options.tries)
        for dtype in options.dtype
    ]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for number, (case, dtype, again) in enumerate(work):
            loss = case.loss
            progress.update(task, description=f"{loss.title} {dtype}")
            if number % 200 == 199:
                forget()
            found = check(case, dtype, frameworks)
            differences += found
            if not all(x.passed for x in found):
                command = f"python -m parity --loss {loss.title} --dtype {dtype} {again}"
                if options.framework != ["jax", "torch"]:
                    command += f" --framework {' '.join(options.framework)}"
                commands[command + (" --compile" if options.compile else "")] = None
            progress.advance(task)

    comparison = Comparison(tuple(differences))
    console.print(comparison)
    for command in commands:
        console.print(f"to repeat: {command}", soft_wrap=True, highlight=False)
    for path, write in ((options.json, report.write_json), (options.html, report.write_html)):
        if path:
            write(path, comparison)
    return 0 if comparison.passed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m parity", description=__doc__)
    parser.add_argument(
        "--loss",
        nargs="+",
        type=title,
        default=TITLES,
        metavar="NAME",
        help=f"these losses instead of all, by the names that `python -m kdlosses show` takes: {', '.join(SHORT)}",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--framework", nargs="+", choices=["jax", "torch"], default=["jax", "torch"], help="default: both"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also kdtorch under torch.compile (a second or two per case)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs, or of the first draw")
    parser.add_argument("--tries", type=int, metavar="N", help="random draws per loss, instead of the table's cases")
    parser.add_argument("--json", metavar="FILE", help="write all differences, with versions and machine")
    parser.add_argument("--html", metavar="FILE", help="write a page with the table and a heat map")
    return parser


def _cases(loss: Loss, seed: int, tries: int | None) -> Iterator[tuple[Case, str]]:
    """The cases of a loss, each with the arguments that repeat it."""
    if tries is None:
        yield from ((case, f"--seed {seed}") for case in cases(loss, seed))
    else:
        yield from ((random_case(loss, s), f"--tries 1 --seed {s}") for s in range(seed, seed + tries))


def _prepare(framework: str) -> None:
    importlib.import_module(framework)
    if framework == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        jax.config.update("jax_numpy_rank_promotion", "raise")


if __name__ == "__main__":
    sys.exit(main())
