"""Files that were damaged by chance: bytes of any file, and JSON that stays well-formed.

Every mutation follows from its seed alone, so that a failure names the file that caused it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["mutated_bytes", "mutated_json"]


# -- bytes --------------------------------------------------------------------------------------


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 4))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, ord("9"), ord("-")))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _append(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 16, 1000)))


def _delete(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 4, 100))]


def _insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))


def _splice(data: bytearray, rng: random.Random) -> None:
    """A part of the file over, or into, another part."""
    length = rng.randint(1, max(1, len(data) // 4))
    source, target = (rng.randrange(len(data)) for _ in range(2))
    data[target : target + rng.choice((0, length))] = data[source : source + length]


def _numbers(data: bytearray, rng: random.Random) -> None:
    """Four or eight bytes as a length field of a hostile file has them."""
    width = rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
    at = rng.randrange(len(data))
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))


_BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bits,
    _set_bytes,
    _truncate,
    _append,
    _delete,
    _insert,
    _splice,
    _numbers,
)


def mutated_bytes(data: bytes, seed: int | None) -> bytes:
    """``data`` after one to three mutations; as it is, without a seed."""
    if seed is None:
        return data
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if changed:
            rng.choice(_BYTES)(changed, rng)
    return bytes(changed)


# -- JSON ---------------------------------------------------------------------------------------

_NUMBERS = (0, 1, -1, 2, 31, 100, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63, 2**64, 10**30, 10**400)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\ud800", "a" * 5000, [], {}, [[]], {"a": {}}),
    *(0.5, -0.0, 1e308, 1e-320, "NaN", "../../x", "\0"),
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every ``container, key`` in plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, (dict, list)):
            yield from _places(item)


def _nested(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def _mutate(document: Any, rng: random.Random) -> None:
    container, key = rng.choice(list(_places(document)))
    value = container[key]
    kind = rng.randrange(9)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = rng.choice(_VALUES)
    elif kind == 2:
        container[key] = rng.choice(_NUMBERS)
    elif kind == 3 and isinstance(value, int):
        container[key] = rng.choice((-value, value + 1, value - 1, value * 2, value * 1000))
    elif kind == 4:
        container[key] = _nested(value, rng.choice((1, 3, 50)))
    elif kind == 5:
        container[key] = str(value)
    elif kind == 6 and isinstance(value, list) and value:
        value[rng.randrange(len(value)) :] = rng.choice(([], [value[0]], value * 2))
    elif kind == 7 and isinstance(container, dict):
        container[rng.choice((f"{key}_", "x", "op", key.upper()))] = copy.deepcopy(value)
    else:  # something of the document in another place
        other, other_key = rng.choice(list(_places(document)))
        container[key] = copy.deepcopy(other[other_key])


def mutated_json(document: Any, seed: int | None) -> Any:
    """A copy of plain data after one to three mutations; as it is, without a seed."""
    changed = copy.deepcopy(document)
    if seed is None:
        return changed
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if changed:
            _mutate(changed, rng)
    return changed
