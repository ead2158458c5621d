"""The two packages have the same files, names, parameters, defaults and docstrings, and imports have one direction."""

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
from kdlosses.pages import blocks, entries, losses

ROOT = pathlib.Path(kdjax.__file__).parent.parent
RENAMED = {"key": "generator", "rngs": "generator", "axis_name": "group", "class_axis_name": "class_group"}
OTHER = {"torch_teacher": "jax_teacher", "torch_loss": "jax_loss"}  # each takes an object of the other framework
ONLY_JAX = {"LossState"}  # PyTorch has buffers instead
ONLY_TORCH = {"fuse"}  # `jax.jit` does it
WITHOUT_GENERATOR = {
    "DynamicCenterNormLoss",
    "USKDLoss",
    "ABF",
    "ReviewKD",
    "VIDLoss",
    "Projector",
}  # PyTorch's own layers use the global generator


def files(package):
    return sorted(str(path.relative_to(ROOT / package)) for path in (ROOT / package).rglob("*.py"))


def test_files():
    assert files("kdjax") == files("kdtorch")


@pytest.mark.parametrize("module", ["", ".nn", ".interop", ".teacher_cache"])
def test_names(module):
    ours, theirs = (set(sys.modules[package + module].__all__) for package in ("kdjax", "kdtorch"))
    assert {OTHER.get(name, name) for name in ours - ONLY_JAX} == theirs - ONLY_TORCH


