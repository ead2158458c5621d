"""make_loss: the values of the founding code, the published conventions, and mistakes in a configuration."""

import argparse
import collections
import dataclasses
import types
import typing

import jax
import numpy as np
import optax
import pytest
import torch
import torch._dynamo.testing
from flax import nnx
from frameworks import BOTH, JAX, TORCH, set_parameter
from test_golden import FILES, LIMITS, load
from tiers import first

import kdjax
import kdjax.nn
import kdtorch.nn
from kdjax.make_loss import PUBLISHED
from kdlosses.config import READS, by_function, parameters, read

pytestmark = pytest.mark.usefixtures("quick_compilation")
both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
torch_first = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
BATCH, DIM, WIDE, CLASSES = 6, 8, 10, 5


def batch(f, seed=0, dtype="float32"):
    """A `feat` and the target."""
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


@torch_first
@pytest.mark.parametrize("dtype", first(1, ["float64", "float32"]))
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


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
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


@pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)
def test_founding_conventions(f):
    kd, names = f.kd, "kd-kld-skld-eu_mse-crcd"
    feat, target = batch(f)
    del feat["index"]
    terms = kd.make_loss(configuration(names), CLASSES, 20, conventions="founding").terms(feat=feat, target=target)
    assert float(terms["kld"]) == pytest.approx(float(kd.kl_loss(feat["stu"], feat["tea"])) / DIM, rel=1e-5)
    scores = feat["score_stu"], feat["score_tea"]
    assert float(terms["skld"]) == pytest.approx(float(kd.kl_loss(*scores)) / CLASSES, rel=1e-5)
    assert float(terms["eu_mse"]) == pytest.approx(float(kd.euclidean_mse_loss(*scores)), rel=1e-5)
    assert np.isfinite(f.numpy(terms["crcd"]))  # the target is used as the index


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


@torch_first
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
    """With the module split outside and merged inside `jit` and `grad`, the state is returned; a second call compiles
    nothing."""
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


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@pytest.mark.parametrize(("number", "compilations"), first(1, [(torch.tensor, 1), (int, 2)]))
def test_epochs_in_torch(number, compilations):
    """Other epochs and states compile nothing, except the second integer."""
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
    "weights": (changed(KD_LOSS_WEIGHT=[1.0]), r"one number per loss: 2 for \['kld', 'dkd'\], got 1: \[1.0\]"),
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
    "an empty name at the end": (
        changed(METRIC_LOSS_TYPE="kd-kld-dkd-"),
        "has an empty name in 'kd-kld-dkd-'; write 'kd-kld-dkd'$",
    ),
    "an empty name": (
        changed(METRIC_LOSS_TYPE="kd--kld-dkd"),
        "has an empty name in 'kd--kld-dkd'; write 'kd-kld-dkd'$",
    ),
    "a function's name": (
        changed(METRIC_LOSS_TYPE="kd-kl_los"),
        r"unknown loss 'kl_los'; did you mean 'kl_loss'\? known are .* or any loss by the name of its function, such as 'kl_loss' or 'kl'$",
    ),
    "a founding name as a function": (
        changed(METRIC_LOSS_TYPE="kd-rkd_los"),
        "unknown loss 'rkd_los'; did you mean",
    ),
    "a founding name of another function": (
        changed(METRIC_LOSS_TYPE="kd-kld_loss"),
        "unknown loss 'kld_loss'; did you mean 'kld', which is `kl_loss`\\?",
    ),
    "a negative weight": (changed(KD_LOSS_WEIGHT=[1.0, -0.5]), r"finite numbers, none below 0, .*got \[1.0, -0.5\]"),
    "a weight in a string": (changed(KD_LOSS_WEIGHT=[1.0, "2"]), r"must be finite numbers, .*got \[1.0, '2'\]"),
    "a weight that is a switch": (changed(KD_LOSS_WEIGHT=[1.0, True]), r"must be finite numbers, .*got \[1.0, True\]"),
    "no weight at all": (changed(KD_LOSS_WEIGHT=[1.0, None]), r"must be finite numbers, .*got \[1.0, None\]"),
    "a setting that is a word": (
        changed(KD_LOSS_ARGS={"kld": {"temperature": "4"}}),
        r"KD_LOSS_ARGS\['kld'\]: kl_loss: `temperature` must be a number or .*, got '4'$",
    ),
    "a setting below 0": (
        changed(KD_LOSS_ARGS={"kld": {"temperature": -2}}),
        r"KD_LOSS_ARGS\['kld'\]: `temperature` must be finite and greater than 0, got -2$",
    ),
    "a setting of a module": (
        configuration("kd-dino", KD_LOSS_ARGS={"dino": {"student_temperature": "0.1"}}),
        r"KD_LOSS_ARGS\['dino'\]: `student_temperature` must be finite and greater than 0, got '0.1'$",
    ),
    "a choice": (
        configuration("kd-crcd", KD_LOSS_ARGS={"crcd": {"embed": "mlp"}}),
        r"KD_LOSS_ARGS\['crcd'\]: `embed` must be one of \"linear\", \"nonlinear\", \"none\", got 'mlp'$",
    ),
    "settings in a list": (changed(KD_LOSS_ARGS=["dkd"]), r"KD_LOSS_ARGS must be a mapping, as in .*, got \['dkd'\]"),
    "unknown setting": (
        changed(KD_LOSS_ARGS={"dkd": {"T": 4.0}}),
        r"KD_LOSS_ARGS\['dkd'\] must have settings of \['alpha', 'beta', 'temperature'\], got \['T'\]",
    ),
    "a setting without a default": (
        configuration("kd-taid"),
        r"KD_LOSS_ARGS\['taid'\] must give \['interpolation'\], which has no default, got \{\}$",
    ),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_configuration(f, mistake):
    config, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        f.kd.make_loss(config, CLASSES, 20)


