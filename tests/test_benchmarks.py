"""The benchmarks: all forms of a workload give the same numbers, and the commands print the right texts."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console
from tiers import first

from benchmarks import calls, direct, gpu, hostile, recording, scaling
from benchmarks.__main__ import main, tables
from benchmarks.forms import FORMS, check, form
from benchmarks.workloads import GROWTH, WORKLOADS, Workload
from parity.cases import LOSSES, Sizes

SMALL = Sizes((6,), 11, 9, 10, 2, ((2, 8, 8), (3, 4, 4)), 20, 5, kept=3)
TIMED = [loss for loss in LOSSES if loss.benchmarks]


def small(loss):
    """The first benchmark of a loss, at small sizes."""
    options = {**loss.benchmarks[0].options, **loss.required}
    return Workload(loss, dataclasses.replace(loss.benchmarks[0], sizes=SMALL, options=options))


@pytest.mark.parametrize("loss", TIMED, ids=lambda loss: loss.title)
@pytest.mark.parametrize("name", first(1, ["torch", "jax"]))
def test_the_direct_form_is_the_same_loss(name, loss):
    want, got = ((made := form(x, small(loss))).outcome(made.step()) for x in ("direct", name))
    check(name, got, want)


def test_a_direct_form_stands_where_a_speed_is_claimed():
    assert {loss.name for loss in LOSSES if hasattr(direct, loss.name)} == {loss.name for loss in TIMED}


def test_a_wrong_value_is_not_timed():
    made = form("torch", small(next(loss for loss in TIMED if loss.divergence)))
    got = made.outcome(made.step())
    with pytest.raises(AssertionError, match="x: the value differs from the direct form's by"):
        check("x", got._replace(value=1.01 * got.value), got)


def test_hostile_inputs():
    """kdtorch never fails; some direct forms do."""
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
    for path in (files[1], tmp_path / "picture_phone"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [80, 150])
def test_tables_keep_every_figure(width):
    """One line per workload if the terminal is wide enough, and nothing cut off in 80 columns."""
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
    assert text.count("1.23e+03") == (1 + len(FORMS)) * len(rows)
    assert all(text.count(word) >= 2 for x in WORKLOADS for word in x.name.split())
    assert width == 80 or all(f"│ {x.name} " in text for x in WORKLOADS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nkd", "xyz"], "no workload has ['xyz'] in its name: "),
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


def test_where_the_time_of_a_call_goes(capsys):
    """The parts add up to the whole, and are printed."""
    found = calls.shares(calls.measure(1, 1))
    whole, *parts, rest = found.values()
    assert sum(parts) == pytest.approx(whole)
    assert rest == pytest.approx(whole - parts[0])
    assert calls.main(["--rounds", "1"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found)
    with pytest.raises(SystemExit):
        calls.main(["--rounds", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def run_for_a_gpu(tmp_path, *arguments):
    """Run the script on a CPU with tiny inputs; returns what it wrote."""
    script = pathlib.Path(gpu.__file__).with_suffix(".sh")
    command = [str(script), "--device", "cpu", "--small", "--json", str(tmp_path / "gpu.json"), *arguments]
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("missing: nothing\n")
    return json.loads((tmp_path / "gpu.json").read_text())


@pytest.mark.slow
def test_the_run_for_a_gpu(tmp_path):
    found = run_for_a_gpu(tmp_path, "--seconds", "380", "--only", "symmetric_kl_loss", "kl_loss 320", "kl 128×10")
    assert not found["not reached"]
    ours = [row for row in found["parity"] if row["loss"] == "symmetric_kl_loss"]
    assert {(row["form"], row["dtype"]) for row in ours} == {
        (form, dtype) for form in ("kdtorch", "fused", "kdjax") for dtype in ("float32", "bfloat16")
    }
    assert all(row["passed"] for row in found["parity"])
    for part, limit in (("large", 2.0**-7), ("workloads", 1e-4)):
        rows = [row for row in found[part] if row.get("loss", "kl_loss") == "kl_loss"]
        assert {row["form"] for row in rows} == set(gpu.FORMS)
        assert not [row for row in rows if "error" in row]
        assert all(0 < row["ms, least"] <= row["ms"] <= row["ms, most"] for row in rows)
        assert all(row["value apart"] < 1e-4 and row["gradient apart"] < limit for row in rows if "value apart" in row)


@pytest.mark.slow
def test_all_losses_in_the_run_for_a_gpu(tmp_path):
    """The output names what was not reached in time."""
    found = run_for_a_gpu(tmp_path, "--seconds", "60")
    measured = {f"parity {row['form']} {row['loss']} {row['dtype']}" for row in found["parity"]}
    assert measured | set(found["not reached"]) >= {
        f"parity {form} {loss.title} {dtype}"
        for form in ("kdtorch", "fused", "kdjax")
        for loss in LOSSES
        for dtype in ("float32", "bfloat16")
    }
    assert all(row["passed"] for row in found["parity"])
    told = {row["loss"] for row in found["large"]}.union(*(text.split() for text in found["not reached"]))
    assert told >= {"kl_loss", "dkd_loss", "dino_loss"}
    assert found["large"]
    assert found["not reached"]
    assert not [row for part in ("large", "workloads") for row in found[part] if "error" in row]


def test_what_a_run_for_a_gpu_lacks(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_module"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert gpu.main([]) == 2
    out, error = capsys.readouterr()
    assert out.startswith("missing: no_such_module")
    assert "benchmarks/gpu.sh --fetch" in error


def test_a_form_that_fails_is_a_row():
    loss = next(loss for loss in TIMED if loss.name == "kl_loss")
    job = gpu.draw(loss, SMALL, "float32", "cpu", {"temperature": -1.0})
    assert gpu._row("kdtorch", job, {}, 0.0)["error"].startswith("ValueError: `temperature` must be finite and greater")


def test_recording(capsys, monkeypatch):
    monkeypatch.setattr(recording.torch, "set_num_threads", lambda number: None)
    recording.main(["--tokens", "4", "--recorded", "4096", "--repeats", "1", "--vocabularies", "300"])
    text = capsys.readouterr().out
    assert text.count("x torch.topk") == 2 * (1 + 2 * 2)
    assert text.count("260 bytes a token") == 2
    assert text.count("million tokens a second") == 4
