"""A whole training in PyTorch: batch norm, an EMA teacher, GradScaler, clipping, a schedule for a loss, checkpoints.

    python examples/recipes/training_torch.py

20 of 1,000 images have a label. On all of them DINO compares the student with its own moving average, in float16. A run that
is resumed from its checkpoint ends with the same bits.
"""

import copy
from itertools import islice, pairwise
from pathlib import Path

import torch
from _digits import test, told, views
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtorch.nn import DINOLoss

STEPS, HALF = 120, 60
CHECKPOINT = Path("out/checkpoints/torch.pt")
labelled_images, labels = map(torch.from_numpy, told())


def weight(step):
    """The weight of DINO, which starts slowly, until the student has learned something."""
    return min(step / 60, 1.0)


def block(channels_in, channels):
    return nn.Conv2d(channels_in, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()


def make_run(seed):
    """Everything that a step changes, by name; each has a `state_dict`."""
    torch.manual_seed(seed)
    student = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        *block(1, 8),
        nn.MaxPool2d(2),
        *(layer for a, b in pairwise((8, 16, 16, 16)) for layer in block(a, b)),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 16, 10),
    )
    # use_buffers: the statistics of the batch norms are averaged too, not copied from the student
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True).requires_grad_(False)
    average.update_parameters(student)  # the first call copies
    return {
        "student": student,
        "average": average.eval(),  # with its own statistics, and without dropout
        # with only 10 classes, the published temperatures, 0.04 and 0.1, are too sharp
        "dino": DINOLoss(10, warmup_temperature=0.5, teacher_temperature=0.5, student_temperature=1.0),
        "optimizer": torch.optim.Adam(student.parameters(), lr=5e-3),
        "scaler": torch.amp.GradScaler("cpu", growth_interval=30),  # "cuda" on a GPU; 30 because the run is short
    }


def train(run, start, stop):
    student, average, dino, optimizer, scaler = run.values()
    batches, losses = islice(views(stop, seed=0, size=32), start, None), []  # a resumed run goes on with the next batch
    for step, both in enumerate(batches, start):
        images = torch.cat([labelled_images, torch.from_numpy(both).flatten(0, 1)])
        with torch.autocast("cpu", dtype=torch.float16):
            theirs = average(images[len(labels) :])
            ours = student(images)
        hard = nn.functional.cross_entropy(ours[: len(labels)].float(), labels)
        loss = hard + weight(step) * dino(ours[len(labels) :], theirs)  # computes in float32 by itself
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # before clipping, because the threshold is for unscaled gradients
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        scaler.step(optimizer)  # skipped if a gradient is inf or NaN
        scaler.update()
        average.update_parameters(student)  # after the step: 0.95 of itself and 0.05 of the student
        losses.append(loss.item())
    return losses


def save(run, step):
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    states = {name: part.state_dict() for name, part in run.items()}
    torch.save({**states, "step": step, "random": torch.get_rng_state()}, CHECKPOINT)  # dropout uses the random state


def restore(run):
    saved = torch.load(CHECKPOINT, weights_only=True)
    for name, part in run.items():
        part.load_state_dict(saved[name])
    torch.set_rng_state(saved["random"])
    return saved["step"]


@torch.no_grad()
def accuracy(net):
    images, labels = map(torch.from_numpy, test())
    return (copy.deepcopy(net).eval()(images).argmax(1) == labels).float().mean().item()


def values(x):
    """All values of nested dictionaries and lists."""
    x = list(x.values()) if isinstance(x, dict) else x
    return [y for part in x for y in values(part)] if isinstance(x, list | tuple) else [x]


run = make_run(seed=0)
losses = train(run, 0, HALF)
save(run, HALF)
losses += train(run, HALF, STEPS)

# the following would run in another process
resumed = make_run(seed=1)  # its values do not matter: the checkpoint replaces all of them
start = restore(resumed)
train(resumed, start, STEPS)
pairs = zip(*(values([part.state_dict() for part in x.values()]) for x in (run, resumed)), strict=True)
same = [torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs]

# the average with the initial statistics, as if only its parameters were averaged
parameters_alone = copy.deepcopy(run["average"])
for name, buffer in make_run(seed=0)["average"].named_buffers():
    parameters_alone.get_buffer(name).copy_(buffer)
nets = {"student": run["student"], "average": run["average"], "parameters alone": parameters_alone}
accuracies = {name: accuracy(net) for name, net in nets.items()}
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; the scale of the gradients is {run['scaler'].get_scale():.0f}")
print(", ".join(f"{name} {value:.1%}" for name, value in accuracies.items()))
print(f"resumed at step {start}: {sum(same)} of {len(same)} values are equal bit by bit at step {STEPS}")
