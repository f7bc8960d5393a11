"""Integer inputs and outputs: the program takes and returns what float32 was quantized to."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any, cast

import executorch.export
import pytest
import torch
from click.testing import CliRunner
from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
    XnnpackPartitioner as UpstreamPartitioner,
)
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.quantize_io_pass import get_config_method_name
from executorch.export import ExportRecipe
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.analysis.device_outputs import check_device_outputs
from custom_quantizer.app.cli import cli
from custom_quantizer.backends.xnnpack.program import StoredProgram
from custom_quantizer.core.arithmetic import round_to_float32
from custom_quantizer.core.borders import _MARKS, mark
from custom_quantizer.reference.device_manifest import read_manifest


class Net(nn.Module):
    """An image that three ops read, and indices; two heads, the first of them returned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.mix = nn.Conv2d(3, 4, 1)
        self.table = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 6)

    def forward(self, image: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x = torch.relu(self.stem(image)) + self.mix(image)
        x = x + image.mean((1, 2, 3), keepdim=True)
        scores = self.head(x.mean((2, 3)))
        return scores, x + self.table(index)[:, :, None, None], scores, None


INDEX = torch.tensor([1, 3])


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "a8w8": ("a8w8", True, ("int8", "int8")),
    "a8w8-uint8": ("a8w8", "uint8", ("uint8", "uint8")),
    "a8w8-per_tensor-symmetric": ("a8w8-per_tensor-symmetric", True, ("int8", "int8")),
    "a8w4": ("a8w4", True, ("int8", "int8")),
    "a4w4": ("a4w4", True, ("int8", "int8")),
    "a4w4-uint8": ("a4w4", "uint8", ("uint8", "uint8")),
    "a16w8": ("a16w8", True, ("int16", "int16")),
    "dyn8w8": ("dyn8w8", True, ("int8", "int8")),
}


@cache
def graph(kind: str) -> GraphModule:
    scheme, integer, _ = KINDS[kind]
    torch.manual_seed(0)
    quantizer = cq.IntegerQuantizer().set_global(scheme).set_io(integer=integer)
    return convert(Net(), (images(), INDEX), quantizer).graph


def plain(model: GraphModule) -> GraphModule:
    """The same graph with float32 at its border."""
    twin = GraphModule(model, model.graph)
    twin.meta = {key: value for key, value in model.meta.items() if key != _MARKS}
    return twin


@cache
def lowered(kind: str) -> cq.LoweredProgram:
    return cq.lower(graph(kind), (images(), INDEX))


@cache
def float_program(kind: str) -> cq.LoweredProgram:
    return cq.lower(plain(graph(kind)), (images(), INDEX))


