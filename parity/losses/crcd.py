import numpy as np

from parity.oracle._plain import constant, unit


def crcd_loss(student, teacher, index, negatives, state, temperature=0.05, momentum=0.5):
    number = len(student)
    v, u = [unit(x) for x in student], [unit(x) for x in teacher]
    on_student, student_normalizer = _side(
        v, index, negatives, state["teacher_memory"], state["student_normalizer"], temperature
    )
    on_teacher, teacher_normalizer = _side(
        u, index, negatives, state["student_memory"], state["teacher_normalizer"], temperature
    )
    student_memory, teacher_memory = state["student_memory"].copy(), state["teacher_memory"].copy()
    for i in range(number):  # a later row with the same index overwrites
        for old, new, embedding in (
            (state["student_memory"], student_memory, v),
            (state["teacher_memory"], teacher_memory, u),
        ):
            remembered = unit(momentum * old[index[i]] + (1 - momentum) * constant(embedding[i]))
            new[index[i]] = remembered if np.any(remembered != 0) else old[index[i]]
    state = {
        "student_memory": student_memory,
        "teacher_memory": teacher_memory,
        "student_normalizer": student_normalizer,
        "teacher_normalizer": teacher_normalizer,
    }
    return [a + b for a, b in zip(on_student, on_teacher, strict=True)], state


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
