"""The arithmetic against models of it written with Python integers and fractions.

``fl`` below rounds a fraction to float32 in integers, so that no test trusts a float operation
that it is meant to check.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.selection import slow_but
from torch import Tensor

from custom_quantizer.backends.xnnpack import arithmetic as xnnpack_arithmetic
from custom_quantizer.backends.xnnpack.arithmetic import (
    XNNPACK,
    XNNPACK_NEON,
    quantize_emulated_int16,
    requantize_integer_only,
    xnnpack_add_parameters,
    xnnpack_multiplier,
)
from custom_quantizer.core import arithmetic, fixed_point
from custom_quantizer.core import exact as exact_module
from custom_quantizer.core.arithmetic import (
    Arithmetic,
    QParams,
    accumulator_bits,
    round_to_float32,
    saturate,
    split_multiplier,
    wrap_int32,
)
from custom_quantizer.core.exact import EXACT
from custom_quantizer.core.fixed_point import (
    FIXED_POINT,
    multiply_by_quantized_multiplier,
    multiply_by_quantized_multiplier_int64,
    quantize_multiplier,
    rounding_divide_by_pot,
    saturating_rounding_doubling_high_mul,
)
from custom_quantizer.core.formats import range_bits, signed_bits
from custom_quantizer.errors import InputError, SchemeError
from custom_quantizer.ops.backend import get_mode

MODES: list[Arithmetic] = [XNNPACK, FIXED_POINT, EXACT]
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def f32(value: float) -> float:
    return round_to_float32(value)


def qparams(scale: float, zero_point: int = 0, low: int = -128, high: int = 127) -> QParams:
    return QParams(f32(scale), zero_point, low, high)


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# Models ------------------------------------------------------------------------------------------


def fl(value: Fraction) -> Fraction:
    """Round to 24 significant bits, half to even; no subnormals and no overflow."""
    if value == 0:
        return value
    exponent = 0
    while abs(value) >= 2 ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


def clip(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def sat8(value: int) -> int:
    return clip(value, -128, 127)


def sat16(value: int) -> int:
    return clip(value, -(2**15), 2**15 - 1)


def scale_of(q: QParams) -> Fraction:
    assert isinstance(q.scale, float)
    return Fraction(q.scale)


def inverse(q: QParams) -> Fraction:
    return fl(1 / scale_of(q))


def model_a(x: Fraction, q: QParams) -> int:
    scaled = min(fl(x * inverse(q)), Fraction(32767))
    return clip(sat8(sat16(round(scaled)) + q.zero_point), q.quant_min, q.quant_max)


def model_b(x: Fraction, q: QParams) -> int:
    return clip(sat8(round(fl(fl(x * inverse(q)) + q.zero_point))), q.quant_min, q.quant_max)


def model_dequantize(value: int, q: QParams) -> Fraction:
    return fl(fl(Fraction(value - q.zero_point)) * scale_of(q))


def model_multiplier(a: float, b: float, out: float) -> Fraction:
    return fl(fl(Fraction(a) * Fraction(b)) / Fraction(out))


def model_gemm(acc: int, multiplier: Fraction, out: QParams) -> int:
    wrapped = (acc + 2**31) % 2**32 - 2**31
    rounded = round(fl(fl(Fraction(wrapped)) * multiplier))
    return clip(sat8(rounded + out.zero_point), out.quant_min, out.quant_max)


def model_add(a: int, b: int, qa: QParams, qb: QParams, out: QParams, sign: int) -> int:
    ra, rb = fl(scale_of(qa) / scale_of(out)), fl(scale_of(qb) / scale_of(out))
    exponent = -10
    while Fraction(2) ** (exponent + 1) <= max(ra, rb):
        exponent += 1
    shift = 20 - exponent
    ma, mb = round(ra * 2**shift), sign * round(rb * 2**shift)
    acc = ma * (a - qa.zero_point) + mb * (b - qb.zero_point) + 2 ** (shift - 1)
    stored = sat8(sat16(acc // 2**shift) + out.zero_point)
    return clip(stored, out.quant_min, out.quant_max)


def model_mean(total: int, count: int, src: QParams, dst: QParams) -> int:
    s = fl(fl(scale_of(src) / scale_of(dst)) * fl(Fraction(1, count)))
    z = fl(dst.zero_point - fl(fl(Fraction(count * src.zero_point)) * s))
    return clip(sat8(round(fl(fl(fl(Fraction(total)) * s) + z))), dst.quant_min, dst.quant_max)


def exact(real: Fraction, q: QParams) -> int:
    return clip(round(real / scale_of(q)) + q.zero_point, q.quant_min, q.quant_max)


def real(value: int, q: QParams) -> Fraction:
    return (value - q.zero_point) * scale_of(q)


def srdhm(a: int, b: int) -> int:
    if a == b == INT32_MIN:
        return INT32_MAX
    return (a * b + 2**30) // 2**31


def divide_by_pot(x: int, exponent: int) -> int:
    magnitude = (abs(x) + (1 << exponent >> 1)) >> exponent
    return magnitude if x >= 0 else -magnitude


def mbqm(x: int, multiplier: int, shift: int) -> int:
    left = clip(x * 2 ** max(shift, 0), INT32_MIN, INT32_MAX)
    return divide_by_pot(srdhm(left, multiplier), max(-shift, 0))


def mbqm64(x: int, multiplier: int, shift: int) -> int:
    reduced = min((multiplier + 2**15) // 2**16, 0x7FFF)
    total = 15 - shift
    return clip((x * reduced + 2 ** (total - 1)) // 2**total, INT32_MIN, INT32_MAX)


# Strategies --------------------------------------------------------------------------------------

scales = st.floats(
    min_value=2.0**-14, max_value=2.0**4, width=32, allow_nan=False, allow_infinity=False
)


@st.composite
def int8_qparams(draw: st.DrawFn) -> QParams:
    low, high = draw(st.sampled_from([(-128, 127), (-127, 127), (-8, 7), (-2, 1), (0, 63)]))
    return QParams(draw(scales), draw(st.integers(low, high)), low, high)


@st.composite
def any_qparams(draw: st.DrawFn) -> QParams:
    low, high = draw(
        st.sampled_from([(-128, 127), (0, 255), (-8, 7), (-2048, 2047), (-32768, 32767)])
    )
    return QParams(draw(scales), draw(st.integers(low, high)), low, high)


def stored_values(q: QParams) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(q.quant_min, q.quant_max), min_size=1, max_size=20)


int32s = st.one_of(
    st.integers(INT32_MIN, INT32_MAX), st.integers(-(2**18), 2**18), st.integers(-300, 300)
)


def all_pairs(low: int, high: int) -> tuple[Tensor, Tensor]:
    values = torch.arange(low, high + 1, dtype=torch.int8 if high < 128 else torch.int32)
    return values[:, None], values[None, :]


def pairs_of(a: Tensor, b: Tensor) -> Iterator[tuple[int, int]]:
    return itertools.product(a.reshape(-1).tolist(), b.reshape(-1).tolist())


# Parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (0.0, "positive"),
        (-1.0, "positive"),
        (math.inf, "finite"),
        (math.nan, "positive"),
        (2.0**-127, "normal"),
        (0.1, "representable"),
        (1e39, "representable"),
        (True, "float"),
        ("1", "float"),
        (torch.tensor(1.0), "1-D"),
        (torch.ones(2, 2), "1-D"),
        (torch.ones(0), "1-D"),
        (torch.ones(2, dtype=torch.float64), "1-D"),
        (torch.tensor([1.0, 0.0]), "channel 1"),
        (torch.tensor([math.nan, 1.0]), "channel 0"),
        (torch.tensor([1.0, 1e-40]), "channel 1"),
    ],
)
def test_qparams_refuses_a_scale(scale: object, message: str) -> None:
    axis = 0 if isinstance(scale, Tensor) else None
    with pytest.raises(SchemeError, match=message):
        QParams(scale, 0, -128, 127, axis)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("zero_point", "low", "high"),
    [(-129, -128, 127), (128, -128, 127), (0, 1, 0), (0, -(2**31) - 1, 0), (0, 0, 2**31)],
)
def test_qparams_refuses_a_range(zero_point: int, low: int, high: int) -> None:
    with pytest.raises(SchemeError, match=r"quant_min <= zero_point <= quant_max"):
        QParams(1.0, zero_point, low, high)


@pytest.mark.parametrize("zero_point", [0.0, True, None])
def test_qparams_refuses_other_types(zero_point: object) -> None:
    with pytest.raises(SchemeError, match="zero_point must be an int"):
        QParams(1.0, zero_point, -128, 127)  # type: ignore[arg-type]


def test_qparams_pairs_axis_with_scale_tensor() -> None:
    with pytest.raises(SchemeError, match="needs an axis"):
        QParams(torch.ones(2), 0, -128, 127)
    with pytest.raises(SchemeError, match="one number"):
        QParams(1.0, 0, -128, 127, axis=0)


def test_qparams_is_a_value() -> None:
    scale = torch.tensor([0.5, 0.25])
    q = QParams(scale, 0, -127, 127, axis=0)
    twin = QParams(torch.tensor([0.5, 0.25]), 0, -127, 127, axis=0)
    scale[0] = 8.0
    assert q == twin
    assert hash(q) == hash(twin)
    assert q != QParams(torch.tensor([0.5, 0.5]), 0, -127, 127, axis=0)
    assert qparams(0.5) != qparams(0.5, 1)
    assert qparams(0.5).same_grid(qparams(0.5, 0, -8, 7))
    assert not qparams(0.5).same_grid(qparams(0.5, 1))
    assert qparams(0.5).fits_int8
    assert not qparams(0.5, 0, 0, 255).fits_int8
    assert qparams(0.5, 0, -8, 7).levels == 16


@pytest.mark.parametrize(
    ("low", "high", "signed", "own"),
    [(-8, 7, 4, 4), (-9, 7, 5, 5), (-8, 8, 5, 5), (-7, 7, 4, 4), (0, 255, 9, 8), (0, 0, 1, 0)],
)
def test_width_of_a_range(low: int, high: int, signed: int, own: int) -> None:
    assert qparams(0.5, 0, low, high).bits == signed_bits(low, high) == signed
    assert range_bits(low, high) == own


@pytest.mark.parametrize("mode", [*MODES, XNNPACK_NEON], ids=lambda mode: mode.name)
def test_modes_are_found_by_name(mode: Arithmetic) -> None:
    assert get_mode(mode.name).arithmetic is mode


def neon_product(product: int, multiplier: float) -> int:
    """A product requantized by NEON's instructions: ``vqshl``, ``vqdmulh``, ``vrshl``."""
    mantissa, exponent = math.frexp(multiplier)
    bits, shift = int(mantissa * 2**31), -exponent
    after = max(shift, 1)
    high = ((product << (after - shift)) * bits) >> 31
    return (high + (1 << (after - 1))) >> after


