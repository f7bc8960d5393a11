"""The quantizer in torchao's flow: setters, drop-in for XNNPACKQuantizer, what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from support.graphs import Function, calls, capture, differences, quantized
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

import custom_quantizer as cq
from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.core.graph import constant_of, is_dequantize, is_quantize, qparams_of
from custom_quantizer.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ConversionError,
    CustomQuantizerError,
    SchemeError,
)

aten = torch.ops.aten
IMAGE = (2, 3, 8, 8)
EXPORT = r"torch\.export\.export\(model\.eval\(\), example_inputs\)\.module\(\)"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return cast(Tensor, self.head(x.mean((2, 3))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def image() -> Tensor:
    return torch.randn(IMAGE)


def quantizer() -> cq.IntegerQuantizer:
    return cq.IntegerQuantizer().set_global("a8w8")


# ---------------------------------------------------------------------------------------------
# Setters
# ---------------------------------------------------------------------------------------------


def test_setters_chain_and_change_nothing_but_rules() -> None:
    made = cq.IntegerQuantizer()
    config = get_symmetric_quantization_config(is_per_channel=True)
    assert (
        made.set_global(config)
        .set_operator_type(aten.linear.default, "a8w4")
        .set_module_type(nn.Conv2d, cq.scheme("a8w8", weight_granularity="per_tensor"))
        .set_module_name("stem.*", "a16w8")
        .set_node_name("conv2d_1", None)
        .set_filter_function(lambda node: node.name != "add")
        is made
    )
    plan = made.plan(torch.export.export(net(), (image(),)))
    assert {op.node: op.scheme for op in plan.ops} == {
        "conv2d": "a16w8",
        "conv2d_1": None,
        "add": None,
        "mean": "a8w8-histogram",
        "linear": "a8w4",
    }


def test_an_operator_packet_means_all_its_overloads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding="same"))
    plan = cq.IntegerQuantizer().set_operator_type(aten.conv2d, "a8w8")
    planned = plan.plan(torch.export.export(model, (image(),)))
    assert {op.target for op in planned.quantized} == {"aten.conv2d.default", "aten.conv2d.padding"}


@pytest.mark.parametrize(
    ("setter", "message"),
    [
        (lambda q: q.set_module_name("", "a8w8"), r"set_module_name takes a name, got ''"),
        (lambda q: q.set_module_name(3, "a8w8"), r"set_module_name takes a name, got 3"),
        (lambda q: q.set_node_name(None, "a8w8"), r"set_node_name takes a name"),
        (lambda q: q.set_module_type(nn.Linear(1, 1), None), r"set_module_type takes a name"),
        (lambda q: q.set_filter_function("conv"), r"a filter function is called with a node"),
        (lambda q: q.set_operator_type(aten.sin.default, "a8w8"), r"aten\.sin\.default is not"),
        (lambda q: q.set_operator_type("aten.convd", None), r"did you mean"),
        (lambda q: q.set_operator_type("conv", None), r"did you mean aten\.conv"),
        (lambda q: q.set_operator_type(F.relu, None), r"^relu is .* did you mean aten\.relu\."),
        (lambda q: q.set_operator_type(nn.Linear, None), r"^Linear is .* set_module_type"),
        (lambda q: q.set_global("a8"), r"'a8' is no scheme name"),
        (lambda q: q.set_global(8), r"expected a scheme, a scheme name"),
        (lambda q: q.last_plan, r"nothing was prepared yet"),
    ],
)
def test_setters_refuse_what_they_cannot_mean(
    setter: Callable[[cq.IntegerQuantizer], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        setter(cq.IntegerQuantizer())


@pytest.mark.parametrize(
    ("setter", "message"),
    [
        (lambda q: q.set_node_name("conv2d_9", None), "no node named 'conv2d_9'; did you mean"),
        (lambda q: q.set_module_name("stm", None), "no module 'stm'; did you mean stem"),
    ],
)
def test_names_that_the_model_does_not_have(
    setter: Callable[[cq.IntegerQuantizer], Any], message: str
) -> None:
    made = quantizer()
    setter(made)
    with pytest.raises(ConfigError, match=message):
        prepare_pt2e(capture(net(), (image(),)), made)


def test_the_name_of_a_folded_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    made = cq.IntegerQuantizer().set_global("a8w8").set_node_name("batch_norm", None)
    with pytest.raises(ConfigError, match=r"no node named 'batch_norm'.*folds a batch norm into"):
        prepare_pt2e(capture(model, (torch.randn(1, 3, 8, 8),)), made)


def test_planning_changes_neither_the_graph_nor_the_model() -> None:
    model, x = net(), image()
    graph = capture(model, (x,))
    code, state = graph.code, {k: v.clone() for k, v in graph.state_dict().items()}
    made = quantizer()
    first, second = made.plan(graph), made.plan(torch.export.export(model, (x,)))
    assert first.to_json() == second.to_json() == made.last_plan.to_json()
    assert graph.code == code
    assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())
    # The same graph can still be prepared, and one quantizer serves several models.
    prepared = prepare_pt2e(graph, made)
    prepared(x)
    other = prepare_pt2e(capture(nn.Linear(4, 2), (torch.randn(3, 4),)), made)
    assert made.last_plan.op("linear").scheme == "a8w8"
    other(torch.randn(3, 4))
    convert_pt2e(prepared)
    convert_pt2e(other)


def test_what_was_decided_is_recorded_on_the_nodes() -> None:
    graph = quantized(net(), (image(),), quantizer().set_module_name("head", None))
    (head,) = calls(graph, aten.linear.default)
    assert head.meta[META_KEY] == {"scheme": None, "reason": 'set_module_name("head", None)'}
    body = calls(graph, aten.conv2d.default)[1]
    assert body.meta[META_KEY] == {"scheme": "a8w8", "reason": 'set_global("a8w8")'}


# ---------------------------------------------------------------------------------------------
# In place of XNNPACKQuantizer
# ---------------------------------------------------------------------------------------------

STATIC: dict[str, dict[str, Any]] = {
    "per tensor": {},
    "per channel": {"is_per_channel": True},
    "qat": {"is_qat": True},
    "qat per channel": {"is_qat": True, "is_per_channel": True},
    "full range": {"is_per_channel": True, "weight_qmin": -128},
    "narrow activations": {"is_per_channel": True, "act_qmin": -127},
    "5-bit activations": {"is_per_channel": True, "act_qmin": -16, "act_qmax": 15},
}


# XNNPACKQuantizer takes a second, most of it for capturing its patterns.
IN_SHORT = ("qat per channel", "full range", "5-bit activations")


def _gemms(graph: GraphModule) -> dict[str, Node]:
    targets = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)
    return {n.name: n for t in targets for n in calls(graph, t)}


class Gemms(nn.Module):
    """Convolutions and a linear layer, in the forms that XNNPACKQuantizer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.normed = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normed(self.depthwise(torch.relu(self.conv(x))))
        return cast(Tensor, self.linear(x.permute(0, 2, 3, 1)))


