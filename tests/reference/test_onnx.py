"""ONNX files: the integers in them are those of the graph, and so is what ONNX Runtime computes."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from support.contracts import RULES, Family, FloatFamily, cases_of
from support.graphs import Function, Inputs, stress
from support.models import convert, randomize_batch_norms, torchvision_model
from support.selection import slow_but
from support.widths import SCHEMES, Widths, widths
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import custom_quantizer as cq
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    constant_of,
    is_constant,
    is_dequantize,
    is_quantize,
    qparams_of,
)
from custom_quantizer.core.resizing import POSITION_BITS
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.reference.interchange.names import tensor_name
from custom_quantizer.reference.interchange.onnx_file import Activations

try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401
except ImportError as error:
    pytest.skip(f"needs {error.name}: pip install '.[dev]'", allow_module_level=True)

TYPES = onnx.TensorProto
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")  # as written; the default


def saturates() -> bool:
    """Whether ONNX Runtime (1.32) adds products of unsigned and signed bytes in 16 bits here."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")


EXACT = LEVELS[:1] if saturates() else LEVELS
"""Levels at which ONNX Runtime computes what the file says, on this CPU."""


@dataclass(frozen=True)
class Difference:
    """Of all outputs of one session.

    Attributes:
        steps: the largest difference of an output that was quantized, in steps.
        different: how many of these are not equal.
        compared: how many there are.
        relative: the largest difference of an output in float, relative to its largest value.
    """

    steps: int = 0
    different: int = 0
    compared: int = 0
    relative: float = 0.0


def session(path: Path, level: str = LEVELS[1], **config: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs_of(graph: GraphModule) -> list[Node]:
    return list(pytree.tree_leaves(graph.graph.output_node().args[0]))


def difference(
    graph: GraphModule, file: Any, batches: Iterable[Inputs], worst: Difference | None = None
) -> Difference:
    """Compare ONNX Runtime with the converted graph."""
    found = worst or Difference()
    names = [value.name for value in file.get_inputs()]
    for batch in batches:
        with torch.no_grad():
            want = pytree.tree_leaves(graph(*batch))
        got = file.run(None, {n: t.numpy() for n, t in zip(names, batch, strict=True)})
        for value, result, node in zip(want, got, outputs_of(graph), strict=True):
            exact = value.numpy()
            assert (result.shape, result.dtype) == (exact.shape, exact.dtype)
            assert np.isfinite(result).all()
            assert np.isfinite(exact).all()
            apart = np.abs(result.astype(np.float64) - exact)
            steps, different, compared, relative = 0, 0, 0, 0.0
            if is_dequantize(node):
                scale = qparams_of(graph, node).scale
                integers = np.rint(apart / scale)
                steps, different = int(integers.max()), int((integers > 0).sum())
                compared = integers.size
            elif apart.size:
                relative = float(apart.max() / max(1.0, float(np.abs(exact).max())))
            found = Difference(
                max(found.steps, steps),
                found.different + different,
                found.compared + compared,
                max(found.relative, relative),
            )
    return found


def initializers(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def types(model: Any) -> dict[str, int]:
    """ONNX types of constants."""
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def by_name(model: Any, kind: str) -> dict[str, Any]:
    return {node.name.rpartition("/")[0]: node for node in model.graph.node if node.op_type == kind}


class Following(torch.fx.Interpreter):
    """A converted graph that goes on from the integers of another runtime, tensor by tensor.

    So a difference is that of one op. In a deep network one step moves others behind it.
    """

    def __init__(self, graph: GraphModule, integers: Mapping[str, Any]) -> None:
        super().__init__(graph)
        self.integers, self.steps = integers, dict[str, int]()
        self.different = self.compared = 0

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if not is_quantize(n) or n.name not in self.integers:
            return result
        theirs = torch.from_numpy(self.integers[n.name])
        if theirs.dtype is torch.uint8:
            theirs = theirs.to(torch.int16) - 128
        apart = (theirs.int() - result.int()).abs()
        self.steps[n.name] = int(apart.max())
        self.different += int((apart > 0).sum())
        self.compared += apart.numel()
        return theirs.to(result.dtype)


def followed(graph: GraphModule, path: Path, level: str, batch: Inputs, **config: str) -> Following:
    """Run with every rounded tensor as an output as well."""
    model = onnx.load(path)
    count, names = dict[str, int](), dict[str, str]()
    for node in graph.graph.nodes:
        if is_quantize(node):
            tensor = tensor_name(node)
            again = count[tensor] = count.get(tensor, -1) + 1
            names[node.name] = f"{tensor}.integers" + (f"_{again}" if again else "")
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in names.values())
    wide = path.with_suffix(".all.onnx")
    onnx.save(model, wide)
    file = session(wide, level, **config)
    values = file.run(
        list(names.values()),
        {v.name: t.numpy() for v, t in zip(file.get_inputs(), batch, strict=True)},
    )
    run = Following(graph, dict(zip(names, values, strict=True)))
    with torch.no_grad():
        run.run(*batch)
    assert run.steps.keys() == names.keys()
    return run


# ---------------------------------------------------------------------------------------------
# The integers in the file
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=slow_but(["uint8"], ["uint8", "int8"]))
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Activations, cq.OnnxSummary, Any]:
    path = tmp_path_factory.mktemp("onnx") / "widths.onnx"
    summary = cq.save_onnx(widths()[0], path, activations=request.param)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return request.param, summary, model


