"""From a converted graph to a program that was checked: what comes in, goes out, and breaks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.graphs import (
    Function,
    Inputs,
    capture,
    differences,
    lowered_exactly,
    quantized,
    stress,
)
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import load_program, lowering, passes
from custom_quantizer.backends.xnnpack.passes import PASSES
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.errors import (
    ConversionError,
    InputError,
    LoweringError,
    ProgramError,
    VerificationError,
)

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


class Net(nn.Module):
    """A residual block, a concatenation, a pool and two heads; a structured output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(conv(groups=4), nn.ReLU6())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.stem(x)
        y = torch.cat([x + self.body(x), F.max_pool2d(x, 3, 1, 1)], 1)
        scores = self.head(y.mean((2, 3)))
        return {"scores": scores, "maps": [y, (x,)]}


@cache
def net() -> tuple[GraphModule, cq.LoweredProgram, Inputs]:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    graph = quantized(Net(), (x,), calibration=[(torch.randn(IMAGE),) for _ in range(3)])
    return graph, cq.lower(graph, (x,)), (x,)


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


def test_a_network_is_one_delegate_call_and_exact() -> None:
    graph, lowered, example = net()
    assert lowered.report.fully_delegated
    assert lowered.report.not_integer() == ()
    reference = cq.integer_reference(graph)
    for given in [example, *stress([IMAGE])]:
        assert differences(lowered.run(*given), reference(*given)) == []


def test_outputs_have_the_structure_of_the_model() -> None:
    _, lowered, example = net()
    out = lowered.run(*example)
    assert list(out) == ["scores", "maps"]
    assert isinstance(out["maps"], list)
    assert isinstance(out["maps"][1], tuple)
    assert out["scores"].shape == (2, 3)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.conv(x),
        lambda s, x: (s.conv(x), x),
        lambda s, x: (lambda h: (h, h))(s.conv(x)),
        lambda s, x: [s.conv(x), {"a": (x + 1,)}],
        lambda s, x: (s.conv(x).flatten(1), torch.sin(x)),
    ],
)
def test_models_may_return_their_input_or_one_tensor_twice(function: Callable[..., Any]) -> None:
    x = torch.randn(IMAGE)
    model = Function(function, conv=conv())
    graph = quantized(model, (x,))
    lowered = cq.lower(graph, (x,))
    got, want = lowered.run(x), model(x)
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    reference = cq.integer_reference(graph)
    if reference.float_ops:
        torch.testing.assert_close(got, reference(x))
    else:
        assert differences(got, reference(x)) == []


def test_runs_are_independent() -> None:
    """The runtime reuses its memory; what was returned must not change with the next call."""
    _, lowered, (x,) = net()
    first = lowered.run(x)["scores"]
    kept = first.clone()
    second = lowered.run(-x)["scores"]
    assert torch.equal(first, kept)
    assert not torch.equal(second, first)
    assert torch.equal(lowered(x)["scores"], first)


def test_lowering_twice_gives_the_same_bytes() -> None:
    graph, lowered, example = net()
    assert cq.lower(graph, example).buffer == lowered.buffer


def test_the_graph_is_not_changed() -> None:
    graph, _, example = net()
    code, state = graph.code, {k: v.clone() for k, v in graph.state_dict().items()}
    metas = {n.name: str(n.meta.get("custom")) for n in graph.graph.nodes}
    before = graph(*example)
    cq.lower(graph, example)
    assert graph.code == code
    assert graph.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in graph.state_dict().items())
    assert {n.name: str(n.meta.get("custom")) for n in graph.graph.nodes} == metas
    assert differences(graph(*example), before) == []


def test_the_report_names_every_op_and_what_was_rewritten() -> None:
    graph, lowered, _ = net()
    ops = {
        n.name
        for n in graph.graph.nodes
        if n.op == "call_function"
        and not is_quantize(n)
        and not is_dequantize(n)
        and isinstance(n.meta.get("val"), torch.Tensor)
    }
    fused = {"relu", "hardtanh"}
    record = json.loads(lowered.report.to_json())
    assert {op["node"] for op in record["ops"]} == ops - fused
    assert record["delegates"] == 1
    assert record["outside"] == []
    assert record["size_bytes"] == len(lowered.buffer)
    assert {"fold_bias", "means_keep_dims"} <= record["passes"].keys()
    text = str(lowered.report)
    for word in ("1 delegate call", "0 kernels outside", "conv2d (stem.0) [conv] xnnpack int8"):
        assert word in text


