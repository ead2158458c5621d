"""The formulas of the docstrings in characters that a terminal can show."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from pylatexenc import latex2text, latexwalker, macrospec


def unicode(latex: str) -> str:
    """A formula in characters that a terminal can show; braces group an index, and a wide space ends a line."""
    nodes, *_ = latexwalker.LatexWalker(" ".join(latex.split()), latex_context=_GRAMMAR).get_latex_nodes()
    text = _TEXT.nodelist_to_text(nodes)
    text = re.sub(r"\^\{?(-?\d+)\}?", lambda found: found[1].translate(_RAISED), text)
    for pattern, spaced in _SPACES.items():
        text = re.sub(pattern, spaced, text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


def _fraction(node: latexwalker.LatexMacroNode, l2tobj: latex2text.LatexNodes2Text) -> str:
    parts = (l2tobj.nodelist_to_text([part]) for part in node.nodeargs)
    bare = (re.sub(r"^\{(.*)\}$", r"\1", part) for part in parts)
    return "/".join(part if re.fullmatch(r"[\w.]+(_\{\w+\})?|\w\^\w|‖\w+‖", part) else f"({part})" for part in bare)


def _grammar(default: macrospec.LatexContextDb, macros: Sequence[Any], **others: Any) -> macrospec.LatexContextDb:
    default.add_context_category("formulas", prepend=True, macros=macros, **others)
    return default


_SPACES = {
    r"(∑(?:_\{.*?\}|_\w))": r" \1 ",
    r"(?<=[\w)}\]‖²|\u0302\u0305]) *([-+=<]) *": r" \1 ",
    r", *": ", ",
    r"([(\[]) *": r"\1",
}
_MACROS = {"|": "‖", "ne": "≠", "log": " log ", "quad": "\n", "qquad": "\n"}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_GRAMMAR = _grammar(latexwalker.get_default_latex_context_db(), [macrospec.MacroSpec("tfrac", "{{")])
_TEXT = latex2text.LatexNodes2Text(
    latex_context=_grammar(
        latex2text.get_default_latex_context_db(),
        [
            *(latex2text.MacroTextSpec(name, simplify_repl=_fraction) for name in ("frac", "tfrac")),
            *itertools.starmap(latex2text.MacroTextSpec, _MACROS.items()),
        ],
        environments=[latex2text.EnvironmentTextSpec("cases", simplify_repl="{ %s }")],
    ),
    keep_braced_groups=True,
    keep_braced_groups_minlen=2,
    strict_latex_spaces=True,
)