def test_both_packages_say_the_same():
    for config, _ in MISTAKES.values():
        said = []
        for f in BOTH:
            with pytest.raises(ValueError) as raised:  # noqa: PT011, whose text is compared
                f.kd.make_loss(config, CLASSES, 20)
            said.append(str(raised.value))
        assert said[0] == said[1]


MODULES = ("dino", "ibot", "dcn", "crcd", "crd", "uskd")
PUBLIC = [name for name in kdjax.__all__ if name.endswith("_loss") and name != "make_loss"]
FOUNDING = [
    "dino",
    "bce",
    "mse",
    "sml",
    "dcn",
    "crcd",
    "rkd",
    "diff",
    "skld",
    "kld",
    "eu_mse",
    "dkd",
    "nkd",
    "uskd",
    "uskd_tea",
]


def numeric_settings(name):
    """The settings of a loss that are numbers."""
    term = {**by_function(kdjax, PUBLISHED, {}), **PUBLISHED}[name]
    return [p.name for p in parameters(term.loss).values() if isinstance(p.default, float) or p.annotation == "float"]


@pytest.mark.parametrize("name", [*FOUNDING, *PUBLIC])
def test_every_setting_is_checked_where_the_loss_is_built(name):
    """A bad number raises an error when the loss is built, with the same text in both packages."""
    for setting in numeric_settings(name):
        negative = [] if name == "alpha_beta_loss" else [-1.0]  # its exponents may be negative
        for wrong in ("4", None, float("nan"), float("inf"), *negative, [1.0]):
            said = []
            for f in BOTH:
                with pytest.raises(
                    ValueError, match=rf"^MODEL.KD_LOSS_ARGS\['{name}'\]: .*`{setting}` must be"
                ) as raised:
                    f.kd.make_loss(configuration(f"kd-{name}", KD_LOSS_ARGS={name: {setting: wrong}}), CLASSES, 20)
                said.append(str(raised.value))
            assert said[0] == said[1]
        for f in BOTH:
            least = 1.5 if setting in ("p", "p2") else 0.5  # powers are at least 1
            for right in (least, np.float32(least)):
                f.kd.make_loss(configuration(f"kd-{name}", KD_LOSS_ARGS={name: {setting: right}}), CLASSES, 20)


