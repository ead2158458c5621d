"""Builds one combined loss from a configuration."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import kdjax
from kdjax._typing import Array, AxisName, Bool, Float, Reduction
from kdjax.features.hcl import hcl_loss
from kdjax.features.regression import bce_loss, mse_loss, smooth_l1_loss
from kdjax.logits.difference_kl import difference_kl_loss
from kdjax.logits.dkd import dkd_loss
from kdjax.logits.kl import kl_loss, symmetric_kl_loss
from kdjax.logits.nkd import nkd_loss
from kdjax.nn import CombinedLoss, CRCDLoss, CRDLoss, DINOLoss, DynamicCenterNormLoss, FunctionLoss, IBOTLoss, USKDLoss
from kdjax.relations.euclidean_mse import euclidean_mse_loss
from kdjax.relations.minilm import minilm_loss
from kdjax.selfsupervised.gram import gram_loss
from kdlosses.config import READS, Source, Term, by_function, example, parameters, read, refused


def _teacher_class(inputs: Mapping[str, Any]) -> Array:
    return inputs["score_tea"].argmax(-1)


def _last_teacher_maps(inputs: Mapping[str, Any]) -> list[Array]:
    return list(inputs["feats_tea"])[-len(inputs["feats_stu"]) :]


def _last_student_map(inputs: Mapping[str, Any]) -> Array:
    return _last(inputs["feats_stu"])


def _last_teacher_map(inputs: Mapping[str, Any]) -> Array:
    return _last(inputs["feats_tea"])


def _last(maps: Any) -> Array:
    return maps[-1] if isinstance(maps, list | tuple) else maps


def _kl_over_classes(
    student: Float[Array, "*batch classes"],
    teacher: Float[Array, "*batch classes"],
    *,
    temperature: float = 1.0,
    where: Bool[Array, "*batch"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> jax.Array:
    """KL averaged over classes too, as `kl_div` of PyTorch does by default."""
    value = kl_loss(student, teacher, temperature=temperature, where=where, reduction=reduction, axis_name=axis_name)
    return value / student.shape[-1]


FEATURES, SCORES, PATCHES = ("stu", "tea"), ("score_stu", "score_tea"), ("patches_stu", "patches_tea")
FEAT_DIM, CLS_FEA_NUM = "MODEL.FEAT_DIM", "MODEL.CLS_FEA_NUM"

PUBLISHED: dict[str, Term] = {
    "dino": Term(DINOLoss, (*FEATURES, "epoch"), arguments=(FEAT_DIM,)),
    "bce": Term(bce_loss, FEATURES),
    "mse": Term(mse_loss, FEATURES),
    "sml": Term(smooth_l1_loss, FEATURES),
    "dcn": Term(DynamicCenterNormLoss, (*FEATURES, "target"), arguments=("num_classes", FEAT_DIM)),
    "crcd": Term(CRCDLoss, (*FEATURES, "index"), arguments=(FEAT_DIM, FEAT_DIM, FEAT_DIM, "num_data")),
    "rkd": Term(hcl_loss, ("feats_stu", _last_teacher_maps)),
    "diff": Term(difference_kl_loss, SCORES),
    "skld": Term(symmetric_kl_loss, SCORES),
    "kld": Term(kl_loss, SCORES),
    "eu_mse": Term(euclidean_mse_loss, FEATURES),
    "dkd": Term(dkd_loss, (*SCORES, "target"), {"alpha": 1.0, "beta": 1.0, "temperature": 1.0}),
    "nkd": Term(nkd_loss, (*SCORES, "target")),
    "uskd": Term(USKDLoss, ("fea_stu", "score_stu", "target"), arguments=(CLS_FEA_NUM, "num_classes")),
    "uskd_tea": Term(USKDLoss, ("fea_stu", "score_stu", _teacher_class), arguments=(CLS_FEA_NUM, "num_classes")),
}

FOUNDING: dict[str, Term] = PUBLISHED | {
    "kld": Term(_kl_over_classes, FEATURES),
    "skld": Term(_kl_over_classes, SCORES),
    "eu_mse": Term(euclidean_mse_loss, SCORES),
    "crcd": PUBLISHED["crcd"]._replace(reads=(*FEATURES, "target")),
}

# losses that have no name in the founding repository, and need a module for their state, or inputs of tokens or patches
OTHERS: dict[str, Term] = {
    "crd": Term(CRDLoss, (*FEATURES, "index"), arguments=(FEAT_DIM, FEAT_DIM, FEAT_DIM, "num_data")),
    "minilm": Term(minilm_loss, ("tokens_stu", "tokens_tea")),
    "gram": Term(gram_loss, PATCHES),
    "ibot": Term(IBOTLoss, (*PATCHES, "mask", "epoch"), arguments=(FEAT_DIM,)),
}

# the inputs of losses of feature maps in addition to `READS`: the teacher's last maps, or the last map
MAPS: dict[str, Source] = {
    "teacher_maps": _last_teacher_maps,
    "student_map": _last_student_map,
    "teacher_map": _last_teacher_map,
}

CONVENTIONS = {"published": PUBLISHED, "founding": FOUNDING}


def make_loss(
    config: Any,
    num_classes: int,
    num_data: int,
    *,
    conventions: Literal["published", "founding"] = "published",
    rngs: nnx.Rngs | None = None,
) -> CombinedLoss:
    """Build the weighted sum of losses that a configuration names.

    Args:
        config: a mapping or an object with attributes: `MODEL.METRIC_LOSS_TYPE`, the prefix `kd` followed by the names
            of losses, as in `"kd-dino-bce-dkd"`; `MODEL.KD_LOSS_WEIGHT`, a number or a function of the epoch for each
            name; `MODEL.FEAT_DIM`, the width of `feat["stu"]` and of patches, for dino, dcn, crcd, crd, ibot;
            `MODEL.CLS_FEA_NUM`, the width of `feat["fea_stu"]`, for uskd; and optionally `MODEL.KD_LOSS_ARGS`, settings
            by name, as in `{"dkd": {"beta": 8.0}}`, also a mapping or an object.
        num_classes: the number of classes.
        num_data: the number of samples in the data set.
        conventions: `"published"` for the formulas of this package; `"founding"` for the founding code's numbers: kld
            and skld are KL(q‖p) averaged over batch and classes, kld reads the features, eu_mse reads the scores, and
            crcd uses `target` as the index.
        rngs: of Flax, for the parameters; `nnx.Rngs(0)` if None.

    Returns:
        A `CombinedLoss`: called with `score`, `feat`, `fea`, `target` and `epoch` it returns the weighted sum, `.terms`
        with the same arguments returns the value of each loss, and `.losses[name]` is the loss itself.

    Raises:
        ValueError: an unknown, repeated or empty name, a missing prefix or key, no name, a different number of weights
            than of names, a weight that is negative or not a finite number, a width or number below 1, an unknown
            setting, a setting that the loss does not accept, a loss whose state no module holds.

    A name is one of the founding code's, or the name of a function, with or without `_loss`: `kl_loss` or `kl`. With
    the name of its function, a loss has the function's defaults, and reads `score_stu` and `score_tea` for logits,
    `stu` and `tea` for features, `feats_stu` and `feats_tea` for maps (a loss of one map uses the last), `tokens_stu`
    and `tokens_tea` for tokens (`minilm`), `patches_stu` and `patches_tea` for patches, `target` for labels, and for
    any other parameter the entry of `feat` with the parameter's name. The founding names keep their meaning: `rkd` is
    ReviewKD's `hcl_loss`, not `rkd_loss`, and `dkd` gives both its parts the weight 1, at temperature 1.

    >>> import jax.numpy as jnp
    >>> from kdjax import make_loss
    >>> model = {"METRIC_LOSS_TYPE": "kd-kld-dkd", "KD_LOSS_WEIGHT": [1.0, 0.5]}
    >>> loss = make_loss({"MODEL": model}, num_classes=3, num_data=100)
    >>> s, t = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, -1.0]])
    >>> scores = {"score_stu": s, "score_tea": t}
    >>> print(f"{loss(feat=scores, target=jnp.array([0])):.4f}")
    0.6326
    """
    if conventions not in CONVENTIONS:
        raise ValueError(f"`conventions` must be one of {list(CONVENTIONS)}, got {conventions!r}")
    functions = by_function(kdjax, PUBLISHED, {**READS, **MAPS})
    functions |= {f"{name}{end}": term for name, term in OTHERS.items() for end in ("", "_loss")}
    numbers = {"num_classes": num_classes, "num_data": num_data}
    wanted, weights = read(config, CONVENTIONS[conventions], functions, numbers)
    rngs = nnx.Rngs(0) if rngs is None else rngs
    losses: dict[str, Any] = {}
    for name, loss, _, arguments, options in wanted:
        source = {"rngs": rngs} if "rngs" in parameters(loss) else {}
        try:
            if inspect.isclass(loss):
                losses[name] = loss(*arguments, **options, **source)
            else:
                _try(loss, options)
                losses[name] = FunctionLoss(loss, **options)
        except (TypeError, ValueError) as error:
            raise refused(name, error) from error
    return CombinedLoss(losses, weights, [loss.reads for loss in wanted])


def _try(loss: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check the settings of a loss before the first batch, by calling it once."""
    dtypes = {"float": jnp.float32, "int": jnp.int32, "bool": jnp.bool_}
    inputs = example(loss, lambda shape, kind: jax.ShapeDtypeStruct(shape, dtypes[kind])) if options else None
    if inputs is not None:
        jax.eval_shape(functools.partial(loss, **options), *inputs)
