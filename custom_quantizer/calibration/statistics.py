"""Calibration statistics of a whole model: save, load, merge, add up over ranks, solve again.

Statistics belong to tensors, which are named by the nodes of the captured graph that produce
them. A model prepared with other formats or another observer therefore takes the same file, and
solves for its scales without new data::

    save_statistics(prepared, "calibration.safetensors")
    ...
    prepared = prepare_pt2e(gm, IntegerQuantizer().set_global("a4w4-histogram"))
    load_statistics(prepared, "calibration.safetensors")
    converted = convert_pt2e(prepared)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add, attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, distributed
from torch.fx import GraphModule, Node

from custom_quantizer.calibration.joins import joined_observers
from custom_quantizer.calibration.observers import (
    ActivationObserver,
    WeightObserver,
    activation_observer,
)
from custom_quantizer.calibration.ranges import BINS, Kind, Statistics
from custom_quantizer.calibration.settling import settle_scales
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.checkpoint import part_of
from custom_quantizer.core.rewriting import is_inner
from custom_quantizer.core.tensor_file import read_tensors, write_tensors
from custom_quantizer.errors import CalibrationError, InputError, SchemeError, nearest
from custom_quantizer.ops.rewrites.training_graph import dropouts_behind, planned_tensor

__all__ = [
    "FORMAT_VERSION",
    "Entry",
    "FrozenRange",
    "ModelStatistics",
    "Observed",
    "activation_observers",
    "all_reduce_statistics",
    "freeze_ranges",
    "load_statistics",
    "merge_statistics",
    "observers_by_name",
    "read_recorded",
    "read_statistics",
    "record_counts",
    "reset_statistics",
    "save_statistics",
    "set_ranges",
    "set_weight_scales",
    "solved_qparams",
    "statistics_of",
    "weight_observers",
]

logger = logging.getLogger(__name__)

FORMAT = "custom_quantizer.statistics"
"""Key of the version in the metadata of a statistics file."""

FORMAT_VERSION = 4
"""The newest version of the file format that is read. 1 has no SHA-256; 3 is written where ranges
are frozen, which 2 does not know; 4 where a record of model and data comes along."""

RECORD = "#"
"""Names in a record begin with it, which no node's name does."""

MOST_COUNTED = 8192
"""Entries with counts that a file may have: each takes half a megabyte in memory."""

_MOST_VALUES = 2**46  # so that sums over all bins stay below 2**63

_MOVES = frozenset(
    {
        torch.ops.aten.permute.default,
        torch.ops.aten.reshape.default,
        torch.ops.aten.squeeze.dim,
        torch.ops.aten.unsqueeze.default,
    }
)
"""Moves that rewrites put in; their values are those of their input, each once."""

Source: TypeAlias = "str | os.PathLike[str] | ModelStatistics | GraphModule"
"""Where statistics come from: a file, an object, or a prepared model."""


# -- observers of a prepared model --------------------------------------------------------------


@dataclass(frozen=True)
class Observed:
    """An observer of a prepared model and what it watches.

    Attributes:
        tensors: names of the nodes whose outputs it sees, sorted; several where tensors share
            their quantization parameters.
        observer: the module.
    """

    tensors: tuple[str, ...]
    observer: ActivationObserver

    @property
    def name(self) -> str:
        """The tensors' names, joined by ``+``."""
        return "+".join(self.tensors)


def activation_observers(prepared: GraphModule, *, unread: bool = False) -> tuple[Observed, ...]:
    """The observers of activations, in graph order, without those that act at run time.

    Args:
        prepared: what ``prepare_pt2e`` returns.
        unread: also those of tensors that are float by now, as integers would be too coarse
            (:mod:`custom_quantizer.calibration.exponents`).

    Raises:
        CalibrationError: ``prepared`` is not what ``prepare_pt2e`` returns.
    """
    if not isinstance(prepared, GraphModule):
        raise CalibrationError(
            f"expected what prepare_pt2e returns, got {type(prepared).__name__}: call "
            "prepare_pt2e(exported.module(), quantizer) first"
        )
    tensors: dict[ActivationObserver, set[str]] = {}
    inner: set[str] = set()
    for node in prepared.graph.nodes:
        observer = activation_observer(prepared, node)
        if observer is not None and not observer.is_dynamic and (unread or node.users):
            source = node.args[0]
            # Where it was requantized for one of its users, another observer stands before.
            while activation_observer(prepared, source) is not None:
                source = source.args[0]
            names = tensors.setdefault(observer, set())
            planned = _before_moves(prepared, planned_tensor(source))
            names.add(planned.name)
            if is_inner(planned):
                inner.add(planned.name)
            names.update(dropped.name for dropped in dropouts_behind(node))
    if not tensors:
        raise CalibrationError(
            "the graph has no observers of activations: pass what prepare_pt2e returns, before "
            "convert_pt2e, with at least one statically quantized op"
        )
    # A captured call goes by one name, however many it was rewritten to: that depends on shapes.
    return tuple(
        Observed(tuple(sorted(names - inner or names)), observer)
        for observer, names in tensors.items()
    )