@cache
def small(integer: str | bool, scheme: str = "a8w8") -> tuple[GraphModule, cq.LoweredProgram]:
    """A network without an op outside the delegate, and its program."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    quantizer = cq.IntegerQuantizer().set_global(scheme).set_io(integer=integer)
    converted = convert(model, (torch.randn(2, 4),), quantizer).graph
    return converted, cq.lower(converted, (torch.zeros(2, 4),))


def by_lower(kind: str) -> bytes:
    return lowered(kind).buffer


def by_standard_call(kind: str) -> bytes:
    exported = torch.export.export(graph(kind), (images(), INDEX))
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[cq.XnnpackPartitioner()],
        constant_methods=cq.io_constants(graph(kind)),
    )
    cq.check(edge, graph(kind), (images(), INDEX))
    return bytes(edge.to_executorch().buffer)


def by_upstreams_partitioner(kind: str) -> bytes:
    edge = to_edge_transform_and_lower(
        cq.export_converted(graph(kind), (images(), INDEX)),
        partitioner=[UpstreamPartitioner()],
        constant_methods=cq.io_constants(graph(kind)),
    )
    return bytes(edge.to_executorch().buffer)


def by_recipe(kind: str) -> bytes:
    recipe = ExportRecipe.get_recipe(cq.IntegerRecipe.CUSTOM, scheme=KINDS[kind][0])
    session = executorch.export.export(graph(kind), [(images(), INDEX)], recipe)
    assert cq.session_program(session).borders == lowered(kind).borders
    return bytes(session.get_pte_buffer())


QUICK = [(by_lower, "a8w8"), (by_lower, "a8w8-uint8")]
ROUTES = [by_lower, by_standard_call, by_upstreams_partitioner, by_recipe]
CASES = [
    pytest.param(
        route,
        kind,
        id=f"{route.__name__}-{kind}",
        marks=[] if (route, kind) in QUICK else [pytest.mark.slow],
    )
    for route in ROUTES
    for kind in KINDS
]


@pytest.mark.parametrize(("route", "kind"), CASES)
def test_the_program_is_the_float_one_without_its_ends(route: Any, kind: str) -> None:
    """Integers in and out are those that the float program quantizes to and dequantizes from."""
    program = StoredProgram(route(kind), "the program", isolated=False)
    kind_in, kind_out = KINDS[kind][2]
    assert [value.dtype for value in program.contents.inputs] == [kind_in, "int64"]
    assert [value.dtype for value in program.contents.outputs[:3]] == [kind_out] * 3
    reference = cq.integer_reference(graph(kind))
    border = reference.borders.inputs[0]
    assert border is not None
    for seed in (0, 1):
        image = images(seed)
        stored = border.integers(image, reference.arithmetic.quantize)
        got = program.run(stored, INDEX)
        want = float_program(kind).run(image, INDEX)
        assert str(got[0].dtype) == f"torch.{kind_out}"
        for mine, theirs in zip(program.dequantized(got)[:3], want[:3], strict=True):
            assert torch.equal(mine, theirs)
        # float32 is quantized by whoever runs the program, to the same integers.
        for mine, theirs in zip(program.run(image, INDEX)[:3], got[:3], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "kind",
    ["a8w8", "a8w8-uint8", *(pytest.param(k, marks=pytest.mark.slow) for k in ("a8w4", "a4w4"))],
)
def test_the_reference_takes_and_returns_the_same_integers(kind: str) -> None:
    reference = cq.integer_reference(graph(kind))
    border = reference.borders.inputs[0]
    assert border is not None
    stored = border.integers(images(3), reference.arithmetic.quantize)
    want = reference(stored, INDEX)
    for given in (stored, images(3)):
        for mine, theirs in zip(lowered(kind).run(given, INDEX)[:3], want[:3], strict=True):
            assert mine.dtype == theirs.dtype == border.dtype
            assert torch.equal(mine, theirs)
    _, integers = reference.with_integers(stored, INDEX)
    assert torch.equal(integers["image"], stored.to(torch.int32) - border.offset)


def test_nothing_is_quantized_at_the_border() -> None:
    """One delegate, which is handed int8 and hands back int8; only the table stays outside it."""
    program = lowered("a8w8")
    (delegate,) = program.contents.delegates
    borders = [delegate.tensors[i].dtype for i in (*delegate.inputs, *delegate.outputs)]
    # The image, two outputs, and the table's rows, which a kernel outside looks up as int8.
    assert borders == ["int8"] * 4
    assert program.report.outside == float_program("a8w8").report.outside
    converts = [op for op in delegate.ops if op.kind == "convert"]
    (other,) = float_program("a8w8").contents.delegates
    assert len([op for op in other.ops if op.kind == "convert"]) == len(converts) + 3


def test_uint8_takes_two_calls_outside_the_delegate() -> None:
    """Of an input and of each of two outputs; one that is returned twice is converted twice."""
    added = list(lowered("a8w8-uint8").report.outside)
    for kernel in float_program("a8w8-uint8").report.outside:
        added.remove(kernel)
    flips = [kernel for kernel in added if kernel.startswith("aten::bitwise_xor")]
    casts = [kernel for kernel in added if "_to_dim_order_copy" in kernel]
    assert len(flips) == len(casts) == 4
    assert len(added) == 8


# ---------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------


def planned(quantizer: cq.IntegerQuantizer, model: nn.Module | None = None) -> cq.Plan:
    exported = torch.export.export((model or Net()).eval(), (images(), INDEX))
    return quantizer.plan(exported)


def ours(scheme: str = "a8w8") -> cq.IntegerQuantizer:
    return cq.IntegerQuantizer().set_global(scheme)


@pytest.mark.parametrize(
    ("options", "inputs", "outputs"),
    [
        ({"integer": True}, {0: "int8"}, {0: "int8", 1: "int8", 2: "int8"}),
        ({"inputs": {"image": None}, "integer": True}, {0: "int8"}, {}),
        ({"inputs": {0: "a16"}, "integer": True}, {0: "int16"}, {}),
        ({"inputs": "a8", "integer": "uint8"}, {0: "uint8"}, {}),
        ({"outputs": {1: "a16", 0: None}, "integer": True}, {}, {0: "int8", 1: "int16"}),
        ({"outputs": "a12", "integer": "int16"}, {}, {0: "int16", 1: "int16", 2: "int16"}),
        ({"inputs": "a8", "integer": False}, {}, {}),
        ({"inputs": "a8"}, {}, {}),
    ],
)
def test_which_inputs_and_outputs_are_integers(
    options: dict[str, Any], inputs: dict[int, str], outputs: dict[int, str]
) -> None:
    quantizer = ours().set_io(**options)
    plan = planned(quantizer)
    assert (plan.integer_inputs, plan.integer_outputs) == (inputs, outputs)
    again = cq.IntegerQuantizer.from_config(quantizer.to_config())
    assert again.to_config() == quantizer.to_config()
    assert planned(again) == plan
    recorded = json.loads(plan.to_json())
    assert recorded["integer_inputs"] == {str(i): kind for i, kind in inputs.items()}
    for i, kind in inputs.items():
        assert f"the program takes input {i} as {kind}" in str(plan)


def test_false_takes_back_what_was_asked() -> None:
    quantizer = ours().set_io(integer=True).set_io(inputs={"image": None}, integer=False)
    assert planned(quantizer).integer_inputs == {}
    assert set(planned(quantizer).integer_outputs) == {0, 1, 2}
    assert planned(quantizer.set_io(integer=False)).integer_inputs == {}


class Readers(nn.Module):
    """An input that ops of several formats read, one of them behind a move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x.reshape(4, 2, 4))