Written = tuple[Activations, cq.OnnxSummary, Any]


def test_constants_are_those_of_the_graph(written: Written) -> None:
    """Every integer, scale and zero point, under the name of its tensor."""
    graph, _ = widths()
    _, _, model = written
    arrays, steps = initializers(model), by_name(model, "DequantizeLinear")
    compared = []
    for node in graph.graph.nodes:
        grouped = node.target is DEQUANTIZE_GROUPED
        if not (grouped or is_dequantize(node)) or not is_constant(node.args[0]):
            continue
        name = tensor_name(node)
        stored = arrays[name].astype(np.int64)
        np.testing.assert_array_equal(stored, constant_of(graph, node.args[0]).numpy())
        scale = node.args[2] if grouped else node.args[1]
        want = constant_of(graph, scale).numpy() if isinstance(scale, Node) else scale
        scales = arrays[f"{name}.scale"]
        np.testing.assert_array_equal(scales, np.float32(want).reshape(scales.shape))
        attributes = {a.name: a.i for a in steps[name].attribute}
        if grouped:
            assert attributes == {"axis": 1, "block_size": 32}
        elif node.target is DEQUANTIZE_PER_CHANNEL:
            assert attributes.get("axis", 1) == node.args[3]
        point = arrays[steps[name].input[2]] if len(steps[name].input) > 2 else 0
        assert point == (node.args[2] if node.target is DEQUANTIZE_PER_TENSOR else 0)
        compared.append(name)
    paths = dict(Widths().named_parameters())
    ours = {"_frozen_param0", "mean_weight"}  # the token, and a mean as a matrix product
    assert sorted(compared) == sorted({*paths, *ours} - {"token", "grouped.bias"})


def test_a_bias_has_the_product_of_scales_and_no_zero_point(written: Written) -> None:
    _, _, model = written
    arrays, stored = initializers(model), types(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    checked = []
    for op in model.graph.node:
        if op.op_type not in ("Conv", "ConvTranspose", "Gemm") or "grouped.bias" in op.input:
            continue
        data, weight, bias = (makers[name] for name in op.input)
        assert [node.op_type for node in (data, weight, bias)] == ["DequantizeLinear"] * 3
        assert stored[bias.input[0]] == TYPES.INT32
        assert len(bias.input) == 2
        product = arrays[data.input[1]] * arrays[weight.input[1]]
        np.testing.assert_array_equal(arrays[bias.input[1]], product)
        checked.append(bias.input[0].removesuffix(".bias"))
    assert checked == ["eight", "four", "two", "six", "sixteen"]


def test_types_are_the_narrowest_that_onnx_has(written: Written) -> None:
    narrow, summary, model = written
    stored = types(model)
    assert {name: stored[f"{name}.weight"] for name in SCHEMES} == {
        "eight": TYPES.INT8,
        "four": TYPES.INT4,
        "two": TYPES.INT4,
        "six": TYPES.INT8,
        "sixteen": TYPES.INT16,
        "grouped": TYPES.INT4,
    }
    rounded = by_name(model, "QuantizeLinear")
    points = {name: stored.get(node.input[2]) for name, node in rounded.items()}
    eight = {"uint8": TYPES.UINT8, "int8": TYPES.INT8}[narrow]
    assert points["x"] == eight
    assert points["mean"] == TYPES.INT16
    text = str(summary)
    assert "1 constants of 2 bits are stored as INT4: two.weight" in text
    assert "1 constants of 6 bits are stored as INT8: six.weight" in text
    assert ("UINT8: integers and zero points 128 higher" in text) is (narrow == "uint8")
    assert f"activations of 4 bits are {narrow.upper()} behind a Clip" in text
    assert "1 tensors get their scale at run time, by ops in float: late" in text


def test_names_are_those_of_the_plan(written: Written) -> None:
    _, summary, model = written
    assert summary.inputs == ("x", "late") == tuple(v.name for v in model.graph.input)
    assert summary.outputs == ("output_0", "output_1") == tuple(v.name for v in model.graph.output)
    graph, _ = widths()
    ops = {op.node.name for op in read_converted(graph)}
    assert ops - {"relu", "relu_1"} <= {node.name.partition("/")[0] for node in model.graph.node}
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.input]
    sizes = [[size.dim_param or size.dim_value for size in shape] for shape in shapes]
    assert sizes == [["batch", 3, 6, 6], ["batch", 32]]


