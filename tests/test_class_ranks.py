"""Ranks that share the classes give the results of one: all losses with `class_group`, communication, and errors."""

import functools

import class_ranks
import numpy as np
import pytest
import torch
from class_ranks import FORMS, OF_LOGITS, PARTS, TAKE, alone, close, each_row, hostile, part, transformed
from ranks import tensors
from test_ranks import start

import kdtorch
from parity.cases import KINDS, Sizes, draw
from parity.compare import ulps

pytestmark = pytest.mark.slow  # processes


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    start(class_ranks.every_loss, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def same_gradients(loss, got, want, rank, sizes):
    for name, b in part(loss, want["gradients"], rank, sizes).items():
        a, largest = got["gradients"][name], want["gradients"][name].abs().max()
        assert (a - b).abs().max() <= 256 * torch.finfo(b.dtype).eps * largest


@pytest.mark.parametrize("masked", [False, True], ids=["all", "uneven mask"])
@pytest.mark.parametrize(("loss", "i"), FORMS, ids=lambda x: getattr(x, "title", None))
def test_every_loss(loss, i, masked, results):
    """Every rank has the whole value and temperature gradient, and its part of the gradient of the logits."""
    want = alone(loss, i, masked)
    assert want["temperature"] != 0
    for name, sizes in PARTS[len(results)].items():
        for rank, result in enumerate(results):
            got = result[loss.title, i, name, masked]
            assert got["value"].equal(results[0][loss.title, i, name, masked]["value"])
            assert ulps(got["value"], want["value"], "float64") <= 64
            assert ulps(got["temperature"], want["temperature"], "float64") <= 256
            same_gradients(loss, got, want, rank, sizes)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    start(class_ranks.batch_by_classes, 4, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_batch_by_classes(loss, mesh):
    """The mean over the ranks of the batch is the whole loss, as without `class_group`."""
    want, got = alone(loss, len(loss.options) - 1, True), [x[loss.title] for x in mesh]
    assert ulps(np.mean([x["value"] for x in got]), want["value"], "float64") <= 64
    assert ulps(np.mean([x["temperature"] for x in got]), want["temperature"], "float64") <= 256
    for classes in range(2):
        first, second = got[classes], got[2 + classes]
        together = {}
        for k in loss.learns:
            pair = first["gradients"][k], second["gradients"][k]
            together[k] = sum(pair) / 2 if KINDS[loss.inputs[k]].axis is None else torch.cat(pair) / 2
        same_gradients(loss, {"gradients": together}, want, classes, [3, 5])


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laws")
    start(class_ranks.laws_and_mistakes, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
def test_laws(loss, dtype, second):
    """Equal rows give exactly 0, padding contributes nothing, large logits stay finite; also in half precision."""
    want, slope = each_row(loss, *(x.to(dtype) for x in hostile()))
    got = [x["hostile", loss.title, str(dtype)] for x in second]
    gradient, others = torch.cat([x[1] for x in got], -1), [1, 2, 4, 5, 6, 7]
    for value, part_of_gradient in got:
        assert part_of_gradient.dtype == dtype
        assert value.isfinite().all()
        assert (value[[0, 3]] == 0).all()
        assert close(value[others], want[others], 64, torch.float32)
    assert (gradient[[0, 3]] == 0).all()
    assert (gradient[2, 7:] == 0).all()
    assert close(gradient[others], slope[others], 256 if dtype == torch.float32 else 4, dtype)


@pytest.mark.parametrize("loss", TAKE, ids=lambda loss: loss.title)
def test_what_is_sent(loss, second):
    """A few numbers for each of 16 examples, for any number of classes; and a gradient of hidden states."""
    hidden = sum(16 * Sizes().dim for k in loss.learns if loss.inputs[k] == "hidden")
    for result in second:
        few, many = result["counted", loss.title]
        assert few == many <= 16 * 32 + hidden  # half of them for the temperature's gradient


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@pytest.mark.parametrize("loss", [x for x in TAKE if "logits" in x.inputs.values()], ids=lambda loss: loss.title)
def test_transforms(loss, second):
    """torch.func.grad, vmap, both, and torch.compile without a graph break."""
    inputs = tensors(draw(loss, Sizes((4,), 8), 0)[0])
    for name, want in transformed(loss, inputs, lambda x: x):
        for rank, result in enumerate(second):
            for a, b in zip(result["transformed", loss.title, name], want, strict=True):
                own = b.split([3, 5], -1)[rank] if b.shape[-1:] == (8,) else b
                assert (a - own).abs().max() <= 256 * torch.finfo(b.dtype).eps * b.abs().max()


OF_ALL = {
    "rows": "ValueError: the ranks of `class_group` must hold the same examples, got {} on rank {} and {} on rank {}; give each",
    "no class": "ValueError: every rank of `class_group` must have a class, got none on rank 1; divide the classes among fewer",
    "one group": "ValueError: `class_group` must be another process group than `group`, got ranks [0, 1] and [0, 1]; the first",
    "second": "NotImplementedError: this loss of kdtorch has no second derivative with `class_group`; kdjax has it",
}


@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
@pytest.mark.parametrize("mistake", OF_ALL)
def test_mistakes(mistake, loss, second):
    for rank, result in enumerate(second):
        text = OF_ALL[mistake].format(*((4, 0, 3, 1) if rank == 0 else (3, 1, 4, 0)))
        assert result[f"{mistake} {loss.name}"].startswith(text)


@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
def test_a_temperature_that_learns_under_a_compiler(loss, second):
    for result in second:
        assert (
            "under torch.compile a temperature has no gradient with `class_group`; give temperature.detach()"
            in (result[f"compiled temperature {loss.name}"])
        )


@pytest.mark.parametrize(
    ("mistake", "text"),
    {
        "index": "IndexError: `indices` must be in 0 .. 11, got 12; mask",
        "negative": "IndexError: `indices` must be in 0 .. 11, got -1; mask",
        "inside": "",
        "many": "ValueError: `indices` must hold from 1 to 12 classes an example, as many as there are, got 13",
        "no rest": '`ValueError: `rest` must be given with tail="bucket" where 3 of 12 classes are kept, got None'[1:],
        "DTensors": "TypeError: kl_loss: `class_group` must be None together with the DTensor `student_logits`, which holds all",
        "combined mistake": "ValueError: the loss 'dkd' has no `class_group`, because it needs all classes of an example in one",
    }.items(),
)
def test_mistakes_of_one(mistake, text, second):
    for result in second:
        assert result[mistake].startswith(text)
        assert bool(result[mistake]) == bool(text)


def test_a_group_without_this_rank(second):
    assert second[0]["not a member"].startswith("TypeError: kl_loss: `class_group` must be ProcessGroup | None, got ")


def test_a_combined_loss_hands_the_group_on(second):
    for result in second:
        torch.testing.assert_close(*result["combined"])


@pytest.mark.parametrize("loss", OF_LOGITS, ids=lambda loss: loss.title)
def test_a_group_that_is_not_initialised(loss):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
    function = functools.partial(getattr(kdtorch, loss.name), torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(
        ValueError, match=r"`class_group` must be a process group of torch\.distributed, which is not init"
    ):
        function(class_group=group)


@pytest.mark.parametrize("name", ["dkd_loss", "difference_kl_loss", "tvd_loss", "skew_kl_loss"])
def test_a_loss_that_needs_all_classes(name):
    for option in ("class_axis_name", "class_group"):
        with pytest.raises(
            TypeError, match=rf"^{name}: got an unexpected keyword argument '{option}'; it needs all class"
        ):
            getattr(kdtorch, name)(torch.ones(2, 3), torch.ones(2, 3), **{option: None})


def test_the_name_of_the_other_package():
    with pytest.raises(TypeError, match=r"'class_axis_name'; write `class_group`$"):
        kdtorch.kl_loss(torch.ones(2, 3), torch.ones(2, 3), class_axis_name="model")