@pytest.mark.parametrize(
    "scales",
    [(2**-5, 2**-5, 2**-5), (2**-5, 2**-5, 2**-9), (0.03, 0.011, 0.0007), (0.03, 0.011, 0.9)],
)
def test_products_on_neon_are_those_of_its_instructions(
    scales: tuple[float, float, float],
) -> None:
    """Every pair; ties, multipliers of one half and more, small ones."""
    qa, qb, out = (qparams(scale, zero) for scale, zero in zip(scales, (3, -7, 11), strict=True))
    every = torch.arange(-128, 128)
    a, b = every.repeat_interleave(256), every.repeat(256)
    got = XNNPACK_NEON.mul(a, b, qa, qb, out)
    multiplier = float(xnnpack_multiplier(*(float(scale_of(q)) for q in (qa, qb, out))))
    for x, y, stored in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        rounded = neon_product((x - 3) * (y + 7), multiplier)
        assert stored == min(max(rounded + 11, -128), 127), (x, y)
    other = XNNPACK.mul(a, b, qa, qb, out)
    assert set((got - other).unique().tolist()) <= {-1, 0, 1}
    powers_of_two = scales[0] == scales[1]
    assert not powers_of_two or bool((got > other).any())


def test_unknown_mode() -> None:
    with pytest.raises(
        SchemeError, match=r"'cmsis': choose one of tosa, xnnpack, xnnpack-neon, fixed_point, exact"
    ):
        get_mode("cmsis")


@pytest.mark.parametrize("module", [arithmetic, fixed_point, exact_module, xnnpack_arithmetic])
def test_public_names_exist(module: ModuleType) -> None:
    assert all(hasattr(module, name) for name in module.__all__)


# Primitives --------------------------------------------------------------------------------------


@given(st.floats(width=64, allow_nan=False))
def test_round_to_float32(value: float) -> None:
    assert round_to_float32(value) == float(torch.tensor(value, dtype=torch.float64).float())


@given(st.fractions(min_value=-(10**6), max_value=10**6))
def test_the_model_of_float32(value: Fraction) -> None:
    # Through double is not correctly rounded; a quotient of two small integers in float32 is.
    small = Fraction(value.numerator % 4096 + 1, value.denominator % 4096 + 1)
    quotient = np.float32(small.numerator) / np.float32(small.denominator)
    assert fl(small) == Fraction(float(quotient))


@given(st.integers(-(2**63), 2**63 - 1))
def test_wrap_int32(value: int) -> None:
    wrapped = wrap_int32(torch.tensor(value))
    assert wrapped.dtype == torch.int32
    assert int(wrapped) == (value + 2**31) % 2**32 - 2**31


def test_wrapping_once_is_wrapping_always() -> None:
    terms = torch.randint(-(2**31), 2**31, (50, 1000))
    acc = torch.zeros(1000, dtype=torch.int32)
    for term in terms:
        acc = wrap_int32(acc.to(torch.int64) + term)
    assert torch.equal(wrap_int32(terms.sum(0)), acc)


def test_saturate() -> None:
    stored = saturate(ints(-(2**40), -9, -8, 7, 8, 2**40), -8, 7)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [-8, -8, -8, 7, 7, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_integers_are_required(dtype: torch.dtype) -> None:
    q, x = qparams(1.0), torch.ones(2, dtype=dtype)
    for call in (wrap_int32, lambda x: saturate(x, 0, 1), lambda x: XNNPACK.dequantize(x, q)):
        with pytest.raises(InputError, match="must hold integers"):
            call(x)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_float32_is_required(mode: Arithmetic) -> None:
    with pytest.raises(InputError, match=r"must be float32, got torch\.float64"):
        mode.quantize(torch.ones(2, dtype=torch.float64), qparams(1.0))


# xnnpack: quantize, dequantize -------------------------------------------------------------------


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), int8_qparams())
def test_xnnpack_quantize(values: list[float], q: QParams) -> None:
    stored = XNNPACK.quantize(torch.tensor(values, dtype=torch.float32), q)
    assert stored.dtype == torch.int32
    for value, got in zip(values, stored.tolist(), strict=True):
        if abs(value) > 2.0**100:
            expected = q.quant_max if value > 0 else q.quant_min
        elif 0 < abs(value) < 2.0**-100:
            expected = q.zero_point
        else:
            expected = model_a(Fraction(value), q)
        assert got == expected


def test_xnnpack_quantize_by_hand() -> None:
    q = qparams(0.5, zero_point=3)
    # x / 0.5 = -2.5, -1.5, -0.5, 0.5, 1.5, 2.5: ties to even, -2, -2, 0, 0, 2, 2; then + 3.
    x = torch.tensor([-1.25, -0.75, -0.25, 0.25, 0.75, 1.25])
    assert XNNPACK.quantize(x, q).tolist() == [1, 1, 3, 3, 5, 5]
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30])
    assert XNNPACK.quantize(special, q).tolist() == [127, 127, -128, 127, -128]
    assert XNNPACK.quantize(special, qparams(0.5, 0, -8, 7)).tolist() == [7, 7, -8, 7, -8]


def test_xnnpack_quantize_multiplies_by_the_inverse() -> None:
    # s = fl(0.1) = 13421773 * 2**-27; fl(1 / s) = fl(9.99999985...) = 10 exactly.
    # x = fl(0.05) = s / 2, so that x / s = 0.5, a tie to 0; x * 10 = 0.5000000074..., whose
    # neighbours in float32 are 2**-24 apart: it rounds to 0.5 and the tie goes to 0 as well.
    # x = fl(0.35) = 11744051 * 2**-25: x * 10 = 3.4999999404... is 117440510 * 2**-25, of 27
    # bits; to 24: 14680063.75 -> 14680064 * 2**-22 = 3.5, a tie to 4. The quotient is 3.49999988.
    q = qparams(0.1)
    assert XNNPACK.quantize(torch.tensor([f32(0.05), f32(0.35)]), q).tolist() == [0, 4]
    assert EXACT.quantize(torch.tensor([f32(0.05), f32(0.35)]), q).tolist() == [0, 3]


@given(st.data(), any_qparams())
def test_xnnpack_dequantize(data: st.DataObject, q: QParams) -> None:
    values = data.draw(stored_values(q))
    reals = XNNPACK.dequantize(torch.tensor(values), q)
    assert reals.dtype == torch.float32
    assert [Fraction(r) for r in reals.tolist()] == [model_dequantize(v, q) for v in values]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_per_channel_quantize_is_per_tensor_of_each_channel(mode: Arithmetic) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5)
    scale = torch.tensor([0.01, 0.3, 0.02, 1.5])
    q = QParams(scale, 0, -127, 127, axis=-2)
    stored, reals = mode.quantize(x, q), mode.dequantize(mode.quantize(x, q), q)
    for channel in range(4):
        single = qparams(float(scale[channel]), 0, -127, 127)
        assert torch.equal(stored[:, channel], mode.quantize(x[:, channel], single))
        assert torch.equal(reals[:, channel], mode.dequantize(stored[:, channel], single))


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_channels_must_fit(mode: Arithmetic) -> None:
    q = QParams(torch.ones(3), 0, -127, 127, axis=1)
    for shape in [(3, 4), (3,)]:
        with pytest.raises(InputError, match="do not fit dimension 1"):
            mode.quantize(torch.zeros(shape), q)
    with pytest.raises(SchemeError, match="one scale per tensor"):
        mode.add(ints(1), ints(1), q, qparams(1.0), qparams(1.0))
    with pytest.raises(SchemeError, match="one scale per tensor"):
        mode.clamp_bounds(0.0, 6.0, q)


@given(
    st.lists(st.floats(-(2.0**30), 2.0**30, width=32), min_size=1, max_size=20),
    scales,
    st.sampled_from([(-32768, 32767), (-32767, 32767), (-2048, 2047), (0, 255)]),
)
def test_emulated_int16(values: list[float], scale: float, limits: tuple[int, int]) -> None:
    q = QParams(scale, 0, *limits)
    stored = quantize_emulated_int16(torch.tensor(values, dtype=torch.float32), q)
    inv = inverse(q)

    def model(x: float) -> int:
        if abs(x) < 2.0**-100:
            return clip(0, *limits)
        return clip(math.floor(fl(fl(Fraction(x) * inv) + Fraction(1, 2))), *limits)

    assert stored.tolist() == [model(x) for x in values]
    if limits != (0, 255):
        assert torch.equal(XNNPACK.quantize(torch.tensor(values, dtype=torch.float32), q), stored)


def test_emulated_int16_by_hand() -> None:
    q = QParams(0.5, 0, -32768, 32767)
    # x / 0.5 = -1.5, -0.5, 0.5, 1.5: half goes up.
    x = torch.tensor([-0.75, -0.25, 0.25, 0.75, math.inf, -math.inf])
    assert quantize_emulated_int16(x, q).tolist() == [-1, 0, 1, 2, 32767, -32768]
    with pytest.raises(InputError, match="NaN"):
        quantize_emulated_int16(torch.tensor([math.nan]), q)
    for bad in (QParams(0.5, 1, -32768, 32767), QParams(0.5, 0, -32769, 0)):
        with pytest.raises(SchemeError, match="symmetric"):
            quantize_emulated_int16(x, bad)


