"""Distillation of a language model on real text, in JAX and in PyTorch: the documentation of Python, byte by byte.

A transformer (3,297,792 parameters) learns to predict the next byte of the help texts that ship with Python
(`pydoc_data.topics`), and then teaches smaller ones (523,600 parameters), which are trained for a much shorter time.
The student alone learns with the cross-entropy; every other row of the table adds one loss, or a mixture `a+b`, to the
same cross-entropy on the same batches. The weights give the losses the curvature of the KL divergence where student and
teacher nearly agree. The exceptions are `reverse_kl` and `sampled`, which made this short training worse with that
weight. The table shows the perplexity of a byte of held-out text.

    python examples/tokens.py                            # both frameworks, three seeds, about seven minutes
    python examples/tokens.py --quick
    python examples/tokens.py --framework torch --losses kl gkd "linear+sampled" --seeds 5

The teacher is trained once, with PyTorch if both frameworks are used, and stored in `out/tokens-teacher-….safetensors`,
which both read; delete the file to train another. One training is run again in both frameworks in float64, from the
same weights on the same batches; and in each framework with every batch in four parts, whose sums are divided by the
number of bytes in the whole batch. The loss curves are compared. `_tokens_jax.py` and `_tokens_torch.py`, which have
the same structure, show how each loss is called.
"""

from __future__ import annotations

import importlib
import json
import re
import tempfile
import time
import zlib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from digits import FRAMEWORKS, Parser, at_least_one, label
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

Array = np.ndarray


class Loss(NamedTuple):
    """The weight of a loss relative to the cross-entropy, and the texts on which it compares student and teacher.

    `"real"`: the texts of the batch. `"own"`: texts that the student writes, only in the steps in which it writes.
    `"mixed"`: its own texts in these steps, and the texts of the batch in all others.
    """

    weight: float
    texts: str
    words: str


LOSSES = {
    "kl": Loss(1.0, "real", "KL divergence"),
    "kl_t2": Loss(1.0, "real", "KL divergence at temperature 2"),
    "reverse_kl": Loss(0.3, "real", "reverse KL divergence"),
    "jsd": Loss(4.0, "real", "Jensen-Shannon divergence"),
    "linear": Loss(1.0, "real", "KL divergence from hidden states and heads, without logits"),
    "topk": Loss(1.0, "real", "KL divergence to the largest logits, recorded on disk"),
    "gkd": Loss(4.0, "mixed", "Jensen-Shannon divergence, in half of the steps on what the student writes"),
    "sampled": Loss(0.1, "own", "from the log-probabilities of what the student writes, in half of the steps"),
}
QUICK = ["kl", "gkd"]
SAME = "linear+topk+gkd+sampled"  # the training that is run in both frameworks,
STEPS_OF_SAME = 20  # for so many steps,
PARTS = 4  # and again with every batch in so many parts
Mixture = dict[str, Loss]


class Size(NamedTuple):
    """The size of a transformer."""

    width: int
    heads: int
    layers: int


class Setting(NamedTuple):
    """The settings of the models and the training."""

    teacher: Size = Size(256, 4, 4)
    student: Size = Size(136, 4, 2)
    classes: int = 256
    length: int = 64  # bytes of a sequence
    prompt: int = 16  # bytes of it that the student continues
    pieces: int = 1280  # sequences for the students; the teacher is trained on the whole training text
    teacher_steps: int = 200
    teacher_batch: int = 32
    teacher_rate: float = 2e-3
    steps: int = 80
    batch: int = 16
    written: int = 8  # sequences of a batch that the student continues, in steps in which it writes
    rate: float = 4e-3
    on_policy: float = 0.5  # fraction of steps in which the student writes, for losses that use its texts
    top_k: int = 64
    tested: int = 256  # sequences in the test


SMALL = Setting(Size(64, 4, 2), Size(32, 4, 1), pieces=320, teacher_steps=80, steps=30, top_k=32, tested=128)


class Data(NamedTuple):
    """Sequences, [number, length + 1]: a 0, the bytes, and zeros as padding."""

    train: Array
    test: Array


class Plan(NamedTuple):
    """The batches of one training, and the random numbers with which the student draws its own texts."""

    index: Array  # [steps, batch]
    on_policy: Array  # [steps], True where the student writes
    noise: Array  # [steps, written, length - prompt]


