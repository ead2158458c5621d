"""The digits example: its outputs, and its errors for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow  # trainings

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# threads do not help with small tensors, and are slow if the cores are busy
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import digits

    return digits


def run(*arguments: object, before: str = "", after: str = "") -> str:
    code = f"import sys\n{before}\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport digits\n"
    code += f"digits.main({[str(x) for x in arguments]!r})\n{after}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def check_students(results, framework, names, seeds):
    rows = results["students"][framework]
    assert [row["losses"] for row in rows] == ["alone", *names]
    for row in rows:
        assert row["parameters"] * 20 <= 110378
        assert len(row["test_accuracies"]) == len(row["validation_accuracies"]) == seeds
        assert row["test_accuracy"] == pytest.approx(np.mean(row["test_accuracies"]))
        assert row["gain"] == pytest.approx(row["test_accuracy"] - rows[0]["test_accuracy"])
        assert row["seconds_per_step"] > 0
        if seeds > 1:
            assert row["spread"] == pytest.approx(np.std(row["test_accuracies"], ddof=1))


def test_both_frameworks_train_the_same(tmp_path):
    text = run("--losses", "kl", "--seeds", 1, "--steps", 2, "--out", tmp_path)
    results = json.loads((tmp_path / "digits.json").read_text())
    for name in ("digits.png", "digits_phone.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for framework in ("jax", "torch"):
        assert results["teachers"][framework]["parameters"] == 110378
        check_students(results, framework, ["kl"], 1)
        assert f"{framework}: test accuracy" in text
    same = results["same_training"]
    assert same["losses"] == "kl+hcl+dcn+dino"
    for dtype, bound in {"float64": 1e-9, "float32": 0.1}.items():
        jax, torch = (np.array(same[dtype][framework]) for framework in ("jax", "torch"))
        assert len(jax) == len(torch) == 200
        assert np.abs(jax / torch - 1).max() < bound
        assert same[dtype]["largest_relative_difference"] == pytest.approx(np.abs(jax - torch).max(), abs=bound)
        assert jax[-1] < jax[0] / 2
    assert len(results["train"]) == 1000
    assert len(results["labelled"]) == 50
    assert set(results["labelled"]) < set(results["train"])


def of_logits(digits):
    """The losses that read only the teacher's logits."""
    return [name for name, loss in digits.LOSSES.items() if loss.reads == digits.LOGITS]


def test_torch_alone_has_every_loss_and_leaves_jax_be(tmp_path, digits):
    everything = "+".join(digits.LOSSES)
    arguments = ["--framework", "torch", "--losses", everything, "dkd", "--seeds", 2, "--steps", 3, "--out", tmp_path]
    run(*arguments, before="sys.modules.update(dict.fromkeys(['jax', 'flax', 'optax', 'kdjax']))")  # imports fail
    results = json.loads((tmp_path / "digits.json").read_text())
    assert results["same_training"] is None
    check_students(results, "torch", [everything, "dkd"], 2)
    assert (tmp_path / "digits.png").exists()


def test_jax_alone_leaves_torch_be_and_takes_a_teacher_from_outside(tmp_path, digits):
    data = digits.load_data(digits.Setting())
    file = tmp_path / "teacher.npz"
    np.savez(file, logits=5 * np.eye(10)[data.labels[data.train]])
    everything = "+".join(of_logits(digits))
    arguments = ["--framework", "jax", "--teacher-logits", file, "--losses", everything, "--seeds", 1, "--steps", 3]
    strict = "import jax\njax.config.update('jax_numpy_dtype_promotion', 'strict')\n"
    strict += "jax.config.update('jax_numpy_rank_promotion', 'raise')"
    text = run(*arguments, "--out", tmp_path, before=strict, after="assert not {'torch', 'kdtorch'} & set(sys.modules)")
    assert "is right on 100.0% of the training images" in " ".join(text.split())
    results = json.loads((tmp_path / "digits.json").read_text())
    assert results["teachers"] == {"outside": {"train_accuracy": 1.0}}
    check_students(results, "jax", [everything], 1)


def refusal(digits, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        digits.main([str(x) for x in arguments])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("digits.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


GOOD = np.zeros((1000, 10), np.float32)
SHAPE = "expected `logits` of floating-point numbers, a row a training image, [1000, 10], got "
FILES = {
    "other array": ({"scores": GOOD}, "expected the array `logits`, got ['scores']"),
    "no array": ({}, "expected the array `logits`, got no array"),
    "rows": ({"logits": GOOD[:-1]}, SHAPE + "float32 [999, 10]"),
    "classes": ({"logits": GOOD[:, :9]}, SHAPE + "float32 [1000, 9]"),
    "integers": ({"logits": GOOD.astype(np.int64)}, SHAPE + "int64 [1000, 10]"),
    "objects": ({"logits": GOOD.astype(object)}, "expected an .npz file that can be read, got: Object arrays"),
    "NaN": ({"logits": np.where(np.eye(1000, 10) > 0, np.nan, GOOD)}, "got 10 of 10000 that are NaN or infinite"),
    "infinite": ({"logits": GOOD.astype(np.float64) + 1e300}, "got 10000 of 10000 that are NaN or infinite"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_teacher_that_does_not_fit_is_refused(case, digits, capsys, tmp_path):
    arrays, expected = FILES[case]
    file = tmp_path / "teacher.npz"
    np.savez(file, **arrays)
    message = refusal(digits, capsys, "--teacher-logits", file, "--out", tmp_path / "out")
    assert f"{file}: " in message
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_is_refused(digits, capsys, tmp_path):
    def message(file):
        text = refusal(digits, capsys, "--teacher-logits", file)
        assert f"{file}: expected an .npz file that can be read, got: " in text
        return text

    assert "No such file or directory" in message(tmp_path / "absent.npz")
    assert "Is a directory" in message(tmp_path)
    (tmp_path / "text.npz").write_text("logits")
    assert "a file of another kind" in message(tmp_path / "text.npz")
    np.savez(tmp_path / "whole.npz", logits=GOOD)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "broken.npz").write_bytes(whole[:500] + b"x" * 500 + whole[1000:])
    assert "CRC" in message(tmp_path / "broken.npz")


@pytest.mark.parametrize("losses", ["hcl", "dino", "mse", "kl+hcl"])
def test_losses_that_need_features_are_refused_with_logits_alone(losses, digits, capsys, tmp_path):
    np.savez(tmp_path / "teacher.npz", logits=GOOD)
    message = refusal(digits, capsys, "--teacher-logits", tmp_path / "teacher.npz", "--losses", "kl", losses)
    assert f"--losses: {losses.removeprefix('kl+')} cannot be had with --teacher-logits" in message
    assert "the file holds logits alone" in message
    assert f"there are {', '.join(of_logits(digits))}\n" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--losses", "kll"], "unknown loss 'kll' in 'kll'; there are kl, skl, diff, "),
        (["--losses", "kl", "kl+"], "unknown loss '' in 'kl+'; there are "),
        (["--losses", "kl+kl"], "'kl' is more than once in 'kl+kl'"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["--seeds", "two"], "argument --seeds: expected a whole number of at least 1, got 'two'"),
        (["--steps", "-1"], "argument --steps: expected "),
        (["--framework", "tf"], "argument --framework: invalid choice: 'tf'"),
        (["--out", __file__], f"--out: cannot make the folder {__file__}: File exists"),
    ],
)
def test_bad_options_are_refused(arguments, expected, digits, capsys):
    assert expected in refusal(digits, capsys, *arguments)