def test_every_int16_survives_dequantize_and_quantize() -> None:
    values = torch.arange(-32768, 32768, dtype=torch.int32)
    for scale in (1.0, 0.1, 3e-5, 0.7):
        q = QParams(f32(scale), 0, -32768, 32767)
        assert torch.equal(XNNPACK.quantize(XNNPACK.dequantize(values, q), q), values)


# xnnpack: GEMM -----------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.lists(int32s, min_size=1, max_size=20), scales, scales, int8_qparams())
def test_xnnpack_gemm(values: list[int], sx: float, sw: float, out: QParams) -> None:
    multiplier = model_multiplier(sx, sw, float(scale_of(out)))
    acc = torch.tensor(values)
    if multiplier >= 256:
        with pytest.raises(SchemeError, match="below 256"):
            XNNPACK.requantize_accumulator(acc, sx, sw, 0, out)
        return
    stored = XNNPACK.requantize_accumulator(acc, sx, sw, 0, out)
    assert stored.tolist() == [model_gemm(v, multiplier, out) for v in values]
    single = xnnpack_multiplier(sx, sw, float(scale_of(out)))
    assert Fraction(float(single)) == multiplier
    assert torch.equal(requantize_integer_only(acc, single, 0, out), stored)


def test_xnnpack_gemm_by_hand() -> None:
    out = qparams(0.25, zero_point=3)

    def stored(sx: float, *acc: int) -> list[int]:
        q = XNNPACK.requantize_accumulator(ints(*acc), f32(sx), 0.25, 0, out)
        return [v - 3 for v in q.tolist()]

    # S = 0.5 * 0.25 / 0.25 = 0.5; ties to even before the zero point is added.
    assert stored(0.5, -5, -3, -1, 1, 3, 5) == [-2, -2, 0, 0, 2, 2]
    # S = 2**-20 and acc = 33 * 2**19 + 1 = 17301505, of 25 bits: float32 drops the 1, which
    # leaves 16.5, a tie to 16. Exactly it is above 16.5.
    assert stored(2.0**-20, 17301505) == [16]
    assert EXACT.requantize_accumulator(ints(17301505), 2.0**-20, 0.25, 0, out).tolist() == [20]
    # S = fl(0.1) = 13421773 * 2**-27, acc = 25: 335544325 * 2**-27 has 29 bits; rounded to 24 it
    # is 10485760 * 2**-22 = 2.5, a tie to 2. Exactly it is above 2.5.
    assert stored(0.1, 25) == [2]
    assert EXACT.requantize_accumulator(ints(25), f32(0.1), 0.25, 0, out).tolist() == [6]
    # 2**31 wraps to -2**31; saturated to -128, which is 3 - 131.
    assert stored(1.0, 2**31 - 1, 2**31, 2**32 + 7) == [124, -131, 7]


def test_xnnpack_gemm_per_channel() -> None:
    torch.manual_seed(1)
    acc = torch.randint(-(2**20), 2**20, (2, 5, 3, 3))
    sw = torch.rand(5) * 1e-3 + 1e-5
    out = qparams(0.05, -7)
    for mode in MODES:
        stored = mode.requantize_accumulator(acc, f32(0.02), sw, 1, out)
        assert torch.equal(stored, mode.requantize_accumulator(acc, f32(0.02), sw, -3, out))
        for channel in range(5):
            single = mode.requantize_accumulator(
                acc[:, channel], f32(0.02), float(sw[channel]), 0, out
            )
            assert torch.equal(stored[:, channel], single)
        with pytest.raises(InputError, match="5 per-channel values do not fit dimension 2"):
            mode.requantize_accumulator(acc, f32(0.02), sw, 2, out)


def test_float32_formula_equals_integer_only() -> None:
    generator = torch.Generator().manual_seed(2)
    out = qparams(1.0, 5)
    for width in (8, 16, 24, 26, 31):
        # One multiplier per accumulator, over the exponents that do not only saturate.
        acc = torch.randint(-(2**width), 2**width, (400_000,), generator=generator)
        mantissa = torch.randint(2**23, 2**24, (400_000,), generator=generator)
        exponent = torch.randint(16, 56, (400_000,), generator=generator)
        multiplier = (mantissa.double() * torch.pow(2.0, -exponent.double())).float()
        in_float = XNNPACK.requantize_accumulator(acc, 1.0, multiplier, 0, out)
        assert torch.equal(requantize_integer_only(acc, multiplier, 0, out), in_float)


def test_both_forms_agree_around_every_tie() -> None:
    # For each multiplier, the accumulators nearest to each (k + 0.5) / S: hardest to round.
    out = qparams(1.0)
    for scale in (0.1, 0.3, 2.0**-7, 3e-4, 1.7e-6, 1.1e-7, 0.0123):
        multiplier = torch.tensor(scale)
        centers = ((torch.arange(-130, 130).double() + 0.5) / multiplier.double()).round().long()
        acc = (centers[:, None] + torch.arange(-3, 4)).reshape(-1)
        acc = acc[(acc >= INT32_MIN) & (acc <= INT32_MAX)]
        stored = XNNPACK.requantize_accumulator(acc, 1.0, f32(scale), 0, out)
        assert torch.equal(stored, requantize_integer_only(acc, multiplier, 0, out))
        exact_multiplier = Fraction(float(multiplier))
        assert stored.tolist() == [model_gemm(v, exact_multiplier, out) for v in acc.tolist()]


def test_leaving_out_the_rounding_of_the_product_differs() -> None:
    # Why requantize_integer_only rounds twice: 25 * fl(0.1), worked out above.
    out, multiplier = qparams(1.0), torch.tensor(0.1)
    mantissa, shift = split_multiplier(multiplier)
    assert (int(mantissa), int(shift)) == (13421773, 27)
    assert requantize_integer_only(ints(25), multiplier, 0, out).tolist() == [2]
    assert round(Fraction(25 * 13421773, 2**27)) == 3


@given(st.floats(2.0**-126, 255, width=32))
def test_split_multiplier(value: float) -> None:
    mantissa, shift = (int(t) for t in split_multiplier(torch.tensor(value, dtype=torch.float32)))
    assert 2**23 <= mantissa < 2**24
    assert Fraction(value) == mantissa / Fraction(2) ** shift


@pytest.mark.parametrize(
    ("sx", "sw", "out"), [(256.0, 1.0, 1.0), (2.0**-100, 2.0**-100, 1.0), (2.0**127, 2.0, 1.0)]
)
def test_xnnpack_multiplier_limits(sx: float, sw: float, out: float) -> None:
    with pytest.raises(SchemeError, match="requantization multiplier"):
        xnnpack_multiplier(sx, sw, out)
    with pytest.raises(SchemeError, match="requantization multiplier"):
        xnnpack_multiplier(sx, torch.tensor([2.0**-120, sw]), out)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=20), scales, scales, scales)
def test_xnnpack_wide_gemm(values: list[int], sx: float, sw: float, so: float) -> None:
    # Python floats are the float64 in which the mode stands in for the delegate's float32.
    acc = torch.tensor(values)
    scaled = [v * (sw * sx) / so for v in values]
    wide, narrow = QParams(so, 0, -32768, 32767), QParams(so, 5, -128, 127)
    stored = XNNPACK.requantize_accumulator(acc, sx, sw, 0, wide, accumulator_width=64)
    assert stored.tolist() == [clip(math.floor(v + 0.5), -32768, 32767) for v in scaled]
    assert torch.equal(XNNPACK.requantize_accumulator(acc, sx, sw, 0, wide), stored)
    truth = EXACT.requantize_accumulator(acc, sx, sw, 0, wide)
    # Halves go up here and to even there: no further apart than that.
    assert int((stored - truth).abs().max()) <= 1
    stored = XNNPACK.requantize_accumulator(acc, sx, sw, 0, narrow, accumulator_width=64)
    assert stored.tolist() == [clip(round(v) + 5, -128, 127) for v in scaled]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_gemm_checks_weight_scales(mode: Arithmetic) -> None:
    for bad in (0.1, torch.ones(1, 1), torch.tensor([1.0, -1.0])):
        with pytest.raises(SchemeError):
            mode.requantize_accumulator(
                torch.zeros(2, dtype=torch.int32), 1.0, bad, 0, qparams(1.0)
            )
    stored = mode.requantize_accumulator(ints(5), 1.0, torch.tensor(1.0), 0, qparams(1.0))
    assert stored.tolist() == [5]


# xnnpack: elementwise ----------------------------------------------------------------------------

# (a, b, out): plain, asymmetric, far apart, rounding multipliers, narrow output.
COMBINATIONS = [
    (qparams(1.0), qparams(1.0), qparams(1.0)),
    (qparams(0.5), qparams(1.0), qparams(1.0)),
    (qparams(0.1, 7), qparams(0.013, -128), qparams(0.08, 127)),
    (qparams(0.9, -3), qparams(0.0009, 5), qparams(0.7, -11)),
    (qparams(3.0, 1), qparams(0.3, 2), qparams(0.031, 3)),
    (qparams(0.02, 1), qparams(0.03, 2), qparams(0.04, -1, -8, 7)),
]


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize(("qa", "qb", "out"), COMBINATIONS)
def test_xnnpack_add_of_every_int8_pair(
    qa: QParams, qb: QParams, out: QParams, subtract: bool
) -> None:
    a, b = all_pairs(-128, 127)
    stored = XNNPACK.add(a, b, qa, qb, out, subtract=subtract)
    sign = -1 if subtract else 1
    ma, mb, shift = xnnpack_add_parameters(qa, qb, out, subtract=subtract)
    half = 2 ** (shift - 1)
    za, zb, zo = qa.zero_point, qb.zero_point, out.zero_point
    low, high = out.quant_min, out.quant_max
    expected = [
        clip(sat8(((ma * (x - za) + mb * (y - zb) + half) >> shift) + zo), low, high)
        for x, y in pairs_of(a, b)
    ]
    assert stored.reshape(-1).tolist() == expected
    # The parameters themselves, through the model, on a sample of the pairs.
    sample = list(zip(pairs_of(a, b), expected, strict=True))[::257]
    assert all(model_add(x, y, qa, qb, out, sign) == e for (x, y), e in sample)


