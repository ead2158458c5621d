"""Knowledge-distillation losses as pure JAX functions; `kdtorch` holds the same in PyTorch.

Every setting is a constant, except the temperatures that act on the student (`temperature`, `student_temperature`): in kdjax
its gradient is 0; kdtorch raises a `ValueError` if it is a tensor that requires a gradient.
"""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"kdjax needs {error.name}: pip install 'kdlosses[jax]'", name=error.name) from error

from kdjax.features.dcn import dcn_loss
from kdjax.features.hcl import hcl_loss
from kdjax.features.regression import bce_loss, mse_loss, smooth_l1_loss
from kdjax.logits.difference_kl import difference_kl_loss
from kdjax.logits.dkd import dkd_loss
from kdjax.logits.kl import kl_loss, symmetric_kl_loss
from kdjax.logits.nkd import nkd_loss
from kdjax.logits.topk_kl import topk_kl_loss
from kdjax.logits.uskd import uskd_loss
from kdjax.make_loss import make_loss
from kdjax.relations.crcd import CRCDState, crcd_init, crcd_loss, crcd_negatives
from kdjax.relations.euclidean_mse import euclidean_mse_loss
from kdjax.selfsupervised.dino import DINOState, dino_init, dino_loss, dino_teacher_temperature
from kdlosses import __version__ as __version__

__all__ = [
    "CRCDState",
    "DINOState",
    "bce_loss",
    "crcd_init",
    "crcd_loss",
    "crcd_negatives",
    "dcn_loss",
    "difference_kl_loss",
    "dino_init",
    "dino_loss",
    "dino_teacher_temperature",
    "dkd_loss",
    "euclidean_mse_loss",
    "hcl_loss",
    "kl_loss",
    "make_loss",
    "mse_loss",
    "nkd_loss",
    "smooth_l1_loss",
    "symmetric_kl_loss",
    "topk_kl_loss",
    "uskd_loss",
]
