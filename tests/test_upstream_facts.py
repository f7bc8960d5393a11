"""What we rely on and upstream does not promise: torch 2.15, torchao 0.18, ExecuTorch 1.5.1."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
import torch._export.utils
import torchao.quantization.pt2e.utils
from executorch.backends.xnnpack._passes.insert_pad_qdq import InsertPadQDQPass
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from hypothesis import given
from hypothesis import strategies as st
from support import remembered
from support.models import convert
from torch import Tensor, nn
from torch.export.exported_program import _override_composite_implicit_decomp
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)
from torchao.quantization.pt2e.quantizer import (
    ComposableQuantizer,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)

from custom_quantizer.core.bias import MAX_EXACT_BIAS

_q = torch.ops.quantized_decomposed
INT32 = (-(2**31), 2**31 - 1, torch.int32)


class _Hooked(ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """An observer that converts itself, as ours of weights and biases do."""

    converted: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, **_spec: Any) -> None:
        super().__init__(dtype=torch.int8)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("convert_pt2e must call convert instead")

    def convert(self, model: GraphModule, node: Node) -> None:
        self.converted.append(self.name)
        node.replace_all_uses_with(cast(Node, node.args[0]))
        model.graph.erase_node(node)


class _Annotating(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Two inputs of one add, same spec but for the observer's name."""

    def __init__(self, implicit: bool) -> None:
        self.implicit = implicit

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            if node.target is not torch.ops.aten.add.Tensor:
                continue
            specs = {
                source: QuantizationSpec(
                    torch.int8, _Hooked.with_args(name=f"{node.name}:{source.name}"), -128, 127
                )
                for source in node.args[:2]
            }
            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map=specs, allow_implicit_sharing=self.implicit, _annotated=True
            )
        return model

    def validate(self, model: GraphModule) -> None:
        pass


@pytest.mark.parametrize(("implicit", "observers"), [(True, 3), (False, 4)])
def test_convert_hook_and_sharing(implicit: bool, observers: int) -> None:
    class TwoAdds(nn.Module):
        def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
            return (x + y) * 0 + (x + z)

    example = tuple(torch.randn(2) for _ in range(3))
    graph = torch.export.export(TwoAdds(), example).module()
    first_two = [n for n in graph.graph.nodes if n.target is torch.ops.aten.add.Tensor][:2]
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.add.Tensor and node not in first_two:
            node.target = torch.ops.aten.sub.Tensor
    prepared = prepare_pt2e(graph, _Annotating(implicit))
    _Hooked.converted.clear()
    convert_pt2e(prepared)
    # x feeds both adds: implicit sharing gives it one observer, and would give two biases one.
    assert len(_Hooked.converted) == observers


@pytest.mark.slow
def test_custom_meta_reaches_the_delegate() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    example = (torch.randn(1, 3, 6, 6),)
    graph = convert(model, example, "a8w8-biasfloat").graph
    for node in graph.graph.nodes:
        node.meta["custom"] = {"probe": node.name}
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, example), partitioner=[XnnpackPartitioner()]
    )
    module = edge.exported_program().graph_module
    inner = module.lowered_module_0.original_module
    found = {n.meta.get("custom", {}).get("probe") for n in inner.graph.nodes}
    assert {"conv2d", "relu"} <= found
    for node in inner.graph.nodes:
        if (node.meta.get("custom") or {}).get("probe") in ("conv2d", "relu"):
            assert isinstance(node.meta["debug_handle"], int)


# Over all exponents that a model can have: a huge bias raises them, a tiny input lowers them.
scales = st.tuples(st.integers(-55, 40), st.floats(1, 2, width=32)).map(
    lambda pair: pair[1] * 2.0 ** pair[0]
)
integers = st.integers(-MAX_EXACT_BIAS, MAX_EXACT_BIAS)


@given(scales, scales, st.lists(integers, min_size=1, max_size=50))
def test_serializer_returns_folded_biases_per_tensor(sx: float, sw: float, q: list[int]) -> None:
    # QuantParams.from_bias multiplies two Python floats, quantize_tensor calls this op.
    scale = sw * sx
    folded = (torch.tensor(q, dtype=torch.float64) * scale).to(torch.float32)
    again = _q.quantize_per_tensor.default(folded, scale, 0, *INT32)
    assert again.tolist() == q


