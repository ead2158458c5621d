"""The losses of a package on a terminal: a table of them and the page of one, out of `__all__` and the docstrings."""

from __future__ import annotations

import argparse
import difflib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kdlosses.formulas import unicode

_PAPER = re.compile(r"([A-Z]\w+(?:, [A-Z]\w+)*(?: et al\.)?), \*(?:.+?)\*, (.*?\d{4}), (https://\S+\w)")


def main(package: ModuleType, config: Mapping[str, Any], arguments: Sequence[str] | None = None) -> int:
    """Print the table, or with `show NAME` the page of one.

    Args:
        package: kdjax or kdtorch.
        config: the table of `make_loss`, for the names that a configuration has.
        arguments: of the command line.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: 2, a name that is unknown; the message has the nearest.
    """
    name = package.__name__
    parser = argparse.ArgumentParser(f"python -m {name}", description=f"List the losses of {name}.")
    show = parser.add_subparsers(dest="command").add_parser("show", help="print the page of one")
    show.add_argument("name", help="dkd, DKD, dkd_loss, or a name of a configuration, such as kld")
    options = parser.parse_args(arguments)
    names = _config_names(config)
    if options.command is None:
        Console().print(_table(package, names), f"`python -m {name} show dkd` prints the page of one.", highlight=False)
        return 0
    known = {key.lower(): public for public in package.__all__ for key in (public, *names.get(public, ()))}
    known |= {loss.removesuffix("_loss"): loss for loss in losses(package)}
    asked = options.name.lower()
    if asked not in known:
        near = difflib.get_close_matches(asked, known, 3, 0)
        parser.error(f"no loss is called {options.name!r}; near are {', '.join(near)}; `python -m {name}` lists all")
    _print_page(Console(), getattr(package, known[asked]), names.get(known[asked], []))
    return 0


def losses(package: ModuleType) -> dict[str, Callable[..., Any]]:
    """The losses among the public names: what begins with the student."""
    public = {name: getattr(package, name) for name in package.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    return {name: x for name, x in functions.items() if next(iter(_parameters(x))).startswith("student")}


def blocks(docstring: str | None) -> Iterator[tuple[str, str]]:
    """What a docstring is made of, in order: `"Args"`, `"Returns"`, …, `"Formula"`, `"Example"` or `""`, and the text."""
    for block in inspect.cleandoc(docstring or "").split("\n\n"):
        head, _, rest = block.partition("\n")
        if re.fullmatch(r"[A-Z]\w+:", head):
            yield head[:-1], textwrap.dedent(rest)
        elif block.startswith("$$"):
            yield "Formula", block.strip("$")
        else:
            yield "Example" if block.startswith(">>>") else "", block


def entries(section: str) -> dict[str, str]:
    """The names of a section, such as Args, and what is said of each."""
    return dict(re.findall(r"^(\w+): (.*(?:\n +.*)*)", section, re.M))


def paper(docstring: str | None) -> tuple[str, str]:
    """Whose a loss is: authors, venue and year, and the link."""
    text = " ".join((docstring or "").split())
    if found := _PAPER.search(text):
        return f"{found[1]}, {found[2]}", found[3]
    return ("the founding repository" if re.search("founding (repository|code)", text) else ""), ""


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _folder(function: Callable[..., Any]) -> str:
    return function.__module__.split(".")[1]


def _config_names(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """By function; the summary of a module begins with the function that it holds."""
    names: dict[str, list[str]] = {}
    for name, term in config.items():
        holds = re.match("`(.*?)`", term.loss.__doc__ or "")
        names.setdefault(holds[1] if holds else term.loss.__name__, []).append(name)
    return names


def _table(package: ModuleType, names: Mapping[str, Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("loss", no_wrap=True)
    table.add_column("what it compares")
    table.add_column("needs", no_wrap=True)
    table.add_column("paper", min_width=17)
    for _, folder in itertools.groupby(sorted(losses(package).values(), key=_folder), _folder):
        for function in folder:
            name, (_, summary) = function.__name__, next(blocks(function.__doc__))
            needs = [p.name for p in _parameters(function).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            needs = [need for need in needs if not need.startswith(("student", "teacher"))]
            whose, link = paper(function.__doc__)
            cells = "\n".join([name, *names.get(name, [])]), summary, "\n".join(needs)
            table.add_row(*map(Text, cells), Text(whose, style=f"link {link}" if link else ""))
        table.add_section()
    return table


def _print_page(console: Console, x: Any, names: Sequence[str]) -> None:
    console.print(Text(_signature(x), style="bold"))
    if names:
        console.print(Text(f"in a configuration: {', '.join(names)}"))
    before = ""
    for heading, text in blocks(x.__doc__):
        console.print()
        if heading and heading != before:
            console.print(Text(heading, style="bold"))
        before = heading
        if heading == "Formula":
            body: Any = Text(unicode(text))
        elif heading == "Example":
            body = Text(text)
        elif said := entries(text):
            body = Table.grid(padding=(0, 2, 0, 0))
            body.add_column(no_wrap=True)
            for name, meaning in said.items():
                body.add_row(Text(name), _prose(meaning))
        else:
            body = _prose(text)
        console.print(Padding(body, (0, 0, 0, 2 if heading else 0)))


def _signature(x: Any) -> str:
    """One parameter a line."""
    signature = inspect.signature(x)
    lines = []
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        lines.append(f"{p.name}: {_annotation(p.annotation)}{default}")
    returned = signature.return_annotation
    arrow = "" if returned is signature.empty else f" -> {_annotation(returned)}"
    return "\n".join([f"{x.__name__}(", *(f"    {line}," for line in lines), f"){arrow}"])


def _annotation(annotation: Any) -> str:
    return str(getattr(annotation, "__forward_arg__", annotation))


def _prose(text: str) -> Markdown:
    return Markdown(re.sub(r"\$(.+?)\$", lambda found: unicode(found[1]), text))
