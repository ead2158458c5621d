"""Each mistake gives the same error in both packages: the argument, what was expected, what came, what to write."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from tiers import first, slow

both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
LOGITS, LABELS, MAP = np.zeros((4, 10)), np.zeros(4, int), np.zeros((2, 8, 8, 3))
VIEWS = np.zeros((2, 4, 6))
HIDDEN, HEAD = np.zeros((4, 5)), np.zeros((9, 5))
TOKENS, IMAGE = np.zeros((2, 6, 9)), np.zeros((2, 5, 3, 4))


def as_it_is(function):
    return function


def crcd(
    f,
    wrap=as_it_is,
    index=(0, 1),
    negatives=((2, 3), (4, 5)),
    dim=4,
    state_dim=4,
    dtype="float64",
    name="crcd",
    **options,
):
    given = f.arrays([np.ones((2, dim)), np.ones((2, dim)), np.array(index), np.array(negatives)])
    memories = [np.ones((6, state_dim)), np.ones((6, state_dim)), np.zeros(()), np.zeros(())]
    state = getattr(f.kd, f"{name.upper()}State")(*f.arrays(memories, dtype))
    return wrap(getattr(f.kd, f"{name}_loss"))(*given, state, **options)


def call(name, *arguments, **options):
    """A call whose NumPy arrays are converted to the framework's; `wrap` may compile the function."""

    def run(f, wrap=as_it_is):
        def given(x):
            return f.arrays(x) if isinstance(x, np.ndarray | np.generic | list) else x

        return wrap(getattr(f.kd, name))(*map(given, arguments), **{k: given(v) for k, v in options.items()})

    return run


def dino(*arguments, dim=6, **options):
    return lambda f, wrap=as_it_is: call("dino_loss", *arguments, f.kd.dino_init(dim), **options)(f, wrap)


def key(f):
    return jax.random.key(0) if f is JAX else None


@dataclasses.dataclass
class Output:
    """The output of a model of transformers."""

    logits: np.ndarray


