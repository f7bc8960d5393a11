"""What models do besides layers: control flow, state, containers, dtypes, sizes.

Each is converted, lowered and run, and equals the reference; or one error of ours says what to do.
Several stand side by side in one model where they can, since lowering costs seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.graphs import Function, differences
from torch import Tensor, nn
from torch._higher_order_ops import map as map_op
from torch._higher_order_ops import while_loop
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.errors import InputError

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def linear() -> nn.Linear:
    return nn.Linear(6, 6)


def converted(
    model: nn.Module, *inputs: Any, shapes: Any = None, **named: Any
) -> tuple[GraphModule, cq.IntegerQuantizer]:
    torch.manual_seed(0)
    captured = torch.export.export(model.eval(), inputs, named, dynamic_shapes=shapes).module()
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    prepared = prepare_pt2e(captured, quantizer)
    prepared(*inputs, **named)
    return convert_pt2e(prepared), quantizer


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def same(graph: GraphModule, lowered: cq.LoweredProgram, *runs: tuple[Any, ...]) -> None:
    """Several runs in a row: what a model remembers must agree as well."""
    reference = cq.integer_reference(graph)
    for inputs in runs:
        want, got = reference(*inputs), lowered.run(*inputs)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        assert differences(tensors(got), tensors(want)) == []


# ---------------------------------------------------------------------------------------------
# Control flow
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_branches_stay_in_float_and_run() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        y = torch.cond(x.sum() > 0, m.branch, lambda y: y * 2.0, (y,))
        return m.last(y)

    layers = {name: linear() for name in ("first", "branch", "last")}
    graph, quantizer = converted(Function(forward, **layers), X)
    reasons = {op.node: op.reason for op in quantizer.last_plan.floating}
    assert reasons["cond"] == "cond is control flow: the graphs it runs stay in float"
    lowered = cq.lower(graph, (X,))
    assert len(lowered.integer_biases()) == 2
    same(graph, lowered, (X,), (-X,), (X.abs(),), (-X.abs(),))


def test_a_layer_behind_a_check_of_values() -> None:
    """``torch.distributions`` checks its arguments; no program does, nor compares for it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.distributions.Normal(m.first(x), 1.5).log_prob(x)

    graph, quantizer = converted(Function(forward, first=linear()), X)
    assert not [op for op in quantizer.last_plan.ops if op.node.startswith(("eq", "_is_all"))]
    lowered = cq.lower(graph, (X,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ())


def test_what_a_check_reads_may_be_written_for_others_too() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        torch._assert_async((y.view(-1).add_(1.0).abs() < 1e9).all())
        return y * 2

    model = Function(forward, first=linear()).eval()
    exported = torch.export.export(model, (X,)).module()
    prepared = prepare_pt2e(exported, cq.IntegerQuantizer().set_global("a8w8"))
    assert torch.equal(prepared(X), model(X))


def test_only_branches() -> None:
    model = Function(
        lambda m, x: torch.cond(x.sum() > 0, m.first, lambda x: x * 2.0, (x,)), first=linear()
    )
    _, quantizer = converted(model, X)
    with pytest.raises(cq.ConfigError, match=r"nothing to quantize.*cond is control flow"):
        quantizer.check_plan()


@pytest.mark.slow
def test_a_map_runs() -> None:
    model = Function(lambda m, x: m.last(map_op(lambda r: r * 2, m.first(x))))
    model.first, model.last = linear(), linear()
    graph, quantizer = converted(model, X)
    assert any("control flow" in op.reason for op in quantizer.last_plan.floating)
    same(graph, cq.lower(graph, (X,)), (X,), (X * 3,))


def test_a_while_loop_runs_in_the_reference_and_is_refused_by_executorch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        start = (torch.tensor(0), m.first(x))
        _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 0.5), start)
        return m.last(y)

    graph, _ = converted(Function(forward, first=linear(), last=linear()), X)
    assert cq.integer_reference(graph)(X).shape == (2, 6)
    with pytest.raises(cq.LoweringError, match=r"control flow \(while_loop\).*unroll it"):
        cq.lower(graph, (X,))


# ---------------------------------------------------------------------------------------------
# Dynamic sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dynamic_batch_height_and_width() -> None:
    model = Function(lambda m, x: F.max_pool2d(m.a(x).relu(), 2), a=nn.Conv2d(3, 3, 3))
    dim = torch.export.Dim
    sizes = {0: dim("n", min=1, max=8), 2: dim("h", min=6, max=16), 3: dim("w", min=6, max=16)}
    x = torch.randn(2, 3, 8, 8)
    graph, _ = converted(model, x, shapes=((sizes,),))
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    given = [(1, 3, 6, 16), (5, 3, 10, 8), (2, 3, 8, 8)]
    same(graph, lowered, *((torch.randn(shape),) for shape in given))
    with pytest.raises(cq.InputError):
        lowered.run(torch.randn(1, 3, 17, 8))


