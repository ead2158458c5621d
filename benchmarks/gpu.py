"""Checks correctness, speed and memory of kdtorch (eager and fused) and kdjax in one run on a GPU: `benchmarks/gpu.sh`.

First all losses are compared, in float32 and bfloat16, with the formula in float64. Then some of them run in bfloat16
on 8,192 rows of a vocabulary. Then follow the workloads of `python -m benchmarks` in float32. Each part has a share of
the time, and reports what it did not reach. A step is forward and backward; its time is measured by CUDA events, and
its memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
NEEDED = ("torch", "numpy", "jaxtyping", "rich", "ml_dtypes")
OPTIONAL = ("jax", "flax", "optax", "triton")
FORMS = ("floor", "kdtorch", "fused", "direct", "direct compiled", "kdjax")
CHECKED = {"kdtorch": "torch", "fused": "torch", "kdjax": "jax"}
LARGE = ("kl_loss", "dkd_loss", "dino_loss", "jsd_loss")  # and all losses that begin with "linear_"
# the fraction of the time after which a part begins nothing more
SHARES = {
    "parity kdtorch": 0.08,
    "parity fused": 0.28,
    "parity kdjax": 0.42,
    "large": 0.64,
    "large compiled": 0.70,
    "large kdjax": 0.76,
    "workloads": 1.0,
}


class Report:
    """The results. The file is written again after each row, so that nothing is lost if the run is stopped."""

    def __init__(self, path: str | None, seconds: float, texts: Sequence[str]) -> None:
        self.content: dict[str, Any] = {"parity": [], "large": [], "workloads": [], "not reached": []}
        self.path, self.seconds, self.texts, self.start = path, seconds, texts, time.monotonic()

    def reaches(self, part: str, *what: str) -> bool:
        """Whether this measurement was requested, and there is time left for it."""
        if not any(text in " ".join(what) for text in self.texts):
            return False
        in_time = time.monotonic() - self.start < SHARES[part] * self.seconds
        if not in_time:
            self.content["not reached"].append(" ".join([part, *what]))
        return in_time

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.content[part].append(row)
        self.content["seconds"] = round(time.monotonic() - self.start, 1)
        print(f"{self.content['seconds']:6.1f} s  {part}", *(f"{k}={_short(v)}" for k, v in row.items()), flush=True)
        self.write()

    def write(self) -> None:
        if self.path:
            whole = pathlib.Path(f"{self.path}.new")  # a run may be stopped while it writes
            whole.write_text(json.dumps(self.content, indent=1) + "\n")
            whole.replace(self.path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def missing(device: str) -> tuple[list[str], list[str]]:
    """The missing modules that are needed, and other missing things, after the wheels in `out/wheels` are unpacked."""
    folder = tempfile.mkdtemp(prefix="wheels-")
    for wheel in sorted((ROOT / "out" / "wheels").glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(folder)
    sys.path.append(folder)  # installed packages come first
    wanted = [x for x in OPTIONAL if x != "triton" or device == "cuda"]
    absent = [[x for x in names if importlib.util.find_spec(x) is None] for names in (NEEDED, wanted)]
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        absent[1].append("a C++ compiler")
    return absent[0], absent[1]


# -- correctness -------------------------------------------------------------------------------------------------------


class OnDevice:
    """kdtorch with functions that move their arguments to the device, and their results back to the CPU."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        import kdtorch

        function = getattr(kdtorch, name)
        if not name.endswith("_loss"):
            return function

        def call(*inputs: Any, **options: Any) -> Any:
            given = [_to(x, self.device) for x in inputs], {k: _to(x, self.device) for k, x in options.items()}
            return _to(function(*given[0], **given[1]), "cpu")

        return call


