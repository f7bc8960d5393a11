"""Programs made directly of a graph are those that ``torch.export`` (2.15) makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import lowering
from custom_quantizer.backends.xnnpack.passes import run_passes
from custom_quantizer.core.graph import detached_copy
from custom_quantizer.reference.direct_export import export_directly
from custom_quantizer.reference.exporting import export_again


class Images(nn.Module):
    """Layouts that change, defaults that are written, several results of which one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.grow = nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 2, 2)
        self.pool, self.head = nn.MaxPool2d(2, 1), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.image(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        y = self.grow(self.pool(nn.functional.hardswish(y.permute(0, 3, 1, 2))))
        y = nn.functional.interpolate(y, scale_factor=2.0, mode="bilinear") * scale
        first, second = y.permute(0, 2, 3, 1)[..., :2].split(1, -1)
        bounded = nn.functional.hardtanh(second, -2.0, 1.0)  # a default, but for its type
        return {"head": self.head(y), "best": first.topk(2, 1)[1], "part": bounded.exp()}


class Tokens(nn.Module):
    """Parameters that stay in float, with integers as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.table(tokens)).cumsum(1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.layer(x)


IMAGE = (torch.randn(1, 8, 8, 3, generator=torch.Generator().manual_seed(0)), torch.ones(8))
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "images": (Images, IMAGE, "a8w8"),
    "wide": (Images, IMAGE, "a16w4"),
    "tokens": (Tokens, (torch.arange(6).reshape(1, 6),), "a8w8"),
    "tokens, scales of run time": (Tokens, (torch.arange(6).reshape(1, 6),), "dyn8w8"),
    "recurrent": (Recurrent, (torch.ones(3, 1, 4),), "a8w8"),
}


def converted(name: str) -> tuple[GraphModule, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, example, scheme = CASES[name]
    return convert(make().eval(), example, scheme).graph, example


def rewritten(graph: GraphModule) -> GraphModule:
    """A copy as it is exported for XNNPACK."""
    model = detached_copy(graph, share_constants=True)
    run_passes(model)
    return model


def described(program: ExportedProgram) -> list[Any]:
    """All that a program says, with numbers for the names of nodes."""
    numbers = {node: i for i, node in enumerate(program.graph.nodes)}

    def plain(value: Any) -> Any:
        return map_arg(value, lambda node: f"node {numbers[node]}")

    def value(node: Node) -> list[Any]:
        values = pytree.tree_leaves(node.meta.get("val", ()))
        return [(x.shape, x.dtype, x.stride(), x.device) for x in values]

    def marks(node: Node) -> dict[str, Any]:
        """What this package noted of a call."""
        noted = node.meta.get("custom") if node.op == "call_function" else None
        return {key: note for key, note in (noted or {}).items() if "custom_quantizer" in key}

    def source(node: Node) -> str | None:
        """The node that it was in the beginning, by which ExecuTorch counts ops."""
        sources = node.meta.get("from_node")
        while sources and sources[0].from_node:
            sources = sources[0].from_node
        return sources[0].name if sources and node.op == "call_function" else None

    nodes = [
        (n.op, None if n.op == "placeholder" else n.target, plain(n.args), plain(dict(n.kwargs)))
        for n in program.graph.nodes
    ]
    about = [(value(n), marks(n), source(n)) for n in program.graph.nodes]
    signature = program.graph_signature
    specs = [(x.kind, x.target) for x in signature.input_specs]
    constants = [x.target for x in signature.input_specs if x.target is not None]
    held = [(name, program.state_dict[name].data_ptr()) for name in constants]
    gradients = [
        node.meta["val"].requires_grad
        for node, spec in zip(program.graph.nodes, specs, strict=False)
        if spec[1] is not None
    ]
    ends = [(x.kind, x.target) for x in signature.output_specs]
    specs_of_call = program.call_spec
    return [nodes, about, specs, held, gradients, ends, specs_of_call, program.dialect]


@pytest.mark.parametrize("name", slow_but(["wide", "recurrent"], CASES))
def test_the_program_that_a_trace_makes(name: str) -> None:
    graph, example = converted(name)
    model = rewritten(graph)
    direct, traced = export_directly(model, example), export_again(model, example, 1)
    assert direct is not None
    for mine, other in zip(described(direct), described(traced), strict=True):
        assert mine == other


@pytest.mark.parametrize("name", slow_but(["images"], ["images", "tokens, scales of run time"]))
def test_the_same_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, example = converted(name)
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "export_again", None)
        program = cq.lower(graph, example)
    monkeypatch.setattr(lowering, "export_directly", lambda *_: None)
    assert cq.lower(graph, example).buffer == program.buffer


class Counting(nn.Module):
    """Writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1.0)
        return self.layer(x) * self.count


