"""A whole training in Flax Linen: a `TrainState` with batch norm, an EMA teacher, losses with parameters or a state.

    python examples/recipes/training_linen.py

20 of 1,000 images have a label. On all of them DINO compares the student with its own moving average. The gradients are
clipped, DINO's weight follows a schedule, and a run that is resumed from a checkpoint ends with the same bits.
"""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from _digits import test, told, views
from flax import linen, nnx
from flax.training.train_state import TrainState

from kdjax import DINOState, dino_init, dino_loss
from kdjax.nn import DynamicCenterNormLoss

STEPS, HALF = 120, 60
CHECKPOINTS = Path("out/checkpoints/linen").absolute()  # Orbax takes absolute paths only
WEIGHT = optax.linear_schedule(0.0, 1.0, transition_steps=60)  # DINO starts slowly
TRANSFORM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
INIT = linen.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's initialisation
labelled_images, labels = told()


class Student(linen.Module):
    @linen.compact
    def __call__(self, images, train):
        """The logits and the embedding."""
        x = images[..., None]
        for channels in (8, 16, 16, 16):
            x = linen.Conv(channels, (3, 3), kernel_init=INIT)(x)
            x = linen.relu(linen.BatchNorm(momentum=0.9, use_running_average=not train)(x))
            x = linen.max_pool(x, (2, 2), (2, 2)) if channels == 8 else x
        x = linen.Dropout(0.1, deterministic=not train)(x.reshape(len(x), -1))
        return linen.Dense(10)(x), x


class Run(TrainState):
    """Everything that a step changes: TrainState's `step`, `params` and `opt_state`, and the following."""

    batch_stats: Any  # the student's
    average: Any  # the EMA teacher's "params" and "batch_stats"
    loss_state: DINOState  # a loss with a state returns the next one
    key: jax.Array  # for dropout


student = Student()
# a module with parameters is split into a constant graph and a tree of arrays for `params`
graph, _ = nnx.split(DynamicCenterNormLoss(10, 256, rngs=nnx.Rngs(0)))


def make_run(seed):
    key = jax.random.key(seed)
    variables = jax.jit(student.init, static_argnames="train")(key, labelled_images, train=False)
    _, centers = nnx.split(DynamicCenterNormLoss(10, 256, rngs=nnx.Rngs(seed)))
    run = Run.create(
        apply_fn=student.apply,
        params={"student": variables["params"], "dcn": centers},  # everything that the optimiser trains
        tx=TRANSFORM,
        batch_stats=variables["batch_stats"],
        average=variables,
        loss_state=dino_init(10),
        key=key,
    )
    return run.replace(step=jnp.asarray(0))  # an array, as after each step


@jax.jit
def step(run, both):
    images = jnp.concatenate([labelled_images, *both])  # the labelled images, the first views, the second views
    theirs, their_embeddings = student.apply(run.average, images, train=False)

    def objective(params):
        (ours, embeddings), moved = student.apply(
            {"params": params["student"], "batch_stats": run.batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.fold_in(run.key, run.step)},
            mutable=["batch_stats"],
        )
        known = slice(len(labels))
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(ours[known], labels).mean()
        dcn = nnx.merge(graph, params["dcn"])(embeddings[known], their_embeddings[known], labels)
        pairs = (x[len(labels) :].reshape(2, -1, 10) for x in (ours, theirs))
        # with only 10 classes, the published temperatures, 0.04 and 0.1, are too sharp
        dino, state = dino_loss(*pairs, run.loss_state, teacher_temperature=0.5, student_temperature=1.0)
        return hard + 0.1 * dcn + WEIGHT(run.step) * dino, (moved["batch_stats"], state)

    (loss, (batch_stats, loss_state)), gradients = jax.value_and_grad(objective, has_aux=True)(run.params)
    run = run.apply_gradients(grads=gradients, batch_stats=batch_stats, loss_state=loss_state)
    # the average needs the statistics of the batch norms too: 0.95 of itself, 0.05 of the student
    now = {"params": run.params["student"], "batch_stats": run.batch_stats}
    return run.replace(average=optax.incremental_update(now, run.average, 0.05)), loss


def train(run, start, stop):
    losses = []
    for both in islice(views(stop, seed=0, size=32), start, None):  # a resumed run goes on with the next batch
        run, loss = step(run, both)
        losses.append(float(loss))
    return run, losses


@jax.jit
def accuracy(variables):
    images, labels = test()
    return (student.apply(variables, images, train=False)[0].argmax(-1) == labels).mean()


shutil.rmtree(CHECKPOINTS, ignore_errors=True)  # checkpoints of an earlier run
run, losses = train(make_run(seed=0), 0, HALF)
with ocp.CheckpointManager(CHECKPOINTS, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    manager.save(HALF, args=ocp.args.StandardSave(run))
run, more = train(run, HALF, STEPS)
losses += more

# the following would run in another process
with ocp.CheckpointManager(CHECKPOINTS) as manager:
    start = manager.latest_step()
    # Orbax returns a Run if it is given one, whose values do not matter
    resumed = manager.restore(start, args=ocp.args.StandardRestore(make_run(seed=1)))
    # without it, Orbax returns dictionaries and lists
    raw = manager.restore(start, args=ocp.args.StandardRestore())
resumed = resumed.replace(loss_state=DINOState(**raw["loss_state"]))  # the same state as in `resumed`
resumed, _ = train(resumed, start, STEPS)
pairs = list(zip(jax.tree.leaves(run), jax.tree.leaves(resumed), strict=True))
same = [bool((ours == theirs).all()) for ours, theirs in pairs]

nets = {
    "student": {"params": run.params["student"], "batch_stats": run.batch_stats},
    "average": run.average,
    # with the initial statistics, as if only the parameters were averaged
    "parameters alone": {**run.average, "batch_stats": make_run(seed=0).batch_stats},
}
accuracies = {name: float(accuracy(variables)) for name, variables in nets.items()}
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print(", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))
print(f"resumed at step {start}: {sum(same)} of {len(same)} arrays are equal bit by bit at step {STEPS}")
