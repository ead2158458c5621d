"""The two packages hold the same files, names, parameters, defaults and summaries."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import kdjax
import kdjax.interop
import kdjax.nn
import kdtorch
import kdtorch.interop
import kdtorch.nn

ROOT = pathlib.Path(kdjax.__file__).parent.parent
RENAMED = {"key": "generator", "rngs": "generator", "axis_name": "group"}
OTHER = {"torch_teacher": "jax_teacher", "torch_loss": "jax_loss"}  # each takes what the other framework has
ONLY_JAX = {"LossState"}  # PyTorch calls it a buffer
WITHOUT_GENERATOR = {
    "DynamicCenterNormLoss",
    "USKDLoss",
    "ABF",
    "ReviewKD",
}  # PyTorch's own layers draw from its global one


def files(package):
    return sorted(str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py"))


def test_files():
    assert files("kdjax") == files("kdtorch")


@pytest.mark.parametrize("module", ["", ".nn", ".interop", ".teacher_cache"])
def test_names(module):
    ours, theirs = (set(sys.modules[package + module].__all__) for package in ("kdjax", "kdtorch"))
    assert {OTHER.get(name, name) for name in ours - ONLY_JAX} == theirs


PUBLIC = [(kdjax, kdtorch, name) for name in kdtorch.__all__] + [
    (kdjax.nn, kdtorch.nn, name) for name in kdtorch.nn.__all__
]
PUBLIC += [(kdjax.interop, kdtorch.interop, name) for name in kdtorch.interop.__all__ if name not in OTHER.values()]


def callables(ours, theirs):
    """The pairs to compare: a function, or the constructor and the public methods of a class."""
    if not inspect.isclass(ours):
        return [(ours, theirs)]
    if issubclass(ours, tuple):
        return [(ours.__new__, theirs.__new__)]
    pairs = [(ours.__init__, theirs.__init__)]
    pairs += [(ours.__call__, theirs.forward)] if "forward" in vars(theirs) else []
    methods = [name for name, value in vars(ours).items() if inspect.isfunction(value) and not name.startswith("_")]
    return pairs + [(getattr(ours, name), getattr(theirs, name)) for name in methods]


def parameters(function):
    return [(RENAMED.get(p.name, p.name), p.kind, default(p)) for p in inspect.signature(function).parameters.values()]


def default(parameter):
    if parameter.name == "channel_axis":
        return {-1: "last here", 1: "last here"}[parameter.default]
    return str(parameter.default).replace("<class 'jax.numpy.float32'>", "torch.float32")


@pytest.mark.parametrize(("jax_module", "torch_module", "name"), PUBLIC, ids=lambda x: x if isinstance(x, str) else "")
def test_signatures(jax_module, torch_module, name):
    for ours, theirs in callables(getattr(jax_module, name), getattr(torch_module, name)):
        mine = parameters(ours)
        if name in WITHOUT_GENERATOR:
            mine = [p for p in mine if p[0] != "generator"]
        elif name in ("CRCDLoss", "make_loss"):  # Flax demands its rngs, PyTorch falls back on its global generator
            mine = [(*p[:2], "None") if p[0] == "generator" else p for p in mine]
        assert mine == parameters(theirs)


@pytest.mark.parametrize(("jax_module", "torch_module", "name"), PUBLIC, ids=lambda x: x if isinstance(x, str) else "")
def test_summaries(jax_module, torch_module, name):
    ours, theirs = (inspect.getdoc(getattr(module, name)) for module in (jax_module, torch_module))
    assert ours.splitlines()[0] == theirs.splitlines()[0]
    formula = re.compile(r"\$\$.*?\$\$", re.S)
    assert formula.findall(ours) == formula.findall(theirs)


@pytest.mark.parametrize(("ours", "theirs"), OTHER.items())
def test_summaries_of_what_takes_the_other(ours, theirs):
    said = (
        inspect.getdoc(getattr(module, name)) for module, name in ((kdjax.interop, ours), (kdtorch.interop, theirs))
    )
    assert len({text.splitlines()[0] for text in said}) == 1


@pytest.mark.parametrize("path", files("kdjax"))
def test_order(path):
    """Functions and classes stand in the same order, helpers that one framework alone needs aside."""
    ours, theirs = (
        [node.name for node in ast.parse((ROOT / package / path).read_text()).body if hasattr(node, "name")]
        for package in ("kdjax", "kdtorch")
    )
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


@pytest.mark.parametrize(
    ("modules", "others"),
    [
        ("kdjax, kdjax.nn, kdjax.interop, kdjax.__main__", {"torch", "kdtorch"}),
        ("kdtorch, kdtorch.nn, kdtorch.interop, kdtorch.__main__", {"jax", "kdjax"}),
        (
            "kdlosses.cache, kdlosses.checks, kdlosses.files, kdlosses.formulas, kdlosses.layers, kdlosses.pages, kdlosses.trees",
            {"torch", "kdtorch", "jax", "kdjax"},
        ),
    ],
)
def test_one_framework_does_not_import_the_other(modules, others):
    code = f"import {modules}, sys; sys.exit(bool({others!r} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
