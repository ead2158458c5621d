"""Feature maps of PyTorch models that cannot be edited: hooks for the student, and a torch.fx graph for the teacher.

    python examples/recipes/features_torch.py

Attention transfer compares maps with any numbers of channels. CWD and the squared error need the teacher's number, to which
a `Projector` maps the student's channels; it is trained with the student and not needed afterwards.
"""

import torch
from _digits import SETTING, teacher, test, train
from _digits_torch import Net
from torch import fx, nn
from torch.utils.data import DataLoader, TensorDataset

from kdtorch import attention_transfer_loss, cwd_loss, mse_loss
from kdtorch.nn import Projector


def tap(model, *names):
    """A dictionary that each call of the model fills with the outputs of these parts."""
    found = {}
    for name in names:

        def keep(part, inputs, output, name=name):
            found[name] = output

        model.get_submodule(name).register_forward_hook(keep)
    return found


def cut(model, *names):
    """A model with the same weights that computes and returns only these nodes of its graph."""
    traced = fx.symbolic_trace(model)  # print(traced.graph) shows the names
    nodes = {node.name: node for node in traced.graph.nodes}
    traced.graph.erase_node(next(node for node in traced.graph.nodes if node.op == "output"))
    traced.graph.output([nodes[name] for name in names])
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


torch.manual_seed(0)
ask = cut(teacher("torch").eval(), "relu", "relu_1")  # maps of 8 and 16 channels, after the activation
student = Net((4, 6), 20, 10)  # a given network; its convolutions have 4 and 6 channels
maps = tap(student, "conv1", "conv2")
project = nn.ModuleList(Projector(a, b) for a, b in zip((4, 6), SETTING.teacher[0], strict=True))
optimizer = torch.optim.Adam([*student.parameters(), *project.parameters()], lr=1e-2)
loader = DataLoader(TensorDataset(*map(torch.from_numpy, train())), batch_size=64, shuffle=True)

losses = []
for _ in range(6):
    for images, labels in loader:
        with torch.no_grad():
            theirs = ask(images)
        logits = student(images).logits
        ours = [maps[name].relu() for name in ("conv1", "conv2")]  # a hook sees the output before the activation
        terms = {
            "attention": 100 * attention_transfer_loss(ours, theirs),
            "cwd": cwd_loss(project[1](ours[1]), theirs[1], temperature=2.0),
            "mse": mse_loss(project[0](ours[0]).movedim(1, -1), theirs[0].movedim(1, -1)),
        }
        loss = nn.functional.cross_entropy(logits, labels) + sum(terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append({name: value.item() for name, value in terms.items()})

images, labels = map(torch.from_numpy, test())
with torch.no_grad():
    accuracy = (student(images).logits.argmax(1) == labels).float().mean().item()
print(", ".join(f"{name} {losses[0][name]:.3f} -> {losses[-1][name]:.3f}" for name in terms))
print(f"the student is right on {accuracy:.1%} of the test images")