@settings(max_examples=150)
@given(st.data(), int8_qparams(), int8_qparams(), int8_qparams(), st.booleans())
def test_xnnpack_add(
    data: st.DataObject, qa: QParams, qb: QParams, out: QParams, subtract: bool
) -> None:
    a, b = data.draw(st.integers(qa.quant_min, qa.quant_max)), data.draw(st.integers(-128, 127))
    ratio = max(fl(scale_of(qa) / scale_of(out)), fl(scale_of(qb) / scale_of(out)))
    if not Fraction(1, 1024) <= ratio < 256:
        with pytest.raises(SchemeError, match="scale ratios"):
            XNNPACK.add(ints(a), ints(b), qa, qb, out)
        return
    stored = XNNPACK.add(ints(a), ints(b), qa, qb, out, subtract=subtract)
    assert stored.tolist() == [model_add(a, b, qa, qb, out, -1 if subtract else 1)]


def test_xnnpack_add_by_hand() -> None:
    qa, qb, out = qparams(0.5), qparams(1.0), qparams(1.0)
    # ra = 0.5, rb = 1, e = 0, sh = 20, ma = 2**19, mb = 2**20.
    assert xnnpack_add_parameters(qa, qb, out) == (2**19, 2**20, 20)
    assert xnnpack_add_parameters(qa, qb, out, subtract=True) == (2**19, -(2**20), 20)
    # a / 2 = -1.5, -0.5, 0.5, 1.5 with half going up; exact ties go to even.
    a, b = ints(-3, -1, 1, 3), ints(0, 0, 0, 0)
    assert XNNPACK.add(a, b, qa, qb, out).tolist() == [-1, 0, 1, 2]
    assert EXACT.add(a, b, qa, qb, out).tolist() == [-2, 0, 0, 2]
    # 127 / 2 + 127 = 190.5 saturates; fused relu then clamps at the zero point.
    assert XNNPACK.add(ints(127), ints(127), qa, qb, out).tolist() == [127]
    bounds = XNNPACK.clamp_bounds(0.0, math.inf, out)
    assert XNNPACK.add(a, b, qa, qb, out, bounds=bounds).tolist() == [0, 0, 1, 2]
    # ra = 3 / 0.75 = 4: e = 2, sh = 18; rb = 1 / 0.75 = fl(1.33...) * 2**18 = 349525.34 -> 349525.
    assert xnnpack_add_parameters(qparams(3.0), qparams(1.0), qparams(0.75)) == (
        2**20,
        349525,
        18,
    )


@pytest.mark.parametrize(("qa", "qb", "out"), COMBINATIONS)
def test_xnnpack_mul_of_every_int8_pair(qa: QParams, qb: QParams, out: QParams) -> None:
    a, b = all_pairs(-128, 127)
    stored = XNNPACK.mul(a, b, qa, qb, out)
    multiplier = model_multiplier(float(scale_of(qa)), float(scale_of(qb)), float(scale_of(out)))

    def model(product: int) -> int:
        rounded = sat16(round(fl(product * multiplier)))
        return clip(sat8(rounded + out.zero_point), out.quant_min, out.quant_max)

    products = [(x - qa.zero_point) * (y - qb.zero_point) for x, y in pairs_of(a, b)]
    table = {product: model(product) for product in set(products)}
    assert stored.reshape(-1).tolist() == [table[product] for product in products]


def test_xnnpack_mul_by_hand() -> None:
    q = qparams(0.5, 1)
    # S = 0.5 * 0.5 / 0.5 = 0.5; (a - 1) * (2 - 1) = -3, -1, 1, 3 -> -1.5, -0.5, 0.5, 1.5, ties to
    # even, + 1.
    assert XNNPACK.mul(ints(-2, 0, 2, 4), ints(2), q, q, q).tolist() == [-1, 1, 1, 3]
    # x = 0.5, x * x = 0.25; 0.25 / 0.5 + 1 = 1.5 is rounded with its zero point: a tie to 2.
    assert XNNPACK.square(ints(2), q, q).tolist() == [2]
    assert XNNPACK.mul(ints(2), ints(2), q, q, q).tolist() == [1]


@pytest.mark.parametrize(("qa", "_qb", "out"), COMBINATIONS)
def test_xnnpack_square_of_every_int8(qa: QParams, _qb: QParams, out: QParams) -> None:
    values = torch.arange(-128, 128)
    stored = XNNPACK.square(values, qa, out)
    expected = [model_b(fl(model_dequantize(v, qa) ** 2), out) for v in values.tolist()]
    assert stored.tolist() == expected


def test_xnnpack_requantize_of_every_int8_and_zero_point() -> None:
    values = torch.arange(-128, 128, dtype=torch.int8)
    for zero_in, zero_out in itertools.product(range(-128, 128, 85), repeat=2):
        for scale_in, scale_out in [(0.1, 0.1), (0.1, 0.03), (0.02, 0.7), (1.0, 2.0)]:
            src, dst = qparams(scale_in, zero_in), qparams(scale_out, zero_out)
            expected = [model_a(model_dequantize(v, src), dst) for v in range(-128, 128)]
            assert XNNPACK.requantize(values, src, dst).tolist() == expected
            assert torch.equal(XNNPACK.requantize(values, src, src), values.int())


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-0.31, 0.47)])
def test_xnnpack_clamp_of_every_int8(low: float, high: float) -> None:
    values = torch.arange(-128, 128)
    src, same, other = qparams(0.03, 4), qparams(0.03, 4), qparams(0.041, -9)
    lower, upper = XNNPACK.clamp_bounds(low, high, src)
    assert XNNPACK.clamp(values, src, same, low, high).tolist() == [
        clip(v, lower, upper) for v in range(-128, 128)
    ]

    def limited(x: Fraction) -> Fraction:
        top = x if math.isinf(high) else min(x, Fraction(f32(high)))
        return max(top, Fraction(f32(low)))

    assert XNNPACK.clamp(values, src, other, low, high).tolist() == [
        model_b(limited(model_dequantize(v, src)), other) for v in range(-128, 128)
    ]


def test_xnnpack_clamp_divides_on_one_grid_and_multiplies_between_two() -> None:
    # v = fl(1.55) = 13002342 * 2**-23 and s = fl(0.1) = 13421773 * 2**-27: v / s = 15.4999993, of
    # which 24 bits are 15.4999990 -> 15; v * fl(1 / s) = v * 10 = 15.4999995 -> 15.5 in 24 bits,
    # a tie to 16. One of the few limits that show which is computed; seen in the runtime, too.
    q, limit = qparams(0.1), f32(1.55)
    assert XNNPACK.clamp(ints(127), q, q, 0.0, limit).tolist() == [15]
    # + 1 before rounding: 16.5, a tie to 16; the limit's integer would be 15 + 1 as well, so - 1:
    # 14.5, a tie to 14; and at zero point 2, 17.5, a tie to 18.
    stored = [XNNPACK.clamp(ints(127), q, qparams(0.1, z), 0.0, limit) for z in (1, -1, 2)]
    assert [int(value) for value in stored] == [16, 14, 18]


@given(
    st.floats(-100, 100, width=32, allow_subnormal=False),
    st.floats(0, 100, width=32, allow_subnormal=False),
    int8_qparams(),
)
def test_xnnpack_clamp_bounds(low: float, span: float, q: QParams) -> None:
    high = f32(low + span)

    def model(v: float) -> int:
        if abs(v) < 2.0**-100:
            return q.zero_point
        shifted = fl(fl(Fraction(v) / scale_of(q)) + q.zero_point)
        bound = round(min(max(shifted, Fraction(-128)), Fraction(127)))
        return clip(bound, q.quant_min, q.quant_max)

    assert XNNPACK.clamp_bounds(low, high, q) == (model(low), model(high))


def test_clamp_bounds_by_hand() -> None:
    q = qparams(4.0, 1)
    # 6 / 4 + 1 = 2.5: with the zero point inside, a tie to 2; rounded before, 1.5 -> 2, + 1 = 3.
    assert XNNPACK.clamp_bounds(0.0, 6.0, q) == (1, 2)
    assert EXACT.clamp_bounds(0.0, 6.0, q) == (1, 3)
    assert FIXED_POINT.clamp_bounds(0.0, 6.0, q) == (1, 3)
    for mode in MODES:
        assert mode.clamp_bounds(-math.inf, math.inf, q) == (-128, 127)
        assert mode.clamp_bounds(0.0, math.inf, qparams(1.0, -3, -8, 7)) == (-3, 7)
        for low, high in [(1.0, 0.0), (math.nan, 1.0), (0.0, math.nan)]:
            with pytest.raises(SchemeError, match="low <= high"):
                mode.clamp_bounds(low, high, q)


def test_wide_clamp_bounds() -> None:
    q = QParams(f32(0.001), 0, -32768, 32767)
    for mode in MODES:
        assert mode.clamp_bounds(0.0, 6.0, q) == (0, 6000)
        assert mode.clamp_bounds(-math.inf, math.inf, q) == (-32768, 32767)


# xnnpack: averages -------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(1, 3000), st.data(), int8_qparams(), int8_qparams())
def test_xnnpack_mean(count: int, data: st.DataObject, src: QParams, dst: QParams) -> None:
    total = data.draw(st.integers(count * src.quant_min, count * src.quant_max))
    if fl(fl(scale_of(src) / scale_of(dst)) * fl(Fraction(1, count))) >= 256:
        with pytest.raises(SchemeError, match="multiplier of a mean"):
            XNNPACK.mean(ints(total), count, src, dst)
        return
    stored = XNNPACK.mean(ints(total), count, src, dst)
    assert stored.tolist() == [model_mean(total, count, src, dst)]