@pytest.mark.parametrize(
    ("first", "second", "bits", "zero_point"),
    [
        ("a4w8", "a8w8", 8, None),
        ("a8w8", "a4w8", 8, None),
        ("a8w8-symmetric", "a8w8", 8, None),
        ("a4w8-symmetric", None, 4, 0),
        ("a4w4", "a12w8", 12, 0),
        (None, "dyn8w8", 8, None),
    ],
)
def test_an_input_without_a_format_gets_the_widest_that_its_readers_want(
    first: str | None, second: str | None, bits: int, zero_point: int | None
) -> None:
    x = torch.rand(2, 4, 4) + 0.5
    quantizer = cq.IntegerQuantizer().set_module_name("first", first)
    quantizer.set_module_name("second", second).set_io(inputs={"x": None}, integer=True)
    converted = convert(Readers(), (x,), quantizer).graph
    reference = cq.integer_reference(converted)
    (border,) = reference.borders.inputs
    assert border is not None
    assert border.qparams.bits == bits
    assert (border.zero_point == 0) == (zero_point == 0)
    assert border.dtype == (torch.int16 if bits > 8 else torch.int8)


def test_outputs_of_float_ops_are_quantized() -> None:
    class Float(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return torch.softmax(x, -1), torch.cumsum(x, -1)

    torch.manual_seed(5)
    x = torch.rand(2, 8) * 2 - 1
    converted = convert(
        Float(), (x,), ours().set_io(outputs={0: None, 1: None}, integer=True)
    ).graph
    program = cq.lower(converted, (x,))
    assert [value.dtype for value in program.contents.outputs] == ["int8", "int8"]
    for mine, theirs in zip(program.dequantized(program.run(x)), converted(x), strict=True):
        assert float((mine - theirs).abs().max()) <= float(theirs.abs().max()) / 127


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"inputs": {"index": None}, "integer": True},
            r"set_io: index is torch.int64; only float32 inputs and outputs become integers",
        ),
        (
            {"inputs": {"image": "a16"}, "integer": "uint8"},
            r"image has 16 bits, so it cannot be uint8; .*set_io\(inputs=\{'image': 'a8'\}\)",
        ),
        (
            {"outputs": {0: None}, "integer": "int16"},
            r"linear \(head\) has 8 bits, so it cannot be int16; .*outputs=\{'0': 'a16'\}",
        ),
        ({"outputs": {7: None}, "integer": True}, r"the model has no output '7'; it has 0, 1, 2"),
        ({"inputs": {"x": None}, "integer": True}, r"no input 'x'; it has image, index"),
    ],
)
def test_what_cannot_be_integers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cq.ConfigError, match=message):
        planned(ours().set_io(**options))


