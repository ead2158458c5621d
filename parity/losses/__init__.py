"""The formulas in NumPy with plain loops, importing neither package.

Each function takes arrays of examples (no leading axes, no mask) and returns one value an example, and the next state
if it has one. Written so that complex numbers pass through: a derivative is the imaginary part of the value at an
input moved by a tiny imaginary step, which has no rounding error of a difference. What is constant to the gradient
goes through `constant`.
"""

from parity.oracle.crcd import crcd_loss
from parity.oracle.dcn import dcn_loss
from parity.oracle.difference_kl import difference_kl_loss
from parity.oracle.dino import dino_loss
from parity.oracle.dkd import dkd_loss
from parity.oracle.euclidean_mse import euclidean_mse_loss
from parity.oracle.hcl import hcl_loss
from parity.oracle.kl import kl_loss, symmetric_kl_loss
from parity.oracle.nkd import nkd_loss
from parity.oracle.regression import bce_loss, mse_loss, smooth_l1_loss
from parity.oracle.topk_kl import topk_kl_loss
from parity.oracle.uskd import uskd_loss

__all__ = [
    "bce_loss",
    "crcd_loss",
    "dcn_loss",
    "difference_kl_loss",
    "dino_loss",
    "dkd_loss",
    "euclidean_mse_loss",
    "hcl_loss",
    "kl_loss",
    "mse_loss",
    "nkd_loss",
    "smooth_l1_loss",
    "symmetric_kl_loss",
    "topk_kl_loss",
    "uskd_loss",
]