def load_data(setting: Setting) -> Data:
    """The distinct paragraphs of Python's help texts, in pieces that are at least as long as a prompt.

    Every tenth paragraph, in a fixed random order, is for the test, without pieces that other paragraphs contain too.
    """
    paragraphs = (part.strip("\n").encode() for topic in topics.values() for part in re.split(r"\n\s*\n", topic))
    texts, draw = list(dict.fromkeys(paragraphs)), np.random.default_rng(0)
    draw.shuffle(texts)

    def pieces(texts: Sequence[bytes]) -> list[bytes]:
        starts = ((text, i) for text in texts for i in range(0, len(text) - setting.prompt + 1, setting.length))
        return [text[i : i + setting.length] for text, i in starts]

    def sequences(pieces: Sequence[bytes]) -> Array:
        result = np.zeros((len(pieces), setting.length + 1), np.int32)
        for row, piece in zip(result, pieces, strict=True):
            row[1 : len(piece) + 1] = np.frombuffer(piece, np.uint8)
        return draw.permutation(result)

    test = pieces(texts[::10])
    del texts[::10]
    known = b"\n\n".join(texts)
    return Data(sequences(pieces(texts)), sequences([piece for piece in test if piece not in known])[: setting.tested])


def make_plan(number: int, steps: int, batch: int, setting: Setting, seed: int) -> Plan:
    """The batches of one training, the same in both frameworks; no sequence is repeated before all have been used."""
    draw, epochs = np.random.default_rng(seed), -(-steps * batch // number)
    order = np.concatenate([draw.permutation(number) for _ in range(epochs)])[: steps * batch]
    on_policy = draw.random(steps) < setting.on_policy
    return Plan(
        order.reshape(steps, batch), on_policy, draw.random((steps, setting.written, setting.length - setting.prompt))
    )


def rates(steps: int, peak: float) -> Array:
    """The learning rates: a warm-up for a tenth of the steps, then a cosine decay."""
    x = (1 + np.arange(steps)) / (1 + steps)
    return peak * np.minimum(10 * x, np.cos(np.pi / 2 * x))


def mixture(text: str) -> Mixture:
    """The losses in `"a+b"`, by name.

    Raises:
        ValueError: an unknown name, or the same name twice.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"--losses: unknown loss {name!r} in {text!r}; there are {', '.join(LOSSES)}")
        if names.count(name) > 1:
            raise ValueError(f"--losses: {name!r} is more than once in {text!r}")
    return {name: LOSSES[name] for name in names}


def teacher_file(data: Data, setting: Setting, folder: Path) -> Path:
    """The file of the teacher; its name depends on everything that changes the teacher, such as Python's texts."""
    parts = [name for name in Setting._fields if name.startswith("teacher") or name in ("classes", "length", "prompt")]
    key = zlib.crc32(data.train.tobytes() + repr([getattr(setting, name) for name in parts]).encode())
    return folder / f"tokens-teacher-{key:08x}.safetensors"


def load_teacher(half: ModuleType, file: Path, setting: Setting) -> Any:
    """The teacher in a file.

    Raises:
        ValueError: the file does not contain such a teacher.
    """
    try:
        return half.load_teacher(file, setting)
    except Exception as error:  # a broken file may raise any error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file}: expected a teacher of this example; delete it to train one; got: {reason}"
        ) from error


def train_students(
    half: ModuleType,
    mixtures: dict[str, Mixture],
    lessons: Any,
    data: Data,
    setting: Setting,
    seeds: int,
    tick: Callable[[], None],
) -> list[dict[str, Any]]:
    """Train the student alone and with each mixture; returns the rows of the table."""
    plans = [make_plan(setting.pieces, setting.steps, setting.batch, setting, 1 + seed) for seed in range(seeds)]
    rows: list[dict[str, Any]] = []
    for name, losses in {"alone": {}, **mixtures}.items():
        runs = half.train_students(losses, lessons, plans, rates(setting.steps, setting.rate), setting, tick)
        test = np.array([half.perplexity(run["student"], data.test) for run in runs])
        row = {
            "losses": name,
            "weights": {name: term.weight for name, term in losses.items()},
            "parameters": half.count(runs[0]["student"]),
            "test_perplexities": test.tolist(),
            "test_perplexity": float(test.mean()),
            "spread": float(test.std(ddof=1)) if seeds > 1 else None,
            "cross_entropies": np.mean([run["entropies"] for run in runs], 0).tolist(),
            "seconds_per_step": min(run["seconds"] for run in runs) / setting.steps,  # the first may compile
        }
        row["gain"] = rows[0]["test_perplexity"] - row["test_perplexity"] if rows else 0.0
        rows.append(row)
    return rows