@pytest.mark.parametrize("name", slow_but(IN_SHORT, STATIC))
def test_convolutions_and_linear_layers_are_quantized_as_xnnpackquantizer_does(name: str) -> None:
    config = get_symmetric_quantization_config(**STATIC[name])
    x = image()
    graphs = {}
    for kind in (XNNPACKQuantizer, cq.IntegerQuantizer):
        torch.manual_seed(0)
        prepared = prepare_pt2e(capture(Gemms(), (x,)), kind().set_global(config))
        prepared(x)
        graphs[kind] = convert_pt2e(prepared)
    theirs, ours = (_gemms(graph) for graph in graphs.values())
    assert theirs.keys() == ours.keys()
    for key, node in theirs.items():
        for graph, call in (
            (graphs[XNNPACKQuantizer], node),
            (graphs[cq.IntegerQuantizer], ours[key]),
        ):
            assert is_dequantize(call.args[0]), (graph, key)
            assert is_dequantize(call.args[1]), (graph, key)
        data, mine = cast(Node, node.args[0]), cast(Node, ours[key].args[0])
        assert data.args[3:6] == mine.args[3:6], "range and dtype of activations"
        weight, own = cast(Node, node.args[1]), cast(Node, ours[key].args[1])
        assert weight.target is own.target, "per tensor or per channel"
        assert weight.args[-3:] == own.args[-3:], "range and dtype of weights"
        integers = constant_of(graphs[XNNPACKQuantizer], cast(Node, weight.args[0]))
        mine_integers = constant_of(graphs[cq.IntegerQuantizer], cast(Node, own.args[0]))
        # Both divide the largest value by 127 (127.5 where -128 is used), in float32.
        assert int((integers.int() - mine_integers.int()).abs().max()) <= (
            1 if name == "full range" else 0
        )
        # The one thing that is added: what was a float bias is dequantized from int32.
        bias, own_bias = cast(Node, node.args[2]), cast(Node, ours[key].args[2])
        assert bias.op == "get_attr"
        assert is_dequantize(own_bias)
        assert own_bias.args[-1] is torch.int32