def given_by_name(f):
    """A `feat` with everything that any loss reads, and the target."""
    feat, target = batch(f)
    order = np.argsort(-f.numpy(feat["score_tea"]), -1)
    feat["indices"] = f.array(order[:, :3].copy())
    feat["values"] = f.array(np.take_along_axis(f.numpy(feat["score_tea"]), order[:, :3], -1), "float32")
    rest = np.take_along_axis(f.numpy(feat["score_tea"]), order[:, 3:], -1)
    feat["predicted_mean"] = feat["feats_stu"][-1]
    feat["log_scale"] = f.array(np.zeros(feat["feats_stu"][-1].shape[-1 if f is JAX else 1]), "float32")
    feat["rest"] = f.array(np.log(np.exp(rest).sum(-1)), "float32")
    rng = np.random.default_rng(1)
    feat |= {
        f"{k}_log_probs": f.array(-rng.exponential(size=BATCH), "float32") for k in ("student", "teacher", "behavior")
    }
    for side, which in (("student", "stu"), ("teacher", "tea")):
        feat[f"{side}_hidden"], feat[f"{side}_weight"] = feat[which], feat[which]
        feat[f"{side}_bias"] = f.array(np.zeros(BATCH), "float32")
    for side in ("stu", "tea"):
        feat[f"tokens_{side}"] = f.array(np.stack([f.numpy(feat[side])] * 3, 1) * np.arange(1, 4)[:, None], "float32")
    for side in ("stu", "tea"):
        feat[f"patches_{side}"] = f.array(np.stack(3 * [f.numpy(feat[side])], 1) * np.arange(1, 4)[:, None], "float32")
    return feat, target


@torch_first
def test_every_loss_by_its_function(f):
    """With and without `_loss`: the function with its own settings, whose parameters' names say what it reads."""
    feat, target = given_by_name(f)
    maps = {"student_maps": feat["feats_stu"], "teacher_maps": feat["feats_tea"][-2:]}
    maps |= {"student_map": feat["feats_stu"][-1], "teacher_map": feat["feats_tea"][-1]}
    known = {"student": feat["stu"], "teacher": feat["tea"], "labels": target, **maps, **feat}
    known |= {"student_logits": feat["score_stu"], "teacher_logits": feat["score_tea"]}
    plain = [name for name in PUBLIC if name.removesuffix("_loss") not in MODULES]
    shorts = [name.removesuffix("_loss") for name in plain if name.removesuffix("_loss") not in FOUNDING]
    given = {"taid_loss": {"interpolation": 0.4}, "minilm_loss": {"relation_heads": 2}}  # they have no default
    given |= {name.removesuffix("_loss"): settings for name, settings in given.items()}
    config = configuration("-".join(["kd", *plain, *shorts]), [1.0] * len(plain + shorts), KD_LOSS_ARGS=given)
    terms = f.jit(lambda feat: f.kd.make_loss(config, CLASSES, 20).terms(feat=feat, target=target))(feat)
    assert set(terms) == {*plain, *shorts}

    def wanted():
        values = {}
        for name in plain:
            function = getattr(f.kd, name)
            inputs = [p.name for p in parameters(function).values() if p.kind is not p.KEYWORD_ONLY]
            inputs = {"minilm_loss": ["tokens_stu", "tokens_tea"], "gram_loss": ["patches_stu", "patches_tea"]}.get(
                name, inputs
            )
            values[name] = function(*(known[key] for key in inputs), **given.get(name, {}))
        return values

    for name, value in f.jit(wanted)().items():
        for written in {name, name.removesuffix("_loss")} & terms.keys():
            assert f.numpy(terms[written]) == pytest.approx(f.numpy(value), rel=1e-5), written