def compare(
    halves: dict[str, ModuleType], losses: Mixture, data: Data, setting: Setting, file: Path, tick: Callable[[], None]
) -> dict[str, Any]:
    """The losses of one training in float64, in both frameworks, and in each with every batch in parts.

    All runs start from the same weights and use the same batches; the student writes in every step.
    """
    setting = setting._replace(pieces=160, steps=STEPS_OF_SAME, batch=8, on_policy=1.0)
    plan = make_plan(setting.pieces, setting.steps, setting.batch, setting, 1)
    speeds = rates(setting.steps, setting.rate)
    first = next(iter(halves.values()))
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "student"
        first.save(start, first.new_student(setting, 0))
        for name, half in halves.items():
            teacher, place = half.load_teacher(file, setting), Path(folder) / name
            lessons = half.listen(teacher, data.train[: setting.pieces], setting, place, "float64")
            for parts in (1, PARTS):
                (run,) = half.train_students(losses, lessons, [plan], speeds, setting, tick, start, parts)
                curves[name, parts] = run["losses"]
    result: dict[str, Any] = {"losses": "+".join(losses), "steps": setting.steps, "parts": PARTS}
    for name in halves:
        result[name] = {
            "curve": curves[name, 1].tolist(),
            "difference_of_parts": relative(curves[name, PARTS], curves[name, 1]).tolist(),
        }
    result["difference"] = relative(*(curves[name, 1] for name in halves)).tolist() if len(halves) > 1 else None
    return result


def relative(x: Array, y: Array) -> Array:
    return np.abs(x - y) / np.abs(y)


def describe(setting: Setting, data: Data, seeds: int) -> str:
    """The setting in words."""
    return (
        f"{len(data.train):,} sequences of at most {setting.length} bytes, in {setting.teacher_steps} batches of "
        f"{setting.teacher_batch} for the teacher; the students have {setting.pieces:,} of them, in {setting.steps} "
        f"batches of {setting.batch}; {seeds} seeds; {len(data.test)} sequences for the test."
    )


def table(framework: str, teacher: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """The table of one framework's results."""
    result = Table(title=f"{framework}: test perplexity of a byte, mean ± standard deviation over seeds")
    result.add_column("", no_wrap=True)
    for column in ("parameters", "test perplexity", "gain", "seconds per step"):
        result.add_column(column, justify="right")
    result.add_row(
        "teacher", f"{teacher['parameters']:,}", f"{teacher['test_perplexity']:.2f}", "", "", end_section=True
    )
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {row['spread']:.2f}"
        result.add_row(
            "student alone" if row["losses"] == "alone" else row["losses"],
            f"{row['parameters']:,}",
            f"{row['test_perplexity']:.2f}{spread}",
            "" if row["losses"] == "alone" else f"{row['gain']:+.2f}",
            f"{row['seconds_per_step']:.4f}",
        )
    return result


def summary(results: dict[str, Any]) -> str:
    """The results in a few sentences: which losses helped, and how closely the frameworks and the parts agree."""
    students, same = results["students"], results["same_training"]
    gains = {
        row["losses"]: [next(x["gain"] for x in rows if x["losses"] == row["losses"]) for rows in students.values()]
        for row in next(iter(students.values()))[1:]
    }
    helped = sorted((name for name, gain in gains.items() if min(gain) > 0), key=lambda name: -np.mean(gains[name]))
    text = (
        f"In {' and '.join(students)} the student's perplexity is lower with {len(helped)} of the {len(gains)} losses"
    )
    text += f": {', '.join(f'{name} (by {np.mean(gains[name]):.2f})' for name in helped)}." if helped else "."
    one = f"One training ({same['losses']}, {same['steps']} steps, float64)"
    if same["difference"]:
        text += f" {one} in both frameworks: the losses differ by at most {max(same['difference']):.1e}, relative."
        one = "It"
    parts = ", ".join(f"{max(same[name]['difference_of_parts']):.1e} in {name}" for name in students)
    return f"{text} {one} with every batch in {same['parts']} parts, summed, differs from the whole batches by at most {parts}."


def picture(results: dict[str, Any], file: Path, phone: bool = False) -> None:
    """Draw the perplexities, beside them (on a phone below them) the curves, and the differences of one training."""
    same, colours = results["same_training"], {"jax": "tab:blue", "torch": "tab:orange"}
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        rows = next(iter(results["students"].values()))
        tall = max(5, 0.4 * len(rows))
        figure = Figure(figsize=(3.9, 2 * tall) if phone else (8.6, tall), layout="constrained")
        left, right = figure.subfigures(*((2, 1) if phone else (1, 2)))
        axes = left.subplots()
        for i, (framework, students) in enumerate(results["students"].items()):
            height = np.arange(len(students)) + 0.3 * (i - (len(results["students"]) - 1) / 2)
            spread = [student["spread"] or 0 for student in students]
            values = [student["test_perplexity"] for student in students]
            axes.errorbar(values, height, xerr=spread, fmt="o", capsize=3, color=colours[framework], label=framework)
        axes.axvline(results["teacher"]["test_perplexity"], color="grey", linestyle="--", label="teacher")
        axes.axhline(0.5, color="lightgrey", linewidth=0.8)
        axes.set_yticks(range(len(rows)), ["student alone", *(label(row["losses"]) for row in rows[1:])])
        axes.invert_yaxis()
        axes.set_xlabel("test perplexity of a byte,\nmean ± standard deviation over seeds")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=3)

        upper, lower = right.subplots(2, 1, height_ratios=[3, 2])
        for row in rows:
            curve, alone = np.array(row["cross_entropies"]), row["losses"] == "alone"
            window = min(10, len(curve))
            smooth = np.exp(np.convolve(curve, np.ones(window) / window, "valid"))
            name, style = ("student alone", {"color": "black"}) if alone else (row["losses"], {"linewidth": 1})
            upper.semilogy(np.arange(len(smooth)) + window, smooth, label=name, **style)
        upper.set_title(f"{next(iter(results['students']))}, mean over seeds", fontsize="medium")
        upper.set_xlabel("step")
        upper.set_ylabel("perplexity of the last 10 batches,\nbefore their steps")
        upper.legend(fontsize="small", ncols=2)
        lines = {f"{name}, in {same['parts']} parts": same[name]["difference_of_parts"] for name in results["students"]}
        if same["difference"]:
            lines["jax and torch"] = same["difference"]
        for name, difference in lines.items():
            lower.semilogy(np.where(np.array(difference) > 0, difference, np.nan), label=name, linewidth=1)
        lower.set_title(f"one training, float64:\n{same['losses']}", fontsize="medium")
        lower.set_ylabel("relative difference of\nthe loss (gaps: none)")
        lower.set_xlabel("step")
        lower.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.4), ncols=2)
        figure.savefig(file, dpi=200)


