"""What every entry of the registry promises, checked on its cases in the real runtime.

All cases of a family become one model with an output each, so that a family costs one lowering, and
all functions of one tensor together one; the slow tests lower every case alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, Inputs, canonicalize, differences, stress
from support.models import randomize_batch_norms
from support.registry import Surrounded
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.errors import ConversionError, CustomQuantizerError
from custom_quantizer.ops import (
    REGISTRY,
    Case,
    OpRule,
    QParamSharing,
    _index,
    functions,
    known_targets,
    rule_of,
)
from custom_quantizer.ops.backend import get_mode
from custom_quantizer.ops.gemm import symmetric_padding
from custom_quantizer.planning.planner import Plan
from custom_quantizer.reference.converted import ConvertedGraph, read_converted

aten = torch.ops.aten
RULES = {rule.family: rule for rule in REGISTRY}
GEMMS = ("conv", "conv_transpose", "linear")
SCHEMES = ("a8w8", "a8w8-per_tensor")


def _case(name: str, function: Any, *shapes: tuple[int, ...]) -> Case:
    return Case(name, lambda: Function(lambda _self, *x: function(*x)), shapes)


IMAGE = (2, 8, 6, 4)

# Overloads that an entry claims and none of its own cases produces.
EXTRA: dict[str, tuple[Case, ...]] = {
    "clamp": (
        _case("aten_clamp_min", lambda x: torch.clamp_min(x, -0.3), IMAGE),
        _case("aten_clamp_max", lambda x: torch.clamp_max(x, 0.4), IMAGE),
    ),
    "identity": (
        _case("aten_alias", lambda x: aten.alias.default(x), IMAGE),
        _case("aten_detach", lambda x: aten.detach.default(x), IMAGE),
        _case("aten_to", lambda x: aten.to.dtype(x, torch.float32), IMAGE),
        _case("aten_feature_dropout", lambda x: F.dropout2d(x, 0.5, training=False), IMAGE),
        _case("aten_lift", lambda x: aten.lift_fresh_copy.default(x), IMAGE),
    ),
    "reshape": (
        _case("aten_unflatten", lambda x: x.unflatten(1, (2, 4)), IMAGE),
        _case("aten_squeeze_dims", lambda x: x.squeeze((1, 3)), (2, 1, 6, 1)),
    ),
    "permute": (_case("aten_movedim", lambda x: x.movedim((1, 3), (3, 2)), IMAGE),),
    "slice": (_case("aten_narrow", lambda x: x.narrow(1, 2, 3), IMAGE),),
    "split": (
        _case("aten_split", lambda x: torch.cat(x.split(3, 1)[::-1], 1), IMAGE),
        _case("aten_split_sizes", lambda x: aten.split.sizes(x, [3, 5], 1)[1], IMAGE),
    ),
    "pad": (_case("aten_constant_pad", lambda x: aten.constant_pad_nd.default(x, [1, 0]), IMAGE),),
}


# What cases of one family consist of once the graph is canonical.
ANOTHER_FAMILY = {("avg_pool2d", "counted_padding"): "conv", ("silu", "written_out"): "mul"}


def cases_of(rule: OpRule) -> tuple[Case, ...]:
    return rule.cases + EXTRA.get(rule.family, ())


FAMILIES = [rule.family for rule in REGISTRY if rule.cases and rule.integers is not None]
# Per-tensor or per-channel is a question of weights.
PROGRAMS = [(f, s) for f in FAMILIES for s in SCHEMES if f in GEMMS or s == "a8w8"]
CASES = [(f, c.name, s) for f, s in PROGRAMS for c in cases_of(RULES[f])]
GEMM_CASES = [(f, c, s) for f, c, s in CASES if f in GEMMS]


Picked = tuple[tuple[OpRule, Case], ...]


class Family(nn.Module):
    """Cases side by side, where they are quantized: see :class:`Surrounded`."""

    def __init__(self, picked: Picked) -> None:
        super().__init__()
        self.arity = [len(case.shapes) for _, case in picked]
        modules = {_key(rule.family, case.name): Surrounded(rule, case) for rule, case in picked}
        self.cases = nn.ModuleDict(modules)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        outputs, feed = [], iter(inputs)
        for count, module in zip(self.arity, self.cases.values(), strict=True):
            outputs.append(module(*[next(feed) for _ in range(count)]))
        return outputs


def _key(family: str, case: str) -> str:
    return f"case_{family}_{case}"


@dataclass(frozen=True)
class Lowered:
    """Some cases, from the float model to outputs of the runtime."""

    model: Family
    plan: Plan
    floats: dict[str, Tensor]  # constants of the prepared graph: batch norms are folded there
    graph: ConvertedGraph
    program: cq.LoweredProgram
    inputs: list[Inputs]
    got: list[list[Tensor]]
    want: list[list[Tensor]]

    def index(self, name: str, case: str) -> int:
        return list(self.model.cases).index(_key(name, case))

    def ops_of(self, name: str, case: str) -> list[Any]:
        path = f"cases.{_key(name, case)}.case"
        return [
            op
            for op in self.graph
            if any(p == path or p.startswith(path + ".") for p, _ in _stack(op.node))
        ]

    def gemm_of(self, name: str, case: str) -> Node:
        (node,) = (op.node for op in self.ops_of(name, case) if op.node.target in GEMM_TARGETS)
        return cast(Node, node)


GEMM_TARGETS = frozenset().union(*(RULES[f].targets for f in GEMMS))


def _stack(node: Node) -> list[tuple[str, Any]]:
    return list((node.meta.get("nn_module_stack") or {}).values())


def lower_cases(picked: Picked, scheme: str) -> Lowered:
    torch.manual_seed(0)
    model = cast(Family, randomize_batch_norms(Family(picked)).eval())
    shapes = [shape for _, case in picked for shape in case.shapes]
    example = tuple(torch.randn(shape) for shape in shapes)
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    prepared(*example)
    floats = {
        str(node.target): _attribute(prepared, node).detach().clone()
        for node in prepared.graph.nodes
        if node.op == "get_attr"
    }
    converted = convert_pt2e(prepared)
    program = cq.lower(converted, example, check=True)
    reference = cq.integer_reference(converted)
    inputs = [example, *stress(shapes)]
    return Lowered(
        model,
        quantizer.last_plan,
        floats,
        read_converted(converted),
        program,
        inputs,
        [program.run(*given) for given in inputs],
        [reference(*given) for given in inputs],
    )


def _attribute(model: nn.Module, node: Node) -> Tensor:
    value: Any = model
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return cast(Tensor, value)


@cache
def together(names: tuple[str, ...], scheme: str) -> Lowered:
    rules = [RULES[name] for name in names]
    return lower_cases(tuple((rule, case) for rule in rules for case in cases_of(rule)), scheme)


FUNCTIONS = tuple(rule.family for rule in functions.RULES)


def family(name: str, scheme: str) -> Lowered:
    return together(FUNCTIONS if name in FUNCTIONS else (name,), scheme)


# ---------------------------------------------------------------------------------------------
# The registry itself
# ---------------------------------------------------------------------------------------------


def test_names_of_families_and_cases_are_unique() -> None:
    assert len(RULES) == len(REGISTRY)
    for rule in REGISTRY:
        names = [case.name for case in cases_of(rule)]
        assert len(set(names)) == len(names), rule.family


def test_every_claimed_overload_is_reached_by_a_case() -> None:
    reached: set[Any] = set()
    for rule in REGISTRY:
        for case in cases_of(rule):
            example = tuple(torch.randn(shape) for shape in case.shapes)
            exported = torch.export.export(case.build().eval(), example)
            reached |= {node.target for node in canonicalize(exported.module()).graph.nodes}
    assert set(known_targets()) == reached & set(known_targets())


def test_two_families_that_claim_one_op_are_an_error() -> None:
    with pytest.raises(CustomQuantizerError, match=r"claimed by two families, conv and conv"):
        _index((RULES["conv"], RULES["conv"]))


def _call(target: Any, *args: Any) -> Node:
    """A call of ``target`` on a tensor of which nothing is recorded."""
    graph = torch.fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args))


@pytest.mark.parametrize("family", ["add", "sub", "mul", "maximum"])
def test_a_number_in_the_place_of_a_tensor_is_refused(family: str) -> None:
    """Such as :mod:`custom_quantizer.ops.rewrites.canonical` leaves alone."""
    rule = RULES[family]
    (target,) = rule.targets
    reason = "one operand is a number that was not made a tensor"
    assert rule.bind(rule, _call(target, 0.5)) == reason


@pytest.mark.parametrize(
    ("target", "args", "bounds"),
    [
        (aten.relu6.default, (), (0.0, 6.0)),
        (aten.hardtanh.default, (), (-1.0, 1.0)),
        (aten.hardtanh.default, (-0.25,), (-0.25, 1.0)),
        (aten.hardtanh.default, (-0.25, 0.5), (-0.25, 0.5)),
        (aten.clamp.default, (-0.25,), (-0.25, None)),
        (aten.clamp.default, (None, 0.5), (None, 0.5)),
        (aten.clamp_min.default, (-0.25,), (-0.25, None)),
        (aten.clamp_max.default, (0.5,), (None, 0.5)),
    ],
)
def test_bounds_of_clamps(
    target: Any, args: tuple[Any, ...], bounds: tuple[float | None, float | None]
) -> None:
    """Export leaves out arguments that equal their defaults."""
    bounds_of = RULES["clamp"].bounds
    assert bounds_of is not None
    assert bounds_of(_call(target, *args)) == bounds


def test_a_kernel_of_unknown_size_is_an_error_that_names_the_op() -> None:
    node = _call(aten.conv2d.default)
    node.args = (node.args[0], node.graph.placeholder("weight"))
    with pytest.raises(ConversionError, match=r"^conv2d_default: no shape is recorded"):
        symmetric_padding(node)


# ---------------------------------------------------------------------------------------------
# Every family, in one program
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scheme"), PROGRAMS)
def test_a_family_is_one_delegate_call_with_nothing_outside(name: str, scheme: str) -> None:
    report = family(name, scheme).program.report
    assert (report.delegates, report.outside) == (1, ())
    assert report.fully_delegated


@pytest.mark.parametrize(("name", "case", "scheme"), CASES)
def test_runtime_equals_the_integer_reference(name: str, case: str, scheme: str) -> None:
    done = family(name, scheme)
    index = done.index(name, case)
    for got, want in zip(done.got, done.want, strict=True):
        assert differences(got[index], want[index]) == []


@pytest.mark.parametrize(("name", "case", "scheme"), CASES)
def test_every_op_of_a_case_is_integer_and_runs_where_predicted(
    name: str, case: str, scheme: str
) -> None:
    done = family(name, scheme)
    rows = {row.node: row for row in done.program.report.ops}
    ops = done.ops_of(name, case)
    # The family's op, or the activation that is part of another.
    wanted = RULES[ANOTHER_FAMILY.get((name, case), name)]
    assert any(wanted in (op.binding.rule, rule_of(op.output_node)) for op in ops)
    assert [op.node.name for op in ops if op not in done.graph.integer] == []
    for op in ops:
        predicted = BACKEND.predict(op.binding, op.formats).kernel
        row = rows[op.node.name]
        assert (op.node.name, row.backend) == (op.node.name, predicted)
        if predicted not in (kernels.INT8, kernels.FOLDED):
            assert row.reason, "an op that is not plain int8 says why"


@pytest.mark.parametrize(("name", "case", "scheme"), CASES)
def test_qparams_are_shared_as_declared(name: str, case: str, scheme: str) -> None:
    done = family(name, scheme)
    for op in done.ops_of(name, case):
        if op.binding.rule.sharing is QParamSharing.SAME:
            assert all(op.output.same_grid(given) for given in op.inputs), op.node.name
        else:
            planned = done.plan.op(op.node.name)
            groups = {tensor.role: tensor.group for tensor in planned.tensors}
            assert groups["input"] != groups["output"], op.node.name


# ---------------------------------------------------------------------------------------------
# Weights and biases, from the float model, without this package's arithmetic
# ---------------------------------------------------------------------------------------------


def _scale(model: GraphModule, dequantize: Node) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Scale of a dequantize node, in float64: scalar or per channel."""
    scale = dequantize.args[1]
    if isinstance(scale, Node):
        return _attribute(model, scale).numpy().astype(np.float64)
    return np.asarray(float(cast(float, scale)))


