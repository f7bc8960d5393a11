"""How long each node of a program takes, as the runtime itself notes it.

ExecuTorch writes an ETDump of a run: one event for each kernel, for each call of a delegate, and,
since XNNPACK is asked for it, one for each operator that XNNPACK runs. The file's nodes and these
operators are two lists in the same order, but not of the same length: XNNPACK runs some nodes as a
part of others, and some not at all. What fits whom is decided by their kinds (:func:`aligned`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from custom_quantizer.backends.xnnpack.contents import DelegateCall, MethodContents
from custom_quantizer.backends.xnnpack.isolation import IsolatedMethod
from custom_quantizer.errors import ProgramError

__all__ = ["CallTime", "NodeTime", "ProgramTime", "aligned", "measure"]


@dataclass(frozen=True)
class NodeTime:
    """One node of a delegate.

    Attributes:
        operators: of XNNPACK that run it; none if XNNPACK runs it as a part of another, or not at
            all.
        seconds: of one run.
    """

    operators: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class CallTime:
    """One call of a method.

    Attributes:
        seconds: of one run, all in all.
        nodes: of the delegate, in the order of the file; ``None``: a kernel.
    """

    seconds: float
    nodes: tuple[NodeTime, ...] | None

    @property
    def between(self) -> float:
        """Seconds that are of no node."""
        return self.seconds - sum(node.seconds for node in self.nodes or ())


@dataclass(frozen=True)
class ProgramTime:
    """One method.

    Attributes:
        seconds: of one run, all in all.
        slowest: seconds of the slowest run.
        calls: in execution order.
        runs: how many were measured.
        threads: that the runtime computed with.
    """

    seconds: float
    slowest: float
    calls: tuple[CallTime, ...]
    runs: int
    threads: int


def measure(
    data: bytes,
    what: str,
    method: MethodContents,
    inputs: Sequence[Any],
    *,
    runs: int,
    warmup: int,
    threads: int | None = None,
) -> ProgramTime:
    """Run a program in a process of its own, and say how long its nodes take.

    A time is the mean over the faster half of the runs: what else the machine does makes runs
    slower, never faster. XNNPACK counts whole microseconds and rounds down, so an operator may take
    up to one more than it says; that is found in the time between operators.

    Args:
        data: the program.
        what: what messages call it.
        method: which one to run.
        inputs: flat.
        runs: how many to measure.
        warmup: how many to run before.
        threads: that the runtime is to compute with; ``None``: as many as it takes by itself.

    Raises:
        ProgramError: it does not run, or the runtime says nothing of how long.
    """
    loaded = IsolatedMethod(data, what, method.name, traced=True, threads=threads)
    for _ in range(warmup + runs):
        loaded.execute(inputs)
    traces = [_trace(events, what, method) for events in _runs(loaded.dump(), what)][warmup:]
    if len(traces) != runs:
        raise ProgramError(f"{what}: the runtime noted {len(traces)} of {runs} runs")
    names = traces[0].names
    if any(trace.names != names for trace in traces):
        raise ProgramError(f"{what}: XNNPACK does not run the same operators each time")
    ordered = sorted(traces, key=lambda trace: trace.total)
    kept = ordered[: (runs + 1) // 2]
    return ProgramTime(
        _mean([trace.total for trace in kept]),
        ordered[-1].total,
        tuple(_call_time(method, i, kept) for i in range(len(method.calls))),
        runs,
        loaded.threads,
    )


@dataclass(frozen=True)
class _Trace:
    """One run.

    Attributes:
        total: seconds.
        calls: seconds of each.
        names: XNNPACK's operators of each call.
        operators: their seconds.
    """

    total: float
    calls: tuple[float, ...]
    names: tuple[tuple[str, ...], ...]
    operators: tuple[tuple[float, ...], ...]


def _runs(dump: bytes, what: str) -> list[list[Any]]:
    """The events of each run."""
    # ExecuTorch's own reader; the Inspector that it belongs to merges runs.
    from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

    try:
        data = deserialize_from_etdump_flatcc(dump)
    except Exception as error:
        raise ProgramError(f"{what}: the runtime's times cannot be read: {error}") from error
    return [
        [event.profile_event for event in run.events or () if event.profile_event is not None]
        for run in data.run_data
        if run.name == "Execute"
    ]


_NANOSECOND = 1e-9


def _trace(events: Sequence[Any], what: str, method: MethodContents) -> _Trace:
    total: float | None = None
    calls: list[float] = []
    names: list[tuple[str, ...]] = []
    times: list[tuple[float, ...]] = []
    kinds: list[bool] = []
    found: list[tuple[str, float]] = []
    for event in events:
        seconds = (event.end_time - event.start_time) * _NANOSECOND
        if event.delegate_debug_id_str is not None:
            found.append((event.delegate_debug_id_str, seconds))
        elif event.name in ("OPERATOR_CALL", "DELEGATE_CALL"):
            kinds.append(event.name == "DELEGATE_CALL")
            calls.append(seconds)
            names.append(tuple(name for name, _ in found))
            times.append(tuple(time for _, time in found))
            found = []
        elif event.name == "Method::execute":
            total = seconds
    if total is None:
        raise ProgramError(f"{what}: the installed executorch notes no times")
    if kinds != [isinstance(call, DelegateCall) for call in method.calls]:
        raise ProgramError(
            f"{what}: a run makes {len(kinds)} calls and the file has {len(method.calls)}; a "
            "program with loops or branches cannot be profiled"
        )
    return _Trace(total, tuple(calls), tuple(names), tuple(times))


def _call_time(method: MethodContents, i: int, traces: Sequence[_Trace]) -> CallTime:
    seconds = _mean([trace.calls[i] for trace in traces])
    call, names = method.calls[i], traces[0].names[i]
    if not isinstance(call, DelegateCall):
        return CallTime(seconds, None)
    kinds = [op.kind for op in method.delegates[call.delegate].ops]
    operators: list[list[str]] = [[] for _ in kinds]
    times = [0.0] * len(kinds)
    for at, node in enumerate(aligned(kinds, names)):
        if node is not None:
            operators[node].append(names[at])
            times[node] += _mean([trace.operators[i][at] for trace in traces])
    nodes = (NodeTime(tuple(o), t) for o, t in zip(operators, times, strict=True))
    return CallTime(seconds, tuple(nodes))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------
# Which node an operator runs
# ---------------------------------------------------------------------------------------------

_OPERATORS = {
    "conv2d": ("convolution", "fullyconnected"),
    "depthwise_conv2d": ("convolution",),
    "conv_transpose2d": ("deconvolution",),
    "fully_connected": ("fullyconnected", "dynamicfullyconnected"),
    "static_transpose": ("transpose",),
    "static_slice": ("slice",),
    "static_constant_pad": ("constantpad",),
    "avg_pooling2d": ("averagepooling",),
    "max_pooling2d": ("maxpooling",),
    "global_avg_pooling2d": ("mean", "globalaveragepooling"),
    "div": ("divide",),
    "sin": ("sine",),
    "cos": ("cosine",),
    "gelu": ("gelu", "approxgelu"),
    **{f"concatenate{n}": ("copy",) for n in range(2, 6)},
}
"""Kind of a node -> XNNPACK's operators that run it, in small letters; others are called alike."""