def test_mean_by_hand() -> None:
    src, dst = qparams(1.0), qparams(1.0, 1)
    # Means 0.5 and 1.5: XNNPACK rounds 1.5 and 2.5, zero point included; exact rounds 0.5 and 1.5.
    assert XNNPACK.mean(ints(2, 6), 4, src, dst).tolist() == [2, 2]
    assert EXACT.mean(ints(2, 6), 4, src, dst).tolist() == [1, 3]
    # -882 * 0.75 / 7 = -94.5, a tie to -94. fl(1 / 7) = 9586981 * 2**-26; S = 0.75 times that,
    # 14380471.5 * 2**-27, a tie to 14380472; 882 * S = 94.5000075, 24 bits of which are
    # 94.5 + 2**-17: -95. One division, fl(0.75 / 7) = 14380471 * 2**-27, would give -94.5.
    assert XNNPACK.mean(ints(-882), 7, qparams(0.75), qparams(1.0)).tolist() == [-95]
    assert EXACT.mean(ints(-882), 7, qparams(0.75), qparams(1.0)).tolist() == [-94]
    for mode in MODES:
        with pytest.raises(SchemeError, match="at least one element"):
            mode.mean(ints(1), 0, src, dst)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((2, 2), (2, 2), (0, 0)),
        ((3, 3), (2, 1), (1, 1)),
        ((2, 3), (1, 2), (1, 0)),
        ((4, 5), (3, 2), (2, 1)),
        ((1, 1), (2, 2), (0, 0)),
        ((7, 6), (1, 1), (0, 0)),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_avg_pool2d(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wide: bool,
    counted: bool,
) -> None:
    torch.manual_seed(3)
    src = QParams(f32(1e-4), 0, -32768, 32767) if wide else qparams(0.07, 11)
    same, other = src, qparams(1.3 if wide else 0.05, -3)
    x = torch.randint(src.quant_min, src.quant_max + 1, (1, 2, 9, 8))

    def windows() -> Iterator[tuple[tuple[int, ...], list[int | None]]]:
        """Position of each output and its taps, kernel column outermost; None does not count."""
        for n, c in itertools.product(range(1), range(2)):
            for oy in range((9 + 2 * padding[0] - kernel[0]) // stride[0] + 1):
                for ox in range((8 + 2 * padding[1] - kernel[1]) // stride[1] + 1):
                    taps: list[int | None] = []
                    for kx, ky in itertools.product(range(kernel[1]), range(kernel[0])):
                        y = oy * stride[0] + ky - padding[0]
                        x_ = ox * stride[1] + kx - padding[1]
                        inside = 0 <= y < 9 and 0 <= x_ < 8
                        outside = src.zero_point if counted else None
                        taps.append(int(x[n, c, y, x_]) if inside else outside)
                    yield (n, c, oy, ox), taps

    def xnnpack(taps: list[int | None], dst: QParams) -> int:
        reals = [Fraction(0) if t is None else model_dequantize(t, src) for t in taps]
        total = Fraction(0)
        count = sum(t is not None for t in taps)
        if counted and any(padding):
            for ky, kx in itertools.product(range(kernel[0]), range(kernel[1])):
                total = fl(total + reals[kx * kernel[0] + ky])
            mean = fl(total / count)
        else:
            for start in range(0, len(reals), 9):
                t = (reals[start : start + 9] + [Fraction(0)] * 9)[:9]
                left = fl(fl(t[2] + t[3]) + fl(t[4] + t[5]))
                right = fl(fl(fl(t[0] + t[1]) + t[8]) + fl(t[6] + t[7]))
                total = fl(total + fl(left + right))
            mean = fl(total * fl(Fraction(1, count)))
        if dst.fits_int8:
            return model_a(mean, dst)
        half_up = math.floor(fl(fl(mean * inverse(dst)) + Fraction(1, 2)))
        return clip(half_up, dst.quant_min, dst.quant_max)

    def yardstick(taps: list[int | None], dst: QParams) -> int:
        reals = [real(t, src) for t in taps if t is not None]
        return exact(sum(reals, Fraction(0)) / len(reals), dst)

    def tflite(taps: list[int | None], dst: QParams) -> int:
        values = [t for t in taps if t is not None]
        count, total = len(values), sum(values)
        if dst == src:
            rounded = (abs(total) + count // 2) // count
            return clip(rounded if total > 0 else -rounded, dst.quant_min, dst.quant_max)
        return model_tflite_mean(total, count, src, dst)

    models: dict[str, Callable[[list[int | None], QParams], int]] = {
        "xnnpack": xnnpack,
        "exact": yardstick,
        "fixed_point": tflite,
    }
    for dst, mode in itertools.product((same, other), MODES):
        stored = mode.avg_pool2d(
            x,
            src,
            dst,
            kernel_size=kernel,
            stride=stride,
            padding=padding,
            count_include_pad=counted,
        )
        model = models[mode.name]
        for index, taps in windows():
            assert int(stored[index]) == model(taps, dst)


def test_the_order_of_taps_matters() -> None:
    # 0.1 is rounded, so that sums in other orders differ; see that the model tells orders apart.
    torch.manual_seed(4)
    src, dst = qparams(0.1), QParams(f32(2.0**-23), 0, -32768, 32767)
    x = torch.randint(-128, 128, (1, 64, 3, 3))
    x[:, :, 2, 2] = -x.sum((2, 3)) + x[:, :, 2, 2]
    forward = XNNPACK.avg_pool2d(x, src, dst, kernel_size=(3, 3), stride=(1, 1))
    turned = x.transpose(2, 3)
    backward = XNNPACK.avg_pool2d(turned, src, dst, kernel_size=(3, 3), stride=(1, 1))
    assert not torch.equal(forward, backward)


def test_counted_padding() -> None:
    # Zero point 2, so that padding stands for 2; a 2x2 window over one element 10 and 3 pads.
    q, x = qparams(1.0, 2), torch.tensor([[[[10]]]])
    for mode in MODES:
        for counted, expected in [(True, 4), (False, 10)]:
            # (10 + 3 * 2) / 4 = 4.
            stored = mode.avg_pool2d(
                x,
                q,
                q,
                kernel_size=(2, 2),
                stride=(1, 1),
                padding=(1, 1),
                count_include_pad=counted,
            )
            assert stored.tolist() == [[[[expected] * 2] * 2]]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_pooling_windows_must_fit(mode: Arithmetic) -> None:
    q, x = qparams(1.0), torch.zeros(1, 1, 2, 2, dtype=torch.int8)
    for sizes in [((2, 2), (1, 1), (2, 0)), ((2, 2), (0, 1), (0, 0)), ((2, 2), (1, 1), (-1, 0))]:
        kernel, stride, padding = sizes
        with pytest.raises(SchemeError, match="at most half the kernel"):
            mode.avg_pool2d(
                x,
                q,
                q,
                kernel_size=kernel,
                stride=stride,
                padding=padding,
                count_include_pad=False,
            )
    with pytest.raises(InputError, match="does not fit an input"):
        mode.avg_pool2d(x, q, q, kernel_size=(3, 1), stride=(1, 1))


# xnnpack: wide, and independence of global state -------------------------------------------------


@given(st.data(), scales, scales, scales, st.booleans())
def test_xnnpack_wide_elementwise_runs_in_float(
    data: st.DataObject, sa: float, sb: float, so: float, wide_output: bool
) -> None:
    qa, qb = QParams(sa, 0, -32768, 32767), QParams(sb, 3, -128, 127)
    out = QParams(so, 0, -32768, 32767) if wide_output else QParams(so, -5, -128, 127)
    a, b = data.draw(st.integers(-32768, 32767)), data.draw(st.integers(-128, 127))
    x, y = model_dequantize(a, qa), model_dequantize(b, qb)

    def stored(value: Fraction) -> list[int]:
        if not wide_output:
            return [model_a(value, out)]
        half_up = math.floor(fl(fl(value * inverse(out)) + Fraction(1, 2)))
        return [clip(half_up, -32768, 32767)]

    assert XNNPACK.add(ints(a), ints(b), qa, qb, out).tolist() == stored(fl(x + y))
    subtracted = XNNPACK.add(ints(a), ints(b), qa, qb, out, subtract=True)
    assert subtracted.tolist() == stored(fl(x - y))
    assert XNNPACK.mul(ints(a), ints(b), qa, qb, out).tolist() == stored(fl(x * y))
    assert XNNPACK.square(ints(a), qa, QParams(so, 0, -32768, 32767)).tolist() == [
        clip(math.floor(fl(fl(fl(x * x) * fl(1 / Fraction(so))) + Fraction(1, 2))), -32768, 32767)
    ]
    assert XNNPACK.requantize(ints(a), qa, out).tolist() == stored(x)
    assert XNNPACK.clamp(ints(a), qa, out, 0.0, 1.0).tolist() == stored(
        min(max(x, Fraction(0)), Fraction(1))
    )


def test_xnnpack_wide_mean() -> None:
    wide, narrow = QParams(1.0, 0, -32768, 32767), qparams(1.0, 3)
    # Means -2.5, -0.5, 0.5, 2.5: halves go up above 8 bits, and to even before the zero point 3.
    total = ints(-5, -1, 1, 5)
    assert XNNPACK.mean(total, 2, wide, wide).tolist() == [-2, 0, 1, 3]
    assert XNNPACK.mean(total, 2, wide, narrow).tolist() == [1, 3, 3, 5]
    # Zero point 3 twice is 6 less: -5.5, -3.5, -2.5, -0.5.
    assert XNNPACK.mean(total, 2, narrow, wide).tolist() == [-5, -3, -2, 0]


def every_result(mode: Arithmetic) -> list[Tensor]:
    torch.manual_seed(5)
    qa, qb, out = qparams(0.1, 7), qparams(0.013, -128), qparams(0.08, 127)
    a, b = torch.randint(-128, 128, (1, 2, 64, 64)), torch.randint(-128, 128, (1, 2, 64, 64))
    x = torch.randn(4096, dtype=torch.float32)
    return [
        mode.quantize(x, qa),
        mode.dequantize(a, qa),
        mode.requantize_accumulator(a * b, f32(0.1), f32(0.013), 0, out),
        mode.requantize(a, qa, out),
        mode.add(a, b, qa, qb, out),
        mode.mul(a, b, qa, qb, out),
        mode.square(a, qa, out),
        mode.mean(a.sum((2, 3)), 4096, qa, out),
        mode.avg_pool2d(a, qa, out, kernel_size=(3, 3), stride=(1, 1)),
        mode.clamp(a, qa, out, 0.0, 6.0),
        torch.tensor(mode.clamp_bounds(0.0, 6.0, qa)),
        quantize_emulated_int16(x, QParams(f32(0.001), 0, -32768, 32767)),
        torch.stack(split_multiplier(xnnpack_multiplier(f32(0.1), f32(0.013), f32(0.08)))),
    ]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_default_dtype_does_not_matter(mode: Arithmetic) -> None:
    expected = every_result(mode)
    torch.set_default_dtype(torch.float64)
    try:
        results = every_result(mode)
    finally:
        torch.set_default_dtype(torch.float32)
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        assert torch.equal(result, reference)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_dtypes_of_integers(mode: Arithmetic, dtype: torch.dtype) -> None:
    # -128 - 127 does not fit int8: a method must widen before it subtracts.
    q, out = qparams(1.0, 127), qparams(2.0, 0)
    a = torch.tensor([[-128, -1], [0, 127]], dtype=dtype)
    # -255 + -255 = -510 -> -255; -128 + -128 -> -128; -127 + -127 -> -127; 0.
    total = mode.add(a, a, q, q, out)
    assert total.dtype == torch.int32
    assert total.tolist() == [[-128, -128], [-127, 0]]
    # 255 * 255 = 65025 saturates; 128 * 128 = 16384; 127 * 127 = 16129; 0.
    product = mode.mul(a, a, q, q, qparams(1024.0))
    assert product.dtype == torch.int32
    assert product.tolist() == [[64, 16], [16, 0]]
    for stored in (
        mode.requantize(a, q, out),
        mode.square(a, q, out),
        mode.clamp(a, q, out, -1.0, 1.0),
        mode.mean(a, 1, q, out),
        mode.avg_pool2d(a, q, out, kernel_size=(1, 1), stride=(1, 1)),
        mode.requantize_accumulator(a, 1.0, 1.0, 0, out),
    ):
        assert stored.dtype == torch.int32
        assert stored.shape == a.shape


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1, 1)])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_shapes(mode: Arithmetic, shape: tuple[int, ...]) -> None:
    q, a = qparams(0.5, 3), torch.full(shape, 4, dtype=torch.int8)
    results = [
        mode.quantize(torch.full(shape, 0.5), q),
        mode.requantize(a, q, q),
        mode.requantize_accumulator(a.int() - 3, 0.5, 1.0, 0, q),
        mode.mean(a, 1, q, q),
    ]
    for result in results:
        assert result.shape == a.shape
        assert torch.equal(result, a.int())
    assert mode.dequantize(a, q).shape == a.shape
    three = torch.tensor([[3]])
    assert mode.add(a, three, q, q, q).shape == (a + three).shape
    assert mode.mul(a, three, q, q, q).shape == (a + three).shape


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_bounds_clamp_after_saturation(mode: Arithmetic) -> None:
    q = qparams(1.0)
    a = ints(-100, -5, 0, 5, 100)
    expected = [-4, -4, 0, 5, 6]
    bounds = (-4, 6)
    one, zero = ints(1), ints(0)
    assert mode.requantize(a, q, q, bounds=bounds).tolist() == expected
    assert mode.add(a, zero, q, q, q, bounds=bounds).tolist() == expected
    assert mode.mul(a, one, q, q, q, bounds=bounds).tolist() == expected
    assert mode.square(ints(1, 2, 3), q, q, bounds=bounds).tolist() == [1, 4, 6]
    accumulated = mode.requantize_accumulator(a, 1.0, 1.0, 0, q, bounds=bounds)
    assert accumulated.tolist() == expected
    with pytest.raises(SchemeError, match=r"\[1, 0\] are empty"):
        mode.requantize(a, q, q, bounds=(1, 0))