def _to(x: Any, device: str) -> Any:
    if isinstance(x, list | tuple):
        items = [_to(y, device) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x.to(device) if hasattr(x, "detach") else x


def parity(report: Report, device: str, forms: Sequence[str]) -> None:
    """Check an ordinary and a masked case of each loss."""
    import kdtorch
    from parity.cases import LOSSES, cases
    from parity.check import check

    for form in forms:
        for loss in LOSSES:
            chosen = [case for case in cases(loss) if case.name in ("ordinary", "masked")]
            for dtype in ("float32", "bfloat16"):
                if not report.reaches(f"parity {form}", loss.title, dtype):
                    continue
                with _fused(form == "fused"):
                    packages = {} if form == "kdjax" else {"torch": OnDevice(device)}
                    found = [x for case in chosen for x in check(case, dtype, (CHECKED[form],), **packages)]
                failed = [str(x) for x in found if not x.passed]
                worst = {part: max((x.ulp for x in found if x.part == part and not x.problem), default=0.0) for part in ("value", "gradient")}  # fmt: skip
                row = {"loss": loss.title, "form": form, "dtype": dtype, "passed": not failed, **worst}
                report.add("parity", row | ({"failed": failed[:4]} if failed else {}))
    kdtorch.fuse("auto")


@contextlib.contextmanager
def _fused(setting: bool) -> Iterator[None]:
    import kdtorch

    before = kdtorch.fuse(setting)
    try:
        yield
    finally:
        kdtorch.fuse(before)


# -- speed and memory --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    """A loss and its inputs on a device."""

    loss: Any
    inputs: dict[str, Any]
    options: dict[str, Any]
    device: str

    @property
    def learned(self) -> list[Any]:
        return [x for k in self.loss.learns for x in _list(self.inputs[k])]

    @property
    def rest(self) -> list[Any]:
        fixed = (self.inputs[k] for k in self.inputs if k not in self.loss.learns)
        return [x for value in fixed for x in _list(value)]


def _list(x: Any) -> list[Any]:
    return list(x) if isinstance(x, list | tuple) else [x]


def draw(loss: Any, sizes: Any, dtype: str, device: str, options: dict[str, Any], factor: float = 1.0) -> Job:
    """Random inputs; large ones are drawn on the device."""
    import numpy as np
    import torch

    import kdtorch
    from parity.arrays import each_array
    from parity.kinds import KINDS

    torch.manual_seed(0)
    rng, number = np.random.default_rng(0), getattr(torch, dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=number)

    drawn: dict[str, Callable[[], Any]] = {
        "logits": lambda: normal(*sizes.batch, sizes.classes).mul_(3 * factor),
        "labels": lambda: torch.randint(sizes.classes, sizes.batch, device=device),
        "views": lambda: normal(sizes.views, *sizes.batch, sizes.dim),
        "teacher_views": lambda: normal(sizes.teacher_views, *sizes.batch, sizes.dim),
    }

    def tensor(x: np.ndarray, state: bool) -> torch.Tensor:
        given = torch.from_numpy(np.array(x)).to(device)
        return given.to(torch.float32 if state else number) if given.is_floating_point() else given

    inputs: dict[str, Any] = {}
    for name, kind in loss.inputs.items():
        if kind in drawn:
            inputs[name] = drawn[kind]()
            continue
        value, state = KINDS[kind].draw(rng, sizes), name == loss.state
        if state:
            value |= KINDS[kind].later
        value = each_array(value, lambda x, state=state: tensor(x, state))
        inputs[name] = getattr(kdtorch, kind)(**value) if state else value
    job = Job(loss, inputs, options, device)
    for x in job.learned:
        x.requires_grad_()
    return job


def step_of(form: str, job: Job) -> Callable[[], tuple[Any, list[Any]]]:
    """A function that runs forward and backward, and returns the value and the gradients."""
    import torch

    import kdtorch
    from benchmarks import direct

    if form == "kdjax":
        return _jax_step(job)
    if form == "floor":

        def floor() -> tuple[Any, list[Any]]:
            copies = [x.detach().clone() for x in job.learned]
            for x in job.rest:
                x.sum()
            return torch.zeros(()), copies

        return floor
    plain = form.startswith("direct")
    function = getattr(direct if plain else kdtorch, job.loss.name)
    if plain:
        formula = function

        def function(*inputs: Any, **options: Any) -> Any:  # in float32, as it is usually written
            return formula(*(_each(x, lambda v: v.float() if v.is_floating_point() else v) for x in inputs), **options)

    if form == "direct compiled":
        function = torch.compile(function, dynamic=False)

    def step() -> tuple[Any, list[Any]]:
        value = function(*job.inputs.values(), **job.options)
        value = value[0] if isinstance(value, tuple) else value
        return value.detach(), list(torch.autograd.grad(value, job.learned))

    return step


def _each(x: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(x, list | tuple):
        items = [_each(y, function) for y in x]
        return type(x)(*items) if hasattr(x, "_fields") else items
    return function(x)


def _jax_step(job: Job) -> Callable[[], tuple[Any, list[Any]]]:
    import jax
    import jax.numpy as jnp

    import kdjax
    from parity.kinds import MAPS

    def array(x: Any) -> Any:
        return jax.dlpack.from_dlpack((x.int() if str(x.dtype) == "torch.int64" else x).detach().contiguous())

    inputs = {}
    for name, kind in job.loss.inputs.items():
        value = job.inputs[name]
        if name == job.loss.state:
            inputs[name] = getattr(kdjax, kind)(**{k: array(v) for k, v in value._asdict().items()})
        else:
            inputs[name] = _each(value, lambda x, maps=kind in MAPS: array(x.movedim(1, -1) if maps else x))
    learned = {k: inputs[k] for k in job.loss.learns}
    fixed = {k: v for k, v in inputs.items() if k not in learned}

    def objective(learned: dict[str, Any], fixed: dict[str, Any]) -> Any:
        arguments = {**learned, **fixed}
        value = getattr(kdjax, job.loss.name)(*(arguments[k] for k in job.loss.inputs), **job.options)
        return value[0] if isinstance(value, tuple) else value

    program = jax.jit(jax.value_and_grad(objective)).lower(learned, fixed).compile()

    def step() -> tuple[Any, list[Any]]:
        value, slopes = jax.block_until_ready(program(learned, fixed))
        maps = {k for k in job.loss.learns if job.loss.inputs[k] in MAPS}
        return value, [jnp.moveaxis(x, -1, 1) if k in maps else x for k in job.loss.learns for x in _list(slopes[k])]

    analysis = program.memory_analysis()
    step.bytes = analysis.temp_size_in_bytes + analysis.output_size_in_bytes if analysis else None  # type: ignore[attr-defined]
    return step


def measure(form: str, job: Job, reference: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Measure one form: milliseconds, peak bytes beyond the inputs, and the errors of value and gradient."""
    import torch

    cuda = job.device == "cuda"
    with _fused(form == "fused"):
        start = time.perf_counter()
        step = step_of(form, job)
        result = step()
        _wait(cuda)
        row: dict[str, Any] = {"form": form, "first call, s": round(time.perf_counter() - start, 2)}
        if form != "floor":
            found = _ends(*result)
            row |= _apart(found, reference.setdefault("ends", found))
        del result
        gradients = sum(x.numel() * x.element_size() for x in job.learned)
        if cuda and form != "kdjax":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            _wait(cuda)
            row["bytes"] = torch.cuda.max_memory_allocated() - before
        elif form == "kdjax":
            row["bytes"] = step.bytes  # type: ignore[attr-defined]
        if row.get("bytes") is not None:
            given = gradients + sum(x.numel() * x.element_size() for x in job.rest)
            row["of inputs and gradients"] = (given + row["bytes"]) / (given + gradients)
        taken = _times(step, cuda and form != "kdjax", seconds)
    row |= {"ms": 1e3 * statistics.median(taken), "ms, least": 1e3 * min(taken), "ms, most": 1e3 * max(taken)}
    if form == "floor":
        reference["floor"] = row["ms"]
    elif "floor" in reference:
        row["of the floor"] = row["ms"] / reference["floor"]
    return row


def _wait(cuda: bool) -> None:
    import torch

    if cuda:
        torch.cuda.synchronize()


def _times(step: Callable[[], Any], events: bool, seconds: float) -> list[float]:
    """The seconds of each of some steps, after two steps that are not counted."""
    import torch

    taken: list[float] = []
    start = time.perf_counter()
    for i in range(52):
        if events:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            step()
            marks[1].record()
            marks[1].synchronize()
            once = marks[0].elapsed_time(marks[1]) / 1e3
        else:
            before = time.perf_counter()
            step()
            once = time.perf_counter() - before
        taken.append(once)
        if i >= 4 and time.perf_counter() - start > seconds:
            break
    return taken[2:]


def _ends(value: Any, slopes: list[Any]) -> list[Any]:
    """The value, and the first and last entries of each gradient."""
    import numpy as np

    def array(x: Any) -> Any:
        return x.detach().float().cpu().numpy() if hasattr(x, "detach") else np.asarray(x).astype(np.float32)

    flat = [x.reshape(-1) for x in slopes]
    return [array(value), *(array(part) for x in flat for part in (x[:4096], x[-4096:]))]


def _apart(ours: list[Any], theirs: list[Any]) -> dict[str, float]:
    """The errors of value and gradients relative to the largest entry; the reference is the form that ran first."""
    import numpy as np

    def error(a: Any, b: Any) -> float:
        return float(np.abs(a - b).max() / max(np.abs(b).max(), np.finfo(np.float32).tiny))

    slopes = [error(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return {"value apart": error(ours[0], theirs[0]), "gradient apart": max(slopes)}


def _row(form: str, job: Job, reference: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The measurement, or the error that prevented it."""
    import torch

    try:
        return measure(form, job, reference, seconds)
    except Exception as error:  # such as out of memory
        return {"form": form, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        if job.device == "cuda":
            torch.cuda.empty_cache()


def large(report: Report, device: str, small: bool, forms: Sequence[str]) -> None:
    """Measure losses in bfloat16, on a batch of tokens with a large vocabulary."""
    from parity.cases import LOSSES, Sizes

    losses = sorted(
        (x for x in LOSSES if x.name in LARGE or x.name.startswith("linear_")),
        key=lambda x: LARGE.index(x.name) if x.name in LARGE else len(LARGE),
    )
    rows = 16 if small else 8192
    references: dict[tuple[str, int], dict[str, Any]] = {}
    passes = (("large", FORMS[:-2]), ("large compiled", FORMS[-2:-1]), ("large kdjax", FORMS[-1:]))
    for part, names in ((part, [x for x in names if x in forms]) for part, names in passes):
        for vocabulary in (320, 1283) if small else (32_000, 128_256):
            for loss in losses:
                views = rows // 4 if loss.name == "dino_loss" else rows  # four student views and two teacher views
                dim = vocabulary if loss.name == "dino_loss" else 16 if small else 2048
                sizes = Sizes((views,), vocabulary, dim, 4, 2, teacher_dim=dim)
                wanted = [x for x in names if _has(x, loss) and report.reaches(part, loss.title, str(vocabulary), x)]
                if not wanted:
                    continue
                job = draw(loss, sizes, "bfloat16", device, {})
                reference = references.setdefault((loss.title, vocabulary), {})
                for form in wanted:
                    if report.reaches(part, loss.title, str(vocabulary), form):
                        found = _row(form, job, reference, 0.05 if small else 0.6)
                        report.add("large", {"loss": loss.title, "rows": rows, "classes": vocabulary} | found)
                del job


def workloads(report: Report, device: str, small: bool, forms: Sequence[str]) -> None:
    """Measure all workloads in float32, one form after another, those that compile quickly first."""
    from benchmarks.workloads import WORKLOADS
    from parity.cases import Sizes

    tiny = Sizes((6,), 11, 9, 10, 2, ((2, 8, 8), (3, 4, 4)), 20, 5, kept=3)
    references: dict[str, dict[str, Any]] = {}
    chosen = [x for x in WORKLOADS if x.loss.learns and x.benchmark.dtype == "float32" and not x.benchmark.masked]
    for form in forms:
        for workload in chosen:
            benchmark = workload.benchmark
            direct = benchmark.direct and (form == "direct" or benchmark.compiles)
            if (form.startswith("direct") and not direct) or not _has(form, workload.loss):
                continue
            if report.reaches("workloads", workload.name, form):
                sizes = tiny if small else benchmark.sizes
                options = benchmark.options | (workload.loss.required if small else {})  # options that fit small sizes
                job = draw(workload.loss, sizes, "float32", device, options, benchmark.factor)
                found = _row(form, job, references.setdefault(workload.name, {}), 0.05 if small else 0.3)
                report.add("workloads", {"workload": workload.name} | found)


def _has(form: str, loss: Any) -> bool:
    """Whether the loss has this form."""
    from benchmarks import direct

    return not form.startswith("direct") or hasattr(direct, loss.name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="use tiny inputs, to test the script")
    parser.add_argument("--seconds", type=float, default=390, help="time limit, after which nothing more begins")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="names that contain one of these texts")
    parser.add_argument("--json", metavar="FILE", help="write all figures, versions and the device")
    options = parser.parse_args(arguments)
    report = Report(options.json, options.seconds, options.only)
    needed, absent = missing(options.device)
    print("missing:", ", ".join([*needed, *absent]) or "nothing", flush=True)
    if needed:
        print("fetch them on a machine with a network: benchmarks/gpu.sh --fetch", file=sys.stderr)
        return 2

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU; to test the script: benchmarks/gpu.sh --device cpu --small", file=sys.stderr)
        return 2
    torch._dynamo.config.recompile_limit = 1000  # the direct forms are compiled again for each workload
    forms, checked = list(FORMS), list(CHECKED)
    about = {"python": platform.python_version(), "torch": torch.__version__, "missing": absent}
    about["device"] = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu"
    if {"jax", "flax", "optax"} & set(absent):
        jax_device = None
    else:
        import jax

        jax_device = jax.devices()[0].platform
        about |= {"jax": jax.__version__, "jax's device": jax.devices()[0].device_kind}
    if jax_device != {"cuda": "gpu", "cpu": "cpu"}[options.device]:
        forms.remove("kdjax")
        checked.remove("kdjax")
        print(f"kdjax is left out: JAX is {'on ' + jax_device if jax_device else 'not installed'}", flush=True)
    report.content = {"environment": about, "small": options.small, **report.content}
    parity(report, options.device, checked)
    large(report, options.device, options.small, forms)
    workloads(report, options.device, options.small, forms)
    report.write()
    failed = [row for row in report.content["parity"] if not row["passed"]]
    print(f"{len(failed)} of {len(report.content['parity'])} comparisons failed;", f"{len(report.content['not reached'])} not reached")  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
