"""The backward pass does not need constants: they may come from `torch.inference_mode`, or change after the loss."""

import numpy as np
import pytest
import torch
from frameworks import TORCH

from parity.calls import per_example
from parity.cases import LOSSES, Case, Sizes, draw

every = pytest.mark.parametrize(
    "loss", [x for x in LOSSES if x.learns], ids=lambda loss: str(Case(loss, "", ())).rstrip("-")
)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
FUNCTIONS = {loss.title: per_example(TORCH.kd, loss) for loss in LOSSES}
KEPT = np.array([True, False, True, True, True])


def leaves(x):
    """The tensors of an input: an array, maps or a state."""
    return list(x) if isinstance(x, list | tuple) else [x]


def given(loss, dtype, masked, inference=False):
    """The trained inputs, and all constants: other inputs, state and mask."""
    (inputs,) = draw(loss, Sizes(), 0)
    with torch.inference_mode(inference):
        constants = {k: TORCH.arrays(v, dtype) for k, v in inputs.items() if k not in loss.learns}
        if loss.state:
            wide = "float64" if dtype == "float64" else "float32"
            constants[loss.state] = getattr(TORCH.kd, loss.inputs[loss.state])(**TORCH.arrays(inputs[loss.state], wide))
        if masked:
            constants["where"] = torch.from_numpy(KEPT).clone()
    return {k: TORCH.arrays(inputs[k], dtype) for k in loss.learns}, constants


def weighted(loss, learned, constants, reduction):
    """The loss as one number."""
    result = FUNCTIONS[loss.title](**learned, **constants, reduction=reduction)
    value = result[0] if loss.state else result
    return (value * torch.arange(1, 1 + value.numel()).reshape(value.shape)).sum()


def value_and_slopes(loss, learned, constants, reduction, before_backward=lambda constants: None):
    learned = {k: [x.clone().requires_grad_() for x in leaves(v)] for k, v in learned.items()}
    inputs = {k: v if loss.inputs[k] in ("maps", "neighbours") else v[0] for k, v in learned.items()}
    value = weighted(loss, inputs, constants, reduction)
    before_backward(constants)
    value.backward()
    return [value.detach(), *(x.grad for v in learned.values() for x in v)]


def write(constants):
    """Write other numbers into all constant tensors."""
    for x in (x for v in constants.values() for x in leaves(v)):
        if x.dtype == torch.bool:
            x.logical_not_()
        elif x.is_floating_point():
            x.mul_(-3).add_(1)
        else:
            x.zero_()


@every
@reductions
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_from_inference_mode(loss, reduction, dtype, masked):
    want, got = (value_and_slopes(loss, *given(loss, dtype, masked, x), reduction) for x in (False, True))
    assert all(map(torch.equal, got, want))


@every
@reductions
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_written_into_before_the_backward_pass(loss, reduction, dtype, masked):
    want, got = (value_and_slopes(loss, *given(loss, dtype, masked), reduction, x) for x in (lambda x: None, write))
    assert all(map(torch.equal, got, want))


@every
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_under_function_transforms(loss, masked):
    """`torch.func.grad`, alone and inside `vmap`, with constants from inference mode; `vjp` with constants that
    change."""
    learned, constants = given(loss, "float64", masked)
    want = value_and_slopes(loss, learned, constants, "mean")[1:]

    def slopes(learned, constants):
        return torch.func.grad(lambda learned: weighted(loss, learned, constants, "mean"))(learned)

    def same(got):
        got = [x for v in got.values() for x in leaves(v)]
        return all(torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(got, want, strict=True))

    _, inferred = given(loss, "float64", masked, inference=True)
    assert same(slopes(learned, inferred))
    stacked = torch.utils._pytree.tree_map(lambda x: torch.stack([x, x]), (learned, inferred))
    for i in range(2):
        got = torch.func.vmap(slopes)(*stacked)
        assert same({k: [x[i] for x in leaves(v)] for k, v in got.items()})

    value, pull = torch.func.vjp(lambda learned: weighted(loss, learned, constants, "mean"), learned)
    write(constants)
    try:
        (got,) = pull(torch.ones_like(value))
    except RuntimeError as error:  # they are stored for a second derivative
        if "was changed in place" not in str(error) and "modified by an inplace operation" not in str(error):
            raise
    else:
        assert same(got)


@every
def test_second_derivative_of_what_was_written_into(loss):
    """It needs the inputs and raises an error, or it does not and is right."""
    results = []
    for before in (lambda constants: None, write):
        learned, constants = given(loss, "float64", masked=True)
        learned = {k: [x.clone().requires_grad_() for x in leaves(v)] for k, v in learned.items()}
        inputs = {k: v if loss.inputs[k] in ("maps", "neighbours") else v[0] for k, v in learned.items()}
        value = weighted(loss, inputs, constants, "mean")
        before(constants)
        tensors = [x for v in learned.values() for x in v]
        try:
            slopes = torch.autograd.grad(value, tensors, create_graph=True)
            results.append(torch.autograd.grad(sum((g * g).sum() for g in slopes), tensors))
        except NotImplementedError as error:
            if "no second derivative" not in str(error):
                raise
            results.append(())
        except RuntimeError as error:
            if before is not write or "changed in place" not in str(error):
                raise
            return
    assert all(map(torch.equal, *results))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@every
@pytest.mark.parametrize("inference", [False, True], ids=["written into", "inference mode"])
def test_compiled(loss, inference):
    """With the partitioner, which chooses what is stored for the backward pass, but without compiled kernels."""
    want = value_and_slopes(loss, *given(loss, "float32", masked=True), "mean")[1:]
    learned, constants = given(loss, "float32", masked=True, inference=inference)
    learned = {k: [x.clone().requires_grad_() for x in leaves(v)] for k, v in learned.items()}
    inputs = {k: v if loss.inputs[k] in ("maps", "neighbours") else v[0] for k, v in learned.items()}
    torch._dynamo.reset()

    def value(inputs, constants):
        return weighted(loss, inputs, constants, "mean")

    result = torch.compile(value, fullgraph=True, backend="aot_eager_decomp_partition")(inputs, constants)
    if not inference:
        write(constants)
    result.backward()
    got = [x.grad for v in learned.values() for x in v]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
