"""A teacher's outputs on disk: what is recorded is what is read, in either framework, whatever happens to the writer."""

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
from tiers import slow

import kdjax.interop
import kdjax.teacher_cache
import kdtorch.interop
import kdtorch.teacher_cache
from parity.compare import ulps

both = pytest.mark.parametrize("f", BOTH, ids=lambda f: f.name)
RNG = np.random.default_rng(0)
SAMPLES, CLASSES = 40, 11
LOGITS = (3 * RNG.normal(size=(SAMPLES, CLASSES))).astype(np.float32)
FEATURES = RNG.normal(size=(SAMPLES, 2, 3)).astype(np.float32)
ORDER = RNG.permutation(SAMPLES) * 7  # the samples' places in the data set
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
    """What `read` gives is refused at another temperature: in words for a number, by NaN for an array."""
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
    """Of all classes it is the full KL; of some, with their rest, the KL of what is left when the rest is one."""
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
    """Logits with axes between, in bfloat16; many classes."""
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
    assert int(done.stdout) > 1  # so that the kills came while samples were being written


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
    with pytest.raises(ValueError, match="the teacher has 3 classes, and the student, by `num_classes`, 10; record"):
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
        (json.dumps(json.loads(header.read_text()) | {"format": "2"}), "of format 2, and this version reads format 1"),
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
