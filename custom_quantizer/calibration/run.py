"""Running data through a prepared model, so that its observers see the ranges of its tensors.

Any iterable of batches will do. What a batch holds is fitted to what the graph takes: labels are
set aside, dictionaries are sorted by argument name, and where only the size of the batch is not
that of the graph, samples are split or put together until it is.

While data runs through, :mod:`custom_quantizer.calibration.convergence` notes which ranges still
move, and :mod:`custom_quantizer.calibration.checkpoint` writes down how far it came.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.calibration.checkpoint import Checkpoint, Position
from custom_quantizer.calibration.convergence import (
    RangeConvergence,
    TensorConvergence,
    WatchPoint,
    observed_tensors,
    plot_watched,
)
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.unread_rows import UnreadRows, unread_rows
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.formats import dtype_name
from custom_quantizer.core.graph import (
    STATE_KEY,
    is_observer,
    set_state,
    size_bounds,
    state_kept,
    tensor_meta,
)
from custom_quantizer.core.progress import track
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import CalibrationError, CustomQuantizerError, first_line, some

__all__ = [
    "CalibrationSummary",
    "GraphInput",
    "GraphInputs",
    "TensorConvergence",
    "WatchPoint",
    "calibrate",
    "restore_state",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSummary:
    """What a prepared model was shown.

    Attributes:
        samples: samples that went through the model.
        batches: calls of the model.
        rebatched: whether samples were put into batches of another size than they came in.
        unused: samples left over because they did not fill the last batch of a static graph.
        tensors: for each observed tensor, its range and the last batch that moved it.
        watched: range and scale of the watched tensors after each batch.
        resumed: samples that had been seen before a checkpoint was resumed; ``samples`` and
            ``batches`` include them.
        unread: tables with rows that no sample read, and that the ranges would cut off.
    """

    samples: int
    batches: int
    rebatched: bool = False
    unused: int = 0
    tensors: tuple[TensorConvergence, ...] = field(default=(), compare=False)
    watched: tuple[WatchPoint, ...] = field(default=(), compare=False)
    resumed: int = field(default=0, compare=False)
    unread: tuple[UnreadRows, ...] = field(default=(), compare=False)

    @property
    def last_change(self) -> int | None:
        """The last batch, counted from 1, that moved any range; ``None`` where none was noted."""
        return max((tensor.last_change for tensor in self.tensors), default=None)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at: tensors of whose range the data say too little."""
        zero = [tensor.name for tensor in self.tensors if tensor.low == tensor.high == 0]
        warnings = []
        if zero:
            warnings.append(
                f"calibration: {len(zero)} of {len(self.tensors)} tensors were 0 in all samples, "
                f"so nothing is known of their ranges: {some(zero)}; check the data, or calibrate "
                "with more"
            )
        if self.unread:
            warnings.append(
                "calibration: no sample read the rows of a table that hold its larger values, "
                f"which are cut off if the device reads them: {some([*map(str, self.unread)])}; "
                "calibrate with data that reads all rows (every position, every token)"
            )
        return tuple(warnings)

    def __str__(self) -> str:
        text = f"{self.samples:,} samples in {self.batches:,} batches"
        if self.unused:
            text += f"; {self.unused} left over, too few for a batch"
        if self.last_change is not None:
            text += f"; ranges last moved in batch {self.last_change:,}"
            moving = sum(tensor.last_change == self.batches for tensor in self.tensors)
            if self.batches > 1 and moving:
                text += f" ({moving} of {len(self.tensors)} still moved: more data may help)"
        return text

    def convergence(self) -> str:
        """A table of tensor, range and last batch that moved it, the last to converge first."""
        rows = [("tensor", "minimum", "maximum", "last moved in batch")]
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.last_change):
            last = f"{tensor.last_change:,} of {self.batches:,}"
            rows.append((tensor.name, f"{tensor.low:.5g}", f"{tensor.high:.5g}", last))
        return "\n".join(table_lines(rows))

    def settling(self) -> str:
        """:meth:`convergence`, by its first name."""
        return self.convergence()

    def plot_watch(self, path: str | os.PathLike[str]) -> None:
        """Draw range and scale of the watched tensors over the batches; needs matplotlib.

        Args:
            path: of the picture; its suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.

        Raises:
            CalibrationError: nothing was watched.
            InputError: matplotlib is missing, or the file cannot be written.
        """
        if not self.watched:
            raise CalibrationError("no tensor was watched: pass watch= to calibrate")
        plot_watched(self.watched, path)


