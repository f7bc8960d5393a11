"""``executorch.export.export`` with our recipes gives the program that ``lower`` gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import executorch.export
import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.recipes import XNNPackRecipeType
from executorch.export import ExportRecipe, ExportSession, StageType, recipe_registry
from support.graphs import Function, differences
from support.models import convert
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.checksum import seal, split_checksum
from custom_quantizer.backends.xnnpack.op_record import split_record
from custom_quantizer.backends.xnnpack.recipe import IntegerRecipeProvider

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*")


class Net(nn.Module):
    """Every kind of bias, a residual, and a strided slice that only a rewrite keeps inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x[:, :, ::2, ::2]
        x = torch.relu(x + self.depthwise(x))
        return self.head(x.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def batches(count: int = 3, batch: int = 2) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(batch, 3, 8, 8, generator=generator),) for _ in range(count)]


EXAMPLE = batches(1)[0]
A8W8, CUSTOM = cq.IntegerRecipe.A8W8, cq.IntegerRecipe.CUSTOM
MIXED = {
    "version": 1,
    "global": "a8w8",
    "rules": [
        {"module_name": "head", "scheme": "a8w4"},
        {"module_name": "depthwise", "scheme": "a16w8"},
    ],
}


def recipe(kind: cq.IntegerRecipe = cq.IntegerRecipe.A8W8, **options: Any) -> ExportRecipe:
    return ExportRecipe.get_recipe(kind, **options)


def export(model: Any, made: ExportRecipe, **options: Any) -> ExportSession:
    return executorch.export.export(model, [EXAMPLE], made, **options)


def _case(kind: cq.IntegerRecipe, **options: Any) -> Any:
    return pytest.param(kind, options, id="-".join((kind.value, *options)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        _case(cq.IntegerRecipe.A8W8),
        _case(cq.IntegerRecipe.A8W8_PER_TENSOR),
        _case(cq.IntegerRecipe.A8W4),
        _case(cq.IntegerRecipe.A16W8),
        _case(cq.IntegerRecipe.DYN8W8),
        _case(cq.IntegerRecipe.DYN8W4),
        _case(CUSTOM, scheme="a8w8-percentile99.9"),
        _case(CUSTOM, config=MIXED),
    ],
)
def test_the_program_is_that_of_lower(kind: cq.IntegerRecipe, options: dict[str, Any]) -> None:
    calibration = batches()
    session = export(net(), recipe(kind, calibration=calibration, **options))
    quantizer = (
        cq.IntegerQuantizer.from_config(options["config"])
        if "config" in options
        else cq.IntegerQuantizer().set_global(options.get("scheme", kind.value))
    )
    graph = convert(net(), EXAMPLE, quantizer, calibration, strict=True).graph
    wanted = cq.lower(graph, EXAMPLE)
    program = cq.session_program(session)
    assert program.buffer == wanted.buffer
    whole, _ = split_checksum(memoryview(program.buffer), "the program")
    pte, record = split_record(whole)
    assert pte == session.get_pte_buffer()
    assert record is not None
    assert seal(bytes(pte) + bytes(record)) == program.buffer
    assert program.report.ops == wanted.report.ops
    assert program.report.fully_delegated or "a8" not in kind.value
    biases, expected = program.integer_biases(), wanted.integer_biases()
    assert biases.keys() == expected.keys()
    assert all(np.array_equal(biases[name], expected[name]) for name in expected)
    assert bool(biases) == (kind.value.startswith("a8") or kind is CUSTOM)
    (output,) = session.run_method("forward", EXAMPLE)
    assert torch.equal(output, wanted.run(*EXAMPLE))


@pytest.fixture(scope="module")
def finished() -> tuple[ExportRecipe, ExportSession]:
    made = recipe()
    return made, export(net(), made)


@pytest.mark.slow
def test_the_session_gives_graph_plan_and_program(finished, tmp_path: Path) -> None:
    made, session = finished
    graph = session.get_stage_artifacts()[StageType.QUANTIZE].data["forward"]
    (quantizer,) = made.quantization_recipe.quantizers
    assert {op.node for op in quantizer.last_plan.quantized} >= {"conv2d", "conv2d_1", "linear"}
    program = cq.session_program(session)
    assert cq.verify(graph, program, [EXAMPLE]).bit_exact
    session.save_to_pte(str(tmp_path / "net.pte"))
    stored = cq.load_program(tmp_path / "net.pte")
    assert torch.equal(stored.run(*EXAMPLE)[0], cq.integer_reference(graph)(*EXAMPLE))


@pytest.mark.slow
def test_example_inputs_calibrate_unless_told_otherwise(finished) -> None:
    _, plain = finished
    same = export(net(), recipe(calibration=lambda: iter([EXAMPLE])))
    other = export(net(), recipe(calibration=[(EXAMPLE[0] * 5,)]))
    assert bytes(same.get_pte_buffer()) == bytes(plain.get_pte_buffer())
    assert bytes(other.get_pte_buffer()) != bytes(plain.get_pte_buffer())


