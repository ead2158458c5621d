#!/usr/bin/env bash
# Measures parity, speed and memory of all losses on one GPU, in at most seven minutes. The file grows line by line.
#
#   benchmarks/gpu.sh --json gpu.json            # first prints what is missing on this machine
#   benchmarks/gpu.sh --device cpu --small       # the same with tiny inputs on a CPU
#   benchmarks/gpu.sh --linear                   # linear heads, compared with Liger's (published: 11.1 GB and 60.7 ms)
#   benchmarks/gpu.sh --fetch                    # with a network: downloads the small wheels that a bare machine lacks
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = --fetch ]; then # for this version of Python; the machine must have PyTorch, JAX, Flax and Optax
  exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest out/wheels \
    jaxtyping wadler-lindig rich pygments markdown-it-py mdurl ml_dtypes safetensors
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --linear ]; then # fused linear JSD on an H100
  exec timeout --kill-after=5 415 "$python" -W ignore -m benchmarks.linear --device cuda --loss jsd --tokens 8192 \
    --vocabulary 128256 --dim 4096 --dtype bfloat16 --steps 5 --forms plain liger kdtorch "kdtorch least" kdjax "kdjax least" "${@:2}"
fi
exec timeout --kill-after=5 415 "$python" -W ignore -m benchmarks.gpu "$@"