def test_every_stage_is_announced() -> None:
    graph, _, example = net()
    said: list[str] = []
    cq.lower(graph, example, progress=said.append)
    assert said == [
        "rewriting the graph",
        "exporting",
        "partitioning for XNNPACK",
        "writing the program",
        "checking the program",
    ]


# ---------------------------------------------------------------------------------------------
# What comes in
# ---------------------------------------------------------------------------------------------


def _layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "channels last", x.to(memory_format=torch.channels_last)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield "sliced", torch.stack([x, x])[1]
    yield "strided", x.repeat_interleave(2, dim=3)[..., ::2]
    yield "permuted batch", x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    yield "requires grad", x.clone().requires_grad_()
    yield "parameter", nn.Parameter(x.clone())


@pytest.mark.parametrize("name", [name for name, _ in _layouts(torch.zeros(IMAGE))])
def test_inputs_may_have_any_layout(name: str) -> None:
    _, lowered, (x,) = net()
    given = dict(_layouts(x))[name]
    assert differences(lowered.run(given), lowered.run(x)) == []


def test_an_expanded_input() -> None:
    _, lowered, (x,) = net()
    row = x[:, :, :1, :1]
    spread = row.expand(IMAGE)
    assert differences(lowered.run(spread), lowered.run(spread.contiguous())) == []


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided"])
def test_the_example_may_have_any_layout(layout: str) -> None:
    """Also where part of the graph runs outside of the delegate."""
    x = torch.randn(IMAGE)
    model = Function(lambda s, x: torch.where(x > 0, s.conv(x), x), conv=conv())
    graph = quantized(model, (x,))
    example = dict(_layouts(x))[layout]
    lowered = cq.lower(graph, (example,))
    assert lowered.report.outside
    for given in (x, example):
        assert torch.equal(lowered.run(given), cq.lower(graph, (x,)).run(x))


def test_one_channel_of_ambiguous_strides() -> None:
    x = torch.randn(2, 1, 6, 6)
    graph = quantized(nn.Conv2d(1, 4, 3), (x,))
    lowered = cq.lower(graph, (x.to(memory_format=torch.channels_last),))
    assert torch.equal(lowered.run(x), lowered.run(x.to(memory_format=torch.channels_last)))


WRONG: dict[str, tuple[Any, str]] = {
    "too few": ((), r"takes 1 input.* 0$"),
    "too many": ((torch.zeros(IMAGE),) * 2, r"takes 1 input.* 2$"),
    "channels": ((torch.zeros(2, 3, 6, 6),), r"input 0 must have shape \(2, 4, 6, 6\), got \(2, 3"),
    "batch": ((torch.zeros(3, 4, 6, 6),), r"input 0 must have shape \(2, 4, 6, 6\), got \(3, 4"),
    "rank": ((torch.zeros(4, 6, 6),), r"input 0 must have shape \(2, 4, 6, 6\), got \(4, 6, 6\)"),
    "float64": (
        (torch.zeros(IMAGE).double(),),
        r"input 0 must be torch.float32, got torch.float64",
    ),
    "half": ((torch.zeros(IMAGE).half(),), r"got torch.float16; convert it with"),
    "integers": ((torch.zeros(IMAGE).int(),), r"input 0 must be torch.float32, got torch.int32"),
    "complex": ((torch.zeros(IMAGE, dtype=torch.complex64),), r"got torch.complex64"),
    "numpy": ((torch.zeros(IMAGE).numpy(),), r"input 0 must be a tensor, got ndarray"),
    "none": ((None,), r"(must be a tensor, got NoneType|takes 1 input)"),
    "number": ((1.0,), r"input 0 must be a tensor, got float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused_before_anything_runs(name: str) -> None:
    graph, lowered, _ = net()
    inputs, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        lowered.run(*inputs)
    with pytest.raises(InputError, match=message):
        cq.lower(graph, inputs)
    with pytest.raises(InputError, match=message):
        cq.integer_reference(graph)(*inputs)


def test_an_example_that_is_not_a_tuple() -> None:
    graph, _, (x,) = net()
    with pytest.raises(InputError, match=r"for one tensor x write \(x,\)"):
        cq.lower(graph, cast(Any, x))


def test_integer_inputs_beside_float_ones() -> None:
    model = Function(
        lambda s, x, i: s.head(x + s.table(i)), head=nn.Linear(4, 2), table=nn.Embedding(5, 4)
    )
    inputs = (torch.randn(3, 4), torch.tensor([0, 4, 2]))
    graph = quantized(model, inputs)
    lowered = cq.lower(graph, inputs)
    assert differences(lowered.run(*inputs), cq.integer_reference(graph)(*inputs)) == []
    with pytest.raises(InputError, match=r"input 1 must be torch\.int64, got torch\.int32"):
        lowered.run(inputs[0], inputs[1].int())


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (lambda x: Net(), r"got Net: a converted graph is a torch\.fx\.GraphModule"),
        (lambda x: capture(Net(), (x,)), "no quantized tensor"),
        (lambda x: torch.export.export(Net().eval(), (x,)), "got ExportedProgram"),
    ],
)
def test_what_is_no_converted_graph(graph: Callable[[Tensor], Any], message: str) -> None:
    x = torch.randn(IMAGE)
    with pytest.raises(ConversionError, match=message):
        cq.lower(graph(x), (x,))


