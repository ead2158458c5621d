"""`python -m kdlosses`, `kdjax` and `kdtorch`: the table of losses and all pages, in a terminal of 80 columns."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from rich.cells import cell_len

import kdjax
import kdlosses
import kdtorch
from kdlosses.formulas import unicode
from kdlosses.meanings import OTHER_NAMES
from kdlosses.pages import blocks, entries, losses, paper
from parity.__main__ import title as parity_title
from parity.cases import LOSSES as LOSSES_OF_PARITY

LOSSES = [(package, name) for package in (kdjax, kdtorch) for name in losses(package)]


@pytest.fixture
def page(monkeypatch, capsys):
    """Run the command, check its exit status, and return what it prints."""

    def run(package, *arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["", *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_module(package.__name__, run_name="__main__")
        assert left.value.code == status
        text = "\n".join(line.rstrip() for line in "".join(capsys.readouterr()).splitlines())
        assert max(map(cell_len, text.splitlines())) <= 80 or status
        return text

    monkeypatch.setenv("COLUMNS", "80")
    return run


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_the_table(page, package):
    text = page(package)
    # one line per name; the first also has what the loss compares, what it needs, and its paper
    assert re.search(r"^ dkd_loss +Decoupled .* labels +Zhao et al., CVPR", text, re.M)
    assert re.search(r"^ dkd_loss .*\n dkd +\w+", text, re.M)
    assert re.search(r"^ crcd_loss +Complementary +index +Zhu et al., CVPR", text, re.M)
    assert {line[1:].split(" ")[0] for line in text.splitlines()} >= {
        *losses(package),
        "kld",
        "uskd",
        "uskd_tea",
        "rkd",
    }


def test_the_table_of_both(page):
    text = page(kdlosses)
    assert re.search(r"^ dkd_loss +Decoupled .* labels +Zhao et al., .* kdjax\n dkd +.* kdtorch$", text, re.M)
    assert {line[1:].split(" ")[0] for line in text.splitlines()} >= {*losses(kdjax), *losses(kdtorch), "kld", "rkd"}
    assert text.count("kdjax") == text.count("kdtorch") == len(losses(kdjax))


@pytest.mark.parametrize("name", losses(kdjax))
def test_every_loss_shows_from_both(page, name):
    head, *rest = page(kdlosses, "show", name).split("in kdjax and kdtorch; this is its page in kdjax\n")
    assert [head + "".join(rest)] == [page(kdjax, "show", name)]


ROOT = pathlib.Path(kdlosses.__file__).parent.parent
HIDDEN = """
import runpy, sys
hidden, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(hidden.split(",")))
sys.argv = ["kdlosses", *arguments]
try:
    runpy.run_module("kdlosses", run_name="__main__")
except SystemExit as left:
    loaded = {"jax", "torch", "kdjax", "kdtorch", "parity"} & {name for name, x in sys.modules.items() if x}
    sys.exit(left.code or ", ".join(loaded) or 0)
"""


@pytest.mark.parametrize(
    ("hidden", "having", "array", "notes"),
    [
        ("nothing", ["kdjax", "kdtorch"], "Array", []),
        ("torch", ["kdjax"], "Array", ["kdtorch cannot be imported here, torch is missing: pip install 'kdlosses[torch]'"]),
        ("jax", ["kdtorch"], "Tensor", ["kdjax cannot be imported here, jax is missing: pip install 'kdlosses[jax]'"]),
        ("flax", ["kdtorch"], "Tensor", ["kdjax cannot be imported here, flax is missing: pip install 'kdlosses[jax]'"]),
        ("kdjax", ["kdtorch"], "Tensor", ["kdjax cannot be imported here, kdjax is missing: pip install 'kdlosses[jax]'"]),
        ("jax,torch", [], "Array", ["kdjax cannot be imported here, jax is missing: pip install 'kdlosses[jax]'",
                                    "kdtorch cannot be imported here, torch is missing: pip install 'kdlosses[torch]'"]),
    ],
)  # fmt: skip
def test_with_what_is_installed(hidden, having, array, notes):
    """Neither framework is loaded, and it works if only one of them is installed."""

    def printed(*arguments):
        command = [sys.executable, "-c", HIDDEN, hidden, *arguments]
        environment = {**os.environ, "COLUMNS": "100"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        return [line.rstrip() for line in done.stdout.splitlines()]

    table, page = printed(), printed("show", "sml")
    assert table[-1 - len(notes) :] == [*notes, "`python -m kdlosses show dkd` prints the page of one."]
    assert (page[-len(notes) - 1 :] == ["", *notes]) if notes else page[-1] == "  0.8125"
    row = table.index(next(line for line in table if line.startswith(" smooth_l1_loss ")))
    marks = [line.split()[-1] for line in table[row : row + 2] if line.split()[-1].startswith("kd")]
    assert marks == having
    assert page[1] == f"    student: Float[{array}, '*batch features'],"
    assert [line for line in page if line.startswith("in kd")] == [
        f"in {' and '.join(having)}{'; this is its page in kdjax' if len(having) > 1 else ''}"
    ] * bool(having)


def test_the_version():
    assert kdlosses.__version__ == kdjax.__version__ == kdtorch.__version__


HEAD = """\
smooth_l1_loss(
    student: Float[{array}, '*batch features'],
    teacher: Float[{array}, '*batch features'],
    *,
    beta: Scalar = 1.0,
    where: Bool[{array}, '*batch'] | None = None,
    reduction: Reduction = 'mean',
    {axis} | None = None,
) -> {result}
in a configuration: sml