@pytest.mark.parametrize("integer", ["int4", "float", 1])
def test_other_words_than_dtypes_are_refused(integer: Any) -> None:
    with pytest.raises(cq.ConfigError, match="integer is true, false or the name of a dtype"):
        ours().set_io(integer=integer)


def test_a_file_says_which(tmp_path: Path) -> None:
    file = tmp_path / "net.yaml"
    file.write_text(
        "version: 1\nglobal: a8w8\ninteger_inputs: {image: uint8, index: true}\n"
        "integer_outputs: true\n"
    )
    with pytest.raises(cq.ConfigError, match=r"net.yaml:3: index is torch.int64"):
        planned(cq.IntegerQuantizer.from_config(file))
    file.write_text("version: 1\ninteger_inputs: 8\ninteger_outputs: {0: yes, 1: int32}\n")
    with pytest.raises(cq.ConfigError) as info:
        cq.IntegerQuantizer.from_config(file)
    assert "net.yaml:2:17: integer_inputs: integer is true, false" in str(info.value)
    assert "(int8, uint8, int16), not 'int32'" in str(info.value)


# ---------------------------------------------------------------------------------------------
# What is given
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes", ["program", "reference", "stored", "lower"])
def test_what_is_not_integers_of_the_border_is_refused(takes: str) -> None:
    model, program = small(True, "a4w4")
    call: Any = {
        "program": program.run,
        "reference": cq.integer_reference(model),
        "stored": StoredProgram(program.buffer, "the program", isolated=False).run,
        "lower": lambda *given: cq.lower(model, given),
    }[takes]
    zeros = torch.zeros(2, 4, dtype=torch.int8)
    for given, message in (
        (zeros.to(torch.uint8), r"must be torch.int8, or torch.float32 .*, got torch.uint8"),
        (zeros.double(), r"input 0.* must be torch.int8, or torch.float32"),
        (zeros + 8, r"input 0.* takes the integers -8 to 7, got 8 to 8"),
        (zeros - 9, r"takes the integers -8 to 7, got -9 to -9"),
        (zeros[:, :2], r"input 0 must have shape"),
        (3, "must be a tensor, got int"),
    ):
        with pytest.raises(cq.InputError, match=message):
            call(given)


