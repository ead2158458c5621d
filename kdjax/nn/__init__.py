"""The losses that own parameters or state, as modules: thin holders that call the functions.

State moves in training mode only: `module.eval()` uses it as it stands, `module.train()` moves it again.
"""

from kdjax.nn._state import LossState
from kdjax.nn.combined import CombinedLoss
from kdjax.nn.crcd import CRCDLoss
from kdjax.nn.dcn import DynamicCenterNormLoss
from kdjax.nn.dino import DINOLoss
from kdjax.nn.function import FunctionLoss
from kdjax.nn.reviewkd import ABF, ReviewKD
from kdjax.nn.uskd import USKDLoss

__all__ = [
    "ABF",
    "CRCDLoss",
    "CombinedLoss",
    "DINOLoss",
    "DynamicCenterNormLoss",
    "FunctionLoss",
    "LossState",
    "ReviewKD",
    "USKDLoss",
]