def main(arguments: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    words = "\n".join(f"  {name:<12}{loss.words}" for name, loss in LOSSES.items())
    parser = Parser("tokens.py", description=__doc__, epilog=words, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="both")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help=f"{', '.join(LOSSES)}, or mixtures like kl+gkd")
    parser.add_argument("--seeds", type=at_least_one, help="students per row (3; with --quick 2)")
    parser.add_argument("--steps", type=at_least_one, help="steps of each student (80; with --quick 30)")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer losses, seeds and steps")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="the folder for tokens.json, tokens.png, the teacher"
    )
    options = parser.parse_args(arguments)

    setting = SMALL if options.quick else Setting()
    setting = setting._replace(steps=options.steps or setting.steps)
    seeds, data = options.seeds or (2 if options.quick else 3), load_data(setting)
    file = teacher_file(data, setting, options.out)
    try:
        mixtures = {"+".join(x): x for x in map(mixture, options.losses or (QUICK if options.quick else LOSSES))}
        halves = {name: importlib.import_module(f"_tokens_{name}") for name in FRAMEWORKS[options.framework]}
        options.out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            load_teacher(next(iter(halves.values())), file, setting)
    except ModuleNotFoundError as error:
        parser.error(f"--framework {options.framework}: {error.name} is not installed; pip install '.[all]' has all")
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))

    if options.quick and "jax" in halves:
        halves["jax"].compile_sooner()
    console, same = Console(), mixture(SAME)
    console.print(describe(setting, data, seeds))
    results: dict[str, Any] = {
        "setting": setting._asdict(),
        "seeds": seeds,
        "teacher": {"file": str(file)},
        "students": {},
    }
    with Progress(console=console, transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        steps = 0 if file.exists() else setting.teacher_steps
        steps += len(halves) * ((1 + len(mixtures)) * seeds * setting.steps + 2 * STEPS_OF_SAME)
        task = progress.add_task("teacher", total=steps)

        def tick() -> None:
            progress.advance(task)

        if not file.exists():
            plan = make_plan(len(data.train), setting.teacher_steps, setting.teacher_batch, setting, 0)
            speeds = rates(setting.teacher_steps, setting.teacher_rate)
            half = halves.get("torch", next(iter(halves.values())))  # PyTorch compiles nothing
            half.save(file, half.train_teacher(data.train, plan, speeds, setting, tick))
        for name, half in halves.items():
            progress.update(task, description=name)
            teacher = half.load_teacher(file, setting)
            lessons = half.listen(teacher, data.train[: setting.pieces], setting, Path(folder) / name)
            perplexity = half.perplexity(teacher, data.test)
            results["teacher"] |= {"parameters": half.count(teacher), "test_perplexity": perplexity}
            results["students"][name] = train_students(half, mixtures, lessons, data, setting, seeds, tick)
        progress.update(task, description="one training again")
        results["same_training"] = compare(halves, same, data, setting, file, tick)

    for name in halves:
        console.print(table(name, results["teacher"], results["students"][name]))
    picture(results, options.out / "tokens.png")
    picture(results, options.out / "tokens_phone.png", phone=True)
    results["wall_seconds"] = time.perf_counter() - begin
    (options.out / "tokens.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"tokens.json and tokens.png are in {options.out}, after {results['wall_seconds']:.0f} seconds.")
    console.print(summary(results))


if __name__ == "__main__":
    main()
