"""What a choice costs, from what the plan says of the backend's kernels.

Four costs are known, each a sum over the ops that can be chosen:

- ``size``: bytes of weights, biases and scales in the program. On XNNPACK a weight of up to 4 bits
  takes half a byte where its kernel packs two of them, and a whole one elsewhere;
- ``weight_bits``: bits of weights, for hardware that stores them densely;
- ``bit_operations``: multiplications per sample, times the bits of both factors;
- ``latency``: the times of the ops, as measured; see :mod:`custom_quantizer.app.latency`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from custom_quantizer.analysis.allocation.choices import (
    Choices,
    Unit,
    activation_label,
    weight_label,
)
from custom_quantizer.analysis.allocation.sensitivity import ALL_ACTIVATIONS, Loss
from custom_quantizer.analysis.allocation.solver import (
    Option,
    Problem,
    Tensor,
    least_cost,
    solve_problem,
)
from custom_quantizer.errors import ConfigError, nearest, some

__all__ = [
    "ACCURACY",
    "COSTS",
    "Latencies",
    "base_costs",
    "check_budget",
    "check_latencies",
    "check_possible",
    "limits_of",
    "make_problem",
    "picked",
]

COSTS = ("size", "weight_bits", "bit_operations", "latency")
"""Keys of a budget that limit a cost."""

ACCURACY = "accuracy"
"""The key that limits the loss instead."""

Latencies = Mapping[str, Mapping[str, float]]
"""Name of an op -> name of a scheme -> time; any unit, the same for all."""


def check_budget(budget: Mapping[str, float]) -> None:
    """Refuse a budget that says nothing.

    Raises:
        ConfigError: it is empty, a key is unknown, or a value is not positive.
    """
    keys = (*COSTS, ACCURACY)
    if not isinstance(budget, Mapping) or not budget:
        raise ConfigError(
            f"budget={budget!r}: say what is limited, such as {{'size': 0.6}}; the keys are "
            f"{', '.join(keys)}"
        )
    for key, value in budget.items():
        if key not in keys:
            raise ConfigError(
                f"budget: unknown key {key!r}{nearest(str(key), keys)}; the keys are "
                f"{', '.join(keys)}"
            )
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            raise ConfigError(f"budget: {key} must be a number above 0, not {value!r}")


def _latency(unit: Unit, name: str, latencies: Latencies) -> float:
    return sum(latencies[op][name] for op in unit.ops)


def check_latencies(choices: Choices, latencies: Latencies) -> None:
    """Refuse a table with gaps.

    Raises:
        ConfigError: which times are missing.
    """
    missing = [
        f"{op} at {name}"
        for unit in choices.units
        for op in unit.ops
        for name in unit.schemes
        if name not in latencies.get(op, {})
    ]
    if missing:
        raise ConfigError(f"latencies: there is no time of {some(missing)}")


def unit_costs(
    choices: Choices, unit: Unit, name: str, latencies: Latencies | None
) -> dict[str, float]:
    """All costs of a unit under a scheme; whole numbers but for the latency."""
    scheme, plan = choices.schemes[name], choices.plans[name]
    activation, weight = scheme.activation.format.bits, scheme.weight.format.bits
    costs: dict[str, float] = {
        "size": sum(plan.op(op).size_bytes for op in unit.ops),
        "weight_bits": unit.parameters * weight,
        "bit_operations": unit.macs * activation * (weight if unit.parameters else activation),
    }
    if latencies is not None:
        costs["latency"] = _latency(unit, name, latencies)
    return costs


def make_problem(
    choices: Choices, measured: Iterable[Loss] = (), latencies: Latencies | None = None
) -> Problem:
    """The decision as numbers; what was not measured loses nothing.

    Raises:
        ConfigError: the table of latencies has gaps.
    """
    if latencies is not None:
        check_latencies(choices, latencies)
    formats = {label: a for a, label in enumerate(choices.activations)}
    losses = {(row.kind, row.name, row.width): row.loss for row in measured}

    def option(unit: Unit, name: str) -> Option:
        scheme = choices.schemes[name]
        loss = 0.0
        if unit.parameters:
            loss = losses.get(("weight", unit.name, weight_label(scheme)), 0.0)
        costs = unit_costs(choices, unit, name, latencies)
        return Option(formats[activation_label(scheme)], loss, costs)

    if len(formats) == 1:
        every = losses.get(("activation", ALL_ACTIVATIONS, choices.activations[0]), 0.0)
        tensors: tuple[Tensor, ...] = (Tensor((choices.units[0].block,), (every,)),)
    else:
        tensors = tuple(
            Tensor(
                group.blocks,
                tuple(losses.get(("activation", group.name, label), 0.0) for label in formats),
            )
            for group in choices.groups
        )
    return Problem(
        tuple(tuple(option(unit, name) for name in unit.schemes) for unit in choices.units),
        tuple(unit.block for unit in choices.units),
        tensors,
    )


def limits_of(budget: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """The most of each cost: up to 1 a share of what ``base`` costs, above that the cost itself.

    Args:
        budget: as the user gave it; accuracy limits no cost.
        base: costs of the most precise scheme everywhere.
    """
    return {
        key: value * base[key] if value <= 1 else value
        for key, value in budget.items()
        if key != ACCURACY
    }


def base_costs(choices: Choices, latencies: Latencies | None) -> dict[str, float]:
    """All costs of the most precise scheme everywhere."""
    units = [unit_costs(choices, unit, choices.base, latencies) for unit in choices.units]
    return {name: sum(costs[name] for costs in units) for name in units[0]}


def check_possible(
    choices: Choices, budget: Mapping[str, float], latencies: Latencies | None
) -> None:
    """Refuse a budget that no choice keeps.

    Raises:
        ConfigError: what the least is; or the table of latencies has gaps.
    """
    problem = make_problem(choices, latencies=latencies)
    base = base_costs(choices, latencies)
    limits = limits_of(budget, base)
    for key, limit in limits.items():
        least = least_cost(problem, key)
        if least > limit:
            whole = base[key] or 1.0
            hint = ""
            if budget[key] > 1:
                hint = "; above 1 a number is the cost itself, not a share"
            if key == "size":
                hint += (
                    "; the backend stores narrow weights of some ops in whole bytes (weight_bits "
                    "counts the bits alone)"
                )
            raise ConfigError(
                f"budget: {key} {limit / whole:.3f} of {choices.base} everywhere is not possible: "
                f"these schemes make at least {least / whole:.3f} ({_number(least)}){hint}; "
                "give more, or schemes with fewer bits"
            )
    if limits and solve_problem(problem, limits) is None:
        named = ", ".join(f"{key} {_number(value)}" for key, value in limits.items())
        raise ConfigError(f"budget: no choice keeps all of it at once ({named})")


def _number(cost: float) -> str:
    """A cost in words: bytes and bits are whole numbers, times of small networks below 1."""
    return f"{cost:,.0f}" if cost >= 100 or cost == int(cost) else f"{cost:.3g}"


def picked(choices: Choices, chosen: Sequence[int]) -> dict[str, str]:
    """Names of units and of their schemes, for the options that a solver chose."""
    return {unit.name: unit.schemes[i] for unit, i in zip(choices.units, chosen, strict=True)}
