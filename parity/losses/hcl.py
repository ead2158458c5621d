import math

from parity.oracle._plain import constant


def hcl_loss(student_maps, teacher_maps):
    """Maps are [batch, channels, height, width]."""
    return [
        sum(_one_map(s[i] - constant(t[i])) for s, t in zip(student_maps, teacher_maps, strict=True))
        for i in range(len(student_maps[0]))
    ]


def _one_map(difference):
    channels, height, width = difference.shape
    levels = [(1.0, height, width)]
    for size in (4, 2, 1):
        if size < height:
            levels.append((levels[-1][0] / 2, size, size))
    value = 0.0
    for weight, rows, columns in levels:
        total = 0.0
        for c in range(channels):
            for r in range(rows):
                for q in range(columns):
                    window = difference[
                        c,
                        r * height // rows : math.ceil((r + 1) * height / rows),
                        q * width // columns : math.ceil((q + 1) * width / columns),
                    ]
                    total = total + (window.sum() / window.size) ** 2
        value = value + weight * total / (channels * rows * columns)
    return value / sum(weight for weight, _, _ in levels)
