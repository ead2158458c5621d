"""The losses that own parameters or state, as modules: thin holders that call the functions.

State moves in training mode only: `module.eval()` uses it as it stands, `module.train()` moves it again.

A call changes the value of a Variable, as `nnx.BatchNorm` does, and the Variable stays. Give a module as an argument to
`nnx.jit`, `nnx.grad` and the other transformations of Flax, which hand its state out. `jax.jit` takes a module too, but
drops what it changes. To use JAX's own transformations, split the module, merge it inside by `nnx.merge(..., copy=True)`,
and return its state.
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
