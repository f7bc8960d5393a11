from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.data import DataLoader, TensorDataset
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from custom_quantizer.app.data import DataSource
from custom_quantizer.calibration.observers import ActivationObserver
from custom_quantizer.calibration.run import CalibrationSummary, GraphInputs, calibrate
from custom_quantizer.core.schemes import scheme
from custom_quantizer.errors import CalibrationError, InputError
from custom_quantizer.planning.quantizer import IntegerQuantizer


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 5)
        self.right = nn.Linear(3, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) + self.right(b)


class Keyword(TwoInputs):
    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
        return super().forward(a, b)


class OneDict(TwoInputs):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch["a"], batch["b"])


class Unequal(nn.Module):
    """The second input has a first dimension of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.linear(x) @ table


BATCH = torch.export.Dim("batch", min=1, max=16)


def prepared(
    model: nn.Module,
    *example: Any,
    kwargs: dict[str, Any] | None = None,
    dynamic: Any = None,
) -> GraphModule:
    program = torch.export.export(model.eval(), example, kwargs, dynamic_shapes=dynamic)
    return prepare_pt2e(program.module(), IntegerQuantizer().set_global("a8w8"))


def static_conv(batch: int = 8) -> GraphModule:
    return prepared(Conv(), torch.randn(batch, 3, 6, 6))


def dynamic_conv() -> GraphModule:
    return prepared(Conv(), torch.randn(2, 3, 6, 6), dynamic=({0: BATCH},))


def ranges(model: GraphModule) -> list[tuple[float, float, int]]:
    """What every activation observer has seen."""
    return [
        (float(m.min_val), float(m.max_val), int(m.count))
        for m in model.modules()
        if isinstance(m, ActivationObserver)
    ]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- what calibration data may be ----------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])

IMAGES = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 10
CHUNKS = IMAGES.split(8)

FORMS: dict[str, Callable[[], Any]] = {
    "list of tensors": lambda: list(CHUNKS),
    "generator": lambda: (chunk for chunk in CHUNKS),
    "tuples": lambda: [(chunk,) for chunk in CHUNKS],
    "pairs with labels": lambda: list(zip(CHUNKS, LABELS.split(8), strict=True)),
    "lists with labels": lambda: [[c, y] for c, y in zip(CHUNKS, LABELS.split(8), strict=True)],
    "tuple of inputs, and labels": lambda: [((c,), LABELS[:8]) for c in CHUNKS],
    "named tuples": lambda: [Pair(c, LABELS[:8]) for c in CHUNKS],
    "dictionaries": lambda: [{"x": c} for c in CHUNKS],
    "dictionaries with more keys": lambda: [{"y": LABELS[:8], "x": c} for c in CHUNKS],
    "dictionary, and labels": lambda: [({"x": c}, LABELS[:8]) for c in CHUNKS],
    "data loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8),
    "data loader of another size": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5),
    "data source": lambda: DataSource.from_tensors(IMAGES, LABELS, batch_size=8),
    "inputs of a data source": lambda: DataSource.from_tensors(IMAGES, batch_size=6).inputs,
    "one tensor": lambda: IMAGES,
    "channels last": lambda: [c.contiguous(memory_format=torch.channels_last) for c in CHUNKS],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", slow_but([dynamic_conv], [static_conv, dynamic_conv]))
def test_every_form_of_data_shows_the_same_samples(
    form: str, make: Callable[[], GraphModule]
) -> None:
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    expected = make()
    for chunk in CHUNKS:
        expected(chunk)
    summary = calibrate(model, FORMS[form]())
    assert summary.samples == 24
    assert summary.unused == 0
    assert ranges(model) == ranges(expected)


def test_gradients_are_off_and_the_graph_converts() -> None:
    model = static_conv()
    grads: list[bool] = []
    handle = next(m for m in model.modules() if isinstance(m, ActivationObserver))
    handle.register_forward_hook(lambda *_: grads.append(torch.is_grad_enabled()))
    assert calibrate(model, IMAGES) == CalibrationSummary(24, 3, rebatched=True)
    assert grads == [False] * 3
    convert_pt2e(model)


def test_two_inputs() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 3)
    model = prepared(TwoInputs(), a[:2], b[:2])
    labels = torch.zeros(6)
    for data in ([(a, b)], [[a, b]], [((a, b), labels)], [{"b": b, "a": a}], {"a": a, "b": b}):
        assert calibrate(model, data) == CalibrationSummary(6, 3, rebatched=True)


def test_keyword_and_dictionary_arguments() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 3)
    keyword = prepared(Keyword(), a, kwargs={"b": b})
    assert calibrate(keyword, [{"a": a, "b": b}, (a, b)]).samples == 4
    model = OneDict()
    nested, expected = (prepared(model, {"a": a, "b": b}) for _ in range(2))
    expected({"a": a, "b": b})
    # In another order, and with a key that the graph does not know.
    assert calibrate(nested, [{"b": b, "a": a, "c": a}]).samples == 2
    assert ranges(nested) == ranges(expected)


# -- batches of another size -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([8, 8], CalibrationSummary(16, 2)),
        ([16, 8], CalibrationSummary(24, 3, True)),
        ([5, 5, 5], CalibrationSummary(8, 1, True, 7)),
        ([3, 3, 3, 3, 3, 1], CalibrationSummary(16, 2, True)),
        ([8, 8, 4], CalibrationSummary(16, 2, False, 4)),
        ([0, 8], CalibrationSummary(8, 1)),
    ],
)
def test_static_batches(sizes: list[int], expected: CalibrationSummary) -> None:
    data = [torch.randn(size, 3, 6, 6) for size in sizes]
    assert calibrate(static_conv(8), data) == expected


@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    limit=st.none() | st.integers(1, 40),
    graph_batch=st.integers(1, 9) | st.just("dynamic"),
)
@settings(max_examples=60, deadline=None)
def test_no_sample_is_lost_repeated_or_reordered(
    sizes: list[int], limit: int | None, graph_batch: Any
) -> None:
    """Each sample is its own number: the model must be shown 0, 1, 2, ... in legal batches."""
    low, high = (1, 16) if graph_batch == "dynamic" else (graph_batch, graph_batch)
    total = sum(sizes)
    numbers = torch.arange(total, dtype=torch.float32)[:, None].expand(-1, 3)
    seen: list[Tensor] = []

    model = _recorder(graph_batch)
    model.get_submodule("activation_post_process_0").register_forward_pre_hook(
        lambda _module, args: seen.append(args[0][:, 0].clone())
    )
    wanted = total if limit is None else min(limit, total)
    usable = wanted - wanted % low
    if not usable:
        with pytest.raises(CalibrationError):
            calibrate(model, numbers.split(sizes), limit=limit)
        return
    summary = calibrate(model, numbers.split(sizes), limit=limit)
    assert torch.cat(seen).tolist() == list(range(usable))
    assert all(low <= len(batch) <= high for batch in seen)
    assert (summary.samples, summary.unused) == (usable, wanted - usable)
    assert summary.batches == len(seen)


_RECORDERS: dict[Any, GraphModule] = {}


def _recorder(batch: Any) -> GraphModule:
    if batch not in _RECORDERS:
        dynamic = ({0: BATCH},) if batch == "dynamic" else None
        example = torch.zeros(2 if batch == "dynamic" else batch, 3)
        _RECORDERS[batch] = prepared(nn.Linear(3, 2), example, dynamic=dynamic)
    model = _RECORDERS[batch]
    model.get_submodule("activation_post_process_0")._forward_pre_hooks.clear()
    return model


def test_limit_stops_reading() -> None:
    read: list[int] = []

    def endless() -> Iterator[Tensor]:
        for index in itertools.count():
            read.append(index)
            yield torch.randn(8, 3, 6, 6)

    assert calibrate(dynamic_conv(), endless(), limit=20) == CalibrationSummary(20, 3)
    assert read == [0, 1, 2]


def test_summary_says_what_was_left_over() -> None:
    assert str(CalibrationSummary(1024, 8)) == "1,024 samples in 8 batches"
    assert str(CalibrationSummary(16, 2, True, 3)) == (
        "16 samples in 2 batches; 3 left over, too few for a batch"
    )


def test_a_remainder_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    calibrate(static_conv(8), torch.randn(11, 3, 6, 6))
    assert "3 left over" in caplog.text


def test_what_a_graph_takes() -> None:
    assert str(GraphInputs.of(dynamic_conv())) == "x: float32 [1..16, 3, 6, 6]"
    assert GraphInputs.of(static_conv(8)).batch == (8, 8)
    unequal = prepared(Unequal(), torch.randn(2, 4), torch.randn(5, 3))
    assert GraphInputs.of(unequal).batch is None
    assert calibrate(unequal, [(torch.randn(2, 4), torch.randn(5, 3))]).samples == 2


# -- errors ----------------------------------------------------------------------------------------


def good() -> Tensor:
    return torch.randn(8, 3, 6, 6)


def with_value(value: float) -> Tensor:
    x = good()
    x[1, 2, 3, 4] = value
    return x


BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no batch": (lambda: [], ["holds no sample"]),
    "only empty batches": (lambda: [torch.zeros(0, 3, 6, 6)], ["holds no sample"]),
    "exhausted generator": (lambda: iter(()), ["no sample", "generator"]),
    "too few samples": (lambda: [good()[:5]], ["5 samples", "batches of 8"]),
    "a path": (lambda: "images/", ["not str", "load_data"]),
    "a number": (lambda: 3, ["not int"]),
    "no tensor": (lambda: [good(), "a"], ["batch 1", "input x is str", "float32 [8, 3, 6, 6]"]),
    "None": (lambda: [None], ["batch 0", "NoneType"]),
    "too many inputs": (lambda: [(good(), good(), good())], ["batch 0 holds 3", "takes 1"]),
    "no input": (lambda: [()], ["batch 0 holds 0", "takes 1"]),
    "other channels": (lambda: [good(), good()[:, :1]], ["batch 1", "[8, 1, 6, 6]"]),
    "other size": (lambda: [good()[..., :5]], ["batch 0", "[8, 3, 6, 5]", "[8, 3, 6, 6]"]),
    "samples without a batch": (lambda: list(good()), ["batch 0", "single sample", "DataLoader"]),
    "float64": (lambda: [good().double()], ["batch 0", "is float64", ".to(torch.float32)"]),
    "uint8": (lambda: [good().to(torch.uint8)], ["is uint8", "normalize"]),
    "int64": (lambda: [good().to(torch.int64)], ["is int64", "normalize"]),
    "complex": (lambda: [good().to(torch.complex64)], ["complex64", "real and imaginary"]),
    "NaN": (lambda: [good(), with_value(float("nan"))], ["batch 1", "1 of 864", "nan"]),
    "inf": (lambda: [with_value(float("inf"))], ["batch 0", "inf"]),
    "-inf": (lambda: [with_value(float("-inf"))], ["batch 0", "inf"]),
    "wrong key": (lambda: [{"image": good()}], ["batch 0 has no x, only image"]),
    "empty dictionary": (lambda: [{}], ["batch 0 has no x, only no keys"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data(name: str) -> None:
    data, words = BAD[name]
    with pytest.raises(CalibrationError) as error:
        calibrate(static_conv(8), data())
    for word in words:
        assert word in str(error.value)


def test_nan_in_the_middle_names_the_op() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.log(self.first(x)))

    model = prepared(Root(), torch.randn(4, 3))
    with pytest.raises(CalibrationError, match=r"batch 0: log.*not finite"):
        calibrate(model, [torch.full((4, 3), -1e3), torch.randn(4, 3)])


@pytest.mark.parametrize("limit", [0, -1])
def test_bad_limit(limit: int) -> None:
    with pytest.raises(CalibrationError, match="at least one sample"):
        calibrate(static_conv(), IMAGES, limit=limit)


def test_inputs_of_different_length() -> None:
    model = prepared(TwoInputs(), torch.randn(2, 4), torch.randn(2, 3))
    with pytest.raises(CalibrationError, match="different numbers of samples: 4, 6"):
        calibrate(model, [(torch.randn(4, 4), torch.randn(6, 3))])


def test_sizes_out_of_the_recorded_bounds() -> None:
    size = torch.export.Dim("size", min=4, max=8)
    model = prepared(Conv(), torch.randn(2, 3, 6, 6), dynamic=({2: size, 3: size},))
    assert calibrate(model, [torch.randn(2, 3, 8, 8)]).samples == 2
    with pytest.raises(CalibrationError, match=r"batch 0: input x .*\[2, 3, 9, 9\].*4\.\.8"):
        calibrate(model, [torch.randn(2, 3, 9, 9)])
    # Each size is legal, but the graph was captured with both equal.
    with pytest.raises(CalibrationError, match="batch 0: the prepared graph failed"):
        calibrate(model, [torch.randn(2, 3, 5, 8)])


def test_fixed_inputs_that_do_not_share_a_batch_are_not_rebatched() -> None:
    model = prepared(Unequal(), torch.randn(2, 4), torch.randn(5, 3))
    with pytest.raises(CalibrationError, match=r"input x .*\[4, 4\]"):
        calibrate(model, [(torch.randn(4, 4), torch.randn(5, 3))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Conv, "expected what prepare_pt2e returns, got Conv"),
        (
            lambda: torch.export.export(Conv().eval(), (good(),)).module(),
            "the graph has no observers",
        ),
    ],
)
def test_not_a_prepared_graph(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(make(), IMAGES)


def test_errors_of_the_data_pass_through() -> None:
    def broken() -> Iterator[Tensor]:
        yield good()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        calibrate(static_conv(), broken())


# -- when ranges stopped moving --------------------------------------------------------------------


def image(low: float, high: float) -> Tensor:
    """A batch of 2 with these extremes."""
    x = torch.zeros(2, 3, 6, 6)
    x[0, 0, 0, 0], x[1, 2, 5, 5] = low, high
    return x


def test_the_last_batch_that_moved_a_range() -> None:
    batches = [image(-1, 1), image(-2, 1), image(-1, 0.5), image(-2, 1), image(0, 0)]
    summary = calibrate(dynamic_conv(), batches)
    tensors = {tensor.name: tensor for tensor in summary.tensors}
    assert list(tensors) == ["x", "relu"]
    assert (tensors["x"].low, tensors["x"].high, tensors["x"].last_change) == (-2.0, 1.0, 2)
    assert summary.last_change == 2
    assert str(summary) == "10 samples in 5 batches; ranges last moved in batch 2"
    assert summary.convergence().splitlines()[-1].split()[-3:] == ["2", "of", "5"]
    late = calibrate(dynamic_conv(), [*batches, image(-1, 3)])
    assert str(late).endswith(
        "ranges last moved in batch 6 (1 of 2 still moved: more data may help)"
    )


def test_watching_a_tensor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = dynamic_conv()
    observer = next(m for m in model.modules() if isinstance(m, ActivationObserver))
    summary = calibrate(model, [image(-1, 1), image(-1, 1), image(-1, 4)], watch="x")
    points = summary.watched
    assert [(p.name, p.batch, p.samples, p.low, p.high) for p in points] == [
        ("x", 1, 2, -1.0, 1.0),
        ("x", 2, 4, -1.0, 1.0),
        ("x", 3, 6, -1.0, 4.0),
    ]
    qparams = observer.qparams()
    assert (points[-1].scale, points[-1].zero_point) == (qparams.scale, qparams.zero_point)
    lines = capsys.readouterr().out.splitlines()
    assert [str(point) for point in points] == lines
    summary.plot_watch(tmp_path / "watch.svg")
    assert "<svg" in (tmp_path / "watch.svg").read_text()
    with pytest.raises(InputError, match=r"its suffix names no format.*png"):
        summary.plot_watch(tmp_path / "watch.txt")


def test_watching_by_module_and_glob() -> None:
    model = prepared(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.zeros(2, 3))
    names = {p.name for p in calibrate(model, [torch.ones(2, 3)], watch="1").watched}
    assert names == {"linear_1"}
    names = {p.name for p in calibrate(model, [torch.ones(2, 3)], watch="linear*").watched}
    assert names == {"linear", "linear_1"}
    with pytest.raises(
        CalibrationError, match=r"'nothing'; there are input_1, linear \(0\), linear_1"
    ):
        calibrate(model, [torch.ones(2, 3)], watch="nothing")


def test_plots_need_something_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = calibrate(dynamic_conv(), [image(-1, 1)])
    with pytest.raises(CalibrationError, match="pass watch="):
        summary.plot_watch(tmp_path / "watch.png")
    watched = calibrate(dynamic_conv(), [image(-1, 1)], watch="x")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"custom-quantizer\[plot\]"):
        watched.plot_watch(tmp_path / "watch.png")
    assert not list(tmp_path.iterdir())


# -- going on after an interruption ----------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted(data: list[Tensor], after: int) -> Iterator[Tensor]:
    yield from data[:after]
    raise Interrupted


def qparams(model: GraphModule) -> list[tuple[float, int]]:
    observers = [m for m in model.modules() if isinstance(m, ActivationObserver)]
    return [(m.qparams().scale, m.qparams().zero_point) for m in observers]


OBSERVERS = ["minmax", "percentile", "histogram", "entropy", "moving_average"]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(
    ("graph_batch", "size"), slow_but([(4, 3)], [(4, 3), (4, 4), ("dynamic", 20)])
)
def test_an_interrupted_calibration_goes_on(
    tmp_path: Path, observer: str, graph_batch: Any, size: int
) -> None:
    """Interrupted twice, in the middle of samples that wait for a batch; nothing differs."""
    data = list(torch.randn(6 * size, 3).cumsum(0).split(size))
    dynamic = ({0: BATCH},) if graph_batch == "dynamic" else None
    example = torch.zeros(2 if dynamic else graph_batch, 3)

    def make() -> GraphModule:
        torch.manual_seed(0)
        program = torch.export.export(nn.Linear(3, 2).eval(), (example,), dynamic_shapes=dynamic)
        quantizer = IntegerQuantizer().set_global(scheme("a8w8", observer=observer))
        return prepare_pt2e(program.module(), quantizer)

    whole = make()
    expected = calibrate(whole, data)
    path = tmp_path / "calibration.safetensors"
    for after in (3, 5):
        with pytest.raises(Interrupted):
            calibrate(make(), interrupted(data, after), checkpoint=path, checkpoint_every=1)
    model = make()
    calls: list[int] = []
    model.get_submodule("activation_post_process_0").register_forward_pre_hook(
        lambda _module, args: calls.append(len(args[0]))
    )
    summary = calibrate(model, data, checkpoint=path, checkpoint_every=1)
    assert summary == expected
    assert summary.tensors == expected.tensors
    assert summary.resumed == expected.samples - sum(calls) > 0
    assert qparams(model) == qparams(whole)
    assert ranges(model) == ranges(whole)
    # Once more: all data were seen.
    again = make()
    assert calibrate(again, data, checkpoint=path) == expected
    assert ranges(again) == ranges(whole)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
from test_calibration import IMAGES, seeded_conv
from custom_quantizer.calibration.run import calibrate

def data():
    for index, image in enumerate(IMAGES.split(2)):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield image

calibrate(seeded_conv(), data(), checkpoint={path!r}, checkpoint_every=2)
"""


