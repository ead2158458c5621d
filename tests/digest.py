"""`python digest.py THREADS` prints a digest of the exact results, for each package and loss."""

from __future__ import annotations

import hashlib
import json
import sys

import jax
import numpy as np
import torch

from parity.cases import LOSSES, Case, Sizes, draw
from parity.run import run

SIZES = Sizes(batch=(64,), classes=300, dim=96, maps=((16, 12, 12),), num_data=200, negatives=20)
IN_JAX = ("kl_loss", "nkd_loss", "euclidean_mse_loss", "dino_loss")  # only some, because each process must compile them


def digests() -> dict[str, str]:
    result = {}
    jax.config.update("jax_enable_x64", True)
    for name in ("jax", "torch"):
        for loss in LOSSES:
            if name == "torch" or loss.title in IN_JAX:
                got = run(name, Case(loss, "", draw(loss, SIZES, 0)), "float32")
                bits = hashlib.sha256()
                for x in jax.tree.leaves((got.values, got.gradients, got.states)):
                    bits.update(np.ascontiguousarray(x).tobytes())
                result[f"{name} {loss.title}"] = bits.hexdigest()
    return result


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(digests()))
