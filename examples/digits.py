"""Distillation on real data: scikit-learn's handwritten digits, in JAX and in PyTorch.

A teacher (110,378 parameters) is trained on 1,000 labelled images of 8×8 pixels and on copies shifted by a pixel. A
student (5,026 parameters) gets 50 labels, 5 per class; for the other 950 images it has only the teacher's outputs. The
student alone learns from its 50 labels with the cross-entropy. Every other row of the table adds one loss, or a mixture
`a+b`, to the same cross-entropy on the same batches. Where the label is not known, a loss that reads labels uses the
teacher's class if the teacher is at least 90% sure, and `where=` leaves out the other images. The weights of the losses
and the learning rates were chosen on the 297 validation images; the table shows the accuracy on the 500 test images.

    python examples/digits.py                            # both frameworks, three seeds, about two minutes
    python examples/digits.py --quick
    python examples/digits.py --framework torch --losses kl dkd "kl+hcl" --seeds 5
    python examples/digits.py --teacher-logits mine.npz  # `logits`, [1000, 10]: see --help

With both frameworks, one training is run in each, from the same weights on the same batches, and the two loss curves
are compared. `_digits_jax.py` and `_digits_torch.py`, which have the same structure, show how each loss is called.
"""

from __future__ import annotations

import argparse
import importlib
import json
import textwrap
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Array = np.ndarray
Mixture = dict[str, float]


class Loss(NamedTuple):
    """What is known about a loss before a framework is imported: its weight, and which teacher's outputs it reads."""

    weight: float
    reads: str


LOGITS, FEATURES = "logits", "feature maps, embeddings or outputs on shifted images"
LOSSES = {
    "kl": Loss(1.0, LOGITS),
    "skl": Loss(1.0, LOGITS),
    "diff": Loss(2.0, LOGITS),
    "dkd": Loss(0.2, LOGITS),
    "nkd": Loss(1.0, LOGITS),
    "uskd": Loss(3.0, LOGITS),
    "reverse_kl": Loss(1.0, LOGITS),
    "jsd": Loss(10.0, LOGITS),
    "tvd": Loss(10.0, LOGITS),
    "skew_kl": Loss(3.0, LOGITS),
    "skew_reverse_kl": Loss(3.0, LOGITS),
    "alpha_beta": Loss(3.0, LOGITS),
    "taid": Loss(3.0, LOGITS),
    "uld": Loss(1.0, LOGITS),
    "dist": Loss(3.0, LOGITS),
    "std_kl": Loss(9.0, LOGITS),
    "mse": Loss(10.0, FEATURES),
    "sml": Loss(30.0, FEATURES),
    "bce": Loss(50.0, FEATURES),
    "eu_mse": Loss(3.0, FEATURES),
    "dcn": Loss(30.0, FEATURES),
    "hcl": Loss(5.0, FEATURES),
    "crcd": Loss(0.1, FEATURES),
    "dino": Loss(2.0, FEATURES),
}
DEFAULT = ["kl", "diff", "dkd", "nkd", "uskd", "mse", "dcn", "dino", "kl+dcn", "kl+hcl"]
QUICK = ["kl", "dkd", "dino", "kl+hcl"]
SAME = "kl+hcl+dcn+dino"  # the training that is compared: it has parameters, a state, maps and logits
FRAMEWORKS = {"jax": ["jax"], "torch": ["torch"], "both": ["jax", "torch"]}
SHIFTS = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]


class Setting(NamedTuple):
    """The settings of the networks and the training."""

    teacher: tuple[tuple[int, int], int] = ((24, 48), 128)  # the channels of the two maps, the width of the embedding
    student: tuple[tuple[int, int], int] = ((8, 12), 20)
    classes: int = 10
    images: int = 1000
    labels: int = 50
    steps: int = 300
    batch: int = 64
    labelled: int = 16  # rows of a batch that are drawn from the labelled images; the rest from all
    negatives: int = 16
    teacher_rate: float = 0.05
    student_rate: float = 0.02
    sure: float = 0.9


class Data(NamedTuple):
    """All images, the indices of each part of the split, and for which images the student has the label."""

    views: Array  # [shifts, 1797, 8, 8]; the first is not shifted
    labels: Array
    train: Array
    validation: Array
    test: Array
    labelled: Array  # [train], True if the student has the label