@pytest.mark.parametrize("per_channel", [False, True])
def test_dynamic_configs_quantize_layers_only(per_channel: bool) -> None:
    config = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=True)
    made = cq.IntegerQuantizer().set_global(config)
    plan = made.plan(torch.export.export(net(), (image(),)))
    assert [op.node for op in plan.quantized] == ["conv2d", "conv2d_1", "linear"]
    (bias,) = (t for t in plan.op("linear").tensors if t.role == "bias")
    assert (bias.dtype, bias.reason) == ("float32", "the input scale is only known at run time")


# ---------------------------------------------------------------------------------------------
# Dynamic batch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [pytest.param((2, None), marks=pytest.mark.slow), (1, 12)])
def test_a_dynamic_batch_stays_dynamic_and_plans_the_same(sizes: tuple[int, int | None]) -> None:
    batch = torch.export.Dim("batch", min=sizes[0], max=sizes[1])
    x = image()
    fixed = quantizer().plan(torch.export.export(net(), (x,)))
    exported = torch.export.export(net(), (x,), dynamic_shapes=({0: batch},))
    made = quantizer()
    plan = made.plan(exported)
    # XNNPACK's integer mean cannot follow a growing batch: a linear layer can.
    names = [op.node for op in plan.ops if op.node not in ("mean_reshape", "mean_linear")]
    assert names == [op.node for op in fixed.ops] == ["conv2d", "conv2d_1", "add", "mean", "linear"]
    for name in set(names) - {"mean"}:
        formats = [[(t.role, t.tensor, t.dtype) for t in p.op(name).tensors] for p in (plan, fixed)]
        assert formats[0] == formats[1], name
    prepared = prepare_pt2e(exported.module(), made)
    for size in (2, 5, 12):
        prepared(torch.randn(size, *IMAGE[1:]))
    converted = convert_pt2e(prepared)
    one_by_one = torch.cat([converted(x[i : i + 1].repeat(2, 1, 1, 1))[:1] for i in range(2)])
    assert torch.equal(converted(x), one_by_one)


# ---------------------------------------------------------------------------------------------
# Bad input: each is an error of ours that names the thing and the fix
# ---------------------------------------------------------------------------------------------


def test_a_module_that_was_not_captured() -> None:
    with pytest.raises(CaptureError, match=f"got Net: hand in {EXPORT}"):
        quantizer().plan(cast(Any, net()))


def test_a_graph_of_modules() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    with pytest.raises(CaptureError, match=f"traced with torch.fx; capture it with {EXPORT}"):
        prepare_pt2e(traced, quantizer())


def test_a_graph_of_python_functions() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.relu, (x,)))
    model = GraphModule(nn.Module(), graph)
    with pytest.raises(CaptureError, match=f"Python functions instead of aten ops.*{EXPORT}"):
        quantizer().transform_for_annotation(model)