# fixed_point -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, (0, 0)),
        (1.0, (2**30, 1)),
        (0.5, (2**30, 0)),
        (0.25, (2**30, -1)),
        (0.75, (3 * 2**29, 0)),
        (1.5, (3 * 2**29, 1)),
        (2.0, (2**30, 2)),
        # 1 - 2**-32 has the fraction (2**32 - 1) * 2**-32; times 2**31 it is 2**31 - 0.5, which
        # rounds away from zero to 2**31 and is renormalized to 2**30, shift + 1.
        (1.0 - 2.0**-32, (2**30, 1)),
        (1.0 - 2.0**-31, (2**31 - 1, 0)),
        (2.0**-32, (2**30, -31)),
        (2.0**-33, (0, 0)),
    ],
)
def test_quantize_multiplier_by_hand(value: float, expected: tuple[int, int]) -> None:
    assert quantize_multiplier(value) == expected


@given(st.floats(2.0**-31, 2.0**29))
def test_quantize_multiplier(value: float) -> None:
    multiplier, shift = quantize_multiplier(value)
    assert 2**30 <= multiplier < 2**31
    unit = Fraction(2) ** (shift - 31)
    assert abs(Fraction(value) - multiplier * unit) <= unit / 2


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan, 2.0**30])
def test_quantize_multiplier_refuses(value: float) -> None:
    with pytest.raises(SchemeError, match="requantization multiplier"):
        quantize_multiplier(value)


@given(st.lists(st.tuples(int32s, int32s), min_size=1, max_size=20))
def test_saturating_rounding_doubling_high_mul(pairs: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(pairs).unbind(1)
    assert saturating_rounding_doubling_high_mul(a, b).tolist() == [srdhm(*p) for p in pairs]


def test_saturating_rounding_doubling_high_mul_by_hand() -> None:
    # a * 2**30 / 2**31 = a / 2: ties upwards, as VQRDMULH; the only overflow saturates.
    a = torch.tensor([-3, -1, 1, 3], dtype=torch.int32)
    assert saturating_rounding_doubling_high_mul(a, 2**30).tolist() == [-1, 0, 1, 2]
    edge = torch.tensor([INT32_MIN], dtype=torch.int32)
    assert saturating_rounding_doubling_high_mul(edge, INT32_MIN).tolist() == [INT32_MAX]
    assert saturating_rounding_doubling_high_mul(edge, INT32_MAX).tolist() == [-INT32_MAX]


@given(st.lists(st.tuples(int32s, st.integers(0, 31)), min_size=1, max_size=20))
def test_rounding_divide_by_pot(pairs: list[tuple[int, int]]) -> None:
    x, exponent = torch.tensor(pairs).unbind(1)
    assert rounding_divide_by_pot(x, exponent).tolist() == [divide_by_pot(*p) for p in pairs]


def test_rounding_divide_by_pot_by_hand() -> None:
    # Halves away from zero, unlike the step before it.
    assert rounding_divide_by_pot(ints(-3, -1, 1, 3), 1).tolist() == [-2, -1, 1, 2]
    assert rounding_divide_by_pot(ints(-6, -5, 5, 6), 2).tolist() == [-2, -1, 1, 2]


multipliers = st.integers(2**30, 2**31 - 1)


@settings(max_examples=150)
@given(st.lists(st.tuples(int32s, multipliers, st.integers(-31, 30)), min_size=1, max_size=20))
def test_multiply_by_quantized_multiplier(cases: list[tuple[int, int, int]]) -> None:
    x, multiplier, shift = torch.tensor(cases).unbind(1)
    stored = multiply_by_quantized_multiplier(x, multiplier, shift)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [mbqm(*case) for case in cases]


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.integers(-(2**47), 2**47 - 1), multipliers, st.integers(-31, 7)),
        min_size=1,
        max_size=20,
    )
)
def test_multiply_by_quantized_multiplier_int64(cases: list[tuple[int, int, int]]) -> None:
    x, multiplier, shift = torch.tensor(cases).unbind(1)
    stored = multiply_by_quantized_multiplier_int64(x, multiplier, shift)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [mbqm64(*case) for case in cases]


def test_multiply_by_quantized_multiplier_by_hand() -> None:
    # 3 * 0.25: the multiplier 2**30 gives 1.5 -> 2, the shift gives 1; two roundings make 0.75 a 1.
    # 1 * 0.25: 0.5 -> 1, then 0.5 -> 1: the error of rounding twice. -1: -0.5 -> 0, 0.
    assert multiply_by_quantized_multiplier(ints(3, 1, -1), 2**30, -1).tolist() == [1, 1, 0]
    # In the 64-bit path once: 0.75 -> 1, 0.25 -> 0, -0.25 -> 0, and ties go up.
    stored = multiply_by_quantized_multiplier_int64(ints(3, 1, -1, 2, -2), 2**30, -1)
    assert stored.tolist() == [1, 0, 0, 1, 0]
    # A left shift saturates: 2**30 * 4.
    assert multiply_by_quantized_multiplier(ints(2**30, -(2**30)), 2**30, 3).tolist() == [
        2**30,
        -(2**30),
    ]


def test_fixed_point_limits() -> None:
    for shift in (-32, 31):
        with pytest.raises(SchemeError, match="shift must lie"):
            multiply_by_quantized_multiplier(ints(1), 2**30, shift)
    with pytest.raises(SchemeError, match=r"shift must lie in \[-31, 7\]"):
        multiply_by_quantized_multiplier_int64(ints(1), 2**30, 8)
    for multiplier in (-1, 2**31):
        with pytest.raises(SchemeError, match="multiplier must lie"):
            multiply_by_quantized_multiplier(ints(1), multiplier, 0)
    for x in (2**47, -(2**47) - 1):
        with pytest.raises(InputError, match="48 bits"):
            multiply_by_quantized_multiplier_int64(ints(x), 2**30, 0)