@both
@pytest.mark.parametrize("conventions", ["published", "founding"])
def test_modules_by_the_functions_that_they_hold(f, conventions):
    for name in MODULES:
        losses = f.kd.make_loss(configuration(f"kd-{name}_loss"), CLASSES, 20, conventions=conventions).losses
        assert type(losses[f"{name}_loss"]).__name__.lower().startswith(("dynamic", name))
    feat, target = batch(f)
    published = f.kd.make_loss(configuration("kd-kl-kl_loss-kld"), CLASSES, 20, conventions=conventions)
    terms = published.terms(feat=feat, target=target)
    assert f.numpy(terms["kl"]) == f.numpy(terms["kl_loss"])
    assert (f.numpy(terms["kl"]) == f.numpy(terms["kld"])) == (conventions == "published")
    if conventions == "founding":  # by the name of its function, crcd reads the samples' indices
        with pytest.raises(ValueError, match=r"the loss 'crcd_loss' reads `feat\['index'\]`"):
            f.kd.make_loss(configuration("kd-crcd_loss"), CLASSES, 20, conventions="founding")(
                feat={k: x for k, x in feat.items() if k != "index"}, target=target
            )


@both
def test_an_input_that_may_be_absent(f):
    feat, target = given_by_name(f)
    del feat["rest"]
    settings = {"topk_kl": {"tail": "renormalize"}}
    got = f.kd.make_loss(configuration("kd-topk_kl", KD_LOSS_ARGS=settings), CLASSES, 20)(feat=feat, target=target)
    want = f.kd.topk_kl_loss(feat["score_stu"], feat["values"], feat["indices"], tail="renormalize")
    assert f.numpy(got) == pytest.approx(f.numpy(want), rel=1e-6)
    with pytest.raises(ValueError, match="rest"):
        f.kd.make_loss(configuration("kd-topk_kl"), CLASSES, 20)(feat=feat, target=target)


@both
def test_a_setting_of_an_input_that_may_be_absent(f):
    feat, target = given_by_name(f)
    bounded = configuration("kd-sampled_kl", KD_LOSS_ARGS={"sampled_kl": {"max_ratio": 1.5}})
    samples = [feat[f"{name}_log_probs"] for name in ("student", "teacher", "behavior")]
    got = f.kd.make_loss(bounded, CLASSES, 20)(feat=feat, target=target)
    assert f.numpy(got) == pytest.approx(f.numpy(f.kd.sampled_kl_loss(*samples, max_ratio=1.5)), rel=1e-6)
    del feat["behavior_log_probs"]
    got = f.kd.make_loss(configuration("kd-sampled_kl"), CLASSES, 20)(feat=feat, target=target)
    assert f.numpy(got) == pytest.approx(f.numpy(f.kd.sampled_kl_loss(*samples[:2])), rel=1e-6)
    with pytest.raises(ValueError, match="`behavior_log_probs` must be given with `max_ratio`, got None"):
        f.kd.make_loss(bounded, CLASSES, 20)(feat=feat, target=target)
    settings = {"sampled_kl": {"estimator": "k4"}}
    with pytest.raises(ValueError, match=r"KD_LOSS_ARGS\['sampled_kl'\]: `estimator` must be one of .*, got 'k4'$"):
        f.kd.make_loss(configuration("kd-sampled_kl", KD_LOSS_ARGS=settings), CLASSES, 20)


def test_a_state_that_no_module_holds():
    def toy_loss(student, teacher, state, *, momentum=0.9):
        return student, state

    package = types.SimpleNamespace(__all__=["toy_loss", "make_loss"], toy_loss=toy_loss)
    functions = by_function(package, {}, READS)
    assert set(functions) == {"toy_loss", "toy"}
    with pytest.raises(
        ValueError, match="the loss 'toy' takes a state and returns the next one, but no module holds it"
    ):
        read(configuration("kd-toy"), {}, functions, {})


