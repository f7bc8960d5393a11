"""What every entry of the registry promises, checked on its cases in the real runtime.

The file of a family's tests subclasses a contract and names the families it covers::

    class TestContract(GemmContract):
        families = ("linear",)

All cases of a family become one model with an output each, so that a family costs one lowering, and
with ``together`` all families of the file. The slow tests lower every case alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import BACKEND, kernels
from custom_quantizer.ops import REGISTRY, Case, OpRule, rule_of
from custom_quantizer.ops.backend import get_mode
from custom_quantizer.ops.placement import Placement
from custom_quantizer.planning.plan import Plan
from custom_quantizer.reference.converted import ConvertedGraph, read_converted
from support.graphs import Function, Inputs, differences, stress
from support.models import convert, randomize_batch_norms
from support.registry import Surrounded
from support.scripts import DOCS

__all__ = ["RULES", "Contract", "FloatContract", "GemmContract", "IntegerContract", "cases_of"]

aten = torch.ops.aten
RULES = {rule.family: rule for rule in REGISTRY}
PER_CHANNEL, PER_TENSOR = SCHEMES = ("a8w8", "a8w8-per_tensor")
GEMMS = ("conv", "conv_transpose", "linear")

# Of the cases with one scale for the whole weight these are not slow: the kind of scale meets the
# rank, the groups, the folding of batch norms and the activation behind, and nothing else.
REPRESENTATIVE = {
    "conv": ("2d", "2d_depthwise", "2d_bn_relu", "1d"),
    "conv_transpose": ("2d", "2d_grouped", "2d_bn_relu6", "1d"),
    "linear": ("plain", "3d", "bn"),
}


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
    """Its own cases, and those that reach the other overloads it claims."""
    return rule.cases + EXTRA.get(rule.family, ())


# ---------------------------------------------------------------------------------------------
# Programs of cases
# ---------------------------------------------------------------------------------------------

Picked = tuple[tuple[OpRule, Case], ...]


def _key(family: str, case: str) -> str:
    return f"case_{family}_{case}"


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


class FloatFamily(nn.Module):
    """Cases without integer kernels, whose inputs are tensors of integers."""

    def __init__(self, picked: Picked) -> None:
        super().__init__()
        self.arity = [len(case.shapes) for _, case in picked]
        modules = {_key(rule.family, case.name): case.build() for rule, case in picked}
        self.cases = nn.ModuleDict(modules)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        doubled = [x + x for x in inputs]
        feed = iter(doubled)
        outputs = [
            module(*[next(feed) for _ in range(count)])
            for count, module in zip(self.arity, self.cases.values(), strict=True)
        ]
        # Between float ops alone the planner would leave the sums in float.
        return outputs + [x + x for x in doubled]


@dataclass(frozen=True)
class Lowered:
    """Some cases, from the float model to outputs of the runtime."""

    model: Family | FloatFamily
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

    def floats_of(self, name: str, case: str) -> list[Any]:
        """The float ops of a case that is not surrounded by others."""
        path = f"cases.{_key(name, case)}"
        return [
            op
            for op in self.graph.floating
            if any(p == path or p.startswith(path + ".") for p, _ in _stack(op.node))
        ]

    def gemm_of(self, name: str, case: str) -> Node:
        (node,) = (op.node for op in self.ops_of(name, case) if op.node.target in GEMM_TARGETS)
        return cast(Node, node)


GEMM_TARGETS = frozenset().union(*(RULES[f].targets for f in GEMMS))


def _stack(node: Node) -> list[tuple[str, Any]]:
    return list((node.meta.get("nn_module_stack") or {}).values())


def lower_cases(picked: Picked, scheme: str) -> Lowered:
    """Calibrate on one example, lower with the checks of the package, run what saturates too."""
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


@dataclass(frozen=True, eq=False)
class Part:
    """Cases that are one program."""

    name: str
    picked: Picked
    scheme: str = PER_CHANNEL
    slow: bool = False

    def __str__(self) -> str:
        return f"{self.name}-{self.scheme}"

    @property
    def marks(self) -> tuple[pytest.MarkDecorator, ...]:
        return (pytest.mark.slow,) if self.slow else ()


@cache
def lower(part: Part) -> Lowered:
    return lower_cases(part.picked, part.scheme)


@cache
def lower_floats(part: Part) -> Lowered:
    """As :func:`lower`, of float families, on inputs of ordinary size."""
    torch.manual_seed(0)
    model = FloatFamily(part.picked)
    shapes = [shape for _, case in part.picked for shape in case.shapes]
    done = convert(model, tuple(torch.randn(shape) for shape in shapes), part.scheme)
    program = cq.lower(done.graph, done.example)
    reference = cq.integer_reference(done.graph)
    generator = torch.Generator().manual_seed(1)
    inputs = [
        tuple(torch.randn(shape, generator=generator) * size for shape in shapes)
        for size in (1.0, 0.1)
    ]
    return Lowered(
        model,
        done.plan,
        {},
        read_converted(done.graph),
        program,
        inputs,
        [program.run(*given) for given in inputs],
        [reference(*given) for given in inputs],
    )


# ---------------------------------------------------------------------------------------------
# Contracts
# ---------------------------------------------------------------------------------------------


class Contract:
    """Tests of the families that a subclass names, which take a ``part``, or a case of one."""

    families: ClassVar[tuple[str, ...]]
    together: ClassVar[bool] = False
    """Whether all of them are one program."""

    @classmethod
    @cache
    def parts(cls) -> tuple[Part, ...]:
        """The programs that the cases are lowered in: every case in one of each scheme."""
        rules = [RULES[name] for name in cls.families]
        picked = [tuple((rule, case) for case in cases_of(rule)) for rule in rules]
        if cls.together:
            return (Part("all", sum(picked, ())),)
        return tuple(Part(some[0][0].family, some) for some in picked if some)

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Parametrize by part, by case, or by the part that is a case alone."""
        names = metafunc.fixturenames
        if "alone" in names:
            found = [
                Part(f"{rule.family}-{case.name}", ((rule, case),), scheme)
                for part in cls.parts()
                for rule, case in part.picked
                for scheme in SCHEMES
                if part.scheme == PER_CHANNEL
            ]
            metafunc.parametrize("alone", found, ids=str)
        elif "case" in names:
            cases = [
                pytest.param(
                    *(part, rule.family, case.name),
                    id=f"{rule.family}-{case.name}-{part.scheme}",
                    marks=part.marks,
                )
                for part in cls.parts()
                for rule, case in part.picked
            ]
            metafunc.parametrize(("part", "name", "case"), cases)
        else:
            parts = [pytest.param(part, id=str(part), marks=part.marks) for part in cls.parts()]
            metafunc.parametrize("part", parts)