def _before_moves(prepared: GraphModule, node: Node) -> Node:
    """The tensor of the captured graph whose values ``node`` holds, where a rewrite moved them."""
    while is_inner(node) and node.target in _MOVES:
        source = cast(Node, node.args[0])
        while activation_observer(prepared, source) is not None:
            source = cast(Node, source.args[0])
        node = planned_tensor(source)
    return node


def record_counts(prepared: GraphModule) -> None:
    """Count values also where the observer of the scheme needs only the extremes.

    Statistics with counts can be solved again by any observer but ``moving_average``. To be
    called before calibrating; costs half a megabyte for each observer.

    Raises:
        CalibrationError: values were seen already, or an observer averages.
    """
    for observed in activation_observers(prepared):
        observed.observer.record_counts()


def reset_statistics(prepared: GraphModule) -> None:
    """Forget all that was seen, for instance after calibration was stopped by bad data."""
    for observed in activation_observers(prepared, unread=True):
        observed.observer.forget()


def solved_qparams(prepared: GraphModule) -> dict[str, QParams]:
    """Scale and zero point of every observer that saw data or whose range is frozen.

    Returns:
        By the names of the observed tensors, joined by ``+``; where several observers watch the
        same tensors, with ``#2``, ``#3``, ... behind the name from the second on.
    """
    return {
        name: observed.observer.qparams()
        for name, observed in observers_by_name(prepared).items()
        if observed.observer.count > 0 or observed.observer.frozen
    }


def observers_by_name(prepared: GraphModule) -> dict[str, Observed]:
    """Observers by the names of their tensors, as :func:`solved_qparams` says."""
    named: dict[str, Observed] = {}
    for observed in activation_observers(prepared):
        name, number = observed.name, 1
        while name in named:
            number += 1
            name = f"{observed.name}#{number}"
        named[name] = observed
    return named


# -- frozen ranges ------------------------------------------------------------------------------


def freeze_ranges(prepared: GraphModule, frozen: bool = True) -> None:
    """Keep scale and zero point of every activation as they are, or let them follow the data again.

    Raises:
        CalibrationError: ``prepared`` is not what ``prepare_pt2e`` returns, or an observer never
            saw data; nothing was changed.
    """
    if frozen:
        settle_scales(prepared)
    observers = [observed.observer for observed in activation_observers(prepared)]
    if not frozen:
        for observer in observers:
            observer.unfreeze()
        return
    chosen = [observer.qparams() for observer in observers]
    for observer, qparams in zip(observers, chosen, strict=True):
        observer.freeze(qparams)


def set_ranges(prepared: GraphModule, ranges: Mapping[str, QParams]) -> None:
    """Supply scale and zero point of activations, and freeze them.

    What is derived follows: conversion takes the int32 biases from the supplied scales. Tensors
    that share an observer share the range.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated or not.
        ranges: by a name of :func:`solved_qparams`, or that of one of its tensors where only one
            observer watches it.

    Raises:
        CalibrationError: a name is not that of an observed tensor, or of several observers; two
            ranges are given for one observer; or a range is not one of its format. Nothing was
            changed.
    """
    named = observers_by_name(prepared)
    single: dict[str, list[Observed]] = {}
    for observed in named.values():
        for tensor in observed.tensors:
            single.setdefault(tensor, []).append(observed)
    chosen: dict[ActivationObserver, QParams] = {}
    for name, qparams in ranges.items():
        found = [named[name]] if name in named else single.get(name, [])
        if not found:
            raise CalibrationError(
                f"{name} is no observed tensor{nearest(name, sorted({*named, *single}))}"
            )
        if len(found) > 1:
            several = [key for key, value in named.items() if value in found]
            raise CalibrationError(
                f"{name} is watched by {len(found)} observers; name one: {_listed(several)}"
            )
        if not isinstance(qparams, QParams):
            raise CalibrationError(
                f"{name}: a range is a custom_quantizer.QParams, not {type(qparams).__name__}: "
                "QParams(scale, zero_point, quant_min, quant_max)"
            )
        observer = found[0].observer
        if chosen.setdefault(observer, qparams) != qparams:
            raise CalibrationError(
                f"{name} shares its range with {found[0].name}, for which another one is supplied "
                "too; supply one of them"
            )
    before = {observer: (observer.frozen_scale, observer.frozen_zero_point) for observer in chosen}
    try:
        for observer, qparams in chosen.items():
            observer.freeze(qparams)
    except CalibrationError:
        for observer, (scale, zero_point) in before.items():
            observer.frozen_scale, observer.frozen_zero_point = scale, zero_point
        raise


