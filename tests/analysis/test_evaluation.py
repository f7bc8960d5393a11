from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.flow import small_images, small_labels, small_model, small_result
from torch import Tensor

from custom_quantizer.analysis.evaluation import Evaluation, ModelScore, evaluate
from custom_quantizer.analysis.paired import PairedCounts, compare_counts, compare_values
from custom_quantizer.app.data import DataSource
from custom_quantizer.backends.xnnpack import LoweredProgram, load_program
from custom_quantizer.errors import InputError
from custom_quantizer.reference import integer_reference


def one_hot(classes: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(classes, 4).float()


def counts(evaluation: Evaluation, name: str) -> tuple[int, int | None, int | None]:
    score = evaluation[name]
    return score.samples, score.correct, score.agreeing


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
    assert counts(evaluation, "float") == (30, 30, 30)
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
    assert counts(evaluation, "b") == (3, None, 2)
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
    document = json.loads(evaluation.to_json())
    assert (document["kind"], document["schema_version"]) == ("evaluation", 1)
    assert document["models"][1] == {
        "name": "a8w8",
        "samples": 1200,
        "correct": 999,
        "top1": 0.8325,
        "top1_interval": [pytest.approx(0.810318, abs=1e-6), pytest.approx(0.852560, abs=1e-6)],
        "correct5": None,
        "top5": None,
        "agreeing": 1100,
        "agreement": 1100 / 1200,
        "tied": 0,
        "slices": [],
        "against_first": None,
        "metrics": [],
    }
    with pytest.raises(InputError, match="no model 'x' was evaluated; there are float, a8w8"):
        evaluation["x"]


def test_one_tensor_or_dictionary_is_one_batch() -> None:
    for data in (IMAGES, {"x": IMAGES}):
        assert evaluate({"a": column(0)}, data)["a"].samples == len(IMAGES)


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
        ([column(0)], [IMAGES], "a dictionary of models by name, not list"),
        ({"a": "net.pte"}, [IMAGES], "model a is a str, not a function"),
        ({"a": column(0)}, 3, "an iterable of batches, not int"),
        ({"a": column(0)}, "data.pt", "not str; read files with custom_quantizer.load_data"),
        ({"a": column(0)}, (IMAGES, LABELS), r"in a list: \[\(inputs, labels\)\]"),
        ({"a": column(0)}, [], "no sample"),
        ({"a": column(0)}, [IMAGES[:0]], "no sample"),
        ({"a": column(0)}, [(IMAGES, LABELS), IMAGES], "some batches have labels"),
        ({"a": column(0)}, [(IMAGES, LABELS[:1])], "different numbers of samples: 2, 1"),
        ({"a": column(0)}, ["x"], "not str"),
        ({"a": lambda x: x[:, 0]}, [IMAGES], r"a returns scores of shape \(2,\)"),
        ({"a": column(0)}, [(IMAGES, LABELS + 3)], "labels go from 3 to 4, but a knows 4 classes"),
        ({"a": column(0)}, [(IMAGES, LABELS - 1)], "labels go from -1 to 0"),
        ({"a": lambda x: x * torch.nan}, [IMAGES], "a returns NaN for 2 of 2 samples"),
        ({"a": lambda x: one_hot(x[:1, 0])}, [IMAGES], "a returns no tensor of scores"),
        ({"a": lambda x: None}, [IMAGES], "a returns no tensor of scores"),
    ],
)
def test_errors(models: Any, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(models, data)


# -- top-5, ties, slices ---------------------------------------------------------------------------


@given(
    scores=st.lists(st.lists(st.integers(0, 4), min_size=8, max_size=8), min_size=1, max_size=20),
    data=st.data(),
)
@settings(deadline=None)
def test_top1_top5_and_ties(scores: list[list[int]], data: st.DataObject) -> None:
    """Equal scores are ranked in the order of the classes, as argmax does."""
    labels = data.draw(st.lists(st.integers(0, 7), min_size=len(scores), max_size=len(scores)))
    x = torch.tensor(scores, dtype=torch.float32)
    score = evaluate({"m": lambda x: x}, [(x, torch.tensor(labels))])["m"]
    ranked = [sorted(range(8), key=lambda c, row=row: (-row[c], c)) for row in scores]
    assert score.correct == sum(o[0] == y for o, y in zip(ranked, labels, strict=True))
    assert score.correct5 == sum(y in o[:5] for o, y in zip(ranked, labels, strict=True))
    assert score.tied == sum(row.count(max(row)) > 1 for row in scores)


def test_top5_needs_more_than_five_classes() -> None:
    x = torch.eye(5)
    score = evaluate({"m": lambda x: x}, [(x, torch.arange(5))])["m"]
    assert (score.correct, score.correct5, score.top5) == (5, None, None)


@pytest.mark.parametrize("batch", [1, 4, 7, 10])
def test_slices_are_disjoint_and_do_not_depend_on_batches(batch: int) -> None:
    x = torch.tensor(
        [[0, 0], [0, 1], [1, 1], [1, 1], [2, 0], [2, 2], [3, 3], [0, 0], [1, 2], [2, 2]]
    )
    data = list(zip(x.split(batch), x[:, 0].split(batch), strict=True))
    score = evaluate({"m": column(1)}, data, slices=3)["m"]
    # Samples 0 3 6 9, 1 4 7 and 2 5 8; wrong are 1, 4 and 8.
    assert score.slices == (1.0, 1 / 3, 2 / 3)
    with pytest.raises(InputError, match="10 samples do not make 11 slices"):
        evaluate({"m": column(1)}, data, slices=11)
    with pytest.raises(InputError, match="at least one slice"):
        evaluate({"m": column(1)}, data, slices=0)


# -- the difference and its uncertainty ------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "low", "high", "p_value"),
    [
        # Armitage and Berry's sputum media, as StatsDirect reports it.
        (PairedCounts(20, 2, 12, 16), 0.056156, 0.329207, 0.0129),
        # Table II of Newcombe (1998), method 10.
        (PairedCounts(36, 2, 12, 0), 0.0569, 0.3404, 0.0129),
        (PairedCounts(1, 1, 97, 1), 0.8737, 0.9850, 0.0),
    ],
)
def test_published_intervals(counts: PairedCounts, low: float, high: float, p_value: float) -> None:
    found = compare_counts(counts)
    digits = 6 if low == 0.056156 else 4
    assert (round(found.low, digits), round(found.high, digits)) == (low, high)
    assert round(found.p_value, 4) == p_value


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(any))
@settings(deadline=None)
def test_intervals_and_p_values(cells: tuple[int, int, int, int]) -> None:
    both, f, s, neither = cells
    found = compare_counts(PairedCounts(both, f, s, neither))
    assert -1 <= found.low <= found.difference <= found.high <= 1
    assert found.low < found.high
    # Two sided binomial test at 1/2, in integers.
    n, k = f + s, min(f, s)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    expected = min(1.0, 2 * tail / 2**n)
    assert math.isclose(found.p_value, expected, rel_tol=1e-9)
    # Exchanging the models changes the sign and nothing else.
    other = compare_counts(PairedCounts(both, s, f, neither))
    assert math.isclose(other.low, -found.high, abs_tol=1e-12)
    assert other.p_value == found.p_value


