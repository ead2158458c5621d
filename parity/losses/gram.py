import numpy as np

from parity.kinds import Sizes
from parity.losses._plain import constant, unit
from parity.row import Benchmark, Loss, Memory


def gram_loss(student, teacher, normalize=True, image_level=True, clip_negative="none"):
    x, y = ([[unit(p) if normalize else p for p in image] for image in z] for z in (student, constant(teacher)))

    edge = 1e-16 if normalize else 0.0  # rounding

    def product(a, b, clipped):
        value = sum(v * w for v, w in zip(a, b, strict=True))
        return 0.0 * value if clipped and np.real(value) <= edge else value

    values = []
    for i in range(len(x)):
        others = [(i, j) for j in range(len(x[i]))] if image_level else list(np.ndindex(len(x), len(x[i])))
        total = 0.0
        for p in range(len(x[i])):
            for k, j in others:
                ours = product(x[i][p], x[k][j], clip_negative == "both")
                total = total + (ours - product(y[i][p], y[k][j], clip_negative != "none")) ** 2
        values.append(total / (len(x[i]) * len(others)))
    return values


def _rounding(given):
    """For unit rows, that of the student's patches; otherwise products are squared."""
    if given.options.get("normalize", True):
        lengths = np.abs(given.inputs["student"]).max(-1).ravel()
        return 1.0, 1 / min((float(x) for x in lengths if x >= given.tiny), default=1.0)
    square = min(given.largest, 1e75) ** 2
    return square**2, square * given.largest


ROWS = (
    Loss(
        formula=gram_loss,
        inputs={"student": "patches", "teacher": "wide_patches"},
        learns=("student",),
        constant=("teacher",),
        options=(
            {},
            {"image_level": False},
            {"clip_negative": "both"},
            {"clip_negative": "teacher", "image_level": False},
            {"normalize": False, "clip_negative": "both"},
        ),
        forms={"image_level": (True, False, False), "clip_negative": ("none", "both", "teacher")},
        leading=False,
        batch_coupled=True,
        second_derivative=False,
        scale=0.1,  # the square of a difference of products
        rounding=_rounding,
        memory=Memory(jax=5, torch=10),
        depends_on_threads=True,
        benchmarks=(Benchmark("64×196×384", Sizes((64,), dim=384, teacher_dim=384, patches=196), torch=1.2, jax=1.4),),
    ),
)