class ConfigDict:
    """Like that of ml_collections: it has entries by keys and by attributes, but is not a mapping."""

    def __init__(self, entries):
        self._fields = entries

    def __getitem__(self, key):
        return self._fields[key]

    def __getattr__(self, key):
        return self._fields[key]

    def keys(self):
        return list(self._fields)

    def __iter__(self):
        return iter(self._fields)


@dataclasses.dataclass
class Settings:
    dkd: typing.Any
    kld: typing.Any

    def method(self):
        """Not a setting."""


class Triple(typing.NamedTuple):
    temperature: float
    beta: float
    alpha: float


class Constants:
    """Settings as attributes of a class."""

    temperature = 4.0
    beta, alpha = 8.0, 1.0


def nested(of, entries):
    return of({key: nested(of, x) if isinstance(x, dict) else x for key, x in entries.items()})


KINDS = {
    "dict": dict,
    "Namespace": lambda x: argparse.Namespace(**x),
    "SimpleNamespace": lambda x: types.SimpleNamespace(**x),
    "ConfigDict": ConfigDict,
    "mapping": types.MappingProxyType,
    "dataclass": lambda x: dataclasses.make_dataclass("Made", list(x))(**x),
    "slots": lambda x: dataclasses.make_dataclass("Made", list(x), slots=True)(**x),
    "named tuple": lambda x: collections.namedtuple("Made", x)(**x),
}


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", [*KINDS, None])
def test_settings_may_be_objects(f, kind, outer):
    """The whole configuration of one kind of object, or its settings of another kind."""
    settings = {"dkd": {"beta": 8.0, "temperature": 4.0, "alpha": 1.0}, "kld": {"temperature": 2.0}}
    config = configuration("kd-kld-dkd", [1.0, 0.5], KD_LOSS_ARGS=nested(KINDS[kind], settings))
    if outer is not None:
        config["MODEL"] = KINDS[outer](config["MODEL"])
    loss = f.kd.make_loss(config, CLASSES, 20)
    assert dict(loss.losses["dkd"].options) == settings["dkd"]
    assert dict(loss.losses["kld"].options) == settings["kld"]


@both
@pytest.mark.parametrize("given", [Triple(4.0, 8.0, 1.0), Constants, Constants()], ids=["tuple", "class", "instance"])
def test_settings_of_other_kinds(f, given):
    loss = f.kd.make_loss(configuration("kd-kld-dkd", KD_LOSS_ARGS=Settings(dkd=given, kld={})), CLASSES, 20)
    assert dict(loss.losses["dkd"].options) == {"temperature": 4.0, "beta": 8.0, "alpha": 1.0}


def warm_up(epoch):
    return min(epoch / 20, 1.0)


@torch_first
def test_weights_that_are_functions_of_the_epoch(f):
    feat, target = batch(f)
    schedules = [optax.linear_schedule(0.0, 2.0, 10), warm_up, lambda epoch: f.array(np.array(0.5)), 3]
    loss = f.kd.make_loss(configuration("kd-kld-dkd-mse-nkd", schedules), CLASSES, 20)
    terms = {name: f.numpy(x) for name, x in loss.terms(feat=feat, target=target).items()}
    for epoch in (0, 5, 40):
        weights = [min(epoch / 5, 2.0), min(epoch / 20, 1.0), 0.5, 3]
        want = sum(weight * terms[name] for weight, name in zip(weights, terms, strict=True))
        assert f.numpy(loss(feat=feat, target=target, epoch=epoch)) == pytest.approx(want, rel=1e-5)
        assert f.numpy(loss.weigh(loss.terms(feat=feat, target=target), epoch)) == pytest.approx(want, rel=1e-5)
    for call in (lambda: loss(feat=feat, target=target), lambda: loss.weigh(terms)):
        with pytest.raises(
            ValueError, match="the weight of 'kld' is a function of the epoch, which is missing; give `epoch`"
        ):
            call()
    falling = f.kd.make_loss(configuration("kd-kld", [lambda epoch: 1.0 - epoch]), CLASSES, 20)
    with pytest.raises(ValueError, match=r"the weight of 'kld' must be finite and at least 0, got -1\.0 at epoch 2"):
        falling(feat=feat, epoch=2)


