"""The catalogue: every loss has a page, its code prints what it says in both frameworks, and its numbers hold."""

import contextlib
import io
import math
import operator
import pathlib
import re
import textwrap

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional

import kdjax
import kdtorch
from benchmarks import direct

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parent.parent
PAGES = ROOT / "docs" / "losses"
LOSSES = [name for name in kdjax.__all__ if name.endswith("_loss") and name != "make_loss"]
SECTIONS = [
    "The idea",
    "The formula",
    "The picture",
    "Inputs",
    "When to use it",
    "Hyperparameters",
    "The paper",
    "Where the codes differ",
    "Cost",
    "The call",
    "API",
]


def page(name):
    return (PAGES / f"{name}.md").read_text()


def section(name, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page(name), re.M | re.S)[1]


def blocks(name):
    """The code of each tab."""
    found = re.findall(r'^=== "(\w+)"\n\n    ```python\n(.*?)^    ```', section(name, "The call"), re.M | re.S)
    return {framework: textwrap.dedent(code) for framework, code in found}


def run(code):
    """What the code leaves behind, and the lines that it prints."""
    left, printed = {}, io.StringIO()
    with jax.enable_x64(False), contextlib.redirect_stdout(printed):
        exec(code, left)
    return left, printed.getvalue().splitlines()


def test_pages():
    assert {path.stem for path in PAGES.glob("*.md")} == {*LOSSES, "index"}
    for table in (page("index"), (PAGES.parent / "choosing.md").read_text()):
        rows = re.findall(r"^\| \[`(\w+)`\]\((?:losses/)?(\w+)\.md\)", table, re.M)
        assert sorted(rows) == [(name, name) for name in sorted(LOSSES)]


