"""The solver against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_quantizer.analysis.allocation.solver import (
    Option,
    Problem,
    Tensor,
    least_cost,
    solve_problem,
)

FORMATS = 2

options = st.builds(
    lambda a, loss, bits, time: Option(a, loss, {"bits": bits, "time": time}),
    st.integers(0, FORMATS - 1),
    st.integers(0, 1000),
    st.integers(0, 50),
    st.integers(0, 50),
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    count = draw(st.integers(1, 5))
    blocks = tuple(draw(st.integers(0, 2)) for _ in range(count))
    numbers = st.lists(st.sampled_from(blocks), min_size=1, unique=True).map(tuple)
    losses = st.tuples(*[st.integers(0, 1000)] * FORMATS)
    return Problem(
        tuple(tuple(draw(st.lists(options, min_size=1, max_size=3))) for _ in range(count)),
        blocks,
        tuple(draw(st.lists(st.builds(Tensor, numbers, losses), max_size=3))),
    )


def every_choice(problem: Problem) -> Iterator[tuple[int, ...]]:
    """All that give each block one format."""
    for chosen in itertools.product(*(range(len(o)) for o in problem.options)):
        formats: dict[int, set[int]] = {}
        for given_, block, i in zip(problem.options, problem.blocks, chosen, strict=True):
            formats.setdefault(block, set()).add(given_[i].activation)
        if all(len(found) == 1 for found in formats.values()):
            yield chosen


@given(problems(), st.integers(0, 200), st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_the_choice_is_the_best_of_all(problem: Problem, bits: int, time: int) -> None:
    limits = {"bits": bits, "time": time}
    allowed = [
        problem.loss(chosen)
        for chosen in every_choice(problem)
        if all(problem.cost(chosen, name) <= limit for name, limit in limits.items())
    ]
    found = solve_problem(problem, limits)
    if found is None:
        assert not allowed
        return
    assert found in set(every_choice(problem))
    assert problem.cost(found, "bits") <= bits
    assert problem.cost(found, "time") <= time
    assert problem.loss(found) == min(allowed)


@given(problems())
@settings(deadline=None, max_examples=30)
def test_the_least_cost_is_the_least_of_all(problem: Problem) -> None:
    costs = [problem.cost(chosen, "bits") for chosen in every_choice(problem)]
    assert least_cost(problem, "bits") == min(costs, default=math.inf)


def weights(*costs: int) -> Problem:
    """Layers that may keep their cost, or halve it for a loss of 1 to n."""
    return Problem(
        tuple(
            (Option(0, 0.0, {"bits": c}), Option(0, 1.0 + i, {"bits": c // 2}))
            for i, c in enumerate(costs)
        ),
        tuple(range(len(costs))),
    )


@pytest.mark.parametrize("large", [10**6, 10**9, 10**12])
def test_a_budget_is_kept_to_the_last_bit(large: int) -> None:
    """One bit of 10**12 is far below what the solver tells apart by itself."""
    problem = weights(2 * large, 2 * large + 2)
    exact = 3 * large + 2  # the first halved
    assert solve_problem(problem, {"bits": exact}) == (1, 0)
    assert solve_problem(problem, {"bits": exact - 1}) == (0, 1)
    assert solve_problem(problem, {"bits": 3 * large}) == (1, 1)


def test_losses_of_very_different_size_are_told_apart() -> None:
    small = Option(0, 1e-9, {"bits": 1}), Option(0, 2e-9, {"bits": 1})
    large = Option(0, 1.0, {"bits": 2}), Option(0, 2.0, {"bits": 1})
    assert solve_problem(Problem((small, large), (0, 1)), {"bits": 3}) == (0, 0)


def test_a_tensor_is_as_good_as_the_coarsest_of_its_blocks() -> None:
    """One coarse block spoils the tensor already; then the other may as well be coarse."""
    unit = Option(0, 0.0, {"bits": 8}), Option(1, 1.0, {"bits": 4})
    problem = Problem((unit, unit), (0, 1), (Tensor((0, 1), (0.0, 10.0)),))
    assert problem.loss((0, 1)) == 11.0
    assert problem.loss((1, 1)) == 12.0
    assert solve_problem(problem, {"bits": 16}) == (0, 0)
    assert solve_problem(problem, {"bits": 8}) == (1, 1)


def test_a_block_has_one_format() -> None:
    unit = Option(0, 0.0, {"bits": 8}), Option(1, 1.0, {"bits": 4})
    other = Option(0, 0.0, {"bits": 8}), Option(1, 50.0, {"bits": 4})
    apart, joined = Problem((unit, other), (0, 1)), Problem((unit, other), (0, 0))
    assert solve_problem(apart, {"bits": 12}) == (1, 0)
    assert solve_problem(joined, {"bits": 12}) == (1, 1)