def seeded_conv() -> GraphModule:
    torch.manual_seed(0)
    return dynamic_conv()


@pytest.mark.slow
def test_a_killed_process_goes_on_in_another(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    model, expected = seeded_conv(), seeded_conv()
    whole = calibrate(expected, IMAGES.split(2))
    summary = calibrate(model, IMAGES.split(2), checkpoint=path)
    assert summary.resumed == 12
    assert (summary, summary.tensors) == (whole, whole.tensors)
    assert (qparams(model), ranges(model)) == (qparams(expected), ranges(expected))


def test_observers_of_torchao_resume_too(tmp_path: Path) -> None:
    """Those of a stock flow: per-channel weights, a histogram that changes its range."""
    torch.manual_seed(0)
    program = torch.export.export(Conv().eval(), (IMAGES[:8],))
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(True))
    prepared = prepare_pt2e(program.module(), quantizer)

    def make() -> GraphModule:
        return copy.deepcopy(prepared)

    data = [CHUNKS[0], CHUNKS[1] * 3, CHUNKS[2] * 10]
    path = tmp_path / "calibration.safetensors"
    with pytest.raises(Interrupted):
        calibrate(make(), interrupted(data, 2), checkpoint=path, checkpoint_every=1)
    model, expected = make(), make()
    whole = calibrate(expected, data)
    assert calibrate(model, data, checkpoint=path).resumed == 16
    assert [tensor.name for tensor in whole.tensors] == ["x", "relu"]
    converted, other = convert_pt2e(model), convert_pt2e(expected)
    assert converted.code == other.code
    assert torch.equal(converted(IMAGES[:8]), other(IMAGES[:8]))


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    calibrate(seeded_conv(), CHUNKS, checkpoint=path)
    torch.manual_seed(1)
    other = dynamic_conv()
    with pytest.raises(CalibrationError, match="of another model"):
        calibrate(other, CHUNKS, checkpoint=path)
    with pytest.raises(CalibrationError, match="begun with other data"):
        calibrate(seeded_conv(), CHUNKS[::-1], checkpoint=path)
    with pytest.raises(CalibrationError, match="has seen 24 samples, but the data and limit= give"):
        calibrate(seeded_conv(), CHUNKS[:2], checkpoint=path)
    # A limit is no other data: calibration goes on behind it.
    part = tmp_path / "part.safetensors"
    assert calibrate(seeded_conv(), CHUNKS, checkpoint=part, limit=5).samples == 5
    rest = calibrate(seeded_conv(), CHUNKS, checkpoint=part)
    assert (rest.samples, rest.resumed) == (24, 5)
    # More data of the same kind are added.
    assert calibrate(seeded_conv(), [*CHUNKS, *CHUNKS], checkpoint=path).resumed == 24
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match="is damaged"):
        calibrate(seeded_conv(), CHUNKS, checkpoint=path)
    path.write_text("hello")
    with pytest.raises(CalibrationError, match="is no checkpoint"):
        calibrate(seeded_conv(), CHUNKS, checkpoint=path)
    with pytest.raises(InputError, match="does not exist"):
        calibrate(seeded_conv(), CHUNKS, checkpoint=tmp_path / "no" / "file")
    with pytest.raises(CalibrationError, match="from 1"):
        calibrate(seeded_conv(), CHUNKS, checkpoint=path, checkpoint_every=0)