@pytest.mark.slow
def test_coverage_of_the_interval() -> None:
    """1,500 test sets of 40 samples each: 95 % is approximate, but here never below 92 %."""
    n = 40
    for both, f, s in [(0.8, 0.05, 0.05), (0.9, 0.02, 0.05), (0.6, 0.15, 0.05), (0.96, 0.01, 0.01)]:
        p = (both, f, s, 1 - both - f - s)
        generator = torch.Generator().manual_seed(0)
        draws = torch.multinomial(torch.tensor(p), n * 1500, True, generator=generator)
        tables = [torch.bincount(draw, minlength=4).tolist() for draw in draws.reshape(1500, n)]
        covered = 0
        for cells, times in Counter(map(tuple, tables)).items():
            found = compare_counts(PairedCounts(*cells))
            covered += times * (found.low <= s - f <= found.high)
        assert covered / 1500 > 0.92


def test_noise_and_no_noise_in_words() -> None:
    labels = torch.zeros(100, dtype=torch.int64)
    x = torch.zeros(100, 4, dtype=torch.int64)
    x[:3, 1] = 1  # three samples less: noise
    x[:30, 2] = 1  # thirty: none
    models = {"float": column(0), "a": column(1), "b": column(2), "c": column(3)}
    evaluation = evaluate(models, [(x, labels)])
    assert [evaluation[name].against_first is None for name in models] == [True] + [False] * 3
    a, b, c = evaluation.conclusions
    assert a.startswith("The difference of a to float, -3.00 points, cannot be told from noise: ")
    assert "0 samples are right only in a, 3 only in float" in a
    assert "exact test p = 0.25" in a
    assert b.startswith("The difference of b to float, -30.00 points, is larger than noise")
    assert c.startswith("c and float are right on exactly the same of 100 samples")
    table = str(evaluation).splitlines()
    assert table[0].split()[-6:] == ["less", "float", "95", "%", "interval", "p"]
    assert table[2].split()[-5:] == ["-3.00", "-8.45", "to", "+1.19", "0.25"]
    document = json.loads(evaluation.to_json())
    assert document["models"][1]["against_first"]["counts"]["only_first"] == 3
    assert document["models"][2]["against_first"]["is_noise"] is False
    assert document["conclusions"] == [a, b, c]


