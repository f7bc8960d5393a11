"""Where a program spends its time, and where it leaves the integers: op by op.

Times come from the runtime's own trace of the program as it is. Differences come from a second
program, which returns every quantized tensor: the runtime does not show what is inside a delegate.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from custom_quantizer.backends import checks_of
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.plot import new_figure, save_figure
from custom_quantizer.core.text_table import table_lines
from custom_quantizer.errors import InputError
from custom_quantizer.report.program_record import inspect_program
from custom_quantizer.report.record import ProgramOp, ProgramRow

if TYPE_CHECKING:
    from custom_quantizer.backends.xnnpack import LoweredProgram
    from custom_quantizer.backends.xnnpack.contents import MethodContents
    from custom_quantizer.backends.xnnpack.profiling import ProgramTime
    from custom_quantizer.core.borders import Borders
    from custom_quantizer.reference.verifying import TensorDifference

__all__ = ["Profile", "ProfileRow", "profile"]

_BETWEEN = "delegate, between its ops"
_AROUND = "runtime, around its calls"


@dataclass(frozen=True)
class ProfileRow:
    """One op of the graph that was converted; or what is of no op.

    Attributes:
        op: its name, as in plans and rules. Of a file that has no record of ops: the kind of the
            delegate's node. Of no op: what it is instead.
        path: module path.
        placement: where it computes; ``None``: of no op, or the file does not say.
        kernels: that run it: XNNPACK's operators, or a kernel outside the delegates.
        seconds: of one run.
        share: of the time of the whole run, 0 to 1.
        difference: of its output from the integer reference; ``None``: its output is not quantized,
            or there is no graph to compare with.
    """

    op: str
    path: str
    placement: str | None
    kernels: tuple[str, ...]
    seconds: float
    share: float
    difference: TensorDifference | None = None


@dataclass(frozen=True)
class Profile:
    """Every op of a program, with its time; ``print(profile)`` shows the table.

    Attributes:
        rows: in execution order; last what is of no op, so that all times add up to ``seconds``.
        seconds: of one run: the mean over the faster half of the runs, as all times are.
        slowest: seconds of the slowest run.
        runs: how many were measured.
        threads: that the runtime computed with.
        compared: whether the outputs of ops were compared with the integer reference.
    """

    rows: tuple[ProfileRow, ...]
    seconds: float
    slowest: float
    runs: int
    threads: int
    compared: bool

    def to_json(self) -> str:
        """All fields as JSON; times in seconds."""
        return json.dumps({**asdict(self), "version": 1}, indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the time of each op as a bar; needs matplotlib.

        Args:
            path: of the picture; its suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.

        Raises:
            InputError: matplotlib is missing, or the file cannot be written.
        """
        shown = [row for row in self.rows if row.kernels or row.seconds]
        figure = new_figure(9, 1.2 + 0.22 * len(shown))
        axes = figure.subplots()
        kinds = list(dict.fromkeys(_kind(row) for row in shown))
        for kind in kinds:
            places = [i for i, row in enumerate(shown) if _kind(row) == kind]
            times = [1e6 * shown[i].seconds for i in places]
            axes.barh(places, times, label=kind)
        for i, row in enumerate(shown):
            if row.difference is not None and row.difference.mismatches:
                axes.annotate(
                    f" {row.difference.mismatches:,} differ",
                    (1e6 * row.seconds, i),
                    va="center",
                    fontsize="x-small",
                )
        labels = [f"{row.op} ({row.path})" if row.path else row.op for row in shown]
        axes.set_yticks(range(len(shown)), labels, fontsize="x-small")
        axes.invert_yaxis()
        axes.set_xlabel(f"microseconds of {1e6 * self.seconds:,.0f}, {_threads(self.threads)}")
        axes.legend(fontsize="small")
        save_figure(figure, path)

    def __str__(self) -> str:
        lines = [
            f"{_time(self.seconds)} a run: mean over the faster half of {self.runs:,} runs, the "
            f"slowest took {_time(self.slowest)}; {_threads(self.threads)}",
            "",
            *table_lines([_HEADER, *map(_cells, self.rows)], left=(0, 1, 2, 6)),
            "",
            "A time of - is part of another op's, or nothing is left of the op.",
        ]
        if self.compared:
            lines.append(
                "differs: values of the op's output that are not those of the integer reference, "
                "in a second program that returns them all."
            )
        return "\n".join(lines)


_HEADER = ("op", "module", "computes", "us", "share", "differs", "kernels")


def _cells(row: ProfileRow) -> tuple[str, ...]:
    difference = row.difference
    differs = ""
    if difference is not None:
        differs = f"{difference.mismatches:,} of {difference.values:,}"
        if difference.mismatches:
            differs += f", {difference.max_lsb:g} LSB"
    return (
        row.op,
        row.path,
        row.placement or "",
        f"{1e6 * row.seconds:,.1f}" if row.seconds or row.kernels else "-",
        f"{100 * row.share:.1f} %" if row.seconds or row.kernels else "-",
        differs,
        ", ".join(row.kernels),
    )


