"""make_loss: the founding code's figures, the published conventions, and every mistake in a configuration."""

import types

import jax
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from flax import nnx
from frameworks import BOTH, JAX, TORCH, set_parameter
from test_golden import FILES, LIMITS, load

pytestmark = pytest.mark.usefixtures("quick_compilation")
both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
BATCH, DIM, WIDE, CLASSES = 6, 8, 10, 5


def batch(f, seed=0, dtype="float32"):
    """A `feat`, and the target."""
    rng = np.random.default_rng(seed)
    shapes = {"stu": DIM, "tea": DIM, "score_stu": CLASSES, "score_tea": CLASSES, "fea_stu": WIDE, "fea_tea": WIDE}
    feat = {key: rng.normal(size=(BATCH, width)) for key, width in shapes.items()}
    for side, levels in (("stu", 2), ("tea", 3)):
        feat[f"feats_{side}"] = [rng.normal(size=(BATCH, 6, 6, 6)) for _ in range(levels)]
    feat["index"] = rng.choice(20, BATCH, replace=False)
    return f.arrays(feat, dtype), f.array(rng.integers(CLASSES, size=BATCH))


def configuration(names, weights=None, **model):
    weights = weights or [1.0] * (names.count("-"))
    model = {"FEAT_DIM": DIM, "CLS_FEA_NUM": WIDE, "METRIC_LOSS_TYPE": names, "KD_LOSS_WEIGHT": weights} | model
    return {"MODEL": model, "SOLVER": {"MAX_EPOCHS": 100}}


@both
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", [p for p in FILES if "make_loss" in p.stem], ids=lambda p: p.stem)
def test_published_figures(path, f, dtype):
    meta, data = load(path)
    loss = f.kd.make_loss(meta["config"], meta["num_classes"], meta["num_data"], conventions=meta["conventions"])
    for key, value in data.items():
        if key == "param_dcn_centers":
            set_parameter(loss.losses["dcn"].centers, value.astype(dtype))
        elif key == "param_uskd_weight_out_in":
            head = loss.losses["uskd"].head
            set_parameter(head.kernel if f is JAX else head.weight, (value.T if f is JAX else value).astype(dtype))
        elif key == "param_uskd_bias":
            set_parameter(loss.losses["uskd"].head.bias, value.astype(dtype))
    if f is TORCH:
        loss.to(getattr(torch, dtype))

    def maps(x):
        return np.moveaxis(x, 1, -1) if f is JAX else x

    feat = {key.removeprefix("in_"): data[key] for key in data if key.startswith("in_") and "feats" not in key}
    target = f.array(feat.pop("target"))
    for side in ("stu", "tea"):
        keys = sorted(key for key in data if key.startswith(f"in_feats_{side}"))
        feat[f"feats_{side}"] = [maps(data[key]) for key in keys]
    feat = f.arrays(feat, dtype)
    loss.eval()  # so that the state stays

    def total(feat):
        terms = loss.terms(score=feat["score_stu"], feat=feat, fea=None, target=target, epoch=meta["epoch"])
        return loss.weigh(terms), (terms, loss(feat=feat, target=target, epoch=meta["epoch"]))

    slope, (terms, value) = f.jit(f.grad(total, has_aux=True))(feat)
    value_limit, slope_limit = LIMITS[dtype]
    assert set(terms) == set(meta["terms"])
    for name, want in meta["terms"].items():
        assert f.numpy(terms[name]) == pytest.approx(want, rel=value_limit), name
    assert f.numpy(value) == pytest.approx(float(data["out_loss"]), rel=value_limit)
    for key in (key.removeprefix("grad_") for key in data if key.startswith("grad_")):
        got = slope["feats_stu"][int(key[-1])] if "feats" in key else slope[key]
        got = np.moveaxis(f.numpy(got), -1, 1) if "feats" in key and f is JAX else f.numpy(got)
        want = data[f"grad_{key}"]
        assert np.abs(got - want).max() <= slope_limit * np.abs(want).max(), key


ALL = "kd-dino-bce-mse-sml-dcn-crcd-rkd-diff-skld-kld-eu_mse-dkd-nkd-uskd-uskd_tea"


