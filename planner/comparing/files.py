"""Write comparisons as JSON or CSV, completely or not at all, and read the JSON.

A JSON file holds what the dataclasses hold, field for field, with ``null`` for a time
that was not taken. When it is read, every value is checked against its field's type, so
that the error for a damaged file names the place.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from solvers.scopes import BoundScope, code_of

from ..base.atomic_write import write_whole
from ..comparison_record import ComparisonRecord
from .older_rows import with_outcome
from .views import records

FORMAT = "remat-comparison"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 2**28
MAX_INTEGER = 2**63 - 1

_ADDED = (
    "gap",
    "time_limit_s",
    "workers",
    "dtype",
    "autocast",
    "optimizer",
    "measured_on",
    "num_threads",
    "repeats",
    "least_solve_s",
    "compiled",
)
"""Fields that early files of version 1 lack."""

_T = TypeVar("_T")


class ComparisonFileError(ValueError):
    """A file is not a comparison that this version can read."""


def save_comparison(comparison: ComparisonRecord, path: Path) -> None:
    """See :meth:`Comparison.save`."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        write_whole(path, to_json(comparison))
    elif suffix == ".csv":
        write_whole(path, to_csv(comparison))
    else:
        raise ValueError(f"a comparison is written as .json or .csv, got {path.name!r}")


def load_comparison(path: Path) -> ComparisonRecord:
    """See :meth:`Comparison.load`."""
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT, "no such comparison (comparison.save(path) writes one)", str(path)
        )
    if path.suffix.lower() == ".csv":
        raise ComparisonFileError(
            f"{path} holds a comparison's records only, which read_csv of pandas reads; what can "
            f"be loaded is written by {_again(path)}"
        )
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ComparisonFileError(f"{path} has {size} bytes; one has at most {MAX_FILE_BYTES}")
    try:
        data = json.loads(path.read_text("utf-8"), parse_constant=_no_constant, parse_float=_float)
    except (ValueError, RecursionError) as error:
        raise ComparisonFileError(
            f"{path} is not a comparison: it is not JSON ({error}); save it again with "
            f"{_again(path)}"
        ) from error
    try:
        return from_dict(data)
    except ComparisonFileError as error:
        raise ComparisonFileError(
            f"{path} is not a usable comparison: {error}; save it again with {_again(path)}"
        ) from error


def _again(path: Path) -> str:
    return f"comparison.save({path.with_suffix('.json').name!r})"


def to_json(comparison: ComparisonRecord) -> str:
    """Return everything in a comparison as JSON."""
    data = {"format": FORMAT, "version": FORMAT_VERSION, **_plain(asdict(comparison))}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def to_csv(comparison: ComparisonRecord) -> str:
    """Return the records, one per line; empty where there is no figure."""
    text = io.StringIO()
    found = records(comparison)
    if found:
        writer = csv.DictWriter(text, fieldnames=list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    return text.getvalue()


def from_dict(data: Any) -> ComparisonRecord:
    """Invert :func:`to_json`, after parsing.

    Raises
    ------
    ComparisonFileError
        Names the first thing that is wrong.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ComparisonFileError(f"its format is not {FORMAT!r}")
    if data.get("version") != FORMAT_VERSION:
        raise ComparisonFileError(
            f"its version is {data.get('version')!r}, this version reads {FORMAT_VERSION}; "
            "compare again"
        )
    body = {name: value for name, value in data.items() if name not in ("format", "version")}
    defaults = {f.name: f.default for f in fields(ComparisonRecord) if f.name in _ADDED}
    if isinstance(body.get("rows"), list):
        body["rows"] = [with_outcome(row) for row in body["rows"]]
    found = _dataclass(ComparisonRecord, {**defaults, **body}, "$")
    if found.baseline_peak_bytes == 0:
        raise ComparisonFileError("at $.baseline_peak_bytes: 0, so no share of it can be a budget")
    for name in ("baseline_step_us", "gap"):
        if math.isnan(getattr(found, name)):
            raise ComparisonFileError(f"at $.{name}: a number is missing")
    return found


# -- from plain values to dataclasses --------------------------------------------------


def _dataclass(kind: type[_T], data: Any, path: str) -> _T:
    if not isinstance(data, dict):
        raise ComparisonFileError(f"at {path}: no {kind.__name__}, but {data!r:.60}")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in names - set(data):
        raise ComparisonFileError(f"at {path}: {name!r} is missing")
    for name in set(data) - names:
        raise ComparisonFileError(f"at {path}: {name!r:.60} is unknown")
    values = {name: _value(hints[name], data[name], f"{path}.{name}") for name in names}
    for name, value in values.items():
        if _is_amount(name) and value is not None and value < 0:
            raise ComparisonFileError(f"at {path}.{name}: {value!r} is below zero")
    return kind(**values)


def _is_amount(name: str) -> bool:
    """Whether a field's name says that it holds bytes, a time or a count."""
    return name.endswith(("_bytes", "_us", "_s")) or name.startswith("num_") or name == "repeats"


def _value(hint: Any, value: Any, path: str) -> Any:
    """A value of a field, checked against the field's type."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in parts:
            return None
        (inner,) = (part for part in parts if part is not types.NoneType)
        return _value(inner, value, path)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _member(hint, value, path)
    if origin is Literal:
        fits = isinstance(value, str) and value in parts
    elif origin is tuple:
        return _tuple(parts, value, path)
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {name: _value(parts[1], v, f"{path}.{name}") for name, v in value.items()}
        fits = False
    elif is_dataclass(hint):
        return _dataclass(hint, value, path)  # type: ignore[arg-type]
    elif hint is float:
        if value is None:
            return math.nan
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = _finite(value, path) if fits else value
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if fits and abs(value) > MAX_INTEGER:
            raise ComparisonFileError(f"at {path}: an integer is beyond {MAX_INTEGER}")
    else:
        fits = hint is Any or isinstance(value, hint)
        if isinstance(value, (int, float)):
            _finite(value, path)
    if not fits:
        raise ComparisonFileError(f"at {path}: {value!r:.60} is not {_words(hint)}")
    return value


def _member(kind: type[StrEnum], value: Any, path: str) -> StrEnum:
    """A member of an enum by its code; scopes of bounds were written in words at first."""
    if isinstance(value, str):
        code = code_of(value) if kind is BoundScope else value
        if code in set(kind):
            return kind(code)
    raise ComparisonFileError(f"at {path}: {value!r:.60} is not one of {', '.join(kind)}")


def _finite(value: int | float, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ComparisonFileError(f"at {path}: a number is too large to be one")
    return number


def _tuple(parts: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ComparisonFileError(f"at {path}: {value!r:.60} is not a list")
    inner = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
    if len(inner) != len(value):
        raise ComparisonFileError(f"at {path}: {len(value)} values where {len(inner)} belong")
    return tuple(
        _value(hint, v, f"{path}[{i}]")
        for i, (hint, v) in enumerate(zip(inner, value, strict=True))
    )


def _words(hint: Any) -> str:
    return f"one of {get_args(hint)}" if get_origin(hint) is Literal else f"of type {hint.__name__}"


# -- and back -------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Lists, dictionaries, strings and finite numbers."""
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _float(text: str) -> float:
    """A number from a file; refuses those that could not be written again."""
    value = float(text)
    return value if math.isfinite(value) else _no_constant(text[:40])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a comparison may hold")
