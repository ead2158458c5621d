"""The losses in a terminal: a table of all, and the page of one, from `__all__` and the docstrings.

The sources are read without importing them, so this is fast and works with either framework.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib.util
import inspect
import itertools
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kdlosses.formulas import unicode
from kdlosses.meanings import by_meaning

_PAPER = re.compile(r"([A-Z]\w+(?:, [A-Z]\w+)*(?: and [A-Z]\w+| et al\.)?), \*(?:.+?)\*, (.*?\d{4}), (https://\S+\w)")
# what each package needs, and the extra that installs it
_NEEDS = {"kdjax": (("jax", "flax", "optax"), "kdlosses[jax]"), "kdtorch": (("torch",), "kdlosses[torch]")}


class Parameter(NamedTuple):
    """A parameter of a function, or a field of a named tuple, as it is written in the source."""

    name: str
    annotation: str
    default: str | None
    keyword_only: bool


class Public(NamedTuple):
    """A public function or class: where it is defined, and what its source says."""

    name: str
    module: str
    node: ast.FunctionDef | ast.ClassDef

    @property
    def docstring(self) -> str:
        return ast.get_docstring(self.node) or ""

    @property
    def folder(self) -> str:
        return self.module.split(".")[1]

    @property
    def parameters(self) -> list[Parameter]:
        if isinstance(self.node, ast.ClassDef):
            fields = [node for node in self.node.body if isinstance(node, ast.AnnAssign)]
            return [
                Parameter(ast.unparse(x.target), ast.unparse(x.annotation), _source(x.value), False) for x in fields
            ]
        args = self.node.args
        defaults = [None] * (len(args.args) - len(args.defaults)) + args.defaults
        pairs = [*zip(args.args, defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
        return [Parameter(x.arg, _source(x.annotation) or "", _source(y), x in args.kwonlyargs) for x, y in pairs]

    @property
    def returns(self) -> str | None:
        return None if isinstance(self.node, ast.ClassDef) else _source(self.node.returns)

    @property
    def is_loss(self) -> bool:
        """Whether the first argument is the student, or predicted from it."""
        return isinstance(self.node, ast.FunctionDef) and self.parameters[0].name.startswith(("student", "predicted"))


def main(program: str, packages: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Print the table, or with `show NAME` the page of one.

    Args:
        program: the package whose command is run.
        packages: kdjax, kdtorch or both.
        arguments: the arguments of the command line.

    Returns:
        The exit status, 0.

    Raises:
        SystemExit: 2, a name that is unknown; the message suggests some.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=f"List the losses of {program}.")
    show = parser.add_subparsers(dest="command").add_parser("show", help="print the page of one")
    show.add_argument("name", help="dkd, DKD, dkd_loss, or a name in a configuration, such as kld")
    options = parser.parse_args(arguments)

    missing = {package: what for package in packages if (what := _missing(package))}
    inside = sorted((x for x in packages if missing.get(x) != x), key=missing.__contains__) or packages
    found: dict[str, Public] = {}  # from the first package that has the name; packages that can be imported come first
    having: dict[str, list[str]] = {}
    for package in inside:
        for name, x in public(package).items():
            found.setdefault(name, x)
            having.setdefault(name, []).extend([package] if package not in missing else [])
    config = _config_names(inside[0])
    marks = having if len(packages) > 1 else {}

    console = Console()
    notes = [f"{x} cannot be imported here, {y} is missing: pip install '{_NEEDS[x][1]}'" for x, y in missing.items()]
    if options.command is None:
        console.print(_table([x for x in found.values() if x.is_loss], config, marks))
        notes.append(f"`python -m {program} show dkd` prints the page of one.")
    else:
        try:
            name = _lookup(options.name, found, config)
        except LookupError as error:
            parser.error(f"{error.args[0]}; `python -m {program}` lists all")
        _print_page(console, found[name], config.get(name, []), marks.get(name, []))
        notes[:0] = [""] * bool(notes)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    return 0


def named(asked: str) -> str:
    """The public name that a user means: `dkd`, `DKD` and `dkd_loss` are `dkd_loss`, as for `show`.

    Args:
        asked: the name of a loss with or without `_loss`, or its name in a configuration, in lower or upper case.

    Raises:
        LookupError: there is no such loss; the message suggests some.
    """
    return _lookup(asked, public("kdjax"), _config_names("kdjax"))


def _lookup(asked: str, found: Mapping[str, Public], config: Mapping[str, Sequence[str]]) -> str:
    known = {name.removesuffix("_loss"): name for name, x in found.items() if x.is_loss}
    # the names in a configuration take precedence, as in `make_loss`: rkd is ReviewKD's `hcl_loss`
    known |= {key.lower(): name for name in found for key in (name, *config.get(name, ()))}
    if name := known.get(asked.lower()):
        return name
    if meant := by_meaning(asked, {name: x.docstring for name, x in found.items() if x.returns}):
        raise LookupError(f"no loss is called {asked!r}; did you mean {' or '.join(meant)}?")
    near = ", ".join(difflib.get_close_matches(asked.lower(), known, 3, 0))
    raise LookupError(f"no loss is called {asked!r}; similar names are {near}")


def public(package: str) -> dict[str, Public]:
    """The public names of a package, from its source.

    Args:
        package: kdjax or kdtorch.
    """
    for node in _source_of(package).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {name: _find(package, name) for name in ast.literal_eval(node.value)}
    raise ValueError(f"{package} has no `__all__`")


@functools.cache
def _source_of(module: str) -> ast.Module:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)  # imports nothing, because the package is a top-level one
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} cannot be found; it is part of kdlosses: install that anew", name=package)
    path = pathlib.Path(spec.submodule_search_locations[0], *rest)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))


def _find(module: str, name: str) -> Public:
    """Where a name of a module is defined: in the module, or where the module imports it from."""
    nodes = _source_of(module).body
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return Public(name, module, node)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return _find(str(node.module), name)
    raise ValueError(f"{module} has no {name}")


def _source(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def _missing(package: str) -> str:
    """The first missing package among this one and its requirements, or "" if it can be imported."""
    for name in (package, *_NEEDS[package][0]):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            return name
    return ""


def losses(package: ModuleType) -> dict[str, Callable[..., Any]]:
    """The losses among the public names: functions whose first argument is the student, or predicted from it."""
    return {name: getattr(package, name) for name, x in public(package.__name__).items() if x.is_loss}


def blocks(docstring: str | None) -> Iterator[tuple[str, str]]:
    """The parts of a docstring, in order: `"Args"`, `"Returns"`, …, `"Formula"`, `"Example"` or `""`, and the text."""
    for block in inspect.cleandoc(docstring or "").split("\n\n"):
        head, _, rest = block.partition("\n")
        if re.fullmatch(r"[A-Z]\w+:", head):
            yield head[:-1], textwrap.dedent(rest)
        elif block.startswith("$$"):
            yield "Formula", block.strip("$")
        else:
            yield "Example" if block.startswith(">>>") else "", block


def entries(section: str) -> dict[str, str]:
    """The names of a section, such as Args, with their descriptions."""
    return dict(re.findall(r"^(\w+): (.*(?:\n +.*)*)", section, re.M))


def paper(docstring: str | None) -> tuple[str, str]:
    """The paper of a loss: authors, venue and year, and the link."""
    text = " ".join((docstring or "").split())
    if found := _PAPER.search(text):
        return f"{found[1]}, {found[2]}", found[3]
    return ("the founding repository" if re.search("founding (repository|code)", text) else ""), ""


def _config_names(package: str) -> dict[str, list[str]]:
    """The names in a configuration, by function, from the table of `make_loss`.

    The summary of a module begins with the function that it calls.
    """
    names: dict[str, list[str]] = {}
    for node in _source_of(f"{package}.make_loss").body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict) and _source(node.target) == "PUBLISHED":
            for key, term in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(term, ast.Call):
                    loss = _find(f"{package}.make_loss", ast.unparse(term.args[0]))
                    holds = re.match("`(.*?)`", loss.docstring)
                    names.setdefault(holds[1] if holds else loss.name, []).append(str(key.value))
    return names


def _table(
    losses: Sequence[Public], config: Mapping[str, Sequence[str]], packages: Mapping[str, Sequence[str]]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("loss", no_wrap=True)
    table.add_column("what it compares")
    table.add_column("needs", no_wrap=True)
    table.add_column("paper", min_width=13 if packages else 17)
    if packages:
        table.add_column("in", no_wrap=True)
    for _, folder in itertools.groupby(sorted(losses, key=lambda x: x.folder), lambda x: x.folder):
        for loss in folder:
            _, summary = next(blocks(loss.docstring))
            needs = [x.name for x in loss.parameters if not x.keyword_only and x.default is None]
            needs = [need for need in needs if not need.startswith(("student", "teacher"))]
            whose, link = paper(loss.docstring)
            cells = "\n".join([loss.name, *config.get(loss.name, [])]), summary, "\n".join(needs)
            inside = ["\n".join(packages[loss.name])] if packages else []
            table.add_row(*map(Text, cells), Text(whose, style=f"link {link}" if link else ""), *map(Text, inside))
        table.add_section()
    return table


def _print_page(console: Console, x: Public, names: Sequence[str], packages: Sequence[str]) -> None:
    console.print(Text(_signature(x), style="bold"))
    if packages:
        shown = f"; this is its page in {x.module.partition('.')[0]}" if len(packages) > 1 else ""
        console.print(Text(f"in {' and '.join(packages)}{shown}"))
    if names:
        console.print(Text(f"in a configuration: {', '.join(names)}"))
    before = ""
    for heading, text in blocks(x.docstring):
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


def _signature(x: Public) -> str:
    """The signature, with one parameter per line."""
    lines = []
    for parameter in x.parameters:
        if parameter.keyword_only and "*" not in lines:
            lines.append("*")
        default = "" if parameter.default is None else f" = {parameter.default}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    arrow = f" -> {x.returns}" if x.returns else ""
    return "\n".join([f"{x.name}(", *(f"    {line}," for line in lines), f"){arrow}"])


def _prose(text: str) -> Markdown:
    return Markdown(re.sub(r"\$(.+?)\$", lambda found: unicode(found[1]), text))