def model_tflite_mean(total: int, count: int, src: QParams, dst: QParams) -> int:
    multiplier, shift = quantize_multiplier(float(scale_of(src)) / float(scale_of(dst)))
    extra = min(count.bit_length() - 1, 32, 31 + shift)
    multiplier = multiplier * 2**extra // count
    scale = mbqm if max(src.levels, dst.levels) <= 256 else mbqm64
    mean = scale(total - count * src.zero_point, multiplier, shift - extra)
    return clip(mean + dst.zero_point, dst.quant_min, dst.quant_max)


@given(st.integers(1, 3000), st.data(), any_qparams(), any_qparams())
def test_fixed_point_mean(count: int, data: st.DataObject, src: QParams, dst: QParams) -> None:
    total = data.draw(st.integers(count * src.quant_min, count * src.quant_max))
    if max(src.levels, dst.levels) > 256 and scale_of(src) / scale_of(dst) >= 2**7:
        return
    stored = FIXED_POINT.mean(ints(total), count, src, dst)
    assert stored.tolist() == [model_tflite_mean(total, count, src, dst)]


def test_fixed_point_mean_of_tiny_ratios() -> None:
    # 2**-30 / 2 is (2**30, -30): dividing by 4 may shift by one more only, so the multiplier is
    # 2**31 / 4 = 2**29 with shift -31. 2**31 - 4 times that is 0.25: 0.
    src, dst = QParams(2.0**-30, 0, -128, 127), qparams(2.0)
    assert FIXED_POINT.mean(ints(2**31 - 4), 4, src, dst).tolist() == [0]
    assert model_tflite_mean(2**31 - 4, 4, src, dst) == 0


@given(st.lists(st.floats(-(2.0**20), 2.0**20, width=32), min_size=1, max_size=20), any_qparams())
def test_fixed_point_quantize(values: list[float], q: QParams) -> None:
    def model(x: float) -> int:
        if abs(x) < 2.0**-100:
            return q.zero_point
        quotient = fl(Fraction(x) / scale_of(q))
        magnitude = math.floor(abs(quotient) + Fraction(1, 2))
        away = magnitude if quotient > 0 else -magnitude
        return clip(away + q.zero_point, q.quant_min, q.quant_max)

    stored = FIXED_POINT.quantize(torch.tensor(values, dtype=torch.float32), q)
    assert stored.tolist() == [model(x) for x in values]


def test_fixed_point_quantize_by_hand() -> None:
    q = qparams(1.0)
    below_half = float(np.nextafter(np.float32(0.5), np.float32(0)))
    # Halves away from zero; the largest float32 below 0.5 stays 0, though adding 0.5 gives 1.0.
    x = torch.tensor([-2.5, -0.5, 0.5, 1.5, below_half, math.inf, -math.inf])
    assert FIXED_POINT.quantize(x, q).tolist() == [-3, -1, 1, 2, 0, 127, -128]
    for mode in (FIXED_POINT, EXACT):
        with pytest.raises(InputError, match="NaN"):
            mode.quantize(torch.tensor([math.nan]), q)


@given(st.data(), any_qparams())
def test_fixed_point_dequantize(data: st.DataObject, q: QParams) -> None:
    values = data.draw(stored_values(q))
    reals = FIXED_POINT.dequantize(torch.tensor(values), q)
    assert [Fraction(r) for r in reals.tolist()] == [fl(real(v, q)) for v in values]


def model_tflite_add(a: int, b: int, qa: QParams, qb: QParams, out: QParams, subtract: bool) -> int:
    sa, sb, so = (float(scale_of(q)) for q in (qa, qb, out))
    left = 20 if max(qa.levels, qb.levels, out.levels) <= 256 else 15
    twice = 2.0 * max(sa, sb)
    scaled_a = mbqm((a - qa.zero_point) * 2**left, *quantize_multiplier(sa / twice))
    scaled_b = mbqm((b - qb.zero_point) * 2**left, *quantize_multiplier(sb / twice))
    raw = scaled_a - scaled_b if subtract else scaled_a + scaled_b
    stored = mbqm(raw, *quantize_multiplier(twice / (2.0**left * so)))
    return clip(stored + out.zero_point, out.quant_min, out.quant_max)


@pytest.mark.parametrize("subtract", slow_but([True], [False, True]))
@pytest.mark.parametrize(("qa", "qb", "out"), slow_but(COMBINATIONS[2:3], COMBINATIONS[1:4]))
def test_fixed_point_add_of_every_int8_pair(
    qa: QParams, qb: QParams, out: QParams, subtract: bool
) -> None:
    a, b = all_pairs(-128, 127)
    stored = FIXED_POINT.add(a, b, qa, qb, out, subtract=subtract)
    expected = [model_tflite_add(x, y, qa, qb, out, subtract) for x, y in pairs_of(a, b)]
    assert stored.reshape(-1).tolist() == expected
    # 20 fractional bits: never more than one step from the truth.
    assert int((stored - EXACT.add(a, b, qa, qb, out, subtract=subtract)).abs().max()) <= 1


@settings(max_examples=150)
@given(st.data(), any_qparams(), any_qparams(), any_qparams(), st.booleans())
def test_fixed_point_add(
    data: st.DataObject, qa: QParams, qb: QParams, out: QParams, subtract: bool
) -> None:
    a = data.draw(st.integers(qa.quant_min, qa.quant_max))
    b = data.draw(st.integers(qb.quant_min, qb.quant_max))
    stored = FIXED_POINT.add(ints(a), ints(b), qa, qb, out, subtract=subtract)
    assert stored.tolist() == [model_tflite_add(a, b, qa, qb, out, subtract)]


def test_fixed_point_add_limits() -> None:
    wide = QParams(1.0, 0, -(2**15), 2**15)
    with pytest.raises(SchemeError, match="at most 16 bits"):
        FIXED_POINT.add(ints(1), ints(1), wide, wide, wide)


@pytest.mark.parametrize(("qa", "qb", "out"), COMBINATIONS)
def test_fixed_point_mul_of_every_int8_pair(qa: QParams, qb: QParams, out: QParams) -> None:
    a, b = all_pairs(-128, 127)
    real_multiplier = float(scale_of(qa)) * float(scale_of(qb)) / float(scale_of(out))
    pair = quantize_multiplier(real_multiplier)
    expected = [
        clip(
            mbqm((x - qa.zero_point) * (y - qb.zero_point), *pair) + out.zero_point,
            out.quant_min,
            out.quant_max,
        )
        for x, y in pairs_of(a, b)
    ]
    assert FIXED_POINT.mul(a, b, qa, qb, out).reshape(-1).tolist() == expected


def test_fixed_point_mul_takes_48_bits_where_the_product_needs_them() -> None:
    symmetric, shifted = QParams(1.0, 0, -32768, 32767), QParams(1.0, -32768, -32768, 32767)
    out = QParams(2.0**20, 0, -32768, 32767)
    # 32767 * -32768 = -1073709056; / 2**20 = -1023.97 -> -1024.
    product = FIXED_POINT.mul(ints(32767), ints(-32768), symmetric, symmetric, out)
    assert product.tolist() == [-1024]
    # 65535 * 65535 = 4294836225 exceeds int32; / 2**20 = 4095.87 -> 4096.
    product = FIXED_POINT.mul(ints(32767), ints(32767), shifted, shifted, out)
    assert product.tolist() == [4096]
    assert torch.equal(FIXED_POINT.square(ints(32767), shifted, out), product)


@given(st.data(), any_qparams(), any_qparams())
def test_fixed_point_requantize(data: st.DataObject, src: QParams, dst: QParams) -> None:
    values = data.draw(stored_values(src))
    pair = quantize_multiplier(float(scale_of(src)) / float(scale_of(dst)))
    stored = FIXED_POINT.requantize(torch.tensor(values), src, dst)
    assert stored.tolist() == [
        clip(mbqm(v - src.zero_point, *pair) + dst.zero_point, dst.quant_min, dst.quant_max)
        for v in values
    ]


@given(st.lists(int32s, min_size=1, max_size=20), scales, scales, any_qparams())
def test_fixed_point_gemm(values: list[int], sx: float, sw: float, out: QParams) -> None:
    pair = quantize_multiplier(sx * sw / float(scale_of(out)))
    acc = torch.tensor(values)
    stored = FIXED_POINT.requantize_accumulator(acc, sx, sw, 0, out)
    low, high, zero = out.quant_min, out.quant_max, out.zero_point
    assert stored.tolist() == [clip(mbqm(v, *pair) + zero, low, high) for v in values]
    if pair[1] > 7:
        with pytest.raises(SchemeError, match="out of reach"):
            FIXED_POINT.requantize_accumulator(acc, sx, sw, 0, out, accumulator_width=64)
        return
    wide = FIXED_POINT.requantize_accumulator(acc * 2**15, sx, sw, 0, out, accumulator_width=64)
    assert wide.tolist() == [clip(mbqm64(v * 2**15, *pair) + zero, low, high) for v in values]


def test_fixed_point_gemm_wraps_32_bits_only() -> None:
    out = QParams(1.0, 0, -32768, 32767)
    gemm = FIXED_POINT.requantize_accumulator
    assert gemm(ints(2**32 + 7), 1.0, 1.0, 0, out).tolist() == [7]
    assert gemm(ints(2**32 + 7), 1.0, 1.0, 0, out, accumulator_width=64).tolist() == [32767]
    for mode in (FIXED_POINT, XNNPACK):
        with pytest.raises(SchemeError, match="32 or 64 bits, asked for 48"):
            mode.requantize_accumulator(ints(1), 1.0, 1.0, 0, out, accumulator_width=48)


@pytest.mark.parametrize("mode", [FIXED_POINT, EXACT], ids=lambda mode: mode.name)
def test_clamp_is_requantize_and_bounds(mode: Arithmetic) -> None:
    values = torch.arange(-128, 128)
    src, other = qparams(0.03, 4), qparams(0.041, -9)
    for low, high in [(0.0, math.inf), (0.0, 6.0), (-0.31, 0.47)]:
        same_bounds = mode.clamp_bounds(low, high, src)
        assert mode.clamp(values, src, src, low, high).tolist() == [
            clip(v, *same_bounds) for v in range(-128, 128)
        ]
        bounds = mode.clamp_bounds(low, high, other)
        assert torch.equal(
            mode.clamp(values, src, other, low, high),
            mode.requantize(values, src, other).clamp(*bounds),
        )