def test_a_prepared_graph() -> None:
    x = torch.randn(IMAGE)
    prepared = prepare_pt2e(capture(Net(), (x,)), cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    with pytest.raises(ConversionError, match="call convert_pt2e"):
        cq.lower(prepared, (x,))


# ---------------------------------------------------------------------------------------------
# Dynamic sizes
# ---------------------------------------------------------------------------------------------


def dynamic(model: nn.Module, **bounds: Any) -> tuple[GraphModule, Inputs]:
    x = torch.randn(IMAGE)
    batch = torch.export.Dim("batch", **bounds)
    shapes = (({0: batch},),) if isinstance(model, Function) else ({0: batch},)
    prepared = prepare_pt2e(
        capture(model, (x,), dynamic_shapes=shapes), cq.IntegerQuantizer().set_global("a8w8")
    )
    prepared(x)
    return convert_pt2e(prepared), (x,)


@pytest.mark.parametrize(
    ("bounds", "options", "largest"),
    [
        ({"max": 5}, {}, 5),
        ({"min": 2, "max": 20}, {}, 20),
        ({}, {}, 64),
        ({}, {"dynamic_max": 17}, 17),
    ],
)
def test_every_batch_up_to_the_largest_is_exact(
    bounds: dict[str, int], options: dict[str, int], largest: int
) -> None:
    graph, example = dynamic(Net(), **bounds)
    lowered = cq.lower(graph, example, **options)
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    for size in sorted({1, 2, 3, 15, 16, 17, largest - 1, largest}):
        if size <= largest:
            x = torch.randn(size, *IMAGE[1:])
            assert differences(lowered.run(x), reference(x)) == [], size
    with pytest.raises(InputError, match=rf"at most \({largest}, 4, 6, 6\), got \({largest + 1}, "):
        lowered.run(torch.randn(largest + 1, *IMAGE[1:]))
    with pytest.raises(InputError, match=r"\(\*, 4, 6, 6\), got \(2, 3, 6, 6\)"):
        lowered.run(torch.randn(2, 3, 6, 6))


WITH_A_DYNAMIC_BATCH: list[Callable[..., Any]] = [
    lambda x, y: y.flatten(1),
    lambda x, y: y.view(x.shape[0], -1),
    lambda x, y: y.permute(0, 2, 3, 1).reshape(x.shape[0], -1),
    lambda x, y: F.channel_shuffle(y, 2),
    lambda x, y: y[:, 1:3, ::2, ::2],
    lambda x, y: torch.cat(y.chunk(2, 1)[::-1], 1),
    lambda x, y: y.flatten(0, 1),
    lambda x, y: y * x.mean((2, 3), keepdim=True),
    lambda x, y: F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1),
]


@pytest.mark.parametrize(
    "functions",
    [
        pytest.param(WITH_A_DYNAMIC_BATCH, id="side by side"),
        *(pytest.param([f], marks=pytest.mark.slow) for f in WITH_A_DYNAMIC_BATCH),
    ],
)
def test_ops_with_a_dynamic_batch(functions: list[Callable[..., Any]]) -> None:
    model = Function(
        lambda s, x: [f(x, layer(x)) for f, layer in zip(functions, s.layers, strict=True)],
        layers=nn.ModuleList(conv() for _ in functions),
    )
    graph, example = dynamic(model, max=9)
    lowered = cq.lower(graph, example)
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    for size in (1, 2, 5, 9):
        x = torch.randn(size, *IMAGE[1:])
        assert differences(lowered.run(x), reference(x)) == [], size


# ---------------------------------------------------------------------------------------------
# Combinations that were wrong or refused once
# ---------------------------------------------------------------------------------------------