MISTAKES = {
    "temperature 0": (
        call("kl_loss", LOGITS, LOGITS, temperature=0),
        ValueError,
        "`temperature` must be finite and greater than 0, got 0",
    ),
    "temperature negative": (
        call("dkd_loss", LOGITS, LOGITS, LABELS, temperature=-4.0),
        ValueError,
        "`temperature` .* got -4.0",
    ),
    "temperature NaN": (
        call("nkd_loss", LOGITS, LOGITS, LABELS, temperature=float("nan")),
        ValueError,
        "`temperature` .* got nan",
    ),
    "temperature a word": (
        call("kl_loss", LOGITS, LOGITS, temperature="4"),
        TypeError,
        r"kl_loss: `temperature` must be a number or a floating-point or integer array of shape \[\], got '4'",
    ),
    "temperature infinite": (
        call("kl_loss", LOGITS, LOGITS, temperature=float("inf")),
        ValueError,
        "`temperature` .* got inf",
    ),
    "a temperature an example": (
        call("kl_loss", LOGITS, LOGITS, temperature=np.ones(4)),
        TypeError,
        r"`temperature` must be a number or a floating-point or integer array of shape \[\], got float64\[4\]",
    ),
    "negative weight": (
        call("dkd_loss", LOGITS, LOGITS, LABELS, beta=-1.0),
        ValueError,
        "`beta` must be finite and at least 0, got -1.0",
    ),
    "smooth l1 beta": (
        call("smooth_l1_loss", LOGITS, LOGITS, beta=0.0),
        ValueError,
        "`beta` must be finite and greater than 0",
    ),
    "momentum": (
        dino(VIEWS, VIEWS, center_momentum=1.5),
        ValueError,
        "`center_momentum` must be between 0 and 1, got 1.5",
    ),
    "reduction": (
        call("mse_loss", LOGITS, LOGITS, reduction="batchmean"),
        ValueError,
        '`reduction` must be one of "mean", "sum", "none", got \'batchmean\'',
    ),
    "one class": (
        call("kl_loss", LOGITS[:, :1], LOGITS[:, :1]),
        ValueError,
        r"at least 2 classes .* got shape \[4, 1\]",
    ),
    "classes differ": (
        call("kl_loss", LOGITS, np.zeros((4, 12))),
        TypeError,
        r"kl_loss: `teacher_logits` must be Float\[Array, '\*batch classes'\], got float64\[4, 12\] beside "
        r"student_logits float64\[4, 10\]; teacher_logits has 2 more classes",
    ),
    "a padded vocabulary": (
        call("kl_loss", np.zeros((1, 152064)), np.zeros((1, 151936))),
        TypeError,
        r"student_logits has 128 more classes; if they are padding, cut them off: student_logits\[..., :151936\]; "
        "if the student uses them, give teacher_logits -inf there$",
    ),
    "features beside logits": (
        call("nkd_loss", np.zeros((4, 2, 256)), LOGITS, LABELS),
        TypeError,
        r"`teacher_logits` must be .*got float64\[4, 10\] beside student_logits float64\[4, 2, 256\]",
    ),
    "arguments swapped": (
        call("dkd_loss", LABELS, LOGITS, LOGITS),
        TypeError,
        r"`student_logits` must be Float.*; the order of the arrays is student_logits, teacher_logits, labels$",
    ),
    "batches differ": (
        call("mse_loss", LOGITS, LOGITS[:3]),
        TypeError,
        r"`teacher` must be .*got float64\[3, 10\] beside student .*; give both the same examples$",
    ),
    "rank": (
        call("difference_kl_loss", LOGITS[None], LOGITS[None]),
        TypeError,
        r"`student_logits` .*got float64\[1, 4, 10\]; give student_logits.reshape\(-1, 10\)$",
    ),
    "a lone number": (
        call("kl_loss", LOGITS[0], LOGITS[0, 0]),
        TypeError,
        r"`teacher_logits` must be .*got float64\[\] beside student_logits float64\[10\]$",
    ),
    "integer logits": (
        call("kl_loss", LABELS, LABELS),
        TypeError,
        r"`student_logits` must be Float.*got int(32|64)\[4\]",
    ),
    "float labels": (
        call("dkd_loss", LOGITS, LOGITS, np.zeros(4)),
        TypeError,
        r"dkd_loss: `labels` must be Integer\[Array, '\*batch'\], got float64\[4\] beside .*; cast labels to integers$",
    ),
    "one-hot labels": (
        call("dkd_loss", LOGITS, LOGITS, np.eye(10)[LABELS]),
        TypeError,
        r"`labels` must be Integer.*got float64\[4, 10\] beside .*; give labels.argmax\(-1\)$",
    ),
    "labels in a column": (
        call("dkd_loss", LOGITS, LOGITS, LABELS[:, None]),
        TypeError,
        r"`labels` must be .*got int(32|64)\[4, 1\] beside .*; give labels\[..., 0\]$",
    ),
    "mask of the wrong shape": (
        call("kl_loss", LOGITS, LOGITS, where=np.ones((4, 1), bool)),
        TypeError,
        r"`where` must be Bool\[Array, .* got bool\[4, 1\] beside .*; give where\[..., 0\]$",
    ),
    "mask of numbers": (
        call("kl_loss", LOGITS, LOGITS, where=np.ones(4)),
        TypeError,
        r"`where` must be Bool.* got float64\[4\] beside .*; give where != 0$",
    ),
    "width of the centres": (
        call("dcn_loss", LOGITS, LOGITS, LABELS, np.zeros((5, 7))),
        TypeError,
        r"`centers` must be .*got float64\[5, 7\] beside student float64\[4, 10\]",
    ),
    "no maps": (call("hcl_loss", [], []), ValueError, "must hold the same number of maps, at least one, got 0 and 0"),
    "numbers of maps": (
        call("hcl_loss", [MAP], [MAP, MAP]),
        ValueError,
        "got 1 and 2; give only the teacher's maps that",
    ),
    "shapes of maps": (
        call("hcl_loss", [MAP, MAP], [MAP, MAP[:, :4]]),
        ValueError,
        r"`student_maps\[1\]` and `teacher_maps\[1\]` must have the same shape, got \[2, 8, 8, 3\] and \[2, 4, 8, 3\]; "
        "ReviewKD's connectors",
    ),
    "channels first and last": (
        call("hcl_loss", [MAP], [np.moveaxis(MAP, -1, 1)]),
        ValueError,
        r"same shape, got \[2, 8, 8, 3\] and \[2, 3, 8, 8\]; use the same order of axes for both, and give the "
        "axis of the channels as `channel_axis`$",
    ),
    "shapes of maps that need a projection": (
        call("ab_loss", [MAP], [MAP[..., :2]]),
        ValueError,
        r"`student_maps\[0\]` and `teacher_maps\[0\]` must have the same shape, got \[2, 8, 8, 3\] and \[2, 8, 8, 2\]; "
        "`Projector` in `nn` maps a student.s channels to the teacher.s; resize it to the same height and width$",
    ),
    "channels of factors": (
        call("factor_transfer_loss", MAP, MAP[..., :2], channel_axis=-1),
        ValueError,
        "`student_map` and `teacher_map` must have the same number of channels, got 3 and 2; map the student's channels to the teacher's "
        "with `Projector` in `nn`, or compare the means over channels with `channel_mean=True`$",
    ),
    "a list of maps for one": (
        call("factor_transfer_loss", [MAP], [MAP]),
        TypeError,
        "`student_map` must be Float",
    ),
    "a power below 1": (
        call("attention_transfer_loss", [MAP], [MAP], p=0.5),
        ValueError,
        "`p` must be finite and at least 1, got 0.5$",
    ),
    "a power of 0": (
        call("factor_transfer_loss", MAP, MAP, p1=0),
        ValueError,
        "`p1` must be a whole number of at least 1, got 0$",
    ),
    "an infinite power": (
        call("factor_transfer_loss", MAP, MAP, p2=float("inf")),
        ValueError,
        "`p2` must be finite and at least 1, got inf$",
    ),
    "no margin": (
        call("ab_loss", [MAP], [MAP], margin=0.0),
        ValueError,
        "`margin` must be finite and greater than 0, got 0.0$",
    ),
    "a flat map": (
        call("hcl_loss", [LOGITS], [LOGITS]),
        TypeError,
        r"`student_maps\[0\]` must be .*got float64\[4, 10\]$",
    ),
    "one map, no list": (
        call("hcl_loss", MAP, MAP),
        TypeError,
        r"`student_maps` must be Seq.*; give \[student_maps\]$",
    ),
    "one map to multiply": (
        call("fsp_loss", [MAP], [MAP]),
        ValueError,
        "must hold at least 2 maps, because each is multiplied by the next, got 1; add a map of another layer",
    ),
    "numbers of maps to multiply": (
        call("fsp_loss", [MAP, MAP], [MAP]),
        ValueError,
        "got 2 and 1; give only the teacher's maps that",
    ),
    "channels of maps to multiply": (
        call("fsp_loss", [MAP, MAP], [MAP, MAP[..., :2]], channel_axis=-1),
        ValueError,
        r"`student_maps\[1\]` and `teacher_maps\[1\]` must have the same number of channels, got 3 and 2; `Projector` in `nn`",
    ),
    "shapes of two maps": (
        call("cwd_loss", MAP, MAP[..., :2]),
        ValueError,
        r"`student_map` and `teacher_map` must have the same shape, got \[2, 8, 8, 3\] and \[2, 8, 8, 2\]; `Projector` in `nn` "
        "maps a student's channels to the teacher's",
    ),
    "a list for one map": (
        call("cwd_loss", [MAP], [MAP]),
        TypeError,
        r"`student_map` must be Float.*got list; give one array, such as student_map\[0\]",
    ),
    "channel axis of one map": (
        call("cwd_loss", MAP, MAP, channel_axis=4),
        ValueError,
        "`channel_axis` must be one of .*got 4",
    ),
    "shapes of a predicted map": (
        call("vid_loss", MAP, MAP[:, :4], np.zeros(3)),
        ValueError,
        r"`predicted_mean` and `teacher_map` must have the same shape, got \[2, 8, 8, 3\] and \[2, 4, 8, 3\]; `Projector`",
    ),
    "number of scales": (
        call("vid_loss", MAP, MAP, np.zeros(2), channel_axis=-1),
        ValueError,
        "`log_scale` must have one entry per channel, 3 in all, got 2",
    ),
    "least variance": (
        call("vid_loss", MAP, MAP, np.zeros(3), channel_axis=-1, eps=0.0),
        ValueError,
        "`eps` must be finite and greater than 0, got 0.0",
    ),
    "channel axis": (
        call("hcl_loss", [MAP], [MAP], channel_axis=0),
        ValueError,
        "`channel_axis` must be one of .*got 0",
    ),
    "one view": (
        dino(VIEWS[:1], VIEWS[:1]),
        ValueError,
        r"views must fit: .*student \[1, 4, 6\] and teacher \[1, 4, 6\]",
    ),
    "more teacher views": (
        dino(VIEWS, np.zeros((3, 4, 6))),
        ValueError,
        r"student \[2, 4, 6\] and teacher \[3, 4, 6\]",
    ),
    "a centre of another width": (
        dino(VIEWS, VIEWS, dim=5),
        TypeError,
        r"dino_loss: `state.center` must be Float\[Array, 'dim'\], got float32\[5\] beside student .*; make a state of width 6$",
    ),
    "no state": (
        call("dino_loss", VIEWS, VIEWS, None),
        TypeError,
        "`state` must be DINOState, got None",
    ),
    "width of a state": (lambda f: f.kd.dino_init(0), ValueError, "`dim` must be at least 1, got 0"),
    "a half-precision state": (
        lambda f: f.kd.dino_init(3, jnp.bfloat16 if f is JAX else torch.bfloat16),
        ValueError,
        "`dtype` must be float32 or float64, got bfloat16",
    ),
    "a half-precision centre": (
        lambda f, wrap=as_it_is: call("dino_loss", VIEWS, VIEWS, f.kd.DINOState(f.array(np.zeros(6), "float16")))(
            f, wrap
        ),
        ValueError,
        "`state.center` must be float32 or float64, got float16; in half precision small steps are lost",
    ),
    "a half-precision bank": (
        lambda f, wrap=as_it_is: crcd(f, wrap, dtype="bfloat16"),
        ValueError,
        "`state.student_memory` must be float32 or float64, got bfloat16",
    ),
    "warm-up": (
        lambda f: f.kd.dino_teacher_temperature(0, warmup_epochs=-1),
        ValueError,
        "`warmup_epochs` must be at least 0, got -1",
    ),
    "final temperature": (
        lambda f: f.kd.dino_teacher_temperature(0, final=0.0),
        ValueError,
        "`final` must be finite and greater",
    ),
    "a memory of another width": (
        lambda f, wrap=as_it_is: crcd(f, wrap, state_dim=5),
        TypeError,
        r"crcd_loss: `state.student_memory` must be .*got float64\[6, 5\] beside student float64\[2, 4\].*; make a state of width 4$",
    ),
    "no negatives": (
        lambda f, wrap=as_it_is: crcd(f, wrap, negatives=np.zeros((2, 0), int)),
        ValueError,
        r"`negatives` must hold at least 1 negative per example, got shape \[2, 0\]",
    ),
    "a half-precision bank of CRD": (
        lambda f, wrap=as_it_is: crcd(f, wrap, dtype="float16", name="crd"),
        ValueError,
        "`state.student_memory` must be float32 or float64, got float16",
    ),
    "a memory of CRD of another width": (
        lambda f, wrap=as_it_is: crcd(f, wrap, state_dim=5, name="crd"),
        TypeError,
        r"crd_loss: `state.student_memory` must be .*got float64\[6, 5\] beside student float64\[2, 4\].*; make a state of width 4$",
    ),
    "no negatives of CRD": (
        lambda f, wrap=as_it_is: crcd(f, wrap, negatives=np.zeros((2, 0), int), name="crd"),
        ValueError,
        r"`negatives` must hold at least 1 negative per example, got shape \[2, 0\]",
    ),
    "a temperature of CRD": (
        lambda f, wrap=as_it_is: crcd(f, wrap, name="crd", temperature=-0.1),
        ValueError,
        "`temperature` must be finite and greater than 0, got -0.1",
    ),
    "an empty memory of CRD": (lambda f: f.kd.crd_init(key(f), 4, 0), ValueError, "`dim` must be at least 1, got 0"),
    "relation heads that do not divide": (
        call("minilm_loss", np.zeros((2, 3, 12)), np.zeros((2, 3, 18)), relation_heads=4),
        ValueError,
        "`relation_heads` must divide the last axes of student and teacher, of sizes 12 and 18, got 4; give one of 1, 2, 3, 6$",
    ),
    "no relation heads": (
        call("minilm_loss", np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), relation_heads=0),
        ValueError,
        "`relation_heads` must divide .*, of sizes 4 and 4, got 0; give one of 1, 2, 4$",
    ),
    "relation heads as a fraction": (
        lambda f: call("minilm_loss", np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), relation_heads=2.0)(f),
        TypeError,
        "minilm_loss: `relation_heads` must be int",
    ),
    "a mask of sequences": (
        call("minilm_loss", np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), relation_heads=2, where=np.ones(2, bool)),
        TypeError,
        r"minilm_loss: `where` must be Bool\[Array, 'batch positions'\] \| None, got bool\[2\]",
    ),
    "an empty memory": (lambda f: f.kd.crcd_init(key(f), 0, 4), ValueError, "`num_data` must be at least 1, got 0"),
    "no negatives drawn": (
        lambda f: f.kd.crcd_negatives(key(f), 4, 0, 9),
        ValueError,
        "`num_negatives` must be at least 1",
    ),
    "another name of an argument": (
        call("kl_loss", LOGITS, LOGITS, T=4.0),
        TypeError,
        "^kl_loss: got an unexpected keyword argument 'T'; write `temperature`$",
    ),
    "another name of two arguments": (
        dino(VIEWS, VIEWS, temp=0.1),
        TypeError,
        "^dino_loss: .* 'temp'; write `teacher_temperature` or `student_temperature`$",
    ),
    "mdistiller's names": (
        call("dkd_loss", logits_student=LOGITS, logits_teacher=LOGITS, target=LABELS),
        TypeError,
        "'logits_student'; write `student_logits`$",
    ),
    "a mask by another name": (call("mse_loss", LOGITS, LOGITS, mask=LABELS == 0), TypeError, "'mask'; write `where`$"),
    "a misspelt argument": (
        call("nkd_loss", LOGITS, LOGITS, LABELS, temprature=2.0),
        TypeError,
        "'temprature'; write `temperature`$",
    ),
    "an unknown argument": (
        call("mse_loss", LOGITS, LOGITS, T=4.0),
        TypeError,
        r"^mse_loss: got an unexpected keyword argument 'T'; the arguments are student, teacher; the options, given by "
        r"name, where, reduction, axis_name \(kdjax\) or group \(kdtorch\)$",
    ),
    "options by place": (
        call("kl_loss", LOGITS, LOGITS, 4.0),
        TypeError,
        "^kl_loss: takes 2 positional arguments, got 3; the arguments are student_logits, teacher_logits; the options, "
        "given by name, temperature, where, ",
    ),
    "an argument given twice": (
        call("kl_loss", LOGITS, LOGITS, student_logits=LOGITS),
        TypeError,
        "^kl_loss: got multiple values for argument 'student_logits'",
    ),
    "a missing argument": (
        call("dkd_loss", LOGITS, LOGITS),
        TypeError,
        "^dkd_loss: missing a required argument: 'labels'; the arguments are student_logits, teacher_logits, labels; ",
    ),
    "a Boolean temperature": (
        call("nkd_loss", LOGITS, LOGITS, LABELS, temperature=True),
        TypeError,
        r"`temperature` must be a number or .* array of shape \[\], got True$",
    ),
    "an array of a Boolean temperature": (
        call("nkd_loss", LOGITS, LOGITS, LABELS, temperature=np.array(True)),
        TypeError,
        r"`temperature` must be .*, got bool\[\]$",
    ),
    "a temperature of shape [1]": (
        call("symmetric_kl_loss", LOGITS, LOGITS, temperature=np.ones(1)),
        TypeError,
        r"`temperature` must be .*, got float64\[1\]; give temperature\[0\]$",
    ),
    "a student of more classes": (
        call("symmetric_kl_loss", np.zeros((4, 12)), LOGITS),
        TypeError,
        r"student_logits has 2 more classes; if they are padding, cut them off: student_logits\[..., :10\]; if the student "
        "uses them, give teacher_logits -inf there$",
    ),
    "labels of an image, channels first": (
        call("dkd_loss", IMAGE, IMAGE, np.zeros((2, 3, 4), int)),
        TypeError,
        r"`labels` must be .* got int(32|64)\[2, 3, 4\] beside .*; the last axis must be classes; give x.movedim\(1, -1\) in "
        r"PyTorch, jnp.moveaxis\(x, 1, -1\) in JAX, for student_logits and teacher_logits$",
    ),
    "a head of another width": (
        call("linear_kl_loss", HIDDEN, np.zeros((9, 6)), HIDDEN, HEAD),
        TypeError,
        r"^linear_kl_loss: `student_weight` must be Float\[Array, 'classes student_dim'\], got float64\[9, 6\] beside "
        r"student_hidden float64\[4, 5\]; its rows must be as wide as student_hidden, 5, got 6; give the weight of the head that "
        "takes these hidden states$",
    ),
    "a teacher's head of another width": (
        call("linear_jsd_loss", HIDDEN, HEAD, HIDDEN, np.zeros((9, 6))),
        TypeError,
        r"`teacher_weight` must be .*; its rows must be as wide as teacher_hidden, 5, got 6; give the weight of the head that ",
    ),
    "a transposed head": (
        call("linear_reverse_kl_loss", HIDDEN, HEAD.T, HIDDEN, HEAD),
        TypeError,
        r"`student_weight` must be .* got float64\[5, 9\] beside student_hidden float64\[4, 5\]; give student_weight.T$",
    ),
    "a teacher's transposed head": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD.T),
        TypeError,
        "`teacher_weight` must be .*; give teacher_weight.T$",
    ),
    "a transposed head beside recorded logits": (
        call("linear_topk_kl_loss", HIDDEN, HEAD.T, HIDDEN[:, :2], np.zeros((4, 2), int), np.zeros(4)),
        TypeError,
        "^linear_topk_kl_loss: `student_weight` must be .*; give student_weight.T$",
    ),
    "logits for hidden states": (
        call("linear_kl_loss", np.zeros((4, 9)), HEAD, HIDDEN, HEAD),
        TypeError,
        "`student_weight` must be .*; give student_weight.T; if student_hidden are logits, the hidden states before them$",
    ),
    "a teacher of a larger vocabulary": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, np.zeros((11, 5))),
        TypeError,
        r"`teacher_weight` must be .*; the vocabularies have 9 and 11 classes; if the 2 more of teacher_weight are padding, cut "
        r"them off: teacher_weight\[:9\]; if not, fill student_weight up by rows of 0 and give student_bias -inf there$",
    ),
    "a student of a larger vocabulary": (
        call("linear_jsd_loss", HIDDEN, np.zeros((11, 5)), HIDDEN, HEAD),
        TypeError,
        r"; the vocabularies have 11 and 9 classes; if the 2 more of student_weight are padding, cut them off: "
        r"student_weight\[:9\]; if not, fill teacher_weight up by rows of 0 and give teacher_bias -inf there$",
    ),
    "a bias of another length": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, np.zeros(8)),
        TypeError,
        r"`student_bias` must be .* got float64\[8\] beside .*; it must have a number for each of the 9 rows of student_weight$",
    ),
    "a teacher's bias with two axes": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, None, np.zeros((1, 9))),
        TypeError,
        r"`teacher_bias` must be .*; give teacher_bias.reshape\(-1\)$",
    ),
    "labels for hidden states": (
        call("linear_kl_loss", HIDDEN, HEAD, np.zeros((4, 5), int), HEAD),
        TypeError,
        r"`teacher_hidden` must be .* got int(32|64)\[4, 5\] .*; if these are labels or token ids, give the hidden states before "
        "teacher_weight, as output_hidden_states=True returns them$",
    ),
    "token ids for hidden states": (
        call("linear_topk_kl_loss", np.zeros(4, int), HEAD, HIDDEN[:, :2], np.zeros((4, 2), int), np.zeros(4)),
        TypeError,
        "`student_hidden` must be .*; if these are labels or token ids, give the hidden states before student_weight",
    ),
    "a teacher's hidden states shifted by a token": (
        call("linear_kl_loss", TOKENS, np.zeros((7, 9)), TOKENS[:, 1:, :4], np.zeros((7, 4))),
        TypeError,
        r"`teacher_hidden` must be .*; student_hidden is one longer; if the other is shifted by a token, give "
        r"student_hidden\[:, :-1\]$",
    ),
    "a mask for weights": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, weights=np.ones(4, bool)),
        TypeError,
        r"`weights` must be Float\[Array, '\*batch'\] \| None, got bool\[4\] beside .*; give where=weights$",
    ),
    "a scale of 0": (
        call("linear_jsd_loss", HIDDEN, HEAD, HIDDEN, HEAD, teacher_scale=0),
        ValueError,
        "^`teacher_scale` must be finite and greater than 0, got 0$",
    ),
    "a negative softcap": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, softcap=(None, -30.0)),
        ValueError,
        r"^`softcap` must be None, a number greater than 0, or a pair of these for student and teacher, such as \(None, 30.0\), "
        r"got \(None, -30.0\)$",
    ),
    "three softcaps": (
        call("linear_reverse_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, softcap=(30.0, 30.0, 30.0)),
        ValueError,
        "^`softcap` must be None, a number greater than 0, or a pair of these",
    ),
    "an unknown memory": (
        call("linear_topk_kl_loss", HIDDEN, HEAD, HIDDEN[:, :2], np.zeros((4, 2), int), memory="less"),
        ValueError,
        '^`memory` must be one of "low", "least", got \'less\'$',
    ),
    "a softcap by its name in transformers": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, final_logit_softcapping=30.0),
        TypeError,
        "got an unexpected keyword argument 'final_logit_softcapping'; write `softcap`$",
    ),
    "a scale by its name in transformers": (
        call("linear_kl_loss", HIDDEN, HEAD, HIDDEN, HEAD, logit_scale=0.1),
        TypeError,
        "got an unexpected keyword argument 'logit_scale'; write `student_scale` or `teacher_scale`$",
    ),
    "a mask of an image, channels first": (
        call("kl_loss", IMAGE, IMAGE, where=np.ones((2, 3, 4), bool)),
        TypeError,
        r"`where` must be .* give x.movedim\(1, -1\) in PyTorch, ",
    ),
    "features of an image, channels first": (
        call("dcn_loss", IMAGE, IMAGE, np.zeros((2, 3, 4), int), np.zeros((7, 4))),
        TypeError,
        r"`labels` must be .*; the last axis must be dim; give x.movedim\(1, -1\) in PyTorch, .* for student and teacher$",
    ),
    "channels first and classes last": (
        call("kl_loss", IMAGE, np.moveaxis(IMAGE, 1, -1)),
        TypeError,
        "`teacher_logits` must be .*; move the classes of both to the last axis$",
    ),
    "a mask shifted by a token": (
        call("kl_loss", TOKENS, TOKENS, where=np.ones((2, 5), bool)),
        TypeError,
        r"`where` must be .*; where is one shorter; if it is shifted by a token, shift too: student_logits\[:, :-1\], "
        r"teacher_logits\[:, :-1\]$",
    ),
    "a mask shifted by a token, and a part of the classes": (
        call(
            "topk_kl_loss",
            TOKENS,
            TOKENS[..., :2],
            TOKENS[..., :2].astype(int),
            TOKENS[..., 0],
            where=np.ones((2, 5), bool),
        ),
        TypeError,
        r"`where` must be .*, shift too: student_logits\[:, :-1\], values\[:, :-1\], indices\[:, :-1\], rest\[:, :-1\]$",
    ),
    "labels shifted by a token": (
        call("nkd_loss", TOKENS, TOKENS, np.zeros((2, 5), int)),
        TypeError,
        r"`labels` must be .*; labels is one shorter; if it is shifted by a token, shift too: student_logits\[:, :-1\], ",
    ),
    "logits shifted by a token": (
        call("dkd_loss", TOKENS[:, :-1], TOKENS[:, :-1], np.zeros((2, 6), int)),
        TypeError,
        r"`labels` must be .*; labels is one longer; if the others are shifted by a token, give labels\[:, 1:\]$",
    ),
    "a teacher shifted by a token": (
        call("kl_loss", TOKENS, TOKENS[:, 1:]),
        TypeError,
        r"`teacher_logits` must .*; student_logits is one longer; if the other is shifted by a token, give student_logits\[:, :-1\]$",
    ),
    "log-probabilities shifted by a token": (
        call("sampled_kl_loss", TOKENS[..., 0], TOKENS[:, 1:, 0]),
        TypeError,
        r"^sampled_kl_loss: `teacher_log_probs` must .*; student_log_probs is one longer; if the other is shifted by a token, "
        r"give student_log_probs\[:, :-1\]$",
    ),
    "an unknown estimator": (
        call("sampled_kl_loss", LOGITS, LOGITS, estimator="k4"),
        ValueError,
        '^`estimator` must be one of "k1", "k2", "k3", got \'k4\'$',
    ),
    "an unknown source of samples": (
        call("sampled_kl_loss", LOGITS, LOGITS, sampled_from="behavior"),
        ValueError,
        '^`sampled_from` must be one of "student", "teacher", got \'behavior\'$',
    ),
    "an unknown gradient": (
        call("sampled_kl_loss", LOGITS, LOGITS, gradient="reward"),
        ValueError,
        '^`gradient` must be one of "score", "direct", None, got \'reward\'$',
    ),
    "the score of the teacher's samples": (
        call("sampled_kl_loss", LOGITS, LOGITS, sampled_from="teacher", gradient="score"),
        ValueError,
        '^`gradient` must be "direct" or None with sampled_from="teacher", got \'score\'; ',
    ),
    "a bound of no ratio": (
        call("sampled_kl_loss", LOGITS, LOGITS, max_ratio=2.0),
        ValueError,
        "^`behavior_log_probs` must be given with `max_ratio`, got None; ",
    ),
    "a ratio of 0": (
        call("sampled_kl_loss", LOGITS, LOGITS, LOGITS, max_ratio=0.0),
        ValueError,
        "^`max_ratio` must be finite and greater than 0, got 0.0$",
    ),
    "a ratio in a word": (
        call("sampled_kl_loss", LOGITS, LOGITS, LOGITS, max_ratio="2"),
        TypeError,
        r"^sampled_kl_loss: `max_ratio` must be a number or .* array of shape \[\], or None, got '2'$",
    ),
    "the output of a model": (
        call("kl_loss", Output(LOGITS), Output(LOGITS)),
        TypeError,
        r"^kl_loss: `student_logits` must be Float\[Array, '\*batch classes'\], got Output; give student_logits.logits$",
    ),
    "the teacher's output of a model": (
        call("dkd_loss", LOGITS, Output(LOGITS), LABELS),
        TypeError,
        "`teacher_logits` must be .*, got Output beside student_logits .*; give teacher_logits.logits$",
    ),
    "the output of a model as a mapping": (
        call("kl_loss", LOGITS, {"logits": LOGITS}),
        TypeError,
        r"`teacher_logits` must be .*, got dict beside .*; give teacher_logits\['logits'\]$",
    ),
    "a tuple of logits": (
        lambda f, wrap=as_it_is: wrap(f.kd.kl_loss)((f.array(LOGITS), None), f.array(LOGITS)),
        TypeError,
        r"`student_logits` must be .*, got tuple; give one array, such as student_logits\[0\]$",
    ),
    "a list of views": (
        dino([VIEWS[0], VIEWS[1]], VIEWS),
        TypeError,
        r"`student` must be Float\[Array, 'student_views batch dim'\], got list; stack the views into one array$",
    ),
    "views on the batch axis": (
        dino(VIEWS, VIEWS.reshape(8, 6)),
        TypeError,
        r"`teacher` must be .*got float64\[8, 6\] beside .*; stack the views on a first axis: teacher.reshape\(views, -1, 6\)$",
    ),
    "a released centre": (
        lambda f, wrap=as_it_is: call("dino_loss", VIEWS, VIEWS, f.kd.DINOState(f.array(np.zeros((1, 6)))))(f, wrap),
        TypeError,
        r"`state.center` must be Float\[Array, 'dim'\], got float64\[1, 6\] beside .*; give state.center\[0\]$",
    ),
    "a state as a mapping": (
        lambda f, wrap=as_it_is: call("dino_loss", VIEWS, VIEWS, f.kd.dino_init(6)._asdict())(f, wrap),
        TypeError,
        r"dino_loss: `state` must be DINOState, got dict beside .*; give DINOState\(\*\*state\)$",
    ),
    "a state as a list": (
        lambda f, wrap=as_it_is: call("dino_loss", VIEWS, VIEWS, [np.zeros(6)])(f, wrap),
        TypeError,
        r"dino_loss: `state` must be DINOState, got list beside .*; give DINOState\(\*state\)$",
    ),
    "another loss's state": (
        lambda f, wrap=as_it_is: crcd(
            f, lambda function: lambda *x: wrap(f.kd.dino_loss)(*f.arrays([VIEWS, VIEWS]), x[-1])
        ),
        TypeError,
        "dino_loss: `state` must be DINOState, got CRCDState beside",
    ),
    "a mask of integers": (
        call("mse_loss", LOGITS, LOGITS, where=np.ones(4, int)),
        TypeError,
        "`where` must be Bool.* give where != 0, or labels != -100 if these are labels$",
    ),
}
OF_VALUES = {  # errors whose text needs a value, which is unknown while tracing
    "labels as a mask": (
        call("kl_loss", LOGITS, LOGITS, where=np.array([1, -100, 2, 3])),
        TypeError,
        r"`where` must be Bool.*, got int(32|64)\[4\] beside .*; give labels != -100$",
        "give where != 0, or labels != -100 if these are labels",
    ),
    "labels as a mask, narrow": (
        call("mse_loss", LOGITS, LOGITS, where=np.array([1, -1, 2, 3], "int8")),
        TypeError,
        r"`where` must be Bool.*, got int(8|32)\[4\] beside .*; give labels != -1$",
        "give where != 0, or labels != -100 if these are labels",
    ),
}


