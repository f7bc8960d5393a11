"""What a tensor and an op become: immutable schemes with readable names.

A scheme's name is its whole content and parses back to it: ``a8w8`` is int8 activations, int8
weights and an int32 bias; ``a8w4-per_tensor-bias16`` narrows the weights, shares one weight scale
and keeps 16 bits of bias.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast

import torch
from torchao.quantization.pt2e import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PlaceholderObserver,
)
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from custom_quantizer.core.formats import IntFormat
from custom_quantizer.errors import SchemeError, nearest

__all__ = [
    "ACTIVATION_SUFFIXES",
    "COMMON_SCHEMES",
    "FORMAT_PATTERN",
    "INT32_BIAS",
    "PERCENTILE_PATTERN",
    "SCHEME_PATTERN",
    "SUFFIXES",
    "Granularity",
    "OpScheme",
    "TensorScheme",
    "activation_scheme",
    "coerce_scheme",
    "observer_name",
    "parse_observer",
    "scheme",
]

Granularity = Literal["per_tensor", "per_channel", "per_group"]

OBSERVERS = ("minmax", "percentile", "histogram", "entropy", "moving_average", "lsq")
"""Names of the activation observers a scheme can ask for; also ``percentile99.9`` and the like."""

WEIGHT_OBSERVERS = ("minmax", "lsq")
"""Names of the weight observers: scales by the largest weight, or learned in training."""

DEFAULT_PERCENT = "99.99"
"""Share of the values that ``percentile`` keeps, when its name does not say."""

PERCENTILE_PATTERN = r"percentile[0-9]+(\.[0-9]+)?"
"""Observers that name the percentage they keep."""

INT32_BIAS = IntFormat(32)


@dataclass(frozen=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        format: the integers it is stored in.
        symmetric: zero point 0, range mirrored around it.
        granularity: one scale for the tensor, for each output channel, or for each group of
            ``group_size`` input channels of each output channel.
        group_size: with ``per_group`` only.
        observer: which statistics decide the range of an activation; of a weight, whether its
            scales are learned in training (``lsq``).
    """

    format: IntFormat
    symmetric: bool = False
    granularity: Granularity = "per_tensor"
    group_size: int | None = None
    observer: str = "minmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "observer", observer_name(self.observer))

    def __deepcopy__(self, _memo: dict[int, Any]) -> TensorScheme:
        """Itself: nothing in it changes, and torchao copies it twice for each observer."""
        return self


@dataclass(frozen=True)
class OpScheme:
    """How one op is quantized: its activations, its weight and its bias.

    Attributes:
        activation: inputs and output; ``None`` never occurs in a static scheme.
        weight: the weight of convolutions and linear layers.
        bias: format of the derived bias, or ``None`` for a bias left in float.
        dynamic: activations are quantized at run time, per call (linear layers, and convolutions
            over two dims without groups).
    """

    activation: TensorScheme
    weight: TensorScheme
    bias: IntFormat | None = INT32_BIAS
    dynamic: bool = False

    def __post_init__(self) -> None:
        for role, bits in (("activation", self.activation), ("weight", self.weight)):
            if not 2 <= bits.format.bits <= 16:
                raise SchemeError(f"{role}s have 2 to 16 bits, not {bits.format.bits}")
        if self.bias is not None and not 4 <= self.bias.bits <= 32:
            raise SchemeError(f"a bias has 4 to 32 bits (or stays float), not {self.bias.bits}")
        if self.activation.format.bits > 8 and not self.activation.symmetric:
            raise SchemeError(
                f"{self.activation.format} activations are symmetric (zero point 0, the 16x8 "
                "convention); affine activations have at most 8 bits"
            )
        group = self.weight.group_size
        if (self.weight.granularity == "per_group") != (group is not None):
            raise SchemeError("a group size goes with weight_granularity='per_group', and only so")
        if group is not None and group < 1:
            raise SchemeError(f"a weight group has at least 1 input channel, not {group}")
        if self.weight.observer not in WEIGHT_OBSERVERS:
            raise SchemeError(
                f"weights have no observer {self.weight.observer!r}; legal: "
                f"{', '.join(WEIGHT_OBSERVERS)}"
            )
        if not self.weight.symmetric:
            raise SchemeError("weights are symmetric (zero point 0): no integer kernel has others")
        if self.dynamic and self.activation.format.bits != 8:
            raise SchemeError("activations quantized at run time have 8 bits: use dyn8w8 or dyn8w4")

    @property
    def name(self) -> str:
        """The readable name; ``scheme(s.name) == s``."""
        act, weight = self.activation, self.weight
        parts = [f"{'dyn' if self.dynamic else 'a'}{act.format.bits}w{weight.format.bits}"]
        if weight.group_size is not None:
            parts[0] += f"g{weight.group_size}"
        if weight.granularity == "per_tensor":
            parts.append("per_tensor")
        if act.symmetric != _symmetric_by_default(act.format.bits):
            parts.append("symmetric")
        if act.format.narrow:
            parts.append("narrow")
        if not weight.format.narrow:
            parts.append("full")
        if self.bias is None and not self.dynamic:
            parts.append("biasfloat")
        elif self.bias is not None and self.bias != INT32_BIAS:
            parts.append(f"bias{self.bias.bits}")
        parts += _observer_parts(act.observer, weight.observer)
        return "-".join(parts)

    def __str__(self) -> str:
        return self.name


