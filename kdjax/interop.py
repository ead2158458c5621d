"""Exchange with PyTorch: teachers, losses, states, weights, and files that both packages read."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax._pack import array, jax_dtype, packed, unpacked
from kdjax.teacher_cache import TeacherCache, record_teacher
from kdlosses import files
from kdlosses.trees import Layout, check_outputs, each_leaf, leaves, twin

if TYPE_CHECKING:
    import torch

__all__ = ["TeacherCache", "load", "record_teacher", "save", "to_jax", "to_torch", "torch_loss", "torch_teacher"]


def torch_teacher(
    module: torch.nn.Module,
    *,
    output: Callable[[Any], Any] | None = None,
    layout: str | None = None,
    inside_jit: bool = False,
) -> Callable[..., Any]:
    """A teacher of the other framework as a function of arrays, in eval mode and without gradients; memory is shared.

    Args:
        module: the teacher. Every call puts it into eval mode, and afterwards restores the mode that it was in.
        output: a function from what the module returns to what you want of it: an array or a tree of arrays.
        layout: `"NHWC"` (or `"NWC"`, `"NDHWC"`): arrays with this number of axes are channels-last outside and
            channels-first inside the module, for inputs and outputs. None changes no axes.
        inside_jit: whether it may be called under `jit`, `grad`, `vmap` or `scan`, by a callback to the host. While
            such a call is traced, the module runs once on zeros, to find the shapes.

    Returns:
        A function of the module's arguments, with JAX arrays for tensors, to the tree of its outputs; no gradient flows
        through it. Do not write into the module's outputs afterwards: the arrays share their memory.

    Raises:
        TypeError: not a module, an output that is neither an array nor a tree of arrays, a dtype that DLPack does not
            have.
        ValueError: an unknown layout, a call under `jit` without `inside_jit`, 64-bit outputs where JAX has 32.
        RuntimeError: the module wrote into its input.

    >>> import jax.numpy as jnp, torch
    >>> from kdjax.interop import torch_teacher
    >>> teacher = torch_teacher(torch.nn.Softmax(-1))
    >>> print(teacher(jnp.zeros((1, 4))))
    [[0.25 0.25 0.25 0.25]]
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"torch_teacher: `module` must be a torch.nn.Module, got {type(module).__name__}")
    axes = Layout.of("torch_teacher", layout)

    def infer(inputs: Any) -> Any:
        place = next((x.device for x in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        given = _tensors("torch_teacher", inputs, place)
        tensors = [x for x in leaves(given).values() if isinstance(x, torch.Tensor)]
        before = [x._version for x in tensors]
        with _evaluating(module), torch.no_grad():
            args, kwargs = each_leaf(axes.channels_first, given)
            result = module(*args, **kwargs)
            result = result if output is None else output(result)
        if before != [x._version for x in tensors]:
            raise RuntimeError(
                "torch_teacher: the module wrote into its input, which shares memory with a JAX array; "
                "its first layer must not work in place (inplace=False)"
            )
        check_outputs("torch_teacher", result, torch.Tensor)
        return each_leaf(axes.channels_last, result)

    callback = _Callback("torch_teacher", lambda structure, *arrays: infer(structure.inputs(*arrays)))

    def teacher(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, kwargs))):
            return _arrays("torch_teacher", infer((args, kwargs)))
        if not inside_jit:
            raise ValueError(
                "torch_teacher: called under jit, grad, vmap or scan; call it before the step and pass its output to "
                "the step, or create it with inside_jit=True"
            )
        structure, *arrays = _Structure.of((args, kwargs))
        return callback(structure, *jax.lax.stop_gradient(arrays))

    return teacher


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Puts every submodule into eval mode, and afterwards restores its mode."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def torch_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of the other framework as a function of arrays that can be differentiated.

    Args:
        fn: takes tensors, trees of them and anything else. It returns the loss, an array or a tree of arrays, or a
            tuple of the loss and other outputs, such as the next state, through which no gradient flows.

    Returns:
        A function of the same arguments, with JAX arrays for tensors and kdjax's states for kdtorch's, under `jit`,
        `grad` and `vmap` too. It is a callback to the host; the gradient runs `fn` again, and a second derivative is an
        error.

    Raises:
        TypeError: an output that is neither an array nor a tree of arrays, a dtype that DLPack does not have.
        ValueError: a gradient is requested where none can flow, 64-bit outputs where JAX has 32.

    >>> import jax, jax.numpy as jnp, torch
    >>> from kdjax.interop import torch_loss
    >>> loss = torch_loss(torch.nn.functional.mse_loss)
    >>> print(jax.jit(jax.grad(loss))(jnp.array([1.0, 3.0]), jnp.zeros(2)))
    [1. 3.]
    """
    import torch  # noqa: F401  (where it is not installed, the error is here)

    value, gradient = (_Callback("torch_loss", functools.partial(run, fn)) for run in (_value, _gradient))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def crossing(structure: _Structure, floats: list[Any], others: list[Any]) -> Any:
        return value(structure, floats, others)

    def forward(structure: _Structure, *arrays: list[Any]) -> Any:
        return value(structure, *arrays), arrays

    def backward(structure: _Structure, arrays: tuple[list[Any], ...], cotangents: Any) -> Any:
        return gradient(structure, *arrays, cotangents[0]), None

    crossing.defvjp(forward, backward)

    def loss(*args: Any, **kwargs: Any) -> Any:
        result, extras = crossing(*_Structure.of((args, kwargs)))
        return (result, *jax.lax.stop_gradient(extras)) if extras else result

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
    def of(cls, inputs: Any) -> tuple[_Structure, list[Any], list[Any]]:
        """The structure, the arrays that need a gradient, which are the floating-point ones, and the other arrays."""
        flat, tree = jax.tree.flatten(inputs)
        arrays = {i: x for i, x in enumerate(flat) if isinstance(x, jax.Array | np.ndarray)}
        floats = {i: jnp.asarray(x) for i, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        others = {i: x for i, x in arrays.items() if i not in floats}
        static = tuple((i, x) for i, x in enumerate(flat) if i not in arrays)
        return cls(tree, tuple(floats), tuple(others), static), [*floats.values()], [*others.values()]

    def inputs(self, floats: Sequence[Any], others: Sequence[Any]) -> Any:
        """The tree of the inputs, with these arrays in it."""
        places = dict([*self.static, *zip(self.learns + self.others, [*floats, *others], strict=True)])
        return jax.tree.unflatten(self.tree, [places[i] for i in range(len(places))])


def _value(fn: Callable[..., Any], structure: _Structure, *arrays: list[Any]) -> Any:
    """On the host: the loss, and its other outputs."""
    import torch

    with torch.no_grad():
        result = _called(fn, structure.inputs(*_tensors("torch_loss", arrays)))
    return each_leaf(lambda x: x, result, twin("kdtorch", "kdjax"))


def _gradient(
    fn: Callable[..., Any], structure: _Structure, floats: list[Any], others: list[Any], above: Any
) -> list[torch.Tensor]:
    """On the host: the gradients of the arrays that need one, given the gradient of the loss."""
    import torch

    floats, others, above = _tensors("torch_loss", (floats, others, above))
    with torch.enable_grad():
        floats = [x.detach().requires_grad_() for x in floats]
        result, _ = _called(fn, structure.inputs(floats, others))
    pairs = zip(leaves(result).values(), leaves(above).values(), strict=True)
    differentiable = [(x, y) for x, y in pairs if x.requires_grad]
    if not differentiable:
        raise ValueError(
            "torch_loss: a gradient is requested, but none can flow: the loss requires no gradient; "
            "do not detach it, nor compute it under no_grad"
        )
    values, upstream = zip(*differentiable, strict=True)
    slopes = torch.autograd.grad(values, floats, upstream, allow_unused=True)
    return [torch.zeros_like(x) if slope is None else slope for x, slope in zip(floats, slopes, strict=True)]


def _called(fn: Callable[..., Any], inputs: Any) -> tuple[Any, tuple[Any, ...]]:
    """The loss, and its other outputs."""
    import torch

    args, kwargs = each_leaf(lambda x: x, inputs, twin("kdjax", "kdtorch"))
    result = fn(*args, **kwargs)
    check_outputs("torch_loss", result, torch.Tensor)
    return (result[0], result[1:]) if type(result) is tuple else (result, ())


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
    >>> from kdjax.interop import to_torch
    >>> to_torch(dino_init(3))
    DINOState(center=tensor([0., 0., 0.]))
    """
    from kdtorch import _pack

    return _pack.unpacked(packed(tree))


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
    >>> from kdjax.interop import to_jax
    >>> to_jax(dino_init(3))
    DINOState(center=Array([0., 0., 0.], dtype=float32))
    """
    from kdtorch import _pack

    return unpacked(_pack.packed(tree))


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write arrays, states and modules to a file that kdjax and kdtorch read; if the process is killed, the old file remains.

    Args:
        path: of the file, in the safetensors format, with a checksum and what was saved in its header.
        tree: anything that `to_torch` and `to_jax` take.

    Raises:
        TypeError: something that cannot be saved; the message says where it is.
        OSError: the file cannot be written; the old file remains.

    >>> import tempfile
    >>> from kdjax import dino_init
    >>> from kdjax.interop import load, save
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
        ValueError: the file is truncated, altered or of another kind; the message names the file and says which.

    >>> import tempfile
    >>> from kdjax.interop import load, save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/step", {"step": 7})
    ...     load(f"{folder}/step")
    {'step': 7}
    """
    return unpacked(files.read(path))


