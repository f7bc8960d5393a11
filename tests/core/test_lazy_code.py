"""Code of graphs is written when somebody asks for it (``GraphModule.recompile`` of 2.15)."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from support.models import convert
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx._lazy_graph_module import _LazyGraphModule

import custom_quantizer as cq
from custom_quantizer.core.lazy_code import WRITTEN, lazy_code


class Inner(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - 2 * second


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs for which code was written."""
    graphs: list[Graph] = []
    python_code = Graph.python_code

    def noted(self: Graph, *args: Any, **options: Any) -> Any:
        graphs.append(self)
        return python_code(self, *args, **options)

    monkeypatch.setattr(Graph, "python_code", noted)
    return graphs


def made() -> GraphModule:
    with lazy_code():
        return symbolic_trace(Inner())


ONE, TWO = torch.ones(2), torch.full((2,), 2.0)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: torch.equal(m(ONE, second=TWO), torch.full((2,), -3.0)),
        lambda m: torch.equal(m.forward(ONE, TWO), torch.full((2,), -3.0)),
        lambda m: "first - mul" in m.code,
        lambda m: "first - mul" in str(m),
        lambda m: list(inspect.signature(m.forward).parameters) == ["first", "second"],
        lambda m: list(inspect.signature(type(m).forward).parameters)[1:] == ["first", "second"],
        lambda m: m._lineno_map and m._prologue_start is not None,
    ],
)
def test_code_is_there_when_it_is_asked_for(
    written: list[Graph], ask: Callable[[GraphModule], bool]
) -> None:
    module = made()
    assert not written
    assert ask(module)
    assert written.count(module.graph) == 1
    assert ask(module)
    assert written.count(module.graph) == 1


def test_code_is_that_of_the_graph_as_it_is(written: list[Graph]) -> None:
    """A graph that is changed after its code was written gets new code, inside the block, too."""
    module = made()
    assert torch.equal(module(ONE, TWO), torch.full((2,), -3.0))
    with lazy_code():
        for node in module.graph.find_nodes(op="call_function", target=torch.sub):
            node.target = torch.add
        (output,) = (n for n in module.graph.nodes if n.op == "output")
        with module.graph.inserting_before(output):
            output.args = (module.graph.call_function(torch.neg, (output.args[0],)),)
        module.recompile()
        assert len(written) == 1
        assert "neg(" in module.code
        assert torch.equal(module(ONE, TWO), torch.full((2,), 3.0))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(ONE, TWO), torch.full((2,), 3.0))


def test_modules_do_not_share_code() -> None:
    with lazy_code():
        first, second = symbolic_trace(Inner()), symbolic_trace(nn.ReLU())
        third = copy.deepcopy(first)
    assert torch.equal(second(-ONE), torch.zeros(2))
    assert torch.equal(third(ONE, TWO), first(ONE, TWO))


def test_structures_of_inputs_are_known_without_code() -> None:
    exported = torch.export.export(Inner(), (ONE, TWO)).module()
    with lazy_code():
        twin = GraphModule(exported, exported.graph)
    assert (twin._in_spec, twin._out_spec) == (exported._in_spec, exported._out_spec)


def test_other_threads_and_lazy_modules_are_left_alone(written: list[Graph]) -> None:
    found: list[GraphModule] = []
    with lazy_code():
        thread = Thread(target=lambda: found.append(symbolic_trace(Inner())))
        thread.start()
        thread.join()
        assert len(written) == 1
        lazy = _LazyGraphModule(found[0], found[0].graph)
    assert torch.equal(lazy(ONE, TWO), torch.full((2,), -3.0))


def test_the_method_is_restored() -> None:
    before = GraphModule.recompile

    def fails() -> None:
        with lazy_code(), lazy_code():
            assert GraphModule.recompile is not before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert GraphModule.recompile is before
    module = made()
    module.recompile()
    assert torch.equal(pickle.loads(pickle.dumps(module))(ONE, TWO), torch.full((2,), -3.0))


def test_what_upstream_sets() -> None:
    """All that ``recompile`` sets is set on demand, but for how messages of errors are made."""
    module = made()

    def names() -> set[str]:
        return {*vars(module), *vars(type(module))}

    before = names() - set(WRITTEN)
    assert module.code
    assert names() - before == {*WRITTEN, "_wrapped_call", "__call__"}


def test_a_lowering_writes_no_code(written: list[Graph]) -> None:
    x = torch.randn(1, 4)
    graph = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (x,), "a8w8").graph
    cq.lower(graph, (x,))  # upstream's modules write some when they are imported
    written.clear()
    cq.lower(graph, (x,))
    assert not written
