"""Models that are called with tuples, dictionaries and keywords, wherever data are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

import custom_quantizer as cq
from custom_quantizer.analysis.allocation.samples import Samples
from custom_quantizer.training import qat


class Net(nn.Module):
    """Two inputs of one shape, so that an exchange shows in nothing but the values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x - 0.25 * y)


class Pair(Net):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.compute(*pair)


class Named(Net):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.compute(batch["x"], batch["y"])


class ByKeyword(Net):
    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return self.compute(x, y)


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, generator=generator), 3 * torch.randn(4, 4, generator=generator)


def forms(kind: str, seed: int) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]:
    """A model, what it is called with, and a batch of data that is the same, in another order."""
    x, y = tensors(seed)
    if kind == "pair":
        return Pair(), ((x, y),), {}, ((x, y),)
    if kind == "named":
        return Named(), ({"x": x, "y": y},), {}, {"y": y, "x": x}
    return ByKeyword(), (x,), {"y": y}, {"y": y, "x": x}


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("kind", ["pair", "named", "keyword"])
def test_the_model_gets_what_it_was_captured_with(kind: str) -> None:
    model, args, kwargs, _ = forms(kind, 0)
    model.eval()
    exported = torch.export.export(model, args, kwargs)
    data = [(forms(kind, seed)[3], LABELS) for seed in range(4)]
    result = cq.quantize(exported, (*args, *kwargs.values()), data, progress=False)
    assert result.lowered is not None
    # 40 dB where inputs are those of the model; exchanged ones leave nothing.
    calls = [batch for batch, _ in data]
    verified = cq.verify(result.converted, result.lowered, calls, float_model=model)
    assert verified.bit_exact
    assert min(output.sqnr_float or 0.0 for output in verified.outputs) > 30
    reference = cq.integer_reference(result.converted)
    with torch.no_grad():
        wanted = reference(*args, **kwargs)
    assert torch.equal(result.lowered.run(*args, **kwargs), wanted)

    given = [forms(kind, seed)[1:3] for seed in range(4)]
    answers = torch.cat([model(*args, **kwargs).argmax(1) for args, kwargs in given])
    models = {
        "float": model,
        "graph": result.converted,
        "reference": reference,
        "run": result.lowered.run,
    }
    scored = cq.evaluate(
        models,
        [(batch, answers[4 * i : 4 * i + 4]) for i, batch in enumerate(calls)],
    )
    assert scored["float"].correct == 16
    assert all(score.correct is not None and score.correct >= 14 for score in scored.scores)
    unlabelled = cq.evaluate({"float": model, "run": result.lowered.run}, calls)
    assert unlabelled["run"].agreeing == scored["run"].agreeing

    found = Samples.collect(exported.module(), data, 16)
    assert found.has_classes
    assert torch.equal(found.batches[0][0][0], tensors(0)[0])
    assert torch.equal(found.batches[0][0][1], tensors(0)[1])


def test_a_float_model_alone_gets_dictionaries_by_name_or_whole() -> None:
    x, y = tensors(0)

    class TwoInputs(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.compute(x, y)

    models = {"whole": Named(), "names": TwoInputs()}
    scored = cq.evaluate(models, [{"y": y, "x": x}])
    assert scored["names"].agreeing == 4


def test_two_inputs_of_which_one_is_integers_are_no_labels() -> None:
    """What the graph takes decides."""

    class Tagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(5, 4)

        def forward(self, x: Tensor, tags: Tensor) -> Tensor:
            return x + self.rows(tags)

    x = torch.randn(4, 4)
    graph = torch.export.export(Tagged(), (x, LABELS)).module()
    assert Samples.collect(graph, [(x, LABELS)], 4).batches[0][1] is None
    found = Samples.collect(graph, [((x, LABELS), LABELS)], 4)
    assert found.batches[0][1] is not None
    assert cq.evaluate({"graph": graph}, [(x, LABELS)])["graph"].samples == 4


class Scored(Net):
    """As models of ``transformers``: with labels it returns its loss, too."""

    def forward(self, x: Tensor, y: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.compute(x, y)
        return scores if labels is None else (scores.logsumexp(1).sum(), scores)


@pytest.mark.parametrize("kind", ["arguments", "a dictionary"])
@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_labels_in_a_dictionary_of_inputs(kind: str, key: str) -> None:
    """They are labels wherever the model takes no input of that name."""
    x, y = tensors(0)
    model = (Scored() if kind == "arguments" else Named()).eval()
    args = (x, y) if kind == "arguments" else ({"x": x, "y": y},)
    graph = torch.export.export(model, args).module()
    answers = model(*args).argmax(1)
    answers[0] = (answers[0] + 1) % 3
    data = [{key: answers, "y": y, "x": x} | ({"y": y} if key == "y" else {})]
    are_labels = key != "y"
    for models in ({"float": model}, {"float": model, "graph": graph}):
        for score in cq.evaluate(models, data).scores:
            assert score.correct == (3 if are_labels else None)
    measured = cq.evaluate({"graph": graph}, data, metrics=lambda _, given: given is not None)
    assert measured["graph"].metrics[0].value == are_labels
    found = Samples.collect(graph, data, 4)
    assert found.has_classes == are_labels
    assert torch.equal(found.batches[0][0][1], y)


def test_a_model_that_was_captured_with_labels_takes_them() -> None:
    x, y = tensors(0)
    graph = torch.export.export(Scored().eval(), (x, y, LABELS)).module()
    found = Samples.collect(graph, [{"labels": LABELS, "x": x, "y": y}], 4)
    assert found.batches[0][1] is None
    assert torch.equal(found.batches[0][0][2], LABELS)


def test_training_takes_labels_in_a_dictionary_of_inputs() -> None:
    x, y = tensors(0)
    losses = []
    for batch in (((x, y), LABELS), {"labels": LABELS, "y": y, "x": x}):
        captured = torch.export.export(Scored(), (x, y)).module()
        prepared = prepare_qat_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
        (metrics,) = qat.finetune(prepared, [batch], epochs=1, validation=[batch]).epochs
        losses.append((metrics.loss, metrics.validation_accuracy))
    assert losses[0] == losses[1]


def test_a_program_from_a_file_does_not_know_the_order_of_keys(tmp_path: Any) -> None:
    model, args, _, batch = forms("named", 0)
    result = cq.quantize(model.eval(), args, [batch], progress=False)
    path = result.save(tmp_path / "net.pte").program
    assert path is not None
    stored = cq.load_program(path)
    with pytest.raises(cq.InputError, match=r"a \.pte file does not say how its inputs are nested"):
        cq.evaluate({"stored": stored.run}, [batch])
    assert result.lowered is not None
    scored = cq.evaluate({"graph": result.converted, "stored": stored.run}, [batch])
    assert scored["stored"].agreeing == 4