_TABLE = "invalidunaryop"
"""What XNNPACK calls a table, which stands for quantize nodes and the function between them."""

_FUNCTIONS = frozenset(
    {"abs", "ceiling", "clamp", "cos", "elu", "exp", "floor", "gelu", "hardswish", "leaky_relu"}
    | {"log", "negate", "reciprocal_square_root", "sigmoid", "sin", "square", "square_root", "tanh"}
)


def _fits(kind: str, name: str) -> bool:
    """Whether an operator, such as ``Convolution (NHWC, QC8) IGEMM #1``, may run a node."""
    word = re.split(r" \(| #", name, maxsplit=1)[0].replace(" ", "").lower()
    if word == _TABLE:
        return kind in _FUNCTIONS
    plain = re.sub(r"2_?d$", "", kind).replace("_", "")
    return word in _OPERATORS.get(kind, (plain, plain.removeprefix("static"), f"static{plain}"))


def aligned(kinds: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each operator the node that it runs, such that as many as possible run one.

    Nodes keep their order. What fits no node has ``None``.

    Args:
        kinds: of the nodes.
        names: of the operators.
    """
    # most[i][j]: how many of the operators from j on can run nodes from i on.
    fits = [[_fits(kind, name) for name in names] for kind in kinds]
    most = [[0] * (len(names) + 1) for _ in range(len(kinds) + 1)]
    for i in reversed(range(len(kinds))):
        for j in reversed(range(len(names))):
            most[i][j] = max(most[i + 1][j], most[i][j + 1], fits[i][j] + most[i + 1][j + 1])
    found: list[int | None] = [None] * len(names)
    i = j = 0
    while i < len(kinds) and j < len(names):
        if fits[i][j] and most[i][j] == 1 + most[i + 1][j + 1]:
            found[j] = i
            i, j = i + 1, j + 1
        elif most[i][j] == most[i + 1][j]:
            i += 1
        else:
            j += 1
    return found
