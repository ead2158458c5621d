import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, is_left_out
from parity.row import Benchmark, Loss, Memory


def _log_sum(x):
    kept = [a for a in x if not is_left_out(a)]
    largest = max(kept, default=0.0)
    return largest + np.log(sum(np.exp(a - largest) for a in kept)) if kept else 0.0


def sinkhorn_knopp(teacher_logits, temperature, iterations=3):
    log_q = [[constant(x) / temperature for x in row] for row in teacher_logits]
    for _ in range(int(iterations)):
        masses = [_log_sum(column) for column in zip(*log_q, strict=True)]
        log_q = [[x - mass for x, mass in zip(row, masses, strict=True)] for row in log_q]
        log_q = [[x - _log_sum(row) for x in row] for row in log_q]
    return [np.exp(np.array(row)) for row in log_q]


def _rounding(given):
    return 1 + scales.size(given.inputs["teacher_logits"]) / given.options["temperature"], 0.0


ROWS = (
    Loss(
        formula=sinkhorn_knopp,
        inputs={"teacher_logits": "logits"},
        learns=(),
        constant=("teacher_logits",),
        options=({"temperature": 0.5}, {"temperature": 0.1, "iterations": 6}),
        ranges={"temperature": (0.5, 20.0)},
        forms={"iterations": (1, 3)},
        value="array",
        leading=False,
        batch_coupled=True,
        padding=True,
        scale=1.0,  # the size of the entries, whose weighted sum may nearly cancel
        rounding=_rounding,
        collectives=("all-reduce",) * 4,
        benchmarks=(
            Benchmark(
                "1,024×65,536",
                Sizes((1024,), 65_536),
                torch=1.5,
                options={"temperature": 0.05, "iterations": 3},
                factor=0.05,
            ),
        ),
        memory=Memory(jax=5, torch=8),
    ),
)
