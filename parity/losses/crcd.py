import numpy as np

from parity import scales
from parity.kinds import Sizes
from parity.losses._plain import constant, unit
from parity.row import NEAR_ROWS, Benchmark, Growth, Loss, Memory


def crcd_loss(student, teacher, index, negatives, state, temperature=0.05, momentum=0.5):
    v, u = [unit(x) for x in student], [unit(x) for x in teacher]
    on_student, student_normalizer = _side(
        v, index, negatives, state["teacher_memory"], state["student_normalizer"], temperature
    )
    on_teacher, teacher_normalizer = _side(
        u, index, negatives, state["student_memory"], state["teacher_normalizer"], temperature
    )
    after = {
        "student_memory": remembered(state["student_memory"], index, v, momentum),
        "teacher_memory": remembered(state["teacher_memory"], index, u, momentum),
        "student_normalizer": student_normalizer,
        "teacher_normalizer": teacher_normalizer,
    }
    return [a + b for a, b in zip(on_student, on_teacher, strict=True)], after


def remembered(memory, index, embedding, momentum):
    """The next memory; a later row overwrites an earlier one with the same index."""
    after = memory.copy()
    for i in range(len(embedding)):
        row = unit(momentum * memory[index[i]] + (1 - momentum) * constant(embedding[i]))
        after[index[i]] = row if np.any(row != 0) else memory[index[i]]
    return after


def _side(embedding, index, negatives, memory, normalizer, temperature):
    number, num_data = len(embedding), len(memory)
    noise = negatives.shape[1] / num_data
    weights = np.empty((number, number, negatives.shape[1] + 1), dtype=np.result_type(*embedding, memory))
    for i in range(number):
        for j in range(number):
            anchor = memory[index[j]]
            rho = unit(embedding[i] - anchor + 1e-6)
            for k, place in enumerate([index[i], *negatives[i]]):
                r = unit(memory[place] - anchor + 1e-6)
                weights[i, j, k] = np.exp(sum(r * rho) / temperature)
    if normalizer == 0 and number:
        normalizer = constant(weights).mean() * num_data
    values = []
    for i in range(number):
        total = 0.0
        for j in range(number):
            x = weights[i, j] / normalizer
            total = total - np.log(x[0] / (x[0] + noise + 1e-7)) - sum(np.log(noise / (x[1:] + noise + 1e-7)))
        values.append(total / number)
    return values, normalizer


def _rounding(given):
    """The closer an embedding is to an anchor, the larger the rounding error of the direction between them."""
    distances = [1.0]
    for side, other in (("student", "teacher"), ("teacher", "student")):
        x = given.inputs[side] / (np.abs(given.inputs[side]).max(-1, keepdims=True) + 1e-300)
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-300)
        anchors = given.inputs["state"][f"{other}_memory"][given.inputs["index"]]
        distances += np.linalg.norm(x[:, None] - anchors[None], axis=-1).ravel().tolist()
    steepness = 1 / given.options["temperature"] / max(min(distances), 1e-6)
    value, gradient = scales.of_unit_rows(given)
    return steepness * value, steepness * gradient


ROWS = (
    Loss(
        formula=crcd_loss,
        inputs={
            "student": "features",
            "teacher": "features",
            "index": "index",
            "negatives": "negatives",
            "state": "CRCDState",
        },
        learns=("student", "teacher"),
        options=({}, {"temperature": 0.2, "momentum": 0.9}),
        ranges={"temperature": (0.05, 1.0), "momentum": (0.0, 0.99)},
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        rounding=_rounding,
        # the normaliser is a mean of exp(x / temperature)
        state_rounding=lambda given, value: scales.size(value) * 0.05 / given.options["temperature"],
        ill_conditioned={"near-rows": NEAR_ROWS},
        memory=Memory(jax=1, torch=5, largest=lambda n: n.batch[0] * n.negatives * 8 + n.num_data * n.dim * 2),
        collectives=("all-gather",) * 6,
        benchmarks=(
            Benchmark(
                "64×128, K 500, 50,000 rows",
                Sizes((64,), dim=128, num_data=50_000, negatives=500),
                torch=60,
                jax=60,
                memory=1 / 110,
            ),
            Benchmark(
                "64×128, K 16,384, 50,000 rows",
                Sizes((64,), dim=128, num_data=50_000, negatives=16_384),
                direct=False,
            ),
        ),
        growth=Growth("negatives", (32, 128, 512, 2048), Sizes((32,), dim=128, num_data=20_000)),
    ),
)
