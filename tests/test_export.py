"""`jax.export` with symbolic sizes: the exported function gives the loss, or an error says which size must be fixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frameworks import JAX
from tiers import first

import kdjax
from parity.calls import per_example
from parity.cases import KINDS, LOSSES, MAPS, Sizes, draw, each_array
from parity.compare import ulps

pytestmark = pytest.mark.usefixtures("quick_compilation")
# they compute in blocks of the batch, or over its pairs
FIXED = ("difference_kl_loss", "euclidean_mse_loss", "crcd_loss", "crd_loss", "similarity_loss", "pkt_loss")
FIXED += ("correlation_loss", "instance_graph_loss", "rkd_loss", "linear_kl_loss", "linear_jsd_loss", "gram_loss")
FIXED += ("koleo_loss", "linear_reverse_kl_loss", "linear_topk_kl_loss")
CASES = [
    pytest.param(loss, options, id=f"{loss.title}-{i}") for loss in LOSSES for i, options in enumerate(loss.options)
]
# kinds whose last axes may be symbolic too, in losses with any leading axes
WIDE = {"logits": "c", "distribution": "c", "features": "d", "fractions": "d", "centers": "cd"}


def drawn(loss, sizes):
    """The inputs of a loss in kdjax, with channels last, and a mask."""
    (inputs,) = draw(loss, sizes, 0)
    maps = {name: x for name, x in inputs.items() if loss.inputs[name] in MAPS}
    inputs |= each_array(maps, lambda x: np.moveaxis(x, 1, -1))
    arrays = {name: each_array(x, lambda x: JAX.array(x, "float32")) for name, x in inputs.items()}
    if loss.state:
        arrays[loss.state] = getattr(kdjax, loss.inputs[loss.state])(**arrays[loss.state])
    where = np.arange(np.prod(sizes.batch)) != 1
    return [*arrays.values(), jnp.asarray(where.reshape(sizes.batch))]


def left_open(loss, arguments, batch, wide, constraints=()):
    """Shapes with symbols for the sizes of the batch and, with `wide`, of the last axis."""
    scope = jax.export.SymbolicScope(constraints)

    def shape(kind, x):
        axis, sizes = KINDS[kind].axis if kind else 0, list(map(str, x.shape))
        if axis is not None:
            sizes[axis : axis + len(batch)] = batch
        if wide and kind in WIDE:
            sizes[-len(WIDE[kind]) :] = WIDE[kind]
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(", ".join(sizes), scope=scope) if sizes else (), x.dtype)

    kinds = [*loss.inputs.values(), None]
    return [jax.tree.map(lambda x, kind=kind: shape(kind, x), y) for kind, y in zip(kinds, arguments, strict=True)]


def value_and_slopes(loss, options):
    learned = tuple(i for i, name in enumerate(loss.inputs) if name in loss.learns)

    def value(*arguments):
        *inputs, where = arguments
        result = per_example(kdjax, loss)(*inputs, where=where, **options)
        return result[0] if loss.state else result

    return jax.jit(jax.value_and_grad(value, learned) if learned else value)


def check(loss, options, exported, sizes):
    arguments = drawn(loss, sizes)
    got, want = exported.call(*arguments), value_and_slopes(loss, options)(*arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.isfinite(a).all()
        assert ulps(np.asarray(a), np.asarray(b), "float32") <= 16


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_a_batch_of_any_size(loss, options):
    shapes = left_open(loss, drawn(loss, Sizes(batch=(3,))), ["b"], wide=False)
    if loss.name in FIXED:
        message = (
            f"{loss.name}: the size of the batch must be a number, got the symbolic b; export the loss with a fixed"
        )
        with pytest.raises(ValueError, match=message):
            jax.export.export(value_and_slopes(loss, options))(*shapes)
        return
    exported = jax.export.export(value_and_slopes(loss, options))(*shapes)
    for number in (5, 1) if options == loss.options[0] else (5,):
        check(loss, options, exported, Sizes(batch=(number,)))


OPEN = [loss for loss in LOSSES if loss.leading and loss.name not in FIXED]


@pytest.mark.parametrize("loss", first(2, OPEN), ids=lambda loss: loss.title)
def test_tokens_and_classes_of_any_number(loss):
    ranked = loss.name == "uskd_loss"  # it sorts by as many bits as the number of classes needs
    constraints = ["c >= 3"] if "logits" in loss.inputs.values() and not ranked else []
    sizes = Sizes(batch=(2, 3)) if ranked else Sizes(batch=(2, 3), classes=6, dim=4)
    shapes = left_open(loss, drawn(loss, Sizes(batch=(3, 2))), ["b", "t"], wide=not ranked, constraints=constraints)
    exported = jax.export.export(value_and_slopes(loss, {}))(*shapes)
    check(loss, {}, exported, sizes)
    if ranked:
        shapes = left_open(loss, drawn(loss, Sizes(batch=(3, 2))), ["b", "t"], wide=True, constraints=["c >= 3"])
        message = (
            "uskd_loss: the size of the last axis must be a number, got the symbolic c; export the loss with a fixed"
        )
        with pytest.raises(ValueError, match=message):
            jax.export.export(value_and_slopes(loss, {}))(*shapes)
