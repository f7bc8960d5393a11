"""A signature that keeps its tables says what upstream's says, whatever is done to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.chains import chain
from support.models import convert
from torch import Tensor, nn
from torch.export import ExportGraphSignature, graph_signature
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.signature import RememberingSignature, remember_constants

TABLES = ("inputs_to_parameters", "inputs_to_buffers", "inputs_to_lifted_tensor_constants")
LISTS = ("non_persistent_buffers", "user_inputs")


class Constants(nn.Module):
    """A parameter, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.parameter = nn.Parameter(torch.ones(2))
        self.register_buffer("buffer", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.parameter + self.buffer + torch.tensor([1.0, 2.0])


@pytest.fixture
def signature() -> ExportGraphSignature:
    program = torch.export.export(Constants(), (torch.ones(2),))
    remember_constants(program)
    return program.graph_signature


def tables(signature: ExportGraphSignature) -> list[Any]:
    """As read."""
    lists = [list(getattr(signature, name)) for name in LISTS]
    return [*(dict(getattr(signature, name)) for name in TABLES), *lists]


def anew(signature: ExportGraphSignature) -> list[Any]:
    """As upstream makes them of the specs."""
    return tables(ExportGraphSignature(signature.input_specs, signature.output_specs))


def rename(signature: ExportGraphSignature) -> None:
    signature.replace_all_uses("p_parameter", "other")


def rename_by_hook(signature: ExportGraphSignature) -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("b_buffer")
    signature.get_replace_hook(replace_inputs=True)(node, "other", graph.output(node))


def lengthen(signature: ExportGraphSignature) -> None:
    spec = InputSpec(InputKind.BUFFER, TensorArgument("b_more"), "more", persistent=False)
    signature.input_specs.insert(0, spec)


def shorten(signature: ExportGraphSignature) -> None:
    del signature.input_specs[0]


def exchange(signature: ExportGraphSignature) -> None:
    first, second, *rest = copy.deepcopy(signature.input_specs)
    first.arg.name, second.arg.name = second.arg.name, first.arg.name
    signature.input_specs = [first, second, *rest]


def exchange_one(signature: ExportGraphSignature) -> None:
    spec = copy.deepcopy(signature.input_specs[0])
    spec.arg.name = "p_other"
    signature.input_specs[0] = spec


def exchange_some(signature: ExportGraphSignature) -> None:
    rest = copy.deepcopy(signature.input_specs[:2])
    for spec in rest:
        spec.target = f"{spec.target}_other"
    signature.input_specs[:2] = rest


def rename_input(signature: ExportGraphSignature) -> None:
    signature.replace_all_uses("x", "other")


CHANGES = (
    rename,
    rename_input,
    rename_by_hook,
    lengthen,
    shorten,
    exchange,
    exchange_one,
    exchange_some,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(
    signature: ExportGraphSignature, change: Callable[[ExportGraphSignature], None]
) -> None:
    assert isinstance(signature, RememberingSignature)
    before = tables(signature)
    assert all(len(table) == 1 for table in before)
    assert all(getattr(signature, name) is getattr(signature, name) for name in (*TABLES, *LISTS))
    change(signature)
    assert tables(signature) == anew(signature) != before


def test_a_copy_has_tables_of_its_own(signature: ExportGraphSignature) -> None:
    before = tables(signature)
    other = copy.deepcopy(signature)
    rename(other)
    assert tables(other) == anew(other) != before
    assert tables(signature) == before


@pytest.mark.slow
def test_lowering_makes_no_table_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table for every node that is looked at, the time of a chain grows with its square."""
    made: list[Any] = []
    upstream = graph_signature._immutable_dict

    def counted(items: Any) -> Any:
        made.append(items)
        return upstream(items)

    monkeypatch.setattr(graph_signature, "_immutable_dict", counted)
    counts = []
    for ops in (4, 16):
        model, x = chain(ops)
        graph = convert(model, (x,), "a8w8").graph
        made.clear()
        cq.lower(graph, (x,), check=False)
        counts.append(len(made))
    assert counts[0] == counts[1]