class Plan(NamedTuple):
    """The batches of one training: indices into the training set, two shifts of each image, negatives for crcd."""

    index: Array  # [steps, batch]
    shifts: Array  # [steps, 2, batch]
    negatives: Array  # [steps, batch, negatives]


class Teacher(NamedTuple):
    """The teacher's outputs for the training images; only the logits if it comes from a file."""

    logits: Array  # [train, classes]
    embedding: Array | None = None  # [train, width]; each entry has mean 0 and variance 1
    maps: list[Array] | None = None  # [train, height, width, channels]
    views: Array | None = None  # [shifts, train, classes], the logits


def load_data(setting: Setting) -> Data:
    """The digits with their fixed split; the training set is in the order of `load_digits`."""
    digits = load_digits()
    labels, places = digits.target.astype(np.int32), np.arange(len(digits.target))
    train, rest = train_test_split(places, train_size=setting.images, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, test_size=500, stratify=labels[rest], random_state=0)
    train = np.sort(train)
    told, _ = train_test_split(np.arange(len(train)), train_size=setting.labels, stratify=labels[train], random_state=0)
    padded = np.pad(digits.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    views = np.stack([padded[:, 1 + y : 9 + y, 1 + x : 9 + x] for y, x in SHIFTS])
    return Data(views, labels, train, validation, test, np.isin(np.arange(len(train)), told))


def make_plan(data: Data, setting: Setting, seed: int) -> Plan:
    """The batches of one training, the same in both frameworks."""
    draw, steps, batch, labelled = np.random.default_rng(seed), setting.steps, setting.batch, setting.labelled
    told = draw.choice(np.flatnonzero(data.labelled), (steps, labelled))
    index = np.concatenate([told, draw.integers(0, setting.images, (steps, batch - labelled))], axis=1)
    first = draw.integers(0, len(SHIFTS), (steps, 1, batch))
    second = (first + draw.integers(1, len(SHIFTS), first.shape)) % len(SHIFTS)
    negatives = draw.integers(0, setting.images, (steps, batch, setting.negatives))
    return Plan(*(x.astype(np.int32) for x in (index, np.concatenate([first, second], axis=1), negatives)))


def training_set(data: Data, setting: Setting, teacher: Teacher) -> dict[str, Any]:
    """The arrays from which a step gathers its batch, by name: images, labels, and the teacher's outputs."""
    labels = data.labels[data.train]
    odds = np.exp(teacher.logits - teacher.logits.max(1, keepdims=True))
    confident = odds.max(1) >= setting.sure * odds.sum(1)
    return {
        "views": data.views[:, data.train],
        "labels": np.where(data.labelled, labels, teacher.logits.argmax(1).astype(np.int32)),
        "labelled": data.labelled,
        "sure": data.labelled | confident,  # whether this label is reliable
        "teacher": {name: x for name, x in teacher._asdict().items() if x is not None},
    }


def train_teacher(half: ModuleType, data: Data, setting: Setting) -> tuple[Teacher, dict[str, Any]]:
    """Train the teacher on all labels; returns its outputs for the training images, and its results."""
    plan = make_plan(data, setting._replace(labelled=0), seed=0)
    images = {"views": data.views[:, data.train], "labels": data.labels[data.train]}
    run = half.train_teacher(images, plan, setting, data.views)
    embedding = run["embedding"][data.train]
    teacher = Teacher(
        run["logits"][0, data.train],
        (embedding - embedding.mean(0)) / embedding.std(0),
        [x[data.train] for x in run["maps"]],
        run["logits"][:, data.train],
    )
    return teacher, {"parameters": run["parameters"], **accuracies(run["logits"][0], data)}


def outside_teacher(file: str, setting: Setting) -> Teacher:
    """The teacher whose logits are in a file.

    Raises:
        ValueError: a file that cannot be read, without the array, or with another shape or numbers that are not finite.
    """
    try:
        with open(file, "rb") as stream:
            if not zipfile.is_zipfile(stream):
                raise ValueError("a file of another kind")
            stream.seek(0)
            with np.load(stream) as content:
                names, logits = content.files, np.asarray(content.get("logits"))
    except Exception as error:  # a broken archive may raise any error
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{file}: expected an .npz file that can be read, got: {reason}") from error
    if "logits" not in names:
        raise ValueError(f"{file}: expected the array `logits`, got {names or 'no array'}")
    shape = (setting.images, setting.classes)
    if logits.shape != shape or not np.issubdtype(logits.dtype, np.floating):
        raise ValueError(
            f"{file}: expected `logits` of floating-point numbers, a row a training image, {list(shape)}, "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    if bad := int((~np.isfinite(logits)).sum()):
        raise ValueError(f"{file}: expected finite `logits`, got {bad} of {logits.size} that are NaN or infinite")
    return Teacher(logits)


def accuracies(logits: Array, data: Data) -> dict[str, float]:
    """The accuracy on the validation and test images."""
    right = logits.argmax(1) == data.labels
    return {
        "validation_accuracy": float(right[data.validation].mean()),
        "test_accuracy": float(right[data.test].mean()),
    }


def mixture(text: str) -> Mixture:
    """The weights of the losses in `"a+b"`, by name.

    Raises:
        ValueError: an unknown name, or the same name twice.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"--losses: unknown loss {name!r} in {text!r}; there are {', '.join(LOSSES)}")
        if names.count(name) > 1:
            raise ValueError(f"--losses: {name!r} is more than once in {text!r}")
    return {name: LOSSES[name].weight for name in names}


def train_students(
    half: ModuleType,
    mixtures: dict[str, Mixture],
    data: Data,
    teacher: Teacher,
    setting: Setting,
    seeds: int,
    tick: Callable[[], None],
) -> list[dict[str, Any]]:
    """Train the student alone and with each mixture; returns the rows of the table."""
    plans = [make_plan(data, setting, 1 + seed) for seed in range(seeds)]
    inputs = training_set(data, setting, teacher)
    rows: list[dict[str, Any]] = []
    for name, weights in {"alone": {}, **mixtures}.items():
        runs = half.train_students(weights, inputs, plans, setting, data.views[0])
        scores = [accuracies(run["logits"], data) for run in runs]
        test = np.array([score["test_accuracy"] for score in scores])
        row = {
            "losses": name,
            "weights": weights,
            "parameters": runs[0]["parameters"],
            "parameters_of_losses": runs[0]["parameters_of_losses"],
            "validation_accuracies": [score["validation_accuracy"] for score in scores],
            "test_accuracies": test.tolist(),
            "test_accuracy": float(test.mean()),
            "spread": float(test.std(ddof=1)) if seeds > 1 else None,
            "seconds_per_step": float(np.mean([run["seconds"] for run in runs]) / setting.steps),
        }
        row["gain"] = row["test_accuracy"] - rows[0]["test_accuracy"] if rows else 0.0
        rows.append(row)
        tick()
    return rows


def compare(
    halves: dict[str, ModuleType], weights: Mixture, data: Data, teacher: Teacher, setting: Setting
) -> dict[str, Any]:
    """Run one training in both frameworks, from the same weights on the same batches, in float64 and in float32."""
    setting = setting._replace(steps=200)
    plan = make_plan(data, setting, 1)
    inputs = training_set(data, setting, teacher)
    start = halves["torch"].initial_weights(weights, setting)
    result: dict[str, Any] = {"losses": "+".join(weights), "steps": setting.steps}
    for dtype in ("float64", "float32"):
        curves = {
            name: half.train_students(weights, inputs, [plan], setting, data.views[0], dtype, start)[0]["losses"]
            for name, half in halves.items()
        }
        difference = np.abs(curves["jax"] - curves["torch"]) / np.abs(curves["torch"])
        result[dtype] = {
            "largest_relative_difference": float(difference.max()),
            "relative_difference": difference.tolist(),
        }
        result[dtype] |= {name: curve.tolist() for name, curve in curves.items()}
    return result


def describe(setting: Setting, data: Data, seeds: int) -> str:
    """The setting in words."""
    return (
        f"The student has the labels of {setting.labels} of {setting.images:,} training images, and the teacher's "
        f"outputs for all of them. Where the label is not known, losses that read labels use the teacher's class if "
        f"the teacher is at least {setting.sure:.0%} sure. {setting.steps} steps of {setting.batch} images, "
        f"{setting.labelled} of them labelled; {seeds} seeds; {len(data.validation)} images for validation, "
        f"{len(data.test)} for the test."
    )


def table(framework: str, teacher: dict[str, Any] | None, rows: list[dict[str, Any]]) -> Table:
    """The table of one framework's results."""
    result = Table(title=f"{framework}: test accuracy in %, mean ± standard deviation over seeds")
    result.add_column("", no_wrap=True)
    for column in ("parameters", "test accuracy", "gain", "seconds per step"):
        result.add_column(column, justify="right")
    if teacher:
        result.add_row(
            "teacher", f"{teacher['parameters']:,}", f"{100 * teacher['test_accuracy']:.1f}", "", "", end_section=True
        )
    for row in rows:
        spread = "" if row["spread"] is None else f" ± {100 * row['spread']:.1f}"
        result.add_row(
            "student alone" if row["losses"] == "alone" else row["losses"],
            f"{row['parameters']:,}",
            f"{100 * row['test_accuracy']:.1f}{spread}",
            "" if row["losses"] == "alone" else f"{100 * row['gain']:+.1f}",
            f"{row['seconds_per_step']:.4f}",
        )
    return result


def summary(results: dict[str, Any]) -> str:
    """The results in a sentence or two: which losses helped, and how closely the frameworks agree."""
    students = results["students"]
    gains = {
        row["losses"]: [next(x["gain"] for x in rows if x["losses"] == row["losses"]) for rows in students.values()]
        for row in next(iter(students.values()))[1:]
    }
    helped = sorted((name for name, gain in gains.items() if min(gain) > 0), key=lambda name: -np.mean(gains[name]))
    where = " and ".join(students)
    text = (
        f"In {where} the student is more accurate with {len(helped)} of the {len(gains)} losses and mixtures than alone"
    )
    text += (
        f": {', '.join(f'{name} ({100 * np.mean(gains[name]):+.1f} points)' for name in helped)}." if helped else "."
    )
    if comparison := results["same_training"]:
        text += (
            f" One training run in both frameworks ({comparison['losses']}, {comparison['steps']} steps) gives the same "
            f"losses: they differ by at most {comparison['float64']['largest_relative_difference']:.1e} relative in float64, "
            f"and by {comparison['float32']['largest_relative_difference']:.1e} in float32."
        )
    return text


def label(losses: str) -> str:
    """The label of a mixture; a long one has several lines."""
    return losses if len(losses) <= 20 else textwrap.fill(losses.replace("+", "+ "), 20)


def picture(results: dict[str, Any], file: Path, phone: bool = False) -> None:
    """Draw the accuracies, and beside them (on a phone below them) the two loss curves and their difference."""
    parity, colours = results["same_training"], {"jax": "tab:blue", "torch": "tab:orange"}
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        rows = next(iter(results["students"].values()))
        tall = max(5, 0.4 * len(rows))
        size = (3.9, 2 * tall if parity else tall) if phone else (8.6 if parity else 6.5, tall)
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subfigures(*((2, 1) if phone else (1, 2))) if parity else (figure, None)
        axes = left.subplots()
        for i, (framework, students) in enumerate(results["students"].items()):
            height = np.arange(len(students)) + 0.3 * (i - (len(results["students"]) - 1) / 2)
            spread = [100 * (student["spread"] or 0) for student in students]
            accuracy = [100 * student["test_accuracy"] for student in students]
            axes.errorbar(accuracy, height, xerr=spread, fmt="o", capsize=3, color=colours[framework], label=framework)
        teachers = [100 * x["test_accuracy"] for x in results["teachers"].values() if "test_accuracy" in x]
        if teachers:
            axes.axvline(np.mean(teachers), color="grey", linestyle="--", label="teacher")
        axes.axhline(0.5, color="lightgrey", linewidth=0.8)
        axes.set_yticks(range(len(rows)), ["student alone", *(label(row["losses"]) for row in rows[1:])])
        axes.invert_yaxis()
        axes.set_xlabel("test accuracy in %,\nmean ± standard deviation over seeds")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=3)
        if right is not None:
            upper, lower = right.subplots(2, 1, sharex=True, height_ratios=[3, 2])
            for framework, style in (("jax", {"linewidth": 4, "alpha": 0.4}), ("torch", {"linewidth": 1})):
                upper.plot(parity["float64"][framework], color=colours[framework], label=framework, **style)
            upper.set_ylabel("loss, float64")
            upper.set_title(f"one training in two frameworks:\n{parity['losses']}", fontsize="medium")
            upper.legend()
            for dtype, colour in (("float32", "tab:red"), ("float64", "tab:green")):
                difference = np.array(parity[dtype]["relative_difference"])
                lower.semilogy(np.where(difference > 0, difference, np.nan), color=colour, label=dtype, linewidth=1)
            lower.set_ylabel("relative difference\n(gaps: none)")
            lower.set_xlabel("step")
            lower.legend(loc="center right")
        figure.savefig(file, dpi=200)


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    begin = time.perf_counter()
    parser = Parser(prog="digits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="both")
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help=f"{', '.join(LOSSES)}, or mixtures like kl+hcl")
    parser.add_argument("--seeds", type=at_least_one, help="students per row (3; with --quick 2)")
    parser.add_argument("--steps", type=at_least_one, help="steps of each training (300; with --quick 150)")
    parser.add_argument("--quick", action="store_true", help="fewer losses, seeds and steps")
    parser.add_argument(
        "--teacher-logits",
        metavar="FILE.npz",
        help="a teacher of your own: an array `logits`, [1000, 10], with one row per training image; `train` in "
        "digits.json has the images' indices in load_digits()",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="the folder for digits.json and digits.png")
    options = parser.parse_args(arguments)

    setting = Setting(steps=options.steps or (150 if options.quick else 300))
    seeds = options.seeds or (2 if options.quick else 3)
    data, outside = load_data(setting), None
    try:
        if options.teacher_logits:
            outside = outside_teacher(options.teacher_logits, setting)
        names = [name for name, loss in LOSSES.items() if not outside or loss.reads == LOGITS]
        usual = [text for text in (QUICK if options.quick else DEFAULT) if set(mixture(text)) <= set(names)]
        mixtures = {"+".join(weights): weights for weights in map(mixture, options.losses or usual)}
        if refused := sorted(set().union(*mixtures.values()) - set(names)):
            raise ValueError(
                f"--losses: {', '.join(refused)} cannot be had with --teacher-logits, for the file holds logits alone "
                f"and they read the teacher's {FEATURES}; there are {', '.join(names)}"
            )
        same = {name: weight for name, weight in mixture(SAME).items() if name in names}
        halves = {name: importlib.import_module(f"_digits_{name}") for name in FRAMEWORKS[options.framework]}
        options.out.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        parser.error(f"--framework {options.framework}: {error.name} is not installed; pip install '.[all]' has all")
    except OSError as error:
        parser.error(f"--out: cannot make the folder {options.out}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))

    console = Console()
    console.print(describe(setting, data, seeds))
    results: dict[str, Any] = {"setting": setting._asdict(), "seeds": seeds, "teacher_logits": options.teacher_logits}
    results |= {"train": data.train.tolist(), "labelled": data.train[data.labelled].tolist()}
    results |= {"teachers": {}, "students": {}, "same_training": None}
    if outside:
        right = (outside.logits.argmax(1) == data.labels[data.train]).mean()
        results["teachers"]["outside"] = {"train_accuracy": float(right)}
        console.print(f"The teacher of {options.teacher_logits} is right on {right:.1%} of the training images.")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(halves) * (2 + len(mixtures)) + (len(halves) > 1))

        def tick() -> None:
            progress.advance(task)

        teacher = outside
        for name, half in halves.items():
            progress.update(task, description=name)
            if not outside:
                teacher, results["teachers"][name] = train_teacher(half, data, setting)
            tick()
            results["students"][name] = train_students(half, mixtures, data, teacher, setting, seeds, tick)
        if len(halves) > 1:
            progress.update(task, description="one training in both")
            results["same_training"] = compare(halves, same, data, teacher, setting)
            tick()

    for name in halves:
        console.print(table(name, results["teachers"].get(name), results["students"][name]))
    picture(results, options.out / "digits.png")
    picture(results, options.out / "digits_phone.png", phone=True)
    results["wall_seconds"] = time.perf_counter() - begin
    (options.out / "digits.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"digits.json and digits.png are in {options.out}, after {results['wall_seconds']:.0f} seconds.")
    console.print(summary(results))


if __name__ == "__main__":
    main()
