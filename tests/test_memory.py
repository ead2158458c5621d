"""What the compiled programs hold: no array that the contract does not name. Asked of the compiler, not of the clock."""

import jax
import pytest

import kdjax

B, C, D, K, N = 96, 700, 64, 300, 4000


def numbers(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def indices(*shape):
    return jax.ShapeDtypeStruct(shape, "int32")


def memory_of_bank():
    return kdjax.CRCDState(numbers(N, D), numbers(N, D), numbers(), numbers())


VIEWS, WIDTH = 6, 3000
# the function, its inputs, the entries of the largest array that it may hold, and how many such arrays at once
CASES = {
    "kl_loss": (kdjax.kl_loss, (numbers(B, C), numbers(B, C)), B * C, 5),
    "dkd_loss": (kdjax.dkd_loss, (numbers(B, C), numbers(B, C), indices(B)), B * C, 5),
    "nkd_loss": (kdjax.nkd_loss, (numbers(B, C), numbers(B, C), indices(B)), B * C, 7),
    "topk_kl_loss": (kdjax.topk_kl_loss, (numbers(B, C), numbers(B, 64), indices(B, 64), numbers(B)), B * C, 5),
    "difference_kl_loss": (kdjax.difference_kl_loss, (numbers(B, C), numbers(B, C)), B * B + B * C, 20),
    "euclidean_mse_loss": (kdjax.euclidean_mse_loss, (numbers(B, D), numbers(B, D)), B * B + B * D, 5),
    "dcn_loss": (kdjax.dcn_loss, (numbers(B, D), numbers(B, D), indices(B), numbers(N, D)), B * D + N * D, 2),
    "crcd_loss": (kdjax.crcd_loss, (numbers(B, D), numbers(B, D), indices(B), indices(B, K), memory_of_bank()), B * K * 4 + N * D, 6),
    "dino_loss": (kdjax.dino_loss, (numbers(VIEWS, B, WIDTH), numbers(2, B, WIDTH), kdjax.DINOState(numbers(WIDTH))), VIEWS * B * WIDTH, 3),
}  # fmt: skip


def temporaries(function, inputs):
    def value(*inputs):
        result = function(*inputs)
        return result if isinstance(result, jax.Array) else result[0]

    program = jax.jit(jax.value_and_grad(value)).lower(*inputs).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", CASES)
def test_temporaries(name):
    function, inputs, entries, arrays = CASES[name]
    with jax.enable_x64(False):
        assert temporaries(function, inputs) <= 4 * entries * arrays
