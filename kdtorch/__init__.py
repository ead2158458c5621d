"""Knowledge-distillation losses as pure PyTorch functions; `kdjax` holds the same in JAX.

A loss takes the outputs of a student and a teacher, and returns a number to minimise. `kdtorch.nn` has modules for the
losses that have parameters or a state, `kdtorch.interop` exchanges models, losses and states with the other framework,
and `kdtorch.teacher_cache` stores a teacher's outputs on disk. `python -m kdtorch` lists the losses.

>>> import torch
>>> from kdtorch import kl_loss
>>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True), torch.tensor([[1.0, 1.0, -1.0]])
>>> value = kl_loss(student, teacher, temperature=2.0)
>>> value.backward()
>>> print(f"{value:.4f}", [round(x, 2) for x in student.grad[0].tolist()])
0.4095 [0.41, -0.38, -0.03]

What all losses share:

- **Order of the arguments**: student, teacher, then labels or an index, then parameters, then a state. All other arguments are
  passed by keyword. A loss with a state returns its value and the next state.
- **Shapes**: most losses take any leading axes, `[*batch, classes]`, so that `[batch, tokens, vocabulary]` works. Losses that
  compare examples with each other take `[batch, dim]`.
- **The teacher is constant**: its gradient is exactly 0, whichever model the second argument comes from. The exceptions
  are `crcd_loss` and `crd_loss`, which pass a gradient to the teacher's embedding, because the embedding comes from a
  head that is trained. `uskd_loss` has no teacher: its second argument, the weak logits, is trained.
- **Precision**: float16 and bfloat16 inputs are computed and returned in float32; float32 and float64 stay as they are.
  A gradient has the dtype of its input, a state is float32 or float64. Until the backward pass, kdtorch stores only the
  gradient, in the input's dtype. It stores nothing of the teacher, which may come from `torch.inference_mode` or be
  changed in place after the loss. With `"none"`, losses over pairs also store the student and a copy of the teacher.
- **`where`**: one Boolean per example, or per token; False leaves the example out. Examples that are left out
  contribute nothing to value, gradient or state, even if they hold NaN or a label out of range. If all examples are
  left out, the loss is 0.
- **`reduction`**: `"mean"` over the examples that are kept, `"sum"`, or `"none"` for one value per example, which is 0 for
  examples that are left out. In losses over pairs, the value of an example is the mean over its kept partners.
- **`axis_name`** in kdjax, **`group`** in kdtorch: the devices that the batch is spread over. Each of them calls the
  loss with its own examples. `axis_name` is a mesh axis of the `shard_map` around the call. `group` is a process group,
  whose ranks must have batches of the same size. The mean over devices of the returned values is the loss of the whole
  batch, for `"mean"` and for `"sum"`; in kdtorch the mean of their gradients is its gradient. The next state is the
  same on all devices.
- **`class_axis_name`** in kdjax, **`class_group`** in kdtorch: the devices that the classes are spread over, in losses
  that need only a few numbers per example from the other devices: the KL divergences, Jensen–Shannon, top-k, and the
  losses of linear heads. Each device passes the logits of the same examples, or the heads, for a contiguous range of the
  classes, in the order of the devices. The loss is the same on all devices, and the gradient of a device's logits or
  heads is its part of the whole gradient.
- **Finite results**: value and gradient are finite for every finite input, unless the exact number is too large for the
  dtype. A class at -inf in student and teacher is padding and contributes nothing. A loss is inf if its formula is, for
  example if the student gives -inf to a class that the teacher uses. An example whose logits are all -inf has no
  distribution: its value and its gradient are NaN, unless it is left out.
- **Settings**: a temperature that acts on the student (`temperature`, `student_temperature`) has a gradient if it is
  given as an array (a tensor in kdtorch). Every other setting is a constant: in kdjax its gradient is 0, and in kdtorch
  a tensor that requires a gradient is an error. Every number may be an integer.
- **Errors**: a `TypeError` for a shape or dtype that does not fit and a `ValueError` for a setting, with the same text
  in both packages. The value of an array is unknown while it is traced, so a setting that is an array and out of range
  makes the loss NaN. A label or index out of range is an `IndexError` in kdtorch; in kdjax the value of its example is
  NaN.
- **Transforms**: kdjax works under `jit`, `grad`, `vmap` and `scan`, kdtorch under `torch.compile(fullgraph=True)`,
  `torch.func.grad` and `torch.func.vmap`. A loss that cannot be differentiated twice raises an error that says so.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"kdtorch needs {error.name}: pip install 'kdlosses[torch]'", name=error.name) from error

from kdlosses import __version__ as __version__
from kdtorch._rowwise import fuse
from kdtorch.features.ab import ab_loss
from kdtorch.features.attention_transfer import attention_transfer_loss
from kdtorch.features.cosine import cosine_loss
from kdtorch.features.cwd import cwd_loss
from kdtorch.features.dcn import dcn_loss
from kdtorch.features.factor_transfer import factor_transfer_loss
from kdtorch.features.fsp import fsp_loss
from kdtorch.features.hcl import hcl_loss
from kdtorch.features.nst import nst_loss
from kdtorch.features.regression import bce_loss, mse_loss, smooth_l1_loss
from kdtorch.features.vid import vid_loss
from kdtorch.logits.alpha_beta import alpha_beta_loss
from kdtorch.logits.difference_kl import difference_kl_loss
from kdtorch.logits.dist import dist_loss
from kdtorch.logits.dkd import dkd_loss
from kdtorch.logits.jsd import jsd_loss
from kdtorch.logits.kl import kl_loss, symmetric_kl_loss
from kdtorch.logits.linear import linear_jsd_loss, linear_kl_loss, linear_reverse_kl_loss, linear_topk_kl_loss
from kdtorch.logits.nkd import nkd_loss
from kdtorch.logits.reverse_kl import reverse_kl_loss
from kdtorch.logits.sampled_kl import sampled_kl_loss
from kdtorch.logits.skew_kl import skew_kl_loss, skew_reverse_kl_loss
from kdtorch.logits.standardize import standardize_logits
from kdtorch.logits.taid import taid_loss
from kdtorch.logits.topk_kl import topk_kl_loss
from kdtorch.logits.tvd import tvd_loss
from kdtorch.logits.uld import uld_loss
from kdtorch.logits.uskd import uskd_loss
from kdtorch.make_loss import make_loss
from kdtorch.relations.correlation import correlation_loss
from kdtorch.relations.crcd import CRCDState, crcd_init, crcd_loss, crcd_negatives
from kdtorch.relations.crd import CRDState, crd_init, crd_loss
from kdtorch.relations.euclidean_mse import euclidean_mse_loss
from kdtorch.relations.instance_graph import instance_graph_loss
from kdtorch.relations.minilm import minilm_loss
from kdtorch.relations.pkt import pkt_loss
from kdtorch.relations.rkd import rkd_loss
from kdtorch.relations.similarity import similarity_loss
from kdtorch.selfsupervised.dino import DINOState, dino_init, dino_loss, dino_teacher_temperature
from kdtorch.selfsupervised.gram import gram_loss
from kdtorch.selfsupervised.ibot import IBOTState, ibot_init, ibot_loss
from kdtorch.selfsupervised.koleo import koleo_loss
from kdtorch.selfsupervised.sinkhorn_knopp import sinkhorn_knopp

__all__ = [
    "CRCDState",
    "CRDState",
    "DINOState",
    "IBOTState",
    "ab_loss",
    "alpha_beta_loss",
    "attention_transfer_loss",
    "bce_loss",
    "correlation_loss",
    "cosine_loss",
    "crcd_init",
    "crcd_loss",
    "crcd_negatives",
    "crd_init",
    "crd_loss",
    "cwd_loss",
    "dcn_loss",
    "difference_kl_loss",
    "dino_init",
    "dino_loss",
    "dino_teacher_temperature",
    "dist_loss",
    "dkd_loss",
    "euclidean_mse_loss",
    "factor_transfer_loss",
    "fsp_loss",
    "fuse",
    "gram_loss",
    "hcl_loss",
    "ibot_init",
    "ibot_loss",
    "instance_graph_loss",
    "jsd_loss",
    "kl_loss",
    "koleo_loss",
    "linear_jsd_loss",
    "linear_kl_loss",
    "linear_reverse_kl_loss",
    "linear_topk_kl_loss",
    "make_loss",
    "minilm_loss",
    "mse_loss",
    "nkd_loss",
    "nst_loss",
    "pkt_loss",
    "reverse_kl_loss",
    "rkd_loss",
    "sampled_kl_loss",
    "similarity_loss",
    "sinkhorn_knopp",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
    "smooth_l1_loss",
    "standardize_logits",
    "symmetric_kl_loss",
    "taid_loss",
    "topk_kl_loss",
    "tvd_loss",
    "uld_loss",
    "uskd_loss",
    "vid_loss",
]