def traced(f, dynamic=None):
    """A function that compiles another; with jax.jit, arguments that are not arrays are constants."""
    if f is TORCH:
        return lambda function: torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)

    def wrap(function):
        def compiled(*args, **kwargs):
            leaves, tree = jax.tree.flatten((args, kwargs))
            arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

            def program(arrays):
                args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)])
                return function(*args, **kwargs)

            return jax.jit(program)(arrays)

        return compiled

    return wrap


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(f, mistake):
    run, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        run(f)


@pytest.mark.parametrize("mistake", [*MISTAKES, *OF_VALUES])
def test_both_packages_say_the_same(mistake):
    run, error, *_ = {**MISTAKES, **OF_VALUES}[mistake]
    said = []
    for f in BOTH:
        with pytest.raises(error) as raised:
            run(f)
        said.append((type(raised.value), str(raised.value).replace("int64", "int32").replace("int8", "int32")))
    assert said[0] == said[1]


TRACED = [name for name, (run, _, _) in MISTAKES.items() if run.__code__.co_argcount == 2]


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@both
@pytest.mark.parametrize("mistake", TRACED)
def test_mistakes_under_a_compiler(f, mistake):
    """`jax.jit` raises the same text, and `torch.compile` too, inside its own exception."""
    run, error, _ = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        run(f)
    symbolic = f is TORCH and (error is TypeError or "shape" in str(raised.value))
    for dynamic in (None, True) if symbolic else (None,):
        torch._dynamo.reset()
        with pytest.raises(error if f is JAX else torch._dynamo.exc.Unsupported) as compiled:
            run(f, traced(f, dynamic))
        text = str(raised.value)
        assert f is TORCH or str(compiled.value) == text
        assert text in str(compiled.value).replace("\\'", "'")


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
def test_mistakes_where_the_compiler_may_leave_the_graph():
    """Without `fullgraph` the error is the eager one."""
    run, error, message = MISTAKES["batches differ"]
    torch._dynamo.reset()
    with pytest.raises(error, match=message):
        run(TORCH, lambda function: torch.compile(function, backend="eager"))


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@both
@pytest.mark.parametrize("mistake", OF_VALUES)
def test_mistakes_of_values(f, mistake):
    run, error, message, under_a_compiler = OF_VALUES[mistake]
    with pytest.raises(error, match=message):
        run(f)
    torch._dynamo.reset()
    with pytest.raises((error, torch._dynamo.exc.Unsupported), match=under_a_compiler):
        run(f, traced(f))


