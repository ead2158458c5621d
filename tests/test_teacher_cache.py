"""A teacher's outputs on disk: both frameworks read what was recorded, whatever happens to the writer."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from frameworks import BOTH, JAX, TORCH
from test_interop import ROOT, no_file_beyond
from tiers import first, slow

import kdjax.interop
import kdjax.teacher_cache
import kdlosses.cache
import kdtorch.interop
import kdtorch.teacher_cache
from parity.compare import ulps

both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
torch_first = pytest.mark.parametrize("f", first(1, [TORCH, JAX]), ids=lambda f: f.name)  # JAX compiles
RNG = np.random.default_rng(0)
SAMPLES, CLASSES = 40, 11
LOGITS = (3 * RNG.normal(size=(SAMPLES, CLASSES))).astype(np.float32)
FEATURES = RNG.normal(size=(SAMPLES, 2, 3)).astype(np.float32)
ORDER = RNG.permutation(SAMPLES) * 7  # the samples' indices in the data set
MODULES = {"jax": kdjax.teacher_cache, "torch": kdtorch.teacher_cache}


def batches(f, size=8, **changes):
    for i in range(0, SAMPLES, size):
        part = slice(i, i + size)
        batch = {"index": ORDER[part], "logits": LOGITS[part], "features": FEATURES[part], "label": ORDER[part] % 5}
        yield {name: f.array(x, "float32") for name, x in (batch | changes).items()}


def record(f, path, data=None, **options):
    return MODULES[f.name].record_teacher(path, batches(f) if data is None else data, **options)


def readers(path):
    return [(f, MODULES[f.name].TeacherCache(path)) for f in BOTH]


@both
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_recorded_is_read_in_both_frameworks(f, dtype, tmp_path):
    record(f, tmp_path / "full", dtype=dtype)
    record(f, tmp_path / "top", dtype=dtype, top_k=4, temperatures=[1, 2.5])
    picked = np.array([3, 17, 17, 0])
    for reader, cache in readers(tmp_path / "full"):
        assert (len(cache), cache.num_classes, cache.top_k) == (SAMPLES, CLASSES, None)
        got = {name: reader.numpy(x) for name, x in cache.read(reader.array(ORDER[picked])).items()}
        assert set(got) == {"logits", "features", "label"}
        assert got["logits"].dtype == got["features"].dtype == dtype
        assert np.array_equal(got["logits"], LOGITS[picked].astype(dtype))
        assert np.array_equal(got["features"], FEATURES[picked].astype(dtype))
        assert np.array_equal(got["label"], ORDER[picked] % 5)
    largest = np.sort(LOGITS[picked], -1)[:, ::-1]
    for reader, cache in readers(tmp_path / "top"):
        assert (cache.top_k, cache.temperatures) == (4, (1.0, 2.5))
        outputs = cache.read(ORDER[picked], temperature=2.5)
        assert list(outputs["rest"]) == ["2.5"]
        outputs["rest"] = outputs["rest"]["2.5"]
        got = {name: reader.numpy(x) for name, x in outputs.items()}
        assert np.array_equal(got["values"], largest[:, :4].astype(dtype))
        assert np.array_equal(np.take_along_axis(LOGITS[picked], got["indices"], -1), largest[:, :4])
        assert np.allclose(got["rest"], 2.5 * np.log(np.exp(largest[:, 4:] / 2.5).sum(-1)), rtol=1e-6)
        assert got["rest"].dtype == "float32"
        assert "rest" not in cache.read(ORDER[picked])


@both
def test_the_rest_is_of_the_temperature_it_was_recorded_for(f, tmp_path):
    """Another temperature than that of `read` is an error if it is a number, and NaN if it is an array."""
    cache = record(f, tmp_path / "cache", top_k=3, temperatures=[1.0, 4.0], dtype="float32")
    student = f.array(np.flip(LOGITS, 1), "float32")
    names = "values", "indices", "rest"
    x = {name: y for name, y in cache.read(ORDER, temperature=4).items() if name in names}
    loss = f.jit(f.kd.topk_kl_loss, static_argnames="temperature") if f is JAX else f.kd.topk_kl_loss
    want = loss(student, **x, temperature=4.0)
    assert np.isfinite(f.numpy(want))
    assert f.numpy(loss(student, **x | {"rest": x["rest"]["4.0"]}, temperature=4.0)) == f.numpy(want)
    for wrong in (1.0, 4.1, 3.0):
        with pytest.raises(
            ValueError, match=rf"`rest` was recorded for the temperatures \[4.0\], got .* {wrong}; read it"
        ):
            loss(student, **x, temperature=wrong)
    with pytest.raises(ValueError, match=r"`rest` was recorded .*, got `temperature` 1.0"):
        loss(student, *x.values())
    loss = f.jit(f.kd.topk_kl_loss)
    for dtype in ("float32", "float64"):
        assert f.numpy(loss(student, **x, temperature=f.array(np.array(4.0), dtype))) == f.numpy(want)
        assert np.isnan(f.numpy(loss(student, **x, temperature=f.array(np.array(1.0), dtype))))
    some = record(f, tmp_path / "other", top_k=3, temperatures=[0.1], dtype="float32").read(ORDER, temperature=0.1)
    assert np.isfinite(
        f.numpy(
            loss(student, some["values"], some["indices"], some["rest"], temperature=f.array(np.array(0.1), "float32"))
        )
    )


@pytest.mark.slow
@both
def test_the_loss_of_what_is_read(f, tmp_path):
    """With all classes it is the full KL; with some and their rest, the KL in which the rest is one class."""
    cache = record(f, tmp_path / "all", dtype="float32", top_k=CLASSES, temperatures=[4.0])
    student = f.array(np.flip(LOGITS, 1), "float32")
    x = cache.read(ORDER, temperature=4.0)
    value = f.kd.topk_kl_loss(student, x["values"], x["indices"], x["rest"], temperature=4.0)
    full = f.kd.kl_loss(student, f.array(LOGITS, "float32"), temperature=4.0)
    assert ulps(f.numpy(value), f.numpy(full), "float32") <= 16
    cache = record(f, tmp_path / "some", dtype="float32", top_k=3, temperatures=[4.0])
    x = cache.read(ORDER, temperature=4.0)
    some = f.kd.topk_kl_loss(student, x["values"], x["indices"], x["rest"], temperature=4.0)
    assert 0 < f.numpy(some) < f.numpy(full)


@slow
def test_tokens_and_half_precision_teachers(tmp_path):
    """Logits in bfloat16 with further axes, and many classes."""
    logits = RNG.normal(size=(6, 5, 70_000)).astype(np.float32)
    for f, array in ((JAX, jnp.asarray(logits, "bfloat16")), (TORCH, torch.from_numpy(logits).bfloat16())):
        data = [{"index": np.arange(6), "logits": array}]
        x = record(f, tmp_path / f.name, data, top_k=3, dtype="float32").read([4, 1], temperature=1.0)
        assert tuple(x["values"].shape) == tuple(x["indices"].shape) == (2, 5, 3)
        assert tuple(x["rest"]["1.0"].shape) == (2, 5)
        rounded = torch.from_numpy(logits).bfloat16().float().numpy()[[4, 1]]
        assert np.array_equal(f.numpy(x["values"]), np.sort(rounded, -1)[..., :-4:-1])
        student = f.array(logits[[4, 1]], "float32")
        assert np.isfinite(f.numpy(f.kd.topk_kl_loss(student, x["values"], x["indices"], x["rest"])))


@both
def test_recording_goes_on_without_a_lost_or_doubled_sample(f, tmp_path):
    data = list(batches(f))
    for stop in (0, 2, 5):
        record(f, tmp_path / "cache", data[:stop] or data[:1])
    other = TORCH if f is JAX else JAX
    cache = record(other, tmp_path / "cache", batches(other, size=3))
    assert sorted(cache.index) == sorted(ORDER)
    assert np.array_equal(other.numpy(cache.read(ORDER)["logits"]), LOGITS.astype("float16"))
    twice = {name: x[np.array([0, 1, 0])] for name, x in data[0].items()}
    assert len(record(f, tmp_path / "twice", [twice, twice])) == 2


def test_which_samples_are_held(tmp_path):
    cache = record(JAX, tmp_path / "cache", list(batches(JAX))[:2])
    assert np.array_equal(cache.holds(ORDER), np.arange(SAMPLES) < 16)
    assert np.array_equal(cache.holds(jnp.asarray([[ORDER[0], -1]])), [[True, False]])


KILLED = """
import os, random, signal, sys, time
import numpy as np
import torch
from kdtorch.teacher_cache import TeacherCache, record_teacher