def calibrate(
    prepared: GraphModule,
    data: object,
    *,
    limit: int | None = None,
    watch: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool | None = None,
) -> CalibrationSummary:
    """Run ``data`` through ``prepared`` without gradients.

    Where a model writes its buffers (counters, caches, recurrent state), the data are one stream,
    as they are for a program on a device: each batch finds what the one before left. Afterwards
    the buffers hold again what they held before the call, so that the program starts with that,
    and so does another call: calibrate independent sequences one call each.

    Args:
        prepared: what ``prepare_pt2e`` returns.
        data: an iterable of batches, such as a list, a generator, a ``DataLoader`` or a
            :class:`~custom_quantizer.app.data.DataSource`; or one tensor, which is one batch. A
            batch is a tensor; a tuple or list of what the graph takes; a dictionary by argument
            name; or a pair of any of these and labels.
        limit: use at most that many samples, the first ones.
        watch: print range, scale and zero point of a tensor after each batch, to see it converge:
            the name of its node in the graph, or the path of the module it comes from; globs
            select several.
        checkpoint: a file that keeps what was measured. If it exists, calibration goes on where
            it stopped: the same data in the same order must be given again, and those seen
            already are read but not run. It stays when calibration is done.
        checkpoint_every: batches between two writes of the checkpoint; it is also written at the
            end.
        progress: True shows a bar, None does so at a terminal.

    Returns:
        What was seen.

    Raises:
        CalibrationError: there are no data, or fewer than one batch of a static graph; a batch
            does not hold what the graph takes; a value is NaN or infinite (the message names the
            batch and the op); no tensor has the name to watch; the checkpoint is of another model,
            of other data, or is no checkpoint.
        InputError: the checkpoint cannot be read or written.
    """
    _check_prepared(prepared)
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit={limit}: calibration needs at least one sample")
    if checkpoint_every < 1:
        raise CalibrationError(f"checkpoint_every={checkpoint_every}: it counts batches, from 1")
    with state_kept(prepared):
        return _calibrate(prepared, data, limit, watch, checkpoint, checkpoint_every, progress)


def restore_state(model: GraphModule) -> None:
    """Give buffers that a model writes what they held when it was prepared.

    :func:`calibrate` leaves them so. After a loop of your own call this, with the prepared graph or
    the converted one; otherwise the program starts with what the last batch left.

    Args:
        model: what ``prepare_pt2e`` or ``convert_pt2e`` returns.

    Raises:
        CalibrationError: nothing is known of that: the graph was not prepared by this package's
            quantizer, was prepared for training, or was exported or loaded since.
    """
    if not isinstance(model, GraphModule) or STATE_KEY not in model.meta:
        raise CalibrationError(
            "what the buffers held is not known: pass what prepare_pt2e or convert_pt2e returned, "
            "not a graph that was exported or loaded since"
        )
    set_state(model, model.meta[STATE_KEY])


