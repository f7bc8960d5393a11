"""Random models out of the registry, random schemes for them, and what must hold for each.

A :class:`Sample` is plain data: what ``repr`` prints rebuilds it, so that a finding becomes a
regression case by pasting it. A model is a list of steps. A step takes a case of some op family (or
a float op that no family knows), feeds it earlier values, whatever their shape, and may put an
activation behind it; values are read any number of times, and what nobody reads is returned.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.backends.xnnpack.checks import is_exact, run_time_layers
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.bias import derived_scale
from custom_quantizer.core.graph import (
    is_constant,
    is_quantize,
    is_run_time_quantization,
    is_static,
)
from custom_quantizer.core.resizing import position_bits
from custom_quantizer.ops import REGISTRY, Case, QuantizedOp, known_targets
from custom_quantizer.ops.backend import get_mode
from custom_quantizer.ops.functions import is_tanh_gelu
from custom_quantizer.ops.gemm import expand_channels
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from custom_quantizer.reference.interpreter import IntegerReference
from custom_quantizer.reference.verifying import instrumented, tapped_integers
from support.graphs import Inputs, canonicalize, differences, stress
from support.models import Converted, randomize_batch_norms

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------

Fit = Literal["as it is", "first", "moves", "layer"]
FITS: tuple[Fit, ...] = ("as it is", "first", "moves", "layer")
"""How values come to the shape of a case: not at all, all to the shape of the first, by moving
values only, or through a layer with weights."""


@dataclass(frozen=True)
class Step:
    """One op of a model.

    Attributes:
        family: of the registry, or ``unknown``.
        case: name of the case.
        sources: values it reads, counted backwards from the last one, modulo how many there are.
        fit: how they come to their shape.
        behind: activation that follows at once.
    """

    family: str
    case: str
    sources: tuple[int, ...] = (0,)
    fit: Fit = "as it is"
    behind: str | None = None


@dataclass(frozen=True)
class Sample:
    """A model and the schemes of its ops.

    Attributes:
        inputs: shapes of the model's inputs.
        steps: its ops.
        default: the global scheme.
        rules: scope, position of the step (module and node names) or op (operator types), scheme.
        inputs_as: format that ``set_io`` asks of the inputs.
        outputs_as: and of the outputs.
        returned: values that are returned although others read them.
        seed: of weights and data.
    """

    inputs: tuple[tuple[int, ...], ...]
    steps: tuple[Step, ...]
    default: str | None = "a8w8"
    rules: tuple[tuple[str, int, str | None], ...] = ()
    inputs_as: str | None = None
    outputs_as: str | None = None
    returned: tuple[int, ...] = ()
    seed: int = 0


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _unknown(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Case:
    return Case(name, lambda: _Function(function), shapes)


_IMAGE = (2, 8, 5, 7)
UNKNOWN = (
    _unknown("sin", torch.sin, _IMAGE),
    _unknown("flip", lambda x: x.flip(-1), _IMAGE),
    _unknown("mean_channels", lambda x: x.mean(1), _IMAGE),
    _unknown("sum", lambda x: x.sum(-1, keepdim=True), _IMAGE),
    _unknown("max", lambda x: torch.max(x, 1)[0], _IMAGE),
    _unknown("where", lambda x, y: torch.where(x > 0, x, y), _IMAGE, _IMAGE),
    _unknown("double", lambda x: (x.double() * 1.5).float(), _IMAGE),
)
"""Float ops that no family claims, or only some calls of which."""

CASES: dict[tuple[str, str], Case] = {
    **{(rule.family, case.name): case for rule in REGISTRY for case in rule.cases},
    **{("unknown", case.name): case for case in UNKNOWN},
}

_MOVERS = {rule.family for rule in REGISTRY if rule.moves_values}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda x: x.clamp(-0.4, 1.7),
    "clamp_min": lambda x: x.clamp(min=-0.2),
    "relu in place": lambda x: F.relu_(x.clone()),
}

_LARGEST_VALUE = 1e3
_MOST_ELEMENTS = 8640  # what the strided transposed convolutions of the registry return


class Moved(nn.Module):
    """Any tensor to any shape, by cutting off or repeating values."""

    def __init__(self, given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        super().__init__()
        self.same, self.wanted = given == wanted, wanted
        self.size, self.wanted_size = math.prod(given), math.prod(wanted)

    def forward(self, x: Tensor) -> Tensor:
        if self.same:
            return x
        if self.size != self.wanted_size:
            x = x.reshape(-1)
            copies = -(-self.wanted_size // self.size)
            if copies > 1:
                x = torch.cat([x] * copies, 0)
            x = x[: self.wanted_size]
        return x.reshape(self.wanted)


def _layer(given: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module:
    """A layer that gives the wanted channels, and what moves values the rest of the way."""
    if not given:
        return Moved(given, wanted)
    if len(given) == len(wanted) == 4:
        first: nn.Module = nn.Conv2d(given[1], wanted[1], 1)
        given = (given[0], wanted[1], *given[2:])
    else:
        first = nn.Linear(given[-1], wanted[-1])
        given = (*given[:-1], wanted[-1])
    return nn.Sequential(first, Moved(given, wanted))


class Model(nn.Module):
    """The model of a sample. Steps that do not work out (NaN, too large) are left out of it."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.wiring: list[tuple[tuple[int, ...], str | None]] = []
        generator = torch.Generator().manual_seed(sample.seed)
        self.example = tuple(torch.randn(shape, generator=generator) for shape in sample.inputs)
        values = list(self.example)
        with torch.no_grad():
            for step in sample.steps:
                self._add(step, values)
        used = {source for sources, _ in self.wiring for source in sources}
        kept = {i % len(values) for i in sample.returned} - set(range(len(self.example)))
        ends = {i for i in range(len(self.example), len(values)) if i not in used}
        self.results = sorted(kept | ends)

    def _add(self, step: Step, values: list[Tensor]) -> None:
        case = CASES[step.family, step.case]
        sources = tuple(
            len(values) - 1 - step.sources[i % len(step.sources)] % len(values)
            for i in range(len(case.shapes))
        )
        given = [values[source] for source in sources]
        module = randomize_batch_norms(case.build(), len(values)).eval()
        fits = [step.fit] if step.fit in ("moves", "layer") else [step.fit, "moves"]
        for fit in fits:
            block = nn.ModuleList([*_adapters(fit, given, case), module])
            try:
                result = _run_block(block, given, step.behind)
            except (RuntimeError, IndexError, ValueError):
                continue
            usable = isinstance(result, Tensor) and result.dtype == torch.float32
            if not usable or not 0 < result.numel() <= _MOST_ELEMENTS:
                continue
            if not bool(result.isfinite().all()) or float(result.abs().max()) > _LARGEST_VALUE:
                continue
            self.blocks.append(block)
            self.wiring.append((sources, step.behind))
            values.append(result)
            return

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = list(inputs)
        for block, (sources, behind) in zip(self.blocks, self.wiring, strict=True):
            picked = [values[source] for source in sources]
            values.append(_run_block(cast(nn.ModuleList, block), picked, behind))
        return [values[i] for i in self.results]