path, random_, size = sys.argv[1], random.Random(0), 64


def batches():
    for i in range(300):
        index = torch.arange(8 * i, 8 * i + 8)
        yield {"index": index, "logits": index[:, None] % 1999 + torch.arange(size)}


stopped, held = 0, 0
for kill in range(21):
    child = os.fork()
    if not child:
        record_teacher(path, batches(), dtype="float32")
        os._exit(0)
    if kill < 20:
        time.sleep(random_.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not os.path.exists(path + "/header.json"):
        continue
    cache = TeacherCache(path)
    assert len(cache) >= held and np.array_equal(cache.index, np.arange(len(cache)))
    logits = cache.read(cache.index)["logits"] if len(cache) else torch.zeros(0, size)
    assert torch.equal(logits[:, 0], torch.from_numpy(cache.index % 1999).float())
    assert torch.equal(logits[:, -1] - logits[:, 0], torch.full((len(cache),), size - 1.0))
    stopped += held < len(cache) < 2400
    held = len(cache)
assert held == 2400
print(stopped)
"""


@slow
def test_a_killed_recorder_goes_on(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "cache"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1  # the process was killed while it wrote samples


@both
def test_a_full_disk_loses_nothing(f, tmp_path):
    first, *others = batches(f)
    record(f, tmp_path / "cache", [first])
    size = (tmp_path / "cache" / "rows").stat().st_size
    with (
        no_file_beyond(size * 5 // 2),
        pytest.raises(OSError, match="the 16 samples recorded before are kept") as error,
    ):
        record(f, tmp_path / "cache", [first, *others])
    assert error.value.filename == str(tmp_path / "cache")
    cache = MODULES[f.name].TeacherCache(tmp_path / "cache")
    assert np.array_equal(cache.index, ORDER[:16])
    assert np.array_equal(f.numpy(cache.read(ORDER[:16])["logits"]), LOGITS[:16].astype("float16"))
    assert len(record(f, tmp_path / "cache")) == SAMPLES


def one(**changes):
    batch = {"index": np.array([1, 2]), "logits": np.ones((2, 3), np.float32)} | changes
    return [{name: x for name, x in batch.items() if x is not None}]


def ragged(**changes):
    return one(logits=np.ones((2, 3, 4), np.float32), **changes)


def ready(**changes):
    top = {"values": np.ones((2, 2)), "indices": np.array([[1, 2], [3, 8]]), "rest": np.zeros(2)}
    return one(logits=None, **top | changes)


NAN = np.array([[0, 1, 2], [0, np.nan, 1]], np.float32)
MISTAKES = {
    "no batch": ([], {}, "nothing was recorded, for there was no batch"),
    "no index": (one(index=None), {}, r"must have `index` and `logits`, got \['logits'\]; index is missing"),
    "no logits": (one(logits=None), {}, r"got \['index'\]; logits is missing"),
    "a negative index": (one(index=np.array([0, -1])), {}, "`index` must be whole numbers of at least 0"),
    "an index of numbers": (one(index=np.ones(2)), {}, r"`index` must be whole .*, got float64\[2\]"),
    "rows that differ": (one(x=np.ones((3, 1))), {}, r"`x` must have a row for each of the 2 of `index`, got \[3, 1\]"),
    "NaN": (one(logits=NAN), {}, "got NaN or inf for sample 2; is the teacher in eval mode"),
    "beyond float16": (one(logits=NAN[:1] * 1e5, index=np.array([1])), {}, '`logits` has numbers beyond float16, .* use dtype="float32"'),
    "top_k": (one(), {"top_k": 4}, r"`top_k` must be from 1 to the number of classes, got 4 of logits \[2, 3\]"),
    "top_k, not whole": (one(), {"top_k": 2.0}, "`top_k` must be from 1 to the number of classes, got 2.0"),
    "one class": (one(logits=np.ones((2, 1))), {}, r"`logits` must be .* with at least 2 classes, got \[2, 1\]"),
    "words": (one(x=np.array(["a", "b"])), {}, r"`x` must be numbers, not complex ones, got <U1\[2\]"),
    "complex numbers": (one(x=np.ones(2, complex)), {}, r"`x` must be numbers, not complex ones, got complex128\[2\]"),
    "one temperature": (one(), {"top_k": 1, "temperatures": 4.0}, r"`temperatures` must be a list .*, as in \[1.0, 4.0\], got 4.0"),
    "no temperature": (one(), {"top_k": 1, "temperatures": ()}, r"`temperatures` must be a list of at least one number, .*got \(\)"),
    "a word for a temperature": (one(), {"top_k": 1, "temperatures": ["4"]}, "`temperatures` must be finite and greater than 0, got 4"),
    "a name that is taken": (one(rest=np.ones(2)), {"top_k": 2}, "must not name an array `rest`, which `top_k` makes"),
    "dtype": (one(), {"dtype": "int8"}, '`dtype` must be "float16" or "float32", got \'int8\''),
    "temperatures": (one(), {"top_k": 1, "temperatures": [0.0]}, "`temperatures` must be finite and greater than 0, got 0.0"),
    "lengths and a mask": (ragged(lengths=np.array([1, 2]), where=np.ones((2, 3), bool)), {}, "must have `lengths` or `where`, got both"),
    "lengths beyond": (ragged(lengths=np.array([1, 4])), {}, r"`lengths` must be whole numbers from 0 to 3, \[batch\], as `logits` \[2, 3, 4\], got int64\[2\] up to 4"),
    "lengths below": (ragged(lengths=np.array([1, -1])), {}, "`lengths` must be whole numbers from 0 to 3"),
    "lengths of numbers": (ragged(lengths=np.ones(2)), {}, r"`lengths` must be whole .*, got float64\[2\]"),
    "lengths of what is no sequence": (one(lengths=np.array([1, 1])), {}, r"`logits` must be \[batch, length, ...\] beside `lengths`, got \[2, 3\]"),
    "a mask of integers": (ragged(where=np.ones((2, 3), int)), {}, r"`where` must be booleans \[2, 3\], as `logits` \[2, 3, 4\], got int64\[2, 3\]; .* give `mask == 1`"),
    "a mask of another length": (ragged(where=np.ones((2, 4), bool)), {}, r"`where` must be booleans \[2, 3\], .*got bool\[2, 4\]"),
    "one number for a sequence": (ragged(where=np.ones((2, 3), bool), label=np.ones(2)), {}, r"`label` must be \[batch, length, ...\], .*, got \[2\]; repeat for each token"),
    "another num_classes": (one(), {"num_classes": 4}, r"`logits` must be of the 4 classes that `num_classes` says, got \[2, 3\]"),
    "no num_classes": (ready(), {}, "`num_classes` must be the size of the teacher's vocabulary where a top k comes ready, got None"),
    "no rest": (ready(rest=None), {"num_classes": 9}, "must have `rest` beside `values`: .*; logarithms of probabilities, .*, go by `log_probs`"),
    "no indices": (ready(indices=None), {"num_classes": 9}, r"must have `indices`, the classes of `values`, got \['rest', 'values'\]"),
    "another vocabulary": (ready(), {"num_classes": 8}, "`indices` must be from 0 to 7, .*, got 8 for sample 2; is the top k from another vocabulary"),
    "a class twice": (ready(indices=np.array([[1, 2], [3, 3]])), {"num_classes": 9}, "`indices` must be different classes, got 3 twice for sample 2"),
    "indices of another shape": (ready(indices=np.array([[1], [2]])), {"num_classes": 9}, r"`indices` must be whole numbers \[2, 2\], as `values` \[2, 2\], got int64\[2, 1\]"),
    "indices of numbers": (ready(indices=np.array([[1, 2.0], [3, 4]])), {"num_classes": 9}, r"`indices` must be whole numbers \[2, 2\], .* got float64\[2, 2\]"),
    "a rest of another shape": (ready(rest=np.ones((2, 2))), {"num_classes": 9}, r"`rest` must be floating-point numbers \[2\], as `values` \[2, 2\], got float64\[2, 2\]"),
    "values that are NaN": (ready(values=NAN[:, :2]), {"num_classes": 9}, "`values` must be numbers or -inf, got nan for sample 2"),
    "a rest that is inf": (ready(rest=np.array([0, np.inf])), {"num_classes": 9}, "`rest` must be numbers or -inf, got inf for sample 2"),
    "top_k beside it": (ready(), {"num_classes": 9, "top_k": 3}, r"`top_k` must be the 2 that `values` \[2, 2\] keeps, or absent, got 3"),
    "more than there are": (ready(), {"num_classes": 2, "top_k": 2}, "`indices` must be from 0 to 1, "),
    "a rest of other temperatures": (ready(rest={"4.0": np.zeros(2)}), {"num_classes": 9}, r"`rest` is for the temperatures \[4.0\], and `temperatures` are \[1.0\]; record with temperatures=\[4.0\]"),
    "one rest for two": (ready(), {"num_classes": 9, "temperatures": [1, 2]}, r'an array for each of the `temperatures` \[1.0, 2.0\], as in \{"1.0": ...\}, got one array'),
    "log_probs and a rest": (ready(log_probs=np.zeros((2, 2)), values=None), {"num_classes": 9}, "`log_probs`, or `values` and `rest`, got `log_probs` and `rest`"),
    "logits for log_probs": (ready(log_probs=np.ones((2, 2)), values=None, rest=None), {"num_classes": 9}, "`log_probs` must be .* sum to at most 1, got a sum of 5.44 for sample 1; logits go by `values` and `rest`"),
    "log_probs at 4": (ready(log_probs=np.full((2, 2), -1.0), values=None, rest=None), {"num_classes": 9, "temperatures": [4.0]}, r"at temperature 1 alone, got `temperatures` \[4.0\]; record with temperatures=\[1.0\]"),
    "a part beyond": (one(), {"part": 2, "parts": 2}, "`part` must be from 0 to `parts` - 1, as in part=rank, parts=world_size, got part=2, parts=2"),
    "a part of how many": (one(), {"part": 0}, "got part=0, parts=None"),
}  # fmt: skip


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(f, mistake, tmp_path):
    data, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        record(f, tmp_path / "cache", data, **options)


@both
@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (one(logits=np.ones((2, 4), np.float32)), {}, "was recorded with num_classes 3, got 4; record to another path"),
        (one(), {"top_k": 2}, "was recorded with top_k None, got 2"),
        (one(), {"dtype": "float32"}, "was recorded with fields"),
    ],
)
def test_a_cache_is_of_one_kind(f, data, options, message, tmp_path):
    record(f, tmp_path / "cache", one())
    with pytest.raises(ValueError, match=message):
        record(f, tmp_path / "cache", data, **options)


@both
def test_a_cache_that_does_not_fit(f, tmp_path):
    cache = record(f, tmp_path / "cache", one(), top_k=2)
    open_ = MODULES[f.name].TeacherCache
    assert open_(tmp_path / "cache", num_classes=3).num_classes == 3
    with pytest.raises(
        ValueError,
        match=r"the teacher has 3 classes, and the student, by `num_classes`, 10; record .* without `num_classes`",
    ):
        open_(tmp_path / "cache", num_classes=10)
    for index, message in (
        ([1, 5, 9], "2 of the 3 samples asked for are not there: 5, 9; record them first; `holds` says which"),
        (np.arange(9), "7 of the 9 samples asked for are not there: 0, 3, 4, 5, 6, ...; record"),
        ([[5, 5], [5, 1]], "3 of the 4 samples asked for are not there: 5; record"),
        ([1, -1], "1 of the 2 samples asked for are not there: -1; samples are numbered from 0, and a negative number"),
        (np.array([2**63], np.uint64), "1 of the 1 samples asked for are not there"),
    ):
        for given in (index, f.array(np.asarray(index).astype("int64"))):
            with pytest.raises(IndexError, match=f"cache: {re.escape(message)}"):
                cache.read(given)
        assert not cache.holds(index).all()
    with pytest.raises(
        ValueError, match=r"recorded for the temperatures \[1.0\], got `temperature` 2.0; record it for"
    ):
        cache.read([1], temperature=2.0)
    for ask in (cache.read, cache.holds):
        for index, got in (
            (np.array([True, False]), "bool[2]"),
            (np.ones(1), "float64[1]"),
            ([1.0, 2.5], "float64[2]"),
        ):
            with pytest.raises(ValueError, match=rf"`index` must be whole numbers, got {re.escape(got)}"):
                ask(index)
    assert len(cache.read([])["values"]) == len(cache.holds([])) == 0
    with pytest.raises(ValueError, match="absent: no teacher was recorded there"):
        open_(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("")
    with pytest.raises(ValueError, match="other: a folder of another kind; record to an empty one"):
        record(f, tmp_path / "other", one())
    header = tmp_path / "cache" / "header.json"
    for text, message in (
        (header.read_text()[:-20], "cache: a folder of another kind, or altered"),
        ("{}", "cache: a folder of another kind, or altered"),
        (
            json.dumps(json.loads(header.read_text()) | {"format": "3"}),
            "of format 3, and this version reads formats 1 and 2",
        ),
    ):
        header.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_(tmp_path / "cache")


@both
def test_a_batch_is_a_mapping(f, tmp_path):
    with pytest.raises(ValueError, match="a batch must be a mapping of `index`, `logits` and others, got tuple"):
        MODULES[f.name].record_teacher(tmp_path / "cache", [(f.array(np.arange(2)), f.array(np.ones((2, 3))))])


@both
def test_a_pickled_cache_is_its_path(f, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = record(f, "cache", dtype="float32", top_k=5)
    data = pickle.dumps(cache)
    assert len(data) < 2000
    monkeypatch.chdir(ROOT)
    for other in (pickle.loads(data), copy.copy(cache), copy.deepcopy(cache)):
        assert type(other) is MODULES[f.name].TeacherCache
        assert np.array_equal(f.numpy(other.read(ORDER)["values"]), f.numpy(cache.read(ORDER)["values"]))
    (tmp_path / "cache").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="cache: no teacher was recorded there"):
        pickle.loads(data)


SPAWNED = {
    "jax": """
import multiprocessing, sys
import numpy as np
from kdjax.teacher_cache import TeacherCache

if __name__ == "__main__":
    cache, parts = TeacherCache(sys.argv[1]), np.array_split(np.arange(30)[::-1], 4)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        got = pool.map(cache.read, parts)
    assert [x["logits"].tolist() for x in got] == [cache.read(x)["logits"].tolist() for x in parts]
""",
    "torch": """
import sys
import torch
from kdtorch.teacher_cache import TeacherCache


class Data(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, i):
        return {name: x for name, x in self.cache.read(i, temperature=4.0).items()}


if __name__ == "__main__":
    cache = TeacherCache(sys.argv[1])
    loader = torch.utils.data.DataLoader(Data(cache), 10, num_workers=2, multiprocessing_context="spawn")
    for i, got in enumerate(loader):
        want = cache.read(range(10 * i, 10 * i + 10), temperature=4.0)
        assert torch.equal(got["values"], want["values"])
        assert torch.equal(got["rest"]["4.0"], want["rest"]["4.0"])
""",
}


@slow
@both
def test_spawned_processes_read_the_same_files(f, tmp_path):
    batch = {"index": np.arange(30), "logits": RNG.normal(size=(30, 5)).astype(np.float32)}
    options = {"top_k": 2, "temperatures": [4.0]} if f is TORCH else {}
    record(f, tmp_path / "cache", [batch], **options)
    (tmp_path / "run.py").write_text(SPAWNED[f.name])
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", tmp_path / "cache"], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_both_names_are_in_interop():
    assert kdjax.interop.TeacherCache is kdjax.teacher_cache.TeacherCache
    assert kdtorch.interop.record_teacher is kdtorch.teacher_cache.record_teacher


# what is recorded of logits

SIZES = [(2, 1), (5, 5), (37, 4), (1009, 16), (32_000, 64), (4100, 64), (131, 130)]


@torch_first
@pytest.mark.parametrize("where", ["_largest", "_largest_on_device"])
@pytest.mark.parametrize(("classes", "kept"), first(5, SIZES))
def test_the_largest_logits(f, where, classes, kept):
    """Rows with ties and with classes at -inf, compared with a sort in float64."""
    logits = np.round(4 * RNG.normal(size=(3, 7, classes)), 1).astype(np.float32)
    logits[0, :, classes // 3 + 1 :] = -np.inf
    logits[1, 0] = -np.inf
    places = np.unravel_index(RNG.permutation(21), (3, 7))
    longer = np.pad(logits, [(0, 0), (0, 1), (0, 0)])
    for given in (
        f.array(logits, "float32"),
        f.array(longer, "float32")[:, :7],
        *([logits] if where == "_largest" else []),
    ):
        values, indices, rest, largest = getattr(MODULES[f.name], where)(given, places, kept, (1.0, 4.0))
        rows = logits[places].astype(np.float64)
        assert np.array_equal(values, -np.sort(-rows)[:, :kept])
        assert np.array_equal(np.take_along_axis(rows, indices.astype(int), -1), values)
        assert all(len(set(x)) == kept for x in indices.tolist())
        assert np.array_equal(largest, rows.max(-1))
        np.put_along_axis(rows, indices.astype(int), -np.inf, -1)
        peak = np.where(np.isneginf(rows.max(-1)), 0, rows.max(-1))
        with np.errstate(divide="ignore"):
            for i, t in enumerate((1.0, 4.0)):
                want = peak + t * np.log(np.exp((rows - peak[:, None]) / t).sum(-1))
                assert np.allclose(rest[:, i], want, rtol=1e-6, atol=1e-5)


def test_the_largest_of_half_precision():
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for given in (logits.to(dtype), logits.T.contiguous().T.to(dtype)):
            places = (np.array([3, 0]),)
            want = MODULES["torch"]._largest(given.float(), places, 4, (1.0,))
            got = MODULES["torch"]._largest(given, places, 4, (1.0,))
            assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


def test_nan_and_inf_are_found_in_any_class():
    for wrong in (np.nan, np.inf):
        for place in range(38):
            logits = np.zeros((3, 38), np.float32)
            logits[1, place] = wrong
            for where in ("_largest", "_largest_on_device"):
                largest = getattr(MODULES["torch"], where)(torch.from_numpy(logits), (np.arange(3),), 4, (1.0,))[-1]
                assert (largest < np.inf).tolist() == [True, False, True]


MEMORY = """
import resource, sys
import numpy as np
from {package}.teacher_cache import record_teacher


def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


path, dtype, top_k = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
numbers = np.random.default_rng(0).standard_normal((512, 32_000), np.float32)
{array}
record_teacher(path + "/some", [{{"index": np.arange(64), "logits": logits[:64]}}], top_k=top_k)
before = peak()
record_teacher(path + "/all", [{{"index": np.arange(512), "logits": logits}}], top_k=top_k)
print((peak() - before) / logits.nbytes)
"""
TO_ARRAY = {
    "torch": "import torch; logits = torch.from_numpy(numbers).to(getattr(torch, dtype)); del numbers",
    "jax": "import jax; logits = jax.block_until_ready(jax.numpy.asarray(numbers, dtype)); del numbers",
}


@slow
@both
@pytest.mark.parametrize(("dtype", "top_k"), [("float32", 64), ("bfloat16", 64), ("bfloat16", 0)])
def test_the_memory_of_recording(f, dtype, top_k, tmp_path):
    """It is less than the memory of the logits, which is 62 or 31 MiB."""
    code = MEMORY.format(package=f.kd.__name__, array=TO_ARRAY[f.name])
    command = [sys.executable, "-c", code, tmp_path, dtype, str(top_k)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


# sequences

LENGTHS = np.array([3, 0, 5, 1, 4, 2])
TEXTS = [RNG.normal(size=(length, 9)).astype(np.float32) for length in LENGTHS]
SAMPLES_OF_TEXTS = np.arange(10, 16)


def texts(f, kind="lengths", **changes):
    """Batches of two sequences, as long as necessary and padded with NaN, on the right or on the left."""
    for i in (0, 2, 4):
        two = slice(i, i + 2)
        where = np.arange(LENGTHS[two].max() + 1) < LENGTHS[two, None]
        where = np.flip(where, 1).copy() if kind == "left" else where
        logits, ids = np.full((*where.shape, 9), np.nan, np.float32), np.zeros(where.shape, int)
        logits[where], ids[where] = np.concatenate(TEXTS[two]), 100 * i + np.arange(where.sum())
        mask = {"lengths": LENGTHS[two]} if kind == "lengths" else {"where": where}
        batch = {"index": SAMPLES_OF_TEXTS[two], "logits": logits, "ids": ids, **mask} | changes
        yield {name: f.array(x, "float32") for name, x in batch.items()}


@torch_first
@pytest.mark.parametrize("kind", ["lengths", "right", "left"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_sequences(f, kind, top_k, tmp_path):
    cache = record(f, tmp_path / "cache", texts(f, kind), top_k=top_k, dtype="float32", temperatures=[1.0, 2.0])
    assert cache.lengths.tolist() == LENGTHS.tolist()
    row = np.dtype([("ids", "i8"), *([("x", "f4", 9)] if top_k is None else [("x", "f4, u1", 3), ("rest", "f4", 2)])])
    assert (tmp_path / "cache" / "rows").stat().st_size == row.itemsize * LENGTHS.sum()  # without padding
    name = "logits" if top_k is None else "values"
    for reader, cache in readers(tmp_path / "cache"):
        for sample, text in zip(SAMPLES_OF_TEXTS, TEXTS, strict=True):
            got = cache.tokens(sample, temperature=2.0 if top_k else None)
            want = text if top_k is None else np.sort(text)[:, : -top_k - 1 : -1]
            assert np.array_equal(reader.numpy(got[name]), want)
            assert tuple(got["ids"].shape) == text.shape[:1]
        picked = np.array([4, 1, 2, 2])
        where = np.arange(7) % 7 >= 7 - LENGTHS[picked, None]  # padded on the left, in a longer batch
        for mask in (None, where):
            got = cache.read(SAMPLES_OF_TEXTS[picked], where=mask if mask is None else reader.array(mask))
            kept = reader.numpy(got["where"])
            assert np.array_equal(kept, np.arange(5) < LENGTHS[picked, None] if mask is None else where)
            assert got[name].shape[:2] == kept.shape
            for i, place in enumerate(picked):
                sequence = cache.tokens(SAMPLES_OF_TEXTS[place])
                assert np.array_equal(reader.numpy(got[name])[i][kept[i]], reader.numpy(sequence[name]))
            assert not reader.numpy(got[name])[~kept].any()
        assert tuple(cache.read([])[name].shape) == (0, 0, top_k or 9)
        assert cache.read(SAMPLES_OF_TEXTS[[1]])["where"].shape == (1, 0)
        assert cache.read(SAMPLES_OF_TEXTS[2])[name].shape[0] == 5


def test_the_loss_of_sequences(tmp_path):
    """Padding and the order of the tokens make no difference."""
    cache = record(TORCH, tmp_path / "cache", texts(TORCH, "left"), top_k=3, dtype="float32")
    where = torch.arange(7) >= 7 - torch.from_numpy(LENGTHS)[:, None]
    x = cache.read(SAMPLES_OF_TEXTS, temperature=1.0, where=where)
    student = torch.randn(6, 7, 9, requires_grad=True)
    loss = TORCH.kd.topk_kl_loss(student, x["values"], x["indices"], x["rest"], where=x["where"])
    loss.backward()
    assert not student.grad[~where].any()
    parts = [cache.tokens(sample, temperature=1.0) for sample in SAMPLES_OF_TEXTS]
    values, indices = (torch.cat([x[name] for x in parts]) for name in ("values", "indices"))
    rest = torch.cat([x["rest"]["1.0"] for x in parts])
    assert torch.allclose(loss, TORCH.kd.topk_kl_loss(student[where], values, indices, rest))


def test_sequences_go_on_where_a_killed_recorder_stopped(tmp_path):
    data = list(texts(TORCH))
    record(TORCH, tmp_path / "cache", data[:2], dtype="float32")
    whole = {name: (tmp_path / "cache" / name).read_bytes() for name in ("rows", "index")}
    for rows, index, held in ((8, 32, 3), (9, 32, 4), (9, 31, 3), (2, 32, 0), (4, 20, 2)):  # of 9 and 4 · 8
        size = len(whole["rows"]) // 9
        (tmp_path / "cache" / "rows").write_bytes(whole["rows"][: rows * size + 5])
        (tmp_path / "cache" / "index").write_bytes(whole["index"][: 2 * index])
        assert len(MODULES["torch"].TeacherCache(tmp_path / "cache")) == held, (rows, index)
        cache = record(TORCH, tmp_path / "cache", data, dtype="float32")
        assert cache.lengths.tolist() == LENGTHS.tolist()
        assert all(np.array_equal(cache.tokens(i)["logits"], x) for i, x in zip(SAMPLES_OF_TEXTS, TEXTS, strict=True))


def test_a_batch_that_fails_leaves_no_rows(tmp_path, monkeypatch):
    """Even if some rows were written before the NaN was found."""
    monkeypatch.setattr(kdlosses.cache, "_BLOCK", 1)
    data = list(texts(TORCH))
    data[1]["logits"] = torch.nan_to_num(data[1]["logits"])
    data[1]["logits"][1, 0, 4] = np.inf
    with pytest.raises(ValueError, match="got NaN or inf for sample 13; is the teacher in eval mode"):
        record(TORCH, tmp_path / "cache", data, dtype="float32")
    assert (tmp_path / "cache" / "rows").stat().st_size == 3 * (36 + 8)
    cache = record(TORCH, tmp_path / "cache", texts(TORCH), dtype="float32")
    assert np.array_equal(cache.tokens(14)["logits"], TEXTS[4])


@both
def test_sequences_that_do_not_fit(f, tmp_path):
    record(f, tmp_path / "sequences", texts(f))
    record(f, tmp_path / "arrays", one())
    for path, data, message in (
        ("sequences", one(), "was recorded with `lengths` or `where`, and this batch is without; record to another"),
        ("arrays", ragged(lengths=np.array([1, 2])), "was recorded without `lengths` or `where`, and this .* with"),
    ):
        with pytest.raises(ValueError, match=message):
            record(f, tmp_path / path, data)
    cache = MODULES[f.name].TeacherCache(tmp_path / "sequences")
    for mask, message in (
        (np.ones((2, 5), bool), "`where` keeps 5 tokens of sample 10, of which 3 were recorded; it must keep those"),
        (np.ones((1, 5), bool), r"`where` must be booleans, \[batch, length\], of the samples \[2\], got bool\[1, 5\]"),
        (np.ones((2, 5), int), r"`where` must be booleans, \[batch, length\], .*, got int\d\d\[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.read([10, 12], where=f.array(mask))
    with pytest.raises(ValueError, match=r"`where` is for samples that are sequences, .*; give the mask to the loss"):
        MODULES[f.name].TeacherCache(tmp_path / "arrays").read([1], where=f.array(np.ones((1, 3), bool)))
    with pytest.raises(ValueError, match=r"`sample` must be one whole number, got int64\[2\]; `read` gives several"):
        cache.tokens(np.array([10, 12]))
    with pytest.raises(IndexError, match="1 of the 1 samples asked for are not there: 16; record"):
        cache.tokens(16)


# a top k without all logits


@torch_first
@pytest.mark.parametrize("kind", ["arrays", "sequences"])
def test_a_top_k_that_comes_ready(f, kind, tmp_path):
    """Recording again what was read gives the same; log-probabilities give the same up to a shift."""
    data = list(texts(f)) if kind == "sequences" else list(batches(f))
    samples = SAMPLES_OF_TEXTS if kind == "sequences" else ORDER
    options = {"dtype": "float32", "temperatures": [1.0]}
    first = record(f, tmp_path / "logits", data, top_k=3, **options)
    batch = {name: x for name, x in first.read(samples, temperature=1.0).items() if name != "kdlosses"}
    ready = batch | {"index": samples}
    other = TORCH if f is JAX else JAX
    ready["rest"] = {name: other.array(f.numpy(x), "float32") for name, x in batch["rest"].items()}
    second = record(other, tmp_path / "ready", [ready], num_classes=first.num_classes, **options)
    for name in ("rows", "index"):
        assert (tmp_path / "ready" / name).read_bytes() == (tmp_path / "logits" / name).read_bytes()
    assert (second.top_k, second.num_classes, second.temperatures) == (3, first.num_classes, (1.0,))
    logits = np.concatenate(TEXTS) if kind == "sequences" else LOGITS
    norm = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    kept = f.numpy(batch["where"]) if kind == "sequences" else np.ones(SAMPLES, bool)
    log_probs = f.numpy(batch["values"]).astype(np.float64)
    log_probs[kept] -= norm[:, None]
    served = {name: x for name, x in ready.items() if name not in ("values", "rest")} | {"log_probs": log_probs}
    third = record(f, tmp_path / "served", [served], num_classes=first.num_classes, **options)
    x = third.read(samples, temperature=1.0)
    assert np.allclose(f.numpy(x["rest"]["1.0"])[kept], f.numpy(batch["rest"]["1.0"])[kept] - norm, atol=1e-5)
    assert np.allclose(f.numpy(x["values"])[kept], log_probs[kept], atol=1e-6)


def test_the_rest_of_log_probs(tmp_path):
    """It is finite unless no class is left; padded entries do not contribute to it."""
    q = np.array([[0.7, 0.3, 0.4], [0.5, 0.25, 9.0]])
    batch = {"index": [0, 1], "log_probs": np.log(q), "indices": [[4, 1, -7], [0, 9, 9]]}
    batch["kept"] = [[True, True, False], [True, True, False]]
    x = record(TORCH, tmp_path / "some", [batch], num_classes=10).read([0, 1], temperature=1.0)
    assert torch.allclose(x["rest"]["1.0"], torch.tensor([2.0**-24, 0.25]).log())
    loss = TORCH.kd.topk_kl_loss(torch.zeros(2, 10), x["values"], x["indices"], x["rest"], kept=x["kept"])
    assert loss.isfinite()
    batch = {"index": [0], "log_probs": np.log(q[:1, :2]), "indices": [[1, 0]]}
    x = record(TORCH, tmp_path / "all", [batch], num_classes=2).read([0], temperature=1.0)
    assert x["rest"]["1.0"].tolist() == [-np.inf]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_top_k_in_half_precision(dtype, tmp_path):
    """A top k as `lax.top_k` or `torch.topk` returns it for half-precision logits."""
    top = {"values": np.array([[2, 1.5]]), "rest": np.array([-1.25])}
    for f, array in (
        (JAX, lambda x: jnp.asarray(x, dtype)),
        (TORCH, lambda x: torch.from_numpy(x).to(getattr(torch, dtype))),
    ):
        batch = {name: array(x) for name, x in top.items()} | {"index": [0], "indices": [[3, 1]]}
        x = record(f, tmp_path / f.name, [batch], num_classes=4).read([0], temperature=1.0)
        assert (x["values"].tolist(), x["rest"]["1.0"].tolist()) == ([[2, 1.5]], [-1.25])


# several writers


@torch_first
@pytest.mark.parametrize("kind", ["arrays", "sequences"])
def test_parts_open_as_one(f, kind, tmp_path):
    """The parts of writers in either framework, one of them without samples; a sample that two of them have counts
    once."""
    data = list(batches(f)) if kind == "arrays" else list(texts(f))
    samples = ORDER if kind == "arrays" else SAMPLES_OF_TEXTS
    whole = record(f, tmp_path / "whole", data)
    shares = [data[::2], [], data[1::2] + data[:1]]
    for part, share in enumerate(shares):
        given = share if f is TORCH else [{name: np.asarray(x) for name, x in batch.items()} for batch in share]
        cache = record(f, tmp_path / "parts", given, part=part, parts=3)
        assert len(cache) == sum(len(x["index"]) for x in share)
        assert cache.path == tmp_path / "parts" / f"part-{part}-of-3"
    for reader, cache in readers(tmp_path / "parts"):
        assert sorted(cache.index) == sorted(samples)
        assert len(cache) == len(samples)
        assert cache.holds(samples).all()
        for index in (samples, np.flip(samples), samples[[3]], samples[3], samples[:0]):
            for name, x in cache.read(index).items():
                assert np.array_equal(reader.numpy(x), f.numpy(whole.read(index)[name]), equal_nan=True), name
        for name, x in pickle.loads(pickle.dumps(cache)).tokens(samples[2]).items():
            assert np.array_equal(reader.numpy(x), f.numpy(whole.tokens(samples[2])[name]))
        assert cache.lengths is None or cache.lengths.sum() == LENGTHS.sum()
    record(f, tmp_path / "parts", data, part=1, parts=3)  # the writer without samples continues
    assert len(MODULES[f.name].TeacherCache(tmp_path / "parts" / "part-1-of-3")) == len(samples)


def test_parts_that_do_not_fit(tmp_path):
    open_, path = MODULES["torch"].TeacherCache, tmp_path / "cache"
    record(TORCH, path, one(), part=2, parts=4)
    with pytest.raises(
        ValueError, match=r"3 of the 4 parts are missing: part-0-of-4, .*; copy them .* part=0, parts=4"
    ):
        open_(path)
    for options, message in (
        ({"part": 0, "parts": 2}, "has the parts of 4 writers, got parts=2; record to another path"),
        ({}, "has the parts of 4 writers; give part=rank, parts=4, or record to another path"),
    ):
        with pytest.raises(ValueError, match=message):
            record(TORCH, path, one(), **options)
    for part in (0, 1):
        record(TORCH, path, one(), part=part, parts=4)
    record(TORCH, path, one(), part=3, parts=4, top_k=2)
    with pytest.raises(
        ValueError, match="part-3-of-4: was recorded with top_k 2, and part-0-of-4 with None; record all"
    ):
        open_(path)
    assert len(open_(path / "part-3-of-4")) == 2
    record(TORCH, tmp_path / "one", one())
    with pytest.raises(ValueError, match="was recorded by one writer, without `part`; record the parts to another"):
        record(TORCH, tmp_path / "one", one(), part=0, parts=2)
    (path / "part-0-of-2").mkdir()
    with pytest.raises(ValueError, match="has parts of 2 writers and of 4; open one of them by its own path"):
        open_(path)


@pytest.mark.parametrize("parts", [{}, {"part": 1, "parts": 2}], ids=["alone", "part"])
def test_two_writers_of_one_part(parts, tmp_path):
    """The second gets an error and the first continues; a third may start when the first has ended."""

    def data():
        yield from one()
        with pytest.raises(
            ValueError,
            match=r"another writer is recording there; wait until it ends, or .* part=rank, parts=world_size",
        ):
            record(JAX, tmp_path / "cache", one(index=np.array([5, 6])), **parts)
        yield from one(index=np.array([3, 4]))

    assert record(TORCH, tmp_path / "cache", data(), **parts).index.tolist() == [1, 2, 3, 4]
    assert len(record(TORCH, tmp_path / "cache", one(index=np.array([5, 6])), **parts)) == 6


@pytest.mark.parametrize("gone", ["rows", "index", "header.json"])
def test_a_file_that_is_missing(gone, tmp_path):
    record(TORCH, tmp_path / "cache", one())
    (tmp_path / "cache" / gone).unlink()
    for go in (MODULES["torch"].TeacherCache, lambda path: record(TORCH, path, one(index=np.array([7, 8])))):
        if gone == "header.json" and go is not MODULES["torch"].TeacherCache:
            continue
        with pytest.raises(ValueError, match=f"its {gone} is missing|the file `{gone}` is missing, .*; copy it there"):
            go(tmp_path / "cache")


def test_a_cache_of_an_earlier_version(tmp_path):
    """A cache from before sequences and parts existed can be opened, and recording continues."""
    row = np.dtype(
        [("values", "<f2", (2,)), ("indices", "|u1", (2,)), ("rest", "<f4", (2,)), ("z", "<i8"), ("a", "|b1")]
    )
    rows = np.array([([2, 1], [3, 0], [0.5, 1.5], 7, True), ([4, 3], [1, 2], [-1, 0], 8, False)], row)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "rows").write_bytes(rows.tobytes() + b"begun")
    (tmp_path / "old" / "index").write_bytes(np.array([30, 10]).tobytes() + b"3")
    fields = {"values": ["<f2", [2]], "indices": ["|u1", [2]], "rest": ["<f4", [2]], "z": ["<i8", []], "a": ["|b1", []]}
    header = {"format": "1", "kdlosses": "0.0.9", "num_classes": 5, "top_k": 2, "temperatures": [1.0, 4.0]}
    (tmp_path / "old" / "header.json").write_text(json.dumps(header | {"fields": fields}))
    new = {"index": [10, 20], "logits": np.array([[9, 0, 0, 0, 0], [0, 0, 3, 0, 5.0]]), "a": [True, True], "z": [1, 2]}
    for f, cache in (*readers(tmp_path / "old"), (TORCH, None)):
        if cache is None:
            cache = record(f, tmp_path / "old", [new], top_k=2, temperatures=[1.0, 4.0])
            x = cache.tokens(20)
            assert (x["values"].tolist(), x["indices"].tolist(), x["z"].item()) == ([5, 3], [4, 2], 2)
        x = cache.read([10, 30], temperature=4.0)
        assert [x[name].tolist() for name in ("values", "indices", "z", "a")] == [
            [[4, 3], [2, 1]], [[1, 2], [3, 0]], [8, 7], [False, True]
        ]  # fmt: skip
        assert x["rest"]["4.0"].tolist() == [0, 1.5]
        assert cache.tokens(30)["values"].tolist() == [2, 1]