# ---------------------------------------------------------------------------------------------
# Containers
# ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    scores: Tensor
    again: Tensor


torch.export.register_dataclass(Result, serialized_type_name="test_export_features.Result")


def test_nested_inputs_and_outputs() -> None:
    def forward(m: Any, pair: Any, flag: None, z: Tensor) -> Any:
        y = m.first(pair[0]) + pair[1]["k"]
        return {"a": y, "b": [m.last(z), None]}, (y, 3), z

    model = Function(forward, first=linear(), last=linear())
    inputs = ((X, {"k": X + 1}), None, X * 2)
    graph, _ = converted(model, *inputs)
    lowered = cq.lower(graph, inputs)
    same(graph, lowered, inputs, ((X * 3, {"k": X}), None, X))
    first, (second, three), z = lowered.run(*inputs)
    assert list(first) == ["a", "b"]
    assert (first["b"][1], three) == (None, 3)
    assert torch.equal(first["a"], second)
    assert torch.equal(z, inputs[2])


def test_a_dataclass() -> None:
    model = Function(lambda m, x: Result(m.first(x), m.last(x)), first=linear(), last=linear())
    graph, _ = converted(model, X)
    lowered = cq.lower(graph, (X,))
    assert isinstance(lowered.run(X), Result)
    assert lowered.report.fully_delegated
    same(graph, lowered, (X,))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()

    def forward(self, x: Tensor, *, gain: Tensor, offset: Tensor) -> Tensor:
        return self.linear(x) * gain - offset


class Pair(NamedTuple):
    """A type that no file knows."""

    first: Tensor
    second: Tensor


def test_a_named_tuple_that_is_not_registered() -> None:
    model = Function(lambda m, x: Pair(m.first(x), x), first=linear())
    graph, _ = converted(model, X)
    lowered = cq.lower(graph, (X,))
    assert isinstance(lowered.run(X), Pair)
    same(graph, lowered, (X,), (X * 2,))


def test_text_as_an_input() -> None:
    graph, _ = converted(Function(lambda m, x, how: m.first(x), first=linear()), X, "mean")
    with pytest.raises(InputError, match="input 1 is a str; a program takes tensors and numbers"):
        cq.lower(graph, (X, "mean"))


@pytest.mark.slow
def test_a_part_under_autocast_stays_in_float() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = linear(), linear()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.first(x)
            return self.last(y.float())

    result = cq.quantize(Half(), (X,), [(X,)], progress=False)
    (part, _, _) = (op for op in result.plan.ops if op.scheme is None)
    assert "torch.autocast computes it in torch.bfloat16" in part.reason
    assert "torch.autocast computes it" in str(result.report)


def test_inputs_by_keyword() -> None:
    graph, _ = converted(Keywords(), X, gain=X + 1, offset=X + 2)
    lowered = cq.lower(graph, (X, X + 1, X + 2))
    same(graph, lowered, (X, X + 1, X + 2))
    want = cq.integer_reference(graph)(X, offset=X * 2, gain=X)
    assert torch.equal(lowered.run(X, gain=X, offset=X * 2), want)
    assert torch.equal(lowered.run(X, X, X * 2), want)
    for call in (lowered.run, cq.integer_reference(graph)):
        with pytest.raises(cq.InputError, match="takes gain, offset by keyword, got gain"):
            call(X, gain=X)


def test_no_input_has_a_name() -> None:
    graph, _ = converted(Function(lambda m, x: m.a(x), a=linear()), X)
    with pytest.raises(cq.InputError, match="takes no inputs by keyword, got x"):
        cq.integer_reference(graph)(x=X)


# ---------------------------------------------------------------------------------------------
# Dtypes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = Function(lambda m, x: m.a(x), a=linear()).to(dtype)
    message = rf"linear: .* is {dtype}; only float32 .*call model\.float\(\)"
    _, quantizer = converted(model, X.to(dtype))
    with pytest.raises(cq.ConfigError, match=message):
        quantizer.check_plan()


def test_a_part_in_bfloat16_stays_in_float() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(m.narrow(x.bfloat16()).float())

    model = Function(forward, narrow=linear().bfloat16(), last=linear())
    graph, quantizer = converted(model, X)
    reasons = {op.node: op.reason for op in quantizer.last_plan.floating}
    assert "bfloat16; only float32 tensors are quantized" in reasons["linear"]
    lowered = cq.lower(graph, (X,))
    assert list(lowered.integer_biases()) == ["linear_1"]


