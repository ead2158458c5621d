import numpy as np

from parity import scales
from parity.losses._plain import constant, log1p
from parity.row import Loss, Memory


def vid_loss(predicted_mean, teacher_map, log_scale, eps=1e-5):
    """Maps are [batch, channels, height, width]."""
    variances = [_softplus(a) + eps for a in log_scale]
    values = []
    for mean, t in zip(predicted_mean, constant(teacher_map), strict=True):
        total = 0.0
        for channel, target, variance in zip(mean, t, variances, strict=True):
            for a, b in zip(channel.ravel(), target.ravel(), strict=True):
                total = total + ((a - b) ** 2 / variance + np.log(variance)) / 2
        values.append(total / mean.size)
    return values


def _softplus(a):
    return a + log1p(np.exp(-a)) if np.real(a) > 0 else log1p(np.exp(a))


ROWS = (
    Loss(
        formula=vid_loss,
        inputs={"predicted_mean": "map", "teacher_map": "map", "log_scale": "channels"},
        learns=("predicted_mean", "log_scale"),
        constant=("teacher_map",),
        options=({}, {"eps": 1e-3}),
        ranges={"eps": (1e-5, 0.1)},
        leading=False,
        second_derivative=False,
        rounding=scales.of_variances,
        memory=Memory(jax=3, torch=6),
    ),
)
