"""Calibration statistics as a file that can stand for the data: of which model, from which inputs.

Statistics go by the names of tensors, which another model, or the same with other weights, may have
as well. So the file that ``calibrate`` writes also holds the captured graph as text and the SHA-256
of each weight; and the inputs of the first calls, on which ``quantize`` compares the graphs without
any data. The rest is what ``save_statistics`` writes, and ``load_statistics`` reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Annotated, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.calibration.convergence import TensorConvergence
from custom_quantizer.calibration.run import CalibrationSummary
from custom_quantizer.calibration.statistics import (
    ModelStatistics,
    load_statistics,
    read_recorded,
    save_statistics,
    statistics_of,
)
from custom_quantizer.core.checkpoint import fingerprint
from custom_quantizer.core.files import printable
from custom_quantizer.core.tensor_file import DamagedFileError
from custom_quantizer.errors import CalibrationError, InputError, some

__all__ = ["Recorded", "read_calibration", "write_calibration"]


class _Part(BaseModel):
    # A tensor that no batch reached has an infinite range.
    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class _Range(_Part):
    name: str
    path: str
    low: float
    high: float
    last_change: int


class _About(_Part):
    """What is known of a calibration besides its statistics."""

    samples: Annotated[int, Field(ge=1)]
    batches: Annotated[int, Field(ge=1)]
    rebatched: bool
    unused: Annotated[int, Field(ge=0)]
    ranges: list[_Range]
    dynamic_batch: Annotated[int, Field(ge=0, le=1 << 24)]
    torch: str
    graph: str
    weights: dict[str, str]
    inputs: Annotated[int, Field(ge=1, le=1 << 10)]
    calls: Annotated[int, Field(ge=1, le=1 << 10)]
    names: list[str] = []


@dataclass(frozen=True, eq=False)
class Recorded:
    """What :func:`write_calibration` wrote.

    Attributes:
        path: of the file.
        summary: what the observers were shown.
        example: inputs that the model was captured with, one tensor per placeholder; by name where
            they were given so.
        calls: inputs of the first calls, likewise.
        dynamic_batch: largest batch; 0: it is that of the example.
        statistics: of the activations.
    """

    path: str
    summary: CalibrationSummary
    example: tuple[Tensor, ...] | Mapping[str, Tensor] = field(repr=False)
    calls: tuple[list[Tensor], ...] = field(repr=False)
    dynamic_batch: int
    statistics: ModelStatistics = field(repr=False)
    _about: _About = field(repr=False)

    def check_example(self, example: tuple[Any, ...]) -> None:
        """Refuse inputs of other shapes or types than those of the calibration.

        Raises:
            InputError: which.
        """
        given = [_described(leaf) for leaf in pytree.tree_leaves(example)]
        known = [_described(leaf) for leaf in pytree.tree_leaves(self.example)]
        if given != known:
            raise InputError(
                f"{self.path}: was calibrated with inputs of {', '.join(known)}, and the example "
                f"is {', '.join(given) or 'empty'}; give an example like that, or calibrate again"
            )

    def check_model(self, exported: GraphModule) -> None:
        """Refuse another model, or the same with other weights.

        Args:
            exported: the captured graph, before it is prepared.

        Raises:
            CalibrationError: the first differences are named.
        """
        mine, known = _weights(exported), self._about.weights
        differing = [
            *(f"{name} is only in the model" for name in mine if name not in known),
            *(f"{printable(name)} is only in the file" for name in known if name not in mine),
            *(
                f"{name} has other values"
                for name in mine
                if known.get(name, mine[name]) != mine[name]
            ),
        ]
        if differing:
            raise CalibrationError(
                f"{self.path}: statistics of other weights than this model has: "
                f"{some(differing, 3)}; give the weights that were calibrated with, or calibrate "
                "this model"
            )
        lines = zip_longest(exported.code.splitlines(), self._about.graph.splitlines())
        for here, there in lines:
            if here != there:
                version = ""
                if self._about.torch != torch.__version__:
                    version = f" (captured by PyTorch {printable(self._about.torch)})"
                raise CalibrationError(
                    f"{self.path}: statistics of another model{version}: where it has "
                    f"{_code(there)}, this one has {_code(here)}; calibrate this model"
                )

    def load(self, prepared: GraphModule) -> None:
        """Give the statistics to the observers of a prepared model.

        Raises:
            CalibrationError: they are not those that its configuration needs.
        """
        try:
            load_statistics(prepared, self.statistics)
        except CalibrationError as error:
            raise CalibrationError(
                f"{self.path}: was recorded with another configuration: {error}"
            ) from error


def write_calibration(
    path: str | os.PathLike[str],
    exported: GraphModule,
    prepared: GraphModule,
    example: Sequence[Any],
    calls: Sequence[Sequence[Any]],
    summary: CalibrationSummary,
    dynamic_batch: int,
    names: Sequence[str],
) -> None:
    """Write the statistics of a calibrated model and what they are of, in one step.

    Args:
        path: of the file, usually ``.safetensors``.
        exported: the captured graph, before it was prepared.
        prepared: the calibrated one.
        example: inputs it was captured with.
        names: of these inputs, where they were given by name.
        calls: inputs of its first calls, one value per placeholder.
        summary: what ``calibrate`` returned.
        dynamic_batch: largest batch; 0: a static one.

    Raises:
        InputError: an input is no tensor, or the file cannot be written.
    """
    leaves = pytree.tree_leaves(tuple(example))
    record: dict[str, Tensor] = {}
    for name, values in (("example", leaves), *((f"call{i}", v) for i, v in enumerate(calls))):
        for index, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise InputError(
                    f"input {index} is {type(value).__name__}, and a file of statistics holds "
                    "tensors; make it part of the model, or calibrate in quantize"
                )
            record[f"{name}.{index}"] = value
    about = _About(
        samples=summary.samples,
        batches=summary.batches,
        rebatched=summary.rebatched,
        unused=summary.unused,
        ranges=[_Range(**asdict(tensor)) for tensor in summary.tensors],
        dynamic_batch=dynamic_batch,
        torch=torch.__version__,
        graph=exported.code,
        weights=_weights(exported),
        inputs=len(leaves),
        calls=len(calls),
        names=list(names),
    )
    # A tensor, not metadata: the order of several keys there changes from run to run.
    text = about.model_dump_json().encode()
    record["about"] = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    save_statistics(statistics_of(prepared), path, record)


def read_calibration(path: str | os.PathLike[str]) -> Recorded:
    """Read what :func:`write_calibration` wrote. Nothing in it is run.

    Raises:
        InputError: the file cannot be read, is damaged, or holds statistics without a model.
    """
    try:
        statistics, record = read_recorded(path)
    except DamagedFileError as error:
        raise InputError(
            f"{error}; give what `custom-quantizer calibrate` wrote, or write it again"
        ) from error
    if "about" not in record:
        raise InputError(
            f"{path}: holds statistics, but not of which model: save_statistics wrote it; "
            "load_statistics reads it in Python; for quantize write one with "
            "`custom-quantizer calibrate`"
        )
    try:
        about = _About.model_validate_json(record["about"].numpy().tobytes())
        example = _inputs(record, "example", about.inputs)
        calls = tuple(_inputs(record, f"call{i}", about.inputs) for i in range(about.calls))
        if about.names and len(about.names) != about.inputs:
            raise ValueError
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: what it says of its model cannot be read ({type(error).__name__}); calibrate "
            "again"
        ) from error
    given: tuple[Tensor, ...] | Mapping[str, Tensor] = tuple(example)
    if about.names:
        given = dict(zip(about.names, example, strict=True))
    ranges = tuple(TensorConvergence(**r.model_dump()) for r in about.ranges)
    summary = CalibrationSummary(
        about.samples, about.batches, about.rebatched, about.unused, ranges
    )
    return Recorded(os.fspath(path), summary, given, calls, about.dynamic_batch, statistics, about)


def _inputs(record: Mapping[str, Tensor], name: str, count: int) -> list[Tensor]:
    return [record[f"{name}.{index}"] for index in range(count)]


def _weights(exported: GraphModule) -> dict[str, str]:
    return {
        name: fingerprint([value])
        for name, value in exported.state_dict().items()
        if isinstance(value, Tensor)
    }


def _described(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


def _code(line: str | None) -> str:
    return "no further op" if line is None else repr(line.split(";")[0].strip())
