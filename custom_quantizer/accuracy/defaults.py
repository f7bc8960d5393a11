"""What ``quantize`` does for the accuracy that it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule

from custom_quantizer.calibration.observers import ActivationObserver, WeightObserver

__all__ = ["BEST", "SAMPLES", "Remembered", "algorithms_for", "choose_observers"]

SAMPLES = 512
"""Samples to improve with; more changed nothing that could be told from noise."""

BEST = ("gptq", "bias_correction")
"""Of all algorithms those that gain something beside each other."""

_NARROW = 8
"""Below this width rounding to nearest loses accuracy."""


def algorithms_for(accuracy: str, prepared: GraphModule) -> tuple[str, ...]:
    """The algorithms that an accuracy stands for; none where nothing is to be gained.

    Args:
        accuracy: ``"plain"``, ``"fast"`` or ``"best"``.
        prepared: what ``prepare_pt2e`` returns.
    """
    weights = [m for m in prepared.modules() if isinstance(m, WeightObserver)]
    if accuracy == "plain" or not weights:
        return ()
    if accuracy == "best":
        return BEST
    observers = [m for m in prepared.modules() if isinstance(m, ActivationObserver)]
    widths = [m.scheme.format.bits for m in weights] + [m.scheme.format.bits for m in observers]
    narrow = min(widths) < _NARROW
    return ("bias_correction",) if narrow else ()


def choose_observers(prepared: GraphModule) -> list[str]:
    """Let activations below 8 bits have the range with the least squared error, not all of it.

    To be called before calibrating. Those whose scheme names another observer keep it.

    Returns:
        Names of the tensors.
    """
    changed = []
    for module in prepared.modules():
        if (
            isinstance(module, ActivationObserver)
            and not module.is_dynamic
            and module.scheme.format.bits < _NARROW
            and module.scheme.observer == "minmax"
        ):
            module.record_counts()
            module.scheme = replace(module.scheme, observer="histogram")
            changed.append(module.name)
    return changed


class Remembered:
    """Batches of a generator, the first of which can be gone through a second time."""

    def __init__(self, data: Iterator[object]) -> None:
        self._data = data
        self._kept: list[object] = []

    def __iter__(self) -> Iterator[object]:
        yield from self._kept
        for batch in self._data:
            if len(self._kept) < SAMPLES:  # a batch holds a sample at least
                self._kept.append(batch)
            yield batch
