"""Imports have no side effects, the packages execute nothing that they read, and the dependencies are as required."""

import ast
import builtins
import importlib.metadata
import inspect
import itertools
import pathlib
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest
from packaging.requirements import Requirement

import kdjax.interop
import kdjax.nn
import kdtorch.interop
import kdtorch.nn
import parity
from kdlosses.pages import blocks, entries, losses, paper
from parity.cases import LOSSES

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("kdjax", "kdlosses", "kdtorch", "parity")
IMPORT_JAX = """
import sys, threading
import jax, flax.nnx, optax, jaxtyping
from jax._src import xla_bridge
before, loaded = (dict(jax.config.values), threading.active_count()), set(sys.modules)
import kdjax, kdjax.nn
assert not xla_bridge._backends, "a device was initialised"
assert before == (dict(jax.config.values), threading.active_count())
print(*set(sys.modules) - loaded)
"""
IMPORT_TORCH = """
import sys, threading
import torch, jaxtyping, torch._library, torch.distributed
def settings():
    random = torch.random.get_rng_state().tolist()
    return torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), threading.active_count(), random
before, loaded = settings(), set(sys.modules)
import kdtorch, kdtorch.nn
assert not torch.cuda.is_initialized(), "a device was initialised"
assert before == settings()
print(*set(sys.modules) - loaded)
"""


@pytest.mark.parametrize(("code", "own"), [(IMPORT_JAX, "kdjax"), (IMPORT_TORCH, "kdtorch")], ids=["kdjax", "kdtorch"])
def test_import_does_nothing_but_define(code, own):
    # a package loads only itself, and nothing more of its framework, which keeps its import short
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert own in loaded
    assert {x for x in loaded if x.partition(".")[0] not in (own, "kdlosses")} <= {"torch.utils._triton"}


RUNS_TEXT = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "np.load"}
RUNS_DATA = {
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "subprocess",
    "ctypes",
    "socket",
    "urllib",
    "requests",
}


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_runs_what_it_reads(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {x.name.partition(".")[0] for x in node.names} | {
                    str(getattr(node, "module", "")).partition(".")[0]
                }
                assert not names & RUNS_DATA, f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in RUNS_TEXT, f"{path}:{node.lineno}"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_version(package):
    assert package.__version__ == PROJECT["version"]


def test_the_version_is_the_one_to_cite_and_the_changelogs_newest():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert cited == newest[1] == PROJECT["version"]


REQUIREMENTS = [
    requirement
    for text in [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    if (requirement := Requirement(text)).name != "kdlosses"
]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.M))
FREE = re.compile(r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|MPL-2.0|Mozilla Public", re.I)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda x: x.name)
def test_dependencies_are_pinned_within_their_bounds(requirement):
    assert requirement.specifier.contains(PINS[requirement.name])
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name).partition("+")[0])


def test_the_hook_of_ruff_has_its_version():
    assert re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()) == [PINS["ruff"]]


def test_licences():
    """All dependencies have licences that a closed-source project can use."""
    names, seen = [x.name for x in REQUIREMENTS], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        meta = importlib.metadata.metadata(name)
        texts = [meta.get("License-Expression"), meta.get("License"), *(meta.get_all("Classifier") or [])]
        assert any(FREE.search(x.splitlines()[0]) for x in texts if x), f"{name}: {texts}"
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.append(requirement.name)


DOCUMENTED = [
    (f"{module.__name__}.{name}", getattr(module, name))
    for module in (kdjax, kdjax.nn, kdjax.interop, kdtorch, kdtorch.nn, kdtorch.interop, parity)
    for name in module.__all__
]
DOCUMENTED += [
    (f"{name}.{method}", function)
    for name, kind in DOCUMENTED
    if inspect.isclass(kind)
    for method, function in vars(kind).items()
    if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_"))
]


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in DOCUMENTED])
def test_docstrings_say_all(x):
    """A summary line, all arguments by name, the return value, the errors and, for public names, an example."""
    (head, summary), *rest = blocks(x.__doc__)
    sections = dict(rest)
    assert not head
    assert re.fullmatch(r".{,118}\.", summary.splitlines()[0])
    arguments = list(entries(sections.get("Args", sections.get("Attributes", ""))))
    assert arguments == own_parameters(x)
    if inspect.isfunction(x):
        assert ("Returns" in sections) == (inspect.signature(x).return_annotation not in (None, "None"))
    said = entries(sections.get("Raises", ""))
    said["RuntimeError"] = ""  # raised by all losses, for derivatives whose inputs were changed
    assert [error for error in raised(x) if not said.keys() & {kind.__name__ for kind in error.__mro__}] == []
    assert "Example" in sections or (inspect.isfunction(x) and "." in x.__qualname__)


def own_parameters(x):
    if not inspect.isclass(x):
        return [parameter for parameter in inspect.signature(x).parameters if parameter != "self"]
    if issubclass(x, tuple):
        return list(x._fields)
    return [p for p in inspect.signature(x.__init__).parameters if p != "self"] if "__init__" in vars(x) else []


def raised(x, seen=()):
    """The errors that a function or a constructor raises, itself or in functions of the packages that it calls."""
    x = inspect.unwrap(vars(x).get("__init__", x) if inspect.isclass(x) else x)
    source = pathlib.Path(x.__code__.co_filename) if inspect.isfunction(x) else ROOT
    if x in seen or not getattr(x, "__module__", "").startswith(PACKAGES) or not source.is_file():
        return set()
    nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(x)))))
    errors = [node.exc.func.id for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    kinds = (x.__globals__.get(name, getattr(builtins, name, None)) for name in errors)
    called = [x.__globals__.get(node.id) for node in nodes if isinstance(node, ast.Name)]
    inner = (raised(callee, (*seen, x)) for callee in called if inspect.isroutine(callee) or inspect.isclass(callee))
    return {kind for kind in kinds if inspect.isclass(kind)}.union(*inner)


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_a_loss_has_a_formula_and_says_whose_it_is(package):
    assert set(losses(package)) == {loss.name for loss in LOSSES if loss.value != "array"}
    for function in losses(package).values():
        assert "Formula" in dict(blocks(function.__doc__))
        assert paper(function.__doc__)[0]