def module(name, *arguments, **options):
    def build(f):
        import importlib

        from flax import nnx

        source = {"rngs": nnx.Rngs(0)} if f is JAX else {}
        return getattr(importlib.import_module(f"kd{f.name}.nn"), name)(*arguments, **options, **source)

    return build


@both
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            module("CRCDLoss", 4, 4, 4, 9, embed="mlp"),
            '`embed` must be one of "linear", "nonlinear", "none", got \'mlp\'',
        ),
        (
            module("CRCDLoss", 4, 5, 4, 9, embed="none"),
            r'`teacher_dim` must equal `dim` \(=4\) with embed="none", got 5',
        ),
        (module("ReviewKD", [4, 8], [4], 6), r"must have one entry per map, at least one, got \[4, 8\] and \[4\]"),
        (lambda f: module("ReviewKD", [4], [4], 6)(f)([]), "`maps` must hold 1 maps, got 0"),
        (
            lambda f: module("ABF", 4, 4, 4, True)(f)(f.array(np.zeros((2, 4, 4, 4)), "float32")),
            "`deeper` must be given",
        ),
        (lambda f: f.kd.nn.DINOLoss(6, views=0), "views must fit: .* got views=0 and teacher_views=2"),
        (
            lambda f: f.kd.nn.DINOLoss(6)(*f.arrays([np.zeros((5, 6)), np.zeros((5, 6))])),
            r"`student` must be \[views \* batch, dim\] with 2 views stacked on the batch axis, got \[5, 6\]; stack the",
        ),
        (
            lambda f: f.kd.nn.CombinedLoss(
                {"kl": f.kd.nn.FunctionLoss(f.kd.kl_loss), "mse": f.kd.nn.FunctionLoss(f.kd.mse_loss)},
                [1.0],
                [("stu", "tea"), ("stu", "tea")],
            ),
            r"^`weights` must have one number per loss: 2 for \['kl', 'mse'\], got 1: \[1.0\]$",
        ),
        (
            lambda f: f.kd.nn.DINOLoss(6, student_temperature=0),
            "`student_temperature` must be finite and greater than 0",
        ),
        (lambda f: f.kd.nn.DINOLoss(6, center_momentum=1.5), "`center_momentum` must be between 0 and 1, got 1.5"),
        (lambda f: f.kd.nn.DINOLoss(6, warmup_epochs=-1), "`warmup_epochs` must be finite and at least 0, got -1"),
        (lambda f: f.kd.nn.DINOLoss(6, views="2"), "`views` must be a whole number of at least 0, got '2'"),
        (module("CRCDLoss", 4, 4, 4, 9, momentum="0.5"), "`momentum` must be between 0 and 1, got '0.5'"),
        (
            module("CRCDLoss", 4, 4, 4, 9, num_negatives=0),
            "`num_negatives` must be a whole number of at least 1, got 0",
        ),
        (
            module("CRDLoss", 4, 4, 4, 9, embed="nonlinear"),
            '`embed` must be one of "linear", "none", got \'nonlinear\'',
        ),
        (
            module("CRDLoss", 5, 4, 4, 9, embed="none"),
            r'`student_dim` must equal `dim` \(=4\) with embed="none", got 5',
        ),
        (module("CRDLoss", 4, 4, 4, 9, temperature=0), "`temperature` must be finite and greater than 0, got 0"),
        (module("VIDLoss", 4, 4, 4, eps=0), "`eps` must be finite and greater than 0, got 0"),
        (
            module("VIDLoss", 4, 4, 4, initial_variance=1e-6),
            r"`initial_variance` must be greater than `eps` \(=1e-05\), got 1e-06",
        ),
        (module("USKDLoss", 4, 4, mu=-1.0), "`mu` must be finite and at least 0, got -1.0"),
    ],
)
def test_mistakes_with_modules(f, build, message):
    with pytest.raises(ValueError, match=message):
        build(f)