class IntegerContract(Contract):
    """Of families with integer kernels: one delegate, and the integers of the reference."""

    def test_the_cases_are_one_delegate_call_with_nothing_outside(self, part: Part) -> None:
        report = lower(part).program.report
        assert (report.delegates, report.outside) == (1, ())
        assert report.fully_delegated

    def test_runtime_equals_the_integer_reference(self, part: Part, name: str, case: str) -> None:
        done = lower(part)
        index = done.index(name, case)
        for got, want in zip(done.got, done.want, strict=True):
            assert differences(got[index], want[index]) == []

    def test_every_op_of_a_case_is_integer_and_runs_where_predicted(
        self, part: Part, name: str, case: str
    ) -> None:
        done = lower(part)
        rows = {row.node: row for row in done.program.report.ops}
        ops = done.ops_of(name, case)
        # The family's op, or the activation that is part of another.
        wanted = RULES[ANOTHER_FAMILY.get((name, case), name)]
        assert any(wanted in (op.match.rule, rule_of(op.output_node)) for op in ops)
        assert [op.node.name for op in ops if op not in done.graph.integer] == []
        for op in ops:
            predicted = BACKEND.predict(op.match, op.formats).kernel
            row = rows[op.node.name]
            assert (op.node.name, row.backend) == (op.node.name, predicted)
            if predicted not in (kernels.INT8, kernels.FOLDED):
                assert row.reason, "an op that is not plain int8 says why"

    def test_qparams_are_shared_as_declared(self, part: Part, name: str, case: str) -> None:
        done = lower(part)
        for op in done.ops_of(name, case):
            if op.match.rule.moves_values:
                assert all(op.output.same_grid(given) for given in op.inputs), op.node.name
            else:
                planned = done.plan.op(op.node.name)
                groups = {tensor.role: tensor.group for tensor in planned.tensors}
                assert groups["input"] != groups["output"], op.node.name

    def test_arithmetics_differ_by_at_most_one_unit_on_the_same_integers(self, part: Part) -> None:
        """All modes round the same real number; two nearest integers of it are neighbours."""
        done = lower(part)
        reference = cq.integer_reference(done.graph.model)
        _, record = reference.with_integers(*done.inputs[0])
        assert done.graph.integer
        for op in done.graph.integer:
            if op.match.rule.moves_values:
                continue
            given = [_recorded(done.graph.model, record, node) for node in op.match.inputs]
            for mode in ("exact", "fixed_point"):
                integers = get_mode(mode).compute(op, given)
                apart = (integers.long() - record[op.output_node.name].long()).abs().max()
                assert int(apart) <= 1, (mode, op.node.name)

    @pytest.mark.slow
    def test_every_case_alone(self, alone: Part) -> None:
        done = lower_cases(alone.picked, alone.scheme)
        report = done.program.report
        assert (report.delegates, report.outside) == (1, ())
        assert done.graph.floating == ()
        for got, want in zip(done.got, done.want, strict=True):
            assert differences(got, want) == []