def test_rules_that_select_nothing_are_logged_by_prepare(caplog: pytest.LogCaptureFixture) -> None:
    chosen = quantizer().set_module_type(nn.Conv3d, "a8w4")
    exported = torch.export.export(net(), (image(),))
    assert "selects nothing" in chosen.plan(exported).warnings[0]
    assert "selects nothing" not in caplog.text  # the plan says so
    prepare_pt2e(exported.module(), chosen)
    assert caplog.text.count("selects nothing") == 1


def test_a_graph_whose_weights_are_inputs() -> None:
    """``graph_module`` of an ExportedProgram has no weight to quantize, and was quantized so."""
    exported = torch.export.export(net().eval(), (image(),))
    match = r"weights are inputs of the graph \(p_\w+, .*hand in exported\.module\(\)"
    with pytest.raises(CaptureError, match=match):
        prepare_pt2e(exported.graph_module, quantizer())
    with pytest.raises(CaptureError, match=match):
        quantizer().plan(exported.graph_module)
    with pytest.raises(CaptureError, match=match):
        prepare_qat_pt2e(exported.run_decompositions({}).graph_module, quantizer())
    quantizer().plan(exported.module())


def test_a_graph_of_no_weights_as_torch_export_holds_it() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    exported = torch.export.export(Sum(), (image(), image()))
    assert quantizer().plan(exported.graph_module).op("add").scheme == "a8w8"


def test_a_graph_that_is_prepared_or_converted_already() -> None:
    x = image()
    prepared = prepare_pt2e(capture(net(), (x,)), quantizer())
    prepared(x)
    with pytest.raises(CaptureError, match="already has observers"):
        prepare_pt2e(copy.deepcopy(prepared), quantizer())
    with pytest.raises(CaptureError, match="already quantized"):
        prepare_pt2e(convert_pt2e(prepared), quantizer())


@pytest.mark.parametrize(
    ("model", "node"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "add_"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), r"(add_|batch_norm)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)), r"dropout \(1\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5, inplace=True)), r"dropout_ \(1\)"),
        *(
            pytest.param(nn.Sequential(nn.Conv2d(3, 4, 3), layer), name, marks=pytest.mark.slow)
            for layer, name in (
                (nn.Dropout2d(0.5), r"feature_dropout"),
                (nn.AlphaDropout(0.5), r"alpha_dropout"),
                (nn.RReLU(), r"rrelu"),
            )
        ),
    ],
)
def test_a_training_mode_graph(model: nn.Module, node: str) -> None:
    exported = torch.export.export(model.train(), (image(),))
    with pytest.raises(CaptureError, match=f"{node}.* captured in training mode; call model.eval"):
        prepare_pt2e(exported.module(), quantizer())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)),
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(2), nn.Linear(36, 5)),
    ],
)
def test_a_training_mode_graph_that_was_moved_to_evaluation(model: nn.Module) -> None:
    """What torchao's switch leaves counts batches, which nobody reads."""
    captured = torch.export.export(model.train(), (image(),)).module()
    move_exported_model_to_eval(captured)
    wanted = torch.export.export(copy.deepcopy(model).eval(), (image(),)).module()
    found = []
    x = image()
    for graph in (captured, wanted):
        prepared = prepare_pt2e(graph, quantizer())
        prepared(x)
        found.append(convert_pt2e(prepared)(x))
    assert torch.equal(*found)