ONCE_WRONG: dict[str, Callable[..., Any]] = {
    "channel shuffle": lambda s, x: s.head(F.channel_shuffle(s.conv(x), 2)),
    "shuffle by views": lambda s, x: s.head(
        s.conv(x).view(2, 2, 2, 6, 6).transpose(1, 2).contiguous().view(IMAGE)
    ),
    "permute, contiguous, view": lambda s, x: (
        s.conv(x).permute(0, 2, 3, 1).contiguous().view(2, -1)
    ),
    "permute, reshape": lambda s, x: s.conv(x).permute(0, 2, 3, 1).reshape(2, -1),
    "expand, reshape": lambda s, x: s.conv(x)[:, :, :1].expand(2, 4, 3, 6).reshape(2, -1),
    "one tensor three times": lambda s, x: torch.cat([s.conv(x)] * 3, 1),
    "cat of a cat": lambda s, x: torch.cat([torch.cat([s.conv(x), x], 1), s.head(x)], 1),
    "splits used twice": lambda s, x: (lambda a, b: (a * 2, b, a))(*s.conv(x).split([1, 3], 1)),
    "sparse max pool": lambda s, x: F.max_pool2d(s.conv(x), 2, 3),
    "pool of one": lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 6),
    "clamp behind relu": lambda s, x: F.relu6(F.relu(s.conv(x))),
    "activation used twice": lambda s, x: (lambda h: F.relu(h) + h)(s.conv(x)),
    "constant on the left": lambda s, x: 3 - s.conv(x),
    "times zero": lambda s, x: s.conv(x) * 0,
    "difference of equals": lambda s, x: s.conv(x - x),
    "convolution of tiny values": lambda s, x: s.head(s.conv(x * 1e-30)),
    "convolution of huge values": lambda s, x: s.head(s.conv(x * 1e30)),
    "sum of far scales": lambda s, x: s.conv(x) + s.head(x * 1e-6),
    "cat of far scales": lambda s, x: torch.cat([s.conv(x) * 1e-6, x * 1e6], 1),
    "slices of both ends": lambda s, x: s.conv(x)[:, -3:-1, 1:, :-1],
    "unsqueeze everywhere": lambda s, x: s.conv(x)[:, None, ..., None],
}
GROUPS = [sorted(ONCE_WRONG)[i::3] for i in range(3)]


@cache
def once_wrong(group: int) -> tuple[GraphModule, cq.LoweredProgram]:
    torch.manual_seed(0)
    model = Function(
        lambda s, *xs: [ONCE_WRONG[n](s, x) for n, x in zip(GROUPS[group], xs, strict=True)],
        conv=conv(),
        head=conv(),
    )
    inputs = tuple(torch.randn(IMAGE) for _ in GROUPS[group])
    graph = quantized(model, inputs)
    return graph, cq.lower(graph, inputs)


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_combinations_are_exact_and_inside_the_delegate(group: int) -> None:
    graph, lowered = once_wrong(group)
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    shapes = [IMAGE] * len(GROUPS[group])
    for given in stress(shapes):
        assert differences(lowered.run(*given), reference(*given)) == [], GROUPS[group]


def test_a_pad_by_another_value_keeps_it() -> None:
    """The value lies outside of what was calibrated: rounding it to the grid would clip it."""
    x = torch.rand(IMAGE)
    graph = quantized(
        Function(lambda s, x: F.pad(s.conv(x), (1, 1), value=-99.0), conv=conv()), (x,)
    )
    lowered = cq.lower(graph, (x,))
    got = lowered.run(x)
    assert bool((got[..., 0] == -99.0).all())
    assert torch.equal(got[..., 1:-1], cq.integer_reference(graph)(x)[..., 1:-1])


def test_float_ops_are_reported_with_their_reason_and_place() -> None:
    x = torch.randn(IMAGE)
    model = Function(
        lambda s, x: s.head(torch.where(x > 0, torch.sin(s.conv(x)), x)), conv=conv(), head=conv()
    )
    lowered = cq.lower(quantized(model, (x,)), (x,))
    rows = {row.node: row for row in lowered.report.not_integer()}
    assert rows.keys() == {"gt", "sin", "where"}
    assert rows["sin"].backend.value == "xnnpack float"
    assert rows["where"].backend.value == "portable kernel, outside the delegate"
    overloads = {"gt": "Scalar", "sin": "default", "where": "self"}
    for name, row in rows.items():
        assert row.reason == f"no integer form of aten.{name}.{overloads[name]} is known"
    assert any("where" in kernel for kernel in lowered.report.outside)
    assert not lowered.report.fully_delegated


def test_an_op_left_in_float_runs_in_float_between_integer_ones() -> None:
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("conv", None)
    graph = quantized(
        Function(lambda s, x: s.head(s.conv(x + 1)), conv=conv(), head=conv()), (x,), quantizer
    )
    lowered = cq.lower(graph, (x,))
    (row,) = lowered.report.not_integer()
    assert (row.node, row.backend.value) == ("conv2d", "xnnpack float")
    assert lowered.report.fully_delegated
    assert list(lowered.integer_biases()) == ["conv2d_1"]


