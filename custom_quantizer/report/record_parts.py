"""Parts of records that a graph and a file both give: scales, biases, integers at the border."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from custom_quantizer.core.borders import Border
from custom_quantizer.core.formats import dtype_name, range_bits
from custom_quantizer.report.record import BiasRecord, TensorRecord

__all__ = ["bias_integers", "border_record", "with_group_scales", "with_scales"]


def border_record(source: str, shape: tuple[int | str, ...], border: Border) -> TensorRecord:
    """An input or output that is integers."""
    record = TensorRecord(source, shape, dtype_name(border.dtype), border=True)
    ends = (border.quant_min, border.quant_max)
    return with_scales(record, (border.scale,), border.zero_point, *ends, None)


def with_scales(
    record: TensorRecord,
    scales: tuple[float, ...],
    zero_point: int,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> TensorRecord:
    """The record of a tensor with one scale, or with one for each index of ``axis``."""
    largest = max(scales)
    return replace(
        record,
        bits=range_bits(quant_min, quant_max),
        granularity="per_tensor" if axis is None else "per_channel",
        scales=scales,
        scale_min=min(scales),
        scale_max=largest,
        zero_point=zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        real_min=(quant_min - zero_point) * largest,
        real_max=(quant_max - zero_point) * largest,
        axis=axis,
        channels=None if axis is None else len(scales),
    )


def with_group_scales(
    record: TensorRecord,
    scales: Tensor | np.ndarray[Any, Any],
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> TensorRecord:
    """The record of a weight with one scale for each group of input channels, zero point 0."""
    smallest, largest = float(scales.min()), float(scales.max())
    return replace(
        record,
        bits=range_bits(quant_min, quant_max),
        granularity="per_group",
        scale_min=smallest,
        scale_max=largest,
        zero_point=0,
        quant_min=quant_min,
        quant_max=quant_max,
        real_min=quant_min * largest,
        real_max=quant_max * largest,
        axis=axis,
        channels=int(scales.shape[0]),
        group_size=group_size,
    )


def bias_integers(
    source: str, values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], bits: int
) -> BiasRecord:
    """The record of a bias whose integers are known, in a format of ``bits``."""
    integers = tuple(int(value) for value in values.reshape(-1))
    largest = max((abs(value) for value in integers), default=0)
    return BiasRecord(
        source,
        str(values.dtype),
        len(integers),
        bits=bits,
        integers=integers,
        scales=tuple(float(scale) for scale in scales.reshape(-1)),
        minimum=min(integers, default=0),
        maximum=max(integers, default=0),
        bits_used=largest.bit_length() + 1,
    )
