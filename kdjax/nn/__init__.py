"""The losses that have parameters or state, as modules that hold them and call the functions.

State is updated only in training mode: after `module.eval()` it is used unchanged, and after `module.train()` it is
updated again.

A call changes the value of a Variable, as `nnx.BatchNorm` does. Pass the module as an argument to `nnx.jit`, `nnx.grad`
and the other transformations of Flax, which return its new state. `jax.jit` accepts a module too, but drops the
changes. To use JAX's own transformations, split the module, merge it inside with `nnx.merge(..., copy=True)`, and
return its state.
"""

from kdjax.nn._state import LossState
from kdjax.nn.combined import CombinedLoss
from kdjax.nn.crcd import CRCDLoss
from kdjax.nn.crd import CRDLoss
from kdjax.nn.dcn import DynamicCenterNormLoss
from kdjax.nn.dino import DINOLoss
from kdjax.nn.function import FunctionLoss
from kdjax.nn.ibot import IBOTLoss
from kdjax.nn.projector import Projector
from kdjax.nn.reviewkd import ABF, ReviewKD
from kdjax.nn.uskd import USKDLoss
from kdjax.nn.vid import VIDLoss

__all__ = [
    "ABF",
    "CRCDLoss",
    "CRDLoss",
    "CombinedLoss",
    "DINOLoss",
    "DynamicCenterNormLoss",
    "FunctionLoss",
    "IBOTLoss",
    "LossState",
    "Projector",
    "ReviewKD",
    "USKDLoss",
    "VIDLoss",
]
