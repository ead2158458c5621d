"""The example on text: its data, its sums over parts of a batch, its outputs, and its errors for bad input."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from tiers import slow

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import tokens

    return tokens


@pytest.fixture
def promotion():
    """The promotion of dtypes as users have it, because Flax and Optax rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def small(tokens):
    """Tiny models, and sequences of a few bytes."""
    sizes = {"teacher": tokens.Size(16, 2, 2), "student": tokens.Size(8, 2, 1), "length": 24, "prompt": 8}
    return tokens.Setting(**sizes, pieces=64, steps=3, batch=8, written=4, on_policy=1.0, top_k=16, tested=8)


def test_the_text_is_split_without_overlap(tokens):
    setting = tokens.Setting()
    data = tokens.load_data(setting)
    assert data.train.shape[1] == data.test.shape[1] == setting.length + 1
    assert len(data.test) == setting.tested
    assert len(data.train) > 3000
    train, test = ({bytes(row[1:].astype(np.uint8)) for row in part} for part in data)
    assert not train & test
    for part in data:
        assert (part[:, 0] == 0).all()
        assert (part[:, 1 : setting.prompt + 1] > 0).all()
        inside = part[:, 1:] > 0
        assert (inside[:, :-1] >= inside[:, 1:]).all()  # zeros are only at the end
        assert part.max() < setting.classes
    assert bytes(data.train[0, 1:]).replace(b"\0", b"").decode()  # text


def test_a_plan_takes_every_sequence_before_any_comes_again(tokens, small):
    plan = tokens.make_plan(16, 4, 8, small, seed=1)
    for half in np.split(plan.index, 2):
        assert sorted(half.ravel()) == list(range(16))
    again = tokens.make_plan(16, 4, 8, small, seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(plan, again, strict=True))
    assert not np.array_equal(plan.index, tokens.make_plan(16, 4, 8, small, seed=2).index)
    rates = tokens.rates(80, 3.0)
    assert 2.9 < rates.max() <= 3.0
    assert rates[0] < 0.4
    assert 0 < rates[-1] < 0.1


def taught(half, tokens, small, folder, dtype="float64"):
    """Data, a student, and the outputs of an untrained teacher for the data."""
    data = tokens.load_data(small)
    file = folder / "teacher"
    if not file.exists():
        half.save(file, half.new_student(small._replace(student=small.teacher), 0))
    return data, half.listen(
        half.load_teacher(file, small), data.train[: small.pieces], small, folder / half.__name__, dtype
    )


def text_of_the_student(half, tokens, small, folder):
    import _tokens_torch

    assert half is _tokens_torch
    data, lessons = taught(half, tokens, small, folder)
    student = half.new_student(small, 1).double()
    prompts = torch.as_tensor(data.train[:8, : small.prompt + 1]).long()
    noise = torch.as_tensor(tokens.make_plan(16, 1, 8, small._replace(written=8), 1).noise[0])
    return lessons, student, lessons.own(student, prompts, noise), noise


def test_the_student_writes_what_it_would_say_without_a_memory(tokens, small, tmp_path):
    import _tokens_torch as half

    lessons, student, text, noise = text_of_the_student(half, tokens, small, tmp_path)
    assert text.tokens.shape == (8, small.length + 1)
    odds = student.head(student(text.tokens[:, :-1])[0]).softmax(-1).cumsum(-1)[:, small.prompt :]
    expected = (odds < noise[..., None] * odds[..., -1:]).sum(-1)
    assert torch.equal(text.tokens[:, small.prompt + 1 :], expected)
    assert not text.where[:, : small.prompt].any()
    assert text.where[:, small.prompt].all()
    assert torch.equal(text.hidden, lessons.teacher(text.tokens[:, :-1])[0])


def test_what_counts_ends_with_the_text(tokens):
    import _tokens_torch as half

    rows = torch.tensor([[0, 7, 7, 0, 0], [0, 7, 7, 7, 7], [0, 7, 0, 7, 0]])
    assert half.kept(rows).tolist() == [[True, True, True, False], [True] * 4, [True, True, False, False]]


