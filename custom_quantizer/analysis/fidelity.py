"""Whether the graph that is quantized is the float model, and what rounding costs its outputs.

All other checks compare a program with its graph. If the graph is wrong, they pass. So two things
are asked here, of real inputs:

- *before any rounding*, does the prepared graph compute what the float model does? It was
  rewritten (batch norms folded, ops decomposed), which may change the last bits of float32 and
  nothing else;
- *after conversion*, how far is each output from the float model's, and is that what rounding to
  these widths explains?

**The bound of the first question.** The float model ``f`` is computed in float32 and once more in
float64, which shows how much its own roundings move its outputs: ``n = ||f32 - f64||``. The
prepared graph rounds as often and as finely, so its outputs differ from ``f64`` by an error of the
same size; a graph that computes another function differs by far more. It may differ by
``NOISE_FACTOR * n``, where ``n`` counts as at least ``2**-24 * sqrt(ops) * ||f64||``, what that
many independent roundings make at unit gain. Ops that jump (rounding, comparisons, sorting) turn a
last bit into a whole step, for which no bound exists: graphs with such ops may differ by
``JUMPING_TOLERANCE`` of their outputs.

**The measure of the second question** is the signal-to-quantization-noise ratio (SQNR) of each
output, ``10 log10(sum(x^2) / sum((x - y)^2))`` dB, and next to it the SQNR that rounding alone
leaves: the prepared graph with every weight and activation on its grid, but without the ends of the
range. What is lost beyond that is saturation, or a fault.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

from custom_quantizer.analysis.rerun import (
    Rerun,
    capture_like,
    copied,
    float_fingerprint,
    is_float,
    rerun_in_float64,
)
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.run import GraphInputs, SampleQueue
from custom_quantizer.core.arithmetic import ROUNDOFF
from custom_quantizer.core.graph import describe, state_buffers, state_of
from custom_quantizer.core.noise import NOTHING_DB, Noise
from custom_quantizer.core.rewriting import ORIGINAL_NAME
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.errors import CalibrationError, InputError, VerificationError
from custom_quantizer.ops.rewrites.training_graph import is_training_call
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.interpreter import with_run_time_scales

__all__ = [
    "Fidelity",
    "FirstCalls",
    "FloatCheck",
    "OutputFidelity",
    "check_calls",
    "check_prepared",
    "db_text",
    "finite",
    "first_calls",
    "output_record",
]

DEFAULT_SAMPLES = 8
"""Samples that are compared."""

NOISE_FACTOR = 64.0
"""How many times the float model's own rounding error a prepared graph may be off."""

JUMPING_TOLERANCE = 1e-2
"""Largest relative difference of graphs with ops that jump; a wrong graph is near 1."""

MARGIN_DB = 10.0
"""How far below the SQNR of rounding alone an output may be before a person is told."""

DB_PER_BIT = 1.5
"""An output with less SQNR than this for each bit of the narrowest tensor is worth a look: one bit
is 6 dB, so three quarters of what the width could give are lost on the way."""


_JUMPING = frozenset(
    {
        "argmax", "argmin", "argsort", "bucketize", "ceil", "eq", "floor", "floor_divide", "fmod",
        "ge", "grid_sampler", "gt", "isin", "le", "lt", "ne", "nonzero", "remainder", "round",
        "searchsorted", "sign", "sort", "topk", "trunc", "unique",
    }
)  # fmt: skip
"""Names of aten ops whose result jumps when an input changes in its last bit."""


# ---------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFidelity:
    """One output of the model.

    Attributes:
        index: position among the outputs.
        name: of the op that makes it, by the captured graph.
        sqnr: of the converted graph against the float model, in dB; infinite where they are equal.
        rounding_sqnr: likewise with rounding alone, without the ends of the ranges; ``None`` where
            it is not known (after training), or rounding alone makes values that are not finite.
        lost: values of the converted graph that are not finite, where the float model's are.
    """

    index: int
    name: str
    sqnr: float
    rounding_sqnr: float | None
    lost: int = 0

    def __str__(self) -> str:
        text = (
            f"output {self.index} ({self.name}): SQNR {db_text(self.sqnr)} against the float model"
        )
        if self.rounding_sqnr is not None:
            text += f", {db_text(self.rounding_sqnr)} by rounding alone"
        return text


