"""How far an improvement came, in a file: the finished layers.

The file is a sealed safetensors file with fingerprints of the network as it was before, of the
data, and of what was asked for, because going on with others would give neither's result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.accuracy.layers import Layer
from custom_quantizer.core.checkpoint import CheckpointFile, fingerprint, part_of
from custom_quantizer.errors import CalibrationError

__all__ = ["ImprovementCheckpoint"]

_FORMAT = "custom_quantizer.improvement"


class ImprovementCheckpoint:
    """The file of one improvement.

    Args:
        path: of the file.
        prepared: the graph, not yet changed.
        layers: its layers.
        calls: the data.
        asked: what else the result follows from.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        prepared: GraphModule,
        layers: Sequence[Layer],
        calls: Sequence[Sequence[Any]],
        *asked: object,
    ) -> None:
        self._file = CheckpointFile(path, _FORMAT, "an improvement", "improve", CalibrationError)
        self._layers = layers
        state = prepared.state_dict()
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        schemes = [repr(getattr(module, "scheme", "")) for module in prepared.children()]
        flat = [value for call in calls for value in call if isinstance(value, Tensor)]
        self._fingerprints = {
            "model": fingerprint(tensors, prepared.code, *schemes),
            "data": fingerprint(flat),
            "asked": repr(asked),
        }
        self._tensors: dict[str, Tensor] = {}
        self._applied: list[list[str]] = []

    def resume(self) -> int:
        """How many steps are finished; 0 where there is no file.

        Raises:
            CalibrationError: it is of something else, or no checkpoint.
            InputError: it cannot be read.
        """
        what = {
            "model": "another model, or of one that was changed since",
            "data": "other data",
            "asked": "other algorithms or another seed",
        }
        found = self._file.read(
            {key: (value, what[key]) for key, value in self._fingerprints.items()}
        )
        if found is None:
            return 0
        with self._file.loading():
            self._tensors, metadata = found
            self._applied = json.loads(metadata["applied"])
        return len(self._applied)

    def restore(self, index: int, *layers: Layer) -> tuple[str, ...]:
        """Give layers what a finished step gave them; the algorithms that changed them."""
        with self._file.loading():
            for place, layer in enumerate(layers):
                layer.load(part_of(self._tensors, f"{index}.{place}."))
        return tuple(self._applied[index])

    def save(self, index: int, applied: Sequence[str], *layers: Layer) -> None:
        """Write a finished step, and all before it, at once.

        Raises:
            InputError: the file cannot be written.
        """
        for place, layer in enumerate(layers):
            for name, value in layer.state().items():
                self._tensors[f"{index}.{place}.{name}"] = value.cpu()
        self._applied.append(list(applied))
        metadata = {**self._fingerprints, "applied": json.dumps(self._applied)}
        self._file.write(self._tensors, metadata)
