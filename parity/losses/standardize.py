import numpy as np

from parity import scales
from parity.losses._plain import is_left_out
from parity.row import IllConditioned, Loss, Memory


def standardize_logits(logits, temperature=1.0):
    rows = []
    for z in logits:
        kept = [x for x in z if not is_left_out(x)]
        first = np.real(kept[0]) if kept else 0.0  # so that a constant row is exactly 0
        mean = sum(x - first for x in kept) / max(len(kept), 1)
        square = sum((x - first - mean) ** 2 for x in kept) / max(len(kept) - 1, 1)
        deviation = np.sqrt(square) if np.real(square) > 0 else 0.0 * square
        rows.append(
            np.array([x if is_left_out(x) else (x - first - mean) / (deviation + 1e-7) / temperature for x in z])
        )
    return rows


def _rounding(given):
    """The rounding of centred numbers divided by their deviation. A nearly constant row has a large gradient."""
    rows = np.atleast_2d(given.inputs["logits"])
    deviations = [
        float(np.std(x[np.isfinite(x)] / (scales.size(x) or 1))) * scales.size(x)
        for x in rows.reshape(-1, rows.shape[-1])
    ]
    temperature = given.options.get("temperature", 1.0)
    return 1 / temperature, 1 / (min(deviations, default=1.0) + 1e-7) / temperature


ROWS = (
    Loss(
        formula=standardize_logits,
        inputs={"logits": "logits"},
        learns=("logits",),
        options=({}, {"temperature": 2.0}),
        ranges={"temperature": (0.5, 20.0)},
        value="array",
        shift_invariant=True,
        padding=True,
        scale=1.0,  # the size of the entries, whose weighted sum may nearly cancel
        rounding=_rounding,
        ill_conditioned={
            "two-classes": IllConditioned(
                {}, "two logits have but one shape, so that the terms of the gradient cancel", 1.0
            )
        },
        memory=Memory(jax=5, torch=8),
    ),
)