@both
def test_every_name_reads_what_the_table_says(f):
    kd = f.kd
    loss = kd.make_loss(configuration(ALL), CLASSES, 20)
    feat, target = batch(f)
    stu, tea, scores = feat["stu"], feat["tea"], (feat["score_stu"], feat["score_tea"])
    assert loss.losses["uskd_tea"].head is not loss.losses["uskd"].head
    label = feat["score_tea"].argmax(-1)
    centers = loss.losses["dcn"].centers[...]
    views = [x.reshape(2, BATCH // 2, DIM) for x in (stu, tea)]

    def wanted():
        return {
            "dino": kd.dino_loss(*views, kd.dino_init(DIM), teacher_temperature=0.04, student_temperature=0.1)[0],
            "bce": kd.bce_loss(stu, tea),
            "mse": kd.mse_loss(stu, tea),
            "sml": kd.smooth_l1_loss(stu, tea),
            "dcn": kd.dcn_loss(stu, tea, target, centers),
            "rkd": kd.hcl_loss(feat["feats_stu"], feat["feats_tea"][-2:]),
            "diff": kd.difference_kl_loss(*scores),
            "skld": kd.symmetric_kl_loss(*scores),
            "kld": kd.kl_loss(*scores),
            "eu_mse": kd.euclidean_mse_loss(stu, tea),
            "dkd": kd.dkd_loss(*scores, target, alpha=1.0, beta=1.0, temperature=1.0),
            "nkd": kd.nkd_loss(*scores, target, gamma=1.5, temperature=1.0),
            "uskd": kd.uskd_loss(feat["score_stu"], loss.losses["uskd"].head(feat["fea_stu"]), target),
            "uskd_tea": kd.uskd_loss(feat["score_stu"], loss.losses["uskd_tea"].head(feat["fea_stu"]), label),
        }

    want = f.jit(wanted)()  # eager JAX would compile every operation by itself
    loss.eval()  # so that the state stays

    def values(feat):
        terms = loss.terms(feat=feat, target=target, epoch=3)
        assert list(terms) == ALL.split("-")[1:]
        return terms

    terms = f.jit(values)(feat)
    for name, value in want.items():
        assert f.numpy(terms[name]) == pytest.approx(f.numpy(value), rel=1e-5), name
    assert np.isfinite(f.numpy(terms["crcd"]))


@both
def test_founding_conventions(f):
    kd, names = f.kd, "kd-kld-skld-eu_mse-crcd"
    feat, target = batch(f)
    del feat["index"]
    terms = kd.make_loss(configuration(names), CLASSES, 20, conventions="founding").terms(feat=feat, target=target)
    assert float(terms["kld"]) == pytest.approx(float(kd.kl_loss(feat["stu"], feat["tea"])) / DIM, rel=1e-5)
    scores = feat["score_stu"], feat["score_tea"]
    assert float(terms["skld"]) == pytest.approx(float(kd.kl_loss(*scores)) / CLASSES, rel=1e-5)
    assert float(terms["eu_mse"]) == pytest.approx(float(kd.euclidean_mse_loss(*scores)), rel=1e-5)
    assert np.isfinite(f.numpy(terms["crcd"]))  # target is the index


@both
def test_a_configuration_may_be_an_object(f):
    mapping = configuration("kd-kld-dkd", [1.0, 0.5], KD_LOSS_ARGS={"dkd": {"beta": 8.0, "temperature": 4.0}})
    objects = types.SimpleNamespace(
        MODEL=types.SimpleNamespace(**mapping["MODEL"]), SOLVER=types.SimpleNamespace(**mapping["SOLVER"])
    )
    feat, target = batch(f)
    values = [float(f.kd.make_loss(c, CLASSES, 20)(feat=feat, target=target)) for c in (mapping, objects)]
    scores = feat["score_stu"], feat["score_tea"]
    want = f.kd.kl_loss(*scores) + 0.5 * f.kd.dkd_loss(*scores, target, beta=8.0, temperature=4.0)
    assert values == pytest.approx([float(want)] * 2, rel=1e-6)


@both
def test_settings_reach_modules(f):
    config = configuration("kd-dino-crcd", KD_LOSS_ARGS={"dino": {"warmup_epochs": 3}, "crcd": {"num_negatives": 7}})
    loss = f.kd.make_loss(config, CLASSES, 20)
    assert loss.losses["dino"].warmup_epochs == 3
    assert loss.losses["crcd"].num_negatives == 7


@both
def test_state_moves_in_training_mode_only(f):
    loss = f.kd.make_loss(configuration("kd-dino-crcd"), CLASSES, 20)
    feat, target = batch(f)

    def state():
        dino, crcd = loss.losses["dino"], loss.losses["crcd"]
        return [f.numpy(x[...]).copy() for x in (dino.center, crcd.student_memory, crcd.teacher_normalizer)]

    before = state()
    loss.eval()
    loss(feat=feat, target=target, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(before, state(), strict=True))
    loss.train()
    loss(feat=feat, target=target, epoch=0)
    assert not any(np.array_equal(a, b) for a, b in zip(before, state(), strict=True))


def test_pure_step_in_jax():
    """Split outside, merged inside `jit` and `grad`: the state comes back, and a second call compiles nothing."""
    loss = JAX.kd.make_loss(configuration("kd-dino-crcd-dcn"), CLASSES, 20)
    feat, target = batch(JAX)
    graph, learned, state = nnx.split(loss, nnx.Param, ...)

    traces = []

    @jax.jit
    def step(learned, state, epoch):
        traces.append(1)

        def objective(learned):
            merged = nnx.merge(graph, learned, state)
            return merged(feat=feat, target=target, epoch=epoch), nnx.state(merged, nnx.Not(nnx.Param))

        return jax.value_and_grad(objective, has_aux=True)(learned)

    for epoch in range(3):
        (_, state), slope = step(learned, state, epoch)
    assert len(traces) == 1
    assert np.any(np.asarray(state["losses"]["dino"]["center"][...]) != 0)
    assert np.any(np.asarray(slope["losses"]["dcn"]["centers"][...]) != 0)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
@pytest.mark.parametrize(("number", "compilations"), [(torch.tensor, 1), (int, 2)])
def test_epochs_in_torch(number, compilations):
    """Other epochs and states compile nothing, but for the first other integer."""
    loss = TORCH.kd.make_loss(configuration("kd-dino-crcd-dcn"), CLASSES, 20)
    feat, target = batch(TORCH)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda epoch: loss(feat=feat, target=target, epoch=epoch), backend=counter)
    values = [step(number(epoch)).item() for epoch in range(5)]
    assert counter.frame_count == compilations
    assert len(set(values)) == 5


def test_state_dict_holds_the_state():
    config = configuration("kd-dino-crcd-dcn")
    loss, other = (TORCH.kd.make_loss(config, CLASSES, 20) for _ in range(2))
    feat, target = batch(TORCH)
    loss(feat=feat, target=target)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.losses["dino"].center, loss.losses["dino"].center)
    assert torch.equal(other.losses["crcd"].student_memory, loss.losses["crcd"].student_memory)