def _observer_parts(activation: str, weight: str) -> list[str]:
    """The suffixes of a name that say who decides the ranges."""
    if activation == weight == "lsq":
        return ["lsq"]
    parts = {"lsq": ["lsq_activations"], _DEFAULT_OBSERVER: []}.get(activation, [activation])
    return [*parts, "lsq_weights"] if weight == "lsq" else parts


_DEFAULT_OBSERVER = "minmax"
_OBSERVER_SUFFIXES: dict[str, dict[str, Any]] = {name: {"observer": name} for name in OBSERVERS}
SUFFIXES: dict[str, dict[str, Any]] = {
    "per_tensor": {"weight_granularity": "per_tensor"},
    "per_channel": {"weight_granularity": "per_channel"},
    "full": {"full_range_weights": True},
    "biasfloat": {"bias": "float"},
    "lsq_weights": {"weight_observer": "lsq"},
    "symmetric": {"symmetric_activations": True},
    "narrow": {"narrow_activations": True},
    **_OBSERVER_SUFFIXES,
    "lsq": {"observer": "lsq", "weight_observer": "lsq"},
    "lsq_activations": {"observer": "lsq"},
}
"""Suffix of a name -> the keywords of :func:`scheme` that say the same; beside these there are
``bias<bits>`` and ``percentile<percentage>``."""

_OF_ACTIVATIONS = {"symmetric_activations", "narrow_activations", "observer"}
ACTIVATION_SUFFIXES = tuple(s for s, said in SUFFIXES.items() if said.keys() <= _OF_ACTIVATIONS)
"""Suffixes that say something about activations only."""

_NAME = re.compile(r"(?P<kind>a|dyn)(?P<act>\d+)w(?P<weight>\d+)(?:g(?P<group>\d+))?")
_GRAMMAR = (
    "a<bits>w<bits> or dyn8w<bits>, 2 to 16 bits each, optionally g<group size>, then any of "
    f"-bias<bits>, -percentile<percentage>, {', '.join(f'-{suffix}' for suffix in SUFFIXES)}"
)

_BITS = r"([2-9]|1[0-6])"
SCHEME_PATTERN = (
    rf"^(a{_BITS}|dyn8)w{_BITS}(g[1-9][0-9]*)?"
    rf"(-({'|'.join(SUFFIXES)}|{PERCENTILE_PATTERN}|bias([4-9]|[12][0-9]|3[0-2])))*$"
)
"""For editors: all that :func:`scheme` reads, and combinations that are not legal."""

FORMAT_PATTERN = rf"^a{_BITS}(-({'|'.join(ACTIVATION_SUFFIXES)}|{PERCENTILE_PATTERN}))*$"
"""Likewise for :func:`activation_scheme`."""


def _symmetric_by_default(bits: int) -> bool:
    return bits > 8


