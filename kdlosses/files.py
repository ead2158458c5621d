"""The file format of both packages: safetensors, with the structure of the tree and a checksum in its header."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from kdlosses import __version__
from kdlosses.trees import Packed, numpy_dtype

FORMAT = "1"
_ARRAY = "kdlosses.array"
_START = b'{"__metadata__":{'
_DIGEST = b'"sha256":"%s"'
_BLANK = _DIGEST % (b"0" * 64)


def write(path: str | os.PathLike[str], packed: Packed) -> None:
    """Save a packed tree; if anything goes wrong, no file is written or changed."""
    arrays: dict[str, np.ndarray] = {}
    tree = _without_arrays(packed, "", arrays)
    metadata = {
        "kdlosses": __version__,
        "format": FORMAT,
        "holds": ", ".join(sorted(set(_names(packed)))),
        "tree": json.dumps(tree),
        "sha256": "0" * 64,
    }
    blob = safetensors.numpy.save(arrays, metadata)
    digest = hashlib.sha256(blob).hexdigest().encode()
    with replacing(path) as file:
        file.write(blob.replace(_BLANK, _DIGEST % digest, 1))


def read(path: str | os.PathLike[str]) -> Packed:
    """The packed tree of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is of another kind, truncated or altered.
    """
    blob = pathlib.Path(path).read_bytes()
    metadata = _checked(path, blob)
    arrays = {name: x["data"] for name, x in safetensors.deserialize(blob)}
    return _with_arrays(json.loads(metadata["tree"]), arrays)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file next to the path, which replaces it once it is completely written to disk."""
    path = pathlib.Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def _checked(path: str | os.PathLike[str], blob: bytes) -> dict[str, str]:
    """The metadata of a file, after checking that it is complete and unchanged."""
    start = blob[8 : 8 + len(_START)]
    if not _START.startswith(start):
        raise ValueError(f"{path}: a file of another kind: expected one that kdjax or kdtorch saved")
    header_size = int.from_bytes(blob[:8], "little")
    header = blob[8 : 8 + header_size]
    if len(start) < len(_START) or len(header) < header_size:
        raise ValueError(f"{path}: truncated: it ends within its header, after {len(blob)} bytes; save it again")
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__")
        size = 8 + header_size + max((x["data_offsets"][1] for x in entries.values()), default=0)
        digest = metadata.get("sha256", "")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path}: altered: its header cannot be read; save it again") from None
    if not metadata.keys() & {"kdlosses", "sha256", "tree"}:  # one of them may have been altered
        raise ValueError(f"{path}: a file of another kind: safetensors, but not saved by kdjax or kdtorch")
    if len(blob) < size:
        raise ValueError(f"{path}: truncated: expected {size} bytes, got {len(blob)}; save it again")
    if hashlib.sha256(blob.replace(_DIGEST % digest.encode(), _BLANK, 1)).hexdigest() != digest:
        raise ValueError(f"{path}: altered: its content does not match the checksum in its header; save it again")
    if metadata["format"] != FORMAT:
        raise ValueError(
            f"{path}: of format {metadata['format']}, written by kdlosses {metadata['kdlosses']}; this version reads "
            f"format {FORMAT}"
        )
    return metadata


def _without_arrays(node: Packed, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The node for JSON; its arrays are moved to `arrays`, by their path."""
    if isinstance(node, np.ndarray):
        name = path or "value"
        while name in arrays:
            name += "'"
        arrays[name] = np.ascontiguousarray(node).reshape(node.shape)
        return {_ARRAY: name, "dtype": node.dtype.name, "shape": node.shape}
    if isinstance(node, list):
        return [_without_arrays(x, f"{path}.{i}" if path else str(i), arrays) for i, x in enumerate(node)]
    if not isinstance(node, dict):
        return node
    hidden = ("dict", "list", "tuple", "fields", "weights")  # these are not part of a path
    return {
        key: _without_arrays(x, path if key in hidden else f"{path}.{key}" if path else key, arrays)
        for key, x in node.items()
    }


def _with_arrays(node: Any, arrays: dict[str, bytes]) -> Packed:
    if isinstance(node, list):
        return [_with_arrays(x, arrays) for x in node]
    if not isinstance(node, dict):
        return node
    if _ARRAY in node:
        return np.frombuffer(arrays[node[_ARRAY]], numpy_dtype(node["dtype"])).reshape(node["shape"])
    return {key: _with_arrays(x, arrays) for key, x in node.items()}


def _names(node: Packed) -> Iterator[str]:
    """The names of the states, losses and modules in a packed tree."""
    if isinstance(node, dict):
        for key in ("state", "module", "function"):
            if isinstance(node.get(key), str):
                yield node[key].partition(":")[2]
        for x in node.values():
            yield from _names(x)
    elif isinstance(node, list):
        for x in node:
            yield from _names(x)