def test_nothing_marked_is_left_in_float_silently() -> None:
    """A mark on what is not quantized, as a graph that somebody else edited may have it."""
    model = plain(graph("a8w8"))
    mark(model, {1: "int8"}, {})
    with pytest.raises(cq.ConversionError, match=r"input 1 \(index\) cannot be integers"):
        cq.lower(model, (images(), INDEX))
    model = plain(graph("a8w8"))
    mark(model, {}, {3: "int8"})
    with pytest.raises(cq.ConversionError, match=r"output 3 \(None\) cannot be integers"):
        cq.integer_reference(model)


# ---------------------------------------------------------------------------------------------
# Other graphs
# ---------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """Returns its input, a view of it, and a result; takes a keyword."""

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
        return {"x": x, "flat": x.flatten(1), "sum": x + y, "again": x}


@pytest.mark.parametrize("integer", [True, "uint8"])
def test_inputs_that_are_returned_and_inputs_by_keyword(integer: Any) -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    captured = torch.export.export(Passing().eval(), (x,), {"y": y}).module()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(captured, ours().set_io(integer=integer))
    prepared(x, y=y)
    converted = cast(GraphModule, convert_pt2e(prepared))
    program, reference = cq.lower(converted, (x, y)), cq.integer_reference(converted)
    border, other = reference.borders.inputs
    assert border is not None
    assert other is not None
    stored = border.integers(x, reference.arithmetic.quantize)
    got, want = program.run(stored, y=y), reference(stored, y=y)
    assert set(got) == {"x", "flat", "sum", "again"}
    for name, value in got.items():
        assert value.dtype == border.dtype
        assert torch.equal(value, want[name])
    assert torch.equal(got["x"], stored)
    assert torch.equal(got["again"], stored)
    assert torch.equal(got["flat"], stored.flatten(1))


@pytest.mark.slow
def test_a_dynamic_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    x = images()
    quantizer = ours().set_io(integer=True)
    batch = Dim("batch", min=1, max=5)
    converted = convert(model, (x,), quantizer, dynamic_shapes=({0: batch},)).graph
    program, reference = cq.lower(converted, (x,)), cq.integer_reference(converted)
    assert (program.report.delegates, program.report.outside) == (1, ())
    for size in (5, 1, 3):
        given = torch.randint(-128, 128, (size, 3, 6, 6), dtype=torch.int8)
        assert torch.equal(program.run(given), reference(given))


@pytest.mark.slow
def test_several_methods_say_what_each_of_them_takes() -> None:
    torch.manual_seed(1)
    encode = convert(nn.Linear(4, 3), (torch.randn(2, 4),), ours().set_io(integer=True)).graph
    decode = convert(
        nn.Linear(3, 4), (torch.randn(2, 3),), ours().set_io(inputs="a8", integer="uint8")
    ).graph
    examples: dict[str, Any] = {"encode": (torch.randn(2, 4),), "decode": (torch.randn(2, 3),)}
    graphs = {"encode": encode, "decode": decode}
    edge = to_edge_transform_and_lower(
        {name: torch.export.export(graphs[name], examples[name]) for name in graphs},
        partitioner=[cq.XnnpackPartitioner()],
        constant_methods={
            **cq.io_constants(encode, method="encode"),
            **cq.io_constants(decode, method="decode"),
        },
    )
    for name in graphs:
        cq.check(edge, graphs[name], examples[name], method=name)
    contents = cq.read_program(bytes(edge.to_executorch().buffer))
    assert {method.name for method in contents.methods} == {"encode", "decode"}
    dtypes = {m.name: (m.inputs[0].dtype, m.outputs[0].dtype) for m in contents.methods}
    assert dtypes == {"encode": ("int8", "int8"), "decode": ("uint8", "float32")}
    assert contents.constants["decode_input0_dtype"] == 0
    assert contents.constants["encode_output0_dtype"] == 1


# ---------------------------------------------------------------------------------------------
# What the program says
# ---------------------------------------------------------------------------------------------