PUBLIC = [(kdjax, kdtorch, name) for name in kdtorch.__all__ if name not in ONLY_TORCH] + [
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
        elif name in (
            "CRCDLoss",
            "CRDLoss",
            "make_loss",
        ):  # Flax requires rngs, PyTorch has a global generator as the default
            mine = [(*p[:2], "None") if p[0] == "generator" else p for p in mine]
        assert mine == parameters(theirs)


# texts of kdjax, and the texts of kdtorch in their place
SAID = [
    (
        "axis_name: the mesh axis that the batch is spread over, inside `shard_map`.",
        "group: the process group that the batch is spread over.",
    ),
    (
        "class_axis_name: the mesh axis that the classes are spread over, inside `shard_map`.",
        "class_group: the process group that the classes are spread over.",
    ),
    ("`class_axis_name`", "`class_group`"),
    ("- 1` gives NaN for that example", "- 1` is an error"),  # an index out of range
    ("[batch, height, width, channels]", "[batch, channels, height, width]"),
    ("[batch, height, width, in_channels]", "[batch, in_channels, height, width]"),
    ("[batch, height, width, out_channels]", "[batch, out_channels, height, width]"),
    ("`kdjax.nn.", "`kdtorch.nn."),
]
# removed before the comparison: the source of random numbers, and kdtorch's error for an index out of range
LEFT_OUT = [r"^ +(key|rngs|generator): .*\n", r"^ +IndexError: an? (label|index|class) .*\n"]
# texts that only one package has
OWN = {
    "difference_kl_loss": r"The limit is about .*? a row at a time\. |Under `vmap` all three ways are computed\.",
    "euclidean_mse_loss": r"Under `vmap` both ways are computed\.",
    "instance_graph_loss": r"Under `vmap` both ways are computed\.",
    "pkt_loss": r"Under `vmap` both ways are computed\.",
    "rkd_loss": r"Under `vmap` both ways are computed\.",
    "dino_teacher_temperature": r"`torch\.compile` compiles once more for the second integer\.",
    "load": r"TypeError: an array of a dtype that PyTorch does not have\.",
    "save": r"ValueError: a tensor that requires gradient\.",
}


def prose(docstring):
    """A docstring without its example on one line, without the parts that are not compared."""
    text = f"{docstring}\n".partition(">>>")[0]
    for pattern in LEFT_OUT:
        text = re.sub(pattern, "", text, flags=re.M)
    return " ".join(text.split())


def in_one_vocabulary(text):
    """The text with "array" instead of "tensor"."""
    return re.sub(r"\ba tensor", "an array", text).replace("tensor", "array").replace("Tensor", "Array")


def said(docstring, name, renamed=()):
    text = prose(docstring)
    for old, new in renamed:
        text = text.replace(old, new)
    return in_one_vocabulary(" ".join(re.sub(OWN.get(name, "$^"), "", text).split()))


def documented(ours, theirs):
    """The docstrings of a function, or of a class and of its public methods."""
    pairs = [(ours, theirs)]
    if inspect.isclass(ours) and not issubclass(ours, tuple):
        pairs += [pair for pair in callables(ours, theirs) if pair[0].__name__ != "__init__"]
    return [tuple(map(inspect.getdoc, pair)) for pair in pairs]


@pytest.mark.parametrize(("jax_module", "torch_module", "name"), PUBLIC, ids=lambda x: x if isinstance(x, str) else "")
def test_docstrings(jax_module, torch_module, name):
    """The texts are equal word by word; examples have different code, but print the same."""
    for ours, theirs in documented(getattr(jax_module, name), getattr(torch_module, name)):
        assert said(ours, name, SAID) == said(theirs, name)
        printed = [re.findall(r"^(?!>>>|\.\.\.).*$", x.partition(">>>")[2], re.M)[1:] for x in (ours, theirs)]
        assert printed[0] == printed[1]


@pytest.mark.parametrize("name", OWN)
def test_what_one_package_alone_says_is_there(name):
    (modules,) = {(ours, theirs) for ours, theirs, public in PUBLIC if public == name}
    texts = [prose(inspect.getdoc(getattr(module, name))) for module in modules]
    for part in OWN[name].split("|"):
        assert re.search(part, texts[0]) or re.search(part, texts[1])


def test_the_docstrings_of_the_packages():
    """The section on what all losses share is identical; before it only the names of the two packages are swapped."""
    heading = "What all losses share:"
    (ours, _, shared), (theirs, _, shared_too) = (inspect.getdoc(x).partition(heading) for x in (kdjax, kdtorch))
    assert shared == shared_too != ""
    swapped = {"kdjax": "kdtorch", "kdtorch": "kdjax", "JAX": "PyTorch", "PyTorch": "JAX"}
    assert re.sub("|".join(swapped), lambda x: swapped[x[0]], prose(ours)) == prose(theirs)
    assert [line for line in ours.splitlines() if line][-1] == [line for line in theirs.splitlines() if line][-1]
    assert inspect.getdoc(sys.modules["kdjax.teacher_cache"]) == inspect.getdoc(sys.modules["kdtorch.teacher_cache"])


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_what_all_losses_share_takes_one_line(package):
    for function in losses(package).values():
        arguments = entries(dict(blocks(function.__doc__))["Args"])
        for name in arguments.keys() & {"where", "reduction", "axis_name", "group", "class_axis_name"}:
            assert "\n" not in arguments[name]


@pytest.mark.parametrize(("ours", "theirs"), OTHER.items())
def test_summaries_of_what_takes_the_other(ours, theirs):
    said = (
        inspect.getdoc(getattr(module, name)) for module, name in ((kdjax.interop, ours), (kdtorch.interop, theirs))
    )
    assert len({text.splitlines()[0] for text in said}) == 1


@pytest.mark.parametrize("path", files("kdjax"))
def test_order(path):
    """Functions and classes have the same order, except helpers that only one framework needs."""
    ours, theirs = (
        [node.name for node in ast.parse((ROOT / package / path).read_text()).body if hasattr(node, "name")]
        for package in ("kdjax", "kdtorch")
    )
    assert [name for name in ours if name in theirs] == [name for name in theirs if name in ours]


# what each package may import of the repository: kdlosses <- kdjax, kdtorch <- parity
BELOW = {"kdlosses": set(), "kdjax": {"kdlosses"}, "kdtorch": {"kdlosses"}, "parity": {"kdlosses", "kdjax", "kdtorch"}}
JAX, TORCH = {"jax", "jaxlib", "flax", "optax"}, {"torch"}
OTHERS = {"kdlosses": JAX | TORCH, "kdjax": TORCH, "kdtorch": JAX, "parity": set()}
CROSSES = {"kdjax/interop.py": {"torch", "kdtorch._pack"}, "kdtorch/interop.py": {"jax", "flax", "kdjax._pack"}}
FOR_TYPES = {"kdjax/_pack.py": {"torch"}, "kdjax/interop.py": {"torch"}}
PACKAGED = sorted(str(path.relative_to(ROOT)) for package in BELOW for path in (ROOT / package).rglob("*.py"))
ELSEWHERE = [
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] in ("tests", "benchmarks", "examples", "docs")
]
OF_THE_REPOSITORY = {
    *BELOW,
    *(path.stem for path in ELSEWHERE),
    *(path.relative_to(ROOT).parts[0] for path in ELSEWHERE),
}


