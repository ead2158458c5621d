"""The catalogue: the page of each loss and the tables of all, made from docstrings and from docs/losses/NAME.md.

The docstrings hold the formula, the arguments, the paper and an example. The page holds everything else, and in its
front matter what the tables need:

    family: logits                         # the folder that the loss is in, a key of FAMILIES
    labels: classes                        # the labels or indices that it needs
    state: one centre, D                   # what it keeps or learns
    couples: pairs of examples             # how the loss of one example depends on the others
    cost: B C; B C                         # time; largest array
    reported: [an accuracy (its source)]   # the results of the paper
    config: {kld: "score_stu, score_tea"}  # a name in a configuration of make_loss, and what it reads
    picture: curves temperature 1 2 4      # a function of docs/pictures.py and its arguments
    caption: What the picture shows

`labels`, `state`, `couples`, `reported` and `config` are left out if they do not apply. Headings are those of SECTIONS.
If a part of a section is generated, the page's own text follows it.
"""

from __future__ import annotations

import functools
import pathlib
import posixpath
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.utils.meta import get_data

from kdlosses.pages import blocks, entries, paper

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "docs" / "losses"
FAMILIES = {
    "logits": "Logit losses",
    "features": "Feature losses",
    "relations": "Relational losses",
    "selfsupervised": "Self-supervised losses",
}
SECTIONS = (
    "Formula",
    "Plot",
    "Arguments",
    "Example",
    "When to use it",
    "Hyperparameters",
    "Paper",
    "How implementations differ",
    "Cost",
    "API",
)
NEEDED, OPTIONAL = {"family", "cost", "picture", "caption"}, {"labels", "state", "couples", "reported", "config"}
FRAMEWORKS = {"JAX": "kdjax", "PyTorch": "kdtorch"}
NONE = "–"


class Docstring(NamedTuple):
    """What a page takes from a docstring.

    The text before Args belongs to the formula. The text after it, from the link to the paper on, belongs to the paper.
    """

    summary: str
    formula: str
    arguments: dict[str, str]
    returns: str
    notes: str
    paper: str
    example: str


class Loss(NamedTuple):
    """A loss: its name, the front matter of its page, and the page's text by heading; the introduction's is ""."""

    name: str
    meta: dict[str, Any]
    sections: dict[str, str]

    def function(self, package: str) -> griffe.Function:
        module = load(package)
        if self.name not in module.imports:
            raise PluginError(f"docs/losses/{self.name}.md: {package} has no public name {self.name!r}")
        function = module[module.imports[self.name].partition(".")[2]]
        assert isinstance(function, griffe.Function)
        return function

    def docstring(self, package: str = "kdjax") -> Docstring:
        docstring = self.function(package).docstring
        assert docstring
        (_, summary), *found = blocks(docstring.value)
        arguments = next(i for i, (heading, _) in enumerate(found) if heading == "Args")
        named, rest = dict(found), [text for heading, text in found[arguments:] if not heading]
        linked = next((i for i, text in enumerate(rest) if "https://" in text), 0)
        return Docstring(
            summary,
            paragraphs(f"$${text}$$" if heading == "Formula" else text for heading, text in found[:arguments]),
            {name: " ".join(text.split()) for name, text in entries(named["Args"]).items()},
            named["Returns"],
            paragraphs(rest[:linked]),
            paragraphs(rest[linked:]),
            paragraphs(text for heading, text in found if heading == "Example"),
        )

    @property
    def configured(self) -> dict[str, str]:
        """The names in a configuration and what they read; a loss without a name of its own reads by a rule."""
        short = self.name.removesuffix("_loss")
        names: dict[str, str] = self.meta.get("config", {self.name if short in _founding_names() else short: ""})
        return names

    @property
    def costs(self) -> list[str]:
        """Time and the largest array."""
        return [f"O({part.strip()})" for part in self.meta["cost"].split(";")]


@functools.cache
def load(package: str) -> griffe.Module:
    """A package, parsed from its source without importing it."""
    module = griffe.load(package, search_paths=[ROOT], allow_inspection=False)
    assert isinstance(module, griffe.Module)
    return module


