import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out, jsd, kl, over, without
from parity.row import Benchmark, Loss, Memory


def _together(logits):
    """The logit of several classes that are combined into one."""
    kept = [x for x in logits if not is_left_out(x)]
    largest = max((np.real(x) for x in kept), default=-np.inf)
    return largest + np.log(sum(np.exp(x - largest) for x in kept)) if kept else -np.inf


def topk_kl_loss(student_logits, values, indices, rest, temperature=1.0, tail="bucket", divergence="kl", beta=0.5):
    result = []
    for s, t, places, left in zip(student_logits, values, indices, rest, strict=True):
        x, y = over(s, temperature), over(constant(t), temperature)
        kept = [x[place] for place in places]
        if tail == "bucket":
            kept, y = [*kept, _together(without(x, places))], [*y, *over([constant(left)], temperature)]
        if divergence == "jsd":
            result.append(jsd(y, kept, beta))
        else:
            result.append(temperature**2 * (kl(kept, y) if divergence == "reverse_kl" else kl(y, kept)))
    return result


ROWS = (
    Loss(
        formula=topk_kl_loss,
        inputs={"student_logits": "logits", "values": "kept_logits", "indices": "kept_classes", "rest": "rest"},
        learns=("student_logits",),
        constant=("values", "rest"),
        options=(
            {},
            {"temperature": 4.0},
            {"temperature": 2.0, "tail": "renormalize"},
            {"temperature": 2.0, "divergence": "reverse_kl"},
            {"temperature": 2.0, "divergence": "jsd", "beta": 0.1},
            {"divergence": "jsd", "beta": 0.9, "tail": "renormalize"},
        ),
        ranges={"temperature": (0.5, 20.0)},
        forms={"divergence": ("reverse_kl", "jsd", "kl", "jsd"), "beta": (0.5, 0.1, 0.5, 1.0)},
        shift_invariant=True,
        memory=Memory(jax=2, torch=4),
        benchmarks=(Benchmark("2×512×32,000, k 64", Sizes((2, 512), 32_000, kept=64), torch=1.5),),
    ),
)
