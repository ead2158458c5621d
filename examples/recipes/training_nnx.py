"""A whole training in Flax NNX: batch norm, an EMA teacher, clipping, a schedule for a loss's weight, checkpoints.

    python examples/recipes/training_nnx.py

20 of 1,000 images have a label. On all of them DINO compares the student with its own moving average. Everything that a step
changes is in one module, so one call saves it. A run that is resumed from a checkpoint ends with the same bits.
"""

import shutil
from itertools import islice, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from _digits import test, told, views
from flax import nnx

from kdjax.nn import DINOLoss

STEPS, HALF = 120, 60
CHECKPOINTS = Path("out/checkpoints/nnx").absolute()  # Orbax takes absolute paths only
WEIGHT = optax.linear_schedule(0.0, 1.0, transition_steps=60)  # DINO starts slowly
TRANSFORM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(5e-3))
INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # PyTorch's initialisation
AVERAGED = (nnx.Param, nnx.BatchStat)  # the average needs the statistics of the batch norms too
labelled_images, labels = told()


class Block(nnx.Module):
    def __init__(self, channels_in, channels, rngs):
        self.conv = nnx.Conv(channels_in, channels, (3, 3), kernel_init=INIT, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Student(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List(Block(a, b, rngs) for a, b in pairwise((1, 8, 16, 16, 16)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16 * 16, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.max_pool(self.blocks[0](images[..., None]), (2, 2), (2, 2))
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(self.dropout(x.reshape(len(x), -1)))


def make_run(seed):
    """Everything that a step changes: weights, statistics, dropout's key, the average, DINO's centre, Adam's moments."""
    student = Student(nnx.Rngs(seed))
    average = nnx.clone(student)
    average.eval()  # with its own statistics, and without dropout
    # with only 10 classes, the published temperatures, 0.04 and 0.1, are too sharp
    dino = DINOLoss(10, warmup_temperature=0.5, teacher_temperature=0.5, student_temperature=1.0)
    optimizer = nnx.Optimizer(student, TRANSFORM, wrt=nnx.Param)
    return nnx.Dict(student=student, average=average, dino=dino, optimizer=optimizer)


@nnx.jit
def step(run, both):
    weight = WEIGHT(run.optimizer.step[...])
    images = jnp.concatenate([labelled_images, *both])  # the labelled images, the first views, the second views
    theirs = run.average(images[len(labels) :])

    def objective(student, dino):  # the centre is updated inside, so the loss is an argument too
        ours = student(images)
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(ours[: len(labels)], labels).mean()
        return hard + weight * dino(ours[len(labels) :], theirs)

    loss, gradients = nnx.value_and_grad(objective)(run.student, run.dino)
    run.optimizer.update(run.student, gradients)
    student, average = (nnx.state(x, AVERAGED) for x in (run.student, run.average))
    nnx.update(run.average, optax.incremental_update(student, average, 0.05))  # 0.95 of itself, 0.05 of the student
    return loss


def train(run, start, stop):
    batches = islice(views(stop, seed=0, size=32), start, None)  # a resumed run goes on with the next batch
    return [float(step(run, both)) for both in batches]


@nnx.jit
def accuracy(model):
    images, labels = test()
    return (nnx.view(model, deterministic=True, use_running_average=True)(images).argmax(-1) == labels).mean()


shutil.rmtree(CHECKPOINTS, ignore_errors=True)  # checkpoints of an earlier run
run = make_run(seed=0)
with ocp.CheckpointManager(CHECKPOINTS, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
    losses = train(run, 0, HALF)
    manager.save(HALF, args=ocp.args.StandardSave(nnx.state(run)))
losses += train(run, HALF, STEPS)

# the following would run in another process
resumed = make_run(seed=1)  # its values do not matter: the checkpoint replaces all of them
with ocp.CheckpointManager(CHECKPOINTS) as manager:
    start = manager.latest_step()
    nnx.update(resumed, manager.restore(start, args=ocp.args.StandardRestore(nnx.state(resumed))))
train(resumed, start, STEPS)
pairs = list(zip(jax.tree.leaves(nnx.state(run)), jax.tree.leaves(nnx.state(resumed)), strict=True))
same = [bool((ours == theirs).all()) for ours, theirs in pairs]

# the average with the initial statistics, as if only its parameters were averaged
parameters_alone = nnx.clone(run.average)
nnx.update(parameters_alone, nnx.state(make_run(seed=0).average, nnx.BatchStat))
nets = {"student": run.student, "average": run.average, "parameters alone": parameters_alone}
accuracies = {name: float(accuracy(net)) for name, net in nets.items()}
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print(", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))
print(f"resumed at step {start}: {sum(same)} of {len(same)} arrays are equal bit by bit at step {STEPS}")
