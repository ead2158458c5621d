"""Exchange with JAX: teachers, losses, states, weights, and files that both packages read."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdlosses import files
from kdlosses.trees import Layout, check_outputs, each_leaf, leaves, twin
from kdtorch._numerics import _Refused
from kdtorch._pack import packed, unpacked
from kdtorch.teacher_cache import TeacherCache, record_teacher

__all__ = ["TeacherCache", "jax_loss", "jax_teacher", "load", "record_teacher", "save", "to_jax", "to_torch"]


def jax_teacher(
    fn: Any,
    params: Any = None,
    *,
    output: Callable[[Any], Any] | None = None,
    layout: str | None = None,
) -> Callable[..., Any]:
    """A teacher of the other framework as a function of arrays, in eval mode and without gradients; memory is shared.

    Args:
        fn: an `nnx.Module`, of which a copy in eval mode runs, as it is at the time of the call; or a function of
            `params` and arrays, as a Linen model's `apply`. It runs under `jit`.
        params: the first argument of the function; None with a module.
        output: a function from what it returns to what you want of it: an array or a tree of arrays.
        layout: `"NHWC"` (or `"NWC"`, `"NDHWC"`): tensors with this number of axes are channels-first outside and
            channels-last inside the teacher, for inputs and outputs. None changes no axes.

    Returns:
        A function of the teacher's further arguments, with tensors for JAX arrays, to the tree of its outputs. Do not
        write into the outputs: they share memory with JAX.

    Raises:
        TypeError: parameters together with a module, or a function without parameters, an output that is neither an
            array nor a tree of arrays, a dtype that DLPack does not have.
        ValueError: an unknown layout, a tensor that requires gradient, 64-bit tensors where JAX has 32.

    >>> import jax, torch
    >>> from kdtorch.interop import jax_teacher
    >>> teacher = jax_teacher(lambda scale, x: jax.nn.softmax(scale * x), 2.0)
    >>> teacher(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    import jax
    from flax import nnx

    if isinstance(fn, nnx.Module) != (params is None):
        came = "both" if isinstance(fn, nnx.Module) else f"{type(fn).__name__} and None"
        raise TypeError(f"jax_teacher: `fn` must be an nnx.Module, or a function together with `params`, got {came}")
    axes = Layout.of("jax_teacher", layout)

    @jax.jit
    def apply(params: Any, args: Any, kwargs: Any) -> Any:
        return chosen(fn(params, *args, **kwargs))

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(graph: Any, state: Any, args: Any, kwargs: Any) -> Any:
        module = nnx.merge(graph, state)
        module.eval()
        return chosen(module(*args, **kwargs))

    def chosen(result: Any) -> Any:
        result = result if output is None else output(result)
        check_outputs("jax_teacher", result, jax.Array)
        return result

    def teacher(*args: Any, **kwargs: Any) -> Any:
        given = {k: x for k, x in leaves((args, kwargs)).items() if isinstance(x, Tensor)}
        for name, x in given.items():
            if x.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"jax_teacher: the tensor of shape {list(x.shape)} at `{name}` requires a gradient, but no "
                    "gradient flows through a teacher; give x.detach(), or call the teacher under torch.no_grad()"
                )
        args, kwargs = _arrays("jax_teacher", each_leaf(axes.channels_last, (args, kwargs)))
        result = evaluate(*nnx.split(fn), args, kwargs) if params is None else apply(params, args, kwargs)
        place = next((x.device for x in given.values()), torch.device("cpu"))
        return each_leaf(axes.channels_first, _tensors(result, place))

    return teacher