def test_sums_over_parts_by_the_number_of_bytes_are_the_batch(tokens, small, tmp_path):
    """For all losses; a mean of the parts' means differs, because parts have different numbers of bytes."""
    import _tokens_torch as half

    lessons, student, own, _ = text_of_the_student(half, tokens, small, tmp_path)
    real = lessons.real(half.kept(lessons.tokens).sum(1).argsort()[:8], True)  # the shortest
    head = lessons.teacher.head.weight.detach()

    def gradient(losses, texts, totals):
        student.zero_grad()
        value = 0.0
        for (some, written), total in zip(texts, totals, strict=True):
            loss, _ = half.objective(student, head, losses, some, written, total)
            loss.backward()
            value += loss.item()
        return value, torch.cat([p.grad.flatten() for p in student.parameters()])

    totals = [real.where.sum(), own.where.sum()]
    parts = list(zip(real.parts(4), own.parts(4), strict=True))
    assert len({int(some.where.sum()) for some, _ in parts}) > 1
    for name in ("", *tokens.LOSSES):
        losses = tokens.mixture(name) if name else {}
        value, whole = gradient(losses, [(real, own)], [totals])
        summed_value, summed = gradient(losses, parts, [totals] * 4)
        _, mean = gradient(losses, parts, [[4 * text.where.sum() for text in part] for part in parts])
        assert summed_value == pytest.approx(value, rel=1e-13), name
        assert (summed - whole).norm() < 1e-13 * whole.norm(), name
        assert (mean - whole).norm() > 1e-3 * whole.norm(), name


def test_the_linear_head_and_all_recorded_logits_are_the_divergence(tokens, small, tmp_path):
    import _tokens_torch as half

    _, lessons = taught(half, tokens, small._replace(top_k=small.classes), tmp_path)
    student = half.new_student(small, 1).double()
    reading = half.Reading(student, lessons.teacher.head.weight.detach(), lessons.real(torch.arange(8), True))
    assert half.LOSSES["linear"](reading).item() == pytest.approx(half.LOSSES["kl"](reading).item(), rel=1e-12)
    assert half.LOSSES["topk"](reading).item() == pytest.approx(half.LOSSES["kl"](reading).item(), rel=1e-3)  # float16


def test_both_halves_have_every_loss(tokens):
    import _tokens_torch as half

    assert list(half.LOSSES) == list(tokens.LOSSES)
    assert set(tokens.QUICK) | set(tokens.mixture(tokens.SAME)) <= set(tokens.LOSSES)


@slow
@pytest.mark.usefixtures("quick_compilation", "promotion")
def test_every_loss_trains_the_same_in_both_frameworks(tokens, small, tmp_path):
    import _tokens_jax
    import _tokens_torch

    assert list(_tokens_jax.LOSSES) == list(tokens.LOSSES)
    plan, rates = tokens.make_plan(16, 3, 8, small, 1), tokens.rates(3, small.rate)
    plan.on_policy[1] = False
    start = tmp_path / "student"
    _tokens_torch.save(start, _tokens_torch.new_student(small, 1))
    runs = {}
    for half in (_tokens_torch, _tokens_jax):
        _, lessons = taught(half, tokens, small, tmp_path)
        train = functools.partial(
            half.train_students, tokens.LOSSES, lessons, [plan], rates, small, lambda: None, start
        )
        for parts in (1, 4):
            (runs[half, parts],) = train(parts)
    ours = runs[_tokens_torch, 1]
    for other in runs.values():
        for name in ("losses", "entropies"):
            assert np.abs(other[name] / ours[name] - 1).max() < 1e-12
    assert _tokens_jax.count(runs[_tokens_jax, 1]["student"]) == _tokens_torch.count(ours["student"])


def run(*arguments: object, before: str = "", after: str = "") -> str:
    code = f"import sys\n{before}\nsys.path.insert(0, {str(EXAMPLES)!r})\nimport tokens\n"
    code += "tokens.SMALL = tokens.SMALL._replace(teacher=tokens.Size(16, 2, 1), student=tokens.Size(8, 2, 1), "
    code += "teacher_steps=3, pieces=32, length=24, prompt=8, top_k=16, tested=32)\ntokens.SAME, tokens.STEPS_OF_SAME = 'gkd', 3\n"
    code += f"tokens.main({['--quick', *map(str, arguments)]!r})\n{after}\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return " ".join(done.stdout.split())