@given(scales, st.lists(st.tuples(scales, integers), min_size=1, max_size=50))
def test_serializer_returns_folded_biases_per_channel(
    sx: float, channels: list[tuple[float, int]]
) -> None:
    scale = torch.tensor([s for s, _ in channels], dtype=torch.float32) * sx
    q = torch.tensor([value for _, value in channels])
    folded = (q.to(torch.float64) * scale.to(torch.float64)).to(torch.float32)
    zeros = torch.zeros(len(channels), dtype=torch.int64)
    again = _q.quantize_per_channel.default(folded, scale, zeros, 0, *INT32)
    assert torch.equal(again.long(), q)


# ---------------------------------------------------------------------------------------------
# torchao 0.18: prepare and convert
# ---------------------------------------------------------------------------------------------


class _Recorded(ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """Remembers in which order observers were made."""

    made: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, **_spec: Any) -> None:
        super().__init__(dtype=torch.int8)
        self.made.append(name)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor([1.0]), torch.tensor([0])


class _Everywhere(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Every input and output of every add, written down in reverse order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        self.seen = [str(node.target) for node in model.graph.nodes if node.op == "call_function"]
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in reversed(model.graph.nodes):
            if node.target is not torch.ops.aten.add.Tensor:
                continue

            def spec(name: str) -> QuantizationSpec:
                return QuantizationSpec(torch.int8, _Recorded.with_args(name=name), -128, 127)

            node.meta["quantization_annotation"] = QuantizationAnnotation(
                input_qspec_map={
                    source: spec(f"{node.name}:{source.name}") for source in node.args[:2]
                },
                output_qspec=spec(node.name),
                allow_implicit_sharing=False,
                _annotated=True,
            )
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def test_observers_are_made_in_graph_order() -> None:
    """A spec that others share with must come first: the plan's annotations rely on this order."""

    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x + y
            return z + x

    _Recorded.made.clear()
    example = (torch.randn(2), torch.randn(2))
    prepare_pt2e(torch.export.export(Adds(), example).module(), _Everywhere())
    made = [name for i, name in enumerate(_Recorded.made) if name not in _Recorded.made[:i]]
    assert made == ["add:x", "add:y", "add", "add_1:add", "add_1:x", "add_1"]


def test_batch_norms_are_folded_before_a_quantizer_is_asked() -> None:
    """Even in training mode, of which only the counter of batches is left to see."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    quantizer = _Everywhere()
    prepare_pt2e(torch.export.export(model, (torch.randn(2, 3, 6, 6),)).module(), quantizer)
    assert quantizer.seen == ["aten.conv2d.default", "aten.add_.Tensor"]


# ---------------------------------------------------------------------------------------------
# torch 2.15
# ---------------------------------------------------------------------------------------------


def test_batch_norms_of_grouped_transposed_convolutions_do_not_fold() -> None:
    """``prepare_pt2e`` fails before it asks a quantizer; in training we fold them ourselves."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)).eval()
    captured = torch.export.export(model, (torch.randn(1, 4, 3, 3),)).module()
    with pytest.raises(RuntimeError, match="size of tensor"):
        prepare_pt2e(captured, _Annotating(implicit=False))


class _Remembering(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Notes in the graph's meta what conversion has to undo."""

    def annotate(self, model: GraphModule) -> GraphModule:
        model.meta["noted"] = True
        return model

    def validate(self, model: GraphModule) -> None:
        pass


def test_the_meta_of_a_graph_outlives_its_preparation() -> None:
    """Attributes that no node reads do not."""
    captured = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)).module()
    captured.unread = nn.Linear(1, 1)
    prepared = prepare_qat_pt2e(captured, _Remembering())
    assert prepared.meta["noted"]
    assert not hasattr(prepared, "unread")


def test_a_copy_of_a_graph_that_quantizes_at_run_time_does_not_convert() -> None:
    """Its annotations name nodes of the graph that was copied, behind which torchao (0.18) looks.

    Not of ours alone: with the quantizer of ExecuTorch. docs/calibration.md says what to do.
    """
    example = (torch.randn(1, 4),)
    captured = torch.export.export(nn.Linear(4, 4).eval(), example).module()
    config = get_symmetric_quantization_config(is_dynamic=True)
    prepared = prepare_pt2e(captured, XNNPACKQuantizer().set_global(config))
    prepared(*example)
    with pytest.raises(Exception, match="PortNodeMetaForQDQ") as caught:
        convert_pt2e(copy.deepcopy(prepared))
    assert "No chose qparams node found" in str(caught.value.__cause__)
    convert_pt2e(prepared)