def _bias_of(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", module.bias)


def _gemm_modules(module: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The weighted module of a case, and the batch norm behind it."""
    children = list(module.children()) or [module]
    norm = children[1] if len(children) > 1 else None
    return children[0], norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


@pytest.mark.parametrize(("name", "case", "scheme"), GEMM_CASES)
def test_bias_is_the_float_bias_over_input_scale_times_weight_scale(
    name: str, case: str, scheme: str
) -> None:
    done = family(name, scheme)
    node = done.gemm_of(name, case)
    module, norm = _gemm_modules(done.model.cases[_key(name, case)].case)
    bias_node = node.args[2] if len(node.args) > 2 else None
    if _bias_of(module) is None and norm is None:
        assert bias_node is None
        return
    graph = done.graph.model
    data, weight = cast(Node, node.args[0]), cast(Node, node.args[1])
    assert isinstance(bias_node, Node)
    integers = _attribute(graph, cast(Node, bias_node.args[0]))
    assert integers.dtype is torch.int32

    input_scale, weight_scale = _scale(graph, data), _scale(graph, weight)
    assert np.float32(input_scale) == input_scale
    assert np.all(np.float32(weight_scale) == weight_scale)
    per_tensor = scheme.endswith("per_tensor") or _grouped(name, case)
    assert weight_scale.shape == (() if per_tensor else integers.shape)

    # The bias of the graph, whether it was the module's or came out of folding.
    floats = done.floats[_constant_name(done, node, "bias")].numpy().astype(np.float64)
    assert np.array_equal(np.rint(floats / (input_scale * weight_scale)), integers.numpy())
    # Its scale is the product, rounded once to float32, and the zero point is 0.
    product = (np.float32(input_scale) * weight_scale.astype(np.float32)).astype(np.float64)
    assert np.array_equal(_scale(graph, bias_node), product)
    zero_point = bias_node.args[2]
    if isinstance(zero_point, Node):
        assert not _attribute(graph, zero_point).any()
    else:
        assert zero_point == 0

    if norm is None:
        assert torch.equal(
            done.floats[_constant_name(done, node, "bias")], cast(Tensor, module.bias)
        )
        return
    own, size = _folded(module, norm)
    # Folding rounds a handful of times in float32, each time relative to one of the terms.
    assert np.all(np.abs(own - floats) <= 8 * 2.0**-24 * size)


def _grouped(name: str, case: str) -> bool:
    module = next(c for c in RULES[name].cases if c.name == case).build()
    return name == "conv_transpose" and cast(int, _gemm_modules(module)[0].groups) != 1


def _constant_name(done: Lowered, node: Node, role: str) -> str:
    """A constant of the prepared graph: the plan knows its node, capture named both."""
    planned = done.plan.op(node.name)
    (tensor,) = (tensor.tensor for tensor in planned.tensors if tensor.role == role)
    matches = [t for t in done.floats if t.replace(".", "_").lstrip("_") == tensor.lstrip("_")]
    assert len(matches) == 1, (tensor, sorted(done.floats))
    return matches[0]


def _folded(module: nn.Module, norm: nn.Module) -> tuple[Any, Any]:
    """The folded bias in float64, and the size of the terms it is a sum of."""

    def value(owner: nn.Module, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        tensor = cast(Tensor, getattr(owner, name))
        return tensor.detach().numpy().astype(np.float64)

    variance = value(norm, "running_var") + float(cast(float, norm.eps))
    factor = value(norm, "weight") / np.sqrt(variance)
    mean, shift = value(norm, "running_mean"), value(norm, "bias")
    bias = np.zeros_like(mean) if _bias_of(module) is None else value(module, "bias")
    size = (np.abs(bias) + np.abs(mean)) * np.abs(factor) + np.abs(shift)
    return (bias - mean) * factor + shift, size


@pytest.mark.parametrize(("name", "case", "scheme"), GEMM_CASES)
def test_weight_is_rounded_to_the_scale_of_its_largest_value(
    name: str, case: str, scheme: str
) -> None:
    done = family(name, scheme)
    node = done.gemm_of(name, case)
    dequantize = cast(Node, node.args[1])
    integers = _attribute(done.graph.model, cast(Node, dequantize.args[0]))
    assert integers.dtype is torch.int8
    weight = done.floats[_constant_name(done, node, "weight")].numpy()
    scale = _scale(done.graph.model, dequantize)
    axis = 1 if name == "conv_transpose" else 0
    if scale.ndim:
        others = tuple(i for i in range(weight.ndim) if i != axis)
        largest = np.abs(weight).max(axis=others)
        shape = [1] * weight.ndim
        shape[axis] = -1
    else:
        largest, shape = np.abs(weight).max(), []
    assert np.array_equal(scale, (largest / np.float32(127)).astype(np.float64))
    expected = np.rint(weight.astype(np.float64) / scale.reshape(shape))
    assert np.array_equal(np.clip(expected, -127, 127), integers.numpy())


@pytest.mark.parametrize(("name", "scheme"), [(f, s) for f, s in PROGRAMS if f in GEMMS])
def test_biases_in_the_file_are_those_of_the_graph(name: str, scheme: str) -> None:
    done = family(name, scheme)
    stored = done.program.integer_biases()
    expected = {op.node.name: op.bias for op in done.graph.integer if op.bias is not None}
    assert stored.keys() == expected.keys()
    for node, bias in expected.items():
        assert stored[node].dtype == np.int32
        assert np.array_equal(stored[node], bias.numpy())


# ---------------------------------------------------------------------------------------------
# Arithmetic modes, and every case alone
# ---------------------------------------------------------------------------------------------


def _recorded(model: GraphModule, record: dict[str, Tensor], dequantize: Node) -> Tensor:
    stored = cast(Node, dequantize.args[0])
    if stored.op == "get_attr":  # a constant, quantized at conversion
        return _attribute(model, stored).to(torch.int32)
    return record[cast(Node, stored.args[0]).name]


@pytest.mark.parametrize("name", FAMILIES)
def test_arithmetics_differ_by_at_most_one_unit_on_the_same_integers(name: str) -> None:
    """All modes round the same real number; the nearest integers of two of them are neighbours."""
    done = family(name, "a8w8")
    reference = cq.integer_reference(done.graph.model)
    _, record = reference.with_integers(*done.inputs[0])
    assert done.graph.integer
    for op in done.graph.integer:
        if op.binding.rule.sharing is QParamSharing.SAME:
            continue
        given = [_recorded(done.graph.model, record, node) for node in op.binding.inputs]
        for mode in ("exact", "fixed_point"):
            integers = get_mode(mode).compute(op, given)
            apart = (integers.long() - record[op.output_node.name].long()).abs().max()
            assert int(apart) <= 1, (mode, op.node.name)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("name", "case"), [(f, c.name) for f in FAMILIES for c in cases_of(RULES[f])]
)
def test_every_case_alone(name: str, case: str, scheme: str) -> None:
    rule = RULES[name]
    done = lower_cases(tuple((rule, c) for c in cases_of(rule) if c.name == case), scheme)
    report = done.program.report
    assert (report.delegates, report.outside) == (1, ())
    assert done.graph.floating == ()
    for got, want in zip(done.got, done.want, strict=True):
        assert differences(got, want) == []
