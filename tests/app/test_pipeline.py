from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.flow import Small, small_images, small_model, small_result
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import weight_norm
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.accuracy.defaults import BEST
from custom_quantizer.analysis.diagnosis import diagnose
from custom_quantizer.app.capture import capture
from custom_quantizer.app.configuration import as_quantizer
from custom_quantizer.app.pipeline import QuantizationResult, quantize
from custom_quantizer.backends.xnnpack import load_program, read_program
from custom_quantizer.calibration.run import CalibrationSummary
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    CustomQuantizerError,
    InputError,
    SchemeError,
)
from custom_quantizer.planning.quantizer import IntegerQuantizer
from custom_quantizer.reference import integer_reference
from custom_quantizer.reference.converted import ConvertedGraph, read_converted

EXAMPLE = (small_images(4),)
DATA = small_images(32)


def integers(converted: GraphModule) -> list[tuple[str, list[int], list[int]]]:
    """Every integer of every layer of a converted graph."""
    return [
        (op.node.name, op.weight.flatten().tolist(), op.bias.tolist())
        for op in read_converted(converted).with_bias()
        if op.weight is not None and op.bias is not None
    ]


def flow(model: Any = None, **options: Any) -> QuantizationResult:
    """Without lowering, which has tests of its own below."""
    return quantize(
        small_model() if model is None else model,
        options.pop("example", EXAMPLE),
        options.pop("data", DATA),
        lower=False,
        progress=False,
        **options,
    )


# -- the flow --------------------------------------------------------------------------------------


def test_equals_the_unmodified_torchao_flow() -> None:
    prepared = prepare_pt2e(
        torch.export.export(small_model(), EXAMPLE).module(), IntegerQuantizer().set_global("a8w8")
    )
    for batch in DATA.split(4):
        prepared(batch)
    assert integers(convert_pt2e(prepared)) == integers(small_result().converted)


@pytest.mark.slow
def test_the_converted_graph_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(model: GraphModule, *options: Any) -> ConvertedGraph:
        calls.append(model)
        return read_converted(model, *options)

    # Wherever a module took the name from, it stands there.
    for name, module in list(sys.modules.items()):
        found = getattr(module, "read_converted", None)
        if name.startswith("custom_quantizer.") and found is read_converted:
            monkeypatch.setattr(module, "read_converted", counted)
    result = quantize(small_model(), EXAMPLE, DATA, progress=False)
    assert calls == [result.converted]


def test_every_part_is_there() -> None:
    result = small_result()
    assert [op.family for op in result.plan.ops] == [row.family for row in result.report.rows]
    assert result.calibration == CalibrationSummary(32, 8, rebatched=True)
    assert all(row.backend == "xnnpack int8" for row in result.report.rows)
    assert result.lowered is not None
    assert result.lowered.report.fully_delegated
    # Three layers, of which the first has its bias from the batch norm.
    assert [row.bias.dtype for row in result.report.rows if row.bias] == ["int32"] * 3
    with torch.no_grad():
        torch.testing.assert_close(result.exported(*EXAMPLE), small_model()(*EXAMPLE))


def test_the_program_computes_what_the_reference_says() -> None:
    result = small_result()
    assert result.lowered is not None
    reference = integer_reference(result.converted)
    for seed in range(5):
        x = small_images(4, seed)
        assert torch.equal(result.lowered.run(x), reference(x))


def test_biases_in_the_file_are_rounded_in_float64() -> None:
    """Computed here from the float model alone, but for the two scales."""
    result, model = small_result(), small_model()
    assert result.lowered is not None
    stored = result.lowered.integer_biases()
    ops = {op.node.name: op for op in read_converted(result.converted).with_bias()}
    for name, layer in (("conv2d_1", model.wide), ("linear", model.linear)):
        op = ops[name]
        assert op.weight_qparams is not None
        unit = op.inputs[0].scale * torch.as_tensor(op.weight_qparams.scale).double()
        expected = torch.round(layer.bias.detach().double() / unit)
        assert stored[name].tolist() == expected.tolist()