@pytest.mark.slow
def test_a_quantizer_with_rules_of_its_own() -> None:
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("head", None)
    session = export(net(), recipe(CUSTOM, quantizer=quantizer))
    program = cq.session_program(session)
    assert {op.family for op in program.report.ops if "linear" in op.family} == {
        "aten.linear.default"
    }
    assert len(program.integer_biases()) == 2


@pytest.mark.slow  # the mixed case above has the same as a dictionary
def test_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text("version: 1\nglobal: a8w8\nrules: [{module_name: head, scheme: a8w4}]\n")
    made = recipe(CUSTOM, config=path)
    export(net(), made)
    assert made.quantization_recipe.quantizers[0].last_plan.op("linear").scheme == "a8w4"


@pytest.mark.slow
def test_a_converted_graph_is_lowered_as_it_is() -> None:
    graph = convert(net(), EXAMPLE, "a8w8", batches(), strict=True).graph
    session = export(graph, recipe())
    assert cq.session_program(session).buffer == cq.lower(graph, EXAMPLE).buffer


@pytest.mark.slow
def test_a_recipe_is_used_again(finished) -> None:
    made, first = finished
    second = export(net(), made)
    assert bytes(first.get_pte_buffer()) == bytes(second.get_pte_buffer())
    assert cq.session_program(first).buffer == cq.session_program(second).buffer


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_dynamic_batches(batch: int, dynamic: ExportSession) -> None:
    graph = dynamic.get_stage_artifacts()[StageType.QUANTIZE].data["forward"]
    program = cq.session_program(dynamic)
    assert program.report.fully_delegated
    x = torch.randn(batch, 3, 8, 8)
    assert torch.equal(program.run(x), cq.integer_reference(graph)(x))


@pytest.fixture(scope="module")
def dynamic() -> ExportSession:
    made = recipe(dynamic_batch=True, calibration=[*batches(2), *batches(1, batch=5)])
    shapes = ({0: torch.export.Dim("batch", min=1, max=24)},)
    return export(net(), made, dynamic_shapes=shapes)


@pytest.mark.slow
def test_training_instead_of_calibration() -> None:
    losses = []

    def train(model: GraphModule) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            for batch in [*batches(2), *batches(1, batch=3)]:
                loss = model(*batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))

    session = export(net(), recipe(train=train, dynamic_batch=True))
    assert losses[3] < losses[0]
    graph = session.get_stage_artifacts()[StageType.QUANTIZE].data["forward"]
    program = cq.session_program(session)
    assert program.report.fully_delegated
    assert len(program.integer_biases()) == 3
    assert torch.equal(program.run(EXAMPLE[0]), cq.integer_reference(graph)(EXAMPLE[0]))


@pytest.mark.slow
def test_several_methods() -> None:
    torch.manual_seed(0)
    models = {"encode": net(), "score": nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()}
    examples = {"encode": [EXAMPLE], "score": [(torch.randn(2, 6),)]}
    session = executorch.export.export(models, examples, recipe())
    for name, ((example,),) in examples.items():
        program = cq.session_program(session, name)
        graph = session.get_stage_artifacts()[StageType.QUANTIZE].data[name]
        assert program.report.fully_delegated
        assert differences(program.run(example), cq.integer_reference(graph)(example)) == []
        twin = program.with_bytes(program.buffer)
        assert differences(twin.run(example), program.run(example)) == []
        assert len(twin.integer_biases()) == len(program.integer_biases()) > 0
        # The file has the ops of both, each under the names of its own graph.
        report = cq.inspect_program(program.buffer)
        assert report.ops is not None
        assert {op.method for op in report.ops} == set(models)
        of_method = [op.name for op in report.ops if op.method == name]
        assert of_method == list(program.report.tally.placements)
        assert len({row.name for row in report.rows}) == len(report.rows)
        assert f"{name}: linear" in {row.name for row in report.rows}
    with pytest.raises(cq.InputError, match="no method 'forward'; it has encode, score"):
        cq.session_program(session)


@pytest.mark.slow
@pytest.mark.parametrize("check", slow_but([True], [True, False]))
def test_a_wrong_program_is_found(check: bool) -> None:
    def shift_first_bias(_method: str, exported: Any) -> Any:
        name = next(name for name in exported.state_dict if name.endswith("_folded"))
        exported.state_dict[name].add_(1)
        return exported

    made = recipe(check=check)
    made.aten_transform_passes.append(shift_first_bias)
    if check:
        with pytest.raises(cq.VerificationError, match=r"conv2d \(stem\): bias"):
            export(net(), made)
    else:
        export(net(), made)


@pytest.mark.slow
def test_integers_left_outside_are_found() -> None:
    made = recipe()
    made.lowering_recipe.partitioners.clear()
    with pytest.raises(cq.LoweringError, match="stayed outside the delegate"):
        export(net(), made)


@pytest.mark.slow
def test_only_models_and_graphs_are_rewritten() -> None:
    converted = convert(net(), EXAMPLE, strict=True).graph
    exported = torch.export.export(converted, EXAMPLE)
    with pytest.raises(cq.LoweringError, match="ExportedProgram was handed in; hand in the float"):
        export(exported, recipe())