def scheme(
    name: str,
    *,
    weight_granularity: Granularity | None = None,
    group_size: int | None = None,
    symmetric_activations: bool | None = None,
    narrow_activations: bool | None = None,
    full_range_weights: bool | None = None,
    bias: int | Literal["float"] | None = None,
    observer: str | None = None,
    weight_observer: str | None = None,
) -> OpScheme:
    """Parse a scheme name; keywords say the same as the name's suffixes and win over them.

    Args:
        name: such as ``"a8w8"``, ``"a16w8"``, ``"a8w4-per_tensor"``, ``"dyn8w4g32"``.
        weight_granularity: ``per_channel`` unless the name says otherwise.
        group_size: input channels that share a weight scale (implies ``per_group``).
        symmetric_activations: zero point 0. Default: above 8 bits only.
        narrow_activations: leave out the most negative activation value.
        full_range_weights: use it for weights. Default: no, since the depthwise int8 kernels
            overflow on ``-128 * -128``.
        bias: bits of the derived bias (default 32), or ``"float"``.
        observer: one of ``minmax``, ``percentile`` (``percentile99.9``: that share of the values
            instead of 99.99), ``histogram``, ``entropy``, ``moving_average``, ``lsq`` (learned in
            training; where it starts is what ``histogram`` finds).
        weight_observer: ``minmax`` (the largest weight of a channel), or ``lsq`` (learned in
            training). The suffix ``-lsq`` means both, ``-lsq_activations`` and ``-lsq_weights``
            one of them.

    Raises:
        SchemeError: the name does not parse, or the combination is not legal.
    """
    base, *suffixes = name.split("-") if isinstance(name, str) else ("",)
    match = _NAME.fullmatch(base)
    if match is None:
        raise SchemeError(f"{name!r} is no scheme name{_meant(name)}; a name is {_GRAMMAR}")
    options: dict[str, Any] = {}
    for suffix in suffixes:
        said = _suffix(name, suffix)
        if said.keys() & options.keys():
            raise SchemeError(f"{name!r}: {suffix!r} contradicts or repeats a suffix before it")
        options.update(said)
    if match["group"] is not None:
        options["group_size"] = int(match["group"])
    given = {
        "weight_granularity": weight_granularity,
        "group_size": group_size,
        "symmetric_activations": symmetric_activations,
        "narrow_activations": narrow_activations,
        "full_range_weights": full_range_weights,
        "bias": bias,
        "observer": observer,
        "weight_observer": weight_observer,
    }
    options.update({key: value for key, value in given.items() if value is not None})

    dynamic = match["kind"] == "dyn"
    act_bits, weight_bits = int(match["act"]), int(match["weight"])
    for what, bits in (("activations", act_bits), ("weights", weight_bits)):
        if not _LEAST_BITS <= bits <= _MOST_BITS:
            raise SchemeError(
                f"{name!r}: {what} have {_LEAST_BITS} to {_MOST_BITS} bits, not {bits}"
                f"{_meant(name)}"
            )
    group = options.get("group_size")
    granularity = options.get("weight_granularity", "per_channel" if group is None else "per_group")
    bias_option = options.get("bias", "float" if dynamic else 32)
    if dynamic and bias_option != "float":
        raise SchemeError(
            f"{name!r}: a bias cannot be derived from an input scale that is only known at run "
            "time; leave it float"
        )
    return OpScheme(
        activation=TensorScheme(
            IntFormat(act_bits, narrow=options.get("narrow_activations", False)),
            symmetric=options.get("symmetric_activations", _symmetric_by_default(act_bits)),
            observer=options.get("observer", _DEFAULT_OBSERVER),
        ),
        weight=TensorScheme(
            IntFormat(weight_bits, narrow=not options.get("full_range_weights", False)),
            symmetric=True,
            granularity=granularity,
            group_size=group,
            observer=options.get("weight_observer", _DEFAULT_OBSERVER),
        ),
        bias=None if bias_option == "float" else IntFormat(bias_option),
        dynamic=dynamic,
    )


COMMON_SCHEMES = (
    *("a8w8", "a8w8-per_tensor", "a8w4", "a8w2", "a4w4", "a16w8", "a16w16"),
    *("dyn8w8", "dyn8w4", "dyn8w4g32"),
)
"""What editors offer first; the pattern allows all others."""