def _tensors(function: str, tree: Any, place: torch.device | None = None) -> Any:
    """The arrays of a tree as tensors, which share their memory."""
    import torch

    from kdtorch import _pack

    def tensor(x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return _pack.tensor(x)
        if not isinstance(x, jax.Array):
            return x
        try:
            if place is not None and place.type == "cpu":
                x = jax.device_put(x, jax.devices("cpu")[0])
            shared = torch.from_dlpack(x)
        except Exception as error:
            raise TypeError(
                f"{function}: an array of dtype {x.dtype} cannot be converted to PyTorch, because DLPack has no such dtype; "
                "cast it first, as by x.astype(jnp.float32)"
            ) from error
        return shared if place is None else shared.to(place)

    return each_leaf(tensor, tree)


def _arrays(function: str, tree: Any) -> Any:
    """The tensors of a tree as JAX arrays, which share their memory."""
    return each_leaf(lambda x: None if x is None else array(function, x), tree)


class _Callback:
    """A host function, from arrays to a tree of tensors, that a compiled program can call.

    The shapes of its outputs are found by a run on zeros, once for each kind of input.
    """

    def __init__(self, function: str, run: Callable[..., Any]) -> None:
        self.function, self.run = function, run
        self.shapes: dict[Any, Any] = {}

    def __call__(self, structure: _Structure, *arrays: Any) -> Any:
        flat, tree = jax.tree.flatten(arrays)

        def on_host(*flat: Any) -> Any:
            return self.run(structure, *jax.tree.unflatten(tree, flat))

        key = structure, tree, *((x.shape, x.dtype) for x in flat)
        if key not in self.shapes:
            zeros = [np.zeros(x.shape, x.dtype) for x in flat]
            self.shapes[key] = each_leaf(self._shape, on_host(*zeros))
        return jax.pure_callback(
            lambda *flat: each_leaf(self._numbers, on_host(*flat)), self.shapes[key], *flat, vmap_method="sequential"
        )

    def _shape(self, x: torch.Tensor | None) -> jax.ShapeDtypeStruct | None:
        return None if x is None else jax.ShapeDtypeStruct(x.shape, jax_dtype(self.function, x))

    def _numbers(self, x: torch.Tensor | None) -> np.ndarray | None:
        from kdtorch import _pack

        return None if x is None else _pack.numpy(x).astype(jax_dtype(self.function, x), copy=False)