def weight_observers(prepared: GraphModule) -> dict[str, WeightObserver]:
    """The observers of weights by the name of the weight in ``state_dict``, in graph order.

    Raises:
        CalibrationError: ``prepared`` is not what ``prepare_pt2e`` returns.
    """
    activation_observers(prepared)  # raises what has to be said about other things
    return {
        str(cast(Node, node.args[0]).target): module
        for node in prepared.graph.nodes
        if node.op == "call_module"
        and isinstance(module := prepared.get_submodule(str(node.target)), WeightObserver)
    }


def set_weight_scales(prepared: GraphModule, scales: Mapping[str, Tensor | None]) -> None:
    """Supply scales of weights; integers and derived biases follow from them at conversion.

    Args:
        prepared: what ``prepare_pt2e`` returns.
        scales: by the name of the weight in ``state_dict``; see
            :meth:`~custom_quantizer.calibration.observers.WeightObserver.set_scale`.

    Raises:
        CalibrationError: there is no such quantized weight, or a scale does not fit it; nothing was
            changed.
    """
    known = weight_observers(prepared)
    for name in scales:
        if name not in known:
            raise CalibrationError(
                f"{name} is no quantized weight of the graph{nearest(name, sorted(known))}"
            )
    before = {name: known[name].supplied_scale for name in scales}
    try:
        for name, scale in scales.items():
            known[name].set_scale(scale)
            known[name].scale(attrgetter(name)(prepared))
    except CalibrationError:
        for name, scale in before.items():
            known[name].supplied_scale = scale
        raise


