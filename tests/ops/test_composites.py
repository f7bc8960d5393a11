"""Composite ops that no family claims are planned as the steps that PyTorch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, canonicalize, capture, quantized
from support.selection import slow_but
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.core import tracing
from custom_quantizer.ops.rewrites import composites
from custom_quantizer.ops.rewrites.composites import is_composite

aten = torch.ops.aten

# Name: of two tensors of eight rows.
CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: F.cosine_similarity(a, b, dim=-1),
    "distance": lambda a, b: F.pairwise_distance(a, b),
    "sum of differences": lambda a, b: F.pairwise_distance(a, b, p=1.0, keepdim=True),
    "largest difference": lambda a, b: torch.linalg.vector_norm(a - b, float("inf"), dim=-1),
    "inner": torch.inner,
    "tensordot": lambda a, b: torch.tensordot(a, b, dims=([0], [0])),
    "two layers": lambda a, b: F.bilinear(a, b, torch.ones(5, 6, 6) / 3, torch.ones(5)),
    "chain": lambda a, b: torch.linalg.multi_dot([a, b.t(), a]),
    "power": lambda a, b: torch.linalg.matrix_power(a.t() @ b, 3),
    "norm": lambda a, b: a * torch.linalg.norm(b, dim=-1, keepdim=True),
    "trapezoid": lambda a, b: torch.trapezoid(a * b, dim=-1),
    "margin": lambda a, b: F.triplet_margin_loss(a, b, a + b),
    "moments": lambda a, b: torch.var_mean(a, -1)[1] + torch.std_mean(b, -1)[0],
    "cross": lambda a, b: torch.cross(a[:, :3], b[:, :3], dim=1),
    "all distances": torch.cdist,
    "all sums of differences": lambda a, b: torch.cdist(a, b, p=1.0),
    "distance of all": lambda a, b: torch.dist(a, b, p=math.inf) + torch.dist(a, b),
    "outer product": lambda a, b: torch.addr(a, a[:, 0], b[0]),
    "bounds": lambda a, b: torch.clamp(a, torch.tensor(-0.5), b),
    "huber": lambda a, b: F.huber_loss(a, b, delta=0.5),
    "smooth": lambda a, b: F.smooth_l1_loss(a, b, reduction="none", beta=0.7),
    "squares": F.mse_loss,
    "entropy of logits": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid()),
    "cosine loss": lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(8)),
    "bounded norms": lambda a, b: torch.renorm(a * b, 2, 0, 0.8),
    "trace": lambda a, b: torch.trace(a[:6] @ b.t()[:, :6]),
    "diagonal": lambda a, b: torch.diag_embed(a, 1) @ torch.diag(b[0, :5], -2),
    "diagonals": lambda a, b: torch.diag(a[0]) + torch.diagflat(b[:, 0], 2)[:6, 3:9],
    "blocks": lambda a, b: torch.block_diag(a, b),
}


@pytest.mark.parametrize("name", slow_but(list(CASES)[::3], CASES))
def test_known_steps_take_the_place_of_a_call(name: str) -> None:
    case = CASES[name]
    model, x = Function(lambda _self, a, b: case(a, b)), (torch.randn(8, 6), torch.randn(8, 6))
    graph = capture(model, x)
    names = {node.name for node in graph.graph.nodes}
    canonicalize(graph)
    assert not {node.target for node in graph.graph.nodes} & _UNKNOWN
    assert graph.graph.output_node().all_input_nodes[0].name in names
    want = model(*x).double()
    torch.testing.assert_close(graph(*x).double(), want, rtol=2e-5, atol=2e-5)


_UNKNOWN = {
    aten.addr.default,
    aten.bilinear.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.block_diag.default,
    aten.cdist.default,
    aten.chain_matmul.default,
    aten.clamp.Tensor,
    aten.cosine_embedding_loss.default,
    aten.cosine_similarity.default,
    aten.diag.default,
    aten.diag_embed.default,
    aten.dist.default,
    aten.huber_loss.default,
    aten.inner.default,
    aten.linalg_cross.default,
    aten.linalg_matrix_power.default,
    aten.linalg_multi_dot.default,
    aten.linalg_norm.default,
    aten.mse_loss.default,
    aten.norm.ScalarOpt_dim,
    aten.pairwise_distance.default,
    aten.renorm.default,
    aten.smooth_l1_loss.default,
    aten.std_mean.dim,
    aten.tensordot.default,
    aten.trace.default,
    aten.trapezoid.dx,
    aten.triplet_margin_loss.default,
    aten.var_mean.dim,
}


def test_between_integers_they_are_part_of_the_one_delegate() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        shared = F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean")
        near = F.cosine_similarity(a, b).unsqueeze(-1) + torch.cdist(a, b)[:, :1]
        apart = F.binary_cross_entropy(a.sigmoid(), b.sigmoid()) + torch.trace(a)
        apart = apart + F.smooth_l1_loss(a, b) + torch.diag(b[0])[:4, :5] ** 0
        return self.c(torch.inner(a, b)) * near + torch.addr(shared, a[:, 0], b[0, :5]) + apart

    model = Function(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(4, 5)).eval()
    x = (torch.randn(4, 8),)
    converted = quantized(model, x)
    report = cq.lower(converted, x).report
    assert (report.delegates, report.outside) == (1, ())


def test_a_rule_for_the_op_is_one_for_its_steps() -> None:
    model = Function(lambda s, x: torch.inner(s.a(x), s.b(x)), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    graph = capture(model, (torch.randn(4, 8),))
    schemes = {}
    for scheme in ("a8w8", None):
        quantizer = cq.IntegerQuantizer().set_global("a8w8")
        plan = quantizer.set_operator_type(aten.inner.default, scheme).plan(graph)
        (op,) = (op for op in plan.ops if op.written == "inner")  # its steps are one op
        schemes[scheme] = op.scheme, op.target
    assert schemes == {"a8w8": ("a8", "aten.inner.default"), None: (None, "aten.inner.default")}


def test_of_a_dynamic_batch() -> None:
    model = Function(lambda _self, a, b: F.cosine_similarity(a, b) + (a - b).norm(dim=-1))
    x, y = ((torch.randn(n, 6), torch.randn(n, 6)) for n in (4, 9))
    batch = torch.export.Dim("batch", min=1, max=16)
    graph = canonicalize(capture(model, x, dynamic_shapes={"inputs": ({0: batch}, {0: batch})}))
    assert not {node.target for node in graph.graph.nodes} & _UNKNOWN
    torch.testing.assert_close(graph(*y), model(*y))


def test_gradients_go_through_the_steps() -> None:
    model = Function(lambda s, x: F.cosine_similarity(s.a(x), x), a=nn.Linear(8, 8))
    x = torch.randn(4, 8)
    graph = canonicalize(torch.export.export(model.train(), (x,)).module(), training=True)
    assert not {node.target for node in graph.graph.nodes} & _UNKNOWN
    grads = []
    for each in (graph, model):
        each(x).sum().backward()
        grads.append(dict(each.named_parameters())["a.weight"].grad)
    torch.testing.assert_close(*grads)


def test_calls_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []

    def parts_of(call: Any, *args: Any, **options: Any) -> Any:
        traced.append(call.target)
        return tracing.parts_of(call, *args, **options)

    monkeypatch.setattr(composites, "parts_of", parts_of)

    def forward(_self: Any, x: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.inner(x, x)
        return torch.inner(x, x[:2])  # of other sizes

    graph = canonicalize(capture(Function(forward), (torch.randn(4, 4),)))
    assert not {node.target for node in graph.graph.nodes} & _UNKNOWN
    assert len(traced) == 3  # the first one twice: what its steps are made of


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.tensordot(x.int(), x.int(), dims=([0], [0])),  # exact as it is
        lambda x: torch.quantile(x, 0.3),  # of steps that nothing knows
    ],
)
def test_others_are_left_whole(function: Callable[[Tensor], Tensor]) -> None:
    graph = capture(Function(lambda _self, x: function(x)), (torch.randn(4, 6),))
    wholes = [node.target for node in graph.graph.nodes if is_composite(node.target)]
    canonicalize(graph)
    assert wholes
    assert [node.target for node in graph.graph.nodes if is_composite(node.target)] == wholes
