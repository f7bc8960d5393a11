"""What ``quantize`` does for the accuracy that it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule

from custom_quantizer.calibration.observers import ActivationObserver, WeightObserver
from custom_quantizer.core.graph import some_state
from custom_quantizer.core.schemes import TensorScheme

__all__ = [
    "BEST",
    "SAMPLES",
    "Remembered",
    "algorithms_for",
    "choose_observers",
    "with_chosen_observer",
]

logger = logging.getLogger(__name__)

SAMPLES = 512
"""Samples to improve with; more changed nothing that could be told from noise."""

BEST = ("gptq", "bias_correction")
"""Of all algorithms those that gain something beside each other."""

_NARROW = 8
"""Below this width rounding to nearest loses accuracy."""


def algorithms_for(accuracy: str, prepared: GraphModule) -> tuple[str, ...]:
    """The algorithms that an accuracy stands for; none where nothing is to be gained.

    Those of ``"fast"``, which is what nobody asked for, are left out with a warning where a model
    writes its own buffers: there is no other way to quantize it.

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
    if min(widths) >= _NARROW:
        return ()
    state = some_state(prepared.graph)
    if state:
        logger.warning(
            "the model writes its own buffers (%s), so its biases are not corrected", state
        )
        return ()
    return ("bias_correction",)


def with_chosen_observer(scheme: TensorScheme) -> TensorScheme:
    """The scheme of an activation, with the observer that it gets where it names none itself."""
    if scheme.format.bits < _NARROW and scheme.observer == "minmax":
        return replace(scheme, observer="histogram")
    return scheme


def choose_observers(prepared: GraphModule) -> list[str]:
    """Let activations below 8 bits have the range with the least squared error, not all of it.

    To be called before calibrating. Those whose scheme names another observer keep it.

    Returns:
        Names of the tensors.
    """
    changed = []
    for module in prepared.modules():
        if not isinstance(module, ActivationObserver) or module.is_dynamic:
            continue
        chosen = with_chosen_observer(module.scheme)
        if chosen != module.scheme:
            module.record_counts()
            module.scheme = chosen
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
