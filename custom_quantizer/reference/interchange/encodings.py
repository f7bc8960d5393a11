"""Scales and zero points of a graph, taken along to other tools and brought in from them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.observers import WeightObserver
from custom_quantizer.calibration.settling import settle_scales
from custom_quantizer.calibration.statistics import (
    Observed,
    activation_observers,
    observers_by_name,
    set_ranges,
    set_weight_scales,
    weight_observers,
)
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.formats import range_bits
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    constant_of,
    is_constant,
    is_dequantize,
    is_quantize,
    is_static,
    qparams_of,
    source_of,
)
from custom_quantizer.core.rewriting import is_inner
from custom_quantizer.errors import CalibrationError, InputError, SchemeError, nearest, some
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.interchange.encoding_file import (
    Encoding,
    EncodingFile,
    Version,
    read_encodings,
    write_encodings,
)
from custom_quantizer.reference.interchange.names import (
    holds_integers,
    parameter_name,
    tensor_name,
)

__all__ = ["EncodingSummary", "load_encodings", "save_encodings"]

_NUMBER = re.compile(r"#([2-9]|[1-9][0-9]{1,5})$")


@dataclass(frozen=True)
class EncodingSummary:
    """What was written, or supplied to a graph.

    Attributes:
        activations: names of tensors, in the order of the file.
        weights: likewise.
        missing: quantized tensors of the graph of which the file says nothing.
        ignored: tensors of the file that this graph does not quantize, or, as biases, derives.
    """

    activations: tuple[str, ...]
    weights: tuple[str, ...]
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.activations)} activations, {len(self.weights)} weights"
        if self.missing:
            text += f"; not in the file: {some(self.missing)}"
        return text + (f"; ignored: {some(self.ignored)}" if self.ignored else "")


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def save_encodings(
    model: GraphModule, path: str | os.PathLike[str], *, version: Version = "1.0.0"
) -> EncodingSummary:
    """Write scales and zero points as a file of encodings in AIMET's format.

    Activations go by the nodes that make them, weights by their paths in ``state_dict``. A tensor
    that is rounded to several formats has ``#2`` behind its name from the second on. Biases are not
    in the file: their scales follow from the others.

    Args:
        model: a prepared graph that was calibrated, or what ``convert_pt2e`` made of it. Conversion
            loses the names of constant operands (a position embedding): the summary of a converted
            graph has them in ``missing``.
        path: usually ends in ``.encodings`` or ``.json``.
        version: of the format: ``1.0.0`` or ``0.6.1``.

    Returns:
        What is in the file, and what is not.

    Raises:
        CalibrationError: an observer of a prepared graph saw no data.
        ConversionError: ``model`` is neither.
        InputError: there is no such version, weights have groups and the version has none, or the
            file cannot be written.
    """
    if version not in get_args(Version):
        raise InputError(
            f"encodings are of version {' or '.join(get_args(Version))}, not {version!r}"
        )
    converted = isinstance(model, GraphModule) and any(map(is_dequantize, model.graph.nodes))
    file, missing = _of_converted(model) if converted else (_of_prepared(model), ())
    write_encodings(path, file, version)
    return EncodingSummary(tuple(sorted(file.activations)), tuple(sorted(file.parameters)), missing)


def _of_prepared(prepared: GraphModule) -> EncodingFile:
    activations: dict[str, Encoding] = {}
    settle_scales(prepared)
    for observed in activation_observers(prepared):
        for tensor in observed.tensors:
            _add(activations, _of_qparams(tensor, observed.observer.qparams()))
    weights = {
        name: _of_scales(
            name,
            observer.scheme.format.bits,
            observer.scale(attrgetter(name)(prepared)),
            observer.scheme.group_size,
        )
        for name, observer in weight_observers(prepared).items()
    }
    return EncodingFile(activations, weights)


def _of_converted(model: GraphModule) -> tuple[EncodingFile, tuple[str, ...]]:
    read_converted(model, None)  # raises what has to be said about other graphs
    activations: dict[str, Encoding] = {}
    weights: dict[str, Encoding] = {}
    missing: list[str] = []
    inner: list[Encoding] = []
    for node in model.graph.nodes:
        if is_quantize(node) and is_static(node):
            made = _of_qparams(tensor_name(node), qparams_of(model, node))
            if is_inner(source_of(node)):
                inner.append(made)
            else:
                _add(activations, made)
        elif (is_dequantize(node) or node.target is DEQUANTIZE_GROUPED) and is_constant(
            node.args[0]
        ):
            constant = cast(Node, node.args[0])
            if not holds_integers(constant):
                missing.append(parameter_name(constant))
            elif constant_of(model, constant).dtype is not torch.int32:
                name = parameter_name(constant)
                weights[name] = _of_weight(model, node, name)
    # A part of a rewritten call has a range of its own, or that of the call.
    known = {(e.scales, e.zero_points, e.bits) for e in activations.values()}
    for made in inner:
        if (made.scales, made.zero_points, made.bits) not in known:
            _add(activations, made)
    return EncodingFile(activations, weights), tuple(missing)


def _add(activations: dict[str, Encoding], made: Encoding) -> None:
    """Under its name, or with a number behind it where another format of the tensor has it."""
    name, number = made.name, 1
    while name in activations:
        known = activations[name]
        if (known.bits, known.scales, known.zero_points) == (
            made.bits,
            made.scales,
            made.zero_points,
        ):
            return
        number += 1
        name = f"{made.name}#{number}"
    activations[name] = Encoding(name, made.bits, made.symmetric, made.scales, made.zero_points)


def _of_qparams(name: str, qparams: QParams) -> Encoding:
    point = qparams.zero_point
    return Encoding(name, qparams.bits, point == 0, (cast(float, qparams.scale),), (point,))


def _of_weight(model: GraphModule, node: Node, name: str) -> Encoding:
    if node.target is DEQUANTIZE_GROUPED:
        _, block, scale, _, _, low, high = node.args[:7]
        bits = range_bits(cast(int, low), cast(int, high))
        size = int(cast("list[int]", block)[1])
        return _of_scales(name, bits, constant_of(model, cast(Node, scale)), size)
    qparams = qparams_of(model, node)
    return _of_scales(name, qparams.bits, torch.as_tensor(qparams.scale), None)


def _of_scales(name: str, bits: int, scales: Tensor, block_size: int | None) -> Encoding:
    values = tuple(scales.to(torch.float32).flatten().tolist())
    return Encoding(name, bits, True, values, (0,) * len(values), block_size, scales.dim() == 1)


# ---------------------------------------------------------------------------------------------
# Supplying
# ---------------------------------------------------------------------------------------------


def load_encodings(
    prepared: GraphModule,
    path: str | os.PathLike[str],
    *,
    names: Mapping[str, str] | None = None,
) -> EncodingSummary:
    """Supply the scales and zero points of a file to a prepared graph, and freeze them.

    Integers of weights and biases follow from them at conversion. Tensors of which the file says
    nothing keep following the data.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated or not.
        path: a file of version 1.0.0 or 0.6.1.
        names: what tensors of the file are called in the graph, where that differs.

    Returns:
        What was supplied, what the file says nothing of, and what of it was not needed.

    Raises:
        CalibrationError: ``prepared`` is not that; a tensor of the file is not in the graph, or has
            another width, granularity or symmetry there. Nothing was changed.
        InputError: the file cannot be read; see
            :func:`~custom_quantizer.reference.interchange.encoding_file.read_encodings`.
    """
    file = read_encodings(path)
    graph = _Graph(prepared)
    names = dict(names or {})
    if unknown := sorted(names.keys() - {*file.activations, *file.parameters, *file.floating}):
        raise InputError(
            f"{path} has no tensor {unknown[0]}"
            f"{nearest(unknown[0], sorted({*file.activations, *file.parameters}))}"
        )
    ranges: dict[str, QParams] = {}
    scales: dict[str, Tensor] = {}
    activations: list[str] = []
    strange: list[str] = []
    ignored: list[str] = []
    entries = [*file.parameters.values(), *file.activations.values()]
    for entry in entries:
        name = names.get(entry.name, entry.name)
        weight = graph.weights.get(_flat(name))
        observed = graph.observed(name, entry)
        if weight is not None:
            scales[weight] = _weight_scale(
                attrgetter(weight)(prepared), graph.observers[weight], entry
            )
        elif observed is not None:
            # Several tensors may share a range.
            qparams = graph.qparams(observed, entry)
            if ranges.setdefault(observed, qparams) != qparams:
                raise CalibrationError(
                    f"{path}: {name} shares its range with {observed}, for which the file has "
                    "another one"
                )
            activations.append(name)
        elif graph.knows(name):
            ignored.append(name)
        else:
            strange.append(name)
    if strange:
        raise CalibrationError(
            f"{path} has {len(strange)} tensors that the graph does not have: {some(strange)}"
            f"{nearest(strange[0], graph.all_names())}; name them with names={{theirs: ours}}"
        )
    before = {name: graph.observers[name].supplied_scale for name in scales}
    set_weight_scales(prepared, scales)
    try:
        set_ranges(prepared, ranges)
    except CalibrationError:
        set_weight_scales(prepared, before)
        raise
    missing = [name for name in graph.named if name not in ranges]
    missing += [name for name in graph.observers if name not in scales]
    return EncodingSummary(tuple(activations), tuple(scales), tuple(missing), tuple(ignored))


def _flat(name: str) -> str:
    """A path without its dots, which conversion writes as ``_``."""
    return name.replace(".", "_")


class _Graph:
    """What a prepared graph calls its tensors."""

    def __init__(self, prepared: GraphModule) -> None:
        self.named: dict[str, Observed] = observers_by_name(prepared)
        self.observers: dict[str, WeightObserver] = weight_observers(prepared)
        self.weights = {_flat(name): name for name in self.observers}
        self._nodes = {node.name for node in prepared.graph.nodes}
        self._constants = {_flat(name) for name in prepared.state_dict()}

    def all_names(self) -> list[str]:
        """For suggestions."""
        tensors = (tensor for observed in self.named.values() for tensor in observed.tensors)
        return sorted({*self.observers, *self.named, *tensors})

    def knows(self, name: str) -> bool:
        """Whether it is a tensor, though not one that has encodings here."""
        return name in self._nodes or _flat(name) in self._constants

    def observed(self, name: str, entry: Encoding) -> str | None:
        """The observer of a tensor: by its name among all, or the one of this width."""
        if name in self.named and self._bits(name) == entry.bits:
            return name
        found = _NUMBER.search(name)
        tensor = name if found is None else name[: found.start()]
        watching = [key for key, observed in self.named.items() if tensor in observed.tensors]
        fitting = [key for key in watching if self._bits(key) == entry.bits]
        if len(fitting) > 1 and found is not None and int(found[1]) <= len(watching):
            return watching[int(found[1]) - 1]
        if fitting:
            return fitting[0]
        if watching:
            widths = sorted({self._bits(key) for key in watching})
            raise CalibrationError(
                f"{name} has {entry.bits} bits in the file and {' or '.join(map(str, widths))} in "
                "the graph; choose the scheme of that width for the ops that read it"
            )
        return None

    def _bits(self, name: str) -> int:
        return self.named[name].observer.scheme.format.bits

    def qparams(self, name: str, entry: Encoding) -> QParams:
        """Of the format that the observer has."""
        observer = self.named[name].observer
        if len(entry.scales) > 1:
            raise CalibrationError(
                f"{entry.name} has {len(entry.scales)} scales in the file; an activation has one"
            )
        try:
            return QParams(
                float(np.float32(entry.scales[0])),
                entry.zero_points[0],
                observer.quant_min,
                observer.quant_max,
            )
        except SchemeError as error:
            raise CalibrationError(f"{entry.name}: {error}") from error


def _weight_scale(weight: Tensor, observer: WeightObserver, entry: Encoding) -> Tensor:
    """The scales of a weight as its observer takes them."""
    bits, group = observer.scheme.format.bits, observer.scheme.group_size
    if entry.bits != bits:
        raise CalibrationError(
            f"{entry.name} has {entry.bits} bits in the file and {bits} in the graph; choose the "
            "scheme of that width"
        )
    if any(entry.zero_points):
        raise CalibrationError(
            f"{entry.name} has a zero point other than 0 in the file; weights are symmetric here"
        )
    if entry.block_size != group and entry.block_size is not None:
        raise CalibrationError(
            f"{entry.name} has a scale for {entry.block_size} input channels in the file, and one "
            f"for {group or 'all'} in the graph"
        )
    wanted = observer.scale(weight).shape
    if wanted.numel() != len(entry.scales):
        raise CalibrationError(
            f"{entry.name} has {len(entry.scales)} scales in the file and {wanted.numel()} in the "
            f"graph ({observer.scheme.granularity}); choose a scheme of that granularity"
        )
    return torch.tensor(entry.scales, dtype=torch.float32).reshape(wanted)
