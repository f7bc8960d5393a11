"""Convergence of ranges: which batch moved a range last, and how one tensor's scale develops."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import is_constant, is_observer, module_path
from custom_quantizer.core.plot import new_figure, save_figure
from custom_quantizer.errors import CalibrationError, CustomQuantizerError
from custom_quantizer.ops.rewrites.training_graph import planned_tensor

__all__ = [
    "ObservedTensor",
    "RangeConvergence",
    "TensorConvergence",
    "WatchPoint",
    "observed_tensors",
    "plot_watched",
]


class _Observer(Protocol):
    min_val: Tensor
    max_val: Tensor

    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class ObservedTensor:
    """An activation that an observer watches.

    Attributes:
        name: of the node it comes from, the first one where several share an observer.
        path: of the module it comes from; ``""`` for the model itself.
        key: of the observer in the module.
        module: the observer.
        shared: names of the other tensors it watches.
    """

    name: str
    path: str
    key: str
    module: nn.Module
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorConvergence:
    """The range of a tensor after calibration.

    Attributes:
        name: of the node it comes from.
        path: of the module it comes from.
        low: smallest value; for moving averages, the average of the smallest.
        high: largest value, likewise.
        last_change: the last batch, counted from 1, that moved low or high.
    """

    name: str
    path: str
    low: float
    high: float
    last_change: int


@dataclass(frozen=True)
class WatchPoint:
    """A watched tensor after one batch.

    Attributes:
        name: of the tensor.
        batch: counted from 1.
        samples: seen so far.
        low: of its range.
        high: of its range.
        scale: it would have, were calibration over.
        zero_point: likewise.
    """

    name: str
    batch: int
    samples: int
    low: float
    high: float
    scale: float
    zero_point: int

    def __str__(self) -> str:
        return (
            f"{self.name}  batch {self.batch:>5,}  {self.samples:>7,} samples  "
            f"[{self.low:.6g}, {self.high:.6g}]  scale {self.scale:.6g}  "
            f"zero point {self.zero_point}"
        )


def observed_tensors(prepared: GraphModule) -> tuple[ObservedTensor, ...]:
    """The activations that ``prepared`` watches, each observer once, in graph order."""
    sources: dict[str, list[Node]] = {}
    for node in prepared.graph.nodes:
        if is_observer(node):
            source = planned_tensor(cast(Node, node.args[0]))
            if not is_constant(source):
                sources.setdefault(str(node.target), []).append(source)
    found = []
    for key, nodes in sources.items():
        module = prepared.get_submodule(key)
        # What is quantized at run time has no range to measure.
        if _has_range(module) and not getattr(module, "is_dynamic", False):
            others = tuple(node.name for node in nodes[1:])
            found.append(ObservedTensor(nodes[0].name, module_path(nodes[0]), key, module, others))
    return tuple(found)


def _has_range(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, end, None), Tensor) for end in ("min_val", "max_val"))


class RangeConvergence:
    """Notes after each batch which ranges moved.

    Args:
        observed: the tensors.
        watch: name, module path or glob of those to print, or ``None``.

    Raises:
        CalibrationError: no tensor has the name to watch.
    """

    def __init__(self, observed: tuple[ObservedTensor, ...], watch: str | None = None) -> None:
        self._observed = observed
        self._watched = () if watch is None else _select(observed, watch)
        self._ends = self._read()
        self.last_change = torch.zeros(len(observed), dtype=torch.int64)
        self.points: list[WatchPoint] = []

    def note(self, batch: int, samples: int) -> None:
        """Compare all ranges with those before the batch; print what is watched."""
        ends = self._read()
        # A range that does not exist yet is NaN, which equals nothing, itself included.
        moved = ((ends != self._ends) & ~ends.isnan()).any(dim=0)
        self.last_change[moved] = batch
        self._ends = ends
        for tensor in self._watched:
            point = _point(tensor, batch, samples)
            if point is not None:
                self.points.append(point)
                print(point, flush=True)

    def restart(self, last_change: Tensor) -> None:
        """Go on from ranges that were loaded into the observers."""
        self._ends = self._read()
        self.last_change = last_change.clone()

    def tensors(self) -> tuple[TensorConvergence, ...]:
        """All tensors that have a range."""
        low, high = self._ends.tolist() if self._observed else ([], [])
        return tuple(
            TensorConvergence(t.name, t.path, low[i], high[i], int(self.last_change[i]))
            for i, t in enumerate(self._observed)
            if low[i] <= high[i]
        )

    def _read(self) -> Tensor:
        """Both ends of all ranges, float32 ``(2, tensors)``; NaN where there is none yet."""
        if not self._observed:
            return torch.zeros(2, 0)
        return torch.stack([_ends(tensor.module) for tensor in self._observed], dim=1)


def _ends(module: nn.Module) -> Tensor:
    observer = cast(_Observer, module)
    low, high = observer.min_val.detach(), observer.max_val.detach()
    if low.numel() == 0:
        return torch.full((2,), torch.nan)
    return torch.stack((low.amin(), high.amax())).to("cpu", torch.float32)


def _select(observed: tuple[ObservedTensor, ...], watch: str) -> tuple[ObservedTensor, ...]:
    chosen = tuple(
        tensor
        for tensor in observed
        if any(fnmatchcase(name, watch) for name in (tensor.name, tensor.path, *tensor.shared))
    )
    if not chosen:
        names = ", ".join(
            f"{tensor.name} ({tensor.path})" if tensor.path else tensor.name for tensor in observed
        )
        raise CalibrationError(f"no observed tensor is called {watch!r}; there are {names}")
    return chosen


def _point(tensor: ObservedTensor, batch: int, samples: int) -> WatchPoint | None:
    low, high = _ends(tensor.module).tolist()
    if not low <= high:
        return None
    try:
        scale, zero_point = cast(_Observer, tensor.module).calculate_qparams()
    except CustomQuantizerError as error:
        raise CalibrationError(f"watching {tensor.name}: {error}") from error
    return WatchPoint(
        tensor.name,
        batch,
        samples,
        low,
        high,
        float(scale.reshape(-1)[0]),
        int(zero_point.reshape(-1)[0]),
    )


def plot_watched(points: Iterable[WatchPoint], path: str | os.PathLike[str]) -> None:
    """Draw ranges and scales over the batches, one column per tensor.

    Raises:
        InputError: matplotlib is missing, or the file cannot be written.
    """
    by_name: dict[str, list[WatchPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    figure = new_figure(4.5 * len(by_name), 5.0)
    axes: Any = figure.subplots(2, len(by_name), squeeze=False, sharex="col")
    for column, (name, series) in enumerate(by_name.items()):
        batches = [point.batch for point in series]
        top, bottom = axes[0][column], axes[1][column]
        top.fill_between(
            batches, [p.low for p in series], [p.high for p in series], step="post", alpha=0.3
        )
        top.set_title(name)
        top.set_ylabel("range")
        bottom.step(batches, [point.scale for point in series], where="post")
        bottom.set_ylabel("scale")
        bottom.set_xlabel("batch")
    save_figure(figure, path)
