"""Distillation over several processes in JAX: the student is replicated, batches are spread, losses use `axis_name`.

    python examples/distributed/distil_jax.py    # one process

    for process in 0 1; do                       # two processes, which print the same losses
        python examples/distributed/distil_jax.py --coordinator localhost:12345 --processes 2 --process $process &
    done; wait

With Slurm, Open MPI and Cloud TPU, `jax.distributed.initialize()` needs no arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from _common import SETTING, load_inputs, options_of, tell
from _digits_jax import Batch, Net, cast, dino, generators, load, projection_and_centers
from digits import Plan, Setting
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax import difference_kl_loss, kl_loss

BATCH = Plan(P(None, "batch"), P(None, None, "batch"), P(None, "batch"))  # the axis of the plan that is spread


class Distiller(nnx.Module):
    """A student with the parameters and states of its losses."""

    def __init__(self, setting: Setting, rngs: nnx.Rngs) -> None:
        self.student = Net(*setting.student, setting.classes, rngs=rngs)
        self.dcn = projection_and_centers(setting, rngs)
        self.dino = dino(setting, rngs)

    def __call__(self, data: Mapping[str, Any], plan: Plan, axis_name: str, update: bool) -> jax.Array:
        """A loss whose mean over devices is the loss of the whole batch; states change only with `update`."""
        batch = Batch(self.student, data, plan)
        logits, embedding, _ = batch.student
        spread: dict[str, Any] = {"axis_name": axis_name}
        labels, sure = batch.given("labels"), batch.given("sure")
        ours, theirs = self.dcn.projection(embedding), batch.teacher("embedding")
        first, second = self.student(batch.two_views(data["views"])).logits, batch.two_views(data["teacher"]["views"])
        return (
            kl_loss(logits, batch.teacher("logits"), temperature=4.0, where=sure, **spread)
            + difference_kl_loss(logits, batch.teacher("logits"), temperature=4.0, **spread)
            + self.dcn.loss(ours, theirs, labels, where=sure, **spread)
            + self.dino(first, second, update=update, **spread)
        )


def train(data: Mapping[str, Any], plans: Plan, dtype: str, mesh: Mesh) -> list[float]:
    """Train; returns the loss of each step, which is the same in every process."""
    module = Distiller(SETTING, generators(0))
    load(module, {}, dtype)
    graph, params, state = nnx.split(module, nnx.Param, ...)
    optimiser = optax.sgd(SETTING.student_rate, momentum=0.9)

    def step(carry: Any, data: Mapping[str, Any], plan: Plan) -> Any:
        params, state, moments = carry
        number = len(plan.index)

        def value(params: Any, state: Any, plan: Plan, update: bool) -> Any:
            module = nnx.merge(graph, params, state, copy=True)
            loss = module(data, plan, "batch", update)
            return jax.lax.pmean(loss, "batch") / number, nnx.state(module, nnx.Not(nnx.Param))

        losses, gradients = [], []
        for i in range(number):
            micro_batch = jax.tree.map(lambda x: x[i], plan)  # noqa: B023
            (loss, state), gradient = jax.value_and_grad(value, has_aux=True)(
                params, state, micro_batch, i == number - 1
            )
            losses.append(loss)
            gradients.append(gradient)
        updates, moments = optimiser.update(jax.tree.map(lambda *x: sum(x), *gradients), moments, params)
        return (optax.apply_updates(params, updates), state, moments), sum(losses)

    compiled = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=P()))
    carry, data = jax.device_put(((params, state, optimiser.init(params)), cast(data, dtype)), NamedSharding(mesh, P()))
    batches = [NamedSharding(mesh, spec) for spec in BATCH]
    losses = []
    for plan in zip(*plans, strict=True):
        whole = Plan(*map(jax.make_array_from_process_local_data, batches, plan))
        carry, loss = compiled(carry, data, whole)
        losses.append(float(loss))
    return losses


def main() -> None:
    parser = options_of("distil_jax.py", __doc__)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="the address of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)
    options = parser.parse_args()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    rank, ranks = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    inputs, plans = load_inputs(parser, options, rank, ranks)
    losses = {}
    for dtype in options.dtype:
        with jax.enable_x64(dtype == "float64"):
            losses[dtype] = train(inputs, plans, dtype, mesh)
    tell(losses, rank, ranks, options.json)


if __name__ == "__main__":
    main()
