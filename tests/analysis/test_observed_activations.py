"""Counting values of activations: exact in every bin, whatever the batches."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.flow import small_images, small_result

from custom_quantizer.analysis.activations import (
    BINS_INSIDE,
    BINS_OUTSIDE,
    ActivationCounter,
    observe_activations,
)
from custom_quantizer.analysis.diagnosis import diagnose
from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.errors import InputError


def counted(values: list[float], qparams: QParams) -> dict[str, object]:
    counter = ActivationCounter(qparams)
    x = torch.tensor(values)
    integers = torch.round(x / qparams.scale + qparams.zero_point)
    counter.add(x, integers.clamp(qparams.quant_min, qparams.quant_max).to(torch.int32))
    return counter.values()


def test_bins_by_hand() -> None:
    # Integers -8 to 7 of scale 1: two bins each, from -8.5 to 7.5, and four beyond either end.
    qparams = QParams(1.0, 0, -8, 7)
    found = counted([-8.5, -8.51, -9.1, -100.0, 0.0, 0.24, 7.49, 7.5, 7.6, 100.0], qparams)
    expected = [0] * 40
    for bin_ in (4, 3, 2, 0, 4 + 17, 4 + 17, 4 + 31, 4 + 31, 36, 39):
        expected[bin_] += 1
    assert found["histogram"] == tuple(expected)
    assert found["clipped_low"] == 0.3
    assert found["clipped_high"] == 0.2
    assert (found["low"], found["high"]) == (-100.0, 100.0)
    assert (found["unused_low"], found["unused_high"]) == (0, 0)
    assert found["used_levels"] == 3


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=60),
    st.sampled_from([2, 3, 4, 8, 16]),
    st.floats(2**-10, 4, width=32),
    st.integers(-8, 8),
)
@settings(max_examples=60, deadline=None)
def test_what_is_cut_off_stands_beyond_the_ends(
    values: list[float], bits: int, scale: float, shift: int
) -> None:
    high = (1 << (bits - 1)) - 1
    zero_point = max(min(shift, high), -high)
    found = counted(values, QParams(scale, zero_point, -high, high))
    bins = found["histogram"]
    assert isinstance(bins, tuple)
    assert len(bins) == BINS_INSIDE + 2 * BINS_OUTSIDE
    assert sum(bins) == len(values)
    assert sum(bins[:BINS_OUTSIDE]) / len(values) == found["clipped_low"]
    assert sum(bins[-BINS_OUTSIDE:]) / len(values) == found["clipped_high"]


def test_nothing_is_counted_without_values() -> None:
    counter = ActivationCounter(QParams(1.0, 0, -8, 7))
    counter.add(torch.zeros(0), torch.zeros(0, dtype=torch.int8))
    found = counter.values()
    assert (found["low"], found["high"], found["clipped_low"]) == (None, None, 0.0)
    assert not any(found["histogram"])


@pytest.mark.parametrize("size", [4, 5])
def test_a_float_model_is_not_needed_to_count(size: int) -> None:
    result, images = small_result(), small_images(16)
    found = observe_activations(result.converted, images.split(size))
    exact = diagnose(result.exported, result.converted, images)
    assert found.samples == exact.samples == 16
    names = ("name", "path", "bits", "scale", "zero_point", "low", "high", "clipped_low")
    names += ("clipped_high", "used_levels", "unused_low", "unused_high", "levels", "histogram")
    assert [[getattr(t, name) for name in names] for t in found.tensors] == [
        [getattr(t, name) for name in names] for t in exact.tensors
    ]
    document = json.loads(found.to_json())
    assert (document["kind"], document["schema_version"]) == ("activations", 1)


def test_no_samples_are_refused() -> None:
    result = small_result()
    with pytest.raises(InputError, match="holds no sample"):
        observe_activations(result.converted, [])
    with pytest.raises(InputError, match="holds 3 samples, but the graph takes batches of 4"):
        observe_activations(result.converted, small_images(3))
