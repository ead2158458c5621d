"""Moving over: each factor on the pages, from the other code's formula in one line, or from Optax itself."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

import kdjax
import kdtorch
from benchmarks import direct

pytestmark = pytest.mark.usefixtures("quick_compilation")
PAGES = pathlib.Path(__file__).parent.parent / "docs" / "moving"
T, C, DELTA = 4.0, 7, 0.5
FACTORS = {"1": 1, "½": 0.5, "δ": DELTA, "1 / C": 1 / C, "1 / T²": 1 / T**2, "1 / (C T²)": 1 / (C * T**2)}

rng = np.random.default_rng(0)
S, TEACHER = rng.normal(size=(2, 5, C))
LABELS = rng.integers(C, size=5)
MAPS = [rng.normal(size=(2, 5, 3, 8, 8)), rng.normal(size=(2, 5, 4, 2, 2))]
CENTERS = rng.normal(size=(C, C))
s, t, labels = map(torch.from_numpy, (S, TEACHER, LABELS))
student_maps, teacher_maps = ([torch.from_numpy(maps[i]) for maps in MAPS] for i in range(2))
log_p, q = functional.log_softmax(s / T, 1), functional.softmax(t / T, 1)
memories = torch.from_numpy(rng.normal(size=(2, 9, C)))
state = kdtorch.CRCDState(*memories / memories.norm(dim=-1, keepdim=True), *torch.zeros(2, dtype=s.dtype))
index, negatives = torch.arange(5), torch.from_numpy(rng.integers(9, size=(5, 3)))


def kl():
    return kdtorch.kl_loss(s, t, temperature=T)


def longer():
    """The student's features, made longer than the teacher's."""
    return S * 10


MOVES = {
    "mdistiller": {
        "`kd_loss(ls, lt, T)`": lambda: (T**2 * functional.kl_div(log_p, q, reduction="none").sum(1).mean(), kl()),
        "`dkd_loss(ls, lt, target, alpha, beta, T)`": lambda: (
            direct.dkd_loss(s, t, labels, 1.0, 8.0, T),
            kdtorch.dkd_loss(s, t, labels, alpha=1.0, beta=8.0, temperature=T),
        ),
        "`hcl_loss(fs, ft)`": lambda: (
            direct.hcl_loss(student_maps, teacher_maps),
            kdtorch.hcl_loss(student_maps, teacher_maps),
        ),
        "FitNet: `mse_loss` of maps": lambda: (
            functional.mse_loss(student_maps[0], teacher_maps[0]),
            kdtorch.mse_loss(student_maps[0], teacher_maps[0]),
        ),
    },
    "repdistiller": {
        "`DistillKL(T)(ys, yt)`": lambda: (T**2 * functional.kl_div(log_p, q, reduction="sum") / len(s), kl()),
        "`HintLoss()(fs, ft)`": lambda: (functional.mse_loss(s, t), kdtorch.mse_loss(s, t)),
        "`CRCDLoss(opt)`, of the fork Lechatelia/CRCD": lambda: (
            direct.crcd_loss(s, t, index, negatives, state)[0],
            kdtorch.crcd_loss(s, t, index, negatives, state)[0],
        ),
    },
    "torchdistill": {
        "`KDLoss(temperature=T, alpha=a)` with targets, its soft part over 1 − a": lambda: (
            T**2 * functional.kl_div(log_p, q, reduction="batchmean"),
            kl(),
        ),
        "`KDLoss` without `alpha` or targets": lambda: (functional.kl_div(log_p, q, reduction="batchmean"), kl()),
        'the same, `reduction="mean"`': lambda: (functional.kl_div(log_p, q, reduction="none").mean(), kl()),
        "`HierarchicalContextLoss`, one a map, weights 1, summed": lambda: (
            sum(direct.hcl_loss([x], [y]) for x, y in zip(student_maps, teacher_maps, strict=True)),
            kdtorch.hcl_loss(student_maps, teacher_maps),
        ),
        "`MSELoss` in a `SimpleLossWrapper`": lambda: (torch.nn.MSELoss()(s, t), kdtorch.mse_loss(s, t)),
        "`SmoothL1Loss(beta=b)` in a `SimpleLossWrapper`": lambda: (
            torch.nn.SmoothL1Loss(beta=DELTA)(s, t),
            kdtorch.smooth_l1_loss(s, t, beta=DELTA),
        ),
    },
    "optax": {
        "`kl_divergence(log_softmax(s / T), softmax(t / T)).mean()`": lambda: (
            optax.losses.kl_divergence(jax.nn.log_softmax(S / T), jax.nn.softmax(TEACHER / T)).mean(),
            kl(),
        ),
        "`kl_divergence_with_log_targets(…, log_softmax(t / T)).mean()`": lambda: (
            optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(S / T), jax.nn.log_softmax(TEACHER / T)
            ).mean(),
            kl(),
        ),
        "`generalized_kl_divergence(…).mean()` of the same": lambda: (
            optax.losses.generalized_kl_divergence(jax.nn.log_softmax(S / T), jax.nn.softmax(TEACHER / T)).mean(),
            kl(),
        ),
        "`sigmoid_binary_cross_entropy(s, t).mean()`": lambda: (
            optax.losses.sigmoid_binary_cross_entropy(S, TEACHER).mean(),
            kdjax.bce_loss(S, TEACHER),
        ),
        "`squared_error(s, t).mean()`": lambda: (
            optax.losses.squared_error(S, TEACHER).mean(),
            kdjax.mse_loss(S, TEACHER),
        ),
        "`l2_loss(s, t).mean()`": lambda: (optax.losses.l2_loss(S, TEACHER).mean(), kdjax.mse_loss(S, TEACHER)),
        "`huber_loss(s, t, delta=δ).mean()`": lambda: (
            optax.losses.huber_loss(S, TEACHER, delta=DELTA).mean(),
            kdjax.smooth_l1_loss(S, TEACHER, beta=DELTA),
        ),
        "`cosine_distance(s, centers[y]).mean()`, students the longer": lambda: (
            optax.losses.cosine_distance(longer(), CENTERS[LABELS]).mean(),
            kdjax.dcn_loss(longer(), TEACHER, LABELS, CENTERS),
        ),
    },
}


def table(page):
    """The first cell and the factor of each row of the page's table of losses."""
    text = (PAGES / f"{page}.md").read_text()
    losses = re.search(r"^.* its number is ours times \|\n\|[- |]*\|\n((?:\|.*\n)*)", text, re.M)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in losses.splitlines()]
    return {row[0]: row[-1] for row in rows}