def _adapters(fit: Fit, given: Sequence[Tensor], case: Case) -> list[nn.Module]:
    shapes = [tuple(value.shape) for value in given]
    if fit == "as it is":
        return [nn.Identity() for _ in given]
    if fit == "first":
        return [Moved(shape, shapes[0]) for shape in shapes]
    make = Moved if fit == "moves" else _layer
    return [make(shape, wanted) for shape, wanted in zip(shapes, case.shapes, strict=True)]


def _run_block(block: nn.ModuleList, given: Sequence[Tensor], behind: str | None) -> Tensor:
    *adapters, module = block
    result = module(*[adapt(value) for adapt, value in zip(adapters, given, strict=True)])
    return result if behind is None else ACTIVATIONS[behind](result)


# ---------------------------------------------------------------------------------------------
# Strategies
# ---------------------------------------------------------------------------------------------

_OBSERVERS = ("minmax", "minmax", "percentile99.9", "histogram", "entropy", "moving_average", "lsq")
_BITS = st.one_of(st.just(8), st.just(8), st.integers(2, 16))


@st.composite
def schemes(draw: st.DrawFn) -> str | None:
    """Names of legal schemes, ``None`` for float."""
    if draw(st.integers(0, 9)) == 9:
        return draw(st.sampled_from((None, "dyn8w8", "dyn8w4", "dyn8w4g32")))
    activation, weight = draw(_BITS), draw(_BITS)
    parts = [f"a{activation}w{weight}"]
    if draw(st.booleans()):
        parts.append("per_tensor")
    if activation <= 8 and draw(st.integers(0, 3)) == 3:
        parts.append("symmetric")
    if draw(st.integers(0, 3)) == 3:
        parts.append("narrow")
    if draw(st.integers(0, 4)) == 4:
        parts.append("full")
    bias = draw(st.integers(-1, 32))
    if bias in (-1, 0) or 4 <= bias < 32:
        parts += ["biasfloat"] if bias == -1 else [f"bias{bias}"] if bias else []
    observer = draw(st.sampled_from(_OBSERVERS))
    return "-".join([*parts, *([] if observer == "minmax" else [observer])])


