"""From a configuration to one combined loss."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx

from kdjax._typing import Array
from kdjax.features.hcl import hcl_loss
from kdjax.features.regression import bce_loss, mse_loss, smooth_l1_loss
from kdjax.logits.difference_kl import difference_kl_loss
from kdjax.logits.dkd import dkd_loss
from kdjax.logits.kl import kl_loss, symmetric_kl_loss
from kdjax.logits.nkd import nkd_loss
from kdjax.nn import CombinedLoss, CRCDLoss, DINOLoss, DynamicCenterNormLoss, FunctionLoss, USKDLoss
from kdjax.relations.euclidean_mse import euclidean_mse_loss

Source = str | Callable[[Mapping[str, Any]], Any]


class Term(NamedTuple):
    """One name of a configuration.

    Attributes:
        loss: a function, or a module to be built.
        reads: where its inputs come from.
        options: settings that differ from the loss's own defaults.
        arguments: what a module is built with: paths into the configuration, `"num_classes"`, `"num_data"`.
    """

    loss: Callable[..., Any]
    reads: tuple[Source, ...]
    options: Mapping[str, Any] = {}
    arguments: tuple[str, ...] = ()


def _teacher_class(inputs: Mapping[str, Any]) -> Array:
    return inputs["score_tea"].argmax(-1)


def _last_teacher_maps(inputs: Mapping[str, Any]) -> list[Array]:
    return list(inputs["feats_tea"])[-len(inputs["feats_stu"]) :]


def _kl_over_classes(student: Array, teacher: Array, *, temperature: float = 1.0, **options: Any) -> jax.Array:
    """KL averaged over classes too, as `kl_div` does unless told otherwise."""
    return kl_loss(student, teacher, temperature=temperature, **options) / student.shape[-1]


FEATURES, SCORES = ("stu", "tea"), ("score_stu", "score_tea")
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
        config: a mapping or an object with attributes: `MODEL.METRIC_LOSS_TYPE`, the prefix `kd` and then names of
            losses, as in `"kd-dino-bce-dkd"`; `MODEL.KD_LOSS_WEIGHT`, one number a name; `MODEL.FEAT_DIM`, the width
            of `feat["stu"]`, for dino, dcn and crcd; `MODEL.CLS_FEA_NUM`, the width of `feat["fea_stu"]`, for uskd;
            and optionally `MODEL.KD_LOSS_ARGS`, settings by name, as in `{"dkd": {"beta": 8.0}}`.
        num_classes: the number of classes.
        num_data: the number of samples in the data set.
        conventions: `"published"` for the formulas of this package; `"founding"` for the founding code's numbers: kld
            and skld are KL(q‖p) averaged over batch and classes, kld reads the features, eu_mse the scores, and crcd
            takes `target` as index.
        rngs: of Flax, for the parameters; `nnx.Rngs(0)` if None.

    Returns:
        A `CombinedLoss`: called with `score`, `feat`, `fea`, `target` and `epoch` it gives the weighted sum, `.terms`
        of the same gives the value of each, and `.losses[name]` is the loss itself.

    Raises:
        ValueError: an unknown name, a name given twice, a missing prefix or key, no name, a number of weights that
            differs, a weight that is no finite number, a width or number below 1, an unknown setting, or one that a
            module refuses; what a function refuses it refuses when it is called.

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
    table = CONVENTIONS[conventions]
    names = _names(_get(config, "MODEL.METRIC_LOSS_TYPE"), table)
    weights = _weights(_get(config, "MODEL.KD_LOSS_WEIGHT"))
    if len(weights) != len(names):
        raise ValueError(
            f"MODEL.KD_LOSS_WEIGHT must have one number a loss: {len(names)} for {names}, got {len(weights)}: {weights}"
        )
    settings = _mapping("", _get(config, "MODEL.KD_LOSS_ARGS", default={}), {"dkd": {"beta": 8.0}})
    if stray := sorted(set(settings) - set(names), key=str):
        raise ValueError(f"MODEL.KD_LOSS_ARGS must name losses of MODEL.METRIC_LOSS_TYPE, {names}, got {stray}")

    rngs = nnx.Rngs(0) if rngs is None else rngs
    known = {"num_classes": num_classes, "num_data": num_data}
    losses: dict[str, Any] = {}
    for name in names:
        term = table[name]
        options = {**term.options, **_options(name, term.loss, settings.get(name, {}))}
        arguments = [
            _size(f"`{path}`", known[path]) if path in known else _size(path, _get(config, path, name))
            for path in term.arguments
        ]
        if inspect.isclass(term.loss):
            source = {"rngs": rngs} if "rngs" in _parameters(term.loss) else {}
            losses[name] = term.loss(*arguments, **options, **source)
        else:
            losses[name] = FunctionLoss(term.loss, **options)
    return CombinedLoss(losses, weights, [table[name].reads for name in names])


def _names(text: str, table: Mapping[str, Term]) -> list[str]:
    prefix, *names = str(text).split("-")
    if prefix != "kd":
        raise ValueError(f"MODEL.METRIC_LOSS_TYPE must begin with 'kd-', as in 'kd-dino-bce-dkd', got {text!r}")
    if not any(names):
        raise ValueError(
            f"MODEL.METRIC_LOSS_TYPE must name at least one loss after 'kd-', of {sorted(table)}, got {text!r}"
        )
    for name in names:
        if name not in table:
            near = difflib.get_close_matches(name.lower(), table, 1, 0)
            raise ValueError(
                f"MODEL.METRIC_LOSS_TYPE names an unknown loss {name!r}; did you mean {near[0]!r}? known are {sorted(table)}"
            )
        if names.count(name) > 1:
            raise ValueError(
                f"MODEL.METRIC_LOSS_TYPE names {name!r} more than once: {text!r}; give it one weight instead"
            )
    return names


def _get(config: Any, path: str, needed_by: str | None = None, **default: Any) -> Any:
    node = config
    for i, key in enumerate(path.split(".")):
        keys = list(node) if isinstance(node, Mapping) else [k for k in dir(node) if not k.startswith("_")]
        if key not in keys:
            if default:
                return default["default"]
            above = ".".join(path.split(".")[:i]) or "the configuration"
            reason = f", which the loss {needed_by!r} needs" if needed_by else ""
            raise ValueError(f"the configuration has no {path}{reason}; {above} has {keys}")
        node = node[key] if isinstance(node, Mapping) else getattr(node, key)
    return node


def _weights(given: Any) -> list[float]:
    try:
        weights = [float(weight) for weight in ("" if isinstance(given, str | Mapping) else given)]
    except (TypeError, ValueError):
        weights = []
    if not weights or not all(map(math.isfinite, weights)):
        raise ValueError(f"MODEL.KD_LOSS_WEIGHT must be finite numbers, one a loss, as in [1.0, 0.5], got {given!r}")
    return weights


def _mapping(place: str, given: Any, example: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"MODEL.KD_LOSS_ARGS{place} must be a mapping, as in {example}, got {given!r}")
    return dict(given)


def _size(path: str, given: Any) -> int:
    if not hasattr(given, "__index__") or given < 1:
        raise ValueError(f"{path} must be a whole number of at least 1, got {given!r}")
    return operator.index(given)


def _options(name: str, loss: Callable[..., Any], given: Any) -> dict[str, Any]:
    given = _mapping(f"[{name!r}]", given, {"temperature": 4.0})
    known = [
        name
        for name, parameter in _parameters(loss).items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("rngs", "where", "reduction", "axis_name")
    ]
    if stray := sorted(set(given) - set(known), key=str):
        raise ValueError(f"MODEL.KD_LOSS_ARGS[{name!r}] must have settings of {known}, got {stray}")
    return given


def _parameters(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(loss.__init__ if inspect.isclass(loss) else loss).parameters