def _calibrate(
    prepared: GraphModule,
    data: object,
    limit: int | None,
    watch: str | None,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    progress: bool | None,
) -> CalibrationSummary:
    graph = GraphInputs.of(prepared)
    queue = SampleQueue(graph)
    observed = observed_tensors(prepared)
    convergence = RangeConvergence(observed, watch)
    file = None if checkpoint is None else Checkpoint(checkpoint, prepared)
    done = Position() if file is None else file.resume(convergence)
    seen = done.seen
    calls, samples, rebatched, skip = done.batches, done.samples, done.rebatched, done.samples
    passed = 0
    for index, batch in enumerate(track(_batches(data), "calibrate", enabled=progress)):
        where = f"batch {index}"
        values = graph.fit(batch, where)
        size = graph.batch_size(values)
        if file is not None and size and passed == 0:
            file.check_data(values)
        if limit is not None and graph.batch is not None and passed + size > limit:
            size = limit - passed
            values = graph.take(values, 0, size)
        passed += size
        if skip:
            # Samples that went through the model before the interruption.
            cut = min(skip, size)
            skip -= cut
            partly = cut < size and graph.batch is not None
            values = graph.take(values, cut, size) if partly else []
        seen = max(seen, passed)
        for call in queue.push(values) if values else ():
            taken = graph.batch_size(call)
            rebatched = rebatched or taken != size
            _run(prepared, graph, call, where)
            calls += 1
            samples += taken
            convergence.note(calls, samples)
            if file is not None and calls % checkpoint_every == 0:
                file.save(Position(samples, calls, rebatched, seen), convergence)
        if limit is not None and passed >= limit:
            break
    if skip:
        raise CalibrationError(
            f"{checkpoint} has seen {done.samples} samples, but the data and limit= give only "
            f"{passed}: give the data again that it was begun with, or remove the file"
        )
    if not seen or not calls:
        raise _nothing_measured(seen, queue)
    if file is not None and calls != done.batches:
        file.save(Position(samples, calls, rebatched, seen), convergence)
    summary = CalibrationSummary(
        samples,
        calls,
        rebatched,
        seen - samples,
        convergence.tensors(),
        tuple(convergence.points),
        done.samples,
        unread_rows(prepared),
    )
    if summary.unused:
        logger.warning("calibration: %s", summary)
    for warning in summary.warnings:
        logger.warning("%s", warning)
    _warn_of_wide_ranges(prepared)
    return summary


def _nothing_measured(seen: int, queue: SampleQueue) -> CalibrationError:
    """Why no batch went through the model."""
    if not seen:
        return CalibrationError(
            "the calibration data holds no sample, so no range can be measured; pass at least one "
            "batch; a generator that was used up before is empty"
        )
    return CalibrationError(
        f"the calibration data holds {seen} samples, but the graph takes batches of "
        f"{queue.smallest}; pass more data, or capture the model with a smaller or dynamic batch"
    )


def _warn_of_wide_ranges(prepared: GraphModule) -> None:
    """With few integers, a range that takes in every outlier costs more than clipping them."""
    narrow = [
        module.name
        for module in prepared.modules()
        if isinstance(module, ActivationObserver)
        and not (module.is_dynamic or module.frozen)
        and module.scheme.format.bits < 8
        and module.scheme.observer == "minmax"
    ]
    if narrow:
        logger.warning(
            "%d activations of less than 8 bits take in all values (minmax), which costs accuracy: "
            "choose another observer, as in a4w4-histogram (the first is %s)",
            len(narrow),
            narrow[0],
        )


def graph_calls(prepared: GraphModule, data: object, limit: int | None = None) -> list[list[Any]]:
    """The calls that :func:`calibrate` would make of ``data``: one value per placeholder for each.

    Raises:
        CalibrationError: as there.
    """
    _check_prepared(prepared)
    graph = GraphInputs.of(prepared)
    return list(SampleQueue(graph).calls(_batches(data), limit))


def _check_prepared(prepared: object) -> None:
    if not isinstance(prepared, GraphModule):
        raise CalibrationError(
            f"expected what prepare_pt2e returns, got {type(prepared).__name__}: call "
            "prepare_pt2e(exported.module(), quantizer) first"
        )
    if not any(map(is_observer, prepared.graph.nodes)):
        raise CalibrationError(
            "the graph has no observers, so calibration has nothing to measure: pass what "
            "prepare_pt2e returns, before convert_pt2e"
        )


