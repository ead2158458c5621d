"""Self-supervised training in PyTorch as in DINOv2: DINO, iBOT and KoLeo on a tiny vision transformer, without a label.

    python examples/recipes/dinov2_torch.py

The student sees two views of each image, in half of which some patches are masked. It predicts what its own moving average
outputs for the other view (DINO) and for the masked patches (iBOT), while KoLeo keeps the images' features apart. The average is
centred, or balanced by Sinkhorn-Knopp. In the end every test image is given the label of the nearest of 20 labelled ones.
"""

import torch
from _digits import test, told, views
from torch import nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdtorch import koleo_loss, sinkhorn_knopp
from kdtorch.nn import DINOLoss, IBOTLoss

WIDTH, PROTOTYPES = 48, 64


class ViT(nn.Module):
    """16 patches of 2 × 2 pixels and a class token; the outputs are cosines with prototypes, as in DINO's head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.tokens = nn.Parameter(0.5 * torch.randn(2, WIDTH))  # the class token and the mask token
        self.places = nn.Parameter(0.5 * torch.randn(17, WIDTH))
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, WIDTH))

    def forward(self, images, mask=None):
        """The feature of each image, and the outputs of the class token and of the patches."""
        patches = self.embed(images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4))
        if mask is not None:
            patches = torch.where(mask[..., None], self.tokens[1], patches)
        x = torch.cat([self.tokens[0].expand(len(images), 1, -1), patches], 1)
        x = self.blocks(x + self.places)
        outputs = normalize(x, dim=-1) @ normalize(self.prototypes, dim=-1).T
        return x[:, 0], outputs[:, 0], outputs[:, 1:]


def draw_mask(number):
    """Mask a third of the patches in half of the images."""
    return (torch.rand(number, 16) < 1 / 3) & (torch.arange(number) % 2 == 0)[:, None]


def learn(assignments):
    """Train; returns the average of the student, and the loss of each step."""
    torch.manual_seed(0)
    student = ViT()
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.98)).requires_grad_(False)
    teacher.update_parameters(student)  # the first call copies
    temperatures = {"warmup_temperature": 0.04, "teacher_temperature": 0.04}
    dino, ibot = DINOLoss(PROTOTYPES, **temperatures), IBOTLoss(PROTOTYPES, **temperatures)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=2e-3), []
    for both in views(steps=STEPS, seed=0):
        stacked = torch.from_numpy(both).flatten(0, 1)  # [2 * 64, 8, 8]: the first views, then the second
        mask = draw_mask(len(stacked))
        _, images, patches = teacher(stacked)
        of_images = of_patches = None
        if assignments:  # over all images of the batch, and over all masked patches
            of_images = sinkhorn_knopp(images, temperature=0.04)
            of_patches = sinkhorn_knopp(patches.flatten(0, 1), temperature=0.04, where=mask.flatten())
            of_patches = of_patches.view_as(patches)
        features, our_images, our_patches = student(stacked, mask)
        loss = dino(our_images, images, teacher_targets=of_images)
        loss = loss + ibot(our_patches, patches, mask, teacher_targets=of_patches)
        loss = loss + 0.1 * sum(map(koleo_loss, features.chunk(2)))  # one view at a time
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)  # after the step
        losses.append(loss.item())
    return teacher, losses


@torch.no_grad()
def accuracy(net):
    """The accuracy of the label of the nearest labelled image."""
    known, images = (normalize(net(torch.from_numpy(x))[0], dim=-1) for x in (told()[0], test()[0]))
    nearest = (images @ known.T).argmax(1).numpy()
    return float((told()[1][nearest] == test()[1]).mean())


STEPS = 200
torch.manual_seed(0)
nets = {"untrained": ViT()}
nets["centre"], losses = learn(assignments=False)
nets["assignments"], other_losses = learn(assignments=True)
accuracies = {name: accuracy(net.eval()) for name, net in nets.items()}
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; with Sinkhorn-Knopp {other_losses[0]:.2f} -> {other_losses[-1]:.2f}")
print(
    "20 labels: untrained {untrained:.1%}; centred {centre:.1%}; Sinkhorn-Knopp {assignments:.1%}".format(**accuracies)
)
