import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out, log_softmax, softmax, without
from parity.row import Benchmark, IllConditioned, Loss, Memory


def uskd_loss(student_logits, weak_logits, labels, alpha=1.0, beta=0.1, mu=0.005):
    number, classes = student_logits.shape
    chosen = []  # for each example its one or two label classes, the most probable first, and their probabilities
    for label in labels:
        if np.ndim(label) == 0:
            chosen.append([(int(label), 1.0)])
        else:
            ranked = sorted(range(classes), key=lambda k: (-label[k], k))[:2]
            chosen.append([(k, label[k]) for k in ranked if label[k] > 0])

    squares = [
        [
            constant(softmax(student_logits[i])[chosen[i][place][0]]) ** 2
            for i in range(number)
            if len(chosen[i]) > place
        ]
        for place in range(2)
    ]

    values = []
    for i in range(number):
        s, w = student_logits[i], weak_logits[i]
        log_p, log_w, p_weak = log_softmax(s), log_softmax(w), softmax(w)
        target = 0.0
        for place, (y, probability) in enumerate(chosen[i]):
            soft = constant(softmax(s)[y]) ** 2 + probability - sum(squares[place]) / len(squares[place])
            target = target - soft * log_p[y]

        label_classes = [y for y, _ in chosen[i]]
        over_w = 1 - sum(constant(p_weak[y]) for y in label_classes) + 1e-6
        over_p = 1 - sum(constant(log_p[y]) for y in label_classes) + 1e-6
        score = [constant(p_weak[k]) / over_w + constant(log_p[k]) / over_p for k in range(classes)]
        ranked = sorted(range(classes), key=lambda k: (-score[k], k))
        padding = [k for k in range(classes) if is_left_out(s[k]) and is_left_out(w[k])]
        zipf = [1 / (1 + ranked.index(k)) for k in range(classes)]
        gone = {*label_classes, *padding}
        rest = without(zipf, gone)
        hat_log_p = log_softmax(without(s, gone)) if rest else []
        others = -sum(z / sum(rest) * value for z, value in zip(rest, hat_log_p, strict=True))

        head = 0.0
        for k in range(classes):
            if k not in padding:
                one_hot = (1.0 if k == labels[i] else 0.0) if np.ndim(labels[i]) == 0 else labels[i][k]
                head = head - (0.9 * one_hot + 0.1 / (classes - len(padding))) * log_w[k]
        values.append(alpha * target + beta * others + mu * head)
    return values


NEAR_TIES = IllConditioned(
    {"float32": (2**13, 2**19, 0)},
    "classes whose scores are a few units in the last place apart change places with the rounding of the softmax",
)

ROWS = (
    Loss(
        formula=uskd_loss,
        inputs={"student_logits": "logits", "weak_logits": "logits", "labels": "labels"},
        learns=("student_logits", "weak_logits"),
        options=({}, {"alpha": 0.1, "beta": 0.5, "mu": 0.1}),
        ranges={"alpha": (0.0, 2.0), "beta": (0.0, 1.0), "mu": (0.0, 0.1)},
        batch_coupled=True,
        shift_invariant=True,
        padding=True,
        partly_constant=True,  # the soft labels are constant
        ill_conditioned={"near-ties": NEAR_TIES},
        memory=Memory(jax=6, torch=7, largest=lambda n: 2 * n.batch[0] * n.classes),  # indices are int64
        collectives=("all-reduce",),
        benchmarks=(Benchmark("128×1000", Sizes((128,), 1000), torch=1.5, jax=1.0, memory=1.0),),
    ),
    Loss(
        formula=uskd_loss,
        inputs={"student_logits": "logits", "weak_logits": "logits", "labels": "distribution"},
        learns=("student_logits", "weak_logits"),
        ranges={"alpha": (0.0, 2.0), "beta": (0.0, 1.0), "mu": (0.0, 0.1)},
        batch_coupled=True,
        shift_invariant=True,
        partly_constant=True,
        ill_conditioned={"near-ties": NEAR_TIES},
        memory=Memory(jax=6, torch=7, largest=lambda n: 2 * n.batch[0] * n.classes),
        collectives=("all-reduce",),
    ),
)
