"""The state of a training in a file: tensors and JSON, no code.

A safetensors file: parameters, buffers and fake quantizers of the graph, the optimizer's tensors
and the state of the random number generators; in its metadata how far the training came and a
fingerprint of what was trained how.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.core.checkpoint import CheckpointFile, part_of
from custom_quantizer.errors import TrainingError

__all__ = ["TrainingCheckpoint", "TrainingPosition"]

_FORMAT = "custom_quantizer.training"


@dataclass
class TrainingPosition:
    """How far a training came.

    Attributes:
        epoch: from 0.
        batch: batches of the epoch that are done.
        step: updates of the parameters, over all epochs.
        samples: of this epoch.
        loss: sum over them.
        right: how many of them were right; ``None`` without classes.
        history: metrics of the epochs that are done.
        skipped: batches that did not fit.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    loss: float = 0.0
    right: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0


class TrainingCheckpoint:
    """The file of one training.

    Args:
        path: of the file.
        model: the prepared graph.
        optimizer: of its parameters.
        recipe: what decides how the training goes, as plain data.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        model: GraphModule,
        optimizer: torch.optim.Optimizer,
        recipe: Mapping[str, Any],
    ) -> None:
        self._file = CheckpointFile(path, _FORMAT, "a training", "train", TrainingError)
        self._model = model
        self._optimizer = optimizer
        self._recipe = json.dumps(dict(recipe), sort_keys=True)
        self._structure = _structure(model)
        self._random: dict[str, Tensor] = {}

    def resume(self) -> TrainingPosition | None:
        """Load what the file holds; ``None`` where there is no file.

        Raises:
            TrainingError: it is of another training, of another version, or no checkpoint.
            InputError: it cannot be read.
        """
        other = "a training with another recipe, number of epochs or batches"
        found = self._file.read(
            {
                "structure": (self._structure, "another graph or of other schemes"),
                "recipe": (self._recipe, other),
            }
        )
        if found is None:
            return None
        tensors, metadata = found
        with self._file.loading():
            position = TrainingPosition(**json.loads(metadata["position"]))
            self._model.load_state_dict(part_of(tensors, "model."))
            self._load_optimizer(part_of(tensors, "optimizer."), json.loads(metadata["optimizer"]))
        self._random = part_of(tensors, "random.")
        return position

    def restore_random_state(self) -> None:
        """Continue the sequence of random numbers where it was interrupted."""
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"])
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"])
        self._random = {}

    def save(self, position: TrainingPosition) -> None:
        """Write the whole state in one step.

        Raises:
            InputError: the file cannot be written.
        """
        tensors = {f"model.{n}": v for n, v in self._model.state_dict().items()}
        state = self._optimizer.state_dict()["state"]
        plain: dict[str, dict[str, Any]] = {}
        for index, entries in state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                elif value is not None:
                    plain.setdefault(str(index), {})[name] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        metadata = {
            "structure": self._structure,
            "recipe": self._recipe,
            "optimizer": json.dumps(plain),
            "position": json.dumps(asdict(position)),
        }
        self._file.write(tensors, metadata)

    def _load_optimizer(self, tensors: dict[str, Tensor], plain: dict[str, dict[str, Any]]) -> None:
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in plain.items()}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _structure(model: GraphModule) -> str:
    """Fingerprint of the ops, the schemes and the names and shapes of the parameters."""
    # Not str() of a function, which says where it lies in memory.
    calls = [f"{n.op} {getattr(n.target, '__name__', n.target)}" for n in model.graph.nodes]
    schemes = [repr(module.scheme) for module in model.modules() if hasattr(module, "scheme")]
    shapes = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join([*calls, *schemes, *shapes]).encode()).hexdigest()
