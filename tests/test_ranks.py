"""Several ranks of a process group give the results of one: all losses of the table, and errors."""

import functools
import signal

import numpy as np
import pytest
import ranks
import torch
import torch.multiprocessing
from spread import UNEVEN, part, spread

import kdtorch
from parity.cases import KINDS, LOSSES
from parity.compare import ulps

pytestmark = pytest.mark.slow  # processes


def start(function, number, folder, *arguments):
    torch.multiprocessing.start_processes(
        function, (number, str(folder), *arguments), nprocs=number, start_method="spawn"
    )


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    """The results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    start(ranks.every_loss, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@functools.cache
def alone(title, masked):
    loss = next(x for x in LOSSES if x.title == title)
    return ranks.steps_of(loss, UNEVEN if masked else None, None)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "uneven"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
def test_every_loss(loss, masked, results):
    """The mean over ranks is the loss of the whole batch, DistributedDataParallel's gradients are its gradients, and
    the states are equal."""
    number = len(results)
    for i, want in enumerate(alone(loss.title, masked)):
        got = [result[loss.title, masked][i] for result in results]
        assert ulps(np.mean([x["value"] for x in got]), want["value"], "float64") <= 64
        for x in got:
            for a, b in zip(x["parameters"], want["parameters"], strict=True):
                assert ulps(a, b, "float64") <= 256
            for a, b, first in zip(x["state"], want["state"], got[0]["state"], strict=True):
                assert ulps(a, b, "float64") <= 64
                assert a.equal(first)
        axes = [
            KINDS[loss.inputs[k]].axis for k in loss.learns if spread(loss, k) for _ in ranks.as_list(want["inputs"])
        ]
        for j, b in enumerate(want["inputs"]):
            for rank, x in enumerate(got):
                largest = b.abs().max()
                difference = (
                    (x["inputs"][j] / number - torch.from_numpy(part(b.numpy(), axes[j], rank, number))).abs().max()
                )
                assert difference <= 256 * torch.finfo(b.dtype).eps * largest


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    start(ranks.what_goes_wrong, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [loss.name for loss in ranks.OF_TWO])
def test_batches_of_different_sizes(name, wrong):
    """All ranks raise an error that names both sizes."""
    for rank, result in enumerate(wrong):
        here, there = (3, 2) if rank == 0 else (2, 3)
        assert result[f"sizes {name}"].startswith(
            f"ValueError: the ranks of `group` must have batches of the same size, got {here} on rank {rank} and {there} on rank "
            f"{1 - rank}; pad the smaller ones, and mask"
        )


def test_a_group_without_this_rank(wrong):
    assert wrong[0]["no member"].startswith("TypeError: kl_loss: `group` must be ProcessGroup | None, got ")


@pytest.mark.parametrize("name", [loss.name for loss in ranks.WITH_STATE])
def test_one_rank_with_nan(name, wrong):
    """The loss of the batch is NaN; the states stay finite, and equal on all ranks."""
    assert np.isnan(np.mean([x[f"nan {name}"]["value"] for x in wrong]))
    for a, b in zip(wrong[0][f"nan {name}"]["after"], wrong[1][f"nan {name}"]["after"], strict=True):
        assert a.isfinite().all()
        assert a.equal(b)


@pytest.mark.parametrize("name", [loss.name for loss in ranks.WITH_STATE])
def test_a_rank_without_examples(name, wrong):
    """A masked rank contributes nothing; if all are masked, the loss is 0 and the state does not change."""
    masked, nothing = ([x[f"{kind} {name}"] for x in wrong] for kind in ("masked", "nothing"))
    assert masked[0]["value"] > 0
    assert masked[1]["value"] == 0
    assert all((g == 0).all() for g in masked[1]["gradients"])
    assert all(a.equal(b) for a, b in zip(masked[0]["after"], masked[1]["after"], strict=True))
    for x in nothing:
        assert x["value"] == 0
        assert all(a.equal(b) for a, b in zip(x["before"], x["after"], strict=True))


@pytest.mark.parametrize("name", [loss.name for loss in ranks.OF_TWO])
def test_empty_batches(name, wrong):
    assert [x[f"empty {name}"] for x in wrong] == [0, 0]


@pytest.mark.parametrize("name", [loss.name for loss in ranks.WITH_STATE])
def test_no_update(name, wrong):
    for x in wrong:
        assert x[f"no update {name}"]["same"]
        assert not x[f"update {name}"]["same"]
        assert x[f"no update {name}"]["value"] == x[f"update {name}"]["value"]


@pytest.mark.parametrize("name", [loss.name for loss in ranks.REMEMBER])
@pytest.mark.parametrize("places", ["uniform", "skewed"])
def test_memories_in_shards(name, places, wrong):
    """Each rank holds its rows of the memories."""
    shards, whole = ([x[f"{places} {name} {sharded}"] for x in wrong] for sharded in (True, False))
    for a, b in zip(shards, whole, strict=True):
        assert ulps(a["value"], b["value"], "float64") <= 64
        for x, y in zip(a["gradients"], b["gradients"], strict=True):
            assert ulps(x, y, "float64") <= 256
    for i in range(4):
        rows = [x["after"][i] for x in shards]
        together = torch.cat(rows) if rows[0].ndim else rows[0]
        assert ulps(together, whole[0]["after"][i], "float64") <= 64


def test_modules_carry_their_state(wrong):
    """The centre is in the state_dict, equal on all ranks, and is updated once for two micro-batches."""
    centers = [x["module"]["loss.center"] for x in wrong]
    assert centers[0].equal(centers[1])
    teachers = [torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(rank)).double()[1] for rank in range(2)]
    assert ulps(centers[0], 0.1 * torch.cat(teachers).mean(0), "float64") <= 64
    fresh = ranks.Distiller()
    fresh.load_state_dict(wrong[0]["module"])
    assert fresh.loss.center.equal(centers[0])


def test_a_killed_rank(tmp_path):
    """The other ranks end with an error within the timeout."""
    context = torch.multiprocessing.start_processes(
        ranks.killed, (2, str(tmp_path)), nprocs=2, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, -signal.SIGKILL]
    result = torch.load(tmp_path / "0.pt", weights_only=True)
    assert "Error: " in result["said"]
    assert result["seconds"] < 10


def test_a_group_that_is_not_initialised():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
    for loss in ranks.OF_TWO:
        with pytest.raises(
            ValueError, match=r"`group` must be a process group of torch\.distributed, which is not init"
        ):
            loss.of(kdtorch)(torch.ones(2, 3), torch.ones(2, 3), group=group)
