"""The losses that have parameters or state, as modules that hold them and call the functions.

State is updated only in training mode: after `module.eval()` it is used unchanged, and after `module.train()` it is
updated again.

A call writes into the buffers, as `torch.nn.BatchNorm2d` does. `half()`, `bfloat16()` and `to(dtype)` leave a state in
float32, because small steps are lost in half precision. Inside `torch.func.grad` no tensor from outside can be changed:
pass the buffers with `torch.func.functional_call`, or call `module.eval()`.
"""

from kdtorch.nn.combined import CombinedLoss
from kdtorch.nn.crcd import CRCDLoss
from kdtorch.nn.crd import CRDLoss
from kdtorch.nn.dcn import DynamicCenterNormLoss
from kdtorch.nn.dino import DINOLoss
from kdtorch.nn.function import FunctionLoss
from kdtorch.nn.ibot import IBOTLoss
from kdtorch.nn.projector import Projector
from kdtorch.nn.reviewkd import ABF, ReviewKD
from kdtorch.nn.uskd import USKDLoss
from kdtorch.nn.vid import VIDLoss

__all__ = [
    "ABF",
    "CRCDLoss",
    "CRDLoss",
    "CombinedLoss",
    "DINOLoss",
    "DynamicCenterNormLoss",
    "FunctionLoss",
    "IBOTLoss",
    "Projector",
    "ReviewKD",
    "USKDLoss",
    "VIDLoss",
]
