"""What the losses hold: no array that the contract does not name. Asked of the compiler and the profiler, not of the clock."""

import jax
import pytest
import torch

import kdjax
import kdtorch

B, C, D, K, N = 96, 700, 64, 300, 4000
VIEWS, WIDTH = 6, 3000
LOGITS = {"student": (B, C), "teacher": (B, C)}
FEATURES = {"student": (B, D), "teacher": (B, D)}
BANK = {"student_memory": (N, D), "teacher_memory": (N, D), "student_normalizer": (), "teacher_normalizer": ()}
MAPS = [(B, 12, 12, 20)]

# the shapes of the inputs, the entries of the largest array that may be held, and how many such arrays JAX holds at once
CASES = {
    "kl_loss": (LOGITS, B * C, 5),
    "symmetric_kl_loss": (LOGITS, B * C, 5),
    "dkd_loss": ({**LOGITS, "labels": (B,)}, B * C, 5),
    "nkd_loss": ({**LOGITS, "labels": (B,)}, B * C, 7),
    "uskd_loss": ({**LOGITS, "labels": (B,)}, B * C, 25),
    "difference_kl_loss": (LOGITS, B * B + B * C, 20),
    "euclidean_mse_loss": (FEATURES, B * B + B * D, 5),
    "hcl_loss": ({"student": MAPS, "teacher": MAPS}, B * 12 * 12 * 20, 3),
    "dcn_loss": ({**FEATURES, "labels": (B,), "centers": (N, D)}, B * D + N * D, 2),
    "crcd_loss": ({**FEATURES, "index": (B,), "negatives": (B, K), "state": BANK}, B * K * 4 + N * D, 6),
    "dino_loss": ({"student": (VIEWS, B, WIDTH), "teacher": (2, B, WIDTH), "state": {"center": (WIDTH,)}}, VIEWS * B * WIDTH, 3),
}  # fmt: skip


def inputs(package, name, number, index):
    def of(key, shape):
        if isinstance(shape, list):
            return [number(x) for x in shape]
        if isinstance(shape, dict):
            state = {"dino_loss": package.DINOState, "crcd_loss": package.CRCDState}[name]
            return state(**{field: number(x) for field, x in shape.items()})
        return (index if key in ("labels", "index", "negatives") else number)(shape)

    return [of(key, shape) for key, shape in CASES[name][0].items()]


def value(package, name, given):
    result = getattr(package, name)(*given)
    return result[0] if type(result) is tuple else result


@pytest.mark.parametrize("name", CASES)
def test_temporaries_of_jax(name):
    _, entries, arrays = CASES[name]
    with jax.enable_x64(False):
        given = inputs(kdjax, name, *(lambda shape, d=d: jax.ShapeDtypeStruct(shape, d) for d in ("float32", "int32")))
        program = jax.jit(jax.value_and_grad(lambda *given: value(kdjax, name, given))).lower(*given).compile()
    assert program.memory_analysis().temp_size_in_bytes <= 4 * entries * arrays


@pytest.mark.parametrize("name", CASES)
def test_largest_array_of_torch(name):
    _, entries, _ = CASES[name]
    given = inputs(kdtorch, name, torch.randn, lambda shape: torch.randint(7, shape))
    learned = given[0] if isinstance(given[0], list) else given[:1]
    for x in learned:
        x.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        value(kdtorch, name, given).backward()
    largest = max(x.self_cpu_memory_usage for x in profile.events())
    assert (
        4 * learned[0].numel() <= largest <= 12 * entries
    )  # the gradient at least; a sort holds keys and int64 places
