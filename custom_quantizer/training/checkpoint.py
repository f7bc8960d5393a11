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

from custom_quantizer.core.tensor_file import DamagedFileError, read_tensors, write_tensors
from custom_quantizer.errors import TrainingError

__all__ = ["TrainingCheckpoint", "TrainingPosition"]

_FORMAT = "custom_quantizer.training"
_VERSION = "2"


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
        self.path = path
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
        if not os.path.exists(self.path):
            return None
        try:
            tensors, metadata, sealed = read_tensors(self.path)
        except DamagedFileError as error:
            raise TrainingError(
                f"{self.path} is no checkpoint of a training, or is damaged ({error}). Remove it "
                "to train from the beginning"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise TrainingError(f"{self.path} is no checkpoint of a training; name another file")
        if metadata.get("version") not in ("1", _VERSION) or sealed != (
            metadata["version"] == _VERSION
        ):
            raise TrainingError(
                f"{self.path} is a checkpoint of version {metadata.get('version')}; this package "
                f"reads version {_VERSION}. Remove it to train from the beginning"
            )
        for key, mine, what in (
            ("structure", self._structure, "another graph or of other schemes"),
            ("recipe", self._recipe, "a training with another recipe, number of epochs or batches"),
        ):
            if metadata.get(key) != mine:
                raise TrainingError(
                    f"{self.path} is a checkpoint of {what}. Remove it to train from the "
                    "beginning, or name another file"
                )
        try:
            position = TrainingPosition(**json.loads(metadata["position"]))
            self._model.load_state_dict(_part(tensors, "model."))
            self._load_optimizer(_part(tensors, "optimizer."), json.loads(metadata["optimizer"]))
        # A file of version 1 may hold anything; one of version 2 is what save() wrote.
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{self.path} is a damaged checkpoint ({error}). Remove it to train from the "
                "beginning"
            ) from error
        self._random = _part(tensors, "random.")
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
            "format": _FORMAT,
            "version": _VERSION,
            "structure": self._structure,
            "recipe": self._recipe,
            "optimizer": json.dumps(plain),
            "position": json.dumps(asdict(position)),
        }
        write_tensors(self.path, tensors, metadata)

    def _load_optimizer(self, tensors: dict[str, Tensor], plain: dict[str, dict[str, Any]]) -> None:
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in plain.items()}
        for key, value in tensors.items():
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _structure(model: GraphModule) -> str:
    """Fingerprint of the ops, the schemes and the names and shapes of the parameters."""
    # Not str() of a function, which says where it lies in memory.
    calls = [f"{n.op} {getattr(n.target, '__name__', n.target)}" for n in model.graph.nodes]
    schemes = [repr(module.scheme) for module in model.modules() if hasattr(module, "scheme")]
    shapes = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join([*calls, *schemes, *shapes]).encode()).hexdigest()