def _batches(data: object) -> Iterable[object]:
    # Iterating over one tensor or one dictionary would yield its rows or its keys.
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        hint = "; read files with custom_quantizer.load_data" if isinstance(data, str) else ""
        raise CalibrationError(
            f"calibration data is an iterable of batches of tensors, not {type(data).__name__}"
            f"{hint}"
        )
    return data


@exclusive()
def _run(prepared: GraphModule, graph: GraphInputs, values: list[Any], where: str) -> None:
    args, kwargs = graph.arguments(values)
    try:
        with torch.no_grad():
            prepared(*args, **kwargs)
    except CustomQuantizerError as error:
        raise CalibrationError(f"{where}: {error}") from error
    except Exception as error:
        raise CalibrationError(
            f"{where}: the prepared graph failed with {first_line(error)}; the graph takes {graph}"
        ) from error


# ---------------------------------------------------------------------------------------------
# What a graph takes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GraphInput:
    """One input of a captured graph.

    Attributes:
        name: of the placeholder.
        dtype: ``None`` for what is not a tensor.
        sizes: smallest and largest size of each dimension; ``None``: no upper bound.
    """

    name: str
    dtype: torch.dtype | None
    sizes: tuple[tuple[int, int | None], ...] = ()

    @property
    def is_batched(self) -> bool:
        """Whether it has a first dimension at all."""
        return self.dtype is not None and bool(self.sizes)

    def __str__(self) -> str:
        if self.dtype is None:
            return f"{self.name} (not a tensor)"
        sizes = ", ".join(_size_text(*bounds) for bounds in self.sizes)
        return f"{self.name}: {dtype_name(self.dtype)} [{sizes}]"

    def problem(self, value: object, first: int) -> str | None:
        """Why ``value`` does not fit, or ``None``.

        Args:
            value: what a batch holds.
            first: 1 leaves the first dimension out of the comparison, 0 does not.
        """
        if self.dtype is None:
            return None
        if not isinstance(value, Tensor):
            return f"is {type(value).__name__}, not a tensor"
        given = f"is {dtype_name(value.dtype)} of shape {list(value.shape)}"
        if value.dtype != self.dtype:
            fix = f"convert it with .to({self.dtype})"
            if value.is_complex():
                fix = "complex numbers have no integers: split real and imaginary part"
            elif not value.is_floating_point() and self.dtype.is_floating_point:
                fix = "scale and normalize it as in training, then " + fix
            return f"{given}; {fix}"
        if value.dim() != len(self.sizes):
            hint = ""
            if tuple(value.shape) == tuple(low for low, _ in self.sizes[1:]):
                hint = "; it is a single sample, so wrap the data set in a DataLoader"
            return f"{given}{hint}"
        for size, (low, high) in list(zip(value.shape, self.sizes, strict=True))[first:]:
            if size < low or (high is not None and size > high):
                return given
        return None


