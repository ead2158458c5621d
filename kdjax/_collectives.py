"""Communication between the devices along a mesh axis, inside `shard_map`; without an axis there is one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kdjax._typing import AxisName


def size(axis_name: AxisName | None) -> int:
    """The number of devices."""
    return 1 if axis_name is None else jax.lax.axis_size(_bound(axis_name))


def _bound(axis_name: AxisName) -> AxisName:
    """The axis; an error if there is no `shard_map` with this axis around the call."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"`axis_name` must be a mesh axis of the shard_map around the call, got {axis_name!r}; under jit without "
            "shard_map leave it out, because the compiler sees the whole batch"
        ) from None
    return axis_name


def rank(axis_name: AxisName | None) -> jax.Array | int:
    """The position of this device along the axis."""
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def all_sum(x: Any, axis_name: AxisName | None) -> Any:
    """The sum over devices, the same on all of them."""
    return x if axis_name is None else jax.lax.psum(x, _bound(axis_name))


def all_max(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The largest entry on any device, the same on all of them; it has no gradient."""
    return x if axis_name is None else jax.lax.pmax(x, _bound(axis_name))


def class_devices(class_axis_name: AxisName | None, axis_name: AxisName | None = None) -> int:
    """The number of devices that the classes are spread over; an error if the batch is spread over the same axis."""
    if class_axis_name is None:
        return 1
    names, others = ((x,) if isinstance(x, str) else x or () for x in (class_axis_name, axis_name))
    if set(names) & set(others):
        raise ValueError(
            f"`class_axis_name` must be another mesh axis than `axis_name`, got {class_axis_name!r} and {axis_name!r}; the "
            "first has the classes, the second the examples"
        )
    try:
        return jax.lax.axis_size(class_axis_name)
    except NameError:
        raise ValueError(
            f"`class_axis_name` must be a mesh axis of the shard_map around the call, got {class_axis_name!r}; under jit alone "
            "leave it out, the compiler sees all classes"
        ) from None


def class_sum(x: jax.Array, class_axis_name: AxisName | None = None) -> jax.Array:
    """The sum over the last axis, which may be spread over devices, `[*batch, 1]`."""
    return all_sum(x.sum(-1, keepdims=True), class_axis_name)


def class_max(x: jax.Array, class_axis_name: AxisName | None = None) -> jax.Array:
    """The largest entry of the last axis, which may be spread over devices, `[*batch, 1]`; without a gradient."""
    return all_max(jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)), class_axis_name)


def on_first(x: jax.Array, class_axis_name: AxisName | None, elsewhere: float) -> jax.Array:
    """x on the first device, another number on the others."""
    return x if class_axis_name is None else jnp.where(rank(class_axis_name) == 0, x, elsewhere)


def all_gather(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of all devices, in the order of the devices. Gradients flow back to the device that a row came from."""
    return x if axis_name is None else jax.lax.all_gather(x, _bound(axis_name), tiled=True)


def all_gather_constant(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The rows of all devices, which JAX knows to be the same on every device; they have no gradient."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.all_gather(x, _bound(axis_name), tiled=True, to="invarying")


def local_rows(x: jax.Array, rows: int, axis_name: AxisName | None) -> jax.Array:
    """This device's rows of a gathered array."""
    return x if axis_name is None else jax.lax.dynamic_slice_in_dim(x, rank(axis_name) * rows, rows)


def fetch(rows: jax.Array, places: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """`table[places]` of a table `[n * len(rows), dim]` whose rows are spread over n devices in equal parts.

    In each round, every device requests up to `slots` rows from every other device. Rounds follow until no device needs
    more rows.
    """
    if axis_name is None:
        return rows[places]
    devices, number = size(axis_name), places.size
    owner, place = jnp.divmod(places.ravel(), len(rows))
    order = jnp.argsort(owner, stable=True)
    turn = (
        jnp.zeros_like(owner)
        .at[order]
        .set(jnp.arange(number, dtype=owner.dtype) - jnp.searchsorted(owner[order], owner[order]).astype(owner.dtype))
    )  # how many earlier places are on the same device
    average = -(-number // devices)
    slots = min(number, average + 4 * int(average**0.5) + 1)  # uniformly drawn positions rarely need a second round

    def exchange(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        round_, found = carry
        slot = turn - round_ * slots
        slot = jnp.where((slot >= 0) & (slot < slots), slot, slots)  # requests of other rounds are dropped
        asked = jnp.zeros((devices, slots), place.dtype).at[owner, slot].set(place, mode="drop")
        asked = jax.lax.all_to_all(asked, axis_name, 0, 0)
        answer = jax.lax.all_to_all(rows[asked], axis_name, 0, 0)
        found = jnp.where((slot < slots)[:, None], answer.at[owner, slot].get(mode="clip"), found)
        return round_ + 1, found

    rounds = -(-(jax.lax.pmax(turn.max(initial=0), axis_name) + 1) // slots)
    start = jnp.zeros((), turn.dtype), jnp.where(turn[:, None] < 0, rows[:1], 0)
    _, found = jax.lax.while_loop(lambda carry: carry[0] < rounds, exchange, start)
    return found.reshape(*places.shape, -1)