Smooth L1 error between features: quadratic below β, linear above.

Formula
  1/D ∑_d {{ (s_d - t_d)²/2β if |s_d - t_d| < β
  |s_d - t_d| - β/2 otherwise }}

Args
  student    [*batch, features].
  teacher    the same shape; constant.
  beta       β > 0, where the two pieces meet; a constant. The loss is the Huber
             loss with δ = β, divided by β.
"""
FRAMEWORK = {
    kdjax: {"array": "Array", "axis": "axis_name: AxisName", "result": "jax.Array"},
    kdtorch: {"array": "Tensor", "axis": "group: ProcessGroup", "result": "Tensor"},
}


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_a_page(page, package):
    text = page(package, "show", "sml")
    assert text.startswith(HEAD.format(**FRAMEWORK[package]))
    assert text.endswith('\n  >>> print(f"{smooth_l1_loss(s, t):.4f}")\n  0.8125')


@pytest.mark.parametrize(("package", "name"), LOSSES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_every_loss_shows(page, package, name):
    text = page(package, "show", name)
    assert "\\" not in text
    assert "$" not in text
    said = blocks(getattr(package, name).__doc__)
    sections = dict(said)
    for parameter in entries(sections["Args"]):
        assert f"\n  {parameter}  " in text
    for line in sections["Example"].splitlines():
        assert f"\n  {line}\n" in f"{text}\n"
    _, link = paper(getattr(package, name).__doc__)
    assert link in text


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("dkd", "dkd_loss"),
        ("DKD", "dkd_loss"),
        ("kld", "kl_loss"),
        ("rkd", "hcl_loss"),
        ("rkd_loss", "rkd_loss"),
        ("eu_mse", "euclidean_mse_loss"),
        ("uskd_tea", "uskd_loss"),
        ("topk_kl", "topk_kl_loss"),
        ("make_loss", "make_loss"),
        ("DINOState", "DINOState"),
    ],
)
def test_names(page, package, asked, shown):
    assert page(package, "show", asked).startswith(f"{shown}(")


@pytest.mark.parametrize("package", [kdjax, kdtorch], ids=lambda x: x.__name__)
def test_an_unknown_name(page, package):
    assert page(package, "show", "dkdd", status=2).endswith(
        f"no loss is called 'dkdd'; similar names are dkd, rkd, nkd; `python -m {package.__name__}` lists all"
    )


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("ReviewKD", "hcl_loss"),
        ("attention", "attention_transfer_loss"),
        ("Hinton", "kl_loss"),
        ("FitNets", "mse_loss"),
        ("GKD", "jsd_loss"),
        ("MiniLLM", "reverse_kl_loss"),
        ("contrastive", "crcd_loss or crd_loss"),
        ("tokenizers", "uld_loss"),
        ("Logit standardization", "standardize_logits"),
        ("Neuron Selectivity Transfer", "nst_loss"),  # the title of the paper, found in the docstring
    ],
)
def test_a_name_of_a_paper_or_a_method(page, asked, meant):
    assert f"no loss is called '{asked}'; did you mean {meant}" in page(kdlosses, "show", asked, status=2)


@pytest.mark.parametrize("asked", ["dkd", "DKD", "dkd_loss", "kld", "rkd", "rkd_loss", "eu_mse"])
def test_parity_takes_the_names_that_show_takes(page, asked):
    assert page(kdlosses, "show", asked).startswith(f"{parity_title(asked)}(")


def test_parity_takes_every_row_of_its_table():
    for row in LOSSES_OF_PARITY:
        assert parity_title(row.title) == row.title


def test_every_other_name_is_that_of_a_public_function():
    assert OTHER_NAMES.keys() <= set(kdjax.__all__)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (kdtorch.bce_loss, "-1/D ∑_d [t_d log σ(s_d) + (1 - t_d) log (1 - σ(s_d))]"),
        (kdtorch.dcn_loss, "1 - (s·ĉ_y)/(max(‖s‖, ‖t‖)),\nĉ_y = c_y/‖c_y‖"),
        (kdtorch.hcl_loss, "∑_{maps} (∑_l w_l MSE(pool_l(s), pool_l(t)))/(∑_l w_l),\nw = 1, 1/2, 1/4, 1/8"),
        (kdtorch.nkd_loss, "-q_y log p_y - γ T² ∑_{k≠y} q̂_k log p̂_k"),
        (kdtorch.symmetric_kl_loss, "T²/2[KL(q ‖ p) + KL(p ‖ q)],\np = softmax(s/T),\nq = softmax(t/T)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_formulas(loss, formula):
    assert unicode(dict(blocks(loss.__doc__))["Formula"]) == formula