def test_mean_of_differences() -> None:
    # Student's sleep data (1908): drug 2 less drug 1.
    found = compare_values([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (round(found.low, 6), round(found.high, 6)) == (0.700114, 2.459886)
    assert round(found.p_value, 6) == 0.002833
    assert compare_values([0.0, 0.0]).is_noise
    alone = compare_values([3.0])
    assert (alone.low, alone.high, alone.is_noise) == (-math.inf, math.inf, True)


# -- metrics of the user ---------------------------------------------------------------------------


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    return ((outputs - labels) ** 2).mean(dim=(1, 2))


def test_metric_per_sample() -> None:
    x = torch.arange(24.0).reshape(6, 2, 2)
    data = [(x[:4], x[:4]), (x[4:], x[4:])]
    models = {"exact": lambda x: x, "off": lambda x: x + torch.arange(len(x))[:, None, None]}
    evaluation = evaluate(models, data, metrics=squared_error)
    (score,) = evaluation["off"].metrics
    assert (score.name, score.value) == ("squared_error", (0 + 1 + 4 + 9 + 0 + 1) / 6)
    assert score.against_first is not None
    assert score.against_first == compare_values([0.0, 1.0, 4.0, 9.0, 0.0, 1.0])
    assert evaluation["off"].agreement is None
    assert evaluation["off"].correct is None
    assert "squared_error: the difference of off to exact, +2.5" in evaluation.conclusions[0]
    json.loads(evaluation.to_json())


def test_metrics_get_everything_a_model_returns() -> None:
    x = torch.tensor([[0, 1], [2, 2], [3, 3]])
    seen: list[dict[str, Tensor]] = []

    def right(outputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        seen.append(outputs)
        return outputs["scores"].argmax(1) == labels

    def mean(outputs: dict[str, Tensor], labels: Tensor) -> float:
        return float(outputs["more"].float().mean())

    def both(number: int) -> Any:
        return lambda x: {"scores": one_hot(x[:, number]), "more": x}

    models = {"m": both(0), "n": both(1)}
    evaluation = evaluate(
        models, [(x[:2], x[:2, 0]), (x[2:], x[2:, 0])], metrics={"right": right, "mean": mean}
    )
    assert evaluation["m"].metrics[0].value == 1.0
    found = evaluation["n"].metrics[0].against_first
    assert found is not None
    assert found.counts == PairedCounts(2, 1, 0, 0)
    assert evaluation["n"].metrics[1].against_first is None
    assert math.isclose(evaluation["n"].metrics[1].value, 11 / 6, rel_tol=1e-6)
    assert seen[0]["more"].shape == (2, 2)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda outputs, labels: torch.zeros(3, 2), "returned shape .3, 2. for 2 samples"),
        (lambda outputs, labels: float("nan"), "is not finite"),
    ],
)
def test_bad_metrics(metric: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate({"a": column(0)}, [(IMAGES, LABELS)], metrics={"mine": metric})
