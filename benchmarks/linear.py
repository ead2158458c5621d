"""`python -m benchmarks.linear`: time and peak memory of the losses of linear heads over a vocabulary.

A step is forward and backward. The losses are compared with the plain form, which computes all logits, in eager and
compiled PyTorch, with TRL's chunked divergence, torchtune's chunked loss and Liger's fused loss. Each form runs in its
own process, on the same inputs, and takes its steps in turn. The memory is the peak of the process, or of the GPU's
allocator, minus the memory before the step, so that gradients count and inputs do not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
FORMS = ("plain", "plain compiled", "kdtorch", "kdtorch least", "kdjax", "kdjax least", "trl", "torchtune", "liger")
LOSSES = ("kl", "reverse_kl", "jsd")
LIMITS = {"float32": 1e-3, "bfloat16": 2e-2}  # relative to the largest entry of a gradient


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.linear", description=__doc__)
    parser.add_argument("--loss", choices=LOSSES, default="kl")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[512], help="all with the first vocabulary")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[128_256], help="all with the first tokens")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--dtype", choices=LIMITS, default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="cores of a CPU that each form may use")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not timed")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--png", metavar="FILE", help="draw memory over tokens and vocabulary, and FILE_phone")
    parser.add_argument(
        "--form", choices=FORMS, help=argparse.SUPPRESS
    )  # the form that this process runs, step by step on request
    options = parser.parse_args(arguments)
    if options.form:
        return _serve(options)
    rows = []
    sizes = [(tokens, options.vocabulary[0]) for tokens in options.tokens]
    sizes += [(options.tokens[0], vocabulary) for vocabulary in options.vocabulary[1:]]
    for tokens, vocabulary in sizes:
        rows += _turns(options, tokens, vocabulary)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.png:
        png = pathlib.Path(options.png)
        _draw(rows, png)
        _draw(rows, png.with_stem(f"{png.stem}_phone"), phone=True)
    return 0


def _turns(options: argparse.Namespace, tokens: int, vocabulary: int) -> list[dict[str, Any]]:
    """Measure all forms in turn, and print the results."""
    print(
        f"{options.loss}, {tokens} tokens x {vocabulary} x {options.dim}, {options.dtype}, {options.device}", flush=True
    )
    settings = [f"--{name}={getattr(options, name)}" for name in ("loss", "dim", "dtype", "device", "threads")]
    settings += [f"--tokens={tokens}", f"--vocabulary={vocabulary}"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.linear", *settings]
    with contextlib.ExitStack() as stack:
        servers = {}
        for form in options.forms:
            opened = subprocess.Popen(
                [*command, f"--form={form}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            servers[form] = stack.enter_context(opened)
        taken: dict[str, list[dict[str, Any]]] = {form: [] for form in servers}
        for _ in range(options.steps + 1):
            for form, server in servers.items():
                if server.poll() is None and server.stdin and server.stdout:
                    server.stdin.write("step\n")
                    server.stdin.flush()
                    answer = server.stdout.readline()
                    if answer:
                        taken[form].append(json.loads(answer))
        for server in servers.values():
            if server.stdin:
                server.stdin.close()
    rows = []
    for form, steps in taken.items():
        row = {"loss": options.loss, "tokens": tokens, "vocabulary": vocabulary, "dim": options.dim, "form": form}
        if len(steps) > 1 and "error" not in steps[-1]:
            row |= {"s": statistics.median(x["s"] for x in steps[1:]), "MiB": max(x["MiB"] for x in steps[1:])}
            row |= {key: steps[0][key] for key in ("value", "ends")}
        else:
            row["error"] = steps[-1]["error"] if steps else "the process ended"
        rows.append(row)
    first = next((row for row in rows if "s" in row), None)
    for row in rows:
        if first is None or "s" not in row:
            print(f"{row['form']:>16}  {row['error']}", flush=True)
            continue
        scale = max(map(abs, first["ends"]))
        apart = (
            max(
                abs(a - b)
                for a, b in zip(row.pop("ends") if row is not first else row["ends"], first["ends"], strict=True)
            )
            / scale
        )
        if apart > LIMITS[options.dtype]:
            row["apart"] = apart
        print(
            f"{row['form']:>16}  {row['s']:8.3f} s  {row['s'] / first['s']:5.2f}x  {row['MiB']:7.0f} MiB  loss {row['value']:.6g}"
            + (f"  its gradient differs by {apart:.1e} of the largest entry" if "apart" in row else ""),
            flush=True,
        )
    for row in rows:
        row.pop("ends", None)
    return rows


def _serve(options: argparse.Namespace) -> int:
    """Run one form: for each line of the standard input, take a step and print its measurement."""
    if options.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    import torch

    torch.set_num_threads(options.threads)
    try:
        step = _form(options)
        error = ""
    except ImportError as absent:
        error = f"{absent}"
    for _ in sys.stdin:
        if not error:
            try:
                answer = _measured(step, options.device)
            except Exception as fault:  # such as out of memory
                error = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        print(json.dumps({"error": error} if error else answer), flush=True)
    return 0


def _measured(step: Callable[[], tuple[Any, Any]], device: str) -> dict[str, Any]:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
    start = time.perf_counter()
    value, gradient = step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    if device == "cuda" and "jax" in sys.modules:  # JAX's peak is since the start of the process
        statistics_of = sys.modules["jax"].devices()[0].memory_stats()
        before, peak = statistics_of["bytes_in_use"], statistics_of["peak_bytes_in_use"]
    return {"s": seconds, "MiB": (peak - before) / 2**20, "value": float(value), "ends": _ends(gradient)}


def _status(name: str) -> int:
    """A memory statistic of this process, in bytes."""
    found = re.search(rf"{name}:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def _ends(gradient: Any) -> list[float]:
    """The first and last entries of the head's gradient."""
    rows = gradient[:2, :64], gradient[-2:, -64:]
    return [float(x) for row in rows for x in row.reshape(-1)]