class FloatContract(Contract):
    """Of families without integer kernels: where they run, and how near to the reference."""

    together = True

    def own(self, part: Part, name: str, case: str) -> list[Any]:
        """The ops of a case that are of its family."""
        found = [op for op in lower_floats(part).floats_of(name, case) if rule_of(op.node)]
        return [op for op in found if rule_of(op.node) is RULES[name]]

    def test_it_is_planned_in_float_for_the_backend_s_reason(
        self, part: Part, name: str, case: str
    ) -> None:
        found = self.own(part, name, case)
        assert found
        for op in found:
            planned = lower_floats(part).plan.op(op.node.name)
            assert (planned.family, planned.scheme, planned.tensors) == (name, None, ())
            assert planned.reason == op.reason == BACKEND.support(RULES[name]).float_reason

    def test_it_runs_where_predicted_and_the_report_says_no_other_place(
        self, part: Part, name: str, case: str
    ) -> None:
        done = lower_floats(part)
        rows = {row.node: row for row in done.program.report.ops}
        for op in self.own(part, name, case):
            row, predicted = rows[op.node.name], BACKEND.in_float(op.node)
            assert (op.node.name, row.backend) == (op.node.name, predicted)
            assert done.plan.op(op.node.name).placement == predicted.placement.value
            assert row.reason
            outside = predicted.placement is Placement.OUTSIDE
            assert bool(row.outside) is outside
            assert ("inside the delegate" if outside else "outside") not in row.reason

    def test_it_has_a_row_in_the_docs(self, part: Part, name: str, case: str) -> None:
        text = (DOCS / "ops.md").read_text(encoding="utf-8")
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert all(str(target).split(".")[1] in row for target in RULES[name].targets)

    def test_outside_the_delegate_is_what_the_report_says(self, part: Part) -> None:
        report = lower_floats(part).program.report
        assert len(report.outside) == [row.backend for row in report.ops].count(kernels.PORTABLE)

    def test_runtime_is_near_the_reference(self, part: Part, name: str, case: str) -> None:
        done = lower_floats(part)
        index = done.index(name, case)
        for got, want in zip(done.got, done.want, strict=True):
            error = float((got[index] - want[index]).abs().max())
            assert error <= 4e-6 * max(1.0, float(want[index].abs().max()))


class GemmContract(IntegerContract):
    """Of families with weights: also weights and biases, without this package's arithmetic."""

    @classmethod
    @cache
    def parts(cls) -> tuple[Part, ...]:
        made = list(super().parts())
        for part in super().parts():
            for slow in (False, True):
                some = tuple(
                    (rule, case)
                    for rule, case in part.picked
                    if (case.name not in REPRESENTATIVE[rule.family]) is slow
                )
                made.append(
                    Part(f"{part.name}-rest" if slow else part.name, some, PER_TENSOR, slow)
                )
        return tuple(made)

    def test_bias_is_the_float_bias_over_input_scale_times_weight_scale(
        self, part: Part, name: str, case: str
    ) -> None:
        done = lower(part)
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
        per_tensor = part.scheme == PER_TENSOR or _grouped(name, case)
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

    def test_weight_is_rounded_to_the_scale_of_its_largest_value(
        self, part: Part, name: str, case: str
    ) -> None:
        done = lower(part)
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

    def test_biases_in_the_file_are_those_of_the_graph(self, part: Part) -> None:
        done = lower(part)
        stored = done.program.integer_biases()
        expected = {op.node.name: op.bias for op in done.graph.integer if op.bias is not None}
        assert stored.keys() == expected.keys()
        for node, bias in expected.items():
            assert stored[node].dtype == np.int32
            assert np.array_equal(stored[node], bias.numpy())


def _recorded(model: GraphModule, record: dict[str, Tensor], dequantize: Node) -> Tensor:
    stored = cast(Node, dequantize.args[0])
    if stored.op == "get_attr":  # a constant, quantized at conversion
        return _attribute(model, stored).to(torch.int32)
    return record[cast(Node, stored.args[0]).name]


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
