from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.flow import small_images, small_labels, small_model, small_result
from torch import Tensor

from custom_quantizer.errors import InputError
from custom_quantizer.evaluation import Evaluation, ModelScore, evaluate
from custom_quantizer.integer import integer_reference
from custom_quantizer.sources import DataSource
from custom_quantizer.xnnpack import LoweredProgram, load_program


def one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes, 4).float()


def column(number: int) -> Any:
    """A model whose class is a column of its input."""
    return lambda x: one_hot(x[:, number])


@given(
    rows=st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=30),
    batch=st.integers(1, 10),
)
@settings(deadline=None)
def test_counts(rows: list[tuple[int, int, int]], batch: int) -> None:
    x = torch.tensor(rows)
    data = list(zip(x.split(batch), x[:, 0].split(batch), strict=True))
    scores = evaluate({"b": column(1), "a": column(0), "c": column(2)}, data).scores
    assert [score.name for score in scores] == ["b", "a", "c"]
    for score, number in zip(scores, (1, 0, 2), strict=True):
        assert score.samples == len(rows)
        assert score.correct == sum(row[number] == row[0] for row in rows)
        assert score.agreeing == sum(row[number] == row[1] for row in rows)
        assert score.top1 == score.correct / len(rows)


def program() -> LoweredProgram:
    lowered = small_result().lowered
    assert lowered is not None
    return lowered


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 30])
def test_static_programs_get_batches_of_their_size(tmp_path: Path, batch: int) -> None:
    """The program takes 4 at a time, 30 is no multiple of it, and no sample counts twice."""
    result = small_result()
    path = program().save(tmp_path / "small.pte")
    models = {
        "float": small_model(),
        "converted": result.converted,
        "reference": integer_reference(result.converted),
        "lowered": program(),
        "run": program().run,
        "stored": load_program(path).run,
    }
    labels = small_labels(30)
    source = DataSource.from_tensors(small_images(30), labels, batch_size=batch)
    evaluation = evaluate(models, source)
    assert evaluation["float"] == ModelScore("float", 30, 30, 30)
    # Independently: the same samples one batch of 4 after the other, the last one filled up.
    images = torch.cat((small_images(30), small_images(30)[:2])).split(4)
    expected = torch.cat([program().run(x) for x in images])[:30].argmax(1)
    correct = int((expected == labels).sum())
    assert correct > 0
    for name in ("reference", "lowered", "run", "stored"):
        assert (evaluation[name].samples, evaluation[name].correct) == (30, correct)


def test_without_labels_only_agreement_is_counted() -> None:
    x = torch.tensor([[0, 1], [2, 2], [3, 3]])
    evaluation = evaluate({"a": column(0), "b": column(1)}, [x])
    assert evaluation["b"] == ModelScore("b", 3, None, 2)
    assert evaluation["b"].top1 is None
    assert str(evaluation).splitlines()[-1].split() == ["b", "-", "-", "2", "/", "3"]
    assert json.loads(evaluation.to_json())["models"][1]["top1"] is None


def test_table_and_json() -> None:
    evaluation = Evaluation(
        (ModelScore("float", 1200, 1000, 1200), ModelScore("a8w8", 1200, 999, 1100))
    )
    assert str(evaluation).splitlines() == [
        "model        correct   top-1  agrees with float",
        "float  1,000 / 1,200  83.33%      1,200 / 1,200",
        "a8w8     999 / 1,200  83.25%      1,100 / 1,200",
    ]
    assert json.loads(evaluation.to_json())["models"][1] == {
        "name": "a8w8",
        "samples": 1200,
        "correct": 999,
        "top1": 0.8325,
        "agreeing": 1100,
        "agreement": 1100 / 1200,
    }
    with pytest.raises(InputError, match="no model 'x' was evaluated; there are float, a8w8"):
        evaluation["x"]


def test_inputs_may_be_several() -> None:
    a, b = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 2], [1, 3]])
    models = {"sum": lambda a, b: one_hot((a + b)[:, 1].clamp_max(3))}
    assert evaluate(models, [((a, b), torch.tensor([2, 0]))])["sum"].correct == 1
    # The first tensor of what a model returns counts.
    nested = {"x": lambda x: {"scores": one_hot(x[:, 0]), "more": x}}
    assert evaluate(nested, [(a, torch.tensor([0, 1]))])["x"].correct == 2


IMAGES = torch.tensor([[0], [1]])
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("models", "data", "message"),
    [
        ({}, [IMAGES], "no model"),
        ({"a": column(0)}, [], "no sample"),
        ({"a": column(0)}, [IMAGES[:0]], "no sample"),
        ({"a": column(0)}, [(IMAGES, LABELS), IMAGES], "some batches have labels"),
        ({"a": column(0)}, [(IMAGES, LABELS[:1])], "different numbers of samples: 2, 1"),
        ({"a": column(0)}, ["x"], "not str"),
        ({"a": lambda x: x[:, 0]}, [IMAGES], r"a returns scores of shape \(2,\)"),
        ({"a": lambda x: one_hot(x[:1, 0])}, [IMAGES], "a returns no tensor of scores"),
        ({"a": lambda x: None}, [IMAGES], "a returns no tensor of scores"),
    ],
)
def test_errors(models: Any, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(models, data)
