"""The best choice under budgets, as an integer program that HiGHS solves.

Each unit takes one of its options, which has a loss and costs. Units of a block take options with
one format of activations. A tensor is as good as the coarsest format of the blocks that make or
read it. Minimize the sum of the losses of all options and tensors; keep every cost within its
limit.

References:
    Q. Huangfu, J. A. J. Hall. Parallelizing the dual revised simplex method. Mathematical
    Programming Computation 10, 2018. (HiGHS, by ``scipy.optimize.milp``)
    Z. Yao et al. HAWQ-V3: dyadic neural network quantization. ICML 2021.
    https://arxiv.org/abs/2011.10680 (bit-widths by an integer program)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

__all__ = ["Option", "Problem", "Tensor", "least_cost", "solve_problem"]


@dataclass(frozen=True)
class Option:
    """One scheme for one unit.

    Attributes:
        activation: which format of activations it means.
        loss: of the weight.
        costs: by name, not negative.
    """

    activation: int
    loss: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Tensor:
    """Activations that are the same integers.

    Attributes:
        blocks: that make or read them.
        losses: for each format of activations.
    """

    blocks: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Problem:
    """All that is to be decided.

    Attributes:
        options: of each unit, at least one.
        blocks: of each unit.
        tensors: whose format follows.
    """

    options: tuple[tuple[Option, ...], ...]
    blocks: tuple[int, ...]
    tensors: tuple[Tensor, ...] = ()

    def cost(self, chosen: Sequence[int], name: str) -> float:
        """One cost of a choice: of integers, exactly their sum."""
        picked = (options[i] for options, i in zip(self.options, chosen, strict=True))
        return sum(option.costs[name] for option in picked)

    def loss(self, chosen: Sequence[int]) -> float:
        """What is minimized."""
        formats: dict[int, int] = {}
        losses = []
        for options, block, i in zip(self.options, self.blocks, chosen, strict=True):
            formats[block] = options[i].activation
            losses.append(options[i].loss)
        losses += [
            max(tensor.losses[formats[block]] for block in tensor.blocks) for tensor in self.tensors
        ]
        return math.fsum(losses)


_CUTS = 10
_TOLERANCE = 2e-6
"""HiGHS lets a row be overstepped by 1e-6; rows here are divided by their largest cost."""


def solve_problem(problem: Problem, limits: Mapping[str, float]) -> tuple[int, ...] | None:
    """The choice with the least loss that keeps all limits; ``None``: there is none.

    Limits are kept exactly. A choice that oversteps one by no more than the solver's tolerance is
    excluded by name; after ten such, the limit itself is lowered by that tolerance.

    Args:
        problem: what to decide.
        limits: most of each cost.

    Returns:
        The option of each unit.
    """
    program = _Program(problem)
    limits = dict(limits)
    allowed = dict(limits)
    for attempt in range(2 * _CUTS):
        chosen = program.minimize(allowed)
        if chosen is None:
            return None
        over = [name for name in limits if problem.cost(chosen, name) > limits[name]]
        if not over:
            return chosen
        program.exclude(chosen)
        if attempt >= _CUTS:
            for name in over:
                allowed[name] = limits[name] - _TOLERANCE * program.largest(name)
    return None


def least_cost(problem: Problem, name: str) -> float:
    """The least that a cost can be."""
    priced = Problem(
        tuple(
            tuple(Option(o.activation, o.costs[name], o.costs) for o in options)
            for options in problem.options
        ),
        problem.blocks,
    )
    chosen = _Program(priced).minimize({})
    if chosen is None:  # a block whose units have no format in common
        return math.inf
    return problem.cost(chosen, name)


class _Program:
    """Variables: one for each option (0 or 1), for each block and format, and for each tensor."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._first = np.cumsum([0, *(len(options) for options in problem.options)]).tolist()
        self._options = [option for options in problem.options for option in options]
        known = [1 + option.activation for option in self._options]
        self._formats = max(known + [len(tensor.losses) for tensor in problem.tensors])
        count = len(self._options)
        keys = itertools.product(dict.fromkeys(problem.blocks), range(self._formats))
        self._format_at = {key: count + i for i, key in enumerate(keys)}
        self._tensor_at = count + len(self._format_at)
        self._size = self._tensor_at + len(problem.tensors)
        losses = [o.loss for o in self._options] + [v for t in problem.tensors for v in t.losses]
        # Losses of 1 and less: the solver's tolerances are absolute.
        self._scale = max(map(abs, losses)) or 1.0
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._tie()

    def _tie(self) -> None:
        """One option for each unit, one format for each block, and what tensors lose."""
        problem = self._problem
        for u, (options, block) in enumerate(zip(problem.options, problem.blocks, strict=True)):
            start = self._first[u]
            self._rows.append((dict.fromkeys(range(start, start + len(options)), 1.0), 1.0, 1.0))
            for a in range(self._formats):
                row = {start + i: 1.0 for i, o in enumerate(options) if o.activation == a}
                self._rows.append(({**row, self._format_at[block, a]: -1.0}, 0.0, 0.0))
        for t, tensor in enumerate(problem.tensors):
            for block in tensor.blocks:
                losses = enumerate(tensor.losses)
                row = {self._format_at[block, a]: -loss / self._scale for a, loss in losses}
                self._rows.append(({**row, self._tensor_at + t: 1.0}, 0.0, math.inf))

    def largest(self, name: str) -> float:
        """The largest cost of an option."""
        return max(option.costs[name] for option in self._options) or 1.0

    def exclude(self, chosen: Sequence[int]) -> None:
        """Never find this choice again."""
        row = {self._first[u] + i: 1.0 for u, i in enumerate(chosen)}
        self._rows.append((row, -math.inf, len(chosen) - 1.0))

    def minimize(self, limits: Mapping[str, float]) -> tuple[int, ...] | None:
        """Solve it with these limits; they are kept up to the solver's tolerance."""
        objective = np.zeros(self._size)
        objective[: len(self._options)] = [o.loss / self._scale for o in self._options]
        objective[self._tensor_at :] = 1.0
        rows = list(self._rows)
        for name, limit in limits.items():
            unit = self.largest(name)
            costs = {i: o.costs[name] / unit for i, o in enumerate(self._options)}
            rows.append((costs, -math.inf, limit / unit))
        entries = [(r, c, v) for r, (row, _, _) in enumerate(rows) for c, v in row.items()]
        r, c, v = zip(*entries, strict=True)
        matrix = coo_array((v, (r, c)), shape=(len(rows), self._size)).tocsr()
        is_tensor = np.arange(self._size) >= self._tensor_at
        found = milp(
            objective,
            integrality=np.where(is_tensor, 0, 1),
            bounds=Bounds(np.where(is_tensor, -np.inf, 0), np.where(is_tensor, np.inf, 1)),
            constraints=LinearConstraint(
                matrix, [low for _, low, _ in rows], [h for *_, h in rows]
            ),
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        ends = itertools.pairwise(self._first)
        return tuple(int(np.argmax(found.x[start:stop])) for start, stop in ends)