def test_a_byte_stands_for_what_it_is_said_to() -> None:
    """Whatever calibration saw: here no image that is black or white."""
    torch.manual_seed(0)
    image = torch.randint(40, 200, (2, 3, 6, 6), dtype=torch.uint8)
    captured = torch.export.export(nn.Conv2d(3, 4, 3).eval(), (image / 255,)).module()
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_io(integer="uint8")
    prepared = prepare_pt2e(captured, quantizer)
    scale = round_to_float32(1 / 255)
    cq.set_ranges(prepared, {"input_1": cq.QParams(scale, -128, -128, 127)})
    prepared(image / 255)
    program = cq.lower(convert_pt2e(prepared), (image / 255,))
    border = program.borders.inputs[0]
    assert border is not None
    assert border.meaning == "uint8 in [0, 255], scale 0.00392156886, zero point 0"
    assert torch.equal(program.run(image), program.run(image / 255))


def test_any_runtime_can_ask_the_program_for_scale_and_zero_point() -> None:
    """Under the names of ExecuTorch's own pass for integer inputs (1.5.1)."""
    program = Runtime.get().load_program(lowered("a8w8-uint8").buffer)
    found = 0
    for border in lowered("a8w8-uint8").borders:
        wanted = {
            "scale": border.scale,
            "zp": border.zero_point,
            "quant_min": 0,
            "quant_max": 255,
            "dtype": 0,
        }
        for key, value in wanted.items():
            name = get_config_method_name("forward", border.role, border.index, key)
            method = program.load_method(name)
            assert method is not None
            assert method.execute([]) == [value]
            found += 1
    assert found == 20
    assert lowered("a8w8-uint8").contents.constants.keys() == {
        get_config_method_name("forward", border.role, border.index, key)
        for border in lowered("a8w8-uint8").borders
        for key in ("scale", "zp", "quant_min", "quant_max", "dtype")
    }


def test_reports_say_what_the_integers_stand_for(tmp_path: Path) -> None:
    program = lowered("a8w8-uint8")
    border = program.borders.inputs[0]
    assert border is not None
    report = cq.inspect(graph("a8w8-uint8"), program)
    of_file = cq.inspect_program(program.save(tmp_path / "net.pte"))
    for found in (report, of_file):
        image = found.inputs[0]
        assert image.border
        assert (image.dtype, image.scales, image.zero_point) == (
            "uint8",
            (border.scale,),
            border.zero_point,
        )
        assert not found.inputs[1].border
        assert [record.border for record in found.outputs[:3]] == [True] * 3
        text = str(found)
        assert "integer input" in text
        assert f"zero point {border.zero_point}, integers in [0, 255]" in " ".join(text.split())
        assert "integer input" in found.to_html()
        assert type(found).from_json(found.to_json()) == found
    assert not cq.inspect(plain(graph("a8w8-uint8"))).inputs[0].border


def test_a_saved_graph_keeps_its_borders(tmp_path: Path) -> None:
    model, program = small("uint8")
    path = cq.save_graph(model, (torch.zeros(2, 4),), tmp_path / "net.graph.safetensors")
    loaded, example = cq.load_graph(path)
    assert cq.lower(loaded, example).buffer == program.buffer


def test_verify_and_evaluate_compare_real_numbers() -> None:
    program, model = lowered("a8w8-uint8"), graph("a8w8-uint8")
    border = program.borders.inputs[0]
    assert border is not None
    stored = border.integers(images(5), cq.integer_reference(model).arithmetic.quantize)
    for given in (images(5), stored):
        found = cq.verify(model, program, (given, INDEX))
        assert found.constants_equal
        assert all(output.mismatches == 0 for output in found.outputs[:3])
        assert found.outputs[0].max_abs == 0
        assert all(output.graph_max_lsb in (0, 1) for output in found.outputs[:1])
    torch.manual_seed(0)
    scores = cq.evaluate(
        {
            "float": lambda image, index: Net().eval()(image, index)[0],
            "graph": model,
            "reference": cq.integer_reference(model),
            "program": program,
        },
        [((images(seed), INDEX), torch.tensor([0, 1])) for seed in range(3)],
        metrics=lambda outputs, labels: (outputs[0] if isinstance(outputs, tuple) else outputs).sum(
            1
        ),
    )
    first, *others = (score.metrics[0].value for score in scores.scores[1:])
    assert others == pytest.approx([first, first])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["output0_zp", "input0_quant_min"])
