"""Times of ops on this machine, for a search under a budget of latency.

With each scheme everywhere the network is lowered and profiled; a time of an op is the one that the
runtime itself notes, in whole microseconds. What stands between ops (quantizing at a border,
calling a delegate) belongs to no op and is not counted, so the sum predicts an order rather than a
number of milliseconds.

Measuring takes a lowering and some seconds for each scheme, so the times are kept, in one file for
each network, example and machine: below ``$XDG_CACHE_HOME/custom_quantizer``, by default
``~/.cache/custom_quantizer``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from custom_quantizer.analysis.allocation.choices import Choices
from custom_quantizer.analysis.allocation.costs import Latencies, check_latencies
from custom_quantizer.app.pipeline import quantize
from custom_quantizer.core.files import read_bytes, write_json_atomic
from custom_quantizer.core.progress import track
from custom_quantizer.errors import ConfigError, InputError
from custom_quantizer.report.profiles import Profile, profile

__all__ = ["as_latencies", "latencies_here", "read_latencies"]

logger = logging.getLogger(__name__)

_MOST_TABLE_BYTES = 2**26
_RUNS = 30


def read_latencies(path: Path) -> Latencies:
    """Read a table of times.

    Raises:
        InputError: it cannot be read, or is no ``{op: {scheme: time}}`` with times of at least 0.
    """
    try:
        table = json.loads(read_bytes(path, _MOST_TABLE_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); write {{op: {{scheme: time}}}}") from error
    return as_latencies(table, str(path))


def as_latencies(table: Any, name: str) -> Latencies:
    """Check a table of times.

    Raises:
        InputError: as :func:`read_latencies`.
    """
    good = isinstance(table, dict) and all(
        isinstance(row, dict) and all(map(_is_time, row.values())) for row in table.values()
    )
    if not good:
        raise InputError(
            f"{name} is no table of times; write {{op: {{scheme: time}}}}, with finite times of at "
            "least 0"
        )
    found: Latencies = table
    return found


def _is_time(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < float("inf")  # type: ignore[operator]


def latencies_here(
    choices: Choices,
    exported: GraphModule,
    example: tuple[Any, ...],
    batch: tuple[Any, ...],
    progress: bool | None,
) -> Latencies:
    """Seconds of each op at each scheme that it can take, on this machine.

    Args:
        choices: of the network.
        exported: it, captured.
        example: inputs it was captured with; times are those of its batch.
        batch: inputs to calibrate with; times do not depend on them.
        progress: True shows a bar, None does so at a terminal.

    Raises:
        ConfigError: the network is planned for another backend than XNNPACK, whose programs do
            not run here.
        LoweringError: it cannot be lowered.
    """
    if choices.backend != "xnnpack" and getattr(choices.backend, "name", "") != "xnnpack":
        raise ConfigError(
            "budget: latency can be measured on this machine for XNNPACK alone; bring a table "
            "latencies={op: {scheme: time}} with times from your device, or limit size, "
            "weight_bits or bit_operations"
        )
    kept = _cache_file(choices, exported, example)
    try:
        table = read_latencies(kept)
        check_latencies(choices, table)
    except (ConfigError, InputError):  # none, or of another version of this package
        pass
    else:
        logger.info("latencies of %s", kept)
        return table
    found: dict[str, dict[str, float]] = {op: {} for unit in choices.units for op in unit.ops}
    for name in track(list(choices.schemes), "measuring latencies", enabled=progress):
        chosen = {unit.name: name for unit in choices.units if name in unit.schemes}
        made = quantize(
            exported,
            example,
            [batch],
            config=choices.quantizer(chosen),
            accuracy="plain",
            progress=False,
        )
        assert made.lowered is not None
        times = _times(choices, name, profile(made.lowered.buffer, runs=_RUNS))
        for unit in choices.units:
            if name in unit.schemes:
                for op in unit.ops:
                    found[op][name] = times.get(op, 0.0)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(kept, found)
    except (InputError, OSError) as error:
        logger.warning("latencies were not kept: %s", error)
    return found


def _times(choices: Choices, scheme: str, profiled: Profile) -> Mapping[str, float]:
    """By the name of an op; of a call that became several, the first that can be chosen has all."""
    seconds = {row.op: row.seconds for row in profiled.rows}
    choosable = {op for unit in choices.units for op in unit.ops}
    found: dict[str, float] = {}
    for op in choices.plans[scheme].ops:
        parts = [part.node for part in op.parts or (op,) if part.node in choosable]
        if parts and op.written in seconds:
            found[parts[0]] = seconds[op.written]
    return found


def _cache_file(choices: Choices, exported: GraphModule, example: tuple[Any, ...]) -> Path:
    """One file for each machine, network, example and set of schemes."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    known = [
        *(platform.machine(), _processor(), str(os.cpu_count()), str(torch.get_num_threads())),
        *(version("executorch"), exported.code),
        *(f"{v.dtype} {list(v.shape)}" for v in pytree.tree_leaves(example) if hasattr(v, "dtype")),
        *choices.schemes,
    ]
    digest = hashlib.sha256("\0".join(known).encode()).hexdigest()
    return Path(root) / "custom_quantizer" / f"latencies-{digest[:32]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = [line for line in lines if line.startswith(("model name", "CPU part"))]
    return names[0] if names else platform.processor()
