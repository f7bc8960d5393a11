"""A program is verified from files alone, in the API and on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from click.testing import CliRunner
from support.graphs import Function, differences
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch._higher_order_ops import map as map_op
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.app.cli import cli
from custom_quantizer.app.saved_graph import load_lowered
from custom_quantizer.core.graph import module_path, size_bounds, tensor_meta

EXAMPLE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = convert(network(), EXAMPLE).graph
    folder = tmp_path_factory.mktemp("saved")
    cq.lower(graph, EXAMPLE).save(folder / "net.pte")
    cq.save_graph(graph, EXAMPLE, folder / "net.graph.safetensors")
    return folder


def test_a_reloaded_graph_lowers_to_the_same_bytes(files: Path) -> None:
    graph, example = cq.load_graph(files / "net.graph.safetensors")
    assert torch.equal(example[0], EXAMPLE[0])
    assert cq.lower(graph, example).buffer == (files / "net.pte").read_bytes()


def test_a_name_that_no_file_can_hold_is_told() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, größe: Tensor) -> Tensor:
            return self.linear(größe)

    example = (torch.randn(1, 4),)
    with pytest.raises(cq.ConversionError, match=r"arguments\.0: .* not 'größe'; the program"):
        cq.save_graph(convert(Sized(), example).graph, example, "unwritten.graph.safetensors")


@pytest.mark.slow
def test_verify_from_files(files: Path) -> None:
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--samples", "2"])
    assert result.exit_code == 0, result.output
    assert "bit-exact: yes" in result.output
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--samples", "1", "--json"])
    assert json.loads(result.stdout)["bit_exact"] is True
    result = CliRunner().invoke(cli, ["verify", str(files / "net.pte"), "--weights", "w.pth"])
    assert result.exit_code == 2
    assert "--model" in result.output


def test_evaluate_from_files(files: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(6) % 4)
    command = [
        "evaluate",
        str(files / "net.pte"),
        "--graph",
        str(files / "net.graph.safetensors"),
        "--json",
    ]
    result = CliRunner().invoke(cli, [*command, "--data", str(tmp_path / "data.npz")])
    assert result.exit_code == 0, result.output
    found = {model["name"]: model for model in json.loads(result.stdout)["models"]}
    assert list(found) == ["converted graph", "integer reference", "net.pte"]
    assert found["integer reference"]["correct"] == found["net.pte"]["correct"]


@pytest.mark.slow
def test_another_network_of_the_same_shape_is_found_out(files: Path, tmp_path: Path) -> None:
    graph, _ = cq.load_graph(files / "net.graph.safetensors")
    graph.get_buffer("0_bias_integers")[3] += 1
    cq.lower(graph, EXAMPLE).save(tmp_path / "other.pte")
    converted, lowered, _ = load_lowered(tmp_path / "other.pte", files / "net.graph.safetensors")
    checked = cq.verify(converted, lowered, EXAMPLE)
    assert checked.first is not None
    assert checked.first.what == "bias"
    command = [
        "verify",
        str(tmp_path / "other.pte"),
        "--graph",
        str(files / "net.graph.safetensors"),
    ]
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1
    assert "bias: 1 of 8 integers differ; at (3,)" in result.output


@pytest.mark.parametrize("other", ["integers", "size"])
def test_a_program_with_other_inputs_was_not_made_of_the_graph(
    other: str, files: Path, tmp_path: Path
) -> None:
    """Found before the runtime refuses to take them."""
    graph, _ = cq.load_graph(files / "net.graph.safetensors")
    own, example = cq.lower(graph, EXAMPLE), EXAMPLE
    if other == "size":
        example = tuple(torch.cat([value, value], 2) for value in EXAMPLE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(integer=other == "integers")
    program = cq.lower(convert(network(), example, quantizer).graph, example)
    with pytest.raises(cq.ProgramError, match=r"not made of this graph: it takes .*, not float32"):
        own.with_bytes(program.buffer)


def test_bad_files(files: Path, tmp_path: Path) -> None:
    with pytest.raises(cq.InputError, match="no such file"):
        cq.load_graph(tmp_path / "none.graph.safetensors")
    (tmp_path / "text.graph.safetensors").write_text("not a graph")
    with pytest.raises(cq.InputError, match="not a graph"):
        cq.load_graph(tmp_path / "text.graph.safetensors")
    truncated = tmp_path / "cut.pte"
    truncated.write_bytes((files / "net.pte").read_bytes()[:200])
    with pytest.raises(cq.ProgramError):
        load_lowered(truncated, files / "net.graph.safetensors")
    with pytest.raises(cq.ProgramError, match="cannot be read"):
        load_lowered(tmp_path / "none.pte", files / "net.graph.safetensors")
    captured = torch.export.export(nn.ReLU(), (torch.randn(2),)).module()
    with pytest.raises(cq.ConversionError, match="no quantized tensor"):
        cq.save_graph(captured, (torch.randn(2),), tmp_path / "x.graph.safetensors")


# -- what graphs hold ------------------------------------------------------------------------------


@dataclass
class Result:
    """What a model returns."""

    scores: Tensor
    again: Tensor


torch.export.register_dataclass(Result, serialized_type_name="test_saved_graph.Result")

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def linear() -> nn.Linear:
    return nn.Linear(6, 6)


def branches(m: Any, x: Tensor) -> Tensor:
    y = torch.cond(x.sum() > 0, lambda y: y + 1.0, lambda y: y * 2.0, (m.a(x),))
    return m.b(y)


def mapped(m: Any, x: Tensor) -> Tensor:
    return m.b(map_op(lambda row: row * 2, m.a(x)))


def nested(m: Any, pair: Any, flag: None, z: Tensor) -> Any:
    y = m.a(pair[0]) + pair[1]["k"]
    return {"a": y, "b": [m.b(z), None]}, (y, 3), z


def scalars(m: Any, x: Tensor, count: Tensor, keep: Tensor, times: int) -> Any:
    return m.a(x) * count, m.b(torch.where(keep, x, 0.0)) * times, x > -math.inf


def sizes(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return (m.a(x) + m.b(y)) * x.shape[0]


class Counts(nn.Module):
    """A buffer that changes, and a weight with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.b.weight = self.a.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return self.b(self.a(x)) + self.calls