def test_nothing_of_this_machine_is_in_the_file(written: Written) -> None:
    _, _, model = written
    assert str(Path(__file__).parents[2]).encode() not in model.SerializeToString()


@pytest.mark.parametrize("level", EXACT)
def test_widths_compute_what_the_graph_computes(written: Written, level: str) -> None:
    """At other batches than that of the example, and beyond all ranges."""
    graph, _ = widths()
    _, summary, _ = written
    batches = [
        cast(Inputs, tuple(3 * torch.randn(count, *shape) for shape in ((3, 6, 6), (32,))))
        for count in (1, 2, 5)
    ]
    found = difference(graph, session(summary.path, level), batches)
    assert found.steps <= 1, found
    assert found.different <= found.compared // 20, found
    assert found.relative < 1e-6, found


def test_every_tensor_follows_from_the_same_integers(written: Written) -> None:
    graph, example = widths()
    run = followed(graph, written[1].path, LEVELS[0], example)
    assert max(run.steps.values()) <= 1, run.steps
    assert run.different <= run.compared / 1000


# ---------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------

INTEGER = {family: rule for family, rule in RULES.items() if rule.integers and cases_of(rule)}
FLOAT = {family: rule for family, rule in RULES.items() if not rule.integers and cases_of(rule)}


RESIZED = 2 * 255 * 2.0 ** -(POSITION_BITS + 1)
"""Of a step: how far a resized value may be from ONNX's, which does not round positions. In each of
two directions half a unit of the position, times the largest difference of two pixels. The part of
the values that are rounded to another integer is no larger.
"""


def check_cases(
    picked: Sequence[Any], scheme: str, path: Path, activations: Activations, kind: Any = Family
) -> None:
    """All outputs within one step of the graph's, and nearly all equal, both ways to run it."""
    torch.manual_seed(0)
    model = randomize_batch_norms(kind(tuple(picked))).eval()
    shapes = [shape for _, case in picked for shape in case.shapes]
    example = tuple(torch.randn(shape) for shape in shapes)
    graph = convert(model, example, scheme).graph
    summary = cq.save_onnx(graph, path, activations=activations)
    assert summary.size_bytes == path.stat().st_size
    batches = [example, *stress(shapes)] if kind is Family else [example]
    if scheme.startswith("dyn"):
        del batches[5:]  # of 1e30 and more: sums in float32 that cancel or overflow
    for level in EXACT:
        if scheme.startswith("a16"):
            # A step is 2**-16 of a range: sums in float32 in another order come near it, and ops in
            # a row add up.
            for batch in batches:
                run = followed(graph, path, level, batch)
                assert max(run.steps.values()) <= 1, (level, run.steps)
                if any(len(value.unique()) > 1 for value in batch):  # not one tie, many times
                    assert run.different <= run.compared / 50, (level, run.different)
            continue
        found = difference(graph, session(path, level, qdqisint8allowed="1"), batches)
        assert found.steps <= 1, (level, found)
        resized = any(rule.family == "upsample_bilinear2d" for rule, _ in picked)
        most = RESIZED if resized else 1 / 1000
        assert found.different <= most * found.compared, (level, found)
        # Of what is rounded at run time a whole sum is in float, at most 2**-24 for each term.
        assert found.relative <= (2e-5 if scheme.startswith("dyn") else 4e-6), (level, found)