SIGNAL = (2, 8, 21)


FLOAT_CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding="same", groups=4), SIGNAL),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 8, 3, groups=2, padding=1), SIGNAL),
    "unequal_padding": (lambda: nn.Conv2d(8, 8, (2, 4), padding="same"), (2, 8, 6, 21)),
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        # Every layer and every scheme once; all pairs are slow.
        pytest.param(name, scheme, marks=() if i == j else pytest.mark.slow)
        for i, name in enumerate(FLOAT_CONVS)
        for j, scheme in enumerate((None, "a8w13", "a8w13-narrow"))
    ],
)
def test_float_convolutions_between_integers(name: str, scheme: str | None) -> None:
    """ExecuTorch took what it inserts next to them for integer ops, and failed."""
    conv, shape = FLOAT_CONVS[name]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(21, 21), conv(), nn.Linear(21, 21), conv(), nn.ReLU(), nn.Linear(21, 5)
    )
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    for layer in ("1", "3", "4"):
        quantizer.set_module_name(layer, scheme)
    x = torch.randn(shape)
    lowered = cq.lower(quantized(model, (x,), quantizer), (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    assert lowered.report.passes["keep_convs_float"] >= 1


def test_a_pool_in_float_over_images_that_are_channels_last() -> None:
    torch.manual_seed(0)
    blocks = [CNBlockConfig(8, 8, 1), CNBlockConfig(8, None, 1)]
    x = torch.randn(1, 3, 16, 16)
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.linear.default, "a8w8")
    lowered = cq.lower(quantized(ConvNeXt(blocks, num_classes=4), (x,), quantizer), (x,))
    assert "adaptive_avg_pool2d" in [row.node for row in lowered.report.not_integer()]
    assert lowered.report.fully_delegated


def cancelling() -> nn.Module:
    """A convolution whose result is next to nothing beside its weights."""
    layer = nn.Conv2d(8, 4, 1)
    nn.init.constant_(layer.weight[:, :4], 1e6)
    nn.init.constant_(layer.weight[:, 4:], -1e6)
    return layer


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (lambda s, x: F.relu(x * 1e5 - x * 1e5), {"sub"}),
        (lambda s, x: s.head(x * 1e5 - x * 1e5), {"sub"}),
        (lambda s, x: s.head(s.layer(torch.cat([x, x], 1))), {"conv2d"}),
        (lambda s, x: F.relu6(x * 1e9 * (x - x)), {"mul_1"}),
    ],
)
def test_an_op_whose_scales_no_kernel_takes_runs_in_float(
    function: Callable[..., Any], refused: set[str]
) -> None:
    """Reference, report and program agree about it."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    graph = quantized(Function(function, conv=conv(), head=conv(), layer=cancelling()), (x,))
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    rows = [row for row in lowered.report.not_integer() if "no integer kernel" in row.reason]
    assert {row.node for row in rows} >= refused
    assert all(row.backend.value == "xnnpack float" for row in rows)
    assert {op.node.name for op in cq.integer_reference(graph).float_ops} >= refused


SIGNALS = (3, 6)

# What the function returns, beside an integer op; the node that is named, and its kernel.
WITHOUT_KERNEL: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "sorted indices": (torch.argsort, "argsort", "aten::sort.values"),
    "distinct values": (torch.unique, "_unique2", "aten::_unique2.out"),
    "a product so far": (lambda y: y.cumprod(1), "cumprod", "aten::cumprod.out"),
    "indices in another order": (torch.nonzero, "nonzero", "aten::nonzero.out"),
    "no out variant": (
        lambda y: torch.linalg.svdvals(y),
        "linalg_svdvals",
        "aten::_linalg_svd.U",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_an_op_that_nothing_computes_is_named(name: str) -> None:
    function, node, kernel = WITHOUT_KERNEL[name]
    model = Function(lambda s, x: function(s.part(x)), part=nn.Linear(6, 4))
    x = torch.randn(SIGNALS)
    with pytest.raises(LoweringError) as error:
        cq.lower(quantized(model, (x,)), (x,))
    assert type(error.value) is LoweringError
    assert f"{node}: neither XNNPACK nor ExecuTorch's runtime has a kernel for it" in str(
        error.value
    )
    assert kernel in str(error.value)


def test_for_another_runtime_the_program_is_written_all_the_same() -> None:
    x = torch.randn(SIGNALS)
    graph = quantized(Function(lambda s, x: torch.argsort(x + x)), (x,))
    program = cq.lower(graph, (x,), check=False)
    assert program.contents.kernels == ("aten::sort.values",)
    with pytest.raises(ProgramError, match="or the runtime lacks a kernel"):
        program.run(x)


def test_a_kernel_that_refuses_its_input_is_named() -> None:
    x = torch.randn(1, 2, 4, 4, 4)
    model = Function(lambda s, x: s.part(x + x), part=nn.ConvTranspose3d(2, 2, 3))
    with pytest.raises(LoweringError, match=r"outside the delegate run conv_transpose3d \(part\)"):
        cq.lower(quantized(model, (x,)), (x,))


def test_a_tensor_of_more_dims_than_xnnpack_has_is_named() -> None:
    x = torch.randn(1, 2, 1, 2, 1, 2, 6)
    graph = quantized(Function(lambda s, x: s.part(x), part=nn.Linear(6, 4)), (x,))
    with pytest.raises(LoweringError, match=r"linear .* has 7 dims, and XNNPACK's tensors at most"):
        cq.lower(graph, (x,))


UNWRITABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "complex numbers": (
        lambda s, x: torch.fft.rfft(x + x).abs(),
        "fft_rfft is torch.complex64",
    ),
    "text": (lambda s, x: (x + x, "text"), "output 1 is 'text'; a program returns tensors"),
    "a size that values tell": (
        lambda s, x: torch.bincount((x + x).argmax(1)),
        "bincount: the size of its result depends on values",
    ),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_no_program_holds(name: str) -> None:
    function, message = UNWRITABLE[name]
    x = torch.randn(SIGNALS)
    with pytest.raises(LoweringError, match=message):
        cq.lower(quantized(Function(function), (x,)), (x,))


def test_products_outside_the_delegate_read_what_it_returns() -> None:
    """Dynamic rows by dynamic rows, a broadcast batch, a computed weight: float, and right."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = s.conv1d(x)
        rows, weight = y[:, 0], y[0, :4, :2].reshape(2, 4)
        broadcast = y @ s.other(x)[0].transpose(0, 1)
        return torch.softmax(rows @ rows.T, -1), broadcast, F.linear(rows[:, :4], weight)

    layers = {"conv1d": nn.Conv1d(3, 4, 1), "other": nn.Conv1d(3, 4, 1)}
    torch.manual_seed(0)
    model, x = Function(forward, **layers), torch.randn(4, 3, 7)
    result = cq.quantize(Single(model), (x,), [(x,)], dynamic_batch=8, progress=False)
    assert result.lowered is not None
    assert result.lowered.contents.kernels.count("aten::mm.out") == 3
    reference = cq.integer_reference(result.converted)
    for size in (4, 8, 1):
        given = torch.randn(size, 3, 7)
        for got, want in zip(result.lowered.run(given), reference(given), strict=True):
            # Sums of seven products, in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Arguments that are made of a dynamic batch n: the op runs in float, and says so.