@functools.cache
def _founding_names() -> set[str]:
    """The names of the founding configuration, which keep their meaning: rkd is not short for `rkd_loss`."""
    pages = (get_data(path.read_text())[1] for path in PAGES.glob("*.md"))
    return {name for meta in pages for name in meta.get("config", {})}


def read(name: str) -> Loss:
    """The loss of a page."""
    text, meta = get_data((PAGES / f"{name}.md").read_text())
    introduction, *rest = re.split(r"^## (.*)\n", text, flags=re.M)
    sections = {"": introduction} | dict(zip(rest[::2], rest[1::2], strict=True))
    if missing := NEEDED - meta.keys():
        raise PluginError(f"docs/losses/{name}.md: the front matter needs {sorted(missing)}; see docs/catalogue.py")
    for what, given, allowed in (
        ("headings", sections.keys(), {"", *SECTIONS}),
        ("front matter", meta.keys(), NEEDED | OPTIONAL),
        ("family", {meta["family"]}, FAMILIES.keys()),
    ):
        if unknown := given - allowed:
            raise PluginError(f"docs/losses/{name}.md: the {what} can be {sorted(allowed)}, got {sorted(unknown)}")
    return Loss(name, meta, {heading: text.strip() for heading, text in sections.items()})


def by_family() -> dict[str, list[Loss]]:
    losses = [read(path.stem) for path in sorted(PAGES.glob("*.md")) if path.stem != "index"]
    return {family: [loss for loss in losses if loss.meta["family"] == family] for family in FAMILIES}


def page(loss: Loss) -> str:
    """The whole page of a loss."""
    jax, torch = map(loss.docstring, FRAMEWORKS.values())
    derived = {
        "Formula": jax.formula,
        "Plot": f"![{loss.meta['caption']}](../pictures/{loss.name}.svg)",
        "Arguments": arguments(loss, jax, torch),
        "Example": paragraphs(tab(name, x.example) for name, x in zip(FRAMEWORKS, (jax, torch), strict=True)),
        "Paper": jax.paper,
        "Cost": cost(loss),
        "API": api(loss),
    }
    if "reported" in loss.meta:
        results = "\n".join(f"- {result}" for result in loss.meta["reported"])
        derived["Paper"] += (
            f"\n\nReported accuracy, of the student alone → distilled where both are given:\n\n{results}"
        )
    parts = [f"# `{loss.name}`", jax.summary, loss.sections[""]]
    for heading in SECTIONS:
        if text := paragraphs([derived.get(heading, ""), loss.sections.get(heading, "")]):
            parts += [f"## {heading}", text]
    return paragraphs(parts)


