"""How far a calibration came, in a file: tensors and JSON, no code.

The file is a safetensors file: the state of every observer and of buffers that the model writes,
and in its metadata how much data was seen. It carries fingerprints of the model and of the first
batch, because going on with another model or other data would give ranges of neither.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from custom_quantizer.calibration.convergence import RangeConvergence
from custom_quantizer.core.checkpoint import CheckpointFile, fingerprint, part_of
from custom_quantizer.core.graph import set_state, state_buffers
from custom_quantizer.errors import CalibrationError

__all__ = ["Checkpoint", "Position"]

_FORMAT = "custom_quantizer.calibration"
_LAST_CHANGE = "last_change"
_STATE = "state."
_OBSERVER = "activation_post_process"


@dataclass(frozen=True)
class Position:
    """How much of the data was used.

    Attributes:
        samples: samples that went through the model.
        batches: calls of the model.
        rebatched: whether batches had another size than they came in.
        seen: samples read, including those that waited for a full batch.
    """

    samples: int = 0
    batches: int = 0
    rebatched: bool = False
    seen: int = 0


class Checkpoint:
    """The file of one calibration.

    Args:
        path: of the file.
        prepared: the model.
    """

    def __init__(self, path: str | os.PathLike[str], prepared: GraphModule) -> None:
        self.path = path
        self._file = CheckpointFile(path, _FORMAT, "a calibration", "calibrate", CalibrationError)
        self._observers = {
            name: module for name, module in prepared.named_children() if name.startswith(_OBSERVER)
        }
        self._model = _fingerprint_of_model(prepared, self._observers)
        self._prepared = prepared
        self._data: str | None = None

    def resume(self, convergence: RangeConvergence) -> Position:
        """Load what the file holds into the graph; nothing where there is no file.

        Raises:
            CalibrationError: it is of another model, of another version, or no checkpoint.
            InputError: it cannot be read.
        """
        found = self._file.read(
            {"model": (self._model, "another model, of other weights or of other schemes")}
        )
        if found is None:
            return Position()
        with self._file.loading():
            return self._load(*found, convergence)

    def _load(
        self, tensors: dict[str, Tensor], metadata: dict[str, str], convergence: RangeConvergence
    ) -> Position:
        position = Position(**json.loads(metadata["position"]))
        states: list[tuple[nn.Module, dict[str, Tensor]]] = []
        for key, observer in self._observers.items():
            state = part_of(tensors, f"{key}.")
            for name, value in observer.state_dict().items():
                if name in state and state[name].dtype != value.dtype:
                    raise ValueError(f"{key}.{name} is {state[name].dtype}, not {value.dtype}")
            states.append((observer, state))
        for observer, state in states:
            observer.load_state_dict(state)
        set_state(self._prepared, part_of(tensors, _STATE))
        convergence.restart(tensors[_LAST_CHANGE])
        self._data = metadata["data"]
        return position

    def check_data(self, values: list[Any]) -> None:
        """Remember the first batch, or compare it with the one that was first before.

        Raises:
            CalibrationError: it is another one.
        """
        found = fingerprint(value for value in values if isinstance(value, Tensor))
        if self._data is not None and self._data != found:
            raise CalibrationError(
                f"{self.path} was begun with other data: the first batch is not the same; give the "
                "same data in the same batches and order (a DataLoader must not shuffle, or "
                "shuffle with a seed), or remove the file to calibrate from the beginning"
            )
        self._data = found

    def save(self, position: Position, convergence: RangeConvergence) -> None:
        """Write the state of all observers in one step.

        Raises:
            InputError: the file cannot be written.
        """
        tensors = {_LAST_CHANGE: convergence.last_change}
        for key, observer in self._observers.items():
            for name, value in observer.state_dict().items():
                tensors[f"{key}.{name}"] = value
        for name, value in state_buffers(self._prepared).items():
            tensors[_STATE + name] = value
        metadata = {
            "model": self._model,
            "data": self._data or "",
            "position": json.dumps(asdict(position)),
        }
        self._file.write(tensors, metadata)


def _fingerprint_of_model(prepared: GraphModule, observers: dict[str, nn.Module]) -> str:
    schemes = [repr(getattr(module, "scheme", type(module))) for module in observers.values()]
    weights = [
        value
        for name, value in prepared.state_dict().items()
        # By name: an observer of several tensors is among the children only once.
        if not name.startswith(_OBSERVER) and isinstance(value, Tensor)
    ]
    return fingerprint(weights, prepared.code, *schemes)