def _form(options: argparse.Namespace) -> Callable[[], tuple[Any, Any]]:
    """The step of a form: it returns the loss and the head's gradient, and computes that of the hidden states too."""
    import torch

    (tokens,), (vocabulary,) = options.tokens, options.vocabulary
    dtype, device = getattr(torch, options.dtype), options.device
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, scale: float) -> torch.Tensor:
        x = torch.empty(rows, options.dim, dtype=dtype)
        for part in x.split(4096):  # in parts, without a wide copy of everything
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
        return x.to(device)

    spread = options.dim**-0.5
    h, w, g, v = drawn(tokens, 1.0), drawn(vocabulary, 2 * spread), drawn(tokens, 1.0), drawn(vocabulary, 2 * spread)
    if options.form.startswith("kdjax"):
        return _jax(options, h, w, g, v)
    loss = _torch(options)
    h.requires_grad_()
    w.requires_grad_()

    def step() -> tuple[Any, Any]:
        h.grad = w.grad = None
        value = loss(h, w, g, v)
        value.backward()
        gradient, h.grad, w.grad = w.grad, None, None
        return value.detach(), gradient

    return step


def _jax(options: argparse.Namespace, *arrays: Any) -> Callable[[], tuple[Any, Any]]:
    import jax

    import kdjax

    memory = "least" if options.form.endswith("least") else "low"
    function = getattr(kdjax, f"linear_{options.loss}_loss")

    def value(h: Any, w: Any, g: Any, v: Any) -> Any:
        return function(h, w, g, v, memory=memory)

    program = jax.jit(jax.value_and_grad(value, (0, 1)))
    given = [jax.numpy.from_dlpack(x) for x in arrays]

    def step() -> tuple[Any, Any]:
        value, (_, gradient) = jax.block_until_ready(program(*given))
        return value, gradient

    return step


def _torch(options: argparse.Namespace) -> Callable[..., Any]:
    import torch

    import kdtorch

    name, form = options.loss, options.form
    beta = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[name]
    if form in ("kdtorch", "kdtorch least"):
        memory = "least" if form.endswith("least") else "low"
        function = getattr(kdtorch, f"linear_{name}_loss")
        return lambda h, w, g, v: function(h, w, g, v, memory=memory)
    if form == "trl":
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        def chunked(h: Any, w: Any, g: Any, v: Any) -> Any:
            return _chunked_divergence_loss(h[None], g[None], w, v, torch.ones(1, len(h), device=h.device), beta)[0]

        return chunked
    if form == "liger":
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=beta)
        return lambda h, w, g, v: fused(h, w, g, v)
    if form == "torchtune":
        from torchtune.modules.loss import kd_losses

        if name == "jsd":
            raise ImportError("torchtune has no such loss")
        kind = {"kl": "ForwardKL", "reverse_kl": "ReverseKL"}[name]
        loss = getattr(kd_losses, f"{kind}WithChunkedOutputLoss")()

        def chunks(h: Any, w: Any, g: Any, v: Any) -> Any:
            labels = torch.zeros(1, len(h), dtype=torch.int64, device=h.device)
            student, teacher = ([part @ y.T for part in x[None].chunk(8, 1)] for x, y in ((h, w), (g, v)))
            return loss(student, teacher, labels)

        return chunks

    def plain(h: Any, w: Any, g: Any, v: Any) -> Any:
        log_p = torch.log_softmax((h @ w.T).float(), -1)
        log_q = torch.log_softmax((g @ v.T).float(), -1)
        kl = torch.nn.functional.kl_div
        if name == "kl":
            return kl(log_p, log_q, reduction="batchmean", log_target=True)
        if name == "reverse_kl":
            return kl(log_q, log_p, reduction="batchmean", log_target=True)
        log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, device=h.device))
        halves = (kl(log_m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q))
        return sum(halves) / 2

    return torch.compile(plain) if form == "plain compiled" else plain


def _draw(rows: list[dict[str, Any]], path: pathlib.Path, phone: bool = False) -> None:
    """Draw memory against tokens, and beside it (on a phone below it) against the vocabulary."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(*((2, 1) if phone else (1, 2)), figsize=(4, 6.4) if phone else (9, 3.6), sharey=True)
    for axis, grows, fixed in zip(axes, ("tokens", "vocabulary"), ("vocabulary", "tokens"), strict=True):
        held = rows[0][fixed]
        for form in dict.fromkeys(row["form"] for row in rows):
            points = [
                (row[grows], row["MiB"]) for row in rows if row["form"] == form and row[fixed] == held and "MiB" in row
            ]
            if points:
                axis.plot(*zip(*sorted(points), strict=True), marker=".", label=form)
        axis.set(xlabel=f"{grows}, at {held:,} {fixed.replace('vocabulary', 'classes')}", ylim=0, xscale="log")
        measured = sorted({row[grows] for row in rows if row[fixed] == held})
        axis.set_xticks(measured, [f"{x:,}" for x in measured])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes if phone else axes[:1]:
        axis.set_ylabel("peak MiB")
    axes[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=200, format="png")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