@pytest.mark.parametrize("name", LOSSES)
def test_sections(name):
    text = page(name)
    assert re.findall(r"^# (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M) == [f"`{name}`"]
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert f"(../pictures/{name}.svg)" in section(name, "The picture")
    for package in ("kdjax", "kdtorch"):
        assert f"[`{package}.{name}`][{package}.{name}]" in section(name, "API")
    for reference in re.findall(r"\]\[(kd[\w.]+)\]", text):
        operator.attrgetter(reference.split(".", 1)[1])(kdjax if reference.startswith("kdjax.") else kdtorch)


@pytest.mark.parametrize("name", LOSSES)
def test_call(name):
    codes = blocks(name)
    assert list(codes) == ["JAX", "PyTorch"]
    want = [re.findall(r"^ *print\(.*  # (.*)$", code, re.M) for code in codes.values()]
    assert want[0] == want[1] != []
    assert [run(code)[1] for code in codes.values()] == want


# Where the codes differ: a row of the page's table, and its last cell, from what the page's PyTorch code leaves behind.


def golden(stem, key="out_loss"):
    with np.load(ROOT / "tests" / "golden" / f"{stem}.npz") as data:
        return float(data[key])


def log_p(x, temperature=1.0):
    return functional.log_softmax(x / temperature, -1)


def p(x, temperature=1.0):
    return functional.softmax(x / temperature, -1)


def kl(student, teacher, temperature=1.0):
    """KL(teacher || student), one value an example, without T²."""
    return (p(teacher, temperature) * (log_p(teacher, temperature) - log_p(student, temperature))).sum(-1)


def cross_entropy(student, teacher, temperature=1.0):
    return -(p(teacher, temperature) * log_p(student, temperature)).sum(-1)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def others(x, labels):
    """The logits without the label's."""
    return x[torch.arange(x.shape[-1]) != labels[:, None]].reshape(len(x), -1)


def distances(x):
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def relative(x):
    """Distances as relational distillation has them: over their mean, the zeros left out."""
    d = distances(x)
    return d / d[d > 0].mean()


def far_apart():
    """A label 200 below the other classes, in both."""
    return torch.tensor([[0.0, 200.0, 201.0]]), torch.tensor([[0.0, 201.0, 200.0]]), torch.tensor([0])


def by_probabilities(student, weak, labels):
    """USKD's non-target part, its classes ranked by probabilities, as in the paper."""
    w, q = p(weak), p(student)
    w_y, q_y = (x.gather(-1, labels[:, None]) for x in (w, q))
    return ranked(student, w / (1 - w_y + 1e-6) + q / (1 - q_y + 1e-6), labels[:, None])


def by_logarithms(student, weak, labels):
    w, q = p(weak), log_p(student)
    w_y, q_y = (x.gather(-1, labels).sum(-1, keepdim=True) for x in (w, q))
    return ranked(student, w / (1 - w_y + 1e-6) + q / (1 - q_y + 1e-6), labels)


def ranked(student, score, labels):
    z = 1 / (1 + score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float())
    kept = torch.ones_like(student).scatter(-1, labels, 0).bool()
    z, logits = (x[kept].reshape(len(x), -1) for x in (z, student))
    return -(z / z.sum(-1, keepdim=True) * log_p(logits)).sum(-1).mean()


def bucket(x, temperature):
    """KL over the kept classes and the others as one, for a teacher all of whose logits are known."""
    kept = torch.zeros_like(x["student"]).scatter(-1, x["indices"], 1).bool()
    probabilities = []
    for logits in (x["student"], x["teacher"]):
        all_classes = p(logits, temperature)
        rest = (all_classes * ~kept).sum(-1, keepdim=True)
        probabilities.append(torch.cat([all_classes.gather(-1, x["indices"]), rest], -1).log())
    return temperature**2 * kl(*probabilities).mean()


def sparse(x, renormalised):
    """The k kept classes alone, the teacher's probabilities made to sum to 1, and the student's or not."""
    q = p(x["values"])
    log_kept = log_p(x["student"]).gather(-1, x["indices"])
    log_kept = log_kept - log_kept.logsumexp(-1, keepdim=True) if renormalised else log_kept
    return (q * (q.log() - log_kept)).sum(-1).mean()


def guessed_rest(x, temperature):
    """The rest's mass at another temperature, guessed as a power of its mass at T = 1."""
    log_kept = x["values"] - torch.logsumexp(torch.cat([x["values"], x["rest"][:, None]], -1), -1, keepdim=True)
    rest = (1 - log_kept.exp().sum(-1)).log()
    student = log_p(x["student"], temperature).gather(-1, x["indices"])
    s = torch.cat([student, (1 - student.exp().sum(-1, keepdim=True)).log()], -1)
    return temperature**2 * kl(s, torch.cat([log_kept, rest[:, None]], -1) / temperature).mean()


def dino(x, center):
    return direct.dino_loss(x["student"], x["teacher"], kdtorch.DINOState(center), 0.07)[0]


def crcd(x, index):
    return direct.crcd_loss(x["student"], x["teacher"], index, x["negatives"], x["before"], 0.5)[0]


DIFFERENCES = {
    "kl_loss": {
        "here; mdistiller, RepDistiller, mmrazor": lambda x: direct.kl_loss(x["student"], x["teacher"], 4.0),
        "torchdistill without `alpha`; TRL with β = 0": lambda x: kl(x["student"], x["teacher"], 4.0).mean(),
        "founding repository, DeiT": lambda x: (
            16 * functional.kl_div(log_p(x["student"], 4.0), p(x["teacher"], 4.0), reduction="none").mean()
        ),
        "`KDLoss` of NKD's code": lambda x: 16 * cross_entropy(x["student"], x["teacher"], 4.0).mean(),
        "TextBrewer `kd_ce_loss`": lambda x: cross_entropy(x["student"], x["teacher"], 4.0).mean(),
        "`tests/golden/kl.npz`": lambda x: golden("kl"),
    },
    "symmetric_kl_loss": {
        "here; the founding README": lambda x: direct.symmetric_kl_loss(x["student"], x["teacher"]),
        "the founding code": lambda x: kl(x["student"], x["teacher"]).mean() / x["student"].shape[-1],
        "the sum of the two directions": lambda x: (
            kl(x["student"], x["teacher"]) + kl(x["teacher"], x["student"])
        ).mean(),
        "TRL, Liger (Jensen–Shannon)": lambda x: sum(
            (p(a) * (log_p(a) - ((p(x["student"]) + p(x["teacher"])) / 2).log())).sum(-1).mean() / 2
            for a in (x["student"], x["teacher"])
        ),
    },
    "topk_kl_loss": {
        "here, `bucket`": lambda x: bucket(x, 1.0),
        "here, `renormalize`; both sides over the kept": lambda x: sparse(x, True),
        "DistillKit, `ZERO`": lambda x: sparse(x, False),
        "here, `bucket` at T = 2, with the rest recorded at T = 2": lambda x: bucket(x, 2.0),
        "DistillKit, `SYMMETRIC_UNIFORM` at T = 2": lambda x: guessed_rest(x, 2.0),
        "all classes: `kl_loss`": lambda x: direct.kl_loss(x["student"], x["teacher"]),
    },
    "dkd_loss": {
        "here; mdistiller": lambda x: direct.dkd_loss(x["student"], x["teacher"], x["labels"]),
        "the founding settings α = β = T = 1": lambda x: direct.dkd_loss(
            x["student"], x["teacher"], x["labels"], 1, 1, 1
        ),
        "a label 200 below the rest at T = 1, here": lambda x: kdtorch.dkd_loss(*far_apart(), temperature=1.0),
        "the same, with the label at −1000": lambda x: direct.dkd_loss(*far_apart(), temperature=1.0),
        "two classes, here: α's part alone": lambda x: kdtorch.dkd_loss(
            x["student"][:, :2], x["teacher"][:, :2], x["labels"]
        ),
        "`tests/golden/dkd_cifar.npz`": lambda x: golden("dkd_cifar"),
    },
    "nkd_loss": {
        "here; the released code": lambda x: direct.nkd_loss(x["student"], x["teacher"], x["labels"]),
        "two revisions of it, the label kept": lambda x: (
            (p(x["teacher"]) * -log_p(x["student"])).gather(-1, x["labels"][:, None]).mean()
            + 1.5 * cross_entropy(x["student"], x["teacher"]).mean()
        ),
        "student = teacher, here": lambda x: kdtorch.nkd_loss(x["teacher"], x["teacher"], x["labels"]),
        "`tests/golden/nkd.npz`": lambda x: golden("nkd"),
    },
    "uskd_loss": {
        "here; the released code": lambda x: direct.uskd_loss(x["student"], x["weak"], x["labels"]),
        "its non-target part (β = 1), ranked by log p": lambda x: direct.uskd_loss(
            x["student"], x["weak"], x["labels"], 0, 1, 0
        ),
        "the same, ranked by p": lambda x: by_probabilities(x["student"], x["weak"], x["labels"]),
        "the same, a one-hot label in the released code": lambda x: by_logarithms(
            x["student"],
            x["weak"],
            functional.one_hot(x["labels"], 4).sort(dim=-1, descending=True, stable=True).indices[:, :2],
        ),
        "`tests/golden/uskd.npz`": lambda x: golden("uskd"),
    },
    "difference_kl_loss": {
        "here; the founding code": lambda x: direct.difference_kl_loss(x["student"], x["teacher"]),
        "T = 2, here": lambda x: kdtorch.difference_kl_loss(x["student"], x["teacher"], temperature=2.0),
        "T = 2, the founding code": lambda x: direct.difference_kl_loss(x["student"], x["teacher"]),
        "`tests/golden/difference_kl_wide.npz`": lambda x: golden("difference_kl_wide"),
    },
    "bce_loss": {
        "here; PyTorch, the mean over all entries": lambda x: functional.binary_cross_entropy_with_logits(
            x["student"], x["teacher"]
        ),
        "at its least, s = logit(t)": lambda x: kdtorch.bce_loss(x["teacher"].logit(), x["teacher"]),
        "a target of 2 at s = 10": lambda x: kdtorch.bce_loss(torch.tensor([[10.0]]), torch.tensor([[2.0]])),
        "`tests/golden/bce.npz`": lambda x: golden("bce"),
    },
    "mse_loss": {
        "here; PyTorch, mdistiller, RepDistiller": lambda x: functional.mse_loss(x["student"], x["teacher"]),
        "FitNets, ½‖s − t‖²": lambda x: ((x["student"] - x["teacher"]) ** 2).sum(-1).mean() / 2,
        "`optax.l2_loss`, averaged": lambda x: ((x["student"] - x["teacher"]) ** 2).mean() / 2,
        "DistilBERT's code, summed over features": lambda x: (
            ((x["student"] - x["teacher"]) ** 2).sum() / len(x["student"])
        ),
        "`tests/golden/mse.npz`": lambda x: golden("mse"),
    },
    "smooth_l1_loss": {
        "here; `smooth_l1_loss` of PyTorch": lambda x: functional.smooth_l1_loss(x["student"], x["teacher"], beta=0.5),
        "`huber_loss` of PyTorch and Optax": lambda x: functional.huber_loss(x["student"], x["teacher"], delta=0.5),
        "`tests/golden/smooth_l1_beta0.5.npz`": lambda x: golden("smooth_l1_beta0.5"),
    },
    "hcl_loss": {
        "here; ReviewKD, mdistiller": lambda x: direct.hcl_loss(x["student"], x["teacher"]),
        "the released codes, one teacher map forgotten": lambda x: direct.hcl_loss(x["student"][:1], x["teacher"][:1]),
        "the full maps alone (MSE)": lambda x: sum(
            functional.mse_loss(s, t) for s, t in zip(x["student"], x["teacher"], strict=True)
        ),
        "`tests/golden/hcl.npz`": lambda x: golden("hcl"),
    },
    "dcn_loss": {
        "here; the founding code": lambda x: direct.dcn_loss(x["student"], x["teacher"], x["labels"], x["centers"]),
        "the paper: centres are the teacher's class means": lambda x: kdtorch.dcn_loss(
            x["student"],
            x["teacher"],
            x["labels"],
            torch.stack([x["teacher"][x["labels"] == c].mean(0) for c in range(2)]),
        ),
        "a zero feature of both, here": lambda x: kdtorch.dcn_loss(
            torch.zeros(1, 2), torch.zeros(1, 2), x["labels"][:1], x["centers"]
        ),
        "a zero feature of both, the founding code": lambda x: direct.dcn_loss(
            torch.zeros(1, 2), torch.zeros(1, 2), x["labels"][:1], x["centers"]
        ),
        "`tests/golden/dcn.npz`": lambda x: golden("dcn"),
    },
    "euclidean_mse_loss": {
        "here; the founding code": lambda x: direct.euclidean_mse_loss(x["student"], x["teacher"]),
        "RKD's distances (mdistiller, RepDistiller, torchdistill)": lambda x: functional.smooth_l1_loss(
            relative(x["student"]), relative(x["teacher"])
        ),
        "the mean over pairs of different samples": lambda x: (
            3 / 2 * direct.euclidean_mse_loss(x["student"], x["teacher"])
        ),
        "`tests/golden/euclidean_mse.npz`": lambda x: golden("euclidean_mse"),
    },
    "crcd_loss": {
        "here; the released code": lambda x: crcd(x, x["index"]),
        "`tests/golden/crcd.npz`, step 1": lambda x: golden("crcd", "out_loss_0"),
        "step 3, with the Z of step 1": lambda x: golden("crcd", "out_loss_2"),
        "the classes given as index, as in the founding code": lambda x: crcd(x, torch.tensor([0, 0])),
    },
    "dino_loss": {
        "here; the released code": lambda x: dino(x, torch.zeros(3)),
        "the centre moved first": lambda x: dino(x, 0.1 * x["teacher"].mean((0, 1))),
        "as a KL: less the teacher's entropy": lambda x: (
            dino(x, torch.zeros(3)) - cross_entropy(x["teacher"], x["teacher"], 0.07).mean()
        ),
        "`tests/golden/dino_multicrop.npz`, step 1": lambda x: golden("dino_multicrop", "out_loss_0"),
    },
}


@pytest.mark.parametrize("name", LOSSES)
def test_differences(name):
    left, printed = run(blocks(name)["PyTorch"])
    text = section(name, "Where the codes differ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", text, re.M)[2:]]
    want = {row: f"{float(value(left)):.4f}" for row, value in DIFFERENCES[name].items()}
    assert {row[0]: row[-1] for row in rows} == want
    assert rows[0][-1] in printed[0]  # "here", by the formula as it is written, is what the call prints
    assert len(re.findall(r"\d\.\d{4}\b", text)) == sum(math.isfinite(float(value)) for value in want.values())
