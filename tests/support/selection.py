"""Which of many parameters the default run takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["slow_but"]


def slow_but(kept: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """``values`` as parameters of which all but those kept are slow, each under its usual id."""
    values = list(values)
    assert [value for value in kept if value not in values] == [], "each of these is a value"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if value in kept else pytest.mark.slow,
        )
        for value in values
    ]
