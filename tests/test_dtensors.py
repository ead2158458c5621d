"""DTensors: supported losses give the results of plain tensors; others raise an error that says what to write
instead."""

import functools

import dtensors
import numpy as np
import pytest
import torch
from dtensors import KEPT, LAYOUTS, REDUCTIONS
from test_ranks import start

import kdtorch
from parity.cases import LOSSES
from parity.compare import ulps

pytestmark = pytest.mark.slow  # processes

CARRIED = {"kl_loss", "symmetric_kl_loss", "reverse_kl_loss", "jsd_loss", "tvd_loss", "topk_kl_loss", "sampled_kl_loss"}
CARRIED |= {"bce_loss", "mse_loss", "smooth_l1_loss", "dcn_loss"}
CARRIED_BY_ROWS = {"dkd_loss", "nkd_loss"}  # their classes must not be sharded


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensors")
    start(dtensors.every_loss, request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@functools.cache
def plain(title, masked, reduction):
    loss = next(x for x in LOSSES if x.title == title)
    where = torch.from_numpy(KEPT) if masked else None
    return dtensors.evaluate(loss, dtensors.inputs_of(loss), where=where, reduction=reduction)


def same(got, want, bits="float64"):
    value, *gradients = want
    assert ulps(got[0], value, bits) <= 64
    for a, b in zip(got[1:], gradients, strict=True):
        assert (a - b).abs().max() <= 256 * torch.finfo(b.dtype).eps * b.abs().max()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.title)
def test_every_loss(loss, results):
    for layout in LAYOUTS[len(results)]:
        carried = loss.name in CARRIED or (loss.name in CARRIED_BY_ROWS and layout in ("batch", "whole"))
        for masked in (False, True):
            for reduction in REDUCTIONS:
                for result in results:
                    got = result[loss.title, layout, masked, reduction]
                    if carried:
                        assert not isinstance(got, str), got
                        same(got, plain(loss.title, masked, reduction))
                    else:
                        assert isinstance(got, str)
                        assert got.startswith(f"TypeError: {loss.name}: ")
                        assert "DTensor" in got
                        assert any(mend in got for mend in ("full_tensor()", "to_local() and group="))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtensors")
    start(dtensors.mends_and_mistakes, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("mistake", "text"),
    {
        "plain labels": "dkd_loss: `labels` must be a DTensor as `student_logits` is; give distribute_tensor(labels, mesh, "
        "placements), or x.full_tensor() for every DTensor, or, if each rank holds examples of its own, x.to_local() and group=",
        "a plain mask": "kl_loss: `where` must be a DTensor as `student_logits` is; give distribute_tensor(where, mesh, ",
        "a plain teacher": "mse_loss: `teacher` must be a DTensor as `student` is; give distribute_tensor(teacher, ",
        "a plain student": "symmetric_kl_loss: `student_logits` must be a DTensor as `teacher_logits` is; give distribute_tens",
        "a plain temperature that learns": "kl_loss: `temperature` must be a DTensor as `student_logits` is; give distribute_",
        "a group": "kl_loss: `group` must be None together with the DTensor `student_logits`, which holds the whole batch; leave it",
        "another mesh": "kl_loss: the DTensor `teacher_logits` must be on the mesh of `student_logits`; give "
        "teacher_logits.redistribute(mesh, placements), or x.full_tensor() for both",
        "parts of a sum": "kl_loss: the DTensor `student_logits` must hold sums, got placements (Partial(sum),); give "
        "student_logits.redistribute(placements=[Replicate()])",
        "classes in shards": "nkd_loss: the last axis of the DTensor `student_logits` must be whole, got placements "
        "(Shard(dim=1),) of shape [8, 5]; give student_logits.redistribute(placements=[Shard(0)]) or student_logits.full_te",
        "fewer classes than shards": "kl_loss: the last axis of the DTensor `student_logits` must have entries on every rank, "
        "got placements (Shard(dim=1),) of shape [8, 1]; give student_logits.redistribute(",
        "soft labels in shards": "nkd_loss: the last axis of the DTensor `labels` must be whole, got placements (Shard(dim=1),) "
        "of shape [8, 5]; give labels.redistribute(",
        "a loss of pairs": "difference_kl_loss: `student_logits` must not be a DTensor; give x.full_tensor(), or, if each rank "
        "holds examples of its own, x.to_local() and group=",
        "a state": "dino_loss: `student` must not be a DTensor; give x.full_tensor(), or, if each rank ",
    }.items(),
)
def test_mistakes(mistake, text, second):
    for result in second:
        assert result[mistake].startswith(f"TypeError: {text}")


def test_mends(second):
    """The code that the errors suggest gives the results of plain tensors."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (8,), generator=generator)

    def slope(name, **options):
        x = student.clone().requires_grad_()
        value = getattr(kdtorch, name)(x, teacher, *[labels] * (name == "dkd_loss"), **options)
        value.backward()
        return [value.detach(), x.grad]

    for result in second:
        for title, got in result["mended"].items():
            same(got, slope(title.split()[-1], **({"temperature": 2.0} if "number" in title else {})))
        for got in result["compiled"].values():
            same(got, slope("kl_loss", temperature=2.0))
        assert "dkd_loss: `labels` must be a DTensor" in result["compiled mistake"]
    value, gradient = slope("difference_kl_loss")
    assert ulps(np.mean([result["local"][0] for result in second]), value, "float64") <= 64
    same([value, second[0]["local"][1] / 2], [value, gradient])  # the gradient of the mean over ranks


@pytest.mark.parametrize("name", ["kl_loss", "symmetric_kl_loss", "dkd_loss", "nkd_loss"])
def test_many_classes(name, second):
    """A DTensor is computed as a whole where a CPU computes plain tensors in blocks of rows."""
    for result in second:
        want, got = result["many classes"][name]
        same(got, want, "float32")