@pytest.mark.parametrize("page", MOVES)
def test_factors(page):
    factors = {row: factor for row, factor in table(page).items() if factor != "–"}
    assert set(factors) == set(MOVES[page])
    for row, numbers in MOVES[page].items():
        theirs, ours = map(float, numbers())
        assert theirs == pytest.approx(FACTORS[factors[row]] * ours, rel=1e-10), row


def test_founding_conventions():
    """On the same inputs, features and scores alike, a term of one convention is the factor times that of the other."""
    names = [name for row in table("founding") for name in re.findall(r"`(\w+)`", row)]
    model = {"METRIC_LOSS_TYPE": "-".join(["kd", *names]), "KD_LOSS_WEIGHT": [1.0] * len(names)}
    config = {"MODEL": model | {"FEAT_DIM": C, "CLS_FEA_NUM": C}}
    student, teacher = s[:4], t[:4]
    feat = {"stu": student, "score_stu": student, "fea_stu": student, "feats_stu": student_maps}
    feat |= {"tea": teacher, "score_tea": teacher, "feats_tea": teacher_maps}
    target = torch.tensor([0, 3, 1, 6])
    terms = {}
    for conventions in ("founding", "published"):
        torch.manual_seed(0)
        loss = kdtorch.make_loss(config, C, 9, conventions=conventions).double()
        with torch.no_grad():
            terms[conventions] = loss.terms(feat=feat | {"index": target}, target=target)
    for row, factor in table("founding").items():
        for name in re.findall(r"`(\w+)`", row):
            founding, published = (float(terms[convention][name]) for convention in ("founding", "published"))
            if factor == "–":
                assert founding != pytest.approx(published)
            else:
                assert founding == pytest.approx(FACTORS[factor] * published, rel=1e-10), name


def test_cross_entropy_of_optax_has_the_gradient_of_kl():
    def theirs(x):
        return optax.losses.softmax_cross_entropy(x / T, jax.nn.softmax(TEACHER / T)).mean()

    ours = jax.grad(lambda x: kdjax.kl_loss(x, TEACHER, temperature=T))(S)
    np.testing.assert_allclose(jax.grad(theirs)(S), ours / T**2, rtol=1e-10)


def test_an_excluded_class_in_optax():
    x, y = (jnp.array([[1.0, value, -jnp.inf]]) for value in (0.0, 2.0))
    assert jnp.isnan(optax.losses.kl_divergence(jax.nn.log_softmax(x), jax.nn.softmax(y))).all()
    assert jnp.isnan(optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(x), jax.nn.log_softmax(y))).all()
    assert jnp.isfinite(optax.losses.safe_softmax_cross_entropy(x, jax.nn.softmax(y))).all()
    assert kdjax.kl_loss(x, y) == pytest.approx(float(kdjax.kl_loss(x[:, :2], y[:, :2])))