@dataclass(frozen=True)
class Fidelity:
    """How far a converted graph is from the float model.

    Attributes:
        samples: samples that both were shown.
        outputs: one entry for each floating-point output.
        bits: width of the narrowest integers in the graph.
    """

    samples: int
    outputs: tuple[OutputFidelity, ...]
    bits: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should look at: outputs that the widths do not explain."""
        found = []
        for output in self.outputs:
            rounding = output.rounding_sqnr
            if output.lost:
                found.append(
                    f"{output}: {output.lost} of its values are not finite, where the float "
                    "model's are: something that is divided by, or of which a logarithm is taken, "
                    "was rounded to zero; leave the op that makes it in float with "
                    "set_node_name(name, None), or add to it what is not rounded away"
                )
            elif rounding is not None and output.sqnr < rounding - MARGIN_DB:
                found.append(
                    f"{output}: {rounding - output.sqnr:.0f} dB are lost to something other than "
                    "rounding; if values are cut off at the ends of their ranges, calibrate with "
                    "data like that; custom_quantizer.diagnose names the op"
                )
            elif output.sqnr < DB_PER_BIT * self.bits:
                found.append(
                    f"{output}: little is left of the signal, even for {self.bits} bits; "
                    "custom_quantizer.diagnose names the ops that lose it; give them more bits, or "
                    "leave them in float"
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data; null for an output without any error.

        ``NOTHING_DB`` (-999) stands for one of which nothing is left.
        """
        return {
            "kind": "fidelity",
            "samples": self.samples,
            "bits": self.bits,
            "outputs": [output_record(output) for output in self.outputs],
            "warnings": list(self.warnings),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return "\n".join(map(str, self.outputs))


def db_text(value: float) -> str:
    """``42.0 dB``; ``without limit`` where there is no error."""
    return "without limit" if value == math.inf else f"{value:.1f} dB"


def output_record(output: Any) -> dict[str, Any]:
    """What was measured of an output, as plain data: an infinite SQNR is null or ``NOTHING_DB``."""
    fields = asdict(output)
    record = finite(fields)
    record["sqnr"] = NOTHING_DB if fields["sqnr"] == -math.inf else record["sqnr"]
    return cast("dict[str, Any]", record)


def finite(value: Any) -> Any:
    """Plain data with null for numbers that JSON does not have, such as an infinite SQNR."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------
# The check
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FloatCheck:
    """A prepared graph that computes what the float model does, and what both computed.

    Attributes:
        samples: samples that were compared.
        bits: width of the narrowest integers of the graph.
        inputs: of each call, one value per placeholder.
        exact: outputs of the float model in float32, of each call.
        rounded: outputs of the prepared graph on its grids, of each call; ``None`` if it is trained
            rather than calibrated, or has no ranges yet.
        names: of the ops that make the outputs.
        model: :func:`~custom_quantizer.analysis.rerun.float_fingerprint` of the float model.
        graph: likewise of the prepared graph.
    """

    samples: int
    bits: int
    inputs: tuple[list[Any], ...] = field(repr=False)
    exact: tuple[list[Any], ...] = field(repr=False)
    rounded: tuple[list[Any], ...] | None = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    model: str = field(repr=False)
    graph: str = field(repr=False)

    def compare(self, converted: GraphModule) -> Fidelity:
        """Measure what ``convert_pt2e`` made of the prepared graph on the same samples.

        Raises:
            VerificationError: its outputs are not as many as the float model's.
        """
        noises: list[tuple[Noise, Noise]] = [(Noise(), Noise()) for _ in self.names]
        weights: dict[Node, Any] = {}
        device = with_run_time_scales(converted)
        for call, (values, exact) in enumerate(zip(self.inputs, self.exact, strict=True)):
            if isinstance(device, IntegerReference):
                device.reset()
                got = pytree.tree_leaves(device(*values))
            else:
                got = Rerun(converted, weights=weights).outputs(values)
            if len(got) != len(exact):
                raise VerificationError(
                    f"the converted graph has {len(got)} outputs, the float model {len(exact)}: "
                    "pass what convert_pt2e made of the graph that was checked"
                )
            rounded = got if self.rounded is None else self.rounded[call]
            for noise, want, mine, grid in zip(noises, exact, got, rounded, strict=True):
                if is_float(want):
                    noise[0].add(want, mine)
                    noise[1].add(want, grid)
        known = self.rounded is not None
        outputs = tuple(
            OutputFidelity(
                i,
                name,
                total.ratio,
                rounding.ratio if known and not rounding.lost else None,
                total.lost,
            )
            for i, (name, (total, rounding)) in enumerate(zip(self.names, noises, strict=True))
            if is_float(self.exact[0][i])
        )
        return Fidelity(self.samples, outputs, self.bits)


def check_prepared(
    prepared: GraphModule,
    model: nn.Module | torch.export.ExportedProgram,
    data: object,
    *,
    samples: int = DEFAULT_SAMPLES,
) -> FloatCheck:
    """Compare a prepared graph with the float model before any rounding.

    Call it after calibration and before ``convert_pt2e``, for whom the steps are their own::

        prepared = prepare_pt2e(exported.module(), quantizer)
        cq.calibrate(prepared, data)
        checked = cq.check_prepared(prepared, exported, data)
        converted = convert_pt2e(prepared)
        print(checked.compare(converted))  # SQNR of each output

    ``quantize`` does the same. Observers see nothing of it, and the graph is not changed.

    Args:
        prepared: what ``prepare_pt2e`` returns, or ``prepare_qat_pt2e`` before the first step of
            training.
        model: the float model: a module, an ``ExportedProgram`` or the captured graph, as
            it was before ``prepare_pt2e``, which folds batch norms into the graph it is given.
        data: as :func:`~custom_quantizer.calibration.run.calibrate` takes it.
        samples: how many are compared, the first ones.

    Returns:
        What was compared, to measure the converted graph on.

    Raises:
        VerificationError: they compute different things; the first op that does is named.
        CaptureError: ``torch.export`` cannot capture the model.
        CalibrationError: a batch does not hold what the graph takes.
        InputError: there are no samples, or fewer than one batch of a static graph.
    """
    if samples < 1:
        raise InputError(f"samples={samples}: at least one sample has to be compared")
    for graph, what in ((prepared, "the prepared graph"), (model, "the float model")):
        if isinstance(graph, GraphModule) and any(map(is_training_call, graph.graph.nodes)):
            raise InputError(
                f"{what} is in training mode, where batch norms and dropouts differ from call to "
                "call: capture model.eval(), or call custom_quantizer.training.qat.evaluation_mode"
            )
    if isinstance(model, GraphModule) and _observers(model):
        raise InputError(
            "the float graph has observers: prepare_pt2e changes the graph it is given; pass the "
            "ExportedProgram, or a copy that was made before"
        )
    calls = first_calls(GraphInputs.of(prepared), data, samples)
    captured = model if isinstance(model, GraphModule) else capture_like(model, prepared, calls[0])
    return check_calls(prepared, captured, calls)


def check_calls(
    prepared: GraphModule,
    captured: GraphModule,
    calls: Sequence[list[Any]],
    outputs: Sequence[list[Any] | None] = (),
    earlier: FloatCheck | None = None,
) -> FloatCheck:
    """:func:`check_prepared` for a captured graph and inputs sorted by placeholder.

    Args:
        prepared: as there.
        captured: the float model.
        calls: inputs.
        outputs: what the prepared graph made of each of them, where that is known
            (:class:`FirstCalls`); what is not near enough is computed again.
        earlier: of the same model, the same calls and any prepared graph. What the model computed
            is taken from it; and the prepared graph is not run if it was this one, but for its
            observers.
    """
    model, graph = float_fingerprint(captured), float_fingerprint(prepared)
    if earlier is not None and earlier.model != model:
        raise VerificationError(
            "the float model is not the one that was compared before: its weights or buffers were "
            "changed since; quantize it anew, with its data"
        )
    tolerance = _Tolerance(captured)
    exact: list[list[Any]] = []
    rounded: list[list[Any]] | None = [] if _is_calibrated(prepared) else None
    weights: dict[Node, Any] = {}
    names = _output_names(captured)
    for call, values in enumerate(calls):
        plain = Rerun(captured).outputs(values) if earlier is None else earlier.exact[call]
        got = outputs[call] if outputs else None
        if earlier is not None and earlier.graph == graph:
            got = plain  # as near as it was found to be then
        elif got is None or not tolerance.are_near(plain, got):
            got = Rerun(prepared, state=captured).outputs(values)
        if len(got) != len(plain):
            raise VerificationError(
                f"the prepared graph has {len(got)} outputs, the float model {len(plain)}: pass "
                "the model that was prepared"
            )
        doubtful = not tolerance.are_near(plain, got)
        fine = rerun_in_float64(captured, values) if doubtful else None
        pairs = zip(names, plain, got, strict=True) if doubtful else ()
        for index, (name, a, b) in enumerate(pairs):
            difference = tolerance.difference(a, None if fine is None else fine[index], b)
            if difference is not None:
                where = _first_wrong(prepared, captured, values) or f"output {index} ({name})"
                raise _other_function(where, f"{difference} at output {index}")
        exact.append(plain)
        if rounded is not None:
            again = Rerun(prepared, state=captured, rounding=True, weights=weights)
            rounded.append(again.outputs(values))
    _check_sequence(prepared, captured, calls, tolerance)
    return FloatCheck(
        sum(map(GraphInputs.of(prepared).batch_size, calls)),
        _narrowest(prepared),
        tuple(calls),
        tuple(exact),
        None if rounded is None else tuple(rounded),
        names,
        model,
        graph,
    )


def _check_sequence(
    prepared: GraphModule,
    captured: GraphModule,
    calls: Sequence[list[Any]],
    tolerance: _Tolerance,
) -> None:
    """Compare one call after the other where calls write what the next one reads.

    What is known of one call says nothing of a state that is taken for a constant.

    Raises:
        VerificationError: they compute different things.
    """
    if not state_buffers(captured):
        return
    mine, theirs = Rerun(prepared, state=captured), Rerun(captured)
    sequence, names = (*calls, calls[0]), _output_names(captured)
    for number, values in enumerate(sequence):
        plain, got = theirs.outputs(values), mine.outputs(values)
        if tolerance.are_near(plain, got):
            continue
        fine = rerun_in_float64(captured, values, sequence[:number])
        for index, (name, a, b) in enumerate(zip(names, plain, got, strict=True)):
            difference = tolerance.difference(a, None if fine is None else fine[index], b)
            if difference is not None:
                where = f"output {index} ({name}), which depends on buffers that calls write"
                raise _other_function(where, f"{difference} in call {number + 1}")


def _other_function(where: str, difference: str) -> VerificationError:
    return VerificationError(
        f"{where}: before any rounding the prepared graph does not compute what the float model "
        f"does ({difference}); pass the model that was prepared, in eval mode; if it is that, "
        "leave the op in float with set_node_name, and please report the model"
    )


class FirstCalls:
    """Keeps what the first calls of a graph were given, until they make enough samples.

    Args:
        prepared: the graph; it is watched while this is used in a ``with`` statement.
        samples: how many are kept.

    Attributes:
        calls: one value per placeholder for each.
        outputs: the flat outputs of each; ``None`` where not all samples of the call are kept, or
            where they depend on the calls before, since the graph writes its buffers.
    """

    def __init__(self, prepared: GraphModule, samples: int = DEFAULT_SAMPLES) -> None:
        self._prepared, self._graph = prepared, GraphInputs.of(prepared)
        self._missing = samples
        self._has_state = bool(state_of(prepared.graph))
        self._awaited = False
        self.calls: list[list[Any]] = []
        self.outputs: list[list[Any] | None] = []

    def __enter__(self) -> FirstCalls:
        self._handles = (
            self._prepared.register_forward_pre_hook(self._note, with_kwargs=True),
            self._prepared.register_forward_hook(self._note_outputs),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._missing > 0:
            given = [copied(value) for value in pytree.tree_leaves((args, kwargs))]
            values = _few(self._graph, given, self._missing)
            self._missing -= self._graph.batch_size(values)
            self.calls.append(values)
            self.outputs.append(None)
            self._awaited = values is given and not self._has_state

    def _note_outputs(self, _module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
        if self._awaited:
            self.outputs[-1] = [copied(value) for value in pytree.tree_leaves(result)]
            self._awaited = False


def _few(graph: GraphInputs, values: list[Any], samples: int) -> list[Any]:
    """The first samples of a batch, if the graph takes any number of them."""
    low, high = graph.batch or (None, None)
    if low is None or low == high or graph.batch_size(values) <= samples:
        return values
    # A batch of one is traced as a constant by some graphs.
    return graph.take(values, 0, max(samples, low, 2))


def first_calls(
    graph: GraphInputs, data: object, samples: int = DEFAULT_SAMPLES
) -> list[list[Any]]:
    """What :class:`FirstCalls` keeps when ``data`` runs through a graph, without running it.

    Raises:
        CalibrationError: a batch does not hold what the graph takes.
        InputError: there are fewer samples than a batch.
    """
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"data is an iterable of batches of tensors, not {type(data).__name__}"
        )
    queue, calls, found = SampleQueue(graph), [], 0
    for index, batch in enumerate(data):
        for call in queue.push(graph.fit(batch, f"batch {index}")):
            if found < samples:
                calls.append(_few(graph, call, samples - found))
                found += graph.batch_size(calls[-1])
        if found >= samples:
            break
    if not calls:
        raise InputError(
            f"the data holds fewer samples than a batch of the graph, which is {queue.smallest}"
        )
    return calls


def _output_names(model: GraphModule) -> tuple[str, ...]:
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    leaves = pytree.tree_leaves(output.args[0])
    return tuple(leaf.name if isinstance(leaf, Node) else str(leaf) for leaf in leaves)


def _observers(prepared: GraphModule) -> list[nn.Module]:
    return [m for m in prepared.modules() if isinstance(m, (ObserverBase, FakeQuantizeBase))]


def _narrowest(prepared: GraphModule) -> int:
    schemes = (getattr(observer, "scheme", None) for observer in _observers(prepared))
    return min((s.format.bits for s in schemes if isinstance(s, TensorScheme)), default=8)


def _is_calibrated(prepared: GraphModule) -> bool:
    """Whether there are ranges, and training will not change weights and ranges after all."""
    observers = [m for m in _observers(prepared) if isinstance(m, ActivationObserver)]
    trained = any(isinstance(m, FakeQuantizeBase) for m in observers)
    return not trained and any(m.is_dynamic or int(m.count) > 0 for m in observers)


# ---------------------------------------------------------------------------------------------
# Telling rounding from another function
# ---------------------------------------------------------------------------------------------


class _Tolerance:
    """How far the outputs of a rewritten graph may be from the float model's."""

    def __init__(self, captured: GraphModule) -> None:
        calls = [node for node in captured.graph.nodes if node.op == "call_function"]
        self._ops = len(calls)
        self._jumps = any(_name_of(node) in _JUMPING for node in calls)

    def are_near(self, plain: Sequence[Any], got: Sequence[Any]) -> bool:
        """:meth:`is_near` of all outputs."""
        return len(plain) == len(got) and all(map(self.is_near, plain, got))

    def is_near(self, plain: Any, got: Any) -> bool:
        """Whether :meth:`difference` finds nothing wrong, whatever float64 gives.

        By the triangle inequality: with ``e`` from float32 to float64 and ``d`` from float32 to the
        prepared graph, ``d + e <= NOISE_FACTOR * max(e, floor)`` if ``d <= (NOISE_FACTOR - 1) *
        floor``. Half the norm in float32 stands for that in float64: where it is more, ``e`` is.
        """
        if not isinstance(plain, Tensor) or not isinstance(got, Tensor):
            return False
        if got.shape != plain.shape or got.dtype != plain.dtype or not plain.is_floating_point():
            return False
        distance = float((got.double() - plain.double()).norm())
        floor = ROUNDOFF * math.sqrt(self._ops + 1) * float(plain.double().norm()) / 2
        return math.isfinite(floor) and distance <= (NOISE_FACTOR - 1) * floor

    def difference(self, plain: Any, fine: Any, got: Any) -> str | None:
        """What is wrong with an output, or ``None``.

        Args:
            plain: of the float model in float32.
            fine: of the float model in float64, if that is known.
            got: of the prepared graph.
        """
        if not isinstance(plain, Tensor):
            return None if plain == got else f"{got!r} for {plain!r}"
        if not isinstance(got, Tensor) or got.shape != plain.shape or got.dtype != plain.dtype:
            return "another shape or dtype"
        if not plain.is_floating_point():
            return self._discrete(plain, got)
        exact = plain.double() if fine is None else cast(Tensor, fine)
        finite = torch.isfinite(exact)
        exact, own, other = (t[finite].double() for t in (exact, plain, got))
        size = float(exact.norm())
        floor = ROUNDOFF * math.sqrt(self._ops + 1) * size
        allowed = NOISE_FACTOR * max(float((own - exact).norm()), floor)
        if self._jumps:
            allowed = max(allowed, JUMPING_TOLERANCE * size)
        distance = float((other - exact).norm())
        if distance <= allowed:
            return None
        return f"a relative difference of {distance / size if size else math.inf:.2g}"

    def _discrete(self, plain: Tensor, got: Tensor) -> str | None:
        """Integers and booleans: a tie may fall on the other side, not more than that."""
        wrong = int((plain != got).sum())
        if wrong <= (JUMPING_TOLERANCE * plain.numel() if self._jumps else 0):
            return None
        return f"{wrong} of {plain.numel()} values differ"


def _name_of(node: Node) -> str:
    return str(getattr(getattr(node.target, "overloadpacket", node.target), "__name__", ""))


def _first_wrong(prepared: GraphModule, captured: GraphModule, values: list[Any]) -> str | None:
    """The first op of a prepared graph whose tensor the float model does not have.

    An op keeps its name through all rewrites, but it may have taken over what followed it (a batch
    norm, a factor): its tensor is then that of one of those ops, which are gone.
    """
    mine = Rerun(prepared, state=captured, wanted=lambda _: True)
    theirs = Rerun(captured, wanted=lambda _: True)
    mine.outputs(values)
    theirs.outputs(values)
    kept = {node.name for node in prepared.graph.nodes}
    by_name = {node.name: node for node in captured.graph.nodes}
    for node in prepared.graph.nodes:
        if node.op != "call_function" or node.name not in mine.seen:
            continue
        if node.meta.get(ORIGINAL_NAME, node.name) != node.name or node.name not in by_name:
            continue
        got = mine.seen[node.name]
        candidates = _taken_over(by_name[node.name], kept)
        known = [theirs.seen[name] for name in candidates if name in theirs.seen]
        if known and not any(_close(want, got) for want in known):
            return describe(node)
    return None


def _taken_over(node: Node, kept: set[str]) -> list[str]:
    """Names of a node and of the nodes behind it that are not in the prepared graph."""
    names, stack = [node.name], [node]
    while stack:
        for user in stack.pop().users:
            if user.name not in kept and user.name not in names:
                names.append(user.name)
                stack.append(user)
    return names


def _close(want: Tensor, got: Tensor) -> bool:
    if want.numel() != got.numel():
        return False
    if not want.is_floating_point():
        return torch.equal(want.flatten(), got.flatten())
    a, b = want.double().flatten(), got.double().flatten()
    finite = torch.isfinite(a)
    return float((a - b)[finite].norm()) <= 1e-4 * float(a[finite].norm()) + 1e-30