# -- statistics of a model ----------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Statistics recorded together.

    Attributes:
        tensors: names of the nodes, sorted.
        statistics: of all their values together.
    """

    tensors: tuple[str, ...]
    statistics: Statistics

    @property
    def key(self) -> tuple[tuple[str, ...], Kind]:
        """What must agree for two entries to be added."""
        return self.tensors, self.statistics.kind


@dataclass(frozen=True)
class FrozenRange:
    """A frozen range.

    Attributes:
        tensors: names of the nodes that have it, sorted.
        qparams: scale, zero point and integers.
    """

    tensors: tuple[str, ...]
    qparams: QParams

    @property
    def key(self) -> tuple[tuple[str, ...], int, int]:
        """Tensors and format: a tensor may be quantized to several."""
        return self.tensors, self.qparams.quant_min, self.qparams.quant_max


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of the activations of a model.

    Attributes:
        entries: sorted by :attr:`Entry.key`, each key once.
        frozen: ranges that do not follow from them, sorted by :attr:`FrozenRange.key`.
    """

    entries: tuple[Entry, ...]
    frozen: tuple[FrozenRange, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(name for entry in self.entries for name in entry.tensors)

    def recorded_with(self, tensors: Iterable[str]) -> set[str]:
        """What some tensors were recorded together with, and in no other way."""
        wanted = set(tensors)
        alone = {n for e in self.entries if wanted.issuperset(e.tensors) for n in e.tensors}
        left = wanted - alone
        entries = [entry.tensors for entry in self.entries if left.intersection(entry.tensors)]
        return {name for names in entries for name in names} - wanted

    def for_tensors(self, tensors: tuple[str, ...], kind: Kind) -> Statistics:
        """What is known of the values of several tensors together.

        Entries are added where tensors were recorded apart.

        Args:
            tensors: names.
            kind: the least that must be known.

        Raises:
            CalibrationError: tensors are missing, were recorded together with others, or too
                little was recorded of them.
        """
        wanted = set(tensors)
        missing = wanted - self.tensors
        if missing:
            hints = "".join(nearest(name, sorted(self.tensors)) for name in sorted(missing)[:1])
            raise CalibrationError(f"no statistics of {_listed(missing)}{hints}")
        chosen: list[Entry] = []
        inside = [entry for entry in self.entries if wanted.issuperset(entry.tensors)]
        # The largest first: what is part of one chosen already would be counted twice.
        for entry in sorted(inside, key=lambda e: (-len(e.tensors), _preference(e, kind))):
            if not any(set(entry.tensors) & set(other.tensors) for other in chosen):
                chosen.append(entry)
        left = wanted - {name for entry in chosen for name in entry.tensors}
        if left:
            raise CalibrationError(
                f"statistics of {_listed(left)} were recorded together with "
                f"{_listed(self.recorded_with(wanted))}, which have a scale of their own "
                "here; calibrate again"
            )
        try:
            return reduce(add, (e.statistics for e in chosen)).as_kind(kind)
        except CalibrationError as error:
            raise CalibrationError(f"{_listed(wanted)}: {error}") from error


def _preference(entry: Entry, kind: Kind) -> int:
    order: tuple[Kind, ...] = ("average",) if kind == "average" else ("counts", "range")
    return order.index(entry.statistics.kind) if entry.statistics.kind in order else len(order)


def _listed(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    text = ", ".join(ordered[:most])
    return f"{text} and {len(ordered) - most} more" if len(ordered) > most else text


def statistics_of(prepared: GraphModule) -> ModelStatistics:
    """A copy of what the observers of a prepared model recorded.

    Raises:
        CalibrationError: ``prepared`` is not what ``prepare_pt2e`` returns.
    """
    entries, frozen = {}, {}
    for observed in activation_observers(prepared, unread=True):
        entry = Entry(observed.tensors, observed.observer.statistics)
        # Two formats of one tensor see the same values.
        entries[entry.key] = entry
        if observed.observer.frozen:
            kept = FrozenRange(observed.tensors, observed.observer.qparams())
            frozen[kept.key] = kept
    return _sorted(entries, frozen)


def _sorted(
    entries: Mapping[Any, Entry], frozen: Mapping[Any, FrozenRange] | None = None
) -> ModelStatistics:
    frozen = frozen or {}
    return ModelStatistics(
        tuple(entries[key] for key in sorted(entries)),
        tuple(frozen[key] for key in sorted(frozen)),
    )


def _resolve(source: Source) -> ModelStatistics:
    if isinstance(source, ModelStatistics):
        return source
    return statistics_of(source) if isinstance(source, GraphModule) else read_statistics(source)


def merge_statistics(sources: Iterable[Source]) -> ModelStatistics:
    """Add up statistics of different data.

    The sum is exact and does not depend on the order of the sources.

    Args:
        sources: files, objects or prepared models, which recorded the same tensors and froze the
            same ranges, if any.

    Raises:
        CalibrationError: there are no sources, they recorded different tensors or froze different
            ranges, or one of them holds moving averages.
        InputError: a file cannot be read.
    """
    resolved = [_resolve(source) for source in sources]
    if not resolved:
        raise CalibrationError("there are no statistics to merge: pass at least one source")
    total = {entry.key: entry for entry in resolved[0]}
    for index, model in enumerate(resolved[1:], start=1):
        given = {entry.key: entry for entry in model}
        if different := total.keys() ^ given.keys():
            names = {f"{'+'.join(tensors)} ({kind})" for tensors, kind in different}
            raise CalibrationError(
                f"source {index} and source 0 recorded different things: only one of them has "
                f"{_listed(names)}; merge statistics of the same model, prepared with the same "
                "schemes"
            )
        for key, entry in given.items():
            total[key] = Entry(entry.tensors, total[key].statistics + entry.statistics)
        if model.frozen != resolved[0].frozen:
            raise CalibrationError(
                f"source {index} and source 0 froze different ranges, of which there is no sum; "
                "merge before freezing, or unfreeze them"
            )
    return _sorted(total, {kept.key: kept for kept in resolved[0].frozen})


def load_statistics(prepared: GraphModule, source: Source) -> None:
    """Replace what the observers of a prepared model have seen.

    The model may have been prepared with other formats or another observer than the one that
    recorded the statistics, provided that they hold what the observer needs. Frozen ranges are
    those of one format: a tensor that has another one here follows its statistics, and a warning
    says how many do.

    Args:
        prepared: what ``prepare_pt2e`` returns.
        source: a file, an object, or another prepared model.

    Raises:
        CalibrationError: statistics of a tensor are missing (the nearest names are given) or hold
            too little; nothing was changed.
        InputError: the file cannot be read.
    """
    given = _resolve(source)
    observers = activation_observers(prepared, unread=True)
    needed = {name for observed in observers for name in observed.tensors}
    if missing := needed - given.tensors:
        examples = "".join(
            f"; {name}{nearest(name, sorted(given.tensors)).removeprefix(';')}"
            for name in sorted(missing)[:3]
            if nearest(name, given.tensors)
        )
        raise CalibrationError(
            f"the statistics do not fit the graph: {len(missing)} of its {len(needed)} observed "
            f"tensors are missing: {_listed(missing)}{examples}; load statistics of the same "
            "model, or calibrate again"
        )
    found = _found(given, prepared, observers)
    frozen = {kept.key: kept.qparams for kept in given.frozen}
    used = set()
    for observed, statistics in zip(observers, found, strict=True):
        observer = observed.observer
        observer.statistics = statistics
        observer.unfreeze()
        key = (observed.tensors, observer.quant_min, observer.quant_max)
        if key in frozen and not (observer.scheme.symmetric and frozen[key].zero_point):
            observer.freeze(frozen[key])
            used.add(key)
    if left := [tensors for tensors, *_ in frozen.keys() - used]:
        logger.warning(
            "%d of %d frozen ranges are of other formats than the graph has, or of tensors that "
            "share theirs with others here (%s); these tensors follow their statistics",
            len(left),
            len(frozen),
            _listed("+".join(tensors) for tensors in left),
        )


def _found(
    given: ModelStatistics, prepared: GraphModule, observers: tuple[Observed, ...]
) -> list[Statistics]:
    """What is known of each observer's tensors.

    Parts of a join that were recorded together with it are known as all of it: conversion gives
    them one scale then, as it did where they were recorded.
    """
    tensors = {observed.observer: observed.tensors for observed in observers}
    joined = joined_observers(prepared)
    found = []
    for observed in observers:
        names, together = observed.tensors, joined.get(observed.observer)
        if together is not None and given.recorded_with(names):
            wider = sorted({name for observer in together for name in tensors[observer]})
            names = names if given.recorded_with(wider) else tuple(wider)
        found.append(given.for_tensors(names, observed.observer.kind))
    return found


# -- files --------------------------------------------------------------------------------------


def save_statistics(
    source: GraphModule | ModelStatistics,
    path: str | os.PathLike[str],
    record: Mapping[str, Tensor] | None = None,
) -> None:
    """Write statistics to a ``.safetensors`` file, which holds numbers and names, no code.

    For each entry there are, under its tensors' names and kind, ``count`` (int64), ``range``
    (float32: low, high) and, with counts, ``bins`` (int32) and ``counts`` (int64) of the bins that
    are not empty; under ``frozen`` and the integers of a format ``scale`` (float32) and
    ``zero_point`` (int64); and the SHA-256 of all. Equal statistics give equal files.

    Args:
        source: statistics, or what ``prepare_pt2e`` returns.
        path: of the file.
        record: more tensors, which :func:`read_recorded` gives back, and which say nothing about
            ranges.

    Raises:
        CalibrationError: ``source`` is not what ``prepare_pt2e`` returns.
        InputError: the file cannot be written.
    """
    tensors = {RECORD + name: value for name, value in (record or {}).items()}
    given = _resolve(source)
    for entry in given:
        statistics = entry.statistics
        prefix = f"{'+'.join(entry.tensors)}/{statistics.kind}"
        tensors[f"{prefix}/count"] = torch.tensor(statistics.count, dtype=torch.int64)
        tensors[f"{prefix}/range"] = torch.tensor(
            [statistics.low, statistics.high], dtype=torch.float32
        )
        if statistics.counts is not None:
            bins = statistics.counts.nonzero().flatten()
            tensors[f"{prefix}/bins"] = bins.to(torch.int32)
            tensors[f"{prefix}/counts"] = statistics.counts[bins]
    for kept in given.frozen:
        q = kept.qparams
        prefix = f"{'+'.join(kept.tensors)}/frozen:{q.quant_min}:{q.quant_max}"
        tensors[f"{prefix}/scale"] = torch.tensor(q.scale, dtype=torch.float32)
        tensors[f"{prefix}/zero_point"] = torch.tensor(q.zero_point, dtype=torch.int64)
    # One key: the order of several would change from run to run.
    version = 4 if record else 3 if given.frozen else 2
    write_tensors(path, tensors, {FORMAT: str(version)})


def read_statistics(path: str | os.PathLike[str]) -> ModelStatistics:
    """Read what :func:`save_statistics` wrote, without its record.

    Raises:
        InputError: the file cannot be read, is no statistics file, is of a newer version, was
            changed after it was written, or holds what no calibration can give.
    """
    return read_recorded(path)[0]


def read_recorded(path: str | os.PathLike[str]) -> tuple[ModelStatistics, dict[str, Tensor]]:
    """Read what :func:`save_statistics` wrote, and the record, which is empty where none was given.

    Raises:
        InputError: as :func:`read_statistics`.
    """
    tensors, metadata, sealed = read_tensors(path)
    _check_format(path, metadata, sealed)
    record = part_of(tensors, RECORD)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(RECORD)}
    counted = sum(key.endswith("/counts/counts") for key in tensors)
    if counted > MOST_COUNTED:
        raise InputError(
            f"{path} has {counted:,} entries with counts, and at most {MOST_COUNTED:,} are read; "
            "check that it is the right file"
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        prefix, _, field = key.rpartition("/")
        groups.setdefault(prefix, {})[field] = value
    entries, frozen = {}, {}
    for prefix, fields in groups.items():
        try:
            if _FROZEN in prefix:
                kept = _frozen(prefix, fields)
                frozen[kept.key] = kept
                continue
            entry = _entry(prefix, fields)
        except (ValueError, SchemeError) as error:
            raise InputError(f"{path}: {prefix or 'a tensor without a name'}: {error}") from error
        entries[entry.key] = entry
    return _sorted(entries, frozen), record


def _check_format(path: str | os.PathLike[str], metadata: Mapping[str, str], sealed: bool) -> None:
    version = metadata.get(FORMAT, "")
    if not (version.isascii() and version.isdecimal() and len(version) < 9):
        raise InputError(
            f"{path} holds no calibration statistics: save_statistics did not write it"
        )
    if int(version) > FORMAT_VERSION:
        raise InputError(
            f"{path} has version {version} of the format; this installation reads up to "
            f"{FORMAT_VERSION}; update custom_quantizer"
        )
    if sealed != (int(version) > 1):
        raise InputError(
            f"{path} was changed after it was written: files have a SHA-256 from version 2 on"
        )


_FROZEN = "/frozen:"


def _frozen(prefix: str, fields: Mapping[str, Tensor]) -> FrozenRange:
    """One frozen range of a file; ValueError or SchemeError says what is wrong with it."""
    names, _, text = prefix.partition(_FROZEN)
    low, _, high = text.partition(":")
    if not names or fields.keys() != {"scale", "zero_point"}:
        raise ValueError("is not named as a frozen range")
    _check_dtypes(fields)
    if any(value.dim() for value in fields.values()):
        raise ValueError("scale or zero_point is no number")
    scale, zero_point = float(fields["scale"]), int(fields["zero_point"])
    return FrozenRange(tuple(names.split("+")), QParams(scale, zero_point, int(low), int(high)))


def _check_dtypes(fields: Mapping[str, Tensor]) -> None:
    for field, value in fields.items():
        if value.dtype != _DTYPES[field]:
            raise ValueError(f"{field} is {value.dtype}, not {_DTYPES[field]}")


_DTYPES = {
    "scale": torch.float32,
    "zero_point": torch.int64,
    "count": torch.int64,
    "range": torch.float32,
    "bins": torch.int32,
    "counts": torch.int64,
}


def _entry(prefix: str, fields: Mapping[str, Tensor]) -> Entry:
    """One entry of a file; ValueError says what is wrong with it."""
    names, _, kind_text = prefix.rpartition("/")
    kinds: dict[str, Kind] = {"range": "range", "counts": "counts", "average": "average"}
    if not names or kind_text not in kinds:
        raise ValueError("is not named as an entry of statistics")
    kind = kinds[kind_text]
    expected = {"count", "range"} | ({"bins", "counts"} if kind == "counts" else set())
    if fields.keys() != expected:
        raise ValueError(f"holds {_listed(fields)} instead of {_listed(expected)}")
    _check_dtypes(fields)
    if fields["count"].dim() or fields["range"].shape != (2,):
        raise ValueError("count is no number, or range no pair")
    count, (low, high) = int(fields["count"]), fields["range"].tolist()
    empty = count == 0 and (low, high) == (float("inf"), float("-inf"))
    if not empty and not (count > 0 and float("-inf") < low <= high < float("inf")):
        raise ValueError(f"{count} values from {low} to {high} are impossible")
    counts = None
    if kind == "counts":
        counts = _counts(fields["bins"], fields["counts"])
        if int(counts.sum()) != count:
            raise ValueError(f"the bins hold {int(counts.sum())} values instead of {count}")
    return Entry(tuple(names.split("+")), Statistics(kind, count, low, high, counts))


def _counts(bins: Tensor, values: Tensor) -> Tensor:
    if bins.dim() != 1 or bins.shape != values.shape:
        raise ValueError("bins and counts are no lists of the same length")
    magnitude = bins & 0x7FFF
    wrong = (bins < 0) | (bins >= BINS) | (magnitude >= 0x7F80) | (bins == 0x8000) | (values <= 0)
    if bool(wrong.any()) or bool((bins.diff() <= 0).any()):
        raise ValueError("bins are not those of finite values in ascending order, or counts of 0")
    if bool((values > _MOST_VALUES).any()):
        raise ValueError(f"a bin holds more than {_MOST_VALUES:,} values")
    counts = torch.zeros(BINS, dtype=torch.int64)
    counts[bins.long()] = values
    return counts


# -- ranks --------------------------------------------------------------------------------------


def all_reduce_statistics(
    prepared: GraphModule, group: distributed.ProcessGroup | None = None
) -> None:
    """Add up the statistics of all ranks, so that every rank has those of all data.

    Each rank calibrates an equal copy of the model on its share of the data (any sizes, also
    none), then all call this once. The sums are exact: scales and zero points are bit-identical to
    those of one process that saw all data.

    Args:
        prepared: what ``prepare_pt2e`` returns.
        group: the default process group unless given.

    Raises:
        CalibrationError: ``torch.distributed`` was not started, the ranks prepared different
            models, an observer averages, or the statistics were added up before. All ranks
            raise, or none does.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise CalibrationError(
            "no process group: start the script with torchrun and call "
            "torch.distributed.init_process_group('gloo') first"
        )
    observers = activation_observers(prepared, unread=True)
    _check_ranks(observers, group)
    nccl = distributed.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def reduced(values: Tensor, op: distributed.ReduceOp.RedOpType) -> Tensor:
        values = values.to(device, copy=True)
        distributed.all_reduce(values, op, group)
        return values.cpu()

    modules = [observed.observer for observed in observers]
    ops = distributed.ReduceOp
    lows = reduced(torch.stack([m.min_val for m in modules]), ops.MIN)
    highs = reduced(torch.stack([m.max_val for m in modules]), ops.MAX)
    sizes = reduced(torch.stack([m.count for m in modules]), ops.SUM)
    for module, low, high, size in zip(modules, lows, highs, sizes, strict=True):
        counts = None if module.counts is None else reduced(module.counts, ops.SUM)
        module.statistics = Statistics(module.kind, int(size), float(low), float(high), counts)
        module.reduced = True


def _check_ranks(observers: tuple[Observed, ...], group: distributed.ProcessGroup | None) -> None:
    """Refuse on all ranks what is wrong on one, since the others would wait for it."""
    mine = [(o.name, o.observer.kind, o.observer.reduced) for o in observers]
    every: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(every, mine, group)
    for rank, theirs in enumerate(cast("list[list[tuple[str, Kind, bool]]]", every)):
        if [entry[:2] for entry in theirs] != [entry[:2] for entry in every[0]]:
            differing = {f"{n} ({k})" for n, k, _ in {*theirs} ^ {*every[0]}}
            raise CalibrationError(
                f"rank {rank} and rank 0 observe different tensors: {_listed(differing)}; prepare "
                "the same model with the same schemes on all ranks"
            )
        for name, kind, was_reduced in theirs:
            if kind == "average":
                raise CalibrationError(
                    f"{name}: moving averages depend on the order of the batches and cannot be "
                    "added up; use another observer"
                )
            if was_reduced:
                raise CalibrationError(
                    f"{name}: its statistics on rank {rank} are already those of all ranks, which "
                    "would be counted again; call all_reduce_statistics once, after calibrating"
                )