@both
@pytest.mark.parametrize(
    ("build", "given", "message"),
    [
        (module("USKDLoss", 8, 10), [LOGITS, LOGITS, LABELS], r"`features` must be .*batch 8'\], got float32\[4, 10\]"),
        (
            module("CRCDLoss", 10, 8, 4, 9),
            [LOGITS, LOGITS, LABELS],
            r"`teacher` must be .*batch 8'\], got float32\[4, 10\]",
        ),
        (module("Projector", 8, 4), [LOGITS], r"`x` must be Float\[Array, '\*batch 8'\], got float32\[4, 10\]"),
        (module("Projector", 5, 4), [MAP], r"`x` must be Float\[Array, 'batch .*5.*'\], got float32\[2, 8, 8, 3\]"),
        (
            module("VIDLoss", 5, 4, 3),
            [MAP, MAP],
            r"`student_map` must be Float\[Array, 'batch .*5.*'\], got float32\[2, 8",
        ),
        (module("VIDLoss", 10, 4, 3), [LOGITS, MAP], r"`student_map` must be .*'batch .*10.*'\], got float32\[4, 10\]"),
        (module("CRCDLoss", 10, 10, 4, 9), [LOGITS, LOGITS, None], "`index` must be Integer.*got None"),
        (lambda f: f.kd.nn.DINOLoss(6), [None, None], r"`student` must be an array \[views \* batch, dim\], got None"),
    ],
)
def test_what_modules_do_not_take(f, build, given, message):
    with pytest.raises(TypeError, match=message):
        build(f)(*(x if x is None else f.array(x, "float32") for x in given))


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler's own imports
@both
@pytest.mark.parametrize(
    ("build", "given", "options", "message"),
    [
        (
            module("DynamicCenterNormLoss", 5, 10),
            [LOGITS, LOGITS, LABELS.astype(float)],
            {},
            r"dcn_loss: `labels` must be Integer\[Array, '\*batch'\], got float32\[4\] beside .*; cast labels to integers",
        ),
        (
            module("USKDLoss", 8, 10),
            [np.zeros((4, 8)), LOGITS, LABELS[:, None]],
            {},
            r"uskd_loss: `labels` must be .*; give labels\[..., 0\]",
        ),
        (
            module("CRCDLoss", 10, 10, 4, 9),
            [LOGITS, LOGITS, LABELS],
            {"where": np.ones((4, 1), bool)},
            r"crcd_loss: `where` must be .*; give where\[..., 0\]",
        ),
    ],
)
def test_mistakes_through_modules(f, build, given, options, message):
    """A module raises the error of its function, also compiled."""
    loss, given = build(f), f.arrays(given, "float32")
    options = {name: f.array(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(TypeError, match=message):
        loss(*given, **options)
    if f is TORCH:
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
            torch.compile(loss, backend="eager", fullgraph=True)(*given, **options)


OUT_OF_RANGE = {
    "dkd": (call("dkd_loss", LOGITS, LOGITS, np.array([0, 10, 2, 3]), reduction="none"), "labels", 9, 10),
    "nkd": (call("nkd_loss", LOGITS, LOGITS, np.array([0, -1, 2, 3]), reduction="none"), "labels", 9, -1),
    "uskd": (call("uskd_loss", LOGITS, LOGITS, np.array([0, 99, 2, 3]), reduction="none"), "labels", 9, 99),
    "dcn": (
        call("dcn_loss", LOGITS, LOGITS, np.array([0, 5, 2, 3]), np.ones((5, 10)), reduction="none"),
        "labels",
        4,
        5,
    ),
    "crcd index": (lambda f, wrap=as_it_is: crcd(f, wrap, index=(0, 6), reduction="none"), "index", 5, 6),
    "crd index": (lambda f, wrap=as_it_is: crcd(f, wrap, (0, -1), name="crd", reduction="none"), "index", 5, -1),
    "crcd negatives": (
        lambda f, wrap=as_it_is: crcd(f, wrap, negatives=((2, 3), (4, -7)), reduction="none"),
        "negatives",
        5,
        -7,
    ),
}


@pytest.mark.parametrize("name", first(2, OUT_OF_RANGE))
def test_an_index_out_of_range(name):
    """PyTorch raises an error; JAX, which cannot under `jit`, gives NaN for that example only."""
    run, argument, last, got = OUT_OF_RANGE[name]
    with pytest.raises(
        IndexError, match=rf"`{argument}` must be in 0 .. {last}, got {got}; mask those without one with `where`"
    ):
        run(TORCH)
    value = run(JAX)
    value = value[0] if isinstance(value, tuple) else value
    assert np.array_equal(np.isnan(value), np.arange(len(value)) == 1)


def test_arrays_of_the_other_framework():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"got torch float32\[2, 3\]; give kdjax jnp.from_dlpack\(x.detach\(\)\)"):
        JAX.kd.mse_loss(torch.from_numpy(x), torch.from_numpy(x))
    with pytest.raises(TypeError, match=r"got (jax|jaxlib) float32\[2, 3\]; give kdtorch torch.from_dlpack\(x\)"):
        TORCH.kd.mse_loss(jnp.asarray(x), jnp.asarray(x))
    with pytest.raises(TypeError, match=r"got numpy float32\[2, 3\]; give kdtorch torch.as_tensor\(x\)"):
        TORCH.kd.mse_loss(x, x)
    assert JAX.kd.mse_loss(x, x) == 0  # kdjax accepts NumPy arrays


@both
@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), 2])
def test_numbers_of_numpy_are_numbers(f, number):
    student, teacher = f.arrays([np.eye(4), np.ones((4, 4))])
    assert f.kd.kl_loss(student, teacher, temperature=number) == f.kd.kl_loss(student, teacher, temperature=2.0)


