"""n ranks of a process group give the numbers of one: every loss of the table, and what goes wrong."""

import functools

import numpy as np
import pytest
import ranks
import torch
import torch.multiprocessing
from spread import UNEVEN, part, spread

from parity.cases import KINDS, LOSSES
from parity.compare import ulps


def start(function, number, folder, *arguments):
    torch.multiprocessing.start_processes(
        function, (number, str(folder), *arguments), nprocs=number, start_method="spawn"
    )


@pytest.fixture(scope="module", params=[1, 2, 4])
def results(request, tmp_path_factory):
    """What each rank computed."""
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
    """The mean over ranks is the loss of the whole batch; DistributedDataParallel's gradients, and all states, are its own."""
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