SIZED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "clamp": lambda y, n: y.clamp(-n, n * 0.5),
    "clamp_max": lambda y, n: y.clamp(max=n - 2),
    "constant_pad_nd": lambda y, n: F.pad(y, (0, 0, n, 1)),
    "expand": lambda y, n: y[0].expand(n, 2, 7),
    "reshape": lambda y, n: y.reshape(n, 14),
    "mul": lambda y, n: y * n,
}


def test_arguments_that_depend_on_a_dynamic_size() -> None:
    layers = {f"part{i}": nn.Conv1d(3, 2, 1) for i in range(len(SIZED))}

    def forward(s: Any, x: Tensor) -> list[Tensor]:
        parts = [getattr(s, f"part{i}")(x) for i in range(len(SIZED))]
        return [f(y, x.shape[0]) for f, y in zip(SIZED.values(), parts, strict=True)]

    torch.manual_seed(0)
    x = torch.randn(4, 3, 7)
    model = Single(Function(forward, **layers))
    result = cq.quantize(model, (x,), [(x,)], dynamic_batch=8, progress=False)
    reasons = {op.node: op.reason for op in result.plan.ops if op.scheme is None}
    for name in ("clamp", "clamp_1", "expand"):
        assert reasons[name] == "one of its arguments depends on a dynamic size"
    assert reasons["pad"] == "how much it pads depends on a dynamic size"
    assert "reshape" not in reasons
    assert result.lowered is not None
    reference = cq.integer_reference(result.converted)
    for size in (4, 8, 1):
        given = torch.randn(size, 3, 7)
        assert differences(result.lowered.run(given), reference(given)) == []