class Passing(nn.Module):
    """Returns an input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.layer(x), x if other is None else other


class Choosing(nn.Module):
    """Has control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return torch.cond(y.sum() > 0, lambda v: v + 1, lambda v: v - 1, (y,))


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "example", "options"),
    [
        (Counting, (X,), {}),
        (Passing, (X,), {}),
        (Passing, (X, None), {}),
        (Choosing, (X,), {}),
        (partial(nn.Linear, 4, 4), (X,), {"dynamic_shapes": ({0: Dim.AUTO(min=1, max=8)},)}),
    ],
)
def test_other_graphs_are_traced(
    make: Callable[[], nn.Module], example: tuple[Any, ...], options: dict[str, Any]
) -> None:
    graph = rewritten(convert(make().eval(), example, "a8w8", **options).graph)
    assert export_directly(graph, example) is None


def test_constants_of_two_names_are_traced() -> None:
    """A trace makes one input of them."""
    graph = rewritten(convert(nn.Linear(4, 4).eval(), (X,), "a8w8").graph)
    assert export_directly(graph, (X,)) is not None
    reader = next(n for n in graph.graph.nodes if n.op == "get_attr")
    for other in ("a_twin", "z_twin"):
        graph.register_buffer(other, graph.get_buffer(str(reader.target)))
    reader.target = "z_twin"
    assert export_directly(graph, (X,)) is None


def test_examples_of_other_shapes_are_traced() -> None:
    graph = rewritten(convert(nn.Linear(4, 4).eval(), (X,), "a8w8").graph)
    assert export_directly(graph, (X[:1],)) is None
    assert export_directly(graph, (X.double(),)) is None
    assert export_directly(graph, (X.T.contiguous().T,)) is None


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).permute(1, 0)


def test_what_passes_recorded_is_compared_with_what_is_computed() -> None:
    """A view whose recorded shape is not what the op returns: a trace finds out."""
    graph = rewritten(convert(Turned().eval(), (X,), "a8w8").graph)
    assert export_directly(graph, (X,)) is not None
    (view,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    view.meta["val"] = view.meta["val"].reshape(2, 4)
    assert export_directly(graph, (X,)) is None


def test_a_layout_that_a_pass_recorded_is_not_believed_where_it_is_odd() -> None:
    graph = rewritten(convert(Turned().eval(), (X,), "a8w8").graph)
    (layer,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    layer.meta["val"] = layer.meta["val"].T.contiguous().T
    assert not layer.meta["val"].is_contiguous()
    direct, traced = export_directly(graph, (X,)), export_again(graph, (X,), 1)
    assert direct is not None
    assert described(direct) == described(traced)


class Best(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, places = self.layer(x).topk(2, 1)
        return values, places


def test_each_of_several_results_is_compared() -> None:
    graph = rewritten(convert(Best().eval(), (X,), "a8w8").graph)
    assert export_directly(graph, (X,)) is not None
    (best,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    values, places = best.meta["val"]
    best.meta["val"] = (values, places[:1])
    assert export_directly(graph, (X,)) is None
