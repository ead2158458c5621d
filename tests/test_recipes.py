"""All recipes run as a user runs them, and do what their pages say."""

import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import kdjax
from kdjax import DINOState, crcd_init, crd_init, dino_init, ibot_init
from kdtorch import kl_loss

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
RECIPES = EXAMPLES / "recipes"
pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]  # trainings


@pytest.fixture(autouse=True)
def float64_in_jax():
    """Not for recipes, which run with the settings of a user; Optax's Adam relies on promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(RECIPES)
    monkeypatch.chdir(tmp_path)

    def run(name):
        names = runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
        assert "->" in capsys.readouterr().out
        return names

    return run


def falls(losses, to=0.3):
    first, last = float(losses[0]), float(np.mean([float(x) for x in losses[-5:]]))
    assert 0 < last < to * first


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_page_prints_it(recipe):
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "recipes").glob("*.md"))
    assert f'--8<-- "examples/recipes/{recipe.name}"' in pages
    assert f"`python examples/recipes/{recipe.name}`" in pages


def test_pytorch_as_a_script(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(RECIPES / "pytorch.py")]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    first, last, accuracy = map(float, re.findall(r"\d+\.\d+", text))
    assert last < 0.3 * first
    assert accuracy > 88


@pytest.mark.parametrize("name", ["flax_nnx", "flax_linen"])
def test_flax(name, run):
    names = run(name)
    falls(names["losses"])
    assert names["accuracy"] > 0.88


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_torch_compile(run):
    names = run("torch_compile")
    falls(names["losses"])
    eager, compiled = names["same"]
    assert compiled == pytest.approx(eager, rel=1e-5)


@pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:Found 5 module.s. in eval mode at the start of training")  # as intended
def test_lightning(run):
    names = run("lightning_module")
    falls(names["losses"])
    assert names["result"]["accuracy"] > 0.88
    assert not names["module"].teacher.training
    assert all(p.grad is None for p in names["module"].teacher.parameters())


def test_huggingface(run, offline):
    names = run("huggingface_trainer")
    falls(names["losses"])
    assert names["accuracy"] > 0.88
    assert names["trainer"].state.global_step == 160
    assert names["losses"][0] < 16  # the loss of a guess, so the accumulated loss is a mean, not a sum


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # restored after the recipe has set it


def test_huggingface_tokens(run, offline, tmp_path):
    names = run("huggingface_tokens")
    for before, after in names["results"].values():
        assert after < 0.5 * before
    student, texts = names["llama"](16, 1), sorted(names["TRAIN"], key=len)
    data = names["rows"](texts[:: len(texts) // 8][:8])
    lengths = [len(row["input_ids"]) for row in data]
    assert max(lengths) > 1.5 * min(lengths)  # the parts keep different numbers of tokens

    def moved(kind, parts):
        model = copy.deepcopy(student)
        settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
        settings |= {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        trainer = kind(model, names["arguments"](tmp_path, **settings), train_dataset=data, teacher=names["teacher"]())
        trainer.train()
        weights = zip(model.parameters(), student.parameters(), strict=True)
        return torch.cat([(after - before).detach().flatten() for after, before in weights])

    for kind in (names["DistillationTrainer"], names["HeadDistillationTrainer"]):
        whole = moved(kind, 1)
        assert whole.norm() > 0.1
        assert (moved(kind, 4) - whole).norm() < 1e-5 * whole.norm()

    # the mask: padding and tokens that the labels leave out contribute nothing
    trainer, batch = names["trainer"], names["collate"](data)
    alone = [names["collate"]([row]) for row in data]
    tokens = (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model, batch).item() * tokens.item()
        one_by_one = [trainer.compute_loss(trainer.model, x, num_items_in_batch=1).item() for x in alone]
        assert together == pytest.approx(sum(one_by_one), rel=1e-5)
        # the shift: the same from hidden states as from logits, which predict the next token
        logits, taught = (net(batch["input_ids"]).logits for net in (trainer.model, trainer.teacher))
        losses = kl_loss(logits, taught, temperature=2.0, reduction="none")
        predicting = [(i, t - 1) for i, row in enumerate(data) for t, x in enumerate(row["labels"]) if x != -100]
        assert together == pytest.approx(sum(losses[place].item() for place in predicting), rel=1e-5)


@pytest.mark.filterwarnings("ignore")  # TRL's own, and those of what it imports
def test_trl_gkd(run, offline):
    names = run("trl_gkd")
    theirs, ours = names["losses"].values()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert np.mean(ours[-5:]) < 0.6 * ours[0]
    weights = zip(*(model.parameters() for model in names["students"].values()), strict=True)
    assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in weights)
    (value, gradient), (ours, our_gradient) = names["values"].values()
    assert ours == pytest.approx(value, rel=1e-5)
    assert (our_gradient - gradient).norm() < 1e-5 * gradient.norm()
    theirs, ours = names["held"].values()
    assert ours < 80 < 500 < theirs  # the gradient takes 62.5


@pytest.mark.filterwarnings("ignore")
def test_trl_distillation(run, offline):
    names = run("trl_distillation")
    theirs, ours = names["losses"].values()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[-1] < 0.6 * ours[0]
    theirs, ours = names["values"].values()
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()
    assert names["held"]["kdtorch"] < 0.3 * names["held"]["TRL"]
    draw = torch.Generator().manual_seed(0)
    h, t, w, v = (torch.randn(*shape, generator=draw) for shape in [(2, 9, 5), (2, 9, 7), (11, 5), (11, 7)])
    bias, other_bias = torch.randn(2, 11, generator=draw)
    mask = torch.rand(2, 9, generator=draw) < 0.6
    for beta in (0.0, 0.3, 1.0):
        for options in ({}, {"temperature": 2.0, "num_items_in_batch": torch.tensor(30)}):
            options = {"student_lm_head_bias": bias, "teacher_lm_head_bias": other_bias} | options
            arguments = (h, t, w, v, mask, beta)
            theirs, _, number = names["theirs"](*arguments, **options)
            ours, _, same = names["ours"](*arguments, **options)
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
            assert same == number
    with pytest.raises(NotImplementedError, match="cap their logits"):
        names["ours"](h, t, w, v, mask, 0.5, student_final_logit_softcapping=30.0)


@pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:The '(train|test)_dataloader' does not have many workers")
def test_lightning_cache(run, tmp_path):
    names = run("lightning_cache")
    falls(names["losses"], 0.5)
    assert names["result"]["next_byte"] < 3
    student, teacher = names["Model"](8), names["teacher"]
    tokens = names["TOKENS"]
    cache = names["record"](tmp_path / "cache", teacher)

    def curve(parts):
        torch.manual_seed(0)
        module = names["Distillation"](copy.deepcopy(student))
        names["fit"](module, cache, parts, epochs=1)
        return torch.tensor(module.losses).view(-1, parts).sum(1)

    whole = curve(1)
    assert whole[-1] < 0.95 * whole[0]
    assert torch.allclose(curve(4), whole, rtol=1e-5)  # the parts keep different numbers of tokens

    index = torch.tensor([5, 300, 7])
    (part,) = names["read"](cache, 1, index.tolist())
    with torch.no_grad():
        logits, taught = student(tokens[index, :-1]), teacher(tokens[index, :-1])
        kept = tokens[index, 1:] > 0
        hard = names["next_byte"](logits, tokens[index], reduction="sum")
        full = kl_loss(logits, taught, temperature=names["T"], where=kept, reduction="sum")
        soft = names["Distillation"](student).total(**part) - hard
    assert 0.8 * full < soft < 1.001 * full  # less than with all logits, at the same positions


def test_nnx_mesh(run):
    names = run("nnx_mesh")
    falls(names["losses"], 0.5)
    student, teacher, loss = names["student"], names["teacher"], names["losses"][-1]
    assert loss.dtype == "float32"
    assert {x.dtype.name for x in jax.tree.leaves(student)} == {"float32"}
    assert student.layers[0].up.kernel[...].sharding.spec == P(None, "model")
    assert student.tokens.embedding[...].sharding.spec[0] == "model"
    tokens = jax.device_put(next(names["batches"](1, 2, 16)).astype("int32"), names["SPREAD"])
    assert tokens.addressable_shards[0].data.shape == (8, names["LENGTH"])
    with jax.set_mesh(names["MESH"]):
        (hidden, head), taught = names["ask"](student, tokens), names["ask"](teacher, tokens)
    assert hidden.dtype == head.dtype == taught[0].dtype == "bfloat16"

    def by_logits(hidden, head):
        logits, teacher_logits = hidden @ head.T, wide[2] @ wide[3].T
        return kdjax.kl_loss(logits, teacher_logits, temperature=2.0, where=kept, reduction="sum") / kept.sum()

    def spread(parts):
        def total(hidden, head):
            given = zip(*(jnp.split(x, parts) for x in (hidden, wide[2], kept)), strict=True)
            return sum(names["divergence"](h, head, t, wide[3], where) for h, t, where in given) / kept.sum()

        return jax.jit(jax.value_and_grad(total, (0, 1)))(*wide[:2])

    # on eight devices, as a whole and in parts, the results are those of one device with logits
    kept = np.asarray(tokens)[:, 1:] > 0
    wide = [np.asarray(x, "float32") for x in (hidden, head, *taught)]
    value, gradients = jax.jit(jax.value_and_grad(by_logits, (0, 1)))(*wide[:2])
    for parts in (1, 2):
        same, others = spread(parts)
        assert float(same) == pytest.approx(float(value), rel=1e-5)
        assert max(norm([x], [y]) / norm([x], [0 * x]) for x, y in zip(gradients, others, strict=True)) < 1e-5


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_tokenizers(framework, run):
    names = run(f"tokenizers_{framework}")
    for losses in names["losses"].values():
        falls(losses, 0.8)
    (before, hard), (_, both), (_, alone) = names["bits"].values()
    assert hard < 0.8 * before
    assert both < 0.8 * before
    assert alone > before  # ULD alone does not know which token is which
    assert names["blind"] < 1e-5
    # the logits that are compared follow the same text, and are not at its end
    student, teacher, text = names["STUDENT"], names["TEACHER"], names["TRAIN"][0]
    ours, theirs = student.encode(text).offsets, teacher.encode(text).offsets
    data = {name: x[0] for name, x in names["data"].items()}
    places = [data[f"{side}_places"][data["where"]] for side in ("student", "teacher")]
    assert len(places[0]) > 3
    for i, j in zip(*places, strict=True):
        assert ours[i][1] == theirs[j][1] == ours[i + 1][0] == theirs[j + 1][0] < len(text)
    ends = {end for _, end in ours} & {end for _, end in theirs}
    assert len(places[0]) == len(ends) - 1
    assert data["student"][: len(ours)].tolist() == student.encode(text).ids


def test_accumulation_torch(run):
    names = run("accumulation_torch")
    falls(names["losses"])
    off = {(loss.__name__, way.__name__): value for (loss, way), value in names["off"].items()}
    right = {("kl_loss", "sums"), ("kl_loss", "by_logits"), ("euclidean_mse_loss", "by_logits")}
    for key, value in off.items():
        assert value < 1e-5 if key in right else value > 0.1, key


def test_accumulation_jax(run):
    names = run("accumulation_jax")
    falls(names["losses"])
    assert max(names["errors"]["kl_loss"]) < 1e-5
    by_sums, by_logits = names["errors"]["euclidean_mse_loss"]
    assert by_sums > 0.1
    assert by_logits < 1e-5


def test_bfloat16_torch(run):
    names = run("bfloat16_torch")
    falls(names["losses"])
    assert names["accuracy"] > 0.88
    assert names["logits"].dtype == torch.bfloat16
    assert names["loss"].dtype == names["student"][1].weight.dtype == torch.float32
    assert names["loss"] == names["wide"]


def test_bfloat16_jax(run):
    names = run("bfloat16_jax")
    falls(names["losses"])
    assert names["accuracy"] > 0.88
    assert names["logits"].dtype == "bfloat16"
    assert names["loss"].dtype == names["student"].layers[1].kernel.dtype == "float32"


def test_reviewkd_torch(run):
    names = run("reviewkd_torch")
    falls(names["losses"], 0.1)
    assert names["accuracy"] > 0.85
    assert all(connector.norm1.num_batches_tracked == 96 for connector in names["review"].connectors)


def test_reviewkd_jax(run):
    names = run("reviewkd_jax")
    falls(names["losses"], 0.1)
    assert names["accuracy"] > 0.85
    assert all(abs(connector.norm1.mean[...]).max() > 0.01 for connector in names["model"].review.connectors)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_on_policy(framework, run):
    names = run(f"on_policy_{framework}")
    after = {name.rpartition(", ")[2]: x[1] for name, x in names["divergences"].items()}
    (before, _), _ = names["divergences"]["sampled tokens, the score"]
    assert after["reverse_kl_loss"][0] < after["the score"][0] < after["k3 direct"][0] < before / 2
    assert after["k3 direct"][1] < after["the score"][1]  # the other direction
    assert after["k1 direct"][0] > before  # it only adds noise
    exact, right = float(names["exact"]), np.asarray(names["right"])
    for (estimator, gradient), (mean, _, slope, _) in names["found"].items():
        if estimator != "k2":
            assert float(mean) == pytest.approx(exact, rel=1e-3)
        off = np.linalg.norm(np.asarray(slope) - right) / np.linalg.norm(right)
        assert off < 1e-3 if gradient == "score" or estimator == "k2" else off > 0.5, (estimator, gradient)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_served(framework, run):
    names = run(f"served_{framework}")
    falls(names["losses"], to=0.4)
    before, after = names["divergences"]
    assert after < before / 2
    assert len(names["cache"]) == len(names["LEARNED"])


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_minilm(framework, run):
    names = run(f"minilm_{framework}")
    falls(names["lessons"], to=0.6)
    falls(names["losses"], to=0.4)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_relations(framework, run):
    results = run(f"relations_{framework}")["results"]
    assert results
    for losses, accuracy in results.values():
        falls(losses, to=0.5)
        assert accuracy > 0.88


@pytest.mark.parametrize("name", ["features_nnx", "features_linen", "features_torch"])
def test_features(name, run):
    names = run(name)
    for term in ("attention", "cwd", "mse"):
        falls([terms[term] for terms in names["losses"]], 0.7)
    assert names["accuracy"] > 0.8


def norm(trees, others):
    return sum(float(((np.asarray(x) - np.asarray(y)) ** 2).sum()) for x, y in zip(trees, others, strict=True)) ** 0.5


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_dino(framework, run):
    names = run(f"dino_{framework}")
    falls(names["losses"][0])
    accuracies = names["accuracies"]
    assert min(accuracies["student"], accuracies["teacher"]) > accuracies["alone"] + 0.01

    def leaves(net):
        return jax.tree.leaves(net) if framework == "jax" else [p.detach() for p in net.parameters()]

    for alone, student, teacher in zip(names["alone"], names["students"], names["teachers"], strict=True):
        here, average = leaves(student), leaves(teacher)
        assert 0 < norm(here, average) < norm(here, leaves(alone)) / 2


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_dinov2(framework, run):
    """Features trained without labels, centred or balanced, are better than those of random weights."""
    names = run(f"dinov2_{framework}")
    for losses in (names["losses"], names["other_losses"]):
        assert np.isfinite(losses).all()
        assert np.mean(losses[-5:]) < 0.95 * losses[0]
    accuracies = names["accuracies"]
    assert min(accuracies["centre"], accuracies["assignments"]) > accuracies["untrained"] + 0.04


def test_training_nnx(run):
    """A resumed run has the same bits, but not without the centre; the average is useless without its statistics."""
    names = run("training_nnx")
    check_training(names)
    half, stop = names["HALF"], names["HALF"] + 3
    again = names["make_run"](seed=2)
    with names["ocp"].CheckpointManager(names["CHECKPOINTS"]) as manager:
        state = manager.restore(half, args=names["ocp"].args.StandardRestore(names["nnx"].state(again)))
    names["nnx"].update(again, state)
    assert names["train"](again, half, stop) == names["losses"][half:stop]
    names["nnx"].update(again, state)
    again["dino"].center[...] = 0 * again["dino"].center[...]
    assert names["train"](again, half, stop)[0] != names["losses"][half]


def test_training_linen(run):
    names = run("training_linen")
    check_training(names)
    half, stop = names["HALF"], names["HALF"] + 3
    restore = names["ocp"].args.StandardRestore(names["make_run"](seed=2))
    with names["ocp"].CheckpointManager(names["CHECKPOINTS"]) as manager:
        state = manager.restore(half, args=restore)
    assert type(state.loss_state) is DINOState
    assert type(names["raw"]["loss_state"]) is dict
    assert names["train"](state, half, stop)[1] == names["losses"][half:stop]
    assert names["train"](state.replace(loss_state=dino_init(10)), half, stop)[1][0] != names["losses"][half]
    centers = jax.tree.leaves(names["run"].params["dcn"])
    assert all(abs(x - y).max() > 0.01 for x, y in zip(centers, jax.tree.leaves(state.params["dcn"]), strict=True))


def test_training_torch(run):
    names = run("training_torch")
    check_training(names)
    half, stop = names["HALF"], names["HALF"] + 3
    again = names["make_run"](seed=2)
    assert names["restore"](again) == half
    assert names["train"](again, half, stop) == names["losses"][half:stop]
    names["restore"](again)
    again["dino"].center.zero_()
    assert names["train"](again, half, stop)[0] != names["losses"][half]
    assert names["run"]["scaler"].get_scale() > 1.0


def check_training(names):
    assert np.mean(names["losses"][-5:]) < 0.95 * names["losses"][0]  # although the weight of one part has grown
    accuracies = names["accuracies"]
    assert min(accuracies["student"], accuracies["average"]) > 0.5
    assert accuracies["parameters alone"] < 0.2  # chance is 0.1
    assert len(names["same"]) > 90
    assert all(names["same"])


def test_every_state_of_a_loss_is_rebuilt_from_what_orbax_returns(tmp_path):
    import orbax.checkpoint

    key = jax.random.key(0)
    states = [dino_init(3), ibot_init(3), crcd_init(key, 5, 2), crd_init(key, 5, 2)]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", {type(state).__name__: state for state in states})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states")
    for state in states:
        rebuilt = type(state)(**restored[type(state).__name__])
        for x, y in zip(rebuilt, state, strict=True):
            np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_distill_step(framework, run, tmp_path):
    logs = run(f"distill_step_{framework}")["logs"]
    source = (RECIPES / f"distill_step_{framework}.py").read_text()
    step = source[source.index("LOSSES = {") :].partition("return {")[0]
    assert len(step.splitlines()) <= 30  # with its losses
    written = EventAccumulator(
        str(tmp_path / "out" / "tensorboard" / f"distill_step_{framework}"), {"tensors": 0, "scalars": 0}
    )
    tags = written.Reload().Tags()
    weights = {"hard": 1, "dkd": 1, "attention": 100, "similarity": 1000}
    assert {*tags["tensors"], *tags["scalars"]} == {*weights, "total", "gradient", "agreement"} == logs[0].keys()
    for log in (logs[0], logs[-1]):
        assert log["total"] == pytest.approx(sum(weight * log[name] for name, weight in weights.items()), rel=1e-5)
    for name in (*weights, "total"):
        falls([log[name] for log in logs], 0.6)
    assert logs[-1]["agreement"] > 0.85


def test_equinox(run):
    names = run("equinox_student")
    falls(names["losses"])
    assert names["accuracy"] > 0.88


KERAS = """
import runpy, sys
import keras
names = runpy.run_path(sys.argv[1], run_name="__main__")
images, labels = map(keras.ops.convert_to_tensor, (names["images"], names["labels"]))
models = [names[name] for name in ("student", "teacher")]  # in this order
embeddings = [keras.Model(x.inputs, x.get_layer("embedding").output)(images) for x in models]
dkd = names["dkd_loss"](*(x(images) for x in models), labels, alpha=1.0, beta=2.0, temperature=2.0)
by_hand = dkd + 100 * names["similarity_loss"](*embeddings)
print(float(keras.ops.convert_to_numpy(by_hand)), names["report"]["distillation_loss"])
"""


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_keras(backend, tmp_path):
    """In a process of its own, because Keras reads its backend once; the total is that of the losses called
    directly."""
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning"]  # Keras' own use of NumPy
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{RECIPES}", "OMP_NUM_THREADS": "1"}
    environment |= {"KERAS_BACKEND": backend, "KERAS_HOME": str(tmp_path)}
    command += ["-c", KERAS, str(RECIPES / "keras_distiller.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last, accuracy, by_hand, reported = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert last < 0.2 * first
    assert accuracy > 88
    assert by_hand == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_make_loss(framework, run, tmp_path):
    names = run(f"make_loss_{framework}")
    assert names["accuracy"] > 0.88
    everything = {"scalars": 0, "tensors": 0}
    written = EventAccumulator(str(tmp_path / "out" / "tensorboard" / framework), everything).Reload()
    for name in ("dkd", "dcn", "eu_mse", "hard", "loss"):
        curve = [values[name] for values in names["losses"]]
        falls(curve)
        if framework == "torch":
            events = {x.step: x.value for x in written.Scalars(name)}
        else:
            events = {x.step: float(make_ndarray(x.tensor_proto)) for x in written.Tensors(name)}
        assert events[0] == pytest.approx(curve[0], rel=1e-6)
        assert len(curve) == max(events) + 1 > 90
