"""A teacher's outputs on disk, by sample: a header, the rows, and the index, whose length says how many rows count."""

from __future__ import annotations

import json
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kdlosses import __version__
from kdlosses.files import replacing

FORMAT = "1"
_HEADER, _INDEX, _ROWS = "header.json", "index", "rows"


class Cache:
    """The outputs that were recorded, memory-mapped; `kdjax.teacher_cache` and `kdtorch.teacher_cache` give arrays."""

    _numpy: Callable[[Any], np.ndarray] = staticmethod(np.asarray)  # from an array of the framework
    _array: Callable[[np.ndarray], Any] = staticmethod(np.asarray)  # to one

    def __init__(self, path: str | os.PathLike[str], num_classes: int | None) -> None:
        self.path = pathlib.Path(path)
        self._absolute = self.path.absolute()  # the working directory may be another when it is opened again
        header = _header(self.path)
        self.num_classes, self.top_k = header["num_classes"], header["top_k"]
        self.temperatures = tuple(header["temperatures"])
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"{path}: the teacher has {self.num_classes} classes, and the student, by `num_classes`, {num_classes}; "
                "record a teacher of the same classes"
            )
        self._row = _row(header)
        number = _number(self.path, self._row)
        self.index = np.fromfile(self.path / _INDEX, np.int64, number)
        shape = (number, self._row.itemsize)
        rows = np.memmap(self.path / _ROWS, np.uint8, "r", shape=shape) if number else np.empty(shape, np.uint8)
        self._rows: np.ndarray = rows
        self._order = self.index.argsort(kind="stable")
        self._sorted = self.index[self._order]

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        """The path alone, so that a process that is given the cache opens it instead of getting a copy of its rows."""
        return type(self), (str(self._absolute),)

    def holds(self, index: Any) -> np.ndarray:
        """Whether each sample has been recorded.

        Args:
            index: the samples, of any shape.

        Returns:
            Booleans of that shape.

        Raises:
            ValueError: samples that are no whole numbers.
        """
        return self._places(_whole_numbers(self._numpy(index)))[1]

    def _read(self, index: Any, temperature: float | None) -> dict[str, Any]:
        """What was recorded of the samples, by name, and the rest by its temperature."""
        if temperature is not None and self.top_k and temperature not in self.temperatures:
            raise ValueError(
                f"{self.path}: the rest's logit was recorded for the temperatures {list(self.temperatures)}, got "
                f'`temperature` {temperature}; record it for that one, or leave the rest out by tail="renormalize"'
            )
        index = _whole_numbers(self._numpy(index))
        places, held = self._places(index)
        if not held.all():
            raise IndexError(f"{self.path}: {_missing(index[~held], index.size)}")
        run = places.ndim == 1 and places.size and (np.diff(places) == 1).all()
        rows = self._rows[places[0] : places[-1] + 1] if run else np.take(self._rows, places, axis=0)
        fields = {name: rows.view(self._row)[..., 0][name] for name in self._row.names or ()}
        rest = fields.pop("rest") if self.top_k else None
        narrow = {"indices": np.dtype(np.int32)} if self.top_k else {}
        outputs = {name: self._array(x.astype(narrow.get(name, x.dtype), order="C")) for name, x in fields.items()}
        if rest is not None and temperature is not None:
            place = self.temperatures.index(temperature)
            outputs["rest"] = {
                str(self.temperatures[place]): self._array(rest[..., place].astype(rest.dtype, order="C"))
            }
        return outputs

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self):
            return np.zeros(index.shape, int), np.zeros(index.shape, bool)
        places = np.minimum(self._sorted.searchsorted(index), len(self) - 1)
        return self._order[places], self._sorted[places] == index


def _whole_numbers(index: np.ndarray) -> np.ndarray:
    if index.size and index.dtype.kind not in "iu":
        raise ValueError(f"`index` must be whole numbers, got {index.dtype}{list(index.shape)}")
    return index.astype(np.int64)


def _missing(samples: np.ndarray, asked: int) -> str:
    """What to say of samples that were asked for and are not there."""
    few = list(dict.fromkeys(samples.tolist()))
    names = ", ".join(map(str, few[:5])) + (", ..." if len(few) > 5 else "")
    mend = "record them first; `holds` says which samples are there"
    if min(few) < 0:
        mend = "samples are numbered from 0, and a negative number does not count from the end"
    return f"{samples.size} of the {asked} samples asked for are not there: {names}; {mend}"