class Single(nn.Module):
    """One input by name: its batch may vary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


COMPOSITES = (F.hardshrink, F.mish, F.softplus, F.logsigmoid, F.softshrink, F.tanhshrink)


def test_composite_float_ops_of_images_are_right() -> None:
    """Some of their parts run inside the delegate, which keeps images channels last, some not."""
    x = torch.randn(IMAGE)
    layers = {f"conv{i}": conv() for i in range(len(COMPOSITES))}
    graph = quantized(
        Function(
            lambda s, x: [f(getattr(s, f"conv{i}")(x)) for i, f in enumerate(COMPOSITES)], **layers
        ),
        (x,),
    )
    lowered = cq.lower(graph, (x,))
    assert lowered.report.passes["shield_composites"] >= 4
    given = torch.randn(IMAGE)
    reference = cq.integer_reference(graph)(given)
    for got, want in zip(lowered.run(given), reference, strict=True):
        # Each is a few float32 operations on values below 10.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_executorch_cannot_lower_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise KeyError("aten.unheard_of\nand a page of graph")

    monkeypatch.setattr(lowering, "to_edge_transform_and_lower", refuse)
    x = torch.randn(4, 6, 6)
    graph = quantized(Function(lambda s, x: x + x), (x,))
    message = r"ExecuTorch could not partition the graph: KeyError: 'aten.unheard_of.*"
    with pytest.raises(LoweringError, match=message):
        cq.lower(graph, (x,))


def test_one_image_without_a_batch() -> None:
    x = torch.randn(4, 6, 6)
    graph = quantized(Function(lambda s, x: F.max_pool2d(x + x, 2)), (x,))
    assert lowered_exactly(graph, (x,)).report.fully_delegated


# ---------------------------------------------------------------------------------------------
# A lowering that would be wrong raises
# ---------------------------------------------------------------------------------------------


def sabotaged(
    monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[GraphModule], Any]
) -> None:
    """Let a pass do something else besides."""

    def run(model: GraphModule) -> int:
        count = original.run(model)
        change(model)
        return count

    (original,) = (p for p in PASSES if p.name == name)
    patched = tuple(dataclasses.replace(p, run=run) if p is original else p for p in PASSES)
    monkeypatch.setattr(passes, "PASSES", patched)


def _constant(model: GraphModule, suffix: str, op: str = "conv2d_1") -> Tensor:
    """A constant of one op, of which the name ends so."""
    (node,) = (n for n in model.graph.nodes if n.name == op)
    for source in node.all_input_nodes:
        while source.op == "call_function":
            source = cast(Node, source.args[0])
        if source.op == "get_attr" and str(source.target).endswith(suffix):
            return cast(Tensor, getattr(model, str(source.target)))
    raise AssertionError(suffix)


def _bias_off_by_one(model: GraphModule) -> None:
    bias = _constant(model, "_folded")
    (node,) = (n for n in model.graph.nodes if n.name == "conv2d_1")
    weight, data = cast(Node, node.args[1]), cast(Node, node.args[0])
    scale = getattr(model, str(cast(Node, weight.args[1]).target)) * data.args[1]
    bias[2] += scale[2]


def _weight_off_by_one(model: GraphModule) -> None:
    _constant(model, "_integers")[1, 0, 1, 1] += 1


def _swapped_channels(model: GraphModule) -> None:
    bias = _constant(model, "_folded")
    bias.copy_(bias.flip(0))


def _no_activation(model: GraphModule) -> None:
    (node,) = (n for n in model.graph.nodes if n.target is aten.relu.default)
    node.replace_all_uses_with(cast(Node, node.args[0]))
    model.graph.erase_node(node)


def _other_scale(model: GraphModule) -> None:
    (node,) = (n for n in model.graph.nodes if n.name == "conv2d_1")
    (quantize,) = (u for u in node.users if is_quantize(u))
    for user in (quantize, *quantize.users):
        user.args = (user.args[0], cast(float, user.args[1]) * 1.01, *user.args[2:])


def _other_stride(model: GraphModule) -> None:
    (pool,) = (n for n in model.graph.nodes if n.target is aten.max_pool2d.default)
    pool.args = (pool.args[0], [1, 1], [1, 1], [0, 0])


SABOTAGE: dict[str, tuple[str, Callable[[GraphModule], Any], str]] = {
    "bias off by one": ("fold_bias", _bias_off_by_one, r"conv2d_1 \(body\): bias: .* at \(?2"),
    "channels swapped": ("fold_bias", _swapped_channels, r"conv2d_1 \(body\): bias"),
    "weight off by one": ("fold_bias", _weight_off_by_one, r"conv2d_1 \(body\): weight"),
    "activation lost": ("fold_bias", _no_activation, r"conv2d \(stem\): clamp"),
    "scale changed": ("fold_bias", _other_scale, r"conv2d_1 \(body\): output scale"),
    "window changed": ("fold_bias", _other_stride, r"output 0: \d+ of \d+ values differ"),
}


@cache
def right_so_far() -> tuple[GraphModule, Inputs]:
    """What is lowered without complaint before anything is made wrong."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = Function(
        lambda s, x: F.max_pool2d(s.body(F.relu(s.stem(x))), 3, 1, 1), stem=conv(), body=conv()
    )
    graph = quantized(model, (x,))
    cq.lower(graph, (x,))
    return graph, (x,)