@both
def test_an_array_of_a_bad_temperature_is_nan(f):
    """The value of an array is not read, which is impossible under `jit` and slow elsewhere."""
    assert np.isnan(f.numpy(f.kd.kl_loss(*f.arrays([LOGITS, LOGITS]), temperature=f.array(np.array(-1.0)))))


UNCHECKED = """
import kdjax as kd
import jax.numpy as jnp
logits, unchecked = jnp.ones((4, 10)), kd.kl_loss
"""
UNCHECKED_TORCH = """
import kdtorch as kd
import torch
logits, rows, unchecked = torch.ones(4, 10), torch.randn(4, 10), kd.mse_loss
plain = kd.euclidean_mse_loss(rows, logits)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(kd.euclidean_mse_loss(rows, logits), plain)
"""
BROADCAST = """
print(float(unchecked(logits, logits[:1])))
try:
    kd.kl_loss(logits, logits, temperature=0)
except ValueError as error:
    print(error)
"""


@slow
@pytest.mark.parametrize(("f", "code"), [(JAX, UNCHECKED), (TORCH, UNCHECKED_TORCH)], ids=["kdjax", "kdtorch"])
def test_the_switch_of_the_check(f, code):
    """Without the check one row is broadcast; the losses' own errors remain, and autocast is still disabled."""
    with pytest.raises(TypeError, match="kl_loss: `teacher_logits` must be"):
        call("kl_loss", LOGITS, LOGITS[:1])(f)
    done = subprocess.run(
        [sys.executable, "-c", code + BROADCAST],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"KDLOSSES_CHECK": "0"},
    )
    assert done.stdout == "0.0\n`temperature` must be finite and greater than 0, got 0\n"