def paragraphs(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def tab(name: str, example: str) -> str:
    code = f"```pycon\n{example}\n```"
    return f'=== "{name}"\n\n' + re.sub("(?m)^(?=.)", "    ", code)


def arguments(loss: Loss, jax: Docstring, torch: Docstring) -> str:
    """A table of the arguments, with two rows where the frameworks differ, and what is returned."""
    rows = []
    for pair in zip(jax.arguments.items(), torch.arguments.items(), strict=True):
        found = []
        for package, (name, meaning) in zip(FRAMEWORKS.values(), pair, strict=True):
            default = loss.function(package).parameters[name].default
            found.append((f"`{name}`", f"`{default}`" if default else "", meaning.replace(f"`{package}.", "`")))
        if found[0] == found[1]:
            rows.append(found[0])
        else:
            rows += [(f"{name} ({x})", *rest) for x, (name, *rest) in zip(FRAMEWORKS, found, strict=True)]
    shared = "[The arguments that all losses share](index.md#arguments-that-all-losses-share)"
    return paragraphs([table("argument | default | meaning", rows), f"**Returns:** {jax.returns}", jax.notes, shared])


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. A `|` inside of code does not end a cell; elsewhere it is escaped."""
    escaped = [[re.sub(r"(`[^`]*`)|\|", lambda x: x[1] or r"\|", text) for text in row] for row in rows]
    lines = [head, " | ".join("---" for _ in head.split(" | ")), *map(" | ".join, escaped)]
    return "\n".join(f"| {line} |" for line in lines)


def cost(loss: Loss) -> str:
    said = "[Meaning of the letters](index.md#cost). Measured times are in [Speed and memory](../performance.md)."
    row = [*loss.costs, loss.meta.get("state", NONE)]
    return paragraphs([table("time | largest array | state, parameters", [row]), said])


def api(loss: Loss) -> str:
    """Links to the loss, to the names that are defined beside it, and to the modules that hold it."""
    package = load("kdjax")
    home = loss.function("kdjax").module.path
    beside = [name for name in package.exports or () if package.imports[str(name)].rpartition(".")[0] == home]
    modules = package["nn"].exports
    summaries = {f"nn.{name}": package["nn"][name].docstring for name in modules}
    lines = {
        "Function": [loss.name],
        "Used with it": [str(name) for name in beside if not str(name).endswith("_loss")],
        "Modules": [name for name, x in summaries.items() if x and x.value.startswith(f"`{loss.name}`")],
    }
    said = [
        f"- {what}: " + ", ".join(f"[`{x}.{name}`][{x}.{name}]" for name in names for x in FRAMEWORKS.values())
        for what, names in lines.items()
        if names
    ]
    for name, reads in loss.configured.items():
        inputs = ", which reads " + ", ".join(f"`{x}`" for x in reads.split(", ")) if reads else ""
        said.append(f"- In a configuration of [`make_loss`][kdjax.make_loss]: `{name}`{inputs}")
    return "\n".join(said)


def catalogue() -> str:
    """The tables of docs/losses/index.md, one for each family."""
    parts = []
    for family, losses in by_family().items():
        rows = []
        for loss in losses:
            docstring = loss.function("kdjax").docstring
            whose, address = paper(docstring and docstring.value)
            names = ", ".join(f"`{name}`" for name in loss.configured)
            labels, link = loss.meta.get("labels", NONE), f"[{whose}]({address})" if address else whose or NONE
            rows.append([f"[`{loss.name}`]({loss.name}.md)", loss.docstring().summary, labels, names, link])
        head = "loss | what it compares | labels | in a configuration | paper"
        parts += [f"## {FAMILIES[family]}", table(head, rows)]
    return paragraphs(parts)


def shared() -> str:
    """The list of docs/losses/index.md, from the docstring of the package."""
    docstring = load("kdjax").docstring
    assert docstring
    return docstring.value.partition("What all losses share:")[2].strip()


def choosing() -> str:
    """The table of docs/choosing.md."""
    rows = []
    for family, losses in by_family().items():
        rows.append([f"**{FAMILIES[family]}**", *[""] * 5])
        for loss in losses:
            known = (loss.meta.get(key, NONE) for key in ("labels", "state", "couples"))
            reported = "<br>".join(loss.meta.get("reported", ())) or NONE
            rows.append([f"[`{loss.name}`](losses/{loss.name}.md)", *known, "; ".join(loss.costs), reported])
    return table("loss | labels | state, parameters | depends on | time; largest array | reported accuracy", rows)


def uses() -> str:
    """The lists of docs/choosing.md: each loss with the first point of its section "When to use it"."""
    parts = []
    for family, losses in by_family().items():
        parts += [f"### {FAMILIES[family]}", "\n".join(f"- [`{x.name}`](losses/{x.name}.md): {use(x)}" for x in losses)]
    return paragraphs(parts)


def use(loss: Loss) -> str:
    first = re.match(r"- (.*(?:\n  .*)*)", loss.sections.get("When to use it", ""))
    if not first:
        raise PluginError(f"docs/losses/{loss.name}.md: 'When to use it' must begin with '- ', and say when")
    links = re.compile(r"\]\((?!\w+:)([^)]+)")
    return links.sub(lambda x: f"]({posixpath.normpath('losses/' + x[1])}", " ".join(first[1].split()))