_FORMATS = st.sampled_from((None, None, None, "a8", "a8-symmetric", "a4", "a16", "a8-histogram"))
_FAMILIES = tuple(dict.fromkeys(family for family, _ in CASES))
_LAYERS = ("conv", "linear", "conv_transpose", "add", "mul")
_SHAPES = ((2, 8, 5, 7), (2, 8, 10, 9), (2, 8, 6, 4), (2, 8, 21), (5, 16), (3, 11), (2, 3, 5, 8))


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """One op: any case of any family, layers more often than the rest."""
    family = draw(st.one_of(st.sampled_from(_FAMILIES), st.sampled_from(_LAYERS)))
    case = draw(st.sampled_from([case for name, case in CASES if name == family]))
    return Step(
        family,
        case,
        tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=2))),
        draw(st.sampled_from(FITS)),
        draw(st.sampled_from((None, None, None, *ACTIVATIONS))),
    )


_SCOPES = ("node", "module", "operator")


@st.composite
def samples(draw: st.DrawFn, most_steps: int = 10) -> Sample:
    """Models of up to ``most_steps`` steps; a third of them plain ``a8w8``."""
    shapes = tuple(draw(st.lists(st.sampled_from(_SHAPES), min_size=1, max_size=3)))
    count = draw(st.integers(1, most_steps))  # hypothesis prefers short lists
    model = tuple(draw(st.lists(steps(), min_size=count, max_size=count)))
    returned = tuple(draw(st.lists(st.integers(0, 9), max_size=2)))
    seed = draw(st.integers(0, 999))
    if draw(st.integers(0, 2)) == 0:
        return Sample(shapes, model, returned=returned, seed=seed)
    rule = st.tuples(st.sampled_from(_SCOPES), st.integers(0, 19), schemes())
    default = draw(schemes()) or "a8w8"
    rules = tuple(draw(st.lists(rule, max_size=4)))
    return Sample(
        shapes, model, default, rules, draw(_FORMATS), draw(_FORMATS), returned=returned, seed=seed
    )


# ---------------------------------------------------------------------------------------------
# From a sample to a converted graph
# ---------------------------------------------------------------------------------------------


def quantizer_of(sample: Sample, captured: GraphModule) -> cq.IntegerQuantizer:
    """The rules of a sample, for the nodes, modules and operators that its graph has."""
    quantizer = cq.IntegerQuantizer().set_global(sample.default)
    graph = canonicalize(captured).graph  # names are those of the plan
    calls = [
        node
        for node in graph.nodes
        # Batch norms are folded before the quantizer sees the graph.
        if isinstance(node.target, torch._ops.OpOverload) and "batch_norm" not in node.name
    ]
    for scope, position, scheme in sample.rules:
        node = calls[position % len(calls)]
        if scope == "node":
            quantizer.set_node_name(node.name, scheme)
        elif scope == "operator":
            if node.target in known_targets():
                quantizer.set_operator_type(node.target, scheme)
        else:
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if stack and stack[-1][0]:
                quantizer.set_module_name(stack[-1][0], scheme)
    if sample.inputs_as or sample.outputs_as:
        quantizer.set_io(sample.inputs_as, sample.outputs_as)
    return quantizer


class NothingToQuantizeError(Exception):
    """All ops of a sample are float, and the quantizer said so."""


