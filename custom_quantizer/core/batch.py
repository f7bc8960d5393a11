"""Some examples of a data set, as calibration, training and evaluation take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Some examples: what a model is called with, and the classes, if known.

    Attributes:
        inputs: One tensor per argument of the model, each with the batch first; by the names of
            arguments where the data have names.
        labels: int64 class indices of shape ``(batch,)``, or None.
    """

    inputs: tuple[Tensor, ...] | Mapping[str, Tensor]
    labels: Tensor | None