def _kind(row: ProfileRow) -> str:
    return row.placement or ("no op" if row.op in (_BETWEEN, _AROUND) else "ops of the file")


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def profile(
    program: LoweredProgram | bytes | str | os.PathLike[str],
    inputs: Iterable[Any] | None = None,
    *,
    method: str | None = None,
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = None,
) -> Profile:
    """Say of every op of a program how long it takes here, and whether it computes its integers.

    The program runs in a process of its own. Times are of this machine's kernels and say little
    of a phone's.

    Args:
        program: what :func:`~custom_quantizer.lower` returned; or a ``.pte``, or its bytes, of
            which only times can be told.
        inputs: one tuple of inputs, or an iterable of such tuples. The first is timed, all are
            compared. Default: random ones of the program's shapes.
        method: which one of the program; default: the only one, else ``forward``.
        runs: how many to measure.
        warmup: how many to run before.
        threads: that the runtime computes with; default: as many as ExecuTorch takes by itself.

    Raises:
        InputError: the inputs do not fit, or random ones cannot stand for them.
        LoweringError: the program cannot be lowered with every quantized tensor as an output.
        ProgramError: it cannot be read, or does not run.
    """
    if runs < 1 or warmup < 0:
        raise InputError(f"profile measures at least one run, not runs={runs}, warmup={warmup}")
    if threads is not None and threads < 1:
        raise InputError(f"profile runs a program with at least one thread, not threads={threads}")
    # Reading a file needs the package that knows executorch; reading a report does not.
    from custom_quantizer.backends.xnnpack.border_constants import borders_in
    from custom_quantizer.backends.xnnpack.profiling import measure
    from custom_quantizer.backends.xnnpack.program import LoweredProgram, fitting_inputs
    from custom_quantizer.backends.xnnpack.readback import read_file, read_program

    what = "the program"
    if isinstance(program, LoweredProgram):
        data = program.buffer
    elif isinstance(program, bytes):
        data = program
    else:
        data, what = read_file(program)[0], os.fspath(program)
    contents = read_program(data, name=what)
    entry = contents.main if method is None else contents.method(method)
    borders = borders_in(entry, contents.constants)
    form = program.form if isinstance(program, LoweredProgram) else CallForm(len(entry.inputs))
    batches = [list(_random(entry, borders))] if inputs is None else form.calls(inputs)
    if not batches:
        raise InputError("there are no inputs to profile on; pass at least one tuple of inputs")
    flat = [fitting_inputs(entry, borders, batch) for batch in batches]
    timed = measure(data, what, entry, flat[0], runs=runs, warmup=warmup, threads=threads)
    differences = _differences(program, flat) if isinstance(program, LoweredProgram) else {}
    report = inspect_program(data)
    ops = [op for op in report.ops or () if op.method == entry.name]
    calls = [row for row in report.rows if row.method == entry.name]
    rows = _rows(ops, calls, timed, differences)
    return Profile(
        rows,
        timed.seconds,
        timed.slowest,
        timed.runs,
        timed.threads,
        isinstance(program, LoweredProgram),
    )


def _random(method: MethodContents, borders: Borders) -> tuple[Tensor, ...]:
    """Inputs of a method: normal ones, or any integers that it takes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, (info, border) in enumerate(zip(method.inputs, borders.inputs, strict=True)):
        if border is not None:
            ends = (border.quant_min, border.quant_max + 1)
            value = torch.randint(*ends, info.shape, generator=generator, dtype=border.dtype)
        elif info.dtype == "float32":
            value = torch.randn(info.shape, generator=generator)
        else:
            raise InputError(f"input {i} is {info.dtype}; pass inputs of your own")
        found.append(value)
    return tuple(found)


def _differences(
    program: LoweredProgram, batches: Sequence[Sequence[Any]]
) -> dict[str, TensorDifference]:
    """By the name of the op as it was written: of its parts the one that differs most, or last."""
    from custom_quantizer.reference.verifying import tensor_differences

    checks = checks_of(program)
    lower_again = partial(checks.lower_again, program)
    written = {op.node: op.written for op in program.report.ops}
    made_by = {op.output_node.name: op.node.name for op in program.graph.integer}
    found: dict[str, TensorDifference] = {}
    for tensor in tensor_differences(
        checks.here(program.graph), [tuple(batch) for batch in batches], lower_again
    ):
        op = written.get(made_by.get(tensor.node, tensor.node))
        if op is not None and (op not in found or tensor.mismatches >= found[op].mismatches):
            found[op] = tensor
    return found


def _rows(
    ops: Sequence[ProgramOp],
    calls: Sequence[ProgramRow],
    timed: ProgramTime,
    differences: Mapping[str, TensorDifference],
) -> tuple[ProfileRow, ...]:
    found = {
        op.name: ProfileRow(op.name, op.path, op.placement, (), 0.0, 0.0, differences.get(op.name))
        for op in ops
    }
    between = 0.0
    rows = iter(calls)
    for call in timed.calls:
        between += call.between if call.nodes is not None else 0.0
        for node in (None,) if call.nodes is None else call.nodes:
            row = next(rows)
            name = row.op or row.name
            before = found.get(name) or ProfileRow(name, row.path, None, (), 0.0, 0.0)
            kernels = (row.kind,) if node is None else node.operators
            seconds = call.seconds if node is None else node.seconds
            found[name] = replace(
                before,
                kernels=(*before.kernels, *(re.sub(r" #\d+$", "", kernel) for kernel in kernels)),
                seconds=before.seconds + seconds,
            )
    around = timed.seconds - sum(call.seconds for call in timed.calls)
    rest = [
        ProfileRow(name, "", None, (), seconds, 0.0)
        for name, seconds in ((_BETWEEN, between), (_AROUND, around))
    ]
    return tuple(
        replace(row, share=row.seconds / timed.seconds) for row in (*found.values(), *rest)
    )