@pytest.mark.parametrize("form", ["module", "program", "graph"])
def test_the_model_may_be_captured_or_not(form: str) -> None:
    program = torch.export.export(small_model(), EXAMPLE)
    model = {"module": small_model(), "program": program, "graph": program.module()}[form]
    before = None if isinstance(model, torch.export.ExportedProgram) else str(model)
    result = flow(model)
    assert integers(result.converted) == integers(small_result().converted)
    # prepare_pt2e folds batch norms into what it is given: that must be a copy.
    assert before is None or str(model) == before
    assert integers(flow(model).converted) == integers(result.converted)


def test_the_module_is_not_changed(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model().train()
    model.pool.eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with caplog.at_level(logging.INFO, "custom_quantizer"):
        result = flow(model)
    assert "Small has 5 modules in training mode; a copy in eval mode" in caplog.text
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert integers(result.converted) == integers(small_result().converted)


def test_lowering_can_be_left_out(tmp_path: Path) -> None:
    result = flow()
    assert result.lowered is None
    assert json.loads(result.to_json())["lowering"] is None
    saved = result.save(tmp_path / "out")
    assert saved.program is None
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["model.graph.safetensors", "report.json"]
    with pytest.raises(InputError, match="lower=False"):
        result.save(tmp_path / "model.pte")


@pytest.mark.parametrize("backend", ["tosa", None])
def test_other_backends_stop_before_the_program(backend: Any) -> None:
    """A graph that was planned for another one is not quietly lowered to XNNPACK."""
    torch.manual_seed(0)
    example = (torch.randn(2, 3, 8, 8),)
    quantizer = IntegerQuantizer(backend=backend).set_global("a16w8")
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ConfigError, match=r"call it with lower=False, and custom_quantizer\.lower"):
        quantize(model, example, [example], config=quantizer, progress=False)
    done = quantize(model, example, [example], config=quantizer, lower=False, progress=False)
    assert done.lowered is None
    # XNNPACK has no integers of 16 bits, these have.
    assert [row.placement for row in done.report.rows] == ["integer kernel"]


@pytest.mark.slow
def test_dynamic_batch() -> None:
    result = quantize(
        small_model(), (small_images(1),), DATA, dynamic_batch=20, lower=True, progress=False
    )
    program = result.lowered
    assert program is not None
    assert program.contents.inputs[0].shape == (20, 1, 8, 8)
    assert result.calibration == CalibrationSummary(32, 2, rebatched=True)
    reference = integer_reference(result.converted)
    for size in (1, 2, 15, 16, 20):
        x = small_images(size)
        assert torch.equal(program.run(x), reference(x))
    with pytest.raises(InputError, match=r"at most \(20, 1, 8, 8\), got \(21, 1, 8, 8\)"):
        program.run(small_images(21))