_LEAST_BITS, _MOST_BITS = 2, 16
_LOOSE = re.compile(r"(?:(a|dyn)(\d+)w(\d+)|w(\d+)a(\d+))(g\d+)?[_-]*(.*)")
_OTHER_NAMES = {
    **{"int8": "a8w8", "w8": "a8w8", "a8": "a8w8", "8": "a8w8", "int4": "a8w4", "w4": "a8w4"},
    **{"int16": "a16w8", "16x8": "a16w8", "a16": "a16w8", "int2": "a8w2", "w2": "a8w2"},
}


def _meant(name: object) -> str:
    """What ``int8``, ``w8a8``, ``a8w8_pertensor``, ``a8w44`` and the like were meant to be."""
    if not isinstance(name, str):
        return ""
    word = name.strip().lower()
    if word in ("none", "float", "float32", "fp32"):
        return "; to leave ops in float, write null"
    if other := _OTHER_NAMES.get(word):
        return f"; did you mean {other}?"
    match = _LOOSE.fullmatch(word)
    if match is None:
        return nearest(word, COMMON_SCHEMES)
    kind, act, weight, swapped_weight, swapped_act, group, rest = match.groups()
    parts = [f"{kind or 'a'}{act or swapped_act}w{weight or swapped_weight}{group or ''}"]
    for part in rest.split("-") if rest else ():
        if part in ("per_group", "pergroup"):  # a group has a size
            parts[0] += "g32"
            continue
        parts += difflib.get_close_matches(part, SUFFIXES, n=1, cutoff=0.75) or [part]
    meant = "-".join(parts)
    if re.fullmatch(SCHEME_PATTERN, meant):
        return f"; did you mean {meant}?" if meant != name else ""
    return nearest(meant, COMMON_SCHEMES)


def activation_scheme(name: str | TensorScheme) -> TensorScheme:
    """Parse the activation half of a scheme name: ``"a8"``, ``"a16"``, ``"a8-symmetric"``.

    Raises:
        SchemeError: it does not parse.
    """
    if isinstance(name, TensorScheme):
        return name
    if not isinstance(name, str) or re.fullmatch(FORMAT_PATTERN, name) is None:
        suffixes = ", ".join(f"-{suffix}" for suffix in ACTIVATION_SUFFIXES)
        raise SchemeError(
            f"{name!r} is no format of activations; a format is a<bits>, 2 to 16 bits, then any "
            f"of -percentile<percentage>, {suffixes}"
        )
    base, *said = name.split("-")
    return scheme("-".join((f"{base}w8", *said))).activation


def _suffix(name: str, suffix: str) -> dict[str, Any]:
    if suffix in SUFFIXES:
        return SUFFIXES[suffix]
    if match := re.fullmatch(r"bias(\d+)", suffix):
        return {"bias": int(match[1])}
    if re.fullmatch(PERCENTILE_PATTERN, suffix):
        return {"observer": suffix}
    raise SchemeError(
        f"{name!r}: {suffix!r} says nothing about a scheme{_meant(name)}; a name is {_GRAMMAR}"
    )


def observer_name(name: str) -> str:
    """The canonical name of an observer: ``percentile99.990`` is ``percentile``.

    Raises:
        SchemeError: there is no such observer, or the percentage is not from 50 to 100.
    """
    kind, percent = parse_observer(name)
    if percent is None or percent == Fraction(DEFAULT_PERCENT):
        return kind
    digits = name.removeprefix("percentile").lstrip("0")
    return kind + (digits.rstrip("0").rstrip(".") if "." in digits else digits)


def parse_observer(name: str) -> tuple[str, Fraction | None]:
    """An observer's kind, one of :data:`OBSERVERS`, and the percentage that it keeps, if any.

    Raises:
        SchemeError: there is no such observer, or the percentage is not from 50 to 100.
    """
    given = isinstance(name, str) and re.fullmatch(PERCENTILE_PATTERN, name) is not None
    if not given and name not in OBSERVERS:
        raise SchemeError(
            f"unknown observer {name!r}; legal: {', '.join(OBSERVERS)}, and percentile with the "
            "percentage to keep, such as percentile99.9"
        )
    if not given and name != "percentile":
        return name, None
    percent = Fraction(name.removeprefix("percentile") or DEFAULT_PERCENT)
    if not 50 <= percent <= 100:
        raise SchemeError(f"{name!r}: a percentile keeps 50 to 100 percent of the values")
    return "percentile", percent


