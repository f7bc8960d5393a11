"""Float, converted graph, integer reference and program on the same inputs, op by op.

Two independent looks at a program: what it *holds* (every weight, bias, scale, zero point and
clamp in the file against the graph's) and what it *computes* (its outputs against the integer
reference). Where they differ the first op that does is named; if the file holds the right numbers,
the graph is lowered once more with every quantized tensor as an output, which shows the first
tensor that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from custom_quantizer.analysis.fidelity import db_text, finite
from custom_quantizer.backends import checks_of
from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.graph import module_path, state_kept, tensor_meta
from custom_quantizer.core.noise import Noise
from custom_quantizer.core.threads import exclusive
from custom_quantizer.errors import (
    CustomQuantizerError,
    InputError,
    LoweringError,
    ProgramError,
)
from custom_quantizer.reference import IntegerReference
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.following import TensorChecks
from custom_quantizer.reference.verifying import (
    LayerCheck,
    Program,
    apart,
    beyond,
    output_scales,
    tensor_differences,
)

__all__ = [
    "FirstDifference",
    "OutputCheck",
    "Verification",
    "has_integers",
    "random_like",
    "verify",
]


@dataclass(frozen=True)
class OutputCheck:
    """One output of the model, over all inputs.

    Attributes:
        index: position among the outputs.
        values: how many numbers were compared.
        mismatches: how many of the program's differ from the integer reference's.
        max_lsb: largest difference in units of the output's scale; ``None`` for a float output.
        max_abs: largest absolute difference.
        bound: what it may be at most: 0 where integers come out, and a derived one where images are
            enlarged in float behind the last integers; ``None``: float ops take part of which none
            is known.
        beyond: how many values differ by more; 0 where there is no bound.
        graph_mismatches: how many of the converted graph's (PyTorch) differ from the program's.
        graph_max_lsb: the largest of those differences in units.
        sqnr_float: of the program against the float model, in dB, infinite where they are equal;
            ``None`` without one.
        sqnr_graph: of the program against the converted graph, likewise.
    """

    index: int
    values: int
    mismatches: int
    max_lsb: float | None
    max_abs: float
    bound: float | None
    beyond: int
    graph_mismatches: int
    graph_max_lsb: float | None
    sqnr_float: float | None
    sqnr_graph: float


@dataclass(frozen=True)
class FirstDifference:
    """The first op, in graph order, that is not what the graph says.

    Attributes:
        node: its anchor, or the node whose tensor differs.
        path: module path.
        what: the constant that differs, or ``output``.
        detail: both values, or how many values differ.
    """

    node: str
    path: str
    what: str
    detail: str

    def __str__(self) -> str:
        where = f"{self.node} ({self.path})" if self.path else self.node
        return f"{where}: {self.what}: {self.detail}"


@dataclass(frozen=True)
class Verification:
    """What was compared, and whether it is equal.

    Attributes:
        outputs: one entry per output tensor.
        constants_equal: every weight, bias, scale and clamp in the file is the graph's; ``None``:
            they are not read back (TOSA).
        exact_expected: the reference computes every op bit for bit, so the outputs must be equal.
        first: the first op that differs, if any does.
        inexact_ops: ops that are float or emulated, so that equality is not expected, and why.
        layers: where equality is not expected, each layer that quantizes at run time, computed from
            the input that the runtime gave it, on the first inputs.
        tensors: where outputs without a bound differ, each quantized tensor, computed from those
            before it that the runtime gave, on the first inputs; ``None``: not looked at, or
            integers are chosen at run time.
    """

    outputs: tuple[OutputCheck, ...]
    constants_equal: bool | None
    exact_expected: bool
    first: FirstDifference | None
    inexact_ops: tuple[str, ...]
    layers: tuple[LayerCheck, ...] = ()
    tensors: TensorChecks | None = None

    @property
    def bit_exact(self) -> bool:
        """The file holds the graph's integers and computes what they say, bit for bit.

        What was not read back is judged by what it computes.
        """
        wrong = any(output.mismatches for output in self.outputs)
        return self.constants_equal is not False and not wrong

    @property
    def as_derived(self) -> bool:
        """As :attr:`bit_exact`, but where images are enlarged in float behind the last integers.

        There each value is within the bound of that; other float ops are no part of it.
        """
        wrong = any(out.mismatches if out.bound is None else out.beyond for out in self.outputs)
        return self.constants_equal is not False and not wrong

    def to_json(self) -> str:
        """All fields as JSON; null for the SQNR of an output without any error."""
        verdicts = {"bit_exact": self.bit_exact, "as_derived": self.as_derived}
        record = finite(asdict(self)) | verdicts | {"version": 1}
        return json.dumps(record, indent=2, allow_nan=False)

    def __str__(self) -> str:
        within = "no, and within what is derived for the float ops at its end"
        verdict = "yes" if self.bit_exact else within if self.as_derived else "NO"
        lines = [f"bit-exact: {verdict}"]
        for out in self.outputs:
            far = "" if out.max_lsb is None else f", by up to {out.max_lsb:g} LSB"
            if out.bound:
                far = f", by up to {out.max_abs:.2g}; {out.beyond:,} by more than {out.bound:.2g}"
            lines.append(
                f"  output {out.index}: {out.mismatches:,} of {out.values:,} values differ from "
                f"the integer reference{far}"
            )
            graph_lsb = "" if out.graph_max_lsb is None else f" (up to {out.graph_max_lsb:g} LSB)"
            lines.append(
                f"    PyTorch's converted graph: {out.graph_mismatches:,} differ{graph_lsb}, "
                f"SQNR {db_text(out.sqnr_graph)}"
            )
            if out.sqnr_float is not None:
                lines.append(f"    float model: SQNR {db_text(out.sqnr_float)}")
        if self.first is not None:
            lines.append(f"  first difference: {self.first}")
        if self.constants_equal is None:
            lines.append("  the file's constants were not read back; judged by the outputs alone")
        if self.layers:
            lines.append(f"  {_layer_line(self.layers)}")
        if self.tensors is not None:
            lines.append(f"  {self.tensors}")
        lines += [f"  not bit-exact by design: {op}" for op in self.inexact_ops]
        return "\n".join(lines)


def _layer_line(layers: Sequence[LayerCheck]) -> str:
    """How layers that quantize at run time follow from their inputs."""
    equal = sum(not layer.mismatches for layer in layers)
    within = sum(not layer.beyond for layer in layers)
    line = f"layers quantized at run time, each from its own input: {equal} of {len(layers)} equal"
    return line if equal == within else f"{line}, {within} within what their kernels may differ by"


def verify(
    converted: GraphModule,
    lowered: Program,
    inputs: Iterable[Any],
    *,
    float_model: Callable[..., Any] | None = None,
) -> Verification:
    """Compare a program with the integer reference of its graph, as its runtime rounds here.

    The inputs are one stream: where a model writes its buffers, all begin with what the graph
    holds, and the graph holds the same afterwards; the program is loaded anew before and after.

    Args:
        converted: what ``convert_pt2e`` returned.
        lowered: what :func:`custom_quantizer.lower` made of it, for any backend.
        inputs: one tuple of inputs, or an iterable of such tuples (or of single tensors). Where the
            program takes integers: these, or float32.
        float_model: for the SQNR against it.

    Raises:
        InputError: there are no inputs, or it is no program of a backend.
        ConversionError: the graph is not a converted one.
        ProgramError: the program does not run.
    """
    checks = checks_of(lowered)
    graph = checks.here(read_converted(converted, lowered.graph.backend))
    form = CallForm.of(converted)
    batches = form.calls(inputs)
    if not batches:
        raise InputError("there are no inputs to verify on; pass at least one tuple of inputs")
    reference = IntegerReference(graph)
    bounds = checks.output_bounds(lowered, graph)
    statistics = [
        _OutputStatistics(i, scale, bound)
        for i, (scale, bound) in enumerate(zip(output_scales(converted), bounds, strict=True))
    ]
    lowered.reset()
    with exclusive(), torch.no_grad(), state_kept(converted), _state_kept(float_model):
        for batch in batches:
            # Of integers at the border the float32 values, equal if and only if these are.
            got = pytree.tree_leaves(lowered.dequantized(lowered.run(*batch)))
            want = pytree.tree_leaves(reference.dequantized(reference(*batch)))
            args, kwargs = form.arguments(_reals(graph, batch))
            eager = pytree.tree_leaves(converted(*args, **kwargs))
            real = None
            if float_model is not None:
                real = pytree.tree_leaves(float_model(*args, **kwargs))
            for i, each in enumerate(statistics):
                if isinstance(want[i], Tensor):  # neither None nor a number
                    each.add(got[i], want[i], eager[i], None if real is None else real[i])
    lowered.reset()
    stored = checks.differences(lowered, graph)
    found = None if stored is None else next(stored, None)
    outputs = tuple(each.result() for each in statistics)
    exact = checks.is_exact(lowered, graph)
    reasons = checks.inexact_ops(lowered, graph)
    layers: tuple[LayerCheck, ...] = ()
    tensors: TensorChecks | None = None
    differs = any(output.mismatches and output.bound is None for output in outputs)
    try:
        first_batch = tuple(batches[0])
        layers = () if exact else checks.run_time_layers(graph, first_batch)
        tensors = checks.each_tensor(graph, first_batch) if differs and not layers else None
    except (LoweringError, ProgramError) as error:
        reasons += (f"layers and tensors could not be checked one by one: {error}",)
    layer = next((layer for layer in layers if layer.beyond), None)
    first: FirstDifference | None = None
    if found is not None:
        first = FirstDifference(found.node, _path(graph, found.node), found.what, found.detail)
    elif layer is not None:
        first = FirstDifference(layer.node, layer.path, "output", str(layer))
    elif tensors is not None and tensors.first is not None:
        departure = tensors.first
        first = FirstDifference(departure.node, departure.path, "output", str(departure))
    elif any(output.beyond for output in outputs):
        first = _first_wrong_tensor(
            graph, list(map(tuple, batches)), partial(checks.lower_again, lowered)
        )
    equal = None if stored is None else found is None
    return Verification(outputs, equal, exact, first, reasons, layers, tensors)


def _reals(graph: ConvertedGraph, values: list[Any]) -> list[Any]:
    """Inputs for a model that takes float32, of those of a program that may take integers."""
    dequantize = graph.backend.arithmetic.dequantize
    return [
        value
        if border is None or not isinstance(value, Tensor) or value.is_floating_point()
        else border.real(value, dequantize)
        for value, border in zip(values, graph.borders.inputs, strict=True)
    ]


def _state_kept(model: object) -> AbstractContextManager[None]:
    return state_kept(model) if isinstance(model, nn.Module) else nullcontext()


def has_integers(inputs: tuple[Any, ...]) -> bool:
    """Whether any is a tensor of indices or a mask, for which no random one can stand."""
    values = pytree.tree_leaves(inputs)
    return any(isinstance(value, Tensor) and not value.is_floating_point() for value in values)


def random_like(converted: GraphModule, example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Normal inputs of the shapes a converted graph was captured with; dynamic sizes become 2.

    Indices and masks are those of the example, and where there are any all sizes are.
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = has_integers(example)
    metas = [tensor_meta(node) for node in converted.graph.nodes if node.op == "placeholder"]
    values, nesting = pytree.tree_flatten(example)
    inputs = []
    for value, meta in zip(values, metas, strict=True):
        if isinstance(value, Tensor) and value.is_floating_point():
            sizes = value.shape if meta is None or fixed else meta.shape
            shape = [size if isinstance(size, int) else 2 for size in sizes]
            value = torch.randn(shape, generator=generator, dtype=value.dtype)
        inputs.append(value)
    return cast("tuple[Any, ...]", pytree.tree_unflatten(inputs, nesting))


def _path(graph: ConvertedGraph, name: str) -> str:
    for node in graph.model.graph.nodes:
        if node.name == name:
            return module_path(node)
    return ""


def _first_wrong_tensor(
    graph: ConvertedGraph,
    batches: Sequence[tuple[Any, ...]],
    lower: Callable[[GraphModule, tuple[Any, ...]], Program],
) -> FirstDifference:
    try:
        tensors = tensor_differences(graph, batches[:1], lower)
    except CustomQuantizerError as error:
        return FirstDifference("", "", "unknown", f"the graph cannot be taken apart: {error}")
    for found in tensors:
        if found.mismatches:
            return FirstDifference(found.node, _path(graph, found.node), "output", str(found))
    return FirstDifference(
        "", "", "unknown", "every op alone is right, so the program is not of this graph"
    )


class _OutputStatistics:
    """Statistics of one output over batches."""

    def __init__(self, index: int, scale: float | None, bound: float | None) -> None:
        self._index = index
        self._scale = scale
        self._bound = bound
        self._values = self._mismatches = self._beyond = self._graph_mismatches = 0
        self._max = self._graph_max = 0.0
        self._graph, self._float = Noise(), Noise()
        self._has_float = False

    def add(self, got: Tensor, want: Tensor, eager: Tensor, real: Tensor | None) -> None:
        self._values += got.numel()
        self._mismatches += int((got != want).sum())
        if self._bound is not None:
            self._beyond += int(beyond(got, want, self._bound).sum())
        self._graph_mismatches += int((got != eager).sum())
        if got.numel():
            self._max = max(self._max, float(apart(got, want).max()))
            self._graph_max = max(self._graph_max, float(apart(got, eager).max()))
        self._graph.add(eager, got)
        if real is not None:
            self._has_float = True
            self._float.add(real, got)

    def _lsb(self, difference: float) -> float | None:
        return None if self._scale is None else float(round(difference / self._scale))

    def result(self) -> OutputCheck:
        return OutputCheck(
            self._index,
            self._values,
            self._mismatches,
            self._lsb(self._max),
            self._max,
            self._bound,
            self._beyond,
            self._graph_mismatches,
            self._lsb(self._graph_max),
            self._float.ratio if self._has_float else None,
            self._graph.ratio,
        )
