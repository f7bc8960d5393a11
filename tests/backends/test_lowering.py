"""From a converted graph to a program that was checked: what comes in, goes out, and breaks."""

from __future__ import annotations

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
    outside,
    quantized,
    stress,
)
from support.models import conv
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import load_program
from custom_quantizer.core.graph import is_dequantize, is_quantize
from custom_quantizer.errors import (
    ConversionError,
    InputError,
    ProgramError,
)

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)


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
        lambda s, x: (lambda h: [h, {"a": (x + 1, h), "b": x}])(s.conv(x)),
        lambda s, x: (s.conv(x).flatten(1), torch.sin(x)),
        *(
            pytest.param(function, marks=pytest.mark.slow)
            for function in (
                lambda s, x: s.conv(x),
                lambda s, x: (s.conv(x), x),
                lambda s, x: (lambda h: (h, h))(s.conv(x)),
            )
        ),
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


def test_layers_that_were_captured_as_one_call_are_found_in_the_program(tmp_path: Path) -> None:
    """Strict export has one node for the whole of an attention, whose layers go back to it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Function(lambda s, x: s.a(x, x, x, need_weights=False)[0], a=attention).eval()
    captured = torch.export.export(model, (x,), strict=True).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(x)
    graph = convert_pt2e(prepared)
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    handles = [set(op.handles) for op in lowered.report.ops if op.family == "linear"]
    assert len(handles) == 2
    assert not handles[0] & handles[1]
    cq.save_graph(graph, (x,), tmp_path / "net.graph.safetensors")
    loaded, _ = cq.load_graph(tmp_path / "net.graph.safetensors")
    assert cq.lower(loaded, (x,)).buffer == lowered.buffer


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


@cache
def partly_outside() -> tuple[GraphModule, Tensor, Tensor]:
    """A graph of which part runs outside of the delegate, an example, and what comes out."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    model = Function(lambda s, x: outside(s.conv(x)) + x, conv=conv())
    graph = quantized(model, (x,))
    return graph, x, cq.lower(graph, (x,)).run(x)


@pytest.mark.parametrize(
    "layout", slow_but(["transposed"], ["channels last", "transposed", "strided"])
)
def test_the_example_may_have_any_layout(layout: str) -> None:
    """Also where part of the graph runs outside of the delegate."""
    graph, x, want = partly_outside()
    example = dict(_layouts(x))[layout]
    lowered = cq.lower(graph, (example,))
    assert lowered.report.outside
    for given in (x, example):
        assert torch.equal(lowered.run(given), want)


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
    "sparse": ((torch.zeros(IMAGE).to_sparse(),), r"must be a dense tensor, and is torch.sparse_"),
    "no values": (
        (torch.zeros(IMAGE, device="meta"),),
        "must be a dense tensor, and has no values",
    ),
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
    # A mean that is returned is float where no rule names it.
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    quantizer.set_operator_type("aten.mean.dim", "a8w8")
    prepared = prepare_pt2e(capture(model, (x,), dynamic_shapes=shapes), quantizer)
    prepared(x)
    return convert_pt2e(prepared), (x,)


@pytest.mark.slow
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
    # One network for all of its ops; where a bound comes from is no matter of the ops.
    small = Function(lambda s, x: s.conv(x).mean((2, 3)), conv=conv())
    graph, example = dynamic(Net() if "min" in bounds else small, **bounds)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "functions",
    [
        pytest.param(WITH_A_DYNAMIC_BATCH, id="side by side"),
        *([f] for f in WITH_A_DYNAMIC_BATCH),
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