def test_composable_quantizers_forward_no_callback() -> None:
    """So fake quantizers are linked without it."""
    called: list[int] = []

    class Called(_Remembering):
        def prepare_obs_or_fq_callback(self, model: Any, observers: Any) -> None:
            called.append(1)

    captured = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)).module()
    prepare_qat_pt2e(captured, ComposableQuantizer([Called()]))
    assert not called


def test_quantizing_to_int32_wraps_a_positive_overflow() -> None:
    """Why a bias is rounded here and not by PyTorch."""
    x = torch.tensor([3e9, -3e9])
    wrapped = _q.quantize_per_tensor.default(x, 1.0, 0, *INT32)
    assert wrapped.tolist() == [-(2**31), -(2**31)]
    saturated = _q.quantize_per_tensor.default(x, 1.0, 0, -(2**31), 2147483520, torch.int32)
    assert saturated.tolist() == [2147483520, -(2**31)]


def test_the_schema_says_which_ops_return_a_view() -> None:
    aten = torch.ops.aten

    def views(target: Any) -> bool:
        return any(result.alias_info is not None for result in target._schema.returns)

    for target in (
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.to.dtype,
        aten.contiguous.default,
        aten.chunk.default,
        aten.select.int,
        aten.detach.default,
    ):
        assert views(target), target
    for target in (aten.clone.default, aten.add.Tensor, aten.conv2d.default):
        assert not views(target), target
    # The exception: in eval mode it returns its input.
    assert not views(aten.dropout.default)
    x = torch.randn(3)
    assert aten.dropout.default(x, 0.5, False).data_ptr() == x.data_ptr()


# ---------------------------------------------------------------------------------------------
# ExecuTorch 1.5.1: what the partitioner refuses halfway
# ---------------------------------------------------------------------------------------------


def _left_outside(graph: GraphModule, example: tuple[Tensor, ...]) -> list[str]:
    """Ops of the edge program that no delegate took, lowered without this package's passes."""
    edge = to_edge_transform_and_lower(
        torch.export.export(graph, example), partitioner=[XnnpackPartitioner()]
    )
    return [
        str(node.target)
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function" and "executorch_call_delegate" not in str(node.target)
    ]


@pytest.mark.slow
def test_an_explicit_int32_bias_is_refused() -> None:
    example = (torch.randn(1, 3, 6, 6),)
    model = nn.Conv2d(3, 4, 3)
    outside = _left_outside(convert(model, example, "a8w8").graph, example)
    assert any("convolution" in name for name in outside)
    outside = _left_outside(convert(model, example, "a8w8-biasfloat").graph, example)
    assert not any("convolution" in name for name in outside)


def _transposed(groups: int, granularity: str) -> GraphModule:
    """A converted transposed convolution, its weight requantized to the granularity."""
    example = (torch.randn(1, 4, 5, 5),)
    graph = convert(nn.ConvTranspose2d(4, 4, 3, groups=groups, bias=False), example).graph
    (node,) = (n for n in graph.graph.nodes if "conv_transpose2d" in str(n.target))
    weight = node.args[1]
    if granularity == "per_channel" and weight.target is _q.dequantize_per_tensor.default:
        integers, scale, _, low, high, dtype = weight.args
        channels = 4 // groups
        graph.register_buffer("scales", torch.full((channels,), scale))
        graph.register_buffer("zero_points", torch.zeros(channels, dtype=torch.int64))
        with graph.graph.inserting_before(weight):
            scales, zeros = (graph.graph.get_attr(n) for n in ("scales", "zero_points"))
            weight.target = _q.dequantize_per_channel.default
            weight.args = (integers, scales, zeros, 1, low, high, dtype)
        graph.recompile()
    return graph


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "granularity", "refused"),
    [(1, "per_channel", False), (2, "per_tensor", False), (2, "per_channel", True)],
)
def test_per_channel_grouped_transposed_convolutions_are_refused_halfway(
    groups: int, granularity: str, refused: bool
) -> None:
    """What is left outside computes garbage or does not load, so the plan never asks for it."""
    graph = _transposed(groups, granularity)
    outside = _left_outside(graph, (torch.randn(1, 4, 5, 5),))
    assert any("convolution" in name for name in outside) == refused
    assert any("quantize" in name for name in outside) == refused


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "loads"), [(200.0, True), (300.0, False)])
def test_a_requantization_multiplier_of_256_does_not_load(factor: float, loads: bool) -> None:
    example = (torch.randn(1, 3, 6, 6),)
    graph = convert(nn.Conv2d(3, 4, 3, bias=False), example, "a8w8-per_tensor").graph
    (node,) = (n for n in graph.graph.nodes if "conv2d" in str(n.target))
    product = node.args[0].args[1] * node.args[1].args[1]
    (quantize,) = node.users
    for user in (quantize, *quantize.users):
        user.args = (user.args[0], product / factor, *user.args[2:])
    graph.recompile()
    exported = torch.export.export(graph, example)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    data = bytes(program.to_executorch().buffer)

    def load() -> None:
        Runtime.get().load_program(data).load_method("forward")

    if loads:
        load()
    else:
        with pytest.raises(RuntimeError):
            load()


