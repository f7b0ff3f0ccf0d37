"""JSON that somebody damaged: every kind of wrong value in every place, with a fixed seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

WRONG = (
    None,
    True,
    -1,
    0,
    1,
    10**30,
    2**53,
    2**63,
    -(2**70),
    0.5,
    1e308,
    "",
    "x",
    "\x1b[2J",
    [],
    [0],
    [[]],
    {},
    {"a": 1},
)
RAW_NUMBERS = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1" + "0" * 5000)


def mutated(data: Any, count: int, seed: int) -> Iterator[bytes]:
    """``count`` damaged versions of ``data`` as a file would hold it."""
    rng = random.Random(seed)
    text = json.dumps(data)
    for _ in range(count):
        if rng.random() < 0.25:
            yield _damaged_bytes(rng, text.encode())
            continue
        changed = copy.deepcopy(data)
        raw = None
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            raw = _damage(rng, changed) or raw
        written = json.dumps(changed)
        yield (written if raw is None else written.replace('"@"', raw)).encode()


def _damaged_bytes(rng: random.Random, text: bytes) -> bytes:
    damaged = bytearray(text)
    kind = rng.randrange(4)
    if kind == 0:
        del damaged[rng.randrange(len(damaged)) :]
    elif kind == 1:
        at = rng.randrange(len(damaged))
        del damaged[at : at + rng.randrange(1, 20)]
    elif kind == 2:
        at = rng.randrange(len(damaged))
        damaged[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4)))
    else:
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _damage(rng: random.Random, data: Any) -> str | None:
    """Change one place of ``data``; returns the text that stands for ``"@"``."""
    holder, key = rng.choice(list(_places(data)))
    value = holder[key]
    kind = rng.randrange(7)
    if kind == 0:
        holder[key] = copy.deepcopy(rng.choice(WRONG))
    elif kind == 1 and isinstance(value, (int, float)) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, -value, value * 2, value * 10**12, 0))
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(value))
    elif kind == 3:
        holder[f"{key} "] = copy.deepcopy(value)
    elif kind == 4:
        other, at = rng.choice(list(_places(data)))
        if other is holder:
            holder[key], other[at] = other[at], holder[key]
        else:
            holder[key] = copy.deepcopy(other[at])
    elif kind == 5:
        holder[key] = "@"
        return rng.choice(RAW_NUMBERS)
    elif isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, str):
        holder[key] = rng.choice((value + "\n", value[:-1], value.upper(), value + "\x00é"))
    elif isinstance(value, list):
        rng.shuffle(value)
    else:
        holder[key] = [value]
    return None


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    pairs: Any = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(pairs):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