class Flexible(nn.Module):
    """Any number of inputs, in any way that Python has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = weight_norm(nn.Linear(4, 3))

    def forward(self, *args: Tensor | None, **kwargs: Tensor) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if x is not None]
        return cast(Tensor, self.layer(torch.stack(given).sum(0)))


class Optional(Flexible):
    def forward(self, x: Tensor, y: Tensor | None = None, z: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(x, y) + z


@pytest.mark.parametrize(
    ("build", "rest"),
    [
        (Flexible, (torch.randn(8, 4),)),
        pytest.param(Optional, (), marks=pytest.mark.slow),
        pytest.param(Optional, (None,), marks=pytest.mark.slow),
        pytest.param(Optional, (None, 3), marks=pytest.mark.slow),
    ],
)
def test_a_dynamic_batch_of_inputs_of_any_kind(
    build: Callable[[], nn.Module], rest: tuple[Any, ...]
) -> None:
    """The layer is normalized in the old way, too: its weight is a tensor with a history."""
    torch.manual_seed(0)
    model = build()
    inputs = (torch.randn(8, 4), *rest)
    result = quantize(model, inputs, [inputs], dynamic_batch=8, progress=False)
    assert result.lowered is not None
    reference = integer_reference(result.converted)
    for size in (1, 8):
        given = tuple(x[:size] if isinstance(x, Tensor) else x for x in inputs)
        got = reference(*given)
        assert torch.equal(result.lowered.run(*given), got)
        # Some rounding errors of half a step of 256, against values of some size.
        assert float((got - model(*given)).detach().abs().max()) < 0.1


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    quantize(small_model(), EXAMPLE, DATA, lower=False, progress=True)
    captured = capsys.readouterr()
    assert "quantize" in captured.err
    assert captured.out == ""


# -- saving ----------------------------------------------------------------------------------------


def test_save_beside_the_program(tmp_path: Path) -> None:
    (tmp_path / "net.pte").write_bytes(b"old")
    saved = small_result().save(tmp_path / "net.pte")
    assert (saved.program, saved.report) == (tmp_path / "net.pte", tmp_path / "net.json")
    assert saved.graph == tmp_path / "net.graph.safetensors"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["net.graph.safetensors", "net.json", "net.pte"]
    lowered = small_result().lowered
    assert lowered is not None
    assert (tmp_path / "net.pte").read_bytes() == lowered.buffer
    outputs = load_program(tmp_path / "net.pte").run(*EXAMPLE)
    assert torch.equal(outputs[0], lowered.run(*EXAMPLE))


def test_save_in_a_directory(tmp_path: Path) -> None:
    saved = small_result().save(str(tmp_path / "a" / "b"))
    assert (saved.program, saved.report) == (
        tmp_path / "a" / "b" / "model.pte",
        tmp_path / "a" / "b" / "report.json",
    )
    assert read_program(str(saved.program)).size_bytes == saved.program.stat().st_size


def test_the_report_is_json_of_all_parts(tmp_path: Path) -> None:
    saved = small_result().save(tmp_path / "net.pte")
    document = json.loads(saved.report.read_text())
    files = document.pop("files")
    assert list(document) == ["version", "calibration", "fidelity", "plan", "report", "lowering"]
    assert document == json.loads(small_result().to_json())
    for kind, file in (("program", saved.program), ("graph", saved.graph)):
        assert file is not None
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert files[kind] == {"file": file.name, "sha256": digest}
    assert document["calibration"]["samples"] == 32
    assert document["lowering"]["delegates"] == 1
    biases = [row["bias"] for row in document["report"]["rows"] if row["bias"]]
    assert [bias["dtype"] for bias in biases] == ["int32"] * 3
    assert [bias["integers"] for bias in biases] == [
        bias for _, _, bias in integers(small_result().converted)
    ]


@pytest.mark.parametrize("name", ["missing/net.pte", "file/net.pte", "file/directory", "dir.pte"])
def test_unwritable(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "dir.pte").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=name):
        small_result().save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


# -- configuration ---------------------------------------------------------------------------------


def yaml_file(tmp_path: Path) -> str:
    path = tmp_path / "mixed.yaml"
    path.write_text(json.dumps(IntegerQuantizer().set_global("a8w8-per_tensor").to_config()))
    return str(path)


def test_configurations(tmp_path: Path) -> None:
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    def spec(qscheme: torch.qscheme, low: int) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=MinMaxObserver,
            quant_min=low,
            quant_max=127,
            qscheme=qscheme,
        )

    activation = spec(torch.per_tensor_affine, -128)
    torchao = QuantizationConfig(
        activation, activation, spec(torch.per_tensor_symmetric, -127), None
    )
    configs: list[Any] = [
        "a8w8-per_tensor",
        scheme("a8w8", weight_granularity="per_tensor"),
        IntegerQuantizer().set_global("a8w8-per_tensor"),
        IntegerQuantizer().set_global("a8w8-per_tensor").to_config(),
        yaml_file(tmp_path),
        Path(yaml_file(tmp_path)),
        torchao,
    ]
    results = [integers(flow(config=config).converted) for config in configs]
    assert all(result == results[0] for result in results)
    assert results[0] != integers(small_result().converted)


def test_a_quantizer_is_used_as_it_is() -> None:
    quantizer = IntegerQuantizer().set_global("a8w8").set_module_name("wide", None)
    assert as_quantizer(quantizer) is quantizer
    result = flow(config=quantizer)
    assert [op.node for op in result.plan.floating] == ["conv2d_1"]
    assert {row.path for row in result.report.rows if row.compute == "float"} >= {"wide"}


def test_warnings_of_the_plan_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    flow(config=IntegerQuantizer().set_global("a8w8").set_module_type(nn.Conv1d, "a8w8"))
    assert "selects nothing" in caplog.text


# -- errors ----------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def weight_only() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, Int8WeightOnlyConfig())
    return cast(nn.Module, model[0])


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.reshape(2, 4))


def with_value(model: nn.Module, name: str, number: float) -> nn.Module:
    """A model that has ``number`` in a parameter or buffer."""
    getattr(model, name).data.view(-1)[0] = number
    return model


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.heads["class"](x))


class Stubborn(Small):
    def __deepcopy__(self, memo: object) -> Stubborn:
        raise RuntimeError("no copies")


def with_nan() -> Tensor:
    data = small_images(8)
    data[5] = float("nan")
    return data


def training_graph() -> GraphModule:
    return torch.export.export(small_model().train(), EXAMPLE).module()


class Difference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return cast(Tensor, self.left(a) - self.right(b))


def test_an_example_may_hold_one_tensor_twice() -> None:
    """For ``torch.export`` it is one input."""
    model, same = Difference().eval(), torch.randn(2, 4)
    batches = [tuple(torch.randn(2, 2, 4)) for _ in range(8)]
    result = flow(model, example=(same, same), data=batches)
    for batch in batches:
        assert float((result.converted(*batch) - model(*batch)).detach().abs().max()) < 0.1
    diagnose(model, result.converted, [(same, same)])  # it captures the model, too


def traced() -> GraphModule:
    return torch.fx.symbolic_trace(small_model())


ERRORS: dict[str, tuple[Callable[[], Any], type[CustomQuantizerError], list[str]]] = {
    "a function": (
        lambda: flow(lambda x: x),
        CaptureError,
        ["nn.Module or an ExportedProgram, got function"],
    ),
    "a script": (
        lambda: flow(torch.jit.trace(small_model(), EXAMPLE)),
        CaptureError,
        ["got TopLevelTracedModule"],
    ),
    "a traced graph": (lambda: flow(traced()), CaptureError, ["torch.fx", "torch.export.export"]),
    "a graph whose weights are inputs": (
        lambda: flow(torch.export.export(small_model(), EXAMPLE).graph_module),
        CaptureError,
        ["p_", "exported.module() instead of exported.graph_module"],
    ),
    "a training graph": (
        lambda: flow(training_graph()),
        CaptureError,
        ["training mode", "model.eval()"],
    ),
    "a layer without a shape": (
        lambda: flow(nn.Sequential(nn.LazyLinear(4)), example=(torch.randn(2, 4),)),
        InputError,
        ["Sequential: 0.weight has no shape yet", "on an example once"],
    ),
    "a model without values": (
        lambda: flow(nn.BatchNorm1d(4, affine=False, device="meta"), example=(torch.randn(2, 4),)),
        InputError,
        ["BatchNorm1d: running_mean is on the meta device", "to_empty(device='cpu')"],
    ),
    "weights that wrap tensors": (
        lambda: flow(weight_only(), example=(torch.randn(2, 32),)),
        InputError,
        ["Linear: weight is a ", "torchao.quantize_ made; hand in the float model"],
    ),
    "an infinite weight": (
        lambda: flow(with_value(nn.Linear(4, 4), "weight", torch.inf), example=EXAMPLE),
        InputError,
        ["Linear: 1 of the 16 values of weight are not finite", "before the training diverged"],
    ),
    "statistics that diverged": (
        lambda: flow(with_value(nn.BatchNorm2d(1), "running_var", torch.nan), example=EXAMPLE),
        InputError,
        ["BatchNorm2d: 1 of the 1 values of running_var are NaN"],
    ),
    "a name of Python's own": (
        lambda: flow(Keyword(), example=(torch.randn(2, 4),)),
        CaptureError,
        ["PyTorch cannot write code for the graph", "class is a word of Python's own"],
    ),
    "a module that cannot be copied": (
        lambda: flow(Stubborn()),
        CaptureError,
        ["Stubborn cannot be copied (RuntimeError: no copies)"],
    ),
    "an example that is no tuple": (
        lambda: flow(example=small_images(1)),
        InputError,
        ["got Tensor", "write (x,)"],
    ),
    "an example of another shape": (
        lambda: flow(example=(torch.randn(1, 3, 8, 8),)),
        InputError,
        ["Small does not run on the example inputs (float32 [1, 3, 8, 8])", "batch first"],
    ),
    "an example with too many inputs": (
        lambda: flow(example=(small_images(1), small_images(1))),
        InputError,
        ["does not run", "TypeError"],
    ),
    "an integer example": (
        lambda: flow(example=(torch.ones(1, 1, 8, 8, dtype=torch.int64),)),
        InputError,
        ["does not run", "int64 [1, 1, 8, 8]"],
    ),
    "a complex example": (
        lambda: flow(example=(torch.ones(1, 1, 8, 8, dtype=torch.complex64),)),
        InputError,
        ["does not run", "complex64"],
    ),
    "a branch on a value": (
        lambda: flow(Branches(), example=(torch.randn(2, 4),)),
        CaptureError,
        ["cannot capture Branches", "torch.where"],
    ),
    "a fixed batch": (
        lambda: flow(FixedBatch(), example=(torch.randn(2, 4),), dynamic_batch=True),
        CaptureError,
        ["cannot capture FixedBatch", "fixes the size of the batch"],
    ),
    "a dynamic batch of a captured graph": (
        lambda: flow(torch.export.export(small_model(), EXAMPLE), dynamic_batch=True),
        CaptureError,
        ["captured already", "dynamic_shapes"],
    ),
    "a dynamic batch smaller than the example": (
        lambda: flow(dynamic_batch=3),
        InputError,
        ["batch of 4", "largest batch 3"],
    ),
    "a dynamic batch of nothing": (
        lambda: flow(example=(small_images(1)[:0],), dynamic_batch=True),
        InputError,
        ["the example is an empty batch"],
    ),
    "a dynamic batch of different inputs": (
        lambda: capture(
            nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(3, 4)), dynamic_batch=True
        ),
        InputError,
        ["share their first dimension", "2, 3"],
    ),
    "no data": (lambda: flow(data=[]), CalibrationError, ["no sample"]),
    "NaN": (lambda: flow(data=with_nan()), CalibrationError, ["batch 0", "nan"]),
    "data of another shape": (
        lambda: flow(data=torch.randn(4, 1, 9, 9)),
        CalibrationError,
        ["[4, 1, 9, 9]", "[4, 1, 8, 8]"],
    ),
    "integer data": (
        lambda: flow(data=torch.ones(4, 1, 8, 8, dtype=torch.uint8)),
        CalibrationError,
        ["uint8", "normalize"],
    ),
    "nothing to quantize": (
        lambda: flow(nn.Softplus(), example=(torch.randn(2, 4),), data=torch.randn(2, 4)),
        ConfigError,
        ["nothing to quantize"],
    ),
    "an unknown module": (
        lambda: flow(config=IntegerQuantizer().set_module_name("lineer", "a8w8")),
        ConfigError,
        ["lineer", "did you mean linear"],
    ),
    "a misspelt scheme": (lambda: flow(config="a8v8"), SchemeError, ["a8v8"]),
    "a missing file": (lambda: flow(config="missing.yaml"), InputError, ["missing.yaml"]),
    "a wrong mapping": (
        lambda: flow(config={"version": 1, "schemes": 3}),
        ConfigError,
        ["schemes"],
    ),
    "a number": (lambda: flow(config=8), ConfigError, ["not int"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run, kind, words = ERRORS[name]
    with pytest.raises(CustomQuantizerError) as error:
        run()
    assert type(error.value) is kind
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    # torch 2.15 prints the graph that it could not capture, twice.
    assert "def forward" not in capsys.readouterr().err


# -- accuracy --------------------------------------------------------------------------------------


def _improved_by(result: QuantizationResult) -> tuple[str, ...]:
    return () if result.improvement is None else result.improvement.algorithms


def test_what_is_free_is_done_below_eight_bits() -> None:
    def by(scheme: str, **options: Any) -> QuantizationResult:
        return quantize(
            small_model(), EXAMPLE, DATA, config=scheme, lower=False, progress=False, **options
        )

    assert _improved_by(by("a8w8")) == ()
    assert _improved_by(by("a8w4")) == ("bias_correction",)
    assert _improved_by(by("a8w4", accuracy="plain")) == ()
    assert _improved_by(by("a8w8", accuracy="best")) == BEST
    only = by("a8w4", accuracy="best", improve=["gptq"])
    assert _improved_by(only) == ("gptq",)
    assert json.loads(only.to_json())["improvement"]["algorithms"] == ["gptq"]
    assert "improvement" not in json.loads(by("a8w8").to_json())


class _Stream(nn.Module):
    """A convolution over time that keeps the frames it reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 8, 3)
        self.register_buffer("past", torch.zeros(1, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.cat([self.past, x], -1)
        self.past.copy_(frames[..., -2:])
        return torch.relu(self.layer(frames))


def test_biases_of_a_model_with_state_stay_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    frames = [(x,) for x in torch.randn(4, 1, 4, 5)]

    def by(**options: Any) -> QuantizationResult:
        given: Any = {"config": "a8w4", "lower": False, "progress": False, **options}
        return quantize(_Stream(), frames[0], frames, **given)

    assert _improved_by(by()) == ()
    assert "writes its own buffers (past), so its biases are not corrected" in caplog.text
    with pytest.raises(CalibrationError, match="writes its own buffers"):
        by(accuracy="best")


def test_a_config_file_says_how_much_accuracy_is_wanted() -> None:
    def by(extra: dict[str, Any], **options: Any) -> tuple[str, ...]:
        config = {"version": 1, "global": "a8w4", **extra}
        result = quantize(
            small_model(), EXAMPLE, DATA, config=config, lower=False, progress=False, **options
        )
        return _improved_by(result)

    assert by({"accuracy": "plain"}) == ()
    assert by({"accuracy": "plain"}, accuracy="fast") == ("bias_correction",)
    assert by({"improve": ["gptq"]}) == ("gptq",)
    assert by({"improve": []}) == ()
    with pytest.raises(ConfigError, match="accuracy is one of plain, fast, best, not 'bets'"):
        by({}, accuracy="bets")


def test_a_generator_is_enough_to_improve_with() -> None:
    def by(data: object) -> Tensor:
        result = quantize(small_model(), EXAMPLE, data, config="a8w4", lower=False, progress=False)
        return cast(Tensor, result.converted(*EXAMPLE))

    batches = list(small_images(32).split(4))
    assert torch.equal(by(batch for batch in batches), by(batches))


def test_four_bit_activations_do_not_get_the_whole_range() -> None:
    def scales(**options: Any) -> dict[str, float]:
        result = quantize(
            small_model(), EXAMPLE, DATA, lower=False, progress=False, improve=[], **options
        )
        return {
            op.node.name: float(op.inputs[0].scale)
            for op in read_converted(result.converted).integer
            if op.weight is not None
        }

    chosen, plain = scales(config="a4w8"), scales(config="a4w8", accuracy="plain")
    assert all(chosen[name] < plain[name] for name in plain)
    assert chosen == scales(config="a4w8-histogram", accuracy="plain")
    named = scales(config="a4w8-percentile99")
    assert named == scales(config="a4w8-percentile99", accuracy="plain")
    assert scales(config="a8w8") == scales(config="a8w8", accuracy="plain")
