"""Knowledge-distillation losses as pure PyTorch functions; `kdjax` holds the same in JAX.

Every setting is a constant, except the temperatures that act on the student (`temperature`, `student_temperature`): in kdjax
its gradient is 0; kdtorch raises a `ValueError` if it is a tensor that requires a gradient.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"kdtorch needs {error.name}: pip install 'kdlosses[torch]'", name=error.name) from error

from kdlosses import __version__ as __version__
from kdtorch.features.dcn import dcn_loss
from kdtorch.features.hcl import hcl_loss
from kdtorch.features.regression import bce_loss, mse_loss, smooth_l1_loss
from kdtorch.logits.difference_kl import difference_kl_loss
from kdtorch.logits.dkd import dkd_loss
from kdtorch.logits.kl import kl_loss, symmetric_kl_loss
from kdtorch.logits.nkd import nkd_loss
from kdtorch.logits.topk_kl import topk_kl_loss
from kdtorch.logits.uskd import uskd_loss
from kdtorch.make_loss import make_loss
from kdtorch.relations.crcd import CRCDState, crcd_init, crcd_loss, crcd_negatives
from kdtorch.relations.euclidean_mse import euclidean_mse_loss
from kdtorch.selfsupervised.dino import DINOState, dino_init, dino_loss, dino_teacher_temperature

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