def converted(sample: Sample) -> Converted:
    """Build, capture, prepare, calibrate on two batches, convert.

    Raises:
        NothingToQuantizeError: the plan would be empty; the message names every reason.
        CustomQuantizerError: whatever else; a model of ordinary ops and legal schemes gives none.
    """
    torch.manual_seed(sample.seed)
    model = Model(sample).eval()
    if not model.wiring:
        raise NothingToQuantizeError
    capture = torch.export.export(model, model.example)
    quantizer = quantizer_of(sample, capture.module())
    try:
        prepared = prepare_pt2e(capture.module(), quantizer)
        quantizer.check_plan()
    except cq.ConfigError as error:
        if "there is nothing to quantize" not in str(error):
            raise
        raise NothingToQuantizeError from error
    for scale in (1.0, 0.5):
        prepared(*[scale * value for value in model.example])
    return Converted(convert_pt2e(prepared), quantizer.last_plan, model.example)


def batches(example: Inputs, seed: int = 1) -> list[Inputs]:
    """The example, other values, and values that saturate."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Inputs:
        return tuple(torch.randn(x.shape, generator=generator) * scale for x in example)

    return [example, draw(1.2), draw(20.0)]


# ---------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------


def check_plan(done: Converted) -> ConvertedGraph:
    """Nothing is float in silence: what was planned as integer is, the rest says why."""
    graph = read_converted(done.graph)
    integer = {op.node.name: op for op in graph.integer}
    reasons = {op.node.name: op.reason for op in graph.floating}
    fallbacks = {op.node.name for op in graph.floating if op.float_fallback}
    assert [name for name, reason in reasons.items() if not reason] == []
    for op in done.plan.parts:
        if op.scheme is None:
            assert op.reason, op.node
            # What stands between the borders of its neighbours computes on integers all the same.
            found = integer.get(op.node)
            assert found is None or found.weight is None, f"{op.node}, although {op.reason}"
        elif op.scheme.startswith("dyn"):
            assert op.node in reasons, op.node
        elif op.node in fallbacks:
            pass  # decided by the scales that calibration found, and reported
        elif "bias" in {t.role for t in op.tensors if t.dtype == "float32"}:
            assert reasons.get(op.node) == "its bias is in float", (op, reasons.get(op.node))
        else:
            assert op.node in integer, f"{op.node} is float: {reasons.get(op.node)}"
            found = integer[op.node]
            assert (found.output_node.name != op.node) == (op.fused is not None), op
            predicted = BACKEND.predict(found.match, found.formats)
            assert predicted.kernel.label == op.backend, op
    planned = {name for op in done.plan.parts for name in (op.node, op.fused)}
    assert sorted({*integer, *reasons} - planned) == [], "ops that the plan does not have"
    for op in graph.integer:
        _check_integers(graph.model, op)
    return graph


def _check_integers(model: GraphModule, op: QuantizedOp) -> None:
    """Weights lie in their range; biases are int32 with the scale of the accumulator."""
    if op.weight is None or op.weight_qparams is None:
        return
    weight = op.weight_qparams
    assert weight.quant_min <= int(op.weight.min()), op.node
    assert int(op.weight.max()) <= weight.quant_max, op.node
    node = op.match.bias
    if node is None:
        return
    stored, scale = cast(Node, node.args[0]), node.args[1]
    assert operator.attrgetter(str(stored.target))(model).dtype is torch.int32
    scale = operator.attrgetter(str(scale.target))(model) if isinstance(scale, Node) else scale
    unit = derived_scale(
        cast(float, op.inputs[0].scale), expand_channels(torch.as_tensor(weight.scale), op.match)
    )
    # Narrow biases are shifted left when they are added: a power of two.
    fraction, exponent = torch.frexp(torch.as_tensor(scale, dtype=torch.float32) / unit)
    assert bool(((fraction == 0.5) & (exponent >= 1)).all()), (op.node, scale, unit)


class Recorded(IntegerReference):
    """A reference that remembers what every quantize node gave."""

    def __init__(self, graph: ConvertedGraph) -> None:
        super().__init__(graph)
        self.stored: dict[Node, Tensor] = {}

    def _evaluate(self, node: Node, values: Any, record: Any) -> Any:
        result = super()._evaluate(node, values, record)
        if is_quantize(node) and is_static(node):
            self.stored[node] = result
        return result


class Compared(Interpreter):
    """The converted graph in PyTorch, op by op on integers that somebody else computed.

    Each quantize node gives what it is told instead of what it computed, so that differences do
    not add up and the bound for a single op (``docs/device_arithmetic.md``) applies to each. Layers
    that quantize at run time have the scales of the backend.
    """

    def __init__(self, graph: ConvertedGraph, stored: dict[Node, Tensor]) -> None:
        super().__init__(graph.model)
        self.stored = stored
        self.makers = {op.output_node: op for op in graph.integer}
        self.run_time = graph.backend.run_time
        self.layers = {op.node: op.run_time for op in graph.floating if op.run_time is not None}
        self.values: dict[Node, Any] = {}
        self.wrong: list[str] = []

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if self.run_time is not None and n in self.layers:
            layer = self.layers[n]
            result = self.run_time.compute(layer, self.values[layer.source])
        self.values[n] = result
        given = self.stored.get(n)
        if given is None:
            return result
        source = cast(Node, n.args[0])
        # PyTorch stores NaN, such as 0 / 0, as whatever the processor makes of it.
        number = ~torch.isnan(self.values[source])
        off = int(((given.to(torch.int64) - result.to(torch.int64)) * number).abs().max())
        op = self.makers.get(source)
        bound = 1 if op is None else 1 + self._excess(op)
        if off > bound:
            what = "border" if op is None else op.match.rule.family
            self.wrong.append(f"{source.name} ({what}): {off} units off, at most {bound} allowed")
        # In the memory format that the views behind it were captured with.
        return torch.empty_like(result).copy_(given)

    def _excess(self, op: QuantizedOp) -> int:
        """Units beyond the rounding of either side, rounded up if they reach half a unit."""
        scale = cast(float, op.output.scale)
        excess = 0.0
        if op.match.rule.family == "silu" and not op.is_wide:
            # Its sigmoid is rounded to 8 bits, half a step of at most 1.02 / 255.
            excess = _largest(op.inputs[0]) * 0.5 * 1.02 / 255 / scale
        elif is_tanh_gelu(op.node):
            excess = 4.8e-4 / scale
        elif op.match.rule.family == "upsample_bilinear2d":
            # Positions are rounded to fractions of a pixel, in two dims; pixels are that far apart.
            pixels = self.values[op.match.inputs[0]]
            unit = 2.0 ** -position_bits(op.output.bits)
            excess = 2 * 0.5 * unit * float(pixels.max() - pixels.min()) / scale
        elif op.match.weight is not None or op.match.rule.family == "matmul":
            # float32 sums in PyTorch: (K + 1) * 2**-24 * A, and 2 * 2**-24 of the result.
            arguments = [self._size(arg) for arg in op.node.args]
            size = cast(Callable[..., Tensor], op.node.target)(*arguments, **op.node.kwargs)
            terms = self._terms(op)
            units = (op.output.quant_max - op.output.quant_min) * 2.0**-23
            excess = (terms + 1) * 2.0**-24 * float(size.max()) / scale + units
        return round(excess)

    def _size(self, arg: Any) -> Any:
        return self.values[arg].abs() if isinstance(arg, Node) else arg

    def _terms(self, op: QuantizedOp) -> int:
        right = self.values[cast(Node, op.node.args[1])]
        return int(right.numel() // right.shape[op.match.weight_axis])


def _largest(q: QParams) -> float:
    reach = max(abs(q.quant_max - q.zero_point), abs(q.quant_min - q.zero_point))
    return reach * cast(float, q.scale)


_NO_SCALE = "no scale can be chosen"
"""What the reference says of NaN and infinities that layers quantize at run time."""


def check_reference(done: Converted, graph: ConvertedGraph, mode: str = "xnnpack") -> None:
    """The reference runs, and each of its ops gives what the converted graph gives."""
    for inputs in batches(done.example):
        reference = Recorded(read_converted(graph.model, get_mode(mode)))
        try:
            want = pytree.tree_leaves(reference(*inputs))
        except cq.SchemeError as error:
            # Multipliers and shifts reach less far than scales do, and say so.
            if mode == "fixed_point" and "out of reach of this arithmetic" in str(error):
                return
            raise
        except cq.InputError as error:
            if _NO_SCALE in str(error):
                continue
            raise
        compared = Compared(reference.graph, reference.stored)
        got = pytree.tree_leaves(compared.run(*inputs))
        assert compared.wrong == [], compared.wrong
        for node, stored in reference.stored.items():
            q = reference._qparams[node]
            assert q.quant_min <= int(stored.min()), node
            assert int(stored.max()) <= q.quant_max, node
        # Float ops behind the same integers compute the same numbers, in the same kernels.
        assert differences(want, got) == []


def check_converted(sample: Sample, modes: Sequence[str] = ("xnnpack", "fixed_point")) -> Converted:
    """All that must hold of a sample up to the integer reference.

    Raises:
        NothingToQuantizeError: it has no op that could be quantized.
    """
    done = converted(sample)
    graph = check_plan(done)
    for mode in modes:
        check_reference(done, graph, mode)
    return done


def check_lowered(sample: Sample) -> cq.LoweredProgram:
    """And the same of the program: where its ops run, and what it computes.

    Raises:
        NothingToQuantizeError: it has no op that could be quantized.
    """
    done = check_converted(sample, ("xnnpack",))
    graph = read_converted(done.graph)
    program = cq.lower(done.graph, done.example)
    rows = {row.node: row for row in program.report.ops}
    assert rows.keys() == {op.node.name for op in graph}
    fallbacks = {op.node.name for op in graph.floating if op.float_fallback}
    nodes = {node.name: node for node in done.graph.graph.nodes}
    for op in done.plan.parts:
        if op.scheme is None:
            continue
        row = rows[op.node]
        if op.node in fallbacks:
            assert row.backend is kernels.FLOAT, row
            continue
        # Moves in a row become one, in the place of any of them: also behind the dequantize step,
        # if all that reads it is float.
        merged = op.family in _MOVERS and (
            row.backend is kernels.FOLDED
            or (row.backend is kernels.FLOAT and _is_read_in_float(nodes[op.node], rows))
        )
        assert merged or row.backend.label == op.backend, (op.node, row, op.note)
    for row in program.report.not_integer():
        assert row.reason, row
    if is_exact(program, graph):
        reference = cq.integer_reference(done.graph)
        shapes = [tuple(x.shape) for x in done.example]
        for given in [*batches(done.example), *stress(shapes)]:
            try:
                want = reference(*given)
            except cq.InputError as error:
                if _NO_SCALE in str(error):
                    continue
                raise
            assert differences(program.run(*given), want) == []
    else:
        check_each_tensor(done)
        layers = run_time_layers(graph, done.example)
        assert [str(layer) for layer in layers if layer.beyond] == []
    return program


def _is_read_in_float(node: Node, rows: Mapping[str, Any]) -> bool:
    """Whether float ops, and nothing else, read the integers of a node."""
    readers = [user for step in node.users for real in step.users for user in real.users]
    found = [rows.get(reader.name) for reader in readers]
    return bool(found) and all(row is not None and row.backend is kernels.FLOAT for row in found)


def check_each_tensor(done: Converted) -> None:
    """A program with float ops: each quantized tensor follows from those before it.

    The graph is lowered with every quantized tensor as an output.
    """
    tapped, taps = instrumented(done.graph)
    if not taps:
        return  # all scales are chosen at run time
    graph = read_converted(tapped)
    program = cq.lower(tapped, done.example, check=False)
    nodes = [n for n in tapped.graph.nodes if is_quantize(n) and not is_constant(n.args[0])]
    nodes = [n for n in nodes if is_static(n)]
    assert [cast(Node, n.args[0]).name for n in nodes] == [name for name, _ in taps]
    for inputs in batches(done.example):
        stored = tapped_integers(tapped, pytree.tree_leaves(program.run(*inputs)))
        compared = Compared(graph, stored)
        compared.run(*inputs)
        # The delegate chooses scales at run time row by row, PyTorch tensor by tensor.
        dynamic = {cast(Node, node.args[0]).name for node in nodes if _chosen_at_run_time(node)}
        wrong = [line for line in compared.wrong if line.split(" ")[0] not in dynamic]
        assert wrong == [], wrong


def _chosen_at_run_time(node: Node) -> bool:
    """Whether a scale that is chosen at run time has a part in a float tensor."""
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        source = waiting.pop()
        if is_run_time_quantization(source):
            return True
        if source not in seen and not (is_quantize(source) and is_static(source)):
            waiting += source.all_input_nodes
        seen.add(source)
    return False


__all__ = [
    "CASES",
    "Compared",
    "Model",
    "NothingToQuantizeError",
    "Recorded",
    "Sample",
    "Step",
    "check_converted",
    "check_each_tensor",
    "check_lowered",
    "check_plan",
    "check_reference",
    "converted",
    "samples",
    "schemes",
    "steps",
]