def test_a_program_that_says_something_else_of_its_integers_is_noticed(key: str) -> None:
    model, program = small(True)
    constants = cq.io_constants(model)
    assert program.contents.constants == constants
    edge = to_edge_transform_and_lower(
        torch.export.export(model, (torch.zeros(2, 4),)),
        partitioner=[cq.XnnpackPartitioner()],
        constant_methods={**constants, f"forward_{key}": constants[f"forward_{key}"] + 1},
    )
    with pytest.raises(cq.VerificationError, match=f"{key.split('0')[0]} 0: the program"):
        cq.check(edge, model, (torch.zeros(2, 4),))


def test_integers_off_by_one_are_noticed() -> None:
    """Bytes for signed ones: a program that flips no bit, said to be one that does."""
    model, _ = small("uint8")
    with pytest.raises(cq.CustomQuantizerError):
        cq.check(small(True)[1].buffer, model, (torch.zeros(2, 4),))


def check_bundle(data: bytes, samples: int) -> None:
    """ExecuTorch's own check of each sample, without any tolerance; it raises."""
    bundle = portable_lib._load_bundled_program_from_buffer(data)
    for n in range(samples):
        bundle.verify_result_with_bundled_expected_output("forward", n, 0.0, 0.0)


@pytest.mark.parametrize(
    ("integer", "scheme", "dtype"),
    [(True, "a8w8", "int8"), ("uint8", "a8w8", "uint8"), (True, "a16w8", "int16")],
)
def test_a_device_test_holds_integers(
    integer: Any, scheme: str, dtype: str, tmp_path: Path
) -> None:
    model, program = small(integer, scheme)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(4))
    kit = program.save_device_test(tmp_path / "kit", [x, x + 1])
    manifest = read_manifest(kit)
    reference = cq.integer_reference(model)
    for sample, given in zip(manifest.samples, (x, x + 1), strict=True):
        for (entry,), folder in ((sample.inputs, "inputs"), (sample.outputs, "expected")):
            assert entry.dtype == dtype
            data = bytearray((kit / folder / entry.file).read_bytes())
            stored = torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(entry.shape)
            border = reference.borders.inputs[0]
            assert border is not None
            want = border.integers(given, reference.arithmetic.quantize)
            assert torch.equal(stored, want if folder == "inputs" else reference(want))
    assert manifest.bundled is not None
    check_bundle((kit / manifest.bundled.file).read_bytes(), samples=2)
    # What a device computed is read back: here what is expected, and then one unit more.
    shutil.copytree(kit / "expected", kit / "outputs")
    program.save(tmp_path / "net.pte")
    assert check_device_outputs(tmp_path / "net.pte", kit).bit_exact
    path = kit / "outputs" / "1_0.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    (found,) = check_device_outputs(tmp_path / "net.pte", kit).outputs
    assert (found.mismatches, found.max_units) == (1, 1)


@pytest.mark.parametrize("integer", slow_but(["uint8"], [True, "uint8"]))
def test_a_device_test_of_every_op_takes_integers(integer: Any, tmp_path: Path) -> None:
    model, program = small(integer)
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(4))
    kit = program.save_device_test(tmp_path / "kit", [x], every_op=True)
    manifest = read_manifest(kit)
    (entry,) = manifest.samples[0].inputs
    assert entry.dtype == KINDS["a8w8" if integer is True else "a8w8-uint8"][2][0]
    assert [output.node for output in manifest.outputs] == ["relu", "linear_1"]
    assert manifest.bundled is not None
    check_bundle((kit / manifest.bundled.file).read_bytes(), samples=1)
    _, integers = cq.integer_reference(model).with_integers(x)
    for output, found in zip(manifest.outputs, manifest.samples[0].outputs, strict=True):
        want = integers[output.node]
        data = bytearray((kit / "expected" / found.file).read_bytes())
        real = torch.frombuffer(data, dtype=torch.float32).reshape(found.shape)
        assert output.scale is not None
        assert torch.equal(real.div(output.scale).round().diff(), want.float().diff())