@pytest.mark.parametrize(("value", "inserted"), [(0.0, True), (1.0, False)])
def test_pads_by_zero_are_quantized_by_executorch_itself(value: float, inserted: bool) -> None:
    """A pad by another value is left in float, so it must not be requantized here either."""

    class Pad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            data = _q.dequantize_per_tensor.default(x, 0.1, 0, -128, 127, torch.int8)
            return torch.nn.functional.pad(data, (1, 1), value=value)

    example = (torch.zeros(1, 2, 3, dtype=torch.int8),)
    edge = to_edge_transform_and_lower(torch.export.export(Pad(), example))
    result = InsertPadQDQPass(edge.exported_program())(edge.exported_program().graph_module)
    names = [str(n.target) for n in result.graph_module.graph.nodes]
    assert any("quantize_per_tensor" in n and "dequantize" not in n for n in names) == inserted


def test_export_takes_a_tensor_that_is_given_twice_for_one_input() -> None:
    """torch 2.15; so ``core.graph.distinct`` copies it."""

    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x, y = torch.ones(2), torch.zeros(2)
    assert torch.equal(torch.export.export(Difference(), (x, x)).module()(x, y), -y)
    assert torch.equal(torch.export.export(Difference(), (x, x[:])).module()(x, y), x)


@pytest.mark.slow
def test_tracing_a_small_batch_bounds_it_by_fifteen() -> None:
    """Fake convolutions compare the batch with 16 to choose a kernel, and the guard stays.

    Lowering turns those kernels off while it traces; without that, a batch captured as up to 64
    is planned for 15.
    """
    model = nn.Conv2d(4, 4, 3)
    batch = torch.export.Dim("batch", max=64)

    def largest() -> int:
        exported = torch.export.export(
            model, (torch.randn(2, 4, 6, 6),), dynamic_shapes=({0: batch},)
        )
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        (placeholder,) = (
            n for n in edge.exported_program().graph.nodes if n.name in ("input", "input_1")
        )
        size = placeholder.meta["val"].shape[0]
        return int(size.node.shape_env.bound_sympy(size.node.expr).upper)

    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        assert largest() == 64
    assert largest() in (15, 64)  # 64 where torch was built without both


def test_an_interrupted_export_keeps_the_decompositions_it_exchanged() -> None:
    """torch 2.15 exchanges them before the ``try`` that brings them back.

    Every later lowering in the process fails then, so ``core.threads.tools`` holds Ctrl-C back.
    """
    op = torch.ops.aten.divide.Tensor
    kernels = dict(op.py_kernels)

    class Interrupted(dict[Any, Any]):
        def items(self) -> Any:
            yield op, lambda *_args: NotImplemented
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt), _override_composite_implicit_decomp(Interrupted()):
            raise AssertionError("entered")
        assert op.py_kernels != kernels
    finally:
        with _override_composite_implicit_decomp({op: lambda *_args: NotImplemented}):
            pass  # which also forgets the rule for fake tensors
        op.py_kernels.clear()
        op.py_kernels.update(kernels)
        op._dispatch_cache.clear()


def test_what_the_tests_remember_is_what_upstream_computes() -> None:
    """torch 2.15 and torchao 0.18; see ``tests/support/remembered.py``."""
    listed, captured = remembered.OF_UPSTREAM
    now = torch._export.utils._collect_all_valid_cia_ops_for_namespace
    assert now is not listed
    for namespace in (torch.ops.aten, torch.ops.quantized_decomposed):
        assert now(namespace) == now(namespace) == listed(namespace)

    class Pattern(nn.Module):
        def __init__(self, train: bool) -> None:
            super().__init__()
            self.fn = lambda x: torch.dropout(x, 0.5, train)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.fn(x))

    again = torchao.quantization.pt2e.utils._get_aten_graph_module_for_pattern
    assert again is not captured
    x = (torch.randn(1),)
    for train in (True, False, True):
        graph = again(Pattern(train), x).graph
        assert str(graph) == str(captured(Pattern(train), x).graph)
        graph.erase_node(graph.output_node())  # what the caller does with it is its own