class Keyword(nn.Module):
    """An input that is given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
        return self.a(x) * gain


BATCH = torch.export.Dim("batch", min=1, max=8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "cond": (lambda: Function(branches, a=linear(), b=linear()), (X,), {}),
    "map": (lambda: Function(mapped, a=linear(), b=linear()), (X,), {}),
    "nested": (
        lambda: Function(nested, a=linear(), b=linear()),
        ((X, {"k": X + 1}), None, X * 2),
        {},
    ),
    "scalars": (
        lambda: Function(scalars, a=linear(), b=linear()),
        (X, torch.ones(2, 6, dtype=torch.int64), X > 0, 2),
        {},
    ),
    "sizes": (
        lambda: Function(sizes, a=linear(), b=linear()),
        (X, X + 1),
        {"dynamic_shapes": (({0: BATCH}, {0: BATCH}),)},
    ),
    "state": (Counts, (X,), {}),
    "keyword": (Keyword, (X,), {"kwargs": {"gain": X + 2}}),
    "a16w8": (linear, (X,), {"scheme": "a16w8"}),
    "groups": (lambda: nn.Linear(64, 8), (torch.randn(2, 64),), {"scheme": "dyn8w4g32"}),
}


def converted(name: str) -> tuple[GraphModule, tuple[Any, ...]]:
    make, inputs, options = CASES[name]
    torch.manual_seed(0)
    kwargs = options.get("kwargs", {})
    captured = torch.export.export(
        make().eval(), inputs, kwargs, dynamic_shapes=options.get("dynamic_shapes")
    ).module()
    quantizer = cq.IntegerQuantizer().set_global(options.get("scheme", "a8w8"))
    prepared = prepare_pt2e(captured, quantizer)
    prepared(*inputs, **kwargs)
    return convert_pt2e(prepared), (*inputs, *kwargs.values())


@pytest.mark.parametrize("name", slow_but(["nested", "sizes", "state", "keyword", "groups"], CASES))
def test_a_reloaded_graph_is_the_same(name: str, tmp_path: Path) -> None:
    graph, inputs = converted(name)
    path = cq.save_graph(graph, inputs, tmp_path / "net.graph.safetensors")
    loaded, example = cq.load_graph(path)
    assert pytree.tree_structure(example) == pytree.tree_structure(inputs)
    assert differences(tensors(example), tensors(inputs)) == []
    nodes = [node for node in graph.graph.nodes if node.op != "call_module"]
    for one, two in zip(nodes, loaded.graph.nodes, strict=True):
        assert (one.name, one.op, one.target) == (two.name, two.op, two.target)
        assert str((one.args, one.kwargs)) == str((two.args, two.kwargs))
        assert module_path(one) == module_path(two)
        mine, other = tensor_meta(one), tensor_meta(two)
        if mine is not None:
            assert other is not None
            assert mine.dtype == other.dtype
            assert [size_bounds(s) for s in mine.shape] == [size_bounds(s) for s in other.shape]
    for key, value in graph.state_dict().items():
        if key in loaded.state_dict():
            assert torch.equal(loaded.state_dict()[key], value)
    kwargs = CASES[name][2].get("kwargs", {})
    args = CASES[name][1]
    wanted, got = graph(*args, **kwargs), loaded(*args, **kwargs)
    assert pytree.tree_structure(got) == pytree.tree_structure(wanted)
    assert differences(tensors(got), tensors(wanted)) == []
    # The same graph gives the same bytes.
    assert path.read_bytes() == cq.save_graph(*converted(name), tmp_path / "again").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_reloaded_graph_of_any_kind_lowers_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    graph, inputs = converted(name)
    loaded, example = cq.load_graph(cq.save_graph(graph, inputs, tmp_path / "g"))
    assert cq.lower(loaded, example).buffer == cq.lower(graph, inputs).buffer


def test_containers_of_other_kinds_come_back_as_tuples(tmp_path: Path) -> None:
    model = Function(lambda m, x: Result(m.a(x), x * 2), a=linear())
    captured = torch.export.export(model, (X,)).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
    prepared(X)
    graph = convert_pt2e(prepared)
    loaded, _ = cq.load_graph(cq.save_graph(graph, (X,), tmp_path / "g"))
    wanted = graph(X)
    first, second = loaded(X)
    assert torch.equal(first, wanted.scores)
    assert torch.equal(second, wanted.again)


def test_an_older_file_is_converted_by_the_two_lines_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text(encoding="utf-8")
    code = text.rpartition("```python\n")[2].partition("```")[0].replace("net.", f"{tmp_path}/net.")
    graph, inputs = converted("a16w8")
    torch.export.save(torch.export.export(graph, inputs), tmp_path / "net.pt2")
    exec(compile(code, "docs/files.md", "exec"), {"torch": torch, "cq": cq})
    loaded, example = cq.load_graph(tmp_path / "net.graph.safetensors")
    want = cq.integer_reference(graph)(*inputs)
    assert torch.equal(cq.integer_reference(loaded)(*example), want)