@pytest.mark.parametrize("name", SABOTAGE)
def test_a_wrong_rewrite_is_caught_and_the_op_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, example = right_so_far()
    at, change, message = SABOTAGE[name]
    sabotaged(monkeypatch, at, change)
    with pytest.raises(VerificationError, match=message):
        cq.lower(graph, example)
    # Only if asked not to look does it return one.
    assert isinstance(cq.lower(graph, example, check=False), cq.LoweredProgram)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_a_saved_program_runs_in_the_bare_runtime(tmp_path: Path) -> None:
    _, lowered, (x,) = net()
    path = lowered.save(tmp_path / "net.pte")
    assert path.read_bytes() == lowered.buffer
    stored = load_program(path)
    assert differences(stored.run(x), tuple(pytree.tree_leaves(lowered.run(x)))) == []
    assert differences(stored.run(x.to(memory_format=torch.channels_last)), stored.run(x)) == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 inputs, got 0"),
        ((torch.zeros(IMAGE).double(),), r"input 0 must be float32, got torch\.float64"),
        ((torch.zeros(2, 3, 6, 6),), r"input 0 must have shape \(2, 4, 6, 6\), got \(2, 3, 6, 6\)"),
        ((torch.zeros(4, 6, 6),), r"input 0 must have shape"),
    ],
)
def test_wrong_inputs_of_a_stored_program(inputs: Inputs, message: str, tmp_path: Path) -> None:
    _, lowered, _ = net()
    stored = load_program(lowered.save(tmp_path / "net.pte"))
    with pytest.raises(InputError, match=message):
        stored.run(*inputs)


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    _, lowered, _ = net()
    for path in (tmp_path / "missing" / "net.pte", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            lowered.save(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError):
        lowered.save(tmp_path / "file" / "net.pte")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"], "nothing is left behind"


def test_a_program_that_is_cut_anywhere_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    _, lowered, _ = net()
    data, path = lowered.buffer, tmp_path / "cut.pte"
    sizes = {0, 1, 4, 7, 8, 9, 31, 32, 33, len(data) - 1, len(data) - 8}
    sizes |= {len(data) * i // 41 for i in range(41)}
    for size in sorted(sizes):
        path.write_bytes(data[:size])
        with pytest.raises(ProgramError, match=str(path)):
            load_program(path)


@pytest.mark.parametrize("name", ["missing.pte", "."])
def test_programs_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"cannot be read .*give the path of a \.pte"):
        load_program(tmp_path / name)


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a program, but long enough to have a header of its own" * 9)
    with pytest.raises(ProgramError, match=r"notes\.txt.* is not a \.pte"):
        load_program(path)


def test_lowered_exactly_notices_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper that most tests rest on, and a program of which one value is the next float."""
    graph, lowered, example = net()

    def run(x: Tensor) -> Any:
        outputs = lowered.run(x)
        value = outputs["scores"][1, 2]
        value.copy_(torch.nextafter(value, value + 1))
        return outputs

    twin = lowered.with_bytes(lowered.buffer)
    monkeypatch.setattr(twin, "run", run)
    monkeypatch.setattr(cq, "lower", lambda *_: twin)
    with pytest.raises(AssertionError):
        lowered_exactly(graph, example)


def test_a_program_holds_no_constants_that_nothing_reads() -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = conv()
            self.register_buffer("unused", torch.randn(1000))

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.layer(x))

    x = torch.randn(IMAGE)
    lowered = lowered_exactly(quantized(Extra(), (x,)), (x,))
    (delegate,) = lowered.contents.delegates
    (op,) = (op for op in delegate.ops if op.weight is not None)
    integers = [delegate.weight(op), cast(Any, delegate.bias(op))]
    scales = 2 * 4 * len(integers[1])  # of the weight and of the bias, float32
    needed = sum(values.nbytes for values in integers) + scales
    assert lowered.contents.constant_bytes == needed