def check(folder, frameworks, names, seeds, steps):
    results = json.loads((folder / "tokens.json").read_text())
    for name in ("tokens.png", "tokens_phone.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert list(results["students"]) == frameworks
    for rows in results["students"].values():
        assert [row["losses"] for row in rows] == ["alone", *names]
        for row in rows:
            assert row["parameters"] < results["teacher"]["parameters"]
            assert len(row["test_perplexities"]) == seeds
            assert row["test_perplexity"] == pytest.approx(np.mean(row["test_perplexities"]))
            assert row["gain"] == pytest.approx(rows[0]["test_perplexity"] - row["test_perplexity"])
            assert len(row["cross_entropies"]) == steps
            assert row["seconds_per_step"] > 0
            if seeds > 1:
                assert row["spread"] == pytest.approx(np.std(row["test_perplexities"], ddof=1))
    same = results["same_training"]
    for framework in frameworks:
        assert len(same[framework]["curve"]) == 3
        assert max(same[framework]["difference_of_parts"]) < 1e-9
    return results


@slow
def test_both_frameworks_and_the_kept_teacher(tmp_path):
    text = run("--losses", "kl", "--seeds", 2, "--steps", 2, "--out", tmp_path)
    results = check(tmp_path, ["jax", "torch"], ["kl"], 2, 2)
    ours, theirs = (np.array(results["same_training"][name]["curve"]) for name in ("jax", "torch"))
    assert np.abs(ours / theirs - 1).max() < 1e-9
    assert np.array(results["same_training"]["difference"]) == pytest.approx(np.abs(ours / theirs - 1), abs=1e-12)
    assert "jax: test perplexity of a byte" in text
    assert "torch: test perplexity of a byte" in text
    assert "in both frameworks: the losses differ by at most" in text
    (file,) = tmp_path.glob("tokens-teacher-*.safetensors")
    assert results["teacher"]["file"] == str(file)
    written = file.stat().st_mtime_ns
    hidden = "sys.modules.update(dict.fromkeys(['jax', 'flax', 'optax', 'kdjax']))"  # imports fail
    everything = ["kl+kl_t2+reverse_kl+jsd+linear+topk+gkd+sampled", "gkd"]
    run("--framework", "torch", "--losses", *everything, "--seeds", 1, "--steps", 2, "--out", tmp_path, before=hidden)
    alone = check(tmp_path, ["torch"], everything, 1, 2)
    assert file.stat().st_mtime_ns == written
    assert alone["teacher"] == results["teacher"]
    assert alone["same_training"]["difference"] is None


@slow
def test_jax_alone_leaves_torch_be_and_its_teacher_teaches_torch(tmp_path):
    strict = "import jax\njax.config.update('jax_numpy_rank_promotion', 'raise')"
    after = "assert not {'torch', 'kdtorch'} & set(sys.modules)"
    arguments = ["--losses", "topk", "--seeds", 1, "--steps", 2, "--out", tmp_path]
    run("--framework", "jax", *arguments, before=strict, after=after)
    first = check(tmp_path, ["jax"], ["topk"], 1, 2)
    run("--framework", "torch", *arguments)
    then = check(tmp_path, ["torch"], ["topk"], 1, 2)
    assert then["teacher"]["file"] == first["teacher"]["file"]
    assert then["teacher"]["test_perplexity"] == pytest.approx(first["teacher"]["test_perplexity"], rel=1e-4)


def refusal(tokens, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        tokens.main([str(x) for x in arguments])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tokens.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--losses", "kll"], "unknown loss 'kll' in 'kll'; there are kl, kl_t2, reverse_kl, "),
        (["--losses", "kl", "kl+"], "unknown loss '' in 'kl+'; there are "),
        (["--losses", "kl+kl"], "'kl' is more than once in 'kl+kl'"),
        (["--seeds", "0"], "argument --seeds: expected a whole number of at least 1, got '0'"),
        (["--framework", "tf"], "argument --framework: invalid choice: 'tf'"),
        (["--framework", "torch", "--out", __file__], f"--out: cannot make the folder {__file__}: File exists"),
    ],
)
def test_bad_options_are_refused(arguments, expected, tokens, capsys):
    assert expected in refusal(tokens, capsys, *arguments)


def test_a_teacher_that_cannot_be_read_is_refused(tokens, capsys, tmp_path):
    import _tokens_torch as half

    file = tokens.teacher_file(tokens.load_data(tokens.SMALL), tokens.SMALL, tmp_path)
    arguments = ["--quick", "--framework", "torch", "--out", tmp_path]
    expected = f"{file}: expected a teacher of this example; delete it to train one; got: "
    file.write_bytes(b"a teacher")
    assert expected in refusal(tokens, capsys, *arguments)
    half.save(file, half.new_student(tokens.SMALL, 0))  # of another size
    assert expected in refusal(tokens, capsys, *arguments)
    assert [x.name for x in tmp_path.iterdir()] == [file.name]