def record(
    path: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    numpy: Callable[[Any], np.ndarray],
    top_k: int | None,
    temperatures: Sequence[float],
    dtype: str,
) -> None:
    """Append what is not yet there of each batch; `numpy` makes arrays of what the batches hold."""
    if dtype not in ("float16", "float32"):
        raise ValueError(f'`dtype` must be "float16" or "float32", got {dtype!r}')
    if isinstance(temperatures, numbers.Real | str) or not len(temperatures):
        raise ValueError(
            f"`temperatures` must be a list of at least one number, as in [1.0, 4.0], got {temperatures!r}"
        )
    if bad := [x for x in temperatures if not (isinstance(x, numbers.Real) and 0 < x < np.inf)]:
        raise ValueError(f"`temperatures` must be finite and greater than 0, got {bad[0]}")
    folder, header, known = pathlib.Path(path), None, set()
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch must be a mapping of `index`, `logits` and others, got {type(batch).__name__}")
        index, outputs = _checked({name: numpy(x) for name, x in batch.items()}, top_k)
        rows, new = _rows_of(outputs, top_k, temperatures, dtype)
        if header is None:
            header = _started(folder, new)
            known = set(np.fromfile(folder / _INDEX, np.int64).tolist())
        if differ := [name for name in new if name != "kdlosses" and new[name] != header[name]]:
            name = differ[0]
            raise ValueError(
                f"{path}: was recorded with {name} {header[name]}, got {new[name]}; record to another path"
            )
        fresh = [i for i, sample in enumerate(index.tolist()) if sample not in known and not known.add(sample)]  # type: ignore[func-returns-value]
        if fresh:
            _append(folder, rows[fresh], index[fresh])
    if header is None and not (folder / _HEADER).exists():
        raise ValueError(f"{path}: nothing was recorded, for there was no batch")