def jax_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of the other framework as a function of arrays that can be differentiated.

    Args:
        fn: takes JAX arrays, trees of them and anything else, which is static. It returns the loss, an array or a tree
            of arrays, or a tuple of the loss and other outputs, such as the next state, through which no gradient
            flows. It runs under `jit`, forward and backward.

    Returns:
        A function of the same arguments, with tensors for JAX arrays and kdtorch's states for kdjax's. A second
        derivative is an error.

    Raises:
        TypeError: an output that is no array or tree of arrays, a loss that is not floating-point, a dtype that DLPack
            does not have.
        ValueError: 64-bit tensors where JAX has 32.

    >>> import jax.numpy as jnp, torch
    >>> from kdtorch.interop import jax_loss
    >>> loss = jax_loss(lambda x, y: jnp.square(x - y).mean())
    >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> loss(x, torch.zeros(2)).backward()
    >>> x.grad
    tensor([1., 3.])
    """
    compiled = _Compiled(fn)

    def loss(*args: Any, **kwargs: Any) -> Any:
        structure, learns, others = _Structure.of((args, kwargs))
        if learns:
            trees: list[Any] = []
            crossed = _Crossing.apply(compiled, structure, trees, *learns, *others)
            number = trees[0].num_leaves
            loss, extras = trees[0].unflatten(crossed[:number]), trees[1].unflatten(crossed[number:])
        else:
            place = next((x.device for x in others), torch.device("cpu"))
            loss, extras = _tensors(compiled.value(structure, [], _arrays("jax_loss", others)), place)
        loss, extras = each_leaf(lambda x: x, (loss, extras), twin("kdjax", "kdtorch"))
        return (loss, *extras) if extras else loss

    return loss


class _Structure(NamedTuple):
    """What a call depends on besides its arrays: the tree of the inputs, which need a gradient, and which are static.

    The inputs are numbered by their positions among the leaves.
    """

    tree: Any
    learns: tuple[int, ...]
    others: tuple[int, ...]
    static: tuple[tuple[int, Any], ...]

    @classmethod
    def of(cls, inputs: Any) -> tuple[_Structure, list[Tensor], list[Tensor]]:
        """The structure, the tensors that need a gradient, which are those that require one, and the other tensors."""
        import jax

        flat, tree = jax.tree.flatten(inputs)
        tensors = {i: x for i, x in enumerate(flat) if isinstance(x, Tensor)}
        learns = {i: x for i, x in tensors.items() if x.requires_grad and torch.is_grad_enabled()}
        others = {i: x for i, x in tensors.items() if i not in learns}
        static = tuple((i, x) for i, x in enumerate(flat) if i not in tensors)
        return cls(tree, tuple(learns), tuple(others), static), [*learns.values()], [*others.values()]

    def inputs(self, learns: Sequence[Any], others: Sequence[Any]) -> Any:
        """The tree of the inputs, with these arrays in it."""
        places = dict([*self.static, *zip(self.learns + self.others, [*learns, *others], strict=True)])
        return self.tree.unflatten([places[i] for i in range(len(places))])


class _Compiled:
    """A compiled loss of JAX: the value alone, the value with what the backward pass needs, and the backward pass."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        import jax

        self.fn = fn
        self.value = jax.jit(self._value, static_argnums=0)
        self.value_and_pull = jax.jit(self._value_and_pull, static_argnums=0)
        self.pull_back = jax.jit(lambda pull, cotangents: pull(cotangents)[0])

    def _value(self, structure: _Structure, learns: list[Any], others: list[Any]) -> tuple[Any, tuple[Any, ...]]:
        import jax
        import jax.numpy as jnp

        args, kwargs = each_leaf(lambda x: x, structure.inputs(learns, others), twin("kdtorch", "kdjax"))
        result = self.fn(*args, **kwargs)
        check_outputs("jax_loss", result, jax.Array)
        loss, extras = (result[0], result[1:]) if type(result) is tuple else (result, ())
        for x in jax.tree.leaves(loss):
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(
                    f"jax_loss: the loss must be floating-point, got {x.dtype}{list(x.shape)}; return what is not "
                    "differentiated after it, as a tuple"
                )
        return loss, extras

    def _value_and_pull(self, structure: _Structure, learns: list[Any], others: list[Any]) -> Any:
        import jax

        return jax.vjp(lambda learns: self._value(structure, learns, others), learns, has_aux=True)


class _Crossing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compiled: _Compiled, structure: _Structure, trees: list[Any], *tensors: Tensor) -> Any:
        import jax

        arrays, number = _arrays("jax_loss", list(tensors)), len(structure.learns)
        loss, pull, extras = compiled.value_and_pull(structure, arrays[:number], arrays[number:])
        (losses, ctx.tree), (besides, besides_tree) = jax.tree.flatten(loss), jax.tree.flatten(extras)
        trees += [ctx.tree, besides_tree]
        ctx.pull_back, ctx.place = functools.partial(compiled.pull_back, pull), tensors[0].device
        ctx.save_for_backward(*tensors)  # so that autograd reports if one is changed before the backward pass
        besides = _tensors(besides, ctx.place)
        ctx.mark_non_differentiable(*besides)
        return *(x.clone() for x in _tensors(losses, ctx.place)), *besides

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        tensors = ctx.saved_tensors
        above = _arrays("jax_loss", list(cotangents[: ctx.tree.num_leaves]))
        slopes = _tensors(ctx.pull_back(ctx.tree.unflatten(above)), ctx.place)
        if torch.is_grad_enabled():  # the gradient may be differentiated again
            slopes = [_Refused.apply(slope, *cotangents, *tensors) for slope in slopes]
        return None, None, None, *(slope.clone() for slope in slopes), *[None] * (len(tensors) - len(slopes))


