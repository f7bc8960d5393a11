"""Some examples of a data set, as calibration, training and evaluation take them."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["LABEL_KEYS", "Batch", "label_key"]

LABEL_KEYS = ("labels", "targets", "label", "target", "y")
"""What labels are called beside the inputs of a model."""


class Batch(NamedTuple):
    """Some examples: what a model is called with, and the classes, if known.

    Attributes:
        inputs: One tensor per argument of the model, each with the batch first; by the names of
            arguments where the data have names.
        labels: int64 class indices of shape ``(batch,)``, or None.
    """

    inputs: tuple[Tensor, ...] | Mapping[str, Tensor]
    labels: Tensor | None


def label_key(batch: object, taken: Container[object]) -> str | None:
    """The key of the labels in a dictionary of inputs, as data of ``transformers`` have them.

    Args:
        batch: inputs of a model, by name.
        taken: the names of those that the model takes: what it is called with is no label.
    """
    if not isinstance(batch, Mapping):
        return None
    return next((key for key in LABEL_KEYS if key in batch and key not in taken), None)
