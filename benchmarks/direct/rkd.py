import torch
from torch import Tensor
from torch.nn import functional


def rkd_loss(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    distances, angles = [], []
    for x in (student, teacher):
        square = x.square().sum(1)
        distance = (square[:, None] + square[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        distance = distance * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        distances.append(distance / distance[distance > 0].mean())
        sides = functional.normalize(x[None] - x[:, None], dim=2)
        angles.append(sides @ sides.mT)
    by_distance, by_angle = functional.smooth_l1_loss(*distances), functional.smooth_l1_loss(*angles)
    return distance_weight * by_distance + angle_weight * by_angle