QUICK = (*("conv", "linear", "matmul", "add", "max_pool2d", "mean", "cat", "pad", "clamp", "gelu"),)


def test_a_case_of_many_families(tmp_path: Path) -> None:
    picked = [(RULES[family], RULES[family].cases[0]) for family in QUICK]
    check_cases(picked, "a8w8", tmp_path / "families.onnx", "uint8")


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-per_tensor", "a8w4", "a4w4", "a16w8"])
@pytest.mark.parametrize("family", INTEGER)
def test_every_case(family: str, scheme: str, activations: Activations, tmp_path: Path) -> None:
    picked = [(RULES[family], case) for case in cases_of(RULES[family])]
    check_cases(picked, scheme, tmp_path / "family.onnx", activations)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dyn8w8", "dyn8w4"])
@pytest.mark.parametrize("family", ["conv", "linear"])
def test_every_case_at_run_time(family: str, scheme: str, tmp_path: Path) -> None:
    picked = [(RULES[family], case) for case in cases_of(RULES[family])]
    check_cases(picked, scheme, tmp_path / "family.onnx", "uint8")


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOAT)
def test_every_case_in_float(family: str, tmp_path: Path) -> None:
    picked = [(RULES[family], case) for case in cases_of(RULES[family])]
    check_cases(picked, "a8w8", tmp_path / "family.onnx", "uint8", FloatFamily)


@pytest.mark.parametrize("activations", slow_but(["uint8"], ["uint8", "int8"]))
@pytest.mark.parametrize(
    ("scheme", "named"),
    slow_but([("a8w8", True)], [("a8w8", True), ("a8w4", False), ("a16w8", False)]),
)
def test_convolutions_that_saturate_are_named(
    activations: Activations, scheme: str, named: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    example = (torch.randn(2, 32, 8, 8),)
    model = nn.Sequential(nn.Conv2d(32, 16, 3), nn.Flatten(1), nn.Linear(16 * 36, 4))
    graph = convert(model, example, scheme).graph
    summary = cq.save_onnx(graph, tmp_path / "net.onnx", activations=activations)
    notes = [note for note in str(summary).splitlines() if "saturate in ONNX Runtime" in note]
    named = named and activations == "uint8"
    assert len(notes) == named
    assert all("1 convolutions" in note and note.endswith("conv2d") for note in notes)
    for level in LEVELS:
        run = followed(graph, summary.path, level, example, qdqisint8allowed="1")
        wrong = named and level == LEVELS[1] and saturates()
        assert (max(run.steps.values()) > 1) is wrong, (level, run.steps)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def layer(**options: Any) -> tuple[GraphModule, Inputs]:
    torch.manual_seed(0)
    example = (torch.randn(2, 3),)
    return convert(nn.Linear(3, 2), example, **options).graph, example


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    graph, _ = layer()
    with pytest.raises(cq.InputError, match=r"pip install 'custom-quantizer\[onnx\]'") as caught:
        cq.save_onnx(graph, tmp_path / "net.onnx")
    assert package in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activations", slow_but(["uint8"], ["uint8", "int8"]))
def test_ranges_narrower_than_the_type_saturate(activations: Activations, tmp_path: Path) -> None:
    graph, _ = layer(quantizer="a4w4")
    summary = cq.save_onnx(graph, tmp_path / "net.onnx", activations=activations)
    far = [(size * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]),) for size in (50.0, -50.0)]
    assert difference(graph, session(summary.path, LEVELS[0]), far).different == 0


@pytest.mark.slow
def test_integer_borders_are_float_in_the_file(tmp_path: Path) -> None:
    graph, example = layer(quantizer=cq.IntegerQuantizer().set_global("a8w8").set_io(integer=True))
    summary = cq.save_onnx(graph, tmp_path / "net.onnx")
    assert "inputs and outputs are float32, also those" in str(summary)
    assert difference(graph, session(summary.path), [example]).different == 0
    assert "inputs and outputs are" not in str(cq.save_onnx(layer()[0], tmp_path / "net.onnx"))