# exact -------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), any_qparams())
def test_exact_quantize(values: list[float], q: QParams) -> None:
    def model(x: float) -> int:
        if math.isinf(x):
            return q.quant_max if x > 0 else q.quant_min
        return exact(Fraction(x), q)

    stored = EXACT.quantize(torch.tensor(values, dtype=torch.float32), q)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [model(x) for x in values]


def test_exact_quantize_of_extreme_floats() -> None:
    tiny, huge = 2.0**-149, f32(3.4028235e38)
    q = QParams(2.0**-126, 0, -(2**31), 2**31 - 1)
    # 2**-149 / 2**-126 = 2**-23 -> 0; 3 * 2**-127 / 2**-126 = 1.5 -> 2.
    x = torch.tensor([tiny, -tiny, 3 * 2.0**-127, huge, -huge])
    assert EXACT.quantize(x, q).tolist() == [0, 0, 2, 2**31 - 1, -(2**31)]
    # The largest float32 over 2**127 is just below 2: one step, not the end of the range.
    coarse = QParams(2.0**127, 0, -128, 127)
    x = torch.tensor([huge, math.inf, -math.inf])
    assert EXACT.quantize(x, coarse).tolist() == [2, 127, -128]


@given(
    st.lists(int32s, min_size=1, max_size=20),
    st.floats(2.0**-120, 2.0**90, width=32),
    st.sampled_from([0, 1, -(2**31), 2**31 - 1]),
)
def test_exact_dequantize(values: list[int], scale: float, zero_point: int) -> None:
    q = QParams(scale, zero_point, INT32_MIN, INT32_MAX)
    reals = EXACT.dequantize(torch.tensor(values), q)
    assert reals.dtype == torch.float32
    assert [Fraction(r) for r in reals.tolist()] == [fl(real(v, q)) for v in values]


def test_exact_dequantize_rounds_once() -> None:
    # 3002997351 * 12345687 = 37074065357275137 = n * 2**32 + 2**31 + 1 with n even, of 56 bits:
    # just above the middle of two float32. Double holds 53 bits, drops the 1, and ties to n.
    product = 3002997351 * 12345687
    assert (product >> 32) % 2 == 0
    assert product % 2**32 == 2**31 + 1
    q = QParams(12345687 * 2.0**-23, INT32_MIN, INT32_MIN, INT32_MAX)
    stored = torch.tensor(3002997351 + INT32_MIN)
    assert float(EXACT.dequantize(stored, q)) == ((product >> 32) + 1) * 2.0 ** (32 - 23)
    assert float(FIXED_POINT.dequantize(stored, q)) == (product >> 32) * 2.0 ** (32 - 23)


def test_exact_dequantize_refuses_more_than_32_bits() -> None:
    with pytest.raises(InputError, match="exceeds 32 bits"):
        EXACT.dequantize(ints(2**33), qparams(1.0))


@given(
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20), scales, scales, any_qparams()
)
def test_exact_gemm(values: list[int], sx: float, sw: float, out: QParams) -> None:
    stored = EXACT.requantize_accumulator(torch.tensor(values), sx, sw, 0, out)
    product = Fraction(sx) * Fraction(sw)
    assert stored.tolist() == [exact(v * product, out) for v in values]


@settings(max_examples=150)
@given(st.data(), any_qparams(), any_qparams(), any_qparams())
def test_exact_elementwise(data: st.DataObject, qa: QParams, qb: QParams, out: QParams) -> None:
    a, b = data.draw(stored_values(qa)), data.draw(stored_values(qb))
    ta, tb = torch.tensor(a)[:, None], torch.tensor(b)
    pairs = [(real(x, qa), real(y, qb)) for x, y in itertools.product(a, b)]

    def flat(t: Tensor) -> list[int]:
        values: list[int] = t.reshape(-1).tolist()
        return values

    assert flat(EXACT.add(ta, tb, qa, qb, out)) == [exact(x + y, out) for x, y in pairs]
    assert flat(EXACT.add(ta, tb, qa, qb, out, subtract=True)) == [
        exact(x - y, out) for x, y in pairs
    ]
    assert flat(EXACT.mul(ta, tb, qa, qb, out)) == [exact(x * y, out) for x, y in pairs]
    assert flat(EXACT.square(ta, qa, out)) == [exact(real(x, qa) ** 2, out) for x in a]
    assert flat(EXACT.requantize(ta, qa, out)) == [exact(real(x, qa), out) for x in a]
    count = data.draw(st.integers(1, 999))
    assert flat(EXACT.mean(ta * count, count, qa, out)) == [exact(real(x, qa), out) for x in a]
    low, high = sorted(data.draw(st.tuples(scales, scales)))
    assert flat(EXACT.clamp(ta, qa, out, low, high)) == [
        exact(min(max(real(x, qa), Fraction(low)), Fraction(high)), out) for x in a
    ]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_int4_pair_with_power_of_two_scales(mode: Arithmetic) -> None:
    # Scales that no mode rounds: the modes differ in ties only, each in its own known way.
    a, b = all_pairs(-8, 7)
    q, out = qparams(0.5, -1, -8, 7), qparams(1.0, 2, -8, 7)

    def half_up(value: Fraction) -> int:
        return math.floor(value + Fraction(1, 2))

    def half_away(value: Fraction) -> int:
        return half_up(value) if value >= 0 else -half_up(-value)

    rounding: dict[str, Callable[[Fraction], int]] = {
        "xnnpack": half_up,
        "exact": round,
        "fixed_point": half_away,
    }
    expected = [
        clip(rounding[mode.name](real(x, q) + real(y, q)) + 2, -8, 7) for x, y in pairs_of(a, b)
    ]
    assert mode.add(a, b, q, q, out).reshape(-1).tolist() == expected


def test_exact_is_fast_enough() -> None:
    acc = torch.randint(-(2**20), 2**20, (4, 25, 32, 32))
    scale = torch.rand(25) + 0.1
    stored = EXACT.requantize_accumulator(acc, f32(0.01), scale, 1, qparams(50.0, 3))
    assert stored.shape == acc.shape
    float_result = acc.double() * f32(0.01) * scale.double()[:, None, None] / 50.0
    assert int((stored - 3 - float_result.round().clamp(-131, 124)).abs().max()) <= 1


# accumulator_bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "bias", "bits"),
    [
        # 127 * -128 = -16256 and 127 * 127 = 16129 fit [-2**14, 2**14): 15 bits.
        ([[127]], None, 15),
        # -128 * -128 = 16384 = 2**14 does not.
        ([[-128]], None, 16),
        # 128 * -128 = -2**14 does, exactly.
        ([[64, 64]], None, 15),
        ([[0]], None, 1),
        ([[0]], [-1], 1),
        ([[0]], [1], 2),
        ([[0]], [2**31 - 1], 32),
        ([[0]], [-(2**31)], 32),
        ([[1]], [2**31 - 1], 33),
        # The worst row decides.
        ([[1, 1], [127, -127], [0, 0]], [0, 0, 3], 16),
    ],
)
def test_accumulator_bits_by_hand(
    weight: list[list[int]], bias: list[int] | None, bits: int
) -> None:
    assert (
        accumulator_bits(
            torch.tensor(weight),
            quant_min=-128,
            quant_max=127,
            zero_point=0,
            bias=None if bias is None else torch.tensor(bias),
        )
        == bits
    )


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(-3, 0),
    st.integers(0, 3),
    st.data(),
)
def test_accumulator_bits_is_the_least_that_holds_every_sum(
    rows: list[list[int]], low: int, high: int, data: st.DataObject
) -> None:
    zero_point = data.draw(st.integers(low, high))
    bias = data.draw(st.lists(st.integers(-20, 20), min_size=len(rows), max_size=len(rows)))
    inputs = range(low, high + 1)
    sums: set[int] = set()
    for row, start in zip(rows, bias, strict=True):
        for x in itertools.product(inputs, repeat=3):
            terms = [w * (v - zero_point) for w, v in zip(row, x, strict=True)]
            sums.update(itertools.accumulate(terms, initial=start))
    bits = accumulator_bits(
        torch.tensor(rows, dtype=torch.int8).reshape(len(rows), 1, 3, 1),
        quant_min=low,
        quant_max=high,
        zero_point=zero_point,
        bias=torch.tensor(bias, dtype=torch.int32),
    )

    def holds(n: int) -> bool:
        return -(1 << (n - 1)) <= min(sums) and max(sums) < 1 << (n - 1)

    assert holds(bits)
    assert bits == 1 or not holds(bits - 1)


def test_accumulator_bits_beyond_int64() -> None:
    # 2**31 ones times 2**32 - 1 is checked without summing in 64 bits: 2**40 * (2**32 - 1) * 4.
    weight = torch.full((1, 4), 2**40)
    bits = accumulator_bits(weight, quant_min=0, quant_max=2**32 - 1, zero_point=0)
    assert bits == (4 * 2**40 * (2**32 - 1)).bit_length() + 1


def test_accumulator_bits_refuses() -> None:
    bits = functools.partial(accumulator_bits, quant_min=-128, quant_max=127)
    weight = torch.ones(2, 3, dtype=torch.int8)
    with pytest.raises(SchemeError, match="Zero point 128"):
        bits(weight, zero_point=128)
    with pytest.raises(InputError, match="does not fit 2 output channels"):
        bits(weight, zero_point=0, bias=ints(1))
    with pytest.raises(InputError, match="must hold integers"):
        bits(weight.float(), zero_point=0)
    with pytest.raises(InputError, match="no output channel"):
        bits(torch.ones(0, 3, dtype=torch.int8), zero_point=0)


@pytest.mark.parametrize("scale", [True, "0.5", None, [0.5]])
def test_a_scale_is_a_number(scale: object) -> None:
    with pytest.raises(SchemeError, match="must be a float or a float32 tensor"):
        QParams(scale=scale, zero_point=0, quant_min=-128, quant_max=127)  # type: ignore[arg-type]
