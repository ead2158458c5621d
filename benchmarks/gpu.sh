#!/usr/bin/env bash
# Parity, speed and memory of all losses on one GPU, in at most seven minutes; what is measured is in the file after each line.
#
#   benchmarks/gpu.sh --json gpu.json            # what is missing on this machine is printed first
#   benchmarks/gpu.sh --device cpu --small       # the same on a CPU, of tiny inputs
#   benchmarks/gpu.sh --linear                   # the heads of a language model, beside Liger's, which publishes 11.1 GB and 60.7 ms
#   benchmarks/gpu.sh --fetch                    # where there is a network: the small wheels that a bare machine lacks
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

if [ "${1:-}" = --fetch ]; then # for this version of Python; PyTorch, JAX, Flax and Optax must be there
  exec "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest out/wheels \
    jaxtyping wadler-lindig rich pygments markdown-it-py mdurl ml_dtypes safetensors
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ "${1:-}" = --linear ]; then # fused linear JSD on an H100
  exec timeout --kill-after=5 415 "$python" -W ignore -m benchmarks.linear --device cuda --loss jsd --tokens 8192 \
    --vocabulary 128256 --dim 4096 --dtype bfloat16 --steps 5 --forms plain liger kdtorch "kdtorch least" kdjax "kdjax least" "${@:2}"
fi
exec timeout --kill-after=5 415 "$python" -W ignore -m benchmarks.gpu "$@"
