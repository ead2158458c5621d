import numpy as np

from parity.oracle._plain import constant, is_left_out, kl, over, without


def _together(logits):
    """The logit of classes that are taken for one."""
    kept = [x for x in logits if not is_left_out(x)]
    largest = max((np.real(x) for x in kept), default=-np.inf)
    return largest + np.log(sum(np.exp(x - largest) for x in kept)) if kept else -np.inf


def topk_kl_loss(student_logits, values, indices, rest, temperature=1.0, tail="bucket"):
    result = []
    for s, t, places, left in zip(student_logits, values, indices, rest, strict=True):
        x, y = over(s, temperature), over(constant(t), temperature)
        kept = [x[place] for place in places]
        if tail == "bucket":
            kept, y = [*kept, _together(without(x, places))], [*y, *over([constant(left)], temperature)]
        result.append(temperature**2 * kl(y, kept))
    return result