def to_torch(tree: Any) -> Any:
    """Convert a tree of JAX to PyTorch: arrays, states, and modules with their weights. Everything is copied.

    Args:
        tree: arrays, states and modules of kdjax, numbers and strings, in dicts, lists and tuples.

    Returns:
        The same tree with tensors, kdtorch's states and kdtorch's modules. A Flax module that is not of this library
        becomes its weights, with the names and the axis order of PyTorch, for the `load_state_dict` of its port. Random
        number generators start anew.

    Raises:
        TypeError: something that cannot be converted; the message says where it is.
        ValueError: a state or a module that kdtorch does not have.

    >>> from kdjax import dino_init
    >>> from kdtorch.interop import to_torch
    >>> to_torch(dino_init(3))
    DINOState(center=tensor([0., 0., 0.]))
    """
    from kdjax import _pack

    return unpacked(_pack.packed(tree))


def to_jax(tree: Any) -> Any:
    """Convert a tree of PyTorch to JAX: arrays, states, and modules with their weights. Everything is copied.

    Args:
        tree: tensors, states and modules of kdtorch, numbers and strings, in dicts, lists and tuples.

    Returns:
        The same tree with JAX arrays, kdjax's states and kdjax's modules. A PyTorch module that is not of this library
        becomes its weights, with the names and the axis order of Flax, for `nnx.update` of its port. Random number
        generators start anew.

    Raises:
        TypeError: something that cannot be converted; the message says where it is.
        ValueError: a tensor that requires gradient, 64 bits where JAX has 32.

    >>> from kdtorch import dino_init
    >>> from kdtorch.interop import to_jax
    >>> to_jax(dino_init(3))
    DINOState(center=Array([0., 0., 0.], dtype=float32))
    """
    from kdjax import _pack

    return _pack.unpacked(packed(tree))


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write arrays, states and modules to a file that kdjax and kdtorch read; if the process is killed, the old file remains.

    Args:
        path: of the file, in the safetensors format, with a checksum and what was saved in its header.
        tree: anything that `to_torch` and `to_jax` take.

    Raises:
        TypeError: something that cannot be saved; the message says where it is.
        ValueError: a tensor that requires gradient.
        OSError: the file cannot be written; the old file remains.

    >>> import tempfile
    >>> from kdtorch import dino_init
    >>> from kdtorch.interop import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/state", {"state": dino_init(3), "step": 7})
    ...     load(f"{folder}/state")["state"].center.tolist()
    [0.0, 0.0, 0.0]
    """
    files.write(path, packed(tree))


def load(path: str | os.PathLike[str]) -> Any:
    """Read what `save` wrote, from either package, in the types of this one.

    Args:
        path: of the file.

    Returns:
        The tree. A module that is not of this library is returned as its weights, as in `to_torch` and `to_jax`.

    Raises:
        OSError: the file cannot be read.
        TypeError: an array of a dtype that PyTorch does not have.
        ValueError: the file is truncated, altered or of another kind; the message names the file and says which.

    >>> import tempfile
    >>> from kdtorch.interop import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/step", {"step": 7})
    ...     load(f"{folder}/step")
    {'step': 7}
    """
    return unpacked(files.read(path))


def _tensors(tree: Any, place: torch.device) -> Any:
    """The JAX arrays of a tree as tensors, which share their memory."""
    return each_leaf(lambda x: None if x is None else torch.from_dlpack(x).to(place), tree)


def _arrays(function: str, tree: Any) -> Any:
    """The tensors of a tree as JAX arrays, which share their memory."""
    import jax

    from kdjax import _pack

    def array(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type != "cpu" and jax.default_backend() == "cpu":
            x = x.cpu()
        return _pack.array(function, x) if isinstance(x, Tensor) else x

    return each_leaf(array, tree)