def test_a_float_graph_is_no_converted_graph() -> None:
    with pytest.raises(cq.ConversionError, match="no quantized tensor"):
        export(torch.export.export(net(), EXAMPLE).module(), recipe())


def test_a_model_in_training_mode() -> None:
    with pytest.raises(cq.CaptureError, match=r"model\.eval\(\)"):
        export(net().train(), recipe())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (A8W8, {"calibrate": []}, "no argument 'calibrate'; it takes .*did you mean calibration"),
        (A8W8, {"scheme": "a8w4"}, "its scheme is a8w8; use IntegerRecipe.CUSTOM"),
        (A8W8, {"group_size": 32}, "A8W8 takes no argument 'group_size'; it takes calibration"),
        (A8W8, {"check": 1}, "check is true or false, got 1"),
        (A8W8, {"dynamic_batch": "yes"}, "dynamic_batch is true or false"),
        (A8W8, {"dynamic_max": 0}, "dynamic_max is a size of at least 1, got 0"),
        (A8W8, {"dynamic_max": True}, "dynamic_max is a size"),
        (A8W8, {"calibration": torch.zeros(2, 3)}, "list of input tuples.*got Tensor"),
        (A8W8, {"train": 3}, "train is called with the prepared graph; got 3"),
        (A8W8, {"train": print, "calibration": []}, "give calibration or train"),
        (A8W8, {"calibration": 3}, "list of input tuples.*got int"),
        (CUSTOM, {}, "exactly one of scheme, config, quantizer; got none"),
        (CUSTOM, {"scheme": "a8w8", "config": {}}, "exactly one of .*; got scheme, config"),
        (CUSTOM, {"scheme": "a8w99"}, "weights have 2 to 16 bits, not 99"),
        (CUSTOM, {"scheme": None}, "a name or an OpScheme, got NoneType"),
        (CUSTOM, {"config": 3}, "a path or a mapping, got int"),
        (CUSTOM, {"config": {"version": 1, "globl": "a8w8"}}, "globl"),
        (CUSTOM, {"quantizer": "a8w8"}, "an IntegerQuantizer, got str"),
        (CUSTOM, {"scheme": "a8w8", "shceme": 1}, "did you mean scheme"),
    ],
)
def test_wrong_arguments(kind: cq.IntegerRecipe, options: dict[str, Any], message: str) -> None:
    with pytest.raises(cq.ConfigError, match=message):
        recipe(kind, **options)


def test_a_config_file_that_is_not_there() -> None:
    with pytest.raises(cq.InputError, match=r"missing\.yaml"):
        recipe(CUSTOM, config="missing.yaml")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "no batches"),
        (lambda: [], "no batches"),
        ([EXAMPLE[0]], r"batch 0 is no tuple of inputs but Tensor; for one tensor x write \(x,\)"),
        ([EXAMPLE, EXAMPLE[0]], "batch 1 is no tuple"),
    ],
)
def test_wrong_calibration(calibration: Any, message: str) -> None:
    with pytest.raises(cq.CalibrationError, match=message):
        export(net(), recipe(calibration=calibration))


@pytest.mark.slow
def test_sessions_that_are_not_ours() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = ExportRecipe.get_recipe(XNNPackRecipeType.FP32)
    session = export(net(), stock)
    with pytest.raises(cq.InputError, match="did not run with one of our recipes"):
        cq.session_program(session)
    unfinished = ExportSession(net(), [EXAMPLE], recipe())
    with pytest.raises(cq.InputError, match="has not finished"):
        cq.session_program(unfinished)
    with pytest.raises(cq.InputError, match="got Net"):
        cq.session_program(net())


def test_the_provider_is_registered_beside_the_stock_one() -> None:
    assert {"xnnpack", "custom_quantizer"} <= set(recipe_registry.list_backends())
    assert recipe_registry.get_supported_recipes("custom_quantizer") == list(cq.IntegerRecipe)
    assert IntegerRecipeProvider().create_recipe(XNNPackRecipeType.FP32) is None


def test_values_of_recipes_are_schemes() -> None:
    for kind in cq.IntegerRecipe:
        if kind is not cq.IntegerRecipe.CUSTOM:
            assert cq.scheme(kind.value).name == kind.value


def test_a_partial_function() -> None:
    """A model whose last op has no integer form keeps its reason in the report."""
    model = Function(lambda m, x: torch.sin(m.conv(x)), conv=nn.Conv2d(3, 4, 3)).eval()
    program = cq.session_program(export(model, recipe()))
    (row,) = (op for op in program.report.ops if "sin" in op.node)
    assert "no integer form" in row.reason


@pytest.mark.slow
def test_an_example_in_another_memory_layout() -> None:
    (x,) = EXAMPLE
    last = (x.contiguous(memory_format=torch.channels_last),)
    session = executorch.export.export(net(), [last], recipe(calibration=[last]))
    program = cq.session_program(session)
    graph = convert(net(), EXAMPLE, strict=True).graph
    assert torch.equal(program.run(x), cq.lower(graph, EXAMPLE).run(x))
    assert torch.equal(program.run(*last), program.run(x))
