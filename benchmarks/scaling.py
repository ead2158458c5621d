"""`python -m benchmarks.scaling`: memory and communication of large problems on 64 devices, reported by the compiler.

Nothing is run: each program, forward and backward, is compiled for 64 simulated devices on the host. The memory is that
of one device, as the compiler reports it. The bytes sent are those that one device sends to others in a step, if every
collective uses a ring.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import kdjax

DEVICES = 64
ROWS, VIEWS = P("data"), P(None, "data")  # the axis of the examples is spread over devices
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
# the bytes that one of n devices sends, relative to the bytes of the collective's result
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A step at a given size: the function, and the shapes, dtypes and shardings of its inputs."""

    name: str
    mesh: tuple[int, ...]
    build: Callable[[Mesh], tuple[Callable[..., Any], tuple[Any, ...]]]


def _memories(
    name: str, mesh: Mesh, rows: int, dim: int, negatives: int, batch: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def array(*shape: int, dtype: str = "float32", spec: P = ROWS) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = -(-rows // DEVICES) * DEVICES
    memory, scalar = array(rows, dim), array(spec=P())
    function, kind = getattr(kdjax, f"{name}_loss"), getattr(kdjax, f"{name.upper()}State")
    state, specs = kind(memory, memory, scalar, scalar), kind(ROWS, ROWS, P(), P())

    def local(student: Any, teacher: Any, index: Any, negatives: Any, state: Any) -> Any:
        def loss(student: Any, teacher: Any) -> Any:
            value, after = function(student, teacher, index, negatives, state, axis_name="data", sharded_memory=True)
            return jax.lax.pmean(value, "data"), after

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(student, teacher)

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(ROWS, ROWS, ROWS, ROWS, specs), out_specs=((P(), specs), (ROWS, ROWS))
    )
    embedding = array(batch, dim)
    integers = functools.partial(array, dtype="int32")
    return step, (embedding, embedding, integers(batch), integers(batch, negatives), state)


def _dino(mesh: Mesh, views: int, batch: int, dim: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def array(*shape: int, spec: P = VIEWS) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))

    def local(student: Any, teacher: Any, state: Any) -> Any:
        def loss(student: Any) -> Any:
            value, after = kdjax.dino_loss(student, teacher, state, axis_name="data")
            return jax.lax.pmean(value, "data"), after

        return jax.value_and_grad(loss, has_aux=True)(student)

    step = jax.shard_map(local, mesh=mesh, in_specs=(VIEWS, VIEWS, P()), out_specs=((P(), kdjax.DINOState(P())), VIEWS))
    return step, (array(views, batch, dim), array(2, batch, dim), kdjax.DINOState(array(dim, spec=P())))


def _kl(mesh: Mesh, sequences: int, tokens: int, vocabulary: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    layout = NamedSharding(mesh, P("data", None, "vocabulary"))
    logits = jax.ShapeDtypeStruct((sequences, tokens, vocabulary), "bfloat16", sharding=layout)
    step = jax.value_and_grad(lambda student, teacher: kdjax.kl_loss(student, teacher, temperature=2.0))
    return step, (logits, logits)


PROGRAMS = (
    Program(
        "crcd_loss: 14.2 M × 128 in each of two memories, K 16,384, batch 4,096",
        (64,),
        functools.partial(_memories, "crcd", rows=14_197_122, dim=128, negatives=16_384, batch=4096),
    ),
    Program(
        "crd_loss: the same",
        (64,),
        functools.partial(_memories, "crd", rows=14_197_122, dim=128, negatives=16_384, batch=4096),
    ),
    Program("dino_loss: 2 + 8 views, batch 1,024, 65,536 wide", (64,), functools.partial(_dino, views=10, batch=1024, dim=65_536)),
    Program("kl_loss: 64 × 4,096 tokens, 128,256 classes, bfloat16, over the batch", (64, 1), functools.partial(_kl, sequences=64, tokens=4096, vocabulary=128_256)),
    Program("the same, over batch and classes", (8, 8), functools.partial(_kl, sequences=64, tokens=4096, vocabulary=128_256)),
)  # fmt: skip


def measure(program: Program) -> dict[str, Any]:
    """The bytes in the memory of one device, and the bytes that it sends in one step, by collective."""
    names = ("data", "vocabulary")[: len(program.mesh)]
    mesh = jax.make_mesh(program.mesh, names, axis_types=(AxisType.Auto,) * len(names))
    step, inputs = program.build(mesh)
    compiled = jax.jit(step).lower(*inputs).compile()
    memory, sent = compiled.memory_analysis(), dict.fromkeys(SENT, 0.0)
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", line)
        if found:
            groups = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\})", line)
            members = int(groups[1] or len(groups[2].split(","))) if groups else DEVICES
            sent[found[2]] += _bytes(found[1]) * SENT[found[2]](members)
    return {
        "inputs": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sent": {name: number for name, number in sent.items() if number},
    }


def _bytes(shapes: str) -> int:
    """The bytes of a result, or of a tuple of results, in the compiler's notation: `f32[64,128]{1,0}`."""
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="programs whose name contains this text")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", DEVICES)
    table = Table(title=f"MiB on one of {DEVICES} devices, and sent by it in a step", title_justify="left")
    for heading in ("", "mesh", "inputs", "outputs", "temporaries", "sent"):
        table.add_column(heading, justify="left" if heading in ("", "mesh") else "right")
    for program in PROGRAMS:
        if options.only in program.name:
            figures = measure(program)
            sent = "\n".join(f"{name} {_mebi(number)}" for name, number in figures["sent"].items())
            sizes = (_mebi(figures[k]) for k in ("inputs", "outputs", "temporaries"))
            table.add_row(program.name, "×".join(map(str, program.mesh)), *sizes, sent or "0")
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    return 0


def _mebi(number: float) -> str:
    return f"{number / 2**20:,.3g}" if number < 100 * 2**20 else f"{number / 2**20:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