def changed(**model):
    return configuration("kd-kld-dkd") | {"MODEL": configuration("kd-kld-dkd")["MODEL"] | model}


def lacking(key, names):
    config = configuration(names)
    del config["MODEL"][key]
    return config


MISTAKES = {
    "unknown name": (
        changed(METRIC_LOSS_TYPE="kd-kld-dkf"),
        r"unknown loss 'dkf'; did you mean 'dkd'\? known are \['bce'",
    ),
    "name twice": (changed(METRIC_LOSS_TYPE="kd-kld-kld"), "names 'kld' more than once"),
    "no prefix": (changed(METRIC_LOSS_TYPE="kld-dkd"), "must begin with 'kd-', as in 'kd-dino-bce-dkd', got 'kld-dkd'"),
    "no name": (changed(METRIC_LOSS_TYPE="kd"), "must name at least one loss after 'kd-', of .*, got 'kd'"),
    "weights": (changed(KD_LOSS_WEIGHT=[1.0]), r"one number a loss: 2 for \['kld', 'dkd'\], got 1: \[1.0\]"),
    "no type": (lacking("METRIC_LOSS_TYPE", "kd-kld"), "has no MODEL.METRIC_LOSS_TYPE; MODEL has .*FEAT_DIM"),
    "no weights": (lacking("KD_LOSS_WEIGHT", "kd-kld"), "has no MODEL.KD_LOSS_WEIGHT; MODEL has"),
    "no width": (lacking("FEAT_DIM", "kd-dcn"), "has no MODEL.FEAT_DIM, which the loss 'dcn' needs; MODEL has"),
    "no feature width": (lacking("CLS_FEA_NUM", "kd-uskd"), "has no MODEL.CLS_FEA_NUM, which the loss 'uskd' needs"),
    "no model": ({"SOLVER": {}}, r"has no MODEL.METRIC_LOSS_TYPE; the configuration has \['SOLVER'\]"),
    "stray settings": (changed(KD_LOSS_ARGS={"nkd": {}}), r"must name losses of .*\['kld', 'dkd'\], got \['nkd'\]"),
    "another case": (changed(METRIC_LOSS_TYPE="kd-KLD-dkd"), "unknown loss 'KLD'; did you mean 'kld'?"),
    "one weight": (
        changed(KD_LOSS_WEIGHT=1.0),
        r"KD_LOSS_WEIGHT must be finite numbers, .* as in \[1.0, 0.5\], got 1.0",
    ),
    "weights in a string": (changed(KD_LOSS_WEIGHT="12"), "KD_LOSS_WEIGHT must be finite numbers, .*got '12'"),
    "weights by name": (
        changed(KD_LOSS_WEIGHT={"kld": 1.0}),
        "KD_LOSS_WEIGHT must be finite numbers, .*got {'kld': 1.0}",
    ),
    "a word for a weight": (changed(KD_LOSS_WEIGHT=[1.0, "b"]), r"must be finite numbers, .*got \[1.0, 'b'\]"),
    "a weight NaN": (changed(KD_LOSS_WEIGHT=[1.0, float("nan")]), r"must be finite numbers, .*got \[1.0, nan\]"),
    "no settings": (changed(KD_LOSS_ARGS=None), "KD_LOSS_ARGS must be a mapping, as in {'dkd': .*}, got None"),
    "a setting without a name": (
        changed(KD_LOSS_ARGS={"kld": 4.0}),
        r"KD_LOSS_ARGS\['kld'\] must be a mapping, as in {'temperature': 4.0}, got 4.0",
    ),
    "a width in a string": (
        configuration("kd-dino") | {"MODEL": configuration("kd-dino")["MODEL"] | {"FEAT_DIM": "8"}},
        "MODEL.FEAT_DIM must be a whole number of at least 1, got '8'",
    ),
    "unknown setting": (
        changed(KD_LOSS_ARGS={"dkd": {"T": 4.0}}),
        r"KD_LOSS_ARGS\['dkd'\] must have settings of \['alpha', 'beta', 'temperature'\], got \['T'\]",
    ),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_configuration(f, mistake):
    config, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        f.kd.make_loss(config, CLASSES, 20)


@both
def test_numbers_of_the_data(f):
    for numbers, message in (
        ((None, 20), "`num_classes` must be a whole number of at least 1, got None"),
        ((5, 0), "`num_data`"),
    ):
        with pytest.raises(ValueError, match=message):
            f.kd.make_loss(configuration("kd-dcn-crcd"), *numbers)


@both
def test_inputs_by_place(f):
    feat, target = batch(f)
    with pytest.raises(
        TypeError, match=r"`feat` must be a mapping of what the losses read, got int\d\d\[6\]; give it by name"
    ):
        f.kd.make_loss(configuration("kd-dkd"), CLASSES, 20)(feat, target)


@both
def test_unknown_conventions(f):
    with pytest.raises(ValueError, match=r"`conventions` must be one of \['published', 'founding'\], got 'paper'"):
        f.kd.make_loss(configuration("kd-kld"), CLASSES, 20, conventions="paper")


@both
@pytest.mark.parametrize(
    ("names", "missing", "message"),
    [
        (
            "kd-kld",
            "score_tea",
            r"the loss 'kld' reads `feat\['score_tea'\]`, which is absent; given are \['epoch', 'fea_stu'",
        ),
        ("kd-crcd", "index", r"the loss 'crcd' reads `feat\['index'\]`, which is absent"),
        ("kd-rkd", "feats_tea", r"the loss 'rkd' reads `feat\['feats_tea'\]`, which is absent"),
        ("kd-uskd_tea", "score_tea", r"the loss 'uskd_tea' reads `feat\['score_tea'\]`, which is absent"),
        ("kd-dkd", "target", "the loss 'dkd' reads `target`, which is absent"),
    ],
)
def test_missing_inputs(f, names, missing, message):
    feat, target = batch(f)
    feat.pop(missing, None)
    with pytest.raises(ValueError, match=message):
        f.kd.make_loss(configuration(names), CLASSES, 20)(feat=feat, target=None if missing == "target" else target)


@both
def test_an_odd_batch_is_not_two_views(f):
    feat, target = batch(f)
    feat |= {"stu": feat["stu"][:5], "tea": feat["tea"][:5]}
    with pytest.raises(
        ValueError, match=r"`student` must be \[views \* batch, dim\] with 2 views stacked .*got \[5, 8\]"
    ):
        f.kd.make_loss(configuration("kd-dino"), CLASSES, 20)(feat=feat, target=target)