def test_what_autocast_computes_is_outside_under_the_name_of_its_call() -> None:
    """Export writes its ops out, under names of their own."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.gelu(m.narrow(x))
        with torch.autocast("cpu", enabled=False):
            return cast(Tensor, m.last(y.float()))

    graph, quantizer = converted(Function(forward, narrow=linear(), last=linear()), X)
    (region,) = [op.node for op in quantizer.last_plan.floating if "autocast" in op.reason]
    rows = {op.node: op for op in cq.lower(graph, (X,)).report.ops}
    assert rows[region].placement.value == "outside"
    assert "aten::gelu" in rows[region].outside
    assert [kernel for kernel in rows[region].outside if "::" not in kernel] == []


def test_integers_and_booleans_as_inputs() -> None:
    def forward(m: Any, x: Tensor, count: Tensor, keep: Tensor, times: int) -> Any:
        return m.a(x) * count, m.a(torch.where(keep, x, 0.0)) * times

    inputs = (X, torch.randint(0, 3, (2, 6)), X > 0, 2)
    graph, _ = converted(Function(forward, a=linear()), *inputs)
    lowered = cq.lower(graph, inputs)
    other = (X * 2, torch.randint(-3, 3, (2, 6)), X < 0.5, 2)
    same(graph, lowered, inputs, other)
    with pytest.raises(cq.InputError, match=r"input 1 must be torch\.int64"):
        lowered.run(X, X, X > 0, 2)


# ---------------------------------------------------------------------------------------------
# State and constants
# ---------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """A counter, a running mean, a copy of the last result; and an integer nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), linear()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mean", torch.ones(2, 6))
        self.register_buffer("latest", torch.zeros(2, 6))
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        result = self.last(y + self.latest)
        self.calls.add_(1.0)
        self.mean.copy_(self.mean * 0.5 + y)
        self.latest.copy_(y)
        self.number.add_(1)
        return result + self.calls, self.mean * 2.0, y


def test_buffers_that_change() -> None:
    graph, _ = converted(Remembers(), X)
    held = {name: value.detach().clone() for name, value in graph.named_buffers()}
    lowered = cq.lower(graph, (X,))
    reference = cq.integer_reference(graph)
    wanted = [reference(x) for x in (X, X + 1, X)]
    for _ in range(2):  # the program starts anew with what the graph holds
        for want, x in zip(wanted, (X, X + 1, X), strict=True):
            assert differences(lowered.run(x), want) == []
        lowered.reset()
    assert not torch.equal(wanted[0][0], wanted[2][0])
    # Neither lowering nor the reference changed the graph.
    assert all(torch.equal(held[name], value) for name, value in graph.named_buffers())
    reference.reset()
    assert differences(reference(X), wanted[0]) == []


def test_shared_weights_repeated_modules_and_lifted_constants() -> None:
    offset = torch.randn(6)

    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        shared = m.tied(m.a(x) * 3)
        twice = m.b(m.b(x) * 3)
        return shared, twice, m.a(x + offset) * torch.tensor([2.0] * 6)

    model = Function(forward, a=linear(), b=linear(), tied=linear())
    model.tied.weight = model.a.weight
    graph, _ = converted(model, X)
    lowered = cq.lower(graph, (X,))
    assert lowered.report.fully_delegated
    assert len(lowered.integer_biases()) == 5
    same(graph, lowered, (X,), (X * 4,))


# ---------------------------------------------------------------------------------------------
# Sizes that are no sizes
# ---------------------------------------------------------------------------------------------


def test_scalars_and_tensors_without_elements() -> None:
    def forward(m: Any, x: Tensor, gain: Tensor, none: Tensor) -> tuple[Tensor, ...]:
        y = m.a(x)
        return y * gain, m.a(torch.cat([x, none])), y[:0]

    inputs = (X, torch.tensor(0.5), torch.zeros(0, 6))
    graph, quantizer = converted(Function(forward, a=linear()), *inputs)
    reasons = {op.node: op.reason for op in quantizer.last_plan.floating}
    assert "has no dimensions, and XNNPACK takes no such tensor" in reasons["mul"]
    assert reasons["slice_1"] == "its result has no elements, and XNNPACK takes no such tensor"
    lowered = cq.lower(graph, inputs)
    assert len(lowered.integer_biases()) == 2
    same(graph, lowered, inputs, (X * 2, torch.tensor(-3.0), torch.zeros(0, 6)))


def test_rows_that_the_data_choose_are_in_float_outside() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        chosen = y[:, 0] > 0
        filled = torch.zeros(len(X), 6)
        filled[chosen] = F.softmax(m.b(y[chosen]).relu(), -1)
        return m.a(filled)

    graph, quantizer = converted(Function(forward, a=linear(), b=linear()), X)
    planned = {op.node: op for op in quantizer.last_plan.ops}
    assert planned["linear_1"].reason.startswith("index has no size before its values are known")
    lowered = cq.lower(graph, (X,))
    placed = {op.node: op.placement.value for op in lowered.report.ops}
    outside = {"gt", "index", "linear_1", "softmax", "index_put_"}
    assert {node for node, op in planned.items() if op.placement == "outside"} == outside
    assert {node for node, where in placed.items() if where == "outside"} == outside | {"relu"}
    assert placed["linear"] == placed["linear_2"] == "integer kernel"
    same(graph, lowered, (X,), (-X,), (X * 4,), (X * 0,))
