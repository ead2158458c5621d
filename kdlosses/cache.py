"""A teacher's outputs on disk, by sample: a header, the rows, and the index. Rows beyond the index do not count.

A row holds the outputs of one sample or, if samples are sequences, of one token; then the index also has the number of
tokens of each sample. With several writers, each part is a folder of its own inside the folder of the cache.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from kdlosses import __version__
from kdlosses.files import replacing

try:
    import fcntl
except ImportError:  # Windows has no fcntl; two writers of one part are not noticed there
    fcntl = None  # type: ignore[assignment]

FORMAT, SEQUENCES = "1", "2"  # one row per sample, which every version reads, or one per token
_HEADER, _INDEX, _ROWS, _LOCK = "header.json", "index", "rows", "lock"
_PART = re.compile(r"part-(\d+)-of-(\d+)")
# the header of a writer that had no batch
_EMPTY: dict[str, Any] = {"format": FORMAT, "num_classes": None, "top_k": None, "temperatures": [], "fields": {}}
_BLOCK = 2**23  # bytes of a block of rows


class Cache:
    """The recorded outputs, memory-mapped; subclasses in `kdjax` and `kdtorch` return arrays of their frameworks."""

    _numpy: Callable[[Any], np.ndarray] = staticmethod(np.asarray)  # converts an array of the framework to NumPy
    _array: Callable[[np.ndarray], Any] = staticmethod(np.asarray)  # converts NumPy to an array of the framework

    def __init__(self, path: str | os.PathLike[str], num_classes: int | None) -> None:
        self.path = pathlib.Path(path)
        self._absolute = self.path.absolute()  # the working directory may have changed when it is opened again
        folders = _folders(self.path)
        headers = [_header(folder) for folder in folders]
        filled = [i for i, header in enumerate(headers) if header["fields"]] or [0]
        folders, headers = [folders[i] for i in filled], [headers[i] for i in filled]
        header = headers[0]
        for folder, other in zip(folders, headers, strict=True):
            if differ := _differing(other, header):
                raise ValueError(
                    f"{folder}: was recorded with {differ} {other[differ]}, and {folders[0].name} with {header[differ]}; "
                    "record all parts in the same way"
                )
        self.num_classes, self.top_k = header["num_classes"], header["top_k"]
        self.temperatures = tuple(header["temperatures"])
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"{path}: the teacher has {self.num_classes} classes, and the student, by `num_classes`, {num_classes}; "
                "record a teacher of the same classes, or, if one vocabulary is the other and unused classes behind it, "
                "open it without `num_classes`: classes that are not kept are in the rest"
            )
        self._row = _row(header)
        counted = [_counted(folder, header) for folder in folders]
        everything, lengths = (np.concatenate(x) for x in zip(*counted, strict=True))
        self._order = everything.argsort(kind="stable")
        self._sorted = everything[self._order]
        once = np.ones(len(everything), bool)  # False for a sample that an earlier part has too
        once[self._order[1:]] = np.diff(self._sorted) > 0
        self.index = everything[once]
        self.lengths = lengths[once] if header["format"] == SEQUENCES else None
        self._spans = (lengths, lengths.cumsum()) if header["format"] == SEQUENCES else None
        rows = [int(x.sum()) for _, x in counted]
        self._starts = np.cumsum([0, *rows])
        self._maps = [_mapped(folder, number, self._row) for folder, number in zip(folders, rows, strict=True)]

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle only the path, so that another process opens the cache instead of receiving a copy of its rows."""
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

    def _read(self, index: Any, temperature: float | None, where: Any) -> dict[str, Any]:
        """The recorded outputs of the samples, by name, with `rest` by its temperature."""
        self._check(temperature)
        index = _whole_numbers(self._numpy(index))
        places = self._found(index)
        if self._spans is None:
            if where is not None:
                raise ValueError(
                    f"{self.path}: `where` is for samples that are sequences, recorded with `lengths` or `where`, and "
                    "these are arrays of one shape; give the mask to the loss"
                )
            return self._outputs(self._rows_at(places), temperature)
        lengths = self._spans[0][places]
        kept = np.arange(lengths.max(initial=0)) < lengths[..., None] if where is None else self._numpy(where)
        self._check_mask(kept, index, lengths)
        rows = np.zeros((*kept.shape, self._row.itemsize), np.uint8)
        flat, masks = (x.reshape(index.size, *x.shape[index.ndim :]) for x in (rows, kept))
        for tokens, mask, place in zip(flat, masks, places.ravel().tolist(), strict=True):
            recorded = self._tokens_at(place)
            tokens[slice(len(recorded)) if where is None else mask] = recorded
        return {**self._outputs(rows, temperature), "where": self._array(kept)}

    def _tokens(self, sample: Any, temperature: float | None) -> dict[str, Any]:
        """The recorded outputs of one sample that is a sequence, by name."""
        self._check(temperature)
        sample = _whole_numbers(self._numpy(sample), "sample")
        if sample.ndim:
            raise ValueError(
                f"`sample` must be one whole number, got {sample.dtype}{list(sample.shape)}; `read` gives several"
            )
        place = self._found(sample)
        rows = self._rows_at(place) if self._spans is None else self._tokens_at(int(place))
        return self._outputs(rows, temperature)

    def _check(self, temperature: float | None) -> None:
        if temperature is not None and self.top_k and temperature not in self.temperatures:
            raise ValueError(
                f"{self.path}: the rest's logit was recorded for the temperatures {list(self.temperatures)}, got "
                f'`temperature` {temperature}; record it for that one, or leave the rest out by tail="renormalize"'
            )

    def _check_mask(self, kept: np.ndarray, index: np.ndarray, lengths: np.ndarray) -> None:
        if kept.dtype != bool or kept.shape[:-1] != index.shape or kept.ndim != index.ndim + 1:
            raise ValueError(
                f"`where` must be booleans, [batch, length], of the samples {list(index.shape)}, got "
                f"{kept.dtype}{list(kept.shape)}"
            )
        if (wrong := kept.sum(-1) != lengths).any():
            raise ValueError(
                f"{self.path}: `where` keeps {kept[wrong].sum(-1)[0]} tokens of sample {index[wrong][0]}, of which "
                f"{lengths[wrong][0]} were recorded; it must keep those that the teacher's mask kept"
            )

    def _found(self, index: np.ndarray) -> np.ndarray:
        places, held = self._places(index)
        if not held.all():
            raise IndexError(f"{self.path}: {_missing(index[~held], index.size)}")
        return places

    def _places(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(self):
            return np.zeros(index.shape, int), np.zeros(index.shape, bool)
        places = np.minimum(self._sorted.searchsorted(index), len(self._sorted) - 1)
        return self._order[places], self._sorted[places] == index

    def _rows_at(self, places: np.ndarray) -> np.ndarray:
        """The bytes of the rows at these places, `[..., bytes]`."""
        if len(self._maps) == 1:
            run = places.ndim == 1 and places.size and (np.diff(places) == 1).all()
            return self._maps[0][places[0] : places[-1] + 1] if run else np.take(self._maps[0], places, axis=0)
        rows = np.empty((*places.shape, self._row.itemsize), np.uint8)
        for start, part in zip(self._starts[:-1], self._maps, strict=True):
            here = (places >= start) & (places < start + len(part))
            rows[here] = part[places[here] - start]
        return rows

    def _tokens_at(self, place: int) -> np.ndarray:
        """The bytes of one sequence, `[length, bytes]`."""
        lengths, ends = self._spans  # type: ignore[misc]
        start, stop = int(ends[place] - lengths[place]), int(ends[place])
        part = min(int(self._starts.searchsorted(start, "right")), len(self._maps)) - 1
        return self._maps[part][start - self._starts[part] : stop - self._starts[part]]

    def _outputs(self, rows: np.ndarray, temperature: float | None) -> dict[str, Any]:
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


def _whole_numbers(index: np.ndarray, name: str = "index") -> np.ndarray:
    if index.size and index.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must be whole numbers, got {index.dtype}{list(index.shape)}")
    return index.astype(np.int64)


def _missing(samples: np.ndarray, asked: int) -> str:
    """The text of the error for requested samples that are not there."""
    few = list(dict.fromkeys(samples.tolist()))
    names = ", ".join(map(str, few[:5])) + (", ..." if len(few) > 5 else "")
    mend = "record them first; `holds` says which samples are there"
    if min(few) < 0:
        mend = "samples are numbered from 0, and a negative number does not count from the end"
    return f"{samples.size} of the {asked} samples asked for are not there: {names}; {mend}"


class _Settings(NamedTuple):
    top_k: int | None
    num_classes: int | None
    temperatures: tuple[float, ...]
    dtype: str


class _Batch(NamedTuple):
    """A batch that has been checked. Its arrays are in NumPy, except the logits, which are never copied as a whole."""

    samples: np.ndarray  # the index of each sample
    where: np.ndarray | None  # [batch, length], if samples are sequences
    logits: Any  # None if the batch has its own top k
    arrays: dict[str, np.ndarray]
    header: dict[str, Any]


def record(
    path: str | os.PathLike[str],
    batches: Iterable[Mapping[str, Any]],
    numpy: Callable[[Any], np.ndarray],
    largest: Callable[..., tuple[np.ndarray, ...]],
    top_k: int | None,
    num_classes: int | None,
    temperatures: Sequence[float],
    dtype: str,
    part: int | None,
    parts: int | None,
) -> pathlib.Path:
    """Append those samples of each batch that are not recorded yet, and return the folder.

    `numpy` converts the batches' arrays to NumPy. `largest(logits, places, top_k, temperatures)` returns the largest
    logits at some places, their classes, the logit of the rest for each temperature, and the largest logit.
    """
    if dtype not in ("float16", "float32"):
        raise ValueError(f'`dtype` must be "float16" or "float32", got {dtype!r}')
    if isinstance(temperatures, numbers.Real | str) or not len(temperatures):
        raise ValueError(
            f"`temperatures` must be a list of at least one number, as in [1.0, 4.0], got {temperatures!r}"
        )
    if bad := [x for x in temperatures if not (isinstance(x, numbers.Real) and 0 < x < np.inf)]:
        raise ValueError(f"`temperatures` must be finite and greater than 0, got {bad[0]}")
    settings = _Settings(top_k, num_classes, tuple(float(x) for x in temperatures), dtype)
    folder = _folder(pathlib.Path(path), part, parts)
    header: dict[str, Any] | None = None
    with contextlib.ExitStack() as held:
        for given in batches:
            batch = _checked(given, numpy, settings)
            if header is None:
                held.enter_context(_locked(folder))
                header = _started(folder, batch.header)
                index, lengths = _counted(folder, header)
                known, counts = set(index.tolist()), (len(index), int(lengths.sum()))
            if differ := _differing(batch.header, header):
                if differ == "format":
                    now, before = ("without", "with") if header["format"] == SEQUENCES else ("with", "without")
                    raise ValueError(
                        f"{path}: was recorded {before} `lengths` or `where`, and this batch is {now}; record to another path"
                    )
                raise ValueError(
                    f"{path}: was recorded with {differ} {header[differ]}, got {batch.header[differ]}; "
                    "record to another path"
                )
            fresh = np.array([x not in known and not known.add(x) for x in batch.samples.tolist()], bool)  # type: ignore[func-returns-value, type-var]
            if fresh.any():
                rows = _rows(batch, fresh, header, numpy, largest)
                lengths = np.ones(fresh.sum(), np.int64) if batch.where is None else batch.where[fresh].sum(-1)
                counts = _append(folder, header, counts, rows, batch.samples[fresh], lengths)
        if header is None and not (folder / _HEADER).exists():
            if parts is None:
                raise ValueError(f"{path}: nothing was recorded, for there was no batch")
            held.enter_context(_locked(folder))
            _started(folder, _EMPTY)
    return folder


def _checked(given: Mapping[str, Any], numpy: Callable[[Any], np.ndarray], settings: _Settings) -> _Batch:
    if not isinstance(given, Mapping):
        raise ValueError(f"a batch must be a mapping of `index`, `logits` and others, got {type(given).__name__}")
    ready = "logits" not in given and bool(given.keys() & {"values", "log_probs"})
    if missing := {"index", *([] if ready else ["logits"])} - given.keys():
        raise ValueError(
            f"a batch must have `index` and `logits`, got {sorted(given)}; {min(missing)} is missing; a teacher's top k "
            "goes by `values`, `indices` and `rest`, or by `log_probs` and `indices`"
        )
    logits: Any = given.get("logits")
    if not ready and not hasattr(logits, "shape"):
        logits = np.asarray(logits)
    arrays = {
        name: _rest(x, numpy, settings.temperatures) if ready and name == "rest" else numpy(x)
        for name, x in given.items()
        if name != "logits"
    }
    index = arrays.pop("index")
    if index.ndim != 1 or index.dtype.kind not in "iu" or (index < 0).any():
        raise ValueError(f"`index` must be whole numbers of at least 0, [batch], got {index.dtype}{list(index.shape)}")
    shapes = {name: tuple(x.shape) for name, x in arrays.items()} | ({} if ready else {"logits": tuple(logits.shape)})
    for name, shape in shapes.items():
        if shape[:1] != index.shape:
            raise ValueError(f"`{name}` must have a row for each of the {len(index)} of `index`, got {list(shape)}")
    main = next(name for name in ("logits", "log_probs", "values") if name in shapes)
    where = _mask(arrays, main, shapes[main])
    for name, x in arrays.items():
        if x.dtype.kind in "cOSUMm":
            raise ValueError(f"`{name}` must be numbers, not complex ones, got {x.dtype}{list(x.shape)}")
        if where is not None and x.shape[:2] != where.shape:
            raise ValueError(
                f"`{name}` must be [batch, length, ...], as `{main}` {list(shapes[main])}, where samples are sequences, "
                f"got {list(x.shape)}; repeat for each token what is one for a sample"
            )
    lead, made = 1 if where is None else 2, {}
    if ready:
        arrays = _ready(arrays, index, where, settings)
        classes, top_k = int(settings.num_classes or 0), arrays["values"].shape[-1]
    else:
        made = _none_of(logits, arrays, lead, numpy, settings)
        classes, top_k = shapes["logits"][-1], None if settings.top_k is None else int(settings.top_k)
    narrow = {"indices": np.min_scalar_type(classes - 1), "rest": np.dtype(np.float32)} if top_k is not None else {}
    fields = {}
    for name, x in (made | {name: arrays[name] for name in sorted(arrays, key=_place)}).items():
        wide = {"i": np.int64, "u": np.int64, "b": bool}  # the frameworks have integers of different width
        dtype = narrow.get(name, np.dtype(wide.get(x.dtype.kind, settings.dtype)))
        fields[name] = [dtype.str, list(x.shape[lead:])]
    header = {
        "format": FORMAT if where is None else SEQUENCES,
        "kdlosses": __version__,
        "num_classes": classes,
        "top_k": top_k,
        "temperatures": list(settings.temperatures) if top_k is not None else [],
        "fields": fields,
    }
    return _Batch(index, where, logits, arrays, header)


def _place(name: str) -> tuple[int, str]:
    """The sort key of a field, so that fields have the same order in all parts, with the top k first."""
    first = ("values", "indices", "rest")
    return (first.index(name) if name in first else len(first)), name


def _mask(arrays: dict[str, np.ndarray], main: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Which tokens are recorded, `[batch, length]`, from the batch's `lengths` or `where`; None if it has neither."""
    given = [name for name in ("lengths", "where") if name in arrays]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError("a batch must have `lengths` or `where`, got both; either says which tokens are recorded")
    if len(shape) < 3:
        raise ValueError(f"`{main}` must be [batch, length, ...] beside `{given[0]}`, got {list(shape)}")
    if "lengths" in given:
        lengths = arrays.pop("lengths")
        if lengths.dtype.kind not in "iu" or lengths.ndim != 1 or ((lengths < 0) | (lengths > shape[1])).any():
            raise ValueError(
                f"`lengths` must be whole numbers from 0 to {shape[1]}, [batch], as `{main}` {list(shape)}, got "
                f"{lengths.dtype}{list(lengths.shape)}{f' up to {lengths.max()}' if lengths.size else ''}"
            )
        return np.arange(shape[1]) < lengths[:, None]
    where = arrays.pop("where")
    if where.dtype != bool or where.shape != shape[:2]:
        raise ValueError(
            f"`where` must be booleans {list(shape[:2])}, as `{main}` {list(shape)}, got "
            f"{where.dtype}{list(where.shape)}; of a mask of 0 and 1 give `mask == 1`"
        )
    return where


def _none_of(
    logits: Any, arrays: dict[str, np.ndarray], lead: int, numpy: Callable[[Any], np.ndarray], settings: _Settings
) -> dict[str, np.ndarray]:
    """Check shape and dtype of the logits; returns arrays without samples, in the form of what is recorded."""
    shape, top_k = tuple(logits.shape), settings.top_k
    none = numpy(logits[:0])
    if none.dtype.kind in "cOSUMm":
        raise ValueError(f"`logits` must be numbers, not complex ones, got {none.dtype}{list(shape)}")
    classes = shape[-1] if len(shape) > lead else 0
    if classes < 2:
        raise ValueError(f"`logits` must be [batch, ..., classes] with at least 2 classes, got {list(shape)}")
    if settings.num_classes not in (None, classes):
        raise ValueError(
            f"`logits` must be of the {settings.num_classes} classes that `num_classes` says, got {list(shape)}"
        )
    if top_k is None:
        return {"logits": none}
    if not (hasattr(top_k, "__index__") and 1 <= top_k <= classes):
        raise ValueError(f"`top_k` must be from 1 to the number of classes, got {top_k} of logits {list(shape)}")
    if taken := arrays.keys() & {"values", "indices", "rest"}:
        raise ValueError(f"a batch must not name an array `{min(taken)}`, which `top_k` makes of the logits; rename it")
    values = np.empty((*none.shape[:-1], top_k), np.float32)
    return {"values": values, "indices": values, "rest": np.empty((*none.shape[:-1], len(settings.temperatures)))}


def _rest(x: Any, numpy: Callable[[Any], np.ndarray], temperatures: tuple[float, ...]) -> np.ndarray:
    """`[..., temperatures]`, from arrays by temperature or, if there is only one temperature, from an array."""
    if not isinstance(x, Mapping):
        if len(temperatures) > 1:
            raise ValueError(
                f"`rest` must have an array for each of the `temperatures` {list(temperatures)}, as in "
                f'{{"{temperatures[0]}": ...}}, got one array'
            )
        return numpy(x)[..., None]
    given = {float(name): numpy(y) for name, y in x.items()}
    if given.keys() != set(temperatures):
        raise ValueError(
            f"`rest` is for the temperatures {sorted(given)}, and `temperatures` are {list(temperatures)}; record with "
            f"temperatures={sorted(given)}"
        )
    if len({y.shape for y in given.values()}) > 1:
        raise ValueError(f"`rest` must have arrays of one shape, got {[list(y.shape) for y in given.values()]}")
    return np.stack([given[t] for t in temperatures], -1)


def _ready(
    arrays: dict[str, np.ndarray], index: np.ndarray, where: np.ndarray | None, settings: _Settings
) -> dict[str, np.ndarray]:
    """The arrays of a batch that has its own top k, with checked `values`, `indices` and `rest`."""
    name = "log_probs" if "log_probs" in arrays else "values"
    if name == "log_probs" and (more := arrays.keys() & {"values", "rest"}):
        raise ValueError(
            f"a batch must have `log_probs`, or `values` and `rest`, got `log_probs` and `{min(more)}`; the rest is computed "
            "from `log_probs`"
        )
    if "indices" not in arrays:
        raise ValueError(f"a batch must have `indices`, the classes of `{name}`, got {sorted(arrays)}")
    if name == "values" and "rest" not in arrays:
        raise ValueError(
            'a batch must have `rest` beside `values`: the logit of all other classes together, as in {"1.0": ...}; '
            "logarithms of probabilities, which tell it, go by `log_probs` instead of `values`"
        )
    classes = settings.num_classes
    if classes is None or not (hasattr(classes, "__index__") and classes >= 2):
        raise ValueError(
            f"`num_classes` must be the size of the teacher's vocabulary where a top k comes ready, got {classes}"
        )
    values, indices = arrays.pop(name), arrays.pop("indices")
    k = values.shape[-1] if values.ndim > 1 else 0
    if not 1 <= k <= classes:
        raise ValueError(
            f"`{name}` must be [batch, ..., kept] with 1 to {classes} classes kept, as many as `num_classes` says, got "
            f"{list(values.shape)}"
        )
    if settings.top_k not in (None, k):
        raise ValueError(
            f"`top_k` must be the {k} that `{name}` {list(values.shape)} keeps, or absent, got {settings.top_k}"
        )
    kept = arrays.get("kept", np.ones((), bool))
    for other, x, kinds, shape in (
        (name, values, "fV", values.shape),  # V: bfloat16
        ("indices", indices, "iu", values.shape),
        ("kept", kept, "b", kept.shape and values.shape),
        ("rest", arrays.get("rest", values), "fV", values.shape[:-1]),
    ):
        got = x.shape[:-1] if other == "rest" else x.shape
        if got != shape or x.dtype.kind not in kinds:
            kind = {"fV": "floating-point numbers", "iu": "whole numbers", "b": "booleans"}[kinds]
            raise ValueError(
                f"`{other}` must be {kind} {list(shape)}, as `{name}` {list(values.shape)}, got {x.dtype}{list(got)}"
            )
    recorded = np.ones(values.shape[:-1], bool)
    if where is not None:
        recorded &= where.reshape(where.shape + (1,) * (recorded.ndim - 2))
    real = recorded[..., None] & kept
    values, indices = np.where(real, values.astype(np.float64), 0), np.where(real, indices, 0)
    if at := _first(~(values < np.inf)):
        raise ValueError(f"`{name}` must be numbers or -inf, got {values[at]} for sample {index[at[0]]}")
    if at := _first((indices < 0) | (indices >= classes)):
        raise ValueError(
            f"`indices` must be from 0 to {classes - 1}, the classes that `num_classes` says, got {indices[at]} for sample "
            f"{index[at[0]]}; is the top k from another vocabulary?"
        )
    places = np.sort(np.where(real, indices, -1 - np.arange(k)), -1)
    if at := _first(np.diff(places) == 0):
        raise ValueError(
            f"`indices` must be different classes, got {places[at]} twice for sample {index[at[0]]}; leave one out, or mark "
            "it as padding by `kept`"
        )
    if name == "log_probs":
        if settings.temperatures != (1.0,):
            raise ValueError(
                "`log_probs` tell the rest's logit at temperature 1 alone, got `temperatures` "
                f"{list(settings.temperatures)}; record with temperatures=[1.0] and train at 1, or at any temperature with "
                'tail="renormalize"'
            )
        total = np.where(real, np.exp(np.minimum(values, 1)), 0).sum(-1)
        if at := _first(total > 1.01):
            raise ValueError(
                f"`log_probs` must be logarithms of probabilities, which sum to at most 1, got a sum of {total[at]:.3g} for "
                f"sample {index[at[0]]}; logits go by `values` and `rest`"
            )
        least = 0 if k == classes else 2.0**-24  # 1 - total is not accurate below the rounding of float32
        with np.errstate(divide="ignore"):
            rest = np.log(np.maximum(1 - total, least))[..., None]
    else:
        rest = np.where(recorded[..., None], arrays.pop("rest").astype(np.float64), 0)
        if at := _first(~(rest < np.inf)):
            raise ValueError(f"`rest` must be numbers or -inf, got {rest[at]} for sample {index[at[0]]}")
    return {"values": values, "indices": indices, "rest": rest, **arrays}


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    """The position of the first True, or ()."""
    return tuple(np.argwhere(wrong)[0].tolist()) if wrong.any() else ()


def _rows(
    batch: _Batch,
    fresh: np.ndarray,
    header: Mapping[str, Any],
    numpy: Callable[[Any], np.ndarray],
    largest: Callable[..., tuple[np.ndarray, ...]],
) -> Iterator[np.ndarray]:
    """The rows of a batch's new samples, as they are written, one block at a time."""
    row, logits = _row(header), batch.logits
    places = np.nonzero(fresh if batch.where is None else batch.where & fresh[:, None])
    number, samples, made = len(places[0]), batch.samples[places[0]], {}
    if logits is not None and header["top_k"] is not None and number:
        lead = tuple(logits.shape[:-1])
        tokens = np.unravel_index(np.arange(math.prod(lead)).reshape(lead)[places].ravel(), lead)
        *found, peak = largest(logits, tokens, header["top_k"], tuple(header["temperatures"]))
        _check_finite(peak.reshape(number, -1), samples)
        made = {
            name: x.reshape(number, *row[name].shape)
            for name, x in zip(("values", "indices", "rest"), found, strict=True)
        }
    size = max(1, _BLOCK // row.itemsize)
    for start in range(0, number, size):
        at = tuple(x[start : start + size] for x in places)
        block = np.empty(len(at[0]), row)
        for name in row.names or ():
            if name in made:
                x = made[name][start : start + size]
            elif name == "logits" and logits is not None:
                x = numpy(logits[at])
                _check_finite(x.max(-1), samples[start : start + size])
            else:
                x = batch.arrays[name][at]
            block[name] = _cast(name, x, row[name].base)
        yield block


def largest_logits(
    logits: Any,
    places: tuple[np.ndarray, ...],
    top_k: int,
    temperatures: tuple[float, ...],
    numpy: Callable[[Any], np.ndarray],
) -> tuple[np.ndarray, ...]:
    """The largest logits at some places, sorted, their classes, T log sum exp(t / T) of the rest, and the maximum.

    They are computed in blocks that fit into the processor's cache. `numpy` converts a block to NumPy.
    """
    number, classes = len(places[0]), logits.shape[-1]
    values = np.empty((number, top_k), np.float32)
    indices = np.empty((number, top_k), np.int64)
    rest = np.empty((number, len(temperatures)), np.float32)
    largest = np.full(number, -np.inf, np.float32)
    sought = min(top_k + 1, classes)  # also the next one, which is the largest of the rest
    height = math.isqrt(classes // sought)
    width = classes // height
    size = max(1, 2**16 // classes)
    buffers = np.empty((2, min(size, number), classes), np.float32)
    for start in range(0, number, size):
        here, at = slice(start, start + size), tuple(x[start : start + size] for x in places)
        # for a single place a view instead of a copy
        block = logits[at] if size > 1 else logits[tuple(int(x[0]) for x in at)][None]
        x = numpy(block).astype(np.float32, copy=False)
        below, spare = buffers[:, : len(x)]
        # The logits of an example are arranged in a table, whose heads are the maxima of the columns. The `sought`
        # largest logits are all at least as large as the sought-largest head, and few others are.
        heads = x[:, : height * width].reshape(-1, height, width).max(1)
        largest[here] = np.maximum(heads.max(1), x[:, height * width - 1 :].max(1))
        if not (largest[here] < np.inf).all():
            break  # the caller raises an error
        enough = np.partition(heads, width - sought)[:, width - sought]
        picked = np.flatnonzero(x >= enough[:, None])
        if len(picked) > 8 * sought * len(x):  # many are equal, such as classes at -inf
            some = np.argpartition(x, classes - sought)[:, classes - sought :]
            picked = (some + classes * np.arange(len(x))[:, None]).ravel()
        rows = picked // classes
        order = np.lexsort((-x.ravel()[picked], rows))
        picked = picked[order[np.searchsorted(rows, np.arange(len(x)))[:, None] + np.arange(sought)]]
        found, kept = x.ravel()[picked], picked[:, :top_k]
        values[here], indices[here] = found[:, :top_k], kept % classes
        peak = found[:, top_k:] if sought > top_k else np.full((len(x), 1), -np.inf, np.float32)
        np.subtract(x, np.where(np.isneginf(peak), 0, peak), out=below)
        below.ravel()[kept] = -np.inf
        for i, t in enumerate(temperatures):
            scaled = below if i == len(temperatures) - 1 else spare  # the last temperature works in place
            np.exp2(np.multiply(below, np.float32(math.log2(math.e) / t), out=scaled), out=scaled)
            sums = scaled[:, : height * width].reshape(-1, height, width).sum(1)  # faster than along the rows
            with np.errstate(divide="ignore"):
                rest[here, i] = peak[:, 0] + t * np.log(sums.sum(1) + scaled[:, height * width :].sum(1))
    return values, indices, rest, largest


def _check_finite(largest: np.ndarray, samples: np.ndarray) -> None:
    """Raise an error for NaN or inf, which appear as the largest logit."""
    if at := _first(~(largest.astype(np.float64) < np.inf)):
        raise ValueError(
            f"`logits` must be numbers or -inf, got NaN or inf for sample {samples[at[0]]}; is the teacher in eval mode?"
        )


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    if dtype.kind == "f" and np.isinf(cast).sum() != np.isinf(x).sum():
        mend = '; use dtype="float32"' if dtype == np.float16 else ""
        raise ValueError(f"`{name}` has numbers beyond {dtype}, the largest {np.abs(x[np.isfinite(x)]).max()}{mend}")
    return cast


def _row(header: Mapping[str, Any]) -> np.dtype:
    return np.dtype([(name, dtype, tuple(shape)) for name, (dtype, shape) in header["fields"].items()])


def _differing(new: Mapping[str, Any], old: Mapping[str, Any]) -> str | None:
    """The name of the first header entry in which two recordings differ."""
    return next((name for name in new if name != "kdlosses" and new[name] != old[name]), None)


def _parts(path: pathlib.Path) -> dict[tuple[int, int], pathlib.Path]:
    """The folders of several writers, by (part, parts)."""
    found = {x: _PART.fullmatch(x.name) for x in path.iterdir()} if path.is_dir() else {}
    return {(int(match[1]), int(match[2])): folder for folder, match in found.items() if match}


def _folder(path: pathlib.Path, part: int | None, parts: int | None) -> pathlib.Path:
    """The folder of a writer."""
    others = {count for _, count in _parts(path)}
    if part is None and parts is None:
        if others:
            raise ValueError(
                f"{path}: has the parts of {min(others)} writers; give part=rank, parts={min(others)}, or record to another path"
            )
        return path
    if not (hasattr(part, "__index__") and hasattr(parts, "__index__") and 0 <= part < parts):  # type: ignore[operator]
        raise ValueError(
            f"`part` must be from 0 to `parts` - 1, as in part=rank, parts=world_size, got part={part}, parts={parts}"
        )
    if (path / _HEADER).exists():
        raise ValueError(f"{path}: was recorded by one writer, without `part`; record the parts to another path")
    if others - {parts}:
        raise ValueError(
            f"{path}: has the parts of {min(others - {parts})} writers, got parts={parts}; record to another path"
        )
    return path / f"part-{part}-of-{parts}"


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders of all parts, or that of a single writer."""
    parts = _parts(path)
    if not parts or (path / _HEADER).exists():
        return [path]
    counts = sorted({count for _, count in parts})
    if len(counts) > 1:
        raise ValueError(
            f"{path}: has parts of {counts[0]} writers and of {counts[1]}; open one of them by its own path, or move "
            "those of one recording to a folder of their own"
        )
    wanted = [path / f"part-{part}-of-{counts[0]}" for part in range(counts[0])]
    if missing := [folder.name for folder in wanted if not (folder / _HEADER).exists()]:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{path}: {len(missing)} of the {len(wanted)} parts are missing: {names}; copy them there, or record them, as in "
            f"part={missing[0].split('-')[1]}, parts={len(wanted)}"
        )
    return wanted


def _header(folder: pathlib.Path) -> dict[str, Any]:
    if not (folder / _HEADER).exists():
        if (folder / _ROWS).exists():
            raise ValueError(
                f"{folder}: its {_HEADER} is missing, without which its rows cannot be read; copy it there"
            )
        raise ValueError(f"{folder}: no teacher was recorded there")
    try:
        header = json.loads((folder / _HEADER).read_text())
        if header["format"] not in (FORMAT, SEQUENCES):
            raise ValueError(
                f"{folder}: of format {header['format']}, and this version reads formats {FORMAT} and {SEQUENCES}"
            )
        _row(header)
        header["num_classes"], header["top_k"], header["temperatures"]
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{folder}: a folder of another kind, or altered: its {_HEADER} cannot be read") from None
    return header


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Create the folder if necessary, and lock it for one writer; the lock ends with the process, even a killed one."""
    strange = [x.name for x in folder.iterdir() if x.name != _LOCK and x.suffix != ".tmp"] if folder.exists() else []
    if strange and not (folder / _HEADER).exists():
        raise ValueError(f"{folder}: a folder of another kind; record to an empty one")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "ab") as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{folder}: another writer is recording there; wait until it ends, or give each writer its own part, as in "
                    "part=rank, parts=world_size"
                ) from None
        yield


def _started(folder: pathlib.Path, new: dict[str, Any]) -> dict[str, Any]:
    """Write the header if there is none, and return it; files of a killed writer are cut to what both of them hold."""
    if not (folder / _HEADER).exists() or not _header(folder)["fields"]:
        with replacing(folder / _HEADER) as file:
            file.write(json.dumps(new, indent=1).encode())
    header = _header(folder)
    index, lengths = _counted(folder, header)
    for name in (_ROWS, _INDEX):
        (folder / name).touch()
    _cut(folder, header, (len(index), int(lengths.sum())))
    return header


def _counted(folder: pathlib.Path, header: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The samples that count, and how many rows each has. Rows are written before their index entry."""
    sizes = {name: (folder / name).stat().st_size for name in (_INDEX, _ROWS) if (folder / name).exists()}
    if len(sizes) == 1 and any(sizes.values()):
        (there,), (gone,) = sizes, {_INDEX, _ROWS} - sizes.keys()
        raise ValueError(
            f"{folder}: the file `{gone}` is missing, without which `{there}` cannot be read; copy it there, or record to "
            "another path"
        )
    entries = np.fromfile(folder / _INDEX, np.int64) if sizes else np.empty(0, np.int64)
    number = sizes[_ROWS] // max(1, _row(header).itemsize) if sizes else 0
    if header["format"] == FORMAT:
        return entries[:number], np.ones(min(number, len(entries)), np.int64)
    entries = entries[: len(entries) // 2 * 2].reshape(-1, 2)
    entries = entries[: entries[:, 1].cumsum().searchsorted(number, "right")]
    return entries[:, 0].copy(), entries[:, 1].copy()


def _mapped(folder: pathlib.Path, number: int, row: np.dtype) -> np.ndarray:
    shape = (number, row.itemsize)
    return np.memmap(folder / _ROWS, np.uint8, "r", shape=shape) if number else np.empty(shape, np.uint8)


def _cut(folder: pathlib.Path, header: Mapping[str, Any], counts: tuple[int, int]) -> None:
    samples, rows = counts
    os.truncate(folder / _ROWS, rows * _row(header).itemsize)
    os.truncate(folder / _INDEX, samples * (8 if header["format"] == FORMAT else 16))


def _append(
    folder: pathlib.Path,
    header: Mapping[str, Any],
    counts: tuple[int, int],
    rows: Iterable[np.ndarray],
    index: np.ndarray,
    lengths: np.ndarray,
) -> tuple[int, int]:
    """Append rows and then their index after the numbers of samples and rows in `counts`; returns the new numbers."""
    entries = index.astype(np.int64)
    if header["format"] == SEQUENCES:
        entries = np.stack([entries, lengths.astype(np.int64)], -1)
    try:
        for name, blocks in ((_ROWS, rows), (_INDEX, [entries])):
            with open(folder / name, "ab", buffering=0) as file:
                for block in blocks:
                    _write(file, block.view(np.uint8).ravel().data)
                os.fsync(file.fileno())
    except BaseException as error:
        _cut(folder, header, counts)
        if not isinstance(error, OSError):
            raise
        message = f"{error.strerror}; the {counts[0]} samples recorded before are kept, go on when there is room"
        raise OSError(error.errno, message, str(folder)) from error
    return counts[0] + len(index), counts[1] + int(lengths.sum())


def _write(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]