def test_a_schedule_of_a_traced_epoch():
    """There is one program for all epochs, in both frameworks."""
    feat, target = batch(JAX)
    config = configuration("kd-kld-dkd", [1.0, optax.linear_schedule(0.0, 1.0, 20)])
    loss, traces = JAX.kd.make_loss(config, CLASSES, 20), []
    step = jax.jit(lambda epoch: traces.append(1) or loss(feat=feat, target=target, epoch=epoch))
    values = [float(step(epoch)) for epoch in (0, 10, 20, 30)]
    assert len(traces) == 1
    assert values[2] == values[3]
    assert values[1] - values[0] == pytest.approx(values[2] - values[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_a_schedule_of_an_epoch_that_is_a_tensor():
    feat, target = batch(TORCH)
    config = configuration("kd-kld-dkd", [1.0, lambda epoch: (epoch / 20).clamp(max=1.0)])
    loss = TORCH.kd.make_loss(config, CLASSES, 20)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda epoch: loss(feat=feat, target=target, epoch=epoch), backend=counter, fullgraph=True)
    values = [step(torch.tensor(epoch)).item() for epoch in (0, 10, 20, 30)]
    assert counter.frame_count == 1
    assert values[2] == values[3]
    assert values[1] - values[0] == pytest.approx(values[2] - values[1], rel=1e-4)


@both
def test_a_weight_of_0_takes_a_loss_away(f):
    """Even an infinite loss, for example at the start of a warm-up."""
    loss = f.kd.make_loss(configuration("kd-kld-mse", [lambda epoch: 0.0, 1.0]), CLASSES, 20)
    feat, _ = batch(f)
    score = f.numpy(feat["score_stu"]).copy()
    score[:, 0] = -np.inf
    feat["score_stu"] = f.array(score, "float32")
    assert np.isinf(f.numpy(loss.terms(feat=feat)["kld"]))
    assert f.numpy(loss(feat=feat, epoch=0)) == f.numpy(loss.terms(feat=feat)["mse"])


@pytest.mark.slow
@both
def test_a_mask_and_a_reduction_for_the_losses_that_take_them(f):
    """They are passed to losses that have these parameters: all losses of this library, and others with these names."""
    feat, target = batch(f)
    names = "kd-bce-mse-sml-dcn-crcd-rkd-diff-skld-kld-eu_mse-dkd-nkd-uskd-uskd_tea-dino"
    loss = f.kd.make_loss(configuration(names), CLASSES, 20)
    loss.eval()
    rows = np.array([True, False, True, True, False, True])
    broken = {
        k: [spoilt(f, y, rows) for y in x] if isinstance(x, list) else spoilt(f, x, rows) for k, x in feat.items()
    }

    def values(options):
        torch.manual_seed(0)  # for the negatives
        return loss.terms(feat=broken, target=target, where=f.array(rows), **options)

    each, mean = f.jit(lambda: [values({"reduction": reduction}) for reduction in ("none", None)])()
    for name in names.split("-")[1:]:
        kept = f.numpy(each[name])
        assert kept.shape == ((3,) if name == "dino" else (BATCH,))
        number = 2 if name == "dino" else rows.sum()  # both views of two pairs are kept
        assert np.isfinite(kept).all(), name
        assert kept.sum() / number == pytest.approx(f.numpy(mean[name]), rel=1e-4), name

    with pytest.raises(
        ValueError, match=r"must give values of one shape to be summed, got .*'dino': \[3\].*use `terms`"
    ):
        loss(feat=broken, target=target, where=f.array(rows), reduction="none", epoch=0)
    plain = f.kd.make_loss(configuration("kd-kld-mse", [1.0, 2.0]), CLASSES, 20)
    got = plain(feat=feat, reduction="none", where=f.array(rows))
    want = plain.terms(feat=feat, reduction="none", where=f.array(rows))
    np.testing.assert_allclose(f.numpy(got), f.numpy(want["kld"]) + 2 * f.numpy(want["mse"]), rtol=1e-6)


def spoilt(f, x, rows):
    """x with NaN where the mask is False."""
    x = f.numpy(x)
    keep = rows.reshape(-1, *[1] * (x.ndim - 1))
    return f.array(np.where(keep, x, np.nan), "float32") if x.dtype.kind == "f" else f.array(x)


@both
def test_a_loss_without_the_parameters_gets_none_of_them(f):
    nn = kdjax.nn if f is JAX else kdtorch.nn

    def own(student, teacher):
        return ((student - teacher) ** 2).mean()

    def reduced(student, teacher, reduction="mean"):
        return {"sum": (student - teacher).sum(), "mean": (student - teacher).mean()}[reduction]

    losses = {
        "own": nn.FunctionLoss(own),
        "reduced": nn.FunctionLoss(reduced),
        "kept": nn.FunctionLoss(f.kd.kl_loss, reduction="sum"),
    }
    loss = nn.CombinedLoss(losses, [1.0] * 3, [("stu", "tea")] * 3)
    feat, _ = batch(f)
    where = f.array(np.ones(BATCH, bool))
    terms = loss.terms(feat=feat, where=where, reduction="sum", update=False)
    stu, tea = feat["stu"], feat["tea"]
    assert f.numpy(terms["own"]) == pytest.approx(f.numpy(own(stu, tea)))
    assert f.numpy(terms["reduced"]) == pytest.approx(f.numpy((stu - tea).sum()))
    assert f.numpy(loss.terms(feat=feat)["kept"]) == pytest.approx(f.numpy(f.kd.kl_loss(stu, tea, reduction="sum")))
    assert f.numpy(loss.terms(feat=feat, reduction="mean")["kept"]) == pytest.approx(f.numpy(f.kd.kl_loss(stu, tea)))


@both
@pytest.mark.parametrize(
    ("weights", "reads", "message"),
    [
        ([1.0], 2, r"^`weights` must have one number per loss: 2 for \['a', 'b'\], got 1: \[1.0\]$"),
        ([1.0, 2.0, 3.0], 2, r"^`weights` must have one number per loss: 2 for .*, got 3"),
        ([1.0, -1.0], 2, r"^`weights` must be finite numbers, none below 0, .* got \[1.0, -1.0\]$"),
        (1.0, 2, "^`weights` must be finite numbers, .* got 1.0$"),
        ([1.0, 1.0], 1, r"^`reads` must have one tuple per loss, .*, 2 for \['a', 'b'\], got \[\('stu', 'tea'\)\]$"),
        ([1.0, 1.0], 3, "^`reads` must have one tuple per loss"),
    ],
)
def test_weights_and_reads_of_a_combined_loss(f, weights, reads, message):
    nn = kdjax.nn if f is JAX else kdtorch.nn
    losses = {name: nn.FunctionLoss(f.kd.mse_loss) for name in "ab"}
    with pytest.raises(ValueError, match=message):
        nn.CombinedLoss(losses, weights, [("stu", "tea")] * reads)
    with pytest.raises(ValueError, match="`reads` must have one tuple per loss"):
        nn.CombinedLoss(losses, [1.0, 1.0], ["stu", "tea"])


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
        TypeError,
        match=r"`feat` must be a mapping from names to the inputs of the losses, got int\d\d\[6\]; give it by name",
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
            r"the loss 'kld' reads `feat\['score_tea'\]`, which is missing; given are \['epoch', 'fea_stu'",
        ),
        ("kd-crcd", "index", r"the loss 'crcd' reads `feat\['index'\]`, which is missing"),
        ("kd-rkd", "feats_tea", r"the loss 'rkd' reads `feat\['feats_tea'\]`, which is missing"),
        ("kd-uskd_tea", "score_tea", r"the loss 'uskd_tea' reads `feat\['score_tea'\]`, which is missing"),
        ("kd-dkd", "target", "the loss 'dkd' reads `target`, which is missing"),
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
