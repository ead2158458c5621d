"""The two packages hold the same files, names, parameters, defaults and summaries."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import kdjax
import kdjax.nn
import kdtorch
import kdtorch.nn

ROOT = pathlib.Path(kdjax.__file__).parent.parent
RENAMED = {"key": "generator", "rngs": "generator", "axis_name": "group"}
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


@pytest.mark.parametrize("module", ["", ".nn"])
def test_names(module):
    ours, theirs = (set(sys.modules[package + module].__all__) for package in ("kdjax", "kdtorch"))
    assert ours - ONLY_JAX == theirs


PUBLIC = [(kdjax, kdtorch, name) for name in kdtorch.__all__] + [
    (kdjax.nn, kdtorch.nn, name) for name in kdtorch.nn.__all__
]


def callables(ours, theirs):
    """The pairs to compare: a function, or the constructor and the public methods of a class."""
    if not inspect.isclass(ours):
        return [(ours, theirs)]
    if issubclass(ours, tuple):
        return [(ours.__new__, theirs.__new__)]
    pairs = [(ours.__init__, theirs.__init__), (ours.__call__, theirs.forward)]
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


@pytest.mark.parametrize("path", files("kdjax"))
def test_order(path):
    """Functions and classes stand in the same order, helpers that one framework alone needs aside."""
    ours, theirs = (
        [node.name for node in ast.parse((ROOT / package / path).read_text()).body if hasattr(node, "name")]
        for package in ("kdjax", "kdtorch")
    )
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


@pytest.mark.parametrize(("package", "other"), [("kdjax", "torch"), ("kdtorch", "jax")])
def test_one_framework_does_not_import_the_other(package, other):
    code = f"import {package}, {package}.nn, sys; sys.exit({other!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
