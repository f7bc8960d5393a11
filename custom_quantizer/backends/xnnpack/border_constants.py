"""Scale and zero point of integer inputs and outputs, as constant methods of the program.

A program that takes int8 must say what the integers stand for. ExecuTorch's own pass for it
(``exir/passes/quantize_io_pass.py``) adds methods without inputs that return one number each, which
every runtime can call: ``forward_input0_scale``, ``forward_input0_zp``,
``forward_input0_quant_min``, ``forward_input0_quant_max`` and ``forward_input0_dtype`` (a
``ScalarType``); likewise for outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from custom_quantizer.backends.xnnpack.contents import MethodContents, ValueInfo
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.borders import DTYPES, Border, Borders, Role
from custom_quantizer.errors import ProgramError, SchemeError

__all__ = ["border_constants", "borders_in"]

Constants: TypeAlias = Mapping[str, int | float]

_SCALAR_TYPES = {torch.uint8: 0, torch.int8: 1, torch.int16: 2}
"""Numbers of ExecuTorch's ``ScalarType`` (``schema/scalar_type.fbs``)."""


def border_constants(borders: Borders, method: str) -> dict[str, int | float]:
    """The constant methods of one method of a program."""
    found: dict[str, int | float] = {}
    for border in borders:
        found[_name(method, border.role, border.index, "scale")] = border.scale
        found[_name(method, border.role, border.index, "zp")] = border.zero_point
        found[_name(method, border.role, border.index, "quant_min")] = border.quant_min
        found[_name(method, border.role, border.index, "quant_max")] = border.quant_max
        found[_name(method, border.role, border.index, "dtype")] = _SCALAR_TYPES[border.dtype]
    return found


def borders_in(method: MethodContents, constants: Constants) -> Borders:
    """The integer borders of a method of a program, as its constant methods say.

    Raises:
        ProgramError: what they say is incomplete, or means nothing.
    """

    def borders(role: Role, values: Sequence[ValueInfo]) -> tuple[Border | None, ...]:
        return tuple(_read(method.name, role, i, v, constants) for i, v in enumerate(values))

    return Borders(borders("input", method.inputs), borders("output", method.outputs))


def _read(
    method: str, role: Role, index: int, value: ValueInfo, constants: Constants
) -> Border | None:
    if _name(method, role, index, "scale") not in constants or value.dtype not in DTYPES:
        return None
    dtype = DTYPES[value.dtype]
    try:
        scale, zero_point, low, high = (
            constants[_name(method, role, index, key)]
            for key in ("scale", "zp", "quant_min", "quant_max")
        )
        if not isinstance(scale, float) or not math.isfinite(scale):
            raise SchemeError(f"the scale is {scale}")
        border = Border(role, index, "", dtype, scale, int(zero_point), int(low), int(high))
        info = torch.iinfo(dtype)
        if not info.min <= border.quant_min <= border.quant_max <= info.max:
            raise SchemeError(f"{value.dtype} does not hold [{low}, {high}]")
        if constants[_name(method, role, index, "dtype")] != _SCALAR_TYPES[dtype]:
            raise SchemeError(f"its dtype is not {value.dtype}")
        _ = QParams(border.scale, border.zero_point, border.quant_min, border.quant_max)
    except (KeyError, SchemeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ProgramError(
            f"what the program says of the integers of {role} {index} of {method} means nothing "
            f"({what}); lower the model again"
        ) from error
    return border


def _name(method: str, role: Role, index: int, key: str) -> str:
    """As ``get_config_method_name`` of ExecuTorch's pass has it."""
    return f"{method}_{role}{index}_{key}"
