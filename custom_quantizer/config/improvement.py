"""What may be asked for beyond rounding to nearest; ``accuracy/`` does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from custom_quantizer.errors import ConfigError, nearest

__all__ = ["ACCURACIES", "ALGORITHMS", "RESCALING", "check_accuracy", "check_algorithms"]

ACCURACIES = ("plain", "fast", "best")
"""``plain`` rounds to nearest; ``fast`` adds what is free, ``best`` what seconds to minutes buy."""

RESCALING = ("equalization", "bias_absorption", "smoothquant")
"""Algorithms that change the numbers of the float network, and not what it computes."""

ALGORITHMS = (
    *RESCALING,
    *("gptq", "adaround", "analytical_bias_correction", "bias_correction", "brecq"),
)
"""Names of all algorithms, in the order in which they run."""


def check_accuracy(name: Any) -> str:
    """Return ``name``.

    Raises:
        ConfigError: it is none of :data:`ACCURACIES`.
    """
    if name not in ACCURACIES:
        raise ConfigError(
            f"accuracy is one of {', '.join(ACCURACIES)}, not {name!r}"
            f"{nearest(str(name), ACCURACIES)}"
        )
    return str(name)


def check_algorithms(names: Any) -> tuple[str, ...]:
    """The algorithms that are named, in the order in which they run.

    Raises:
        ConfigError: one does not exist, or it is no list of names.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"improve is a list of algorithms, not {names!r}")
    for name in names:
        if name not in ALGORITHMS:
            raise ConfigError(
                f"there is no algorithm {name!r}{nearest(str(name), ALGORITHMS)}; "
                f"choose from {', '.join(ALGORITHMS)}"
            )
    return tuple(name for name in ALGORITHMS if name in names)