def coerce_scheme(value: str | OpScheme | QuantizationConfig | None) -> OpScheme | None:
    """Turn what a setter takes into a scheme; ``None`` (leave in float) stays ``None``.

    A torchao ``QuantizationConfig`` keeps its bit-widths, symmetry and granularity. Its observers
    are mapped to ours of the same kind, and its ``bias=None`` means the derived int32 bias.

    Raises:
        SchemeError: the value cannot be expressed as a scheme of integers.
    """
    if value is None or isinstance(value, OpScheme):
        return value
    if isinstance(value, str):
        return scheme(value)
    if isinstance(value, QuantizationConfig):
        return _from_torchao(value)
    raise SchemeError(
        f"expected a scheme, a scheme name, a torchao QuantizationConfig or None, got "
        f"{type(value).__name__}: {value!r}"
    )


_OBSERVER_KINDS: dict[type, str] = {
    HistogramObserver: "histogram",
    MinMaxObserver: "minmax",
    PerChannelMinMaxObserver: "minmax",
    MovingAverageMinMaxObserver: "moving_average",
    MovingAveragePerChannelMinMaxObserver: "moving_average",
    PlaceholderObserver: "minmax",
}


def _from_torchao(config: QuantizationConfig) -> OpScheme:
    act, weight = config.input_activation, config.weight
    if act is None or weight is None:
        raise SchemeError(
            "a QuantizationConfig without input_activation or weight is weight-only or "
            "activation-only quantization, which has no integer kernel; set both"
        )
    for role, spec in (("activation", act), ("weight", weight)):
        if spec.dtype not in (torch.int8, torch.int16):
            raise SchemeError(f"{role} dtype {spec.dtype} is not supported; use int8 or int16")
    if config.output_activation is not None and (_range(config.output_activation) != _range(act)):
        raise SchemeError("input_activation and output_activation must have the same range")
    per_channel = weight.qscheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    act_format, weight_format = _format("activation", act), _format("weight", weight)
    dynamic = bool(act.is_dynamic)
    return OpScheme(
        activation=TensorScheme(
            act_format,
            symmetric=act.qscheme == torch.per_tensor_symmetric,
            observer=_observer_kind(act),
        ),
        weight=TensorScheme(
            weight_format,
            symmetric=weight.qscheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric),
            granularity="per_channel" if per_channel else "per_tensor",
        ),
        bias=None if dynamic else INT32_BIAS,
        dynamic=dynamic,
    )


def _range(spec: QuantizationSpec) -> tuple[int, int]:
    info = torch.iinfo(spec.dtype)
    low = info.min if spec.quant_min is None else spec.quant_min
    high = info.max if spec.quant_max is None else spec.quant_max
    return int(low), int(high)


def _format(role: str, spec: QuantizationSpec) -> IntFormat:
    low, high = _range(spec)
    for bits in range(2, 17):
        for narrow in (False, True):
            fmt = IntFormat(bits, narrow)
            if (fmt.quant_min, fmt.quant_max) == (low, high):
                return fmt
    raise SchemeError(f"{role} range [{low}, {high}] is not that of a signed 2 to 16-bit integer")


def _observer_kind(spec: QuantizationSpec) -> str:
    constructor = spec.observer_or_fake_quant_ctr
    partial = getattr(constructor, "p", None)
    cls = cast(type, partial.func if partial is not None else constructor)
    # Fake quantizers carry the observer they wrap; without one, torchao's is a moving average.
    if partial is not None and "FakeQuantize" in cls.__name__:
        cls = partial.keywords.get("observer", MovingAverageMinMaxObserver)
        cls = getattr(getattr(cls, "p", None), "func", cls)
    if cls not in _OBSERVER_KINDS:
        raise SchemeError(
            f"observer {cls.__name__} has no counterpart here; use a scheme with observer= one of "
            f"{', '.join(OBSERVERS)}"
        )
    return _OBSERVER_KINDS[cls]