def _checked(batch: dict[str, np.ndarray], top_k: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if missing := {"index", "logits"} - batch.keys():
        raise ValueError(f"a batch must have `index` and `logits`, got {sorted(batch)}; {min(missing)} is missing")
    if top_k is not None and (taken := batch.keys() & {"values", "indices", "rest"}):
        raise ValueError(f"a batch must not name an array `{min(taken)}`, which `top_k` makes of the logits; rename it")
    index = batch.pop("index")
    if index.ndim != 1 or index.dtype.kind not in "iu" or (index < 0).any():
        raise ValueError(f"`index` must be whole numbers of at least 0, [batch], got {index.dtype}{list(index.shape)}")
    for name, x in batch.items():
        if x.shape[:1] != index.shape:
            raise ValueError(f"`{name}` must have a row for each of the {len(index)} of `index`, got {list(x.shape)}")
        if x.dtype.kind in "cOSUMm":
            raise ValueError(f"`{name}` must be numbers, not complex ones, got {x.dtype}{list(x.shape)}")
    logits = batch["logits"]
    wrong = np.isnan(logits.astype(np.float32)) | np.isposinf(logits.astype(np.float32))
    if wrong.any():
        sample = index[np.argwhere(wrong)[0][0]]
        raise ValueError(
            f"`logits` must be numbers or -inf, got NaN or inf for sample {sample}; is the teacher in eval mode?"
        )
    classes = logits.shape[-1] if logits.ndim > 1 else 0
    if classes < 2:
        raise ValueError(f"`logits` must be [batch, ..., classes] with at least 2 classes, got {list(logits.shape)}")
    if top_k is not None and not (hasattr(top_k, "__index__") and 1 <= top_k <= classes):
        raise ValueError(f"`top_k` must be from 1 to the number of classes, got {top_k} of logits {list(logits.shape)}")
    return index, batch


def _rows_of(
    outputs: dict[str, np.ndarray], top_k: int | None, temperatures: Sequence[float], dtype: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows as they are written, and the header that says what is in them."""
    logits = outputs["logits"]
    fields = dict(outputs)
    if top_k is not None:
        del fields["logits"]
        fields = {**largest_logits(logits, top_k, temperatures), **fields}
    for name, x in fields.items():
        if name in ("indices", "rest"):
            continue
        if x.dtype.kind in "iu":
            fields[name] = x.astype(np.int64)  # the frameworks differ in the width they give them
        elif x.dtype.kind != "b":
            with np.errstate(over="ignore"):
                fields[name] = x.astype(dtype)
            if (np.isinf(fields[name]) & np.isfinite(x.astype(np.float64))).any():
                raise ValueError(
                    f'`{name}` has numbers beyond float16, the largest {np.abs(x).max()}; use dtype="float32"'
                )
    header = {
        "format": FORMAT,
        "kdlosses": __version__,
        "num_classes": logits.shape[-1],
        "top_k": top_k,
        "temperatures": [float(x) for x in temperatures] if top_k is not None else [],
        "fields": {name: [x.dtype.str, list(x.shape[1:])] for name, x in fields.items()},
    }
    rows = np.empty(len(logits), _row(header))
    for name, x in fields.items():
        rows[name] = x
    return rows, header


def largest_logits(logits: np.ndarray, top_k: int, temperatures: Sequence[float]) -> dict[str, np.ndarray]:
    """The largest logits and their classes, from the largest on, and T log sum exp(t / T) of the others for each T."""
    wide = logits.astype(np.promote_types(np.float32, logits.dtype) if logits.dtype.itemsize >= 4 else np.float32)
    indices = np.argpartition(-wide, top_k - 1, axis=-1)[..., :top_k]
    order = np.argsort(-np.take_along_axis(wide, indices, -1), axis=-1, kind="stable")
    indices = np.take_along_axis(indices, order, -1)
    values = np.take_along_axis(wide, indices, -1)
    np.put_along_axis(wide, indices, -np.inf, -1)
    largest = wide.max(-1, keepdims=True)
    gap = wide - np.where(np.isneginf(largest), 0, largest)
    with np.errstate(divide="ignore"):
        rest = [largest[..., 0] + t * np.log(np.exp(gap / t).sum(-1)) for t in temperatures]
    smallest = np.min_scalar_type(logits.shape[-1] - 1)
    return {"values": values, "indices": indices.astype(smallest), "rest": np.stack(rest, -1).astype(np.float32)}


def _row(header: Mapping[str, Any]) -> np.dtype:
    return np.dtype([(name, dtype, tuple(shape)) for name, (dtype, shape) in header["fields"].items()])


def _header(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / _HEADER).exists():
        raise ValueError(f"{folder}: no teacher was recorded there")
    try:
        header = json.loads((folder / _HEADER).read_text())
        if header["format"] != FORMAT:
            raise ValueError(f"{folder}: of format {header['format']}, and this version reads format {FORMAT}")
        _row(header)
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder}: a folder of another kind, or altered: its {_HEADER} cannot be read") from None
    return header


def _started(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
    """The header, written first of all; files that a killed writer left are cut to what both of them hold."""
    if folder.exists() and not (folder / _HEADER).exists() and any(x.suffix != ".tmp" for x in folder.iterdir()):
        raise ValueError(f"{folder}: a folder of another kind; record to an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / _HEADER).exists():
        with replacing(folder / _HEADER) as file:
            file.write(json.dumps(new, indent=1).encode())
    header = _header(folder)
    row = _row(header)
    for name in (_ROWS, _INDEX):
        (folder / name).touch()
    _cut(folder, row, _number(folder, row))
    return header


def _number(folder: pathlib.Path, row: np.dtype) -> int:
    """How many samples count: their rows are written before their index."""
    sizes = ((_INDEX, 8), (_ROWS, row.itemsize))
    return min((folder / name).stat().st_size // size if (folder / name).exists() else 0 for name, size in sizes)


def _cut(folder: pathlib.Path, row: np.dtype, number: int) -> None:
    os.truncate(folder / _ROWS, number * row.itemsize)
    os.truncate(folder / _INDEX, number * 8)


def _append(folder: pathlib.Path, rows: np.ndarray, index: np.ndarray) -> None:
    before = _number(folder, rows.dtype)
    try:
        for name, x in ((_ROWS, rows), (_INDEX, index.astype(np.int64))):
            with open(folder / name, "ab", buffering=0) as file:
                _write(file, x.tobytes())
                os.fsync(file.fileno())
    except OSError as error:
        _cut(folder, rows.dtype, before)
        message = f"{error.strerror}; the {before} samples recorded before are kept, go on when there is room"
        raise OSError(error.errno, message, str(folder)) from error


def _write(file: Any, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