@dataclass(frozen=True, eq=False)
class GraphInputs:
    """All inputs of a captured graph, and how it is called with them.

    Attributes:
        inputs: one entry per placeholder.
        form: its arguments, and how they nest these.
        batch: smallest and largest batch, where all inputs share their first dimension.
    """

    inputs: tuple[GraphInput, ...]
    form: CallForm
    batch: tuple[int, int | None] | None = None

    @classmethod
    def of(cls, model: GraphModule) -> GraphInputs:
        """Read the inputs off what ``torch.export`` recorded in ``model``."""
        inputs, firsts = [], []
        for node in model.graph.nodes:
            if node.op != "placeholder":
                continue
            meta = tensor_meta(node)
            if meta is None:
                inputs.append(GraphInput(node.name, None))
                continue
            sizes = tuple(size_bounds(size) for size in meta.shape)
            inputs.append(GraphInput(node.name, meta.dtype, sizes))
            if sizes:
                firsts.append((str(meta.shape[0]), sizes[0]))
        # Equal symbols, not equal bounds: only then do the sizes vary together.
        shared = firsts[0][1] if len({symbol for symbol, _ in firsts}) == 1 else None
        return cls(tuple(inputs), CallForm.of(model), shared)

    def __str__(self) -> str:
        return ", ".join(map(str, self.inputs)) or "nothing"

    def fit(self, batch: object, where: str) -> list[Any]:
        """Sort a batch into the graph's inputs; the size of the batch itself is left open.

        Args:
            batch: as :func:`calibrate` takes it.
            where: names the batch in messages.

        Returns:
            One value per placeholder.

        Raises:
            CalibrationError: it does not hold what the graph takes.
        """
        values = self.form.sort(batch)
        if isinstance(values, str):
            raise CalibrationError(f"{where} {values}; the graph takes {self}")
        sizes = set()
        for entry, value in zip(self.inputs, values, strict=True):
            problem = entry.problem(value, first=int(self.batch is not None))
            if problem is not None:
                raise CalibrationError(
                    f"{where}: input {entry.name} {problem}; the graph takes {self}"
                )
            if entry.is_batched:
                sizes.add(len(value))
        if self.batch is not None and len(sizes) > 1:
            raise CalibrationError(
                f"{where}: its inputs have different numbers of samples: "
                f"{', '.join(map(str, sorted(sizes)))}"
            )
        return values

    def arguments(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments from one value per placeholder."""
        return self.form.arguments(values)

    def batch_size(self, values: list[Any]) -> int:
        """Number of samples; 1 where nothing has a first dimension."""
        for entry, value in zip(self.inputs, values, strict=True):
            if entry.is_batched:
                return len(value)
        return 1

    def take(self, values: list[Any], start: int, stop: int) -> list[Any]:
        """Samples ``start`` to ``stop`` of each input that has them."""
        return [
            value[start:stop] if entry.is_batched else value
            for entry, value in zip(self.inputs, values, strict=True)
        ]

    def join(self, first: list[Any], second: list[Any]) -> list[Any]:
        """The samples of both, in order."""
        return [
            torch.cat((a, b)) if entry.is_batched else b
            for entry, a, b in zip(self.inputs, first, second, strict=True)
        ]


class SampleQueue:
    """Samples that wait until they make a batch of a size the graph takes.

    Attributes:
        smallest: size of a batch that the graph takes.
        passed: samples that :meth:`calls` was given.
    """

    def __init__(self, graph: GraphInputs) -> None:
        self.passed = 0
        self._graph = graph
        self._waiting: list[Any] | None = None
        low, high = graph.batch or (1, None)
        self.smallest, self._largest = low, high

    def push(self, values: list[Any]) -> Iterator[list[Any]]:
        """Add samples; yield the batches that are complete."""
        if self._graph.batch is None:
            yield values
            return
        if self._waiting is not None:
            values = self._graph.join(self._waiting, values)
        size, start = self._graph.batch_size(values), 0
        while size - start >= max(self.smallest, 1):
            stop = size if self._largest is None else min(size, start + self._largest)
            yield self._graph.take(values, start, stop)
            start = stop
        self._waiting = self._graph.take(values, start, size) if start < size else None

    def calls(self, batches: Iterable[Any], limit: int | None = None) -> Iterator[list[Any]]:
        """What the graph is called with, of the first ``limit`` samples of some batches."""
        for index, batch in enumerate(batches):
            values = self._graph.fit(batch, f"batch {index}")
            size = self._graph.batch_size(values)
            if limit is not None and self._graph.batch is not None and self.passed + size > limit:
                size = limit - self.passed
                values = self._graph.take(values, 0, size)
            self.passed += size
            yield from self.push(values)
            if limit is not None and self.passed >= limit:
                break


def _size_text(low: int, high: int | None) -> str:
    if low == high:
        return str(low)
    return f"{low}.." if high is None else f"{low}..{high}"