@pytest.mark.parametrize(("integer", "offset"), [(True, 0), ("uint8", 128)])
def test_the_integer_bundle_takes_and_returns_integers(
    integer: Any, offset: int, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    converted = convert(model, (images(),), ours().set_io(integer=integer)).graph
    cq.save_integers(converted, tmp_path / "net")
    bundle = cq.load_integers(tmp_path / "net")
    reference = cq.integer_reference(converted, mode="fixed_point")
    (border,) = reference.borders.inputs
    assert border is not None
    stored = border.integers(images(9), reference.arithmetic.quantize)
    got = bundle(stored.numpy())
    assert torch.equal(torch.from_numpy(got), reference(stored))
    assert bundle.description["inputs"][0]["dtype"] == str(border.dtype).removeprefix("torch.")
    assert got.dtype == bundle.description["outputs"][0]["dtype"]
    with pytest.raises(cq.InputError, match=r"input .* is of dtype u?int8, got float32"):
        bundle(images().numpy())


@pytest.mark.parametrize("integer", [True, "uint8"])
def test_c_code_takes_what_the_network_computes_with(integer: Any, tmp_path: Path) -> None:
    """Its inputs are int8 whatever the border is; test vectors are given as the border has them."""
    model, _ = small(integer)
    reference = cq.integer_reference(model)
    (border,) = reference.borders.inputs
    assert border is not None
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(4))
    stored = border.integers(x, reference.arithmetic.quantize)
    cq.save_c(model, tmp_path / "of_integers", inputs=[stored.numpy()])
    cq.save_c(plain(model), tmp_path / "of_float", inputs=[x.numpy()])
    for name in ("net_test.c", "net_constants.c"):
        code = [(tmp_path / folder / name).read_text() for folder in ("of_integers", "of_float")]
        assert code[0] == code[1]
    with pytest.raises(cq.InputError, match=r"is of dtype u?int8, got float32"):
        cq.save_c(model, tmp_path / "none", inputs=[x.numpy()])


@pytest.mark.slow
def test_the_command_line_asks_for_integers(tmp_path: Path) -> None:
    from support.flow import small_images

    torch.save(small_images(8), tmp_path / "data.pt")
    (tmp_path / "net.py").write_text(
        "from support.flow import small_model\n\ndef make():\n    return small_model()\n"
    )
    common = [f"{tmp_path}/net.py:make", "--integer-io"]
    plan = CliRunner().invoke(cli, ["plan", *common, "--input-shape", "1,1,8,8"])
    assert "the program takes input 0 as int8" in plan.output
    options = ["--calibration", f"{tmp_path}/data.pt", "-o", f"{tmp_path}/net.pte"]
    done = CliRunner().invoke(cli, ["quantize", *common, *options])
    assert done.exit_code == 0, done.output
    assert "input 0 (x): int8 in [-128, 127], scale " in done.output
    program = cq.load_program(tmp_path / "net.pte")
    assert [value.dtype for value in program.contents.inputs] == ["int8"]
    assert program.borders.inputs[0] is not None
    verified = CliRunner().invoke(cli, ["verify", f"{tmp_path}/net.pte"])
    assert "bit-exact: yes" in verified.output, verified.output
    shown = CliRunner().invoke(cli, ["inspect", f"{tmp_path}/net.pte"])
    assert "integer input int8[1, 1, 8, 8], scale" in shown.output