def test_weights_that_are_wrapped_tensors() -> None:
    """``torchao.quantize_`` leaves such, of which no constant can be folded."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8)).eval()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _module, path: path == "1")
    captured = torch.export.export(model, (torch.randn(2, 32),)).module()
    with pytest.raises(CaptureError, match=r"1\.weight is a \w+, .* hand in the float model"):
        prepare_pt2e(captured, quantizer())


def test_complex_inputs() -> None:
    x = torch.randn(2, 3, dtype=torch.complex64)
    with pytest.raises(CaptureError, match="complex64; complex numbers have no integers"):
        quantizer().plan(torch.export.export(Function(lambda s, x: x + x), (x,)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16, torch.bool])
def test_inputs_that_are_not_float32_leave_nothing_to_quantize(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3).to(dtype)
    model = Function(lambda s, x: torch.logical_not(x) if x.dtype is torch.bool else x + x)
    with pytest.raises(ConfigError, match="there is nothing to quantize in the graph"):
        quantizer().plan(torch.export.export(model, (x,)))


def test_integer_inputs_beside_float_ones_are_no_obstacle() -> None:
    model = Function(
        lambda s, x, i: s.head(x + s.table(i)), head=nn.Linear(4, 2), table=nn.Embedding(5, 4)
    )
    inputs = (torch.randn(3, 4), torch.tensor([0, 4, 2]))
    made = quantizer()
    converted = quantized(model, inputs, made)
    assert made.last_plan.op("embedding").scheme is None
    assert made.last_plan.op("linear").scheme == "a8w8"
    assert float((converted(*inputs) - model(*inputs)).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("model", "rules", "message"),
    [
        (Function(lambda s, x: x), lambda q: q, "the graph has no ops"),
        (Function(lambda s, x: torch.sin(x)), lambda q: q, "sin: no integer form of aten.sin"),
        (Function(lambda s, x: x + x), lambda q: q.set_global(None), r"add: set_global\(None\)"),
        (Function(lambda s, x: x.permute(1, 0)), lambda q: q, "moves values of a float tensor"),
    ],
)
def test_a_graph_with_nothing_to_quantize(
    model: nn.Module, rules: Callable[[cq.IntegerQuantizer], Any], message: str
) -> None:
    made = quantizer()
    rules(made)
    with pytest.raises(ConfigError, match=f"there is nothing to quantize.*{message}"):
        made.plan(torch.export.export(model, (torch.randn(2, 3),)))


def test_stock_scripts_go_on_where_nothing_is_quantized(caplog: pytest.LogCaptureFixture) -> None:
    """A rule for all ops that finds none is a warning, one that names an op an error."""
    model, x = Function(lambda s, x: torch.sin(x)), torch.randn(2, 3)
    for scheme in ("a8w8", "dyn8w8"):
        caplog.clear()
        made = cq.IntegerQuantizer().set_global(scheme)
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), made)
        prepared(x)
        converted = convert_pt2e(prepared)
        assert torch.equal(converted(x), model(x))
        lowered = cq.lower(converted, (x,))
        assert torch.allclose(lowered.run(x), model(x))
        assert [(op.node, bool(op.reason)) for op in lowered.report.not_integer()] == [
            ("sin", True)
        ]
        messages = [record.getMessage() for record in caplog.records]
        assert sum("nothing to quantize in the graph (sin: " in text for text in messages) == 1
    model = Function(lambda s, x: torch.softmax(x, -1))
    made = cq.IntegerQuantizer().set_operator_type(torch.ops.aten.softmax.int, "a8w8")
    with pytest.raises(ConfigError, match="there is nothing to quantize"):
        prepare_pt2e(torch.export.export(model, (x,)).module(), made)


def test_a_quantizer_without_rules_says_which_to_set() -> None:
    with pytest.raises(ConfigError, match=r"set_global\('a8w8'\) selects all ops"):
        cq.IntegerQuantizer().plan(torch.export.export(net(), (image(),)))


@pytest.mark.parametrize(
    "value", slow_but([float("inf")], [float("nan"), float("inf"), -float("inf")])
)
@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram"])
def test_calibration_data_that_is_not_finite(value: float, observer: str) -> None:
    x = image()
    prepared = prepare_pt2e(
        capture(net(), (x,)), cq.IntegerQuantizer().set_global(f"a8w8-{observer}")
    )
    prepared(x)
    bad = x.clone()
    bad[1, 2, 3, 4] = value
    with pytest.raises(CalibrationError, match=rf"x: 1 of {x.numel()} values are not finite"):
        prepared(bad)
    # What was seen before is still there.
    prepared(x)
    convert_pt2e(prepared)


def test_an_op_that_overflows_during_calibration_is_named() -> None:
    model = Function(
        lambda s, x: (lambda y: y * 3e38 * 3e38 + y)(s.conv(x)), conv=nn.Conv2d(3, 4, 3)
    )
    with pytest.raises(CalibrationError, match=r"mul\w*( \(.*\))?: \d+ of \d+ values"):
        quantized(model, (image(),))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-per_tensor", "dyn8w4g32"])
def test_constants_that_are_not_finite(scheme: str, name: str, value: float) -> None:
    """Put there after calibration: before it, the activations would not be finite either."""
    model, x = nn.Sequential(nn.Linear(32, 3), nn.ReLU()), torch.randn(3, 32)
    prepared = prepare_pt2e(capture(model, (x,)), cq.IntegerQuantizer().set_global(scheme))
    prepared(x)
    with torch.no_grad():
        prepared.get_parameter(f"0.{name}").view(-1)[-1] = value
    if scheme.startswith("dyn") and name == "bias":
        convert_pt2e(prepared)  # a bias of activations quantized at run time stays in float
        return
    with pytest.raises(CalibrationError, match=rf"linear.*0.*its {name} has values .*not finite"):
        convert_pt2e(prepared)


def test_conversion_without_calibration() -> None:
    prepared = prepare_pt2e(capture(net(), (image(),)), quantizer())
    with pytest.raises(CalibrationError, match=r"never saw data.*before convert_pt2e"):
        convert_pt2e(prepared)


def test_calibration_with_no_values_at_all_is_no_calibration() -> None:
    batch = torch.export.Dim("batch", min=0, max=8)
    model = nn.Linear(4, 2)
    graph = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=({0: batch},)).module()
    prepared = prepare_pt2e(graph, quantizer())
    prepared(torch.empty(0, 4))
    with pytest.raises(CalibrationError, match="never saw data"):
        convert_pt2e(prepared)


def test_a_graph_that_is_not_converted_has_no_reference() -> None:
    x = image()
    prepared = prepare_pt2e(capture(net(), (x,)), quantizer())
    prepared(x)
    with pytest.raises(ConversionError, match=r"still has observers: call convert_pt2e"):
        cq.integer_reference(prepared)
    with pytest.raises(
        ConversionError, match=r"has no quantized tensor.* use_reference_representation"
    ):
        cq.integer_reference(capture(net(), (x,)))
    with pytest.raises(ConversionError, match="got Net"):
        cq.integer_reference(cast(Any, net()))


def test_every_error_above_is_one_family() -> None:
    for error in (CalibrationError, CaptureError, ConfigError, ConversionError, SchemeError):
        assert issubclass(error, CustomQuantizerError)


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


def test_every_convolution_and_linear_layer_of_a_model_has_an_int32_bias() -> None:
    graph = quantized(net(), (image(),))
    gemms = _gemms(graph)
    assert gemms
    for name, node in gemms.items():
        bias = cast(Node, node.args[2])
        assert is_dequantize(bias), name
        integers = constant_of(graph, cast(Node, bias.args[0]))
        assert integers.dtype is torch.int32
        assert integers.shape == (node.meta["val"].shape[-1 if name == "linear" else 1],)
        qparams = qparams_of(graph, bias)
        assert qparams.zero_point == 0
        assert (qparams.quant_min, qparams.quant_max) == (-(2**31), 2**31 - 1)


def test_scales_in_the_graph_are_float32() -> None:
    graph = quantized(net(), (image(),))
    nodes = [node for node in graph.graph.nodes if is_quantize(node) or is_dequantize(node)]
    scales = [node.args[1] for node in nodes if isinstance(node.args[1], float)]
    assert scales
    for scale in scales:
        assert float(torch.tensor(scale, dtype=torch.float32)) == scale
        assert scale > 0


def test_the_converted_graph_can_be_saved_and_loaded(tmp_path: Any) -> None:
    x = image()
    graph = quantized(net(), (x,))
    path = tmp_path / "converted.pt2"
    torch.export.save(torch.export.export(graph, (x,)), path)
    loaded = torch.export.load(path).module()
    assert differences(loaded(x), graph(x)) == []
    reference = cq.integer_reference(loaded)
    assert differences(reference(x), cq.integer_reference(graph)(x)) == []