def imports(source):
    """The modules that a file imports: at once, inside functions, and only for types."""
    found = {"at once": set(), "in a function": set(), "for types": set()}

    def visit(node, when):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found[when] |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0
                inside = ROOT.joinpath(*child.module.split(".")).is_dir()
                found[when] |= {f"{child.module}.{x.name}" if inside else child.module for x in child.names}
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                visit(child, "for types")
            else:
                inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, "in a function" if inner and when == "at once" else when)

    visit(ast.parse(source), "at once")
    return found


def strays(path, source):
    """The imports of a file that are not allowed."""
    package = path.partition("/")[0]
    above = (OF_THE_REPOSITORY - BELOW[package] - {package}) | OTHERS[package]
    allowed = {"at once": set(), "in a function": CROSSES.get(path, set()), "for types": FOR_TYPES.get(path, set())}
    for when, modules in imports(source).items():
        for module in sorted(modules):
            top = module.partition(".")[0]
            if top in above and not {module, top} & allowed[when]:
                yield module, when


@pytest.mark.parametrize("path", PACKAGED)
def test_imports_run_one_way(path):
    assert list(strays(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("kdlosses/trees.py", "import jax.numpy as jnp", [("jax.numpy", "at once")]),
        ("kdlosses/trees.py", "def f():\n    import kdjax", [("kdjax", "in a function")]),
        ("kdjax/interop.py", "def f():\n    import torch.nn\n    from kdtorch import _pack", []),
        ("kdjax/interop.py", "def f():\n    from kdtorch import interop", [("kdtorch.interop", "in a function")]),
        ("kdjax/interop.py", "from kdtorch import _pack", [("kdtorch._pack", "at once")]),
        ("kdjax/interop.py", "from kdtorch._pack import tensor", [("kdtorch._pack", "at once")]),
        ("kdtorch/_numerics.py", "def f():\n    import jax", [("jax", "in a function")]),
        ("kdtorch/logits/kl.py", "try:\n    from parity.compare import ulps\nexcept ImportError: ...", [("parity.compare", "at once")]),
        ("parity/run.py", "from tests import laws", [("tests.laws", "at once")]),
        ("parity/run.py", "import laws", [("laws", "at once")]),
        ("parity/run.py", "from benchmarks.direct import kl_loss", [("benchmarks.direct.kl_loss", "at once")]),
        ("parity/run.py", "import kdjax, kdtorch.nn, jax, torch", []),
    ],
)  # fmt: skip
def test_an_import_that_goes_the_other_way_is_found(path, source, found):
    assert list(strays(path, source)) == found


@pytest.mark.parametrize(
    ("modules", "others"),
    [
        ("kdjax, kdjax.nn, kdjax.interop, kdjax.__main__", TORCH | {"kdtorch", "parity", "tests", "benchmarks"}),
        ("kdtorch, kdtorch.nn, kdtorch.interop, kdtorch.__main__", JAX | {"kdjax", "parity", "tests", "benchmarks"}),
        ("kdtorch.interop", JAX | {"kdjax", "parity", "rich"}),
        ("kdlosses", JAX | TORCH | {"kdjax", "kdtorch", "parity", "rich", "numpy"}),
        (
            ", ".join(path.removesuffix(".py").replace("/", ".") for path in PACKAGED if path.startswith("kdlosses")),
            JAX | TORCH | {"kdjax", "kdtorch", "parity"},
        ),
        ("parity", JAX | TORCH | {"kdjax", "kdtorch", "tests", "benchmarks"}),
    ],
)
def test_what_an_import_does_not_load(modules, others):
    code = f"import {modules}, sys; print(*sorted({others!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_the_interop_of_jax_loads_no_more_than_flax_does():
    code = "import flax.nnx, optax, sys; before = set(sys.modules); import kdjax.interop; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {*TORCH, "kdtorch", "parity", "rich"}
