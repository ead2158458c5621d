"""The benchmarks: every form of a workload gives the same numbers, and what the tool says."""

import functools
import io
import json

import pytest
from rich.console import Console

from benchmarks import hostile, scaling, workloads
from benchmarks.__main__ import main, tables
from benchmarks.forms import FORMS, check, form
from benchmarks.workloads import GROWTH, WORKLOADS, Workload

SMALL = {
    "kl_loss": workloads._logits(6, 11),
    "symmetric_kl_loss": workloads._logits(6, 11),
    "difference_kl_loss": workloads._logits(6, 11),
    "dkd_loss": workloads._logits(6, 11, labels=True),
    "nkd_loss": workloads._logits(6, 11, labels=True),
    "uskd_loss": workloads._logits(6, 11, labels=True, names=("student", "weak")),
    "topk_kl_loss": workloads._kept(6, 11, top_k=3),
    "euclidean_mse_loss": workloads._features(6, 9),
    "dcn_loss": workloads._features(6, 9, 4),
    "dino_loss": workloads._views(6, 9),
    "crcd_loss": workloads._crcd(6, 9, 5, 20),
    "hcl_loss": workloads._maps(3, (2, 8, 8), (3, 4, 4)),
}


@pytest.mark.parametrize("loss", sorted({x.loss for x in WORKLOADS}))
def test_the_direct_form_is_the_same_loss(loss):
    full = next(x for x in WORKLOADS if x.loss == loss)
    small = Workload("small", loss, SMALL[loss], full.learns, options=full.options)
    want = (made := form("direct", small)).outcome(made.step())
    for name in ("torch", "jax"):
        made = form(name, small)
        check(name, made.outcome(made.step()), want)


def test_a_wrong_value_is_not_timed():
    small = Workload("small", "kl_loss", SMALL["kl_loss"], ("student",))
    made = form("torch", small)
    got = made.outcome(made.step())
    with pytest.raises(AssertionError, match="x: the value differs from the direct form's by"):
        check("x", got._replace(value=1.01 * got.value), got)


def test_hostile_inputs():
    """kdtorch never fails; some direct form does."""
    pairs = [pair for _, counts in hostile.count(1) for pair in counts.values()]
    assert sum(direct for direct, _ in pairs) > 0
    assert all(ours == 0 for _, ours in pairs)


def test_names_are_unique():
    names = [x.name for x in (*WORKLOADS, *(x for _, sizes in GROWTH.values() for x in sizes.values()))]
    assert len(names) == len(set(names))


def test_a_quick_run(tmp_path, capsys):
    files = tmp_path / "run.json", tmp_path / "picture"
    arguments = ["--quick", "--only", "nkd", "--forms", "direct", "torch", "jax"]
    assert main([*arguments, "--json", str(files[0]), "--png", str(files[1])]) == 0
    assert "nkd 128×1000" in capsys.readouterr().out
    (row,) = json.loads(files[0].read_text())["workloads"]
    assert set(row["seconds"]) == {"floor", "direct", "torch", "jax"}
    assert 0 < row["seconds"]["torch"]["low"] <= row["seconds"]["torch"]["median"] <= row["seconds"]["torch"]["high"]
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 150])
def test_tables_keep_every_figure(width):
    """A line a workload where it fits, and in 80 columns nothing cut off."""
    seconds = {name: {"median": 1.234567} for name in ("floor", *FORMS)}
    memory = {name: {"resident": 3067 * 2**20, "program": 3066 * 2**20 if name == "jax" else None} for name in FORMS}
    rows = [
        {"workload": x.name, "seconds": seconds, "memory": memory, "targets": {"torch": 117.0, "jax": 217.0}}
        for x in WORKLOADS
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(*tables(rows, FORMS, width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert {text.count(x) // len(rows) for x in ("(of 117)", "(of 217)", "(3066.0)")} == {1}
    assert text.count("1.23e+03") == 5 * len(rows)
    assert all(text.count(word) >= 2 for x in WORKLOADS for word in x.name.split())
    assert width == 80 or all(f"│ {x.name} " in text for x in WORKLOADS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nkd", "xyz"], "no workload has ['xyz'] in its name: kl 128×10, "),
        (["--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (
            ["--png", "x.png", "--forms", "jax"],
            "argument --png: shows ratios to the direct form; leave it among --forms",
        ),
        (["--png", "/no/such/folder/x.png"], "argument --png: cannot write '/no/such/folder/x.png': No such file"),
    ],
)
def test_bad_arguments_fail_before_the_run(arguments, says, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert says in capsys.readouterr().err


def test_what_the_compiler_says_of_many_devices():
    """One all-reduce of the centre's sums: a device sends 7/8 of it twice."""
    program = scaling.Program("small", (8,), functools.partial(scaling._dino, views=4, batch=16, dim=640))
    figures = scaling.measure(program)
    assert figures["sent"] == {"all-reduce": 2 * 7 / 8 * 4 * 640 + 2 * 7 / 8 * 4}
    assert figures["inputs"] == 4 * (6 * 2 * 640 + 640)