def test_what_onnx_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    graph, _ = layer()
    with pytest.raises(cq.InputError, match="uint8 or int8, not 'int4'"):
        cq.save_onnx(graph, path, activations=cast(Any, "int4"))
    with pytest.raises(cq.InputError, match=r"no[/\\]net\.onnx"):
        cq.save_onnx(graph, tmp_path / "no" / "net.onnx")
    for scheme in ("a8w8", "a8w8-per_tensor"):
        changed, _ = layer(quantizer=scheme)
        for node in changed.graph.nodes:
            if node.target is DEQUANTIZE_PER_CHANNEL:
                constant_of(changed, node.args[2]).add_(1)
            elif node.target is DEQUANTIZE_PER_TENSOR and node.args[5] is torch.int32:
                node.update_arg(2, 1)
        with pytest.raises(cq.ConversionError, match="zero points other than 0"):
            cq.save_onnx(changed, path)
    with pytest.raises(cq.ConversionError, match="convert"):
        cq.save_onnx(torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),)).module(), path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("constant", [3, "k"])
def test_outputs_that_no_input_changes_are_named(constant: int | str, tmp_path: Path) -> None:
    net = Function(
        lambda s, x: (s.layer(x), s.k if constant == "k" else constant),
        layer=nn.Linear(3, 2),
        k=nn.Parameter(torch.ones(2)),
    )
    graph = convert(net, (torch.randn(2, 3),)).graph
    with pytest.raises(cq.ConversionError, match=rf"^output 1 of the model is {constant}, whatev"):
        cq.save_onnx(graph, tmp_path / "net.onnx")


class Counting(nn.Module):
    """Remembers a mean, as an ONNX graph cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.mean(0))
        return cast(Tensor, self.linear(x)) + self.seen


def test_state_is_refused_by_name(tmp_path: Path) -> None:
    graph = convert(Counting(), (torch.randn(2, 3),)).graph
    with pytest.raises(cq.ConversionError, match=r"writes into \w*seen\w*.*has no state"):
        cq.save_onnx(graph, tmp_path / "net.onnx")


def test_a_parameter_that_is_used_in_float_too_gives_its_name_to_the_integers(
    tmp_path: Path,
) -> None:
    table = nn.Embedding(11, 8)
    head = nn.Linear(8, 11, bias=False)
    head.weight = table.weight
    net = Function(lambda s, i: s.head(torch.tanh(s.table(i))), table=table, head=head)
    graph = convert(net, (torch.randint(0, 11, (1, 5)),)).graph
    path = tmp_path / "net.onnx"
    cq.save_onnx(graph, path)
    kept = {value.name: value.data_type for value in onnx.load(path).graph.initializer}
    assert kept["head.weight"] == onnx.TensorProto.INT8
    assert kept["head.weight_1"] == onnx.TensorProto.FLOAT


def test_an_op_without_a_translation_is_named(tmp_path: Path) -> None:
    net = Function(lambda self, x: torch.special.bessel_j0(self.head(x)), head=nn.Linear(3, 2))
    graph = convert(net, (torch.randn(2, 3),)).graph
    with pytest.raises(cq.ConversionError, match=r"^bessel_j0: torch\.onnx cannot translate"):
        cq.save_onnx(graph, tmp_path / "net.onnx")


# ---------------------------------------------------------------------------------------------
# Whole networks
# ---------------------------------------------------------------------------------------------

NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "vit_b_16")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4", "a16w8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_of_a_network(name: str, scheme: str, tmp_path: Path) -> None:
    """Within one step of what the graph makes of the same integers, with another batch."""
    size = 224 if name.startswith("vit") else 64
    torch.manual_seed(0)
    example = (torch.randn(2, 3, size, size),)
    dynamic = ({0: torch.export.Dim.AUTO},)
    graph = convert(torchvision_model(name), example, scheme, dynamic_shapes=dynamic).graph
    path = tmp_path / "net.onnx"
    cq.save_onnx(graph, path, activations="int8" if saturates() else "uint8")
    batch = (torch.randn(3, 3, size, size),)
    for level in LEVELS:
        run = followed(graph, path, level, batch, qdqisint8allowed="1")
        assert max(run.steps.values()) <= 1, (level, run.steps)
        assert run.different <= run.compared / 1000, (level, run.different, run.compared)
