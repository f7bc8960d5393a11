"""Observers: they collect calibration statistics, and make scales and integers of them.

Observers of activations watch values; observers of weights and biases read constants. The latter
write their integers into the graph themselves, through the ``convert`` method that torchao's
``convert_pt2e`` calls on an observer that has one, because

- the weight's scale depends on the bias (it is raised where the bias would not fit), and
- the bias must be rounded once, in float64, not re-quantized in float32.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverBase
from torchao.utils import _assert_and_get_unique_device

from custom_quantizer.calibration.channel_factors import ChannelFactors
from custom_quantizer.calibration.ranges import (
    BINS,
    Kind,
    Statistics,
    add_counts,
    choose_qparams,
    kind_of_observer,
    solve,
)
from custom_quantizer.core.arithmetic import SMALLEST_NORMAL, QParams
from custom_quantizer.core.bias import (
    BiasLimits,
    bias_shift,
    derived_scale,
    quantize_bias,
    raise_scale,
)
from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,
    DEQUANTIZE_PER_CHANNEL,
    DEQUANTIZE_PER_TENSOR,
    add_constant,
    constant_of,
    describe,
    is_constant,
    is_dequantize,
    qparams_of,
)
from custom_quantizer.core.rows import round_rows
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.errors import CalibrationError, ConversionError
from custom_quantizer.ops import PatternMatch, rule_of
from custom_quantizer.ops.gemm import expand_channels

__all__ = [
    "ActivationObserver",
    "BiasObserver",
    "WeightObserver",
    "activation_observer",
    "choose_qparams",
    "forget_models",
    "refuse_export",
]

META_KEY = "custom_quantizer"
"""Where nodes of a graph carry what this package recorded about them."""


_PART = 1 << 17
"""Weights that are rounded at a time: 1 MB in float64."""


class _SuppliedBuffers:
    """Of a module: buffers that are ``None``, also in a ``state_dict``, until they are supplied."""

    _supplied: tuple[str, ...] = ()

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self._supplied:
            given = state_dict.get(prefix + name)
            setattr(self, name, None if given is None else given.detach().clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]


class ActivationObserver(_SuppliedBuffers, ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """What an activation held over all calibration data.

    How much is recorded depends on the scheme's observer: the extremes for ``minmax``, their
    averages for ``moving_average``, and for the others the extremes and how often each value
    occurred (:mod:`custom_quantizer.calibration.ranges`). Its memory does not grow with the data.
    All of it is in buffers, so that ``state_dict``, ``deepcopy`` and ``to`` include it.

    Once :meth:`freeze` was called, scale and zero point are what they were then, or what the caller
    supplied, whatever data come after.

    Args:
        scheme: what the range is for.
        name: of the tensor, for messages.
        averaging_constant: weight of a new batch with ``observer="moving_average"``.
        shared: where scales are chosen at run time, the dims whose values share one; empty: all.

    Attributes:
        kind: what is recorded.
        min_val: float32 scalar, inf before the first value.
        max_val: float32 scalar, -inf before the first value.
        count: int64 scalar, number of values.
        counts: int64 ``(65536,)`` where ``kind`` is ``counts``, else ``None``.
        reduced: whether what was recorded is the sum over the ranks of a process group.
        frozen_scale: float32 scalar once frozen, else ``None``.
        frozen_zero_point: int64 scalar, likewise.

    Raises:
        CalibrationError: a value is NaN or infinite (at :meth:`forward`), or no data was seen
            (at :meth:`calculate_qparams`).
    """

    min_val: Tensor
    max_val: Tensor
    count: Tensor
    counts: Tensor | None
    frozen_scale: Tensor | None
    frozen_zero_point: Tensor | None
    _supplied = ("frozen_scale", "frozen_zero_point")

    def __init__(
        self,
        scheme: TensorScheme,
        name: str = "",
        averaging_constant: float = 0.01,
        shared: tuple[int, ...] = (),
        **spec: Any,
    ) -> None:
        super().__init__(dtype=spec["dtype"], is_dynamic=bool(spec.get("is_dynamic", False)))
        self.shared = shared
        self.scheme = scheme
        self.name = name
        self.averaging_constant = averaging_constant
        self.eps = float(torch.finfo(torch.float32).eps)  # for qparams chosen at run time
        self.quant_min = scheme.format.quant_min
        self.quant_max = scheme.format.quant_max
        self.qscheme = torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine
        self.kind: Kind = kind_of_observer(scheme.observer)
        self.reduced = False
        self._solved: QParams | None = None
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int64))
        counted = self.kind == "counts" and not self.is_dynamic
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.int64) if counted else None)
        for buffer in self._supplied:
            self.register_buffer(buffer, None)

    def forward(self, x: Tensor) -> Tensor:
        """Record ``x`` (any shape), unless frozen, and return it unchanged.

        Raises:
            CalibrationError: ``x`` has values that are not finite.
            ConversionError: ``torch.export`` captures the prepared graph.
        """
        refuse_export(self.name)
        if self.is_dynamic or self.frozen or x.numel() == 0:
            return x
        values = x
        if x.requires_grad or x.dtype is not torch.float32:
            values = x.detach().to(torch.float32)
        # Adding 0.0 makes 0.0 of -0.0, which would depend on the order.
        low, high = (end.item() + 0.0 for end in _extremes(values))
        # NaN spreads to both ends, so two numbers tell about all of them.
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = values[~torch.isfinite(values)]
            raise CalibrationError(
                f"{self.name}: {bad.numel()} of {x.numel()} values are not finite (the first is "
                f"{float(bad[0])}); check the calibration data and the ops before this one"
            )
        if self._solved is not None:  # setting an attribute of a module takes longer than to ask
            self._solved = None
        self._extend(low, high)
        counts = self.counts
        if counts is not None:
            add_counts(counts, values, low, high)
        self.count.add_(x.numel())
        return x

    def round_at_run_time(self, x: Tensor) -> Tensor:
        """``x`` as the integers that are chosen at run time stand for it; gradients pass."""
        return round_rows(x, self.shared or tuple(range(x.dim()))) if x.numel() else x

    @property
    def _averages(self) -> bool:
        """Whether the extremes of a new batch are averaged with those before."""
        return self.kind == "average" and bool(self.count > 0)

    def _extend(self, low: float, high: float) -> None:
        """Let the range take in the extremes of a batch."""
        if self._averages:
            self.min_val.lerp_(torch.full_like(self.min_val, low), self.averaging_constant)
            self.max_val.lerp_(torch.full_like(self.max_val, high), self.averaging_constant)
            return
        # A number is read in a third of the time in which it is written.
        if low < self.min_val.item():
            self.min_val.fill_(low)
        if high > self.max_val.item():
            self.max_val.fill_(high)

    @property
    def statistics(self) -> Statistics:
        """What was recorded, as a copy on the CPU."""
        return Statistics(
            self.kind,
            int(self.count),
            float(self.min_val),
            float(self.max_val),
            None if self.counts is None else self.counts.cpu().clone(),
        )

    @statistics.setter
    def statistics(self, given: Statistics) -> None:
        """Replace what was recorded.

        Raises:
            CalibrationError: it lacks what this observer records.
        """
        given = given.as_kind(self.kind)
        self.min_val.fill_(given.low)
        self.max_val.fill_(given.high)
        self.count.fill_(given.count)
        if self.counts is not None and given.counts is not None:
            self.counts.copy_(given.counts)
        self.reduced = False
        self._solved = None

    def forget(self) -> None:
        """Forget what was recorded, as if no data had been seen."""
        counts = None if self.counts is None else torch.zeros(BINS, dtype=torch.int64)
        self.statistics = Statistics(self.kind, counts=counts)

    def record_counts(self) -> None:
        """Count values too, where the scheme's observer does not need it.

        Raises:
            CalibrationError: values were recorded already, which were not counted.
        """
        if self.is_dynamic or self.counts is not None:
            return
        if self.kind == "average":
            raise CalibrationError(
                f"{self.name}: observer='moving_average' averages extremes; counts go with the "
                "other observers"
            )
        if self.count > 0:
            raise CalibrationError(
                f"{self.name}: {int(self.count)} values were seen that were not counted; choose to "
                "record counts before calibrating"
            )
        self.kind = "counts"
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=self.count.device)

    @property
    def frozen(self) -> bool:
        """Whether scale and zero point stay what they are."""
        return self.frozen_scale is not None

    def freeze(self, qparams: QParams | None = None) -> None:
        """Let scale and zero point be ``qparams`` from now on, or what they are now.

        Nothing is recorded any more; what was recorded stays, for :meth:`unfreeze`.

        Args:
            qparams: one scale, with the integers of the scheme's format.

        Raises:
            CalibrationError: the range is chosen at run time; ``qparams`` are of another format,
                or have a zero point where the scheme has none; none are given, and nothing was
                seen.
        """
        if self.is_dynamic:
            raise CalibrationError(
                f"{self.name}: its range is chosen at run time, so none can be frozen; use a "
                "static scheme such as a8w8"
            )
        chosen = self.qparams() if qparams is None else qparams
        if isinstance(chosen.scale, Tensor):
            raise CalibrationError(
                f"{self.name}: an activation has one scale, not one per channel; supply a number"
            )
        if (chosen.quant_min, chosen.quant_max) != (self.quant_min, self.quant_max):
            raise CalibrationError(
                f"{self.name}: its integers are [{self.quant_min}, {self.quant_max}], not "
                f"[{chosen.quant_min}, {chosen.quant_max}]; supply a range of its own format"
            )
        if self.scheme.symmetric and chosen.zero_point != 0:
            raise CalibrationError(
                f"{self.name}: its scheme is symmetric, so its zero point is 0, not "
                f"{chosen.zero_point}; supply a range around 0, or choose an affine scheme"
            )
        device = self.count.device
        self.frozen_scale = torch.tensor(chosen.scale, dtype=torch.float32, device=device)
        self.frozen_zero_point = torch.tensor(chosen.zero_point, dtype=torch.int64, device=device)

    def unfreeze(self) -> None:
        """Let the range follow again from what was recorded, and record what comes."""
        self.frozen_scale = self.frozen_zero_point = None

    def qparams(self) -> QParams:
        """Scale and zero point: the frozen ones, or those of what was seen.

        Raises:
            CalibrationError: nothing was seen.
        """
        if self.frozen_scale is not None and self.frozen_zero_point is not None:
            return QParams(
                float(self.frozen_scale),
                int(self.frozen_zero_point),
                self.quant_min,
                self.quant_max,
            )
        if self.count == 0:
            raise CalibrationError(
                f"{self.name} never saw data, so it has no range; run the prepared model on "
                "calibration data before convert_pt2e (custom_quantizer.calibrate does)"
            )
        # Conversion asks several times, and some observers search.
        if self._solved is None:
            self._solved = solve(self.statistics, self.scheme)
        return self._solved

    def calculate_qparams(self, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """``(scale float32 (1,), zero_point int64 (1,))``, as ``convert_pt2e`` asks for them."""
        qparams = self.qparams()
        return torch.tensor([qparams.scale]), torch.tensor([qparams.zero_point])

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._solved = None


_LARGE = 1 << 15
"""Values from which on two passes, with vector instructions, take less time than one without."""


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest of all values; both are NaN if one of them is."""
    if values.numel() < _LARGE:
        ends = torch.aminmax(values)
        return ends.min, ends.max
    return values.amin(), values.amax()


def refuse_export(name: str) -> None:
    """Say in one line what capture of a prepared graph ends with, or what it would leave in float.

    Raises:
        ConversionError: ``torch.export`` runs this observer.
    """
    if torch.compiler.is_exporting():
        raise ConversionError(
            f"{name}: the graph was prepared and not converted, so it cannot be exported; call "
            "convert_pt2e on it, and export what that returns"
        )


class _ConstantObserver(_SuppliedBuffers, ObserverBase):  # type: ignore[misc]  # torchao is untyped
    """Base of the observers that read a constant and write integers at conversion."""

    def __init__(self, name: str = "", **spec: Any) -> None:
        super().__init__(dtype=spec["dtype"], is_dynamic=False)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return the constant unchanged: there is nothing to watch."""
        return x

    def calculate_qparams(self, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not available: parameters of a constant follow from the graph around it."""
        raise ConversionError(f"{self.name}: its scale is decided when the graph is converted")

    def _replace(
        self, model: GraphModule, node: Node, values: Tensor, scale: Tensor, qparams: QParams
    ) -> Node:
        """Put ``dequantize(values)`` in the observer's place."""
        prefix = str(cast(Node, node.args[0]).target)
        integers = add_constant(model, f"{prefix}_integers", values, node)
        args: tuple[Any, ...]
        if scale.dim() == 0:
            target, args = DEQUANTIZE_PER_TENSOR, (float(scale), qparams.zero_point)
        else:
            zero_points = torch.zeros(scale.numel(), dtype=torch.int64)
            target = DEQUANTIZE_PER_CHANNEL
            args = (
                add_constant(model, f"{prefix}_scale", scale, node),
                add_constant(model, f"{prefix}_zero_point", zero_points, node),
                qparams.axis,
            )
        with model.graph.inserting_before(node):
            dequantize = model.graph.call_function(
                target, (integers, *args, qparams.quant_min, qparams.quant_max, values.dtype)
            )
        if "val" in cast(Node, node.args[0]).meta:
            dequantize.meta["val"] = cast(Node, node.args[0]).meta["val"]
        node.replace_all_uses_with(dequantize)
        model.graph.erase_node(node)
        return dequantize


def forget_models() -> None:
    """Let go of the models that torchao keeps.

    ``prepare_pt2e`` and ``convert_pt2e`` (torchao 0.18) ask which device a model is on, and keep
    the answer by the model (``functools.cache``): all that was ever prepared or converted stays in
    memory, with its float weights.
    """
    _assert_and_get_unique_device.cache_clear()


_FLOAT_BIAS = "custom_quantizer_float_bias"
"""Key in ``node.meta`` of a converted bias: the floats it was derived from."""


class WeightObserver(_ConstantObserver):
    """Scales and integers of a constant weight.

    Args:
        scheme: format and granularity; weights are symmetric.
        axis: output-channel axis.
        name: of the op, for messages.
        limits: of the biases that are derived from it.

    Attributes:
        supplied_scale: float32, of the shape that :meth:`scale` returns, where :meth:`set_scale`
            supplied one; else ``None``.
        float_constants: weight and bias of the float model by their names, where
            :func:`~custom_quantizer.accuracy.improving.improve` put others in their places; else
            ``None``.
    """

    supplied_scale: Tensor | None
    float_constants: dict[str, Tensor] | None
    _supplied = ("supplied_scale",)

    def __init__(
        self,
        scheme: TensorScheme,
        axis: int = 0,
        name: str = "",
        limits: BiasLimits | None = None,
        **spec: Any,
    ) -> None:
        super().__init__(name, **spec)
        self.scheme = scheme
        self.ch_axis = axis
        self.limits = limits or BiasLimits()
        self.float_constants = None
        self.register_buffer("supplied_scale", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight unchanged, or so that the convolution behind it is computed faster."""
        return ChannelFactors.of(x)

    def set_scale(self, scale: Tensor | None) -> None:
        """Use ``scale`` instead of the one that follows from the largest absolute value.

        Weights beyond the last integer are clipped to it. Conversion still raises the scale of a
        channel whose bias would not fit, and reports that.

        Args:
            scale: float32: a scalar, ``(out_channels,)`` or ``(out_channels, groups)``, as the
                granularity says; of groups, numbers that bfloat16 represents, since the backend
                stores those. ``None`` takes a supplied one back.

        Raises:
            CalibrationError: it is not that, or not positive, finite and normal.
        """
        if scale is None:
            self.supplied_scale = None
            return
        wanted = {"per_tensor": 0, "per_channel": 1, "per_group": 2}[self.scheme.granularity]
        if scale.dtype != torch.float32 or scale.dim() != wanted:
            raise CalibrationError(
                f"{self.name}: a scale of its weight is float32 with {wanted} dimensions "
                f"({self.scheme.granularity}), not {scale.dtype} with {scale.dim()}"
            )
        if not bool((torch.isfinite(scale) & (scale >= SMALLEST_NORMAL)).all()):
            raise CalibrationError(
                f"{self.name}: scales of a weight are positive, finite and normal in float32, from "
                f"{SMALLEST_NORMAL:.3g} on; the smallest supplied is {float(scale.min()):g}"
            )
        if wanted == 2 and not torch.equal(scale, scale.to(torch.bfloat16).to(torch.float32)):
            raise CalibrationError(
                f"{self.name}: scales of weight groups are stored in bfloat16, and a supplied one "
                "is no such number; round them with .to(torch.bfloat16).to(torch.float32)"
            )
        self.supplied_scale = scale.detach().clone()

    def scale(self, weight: Tensor) -> Tensor:
        """The supplied scales, or those of the largest absolute value.

        No channel's computed scale is less than 2**-16 of the largest, which keeps the
        requantization multipliers of dead channels in the range that integer hardware represents.

        Args:
            weight: float, any shape whose ``axis`` are the output channels.

        Returns:
            float32: a scalar, ``(out_channels,)`` or ``(out_channels, groups)``.

        Raises:
            CalibrationError: the weight is not finite, or the supplied scale is of another shape.
        """
        largest = self.largest_scale(weight)
        if self.supplied_scale is None:
            return largest
        if self.supplied_scale.shape != largest.shape:
            raise CalibrationError(
                f"{self.name}: the supplied scale has shape {tuple(self.supplied_scale.shape)}, "
                f"and its weight needs {tuple(largest.shape)}"
            )
        return self.supplied_scale.to(weight.device, copy=True)

    def largest_scale(self, weight: Tensor) -> Tensor:
        """:meth:`scale`, whatever was supplied."""
        values = weight.detach().to(torch.float32)
        group_size = self.scheme.group_size
        # Along a dimension amin and amax are several times as fast as aminmax.
        if group_size is not None:
            grouped = values.reshape(len(values), -1, group_size)
            low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        elif self.scheme.granularity == "per_tensor":
            low, high = _extremes(values)
        else:
            rows = values.movedim(self.ch_axis, 0).flatten(1)
            low, high = rows.amin(dim=1), rows.amax(dim=1)
        # Infinities and NaN come through, so that the weight need not be read for them alone.
        reach = torch.maximum(high, -low)
        if not bool(torch.isfinite(reach).all()):
            raise CalibrationError(f"{self.name}: its weight has values that are not finite")
        if group_size is not None:
            return self._group_scale(reach)
        scale = reach / self.scheme.format.quant_max
        largest = scale.max()
        floor = largest * 2.0**-16 if largest > 0 else torch.tensor(2.0**-10)
        return torch.maximum(scale, floor).clamp_min(SMALLEST_NORMAL)

    def _group_scale(self, grouped: Tensor) -> Tensor:
        """``(out_channels, groups)``, representable in bfloat16, which the backend stores."""
        floor = (grouped.max() * 2.0**-16).clamp_min(2.0**-100)
        scale = torch.maximum(grouped / self.scheme.format.quant_max, floor)
        coarse = scale.to(torch.bfloat16)
        above = torch.nextafter(coarse, torch.tensor(torch.inf, dtype=torch.bfloat16))
        return torch.where(coarse.to(torch.float32) < scale, above, coarse).to(torch.float32)

    def integers(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``clamp(round(w / s))``, half to even, in float64, stored in the narrowest dtype.

        In parts that stay in the processor's cache: ten times as fast for large weights.
        """
        fmt = self.scheme.format
        scale = self._spread(scale, weight)
        integers = torch.empty(weight.shape, dtype=fmt.storage_dtype, device=weight.device)
        rows = max(1, _PART * len(weight) // max(weight.numel(), 1))
        scales = scale.expand(len(weight), *[-1] * (scale.dim() - 1)) if scale.dim() else scale
        for start in range(0, len(weight), rows):
            part = weight.detach()[start : start + rows].to(torch.float64)
            divisor = scales[start : start + rows] if scales.dim() else scales
            part = part.div(divisor.to(torch.float64)).round_()
            integers[start : start + rows] = part.clamp_(fmt.quant_min, fmt.quant_max)
        return integers

    def dequantized(self, integers: Tensor, scale: Tensor) -> Tensor:
        """What ``integers`` stand for, float32, as the converted graph computes it."""
        return integers.to(torch.float32) * self._spread(scale, integers)

    def _spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """The scale in a shape that multiplies the weight."""
        if self.scheme.group_size is not None:
            return scale.repeat_interleave(self.scheme.group_size, dim=1)
        if scale.dim() == 0:
            return scale
        shape = [1] * weight.dim()
        shape[self.ch_axis] = -1
        return scale.reshape(shape)

    def final_scale(self, model: GraphModule, node: Node) -> Tensor:
        """The scale after it was raised for the biases of all ops that use the weight."""
        return self.raised(model, node, self.scale(constant_of(model, cast(Node, node.args[0]))))

    def raised(self, model: GraphModule, node: Node, scale: Tensor) -> Tensor:
        """``scale``, raised where the bias of an op that uses the weight would not fit."""
        if self.scheme.group_size is not None:
            return scale  # no single scale a channel, so no bias is derived from it
        for match in _consumers(node):
            bias = _bias_constant(model, match)
            if bias is None:
                continue
            limit = self.limits.of(max(self.scheme.format.bits, _input_bits(model, match)))
            if match.weight_axis == 1 and match.groups > 1 and scale.dim():
                # Each weight scale serves one channel of every group: the largest bias decides.
                bias = bias.abs().reshape(match.groups, -1).amax(dim=0)
            scale = raise_scale(scale, [(_input_scale(model, match), bias)], limit)
        return scale

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by integers and their dequantization (called by torchao)."""
        forget_models()
        weight = constant_of(model, cast(Node, node.args[0]))
        own = self.scale(weight)
        scale = self.raised(model, node, own)
        fmt = self.scheme.format
        if self.scheme.group_size is not None:
            self._replace_grouped(model, node, self.integers(weight, scale), scale)
            return
        qparams = QParams(
            scale=scale if scale.dim() else float(scale),
            zero_point=0,
            quant_min=fmt.quant_min,
            quant_max=fmt.quant_max,
            axis=self.ch_axis if scale.dim() else None,
        )
        raised = (scale / own).reshape(-1)
        dequantize = self._replace(model, node, self.integers(weight, scale), scale, qparams)
        dequantize.meta[META_KEY] = {
            "raised": {int(c): float(raised[c]) for c in torch.nonzero(raised > 1).flatten()}
        }

    def _replace_grouped(
        self, model: GraphModule, node: Node, values: Tensor, scale: Tensor
    ) -> None:
        """Put torchao's blockwise dequantization in the observer's place."""
        fmt = self.scheme.format
        prefix = str(cast(Node, node.args[0]).target)
        args = (
            add_constant(model, f"{prefix}_integers", values, node),
            [1, self.scheme.group_size],
            add_constant(model, f"{prefix}_scale", scale, node),
            add_constant(model, f"{prefix}_zero_point", torch.zeros_like(scale).long(), node),
            values.dtype,
            fmt.quant_min,
            fmt.quant_max,
            torch.float32,
        )
        with model.graph.inserting_before(node):
            dequantize = model.graph.call_function(DEQUANTIZE_GROUPED, args)
        dequantize.meta["val"] = cast(Node, node.args[0]).meta.get("val")
        node.replace_all_uses_with(dequantize)
        model.graph.erase_node(node)


class BiasObserver(_ConstantObserver):
    """The derived bias: scale ``s_x * s_w``, zero point 0.

    Args:
        quant_min: smallest integer of the format.
        quant_max: largest; below that of int32 the scale is ``s_x * s_w`` times a power of two.
        name: of the op, for messages.
    """

    def __init__(self, quant_min: int, quant_max: int, name: str = "", **spec: Any) -> None:
        super().__init__(name, **spec)
        self.quant_min = quant_min
        self.quant_max = quant_max

    def convert(self, model: GraphModule, node: Node) -> None:
        """Replace the observer by int32 constants and their dequantization (called by torchao)."""
        bias = constant_of(model, cast(Node, node.args[0]))
        values, scale = self.derived(model, node, bias)
        qparams = QParams(
            scale if scale.dim() else float(scale),
            0,
            self.quant_min,
            self.quant_max,
            0 if scale.dim() else None,
        )
        # A weight that comes later in the graph must find what this one found.
        self._replace(model, node, values, scale, qparams).meta[_FLOAT_BIAS] = bias

    def derived(self, model: GraphModule, node: Node, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and scale that a bias gets at conversion.

        Args:
            model: the prepared graph.
            node: call of this observer.
            bias: float, ``(out_channels,)``.

        Returns:
            As :meth:`derive`.

        Raises:
            CalibrationError: it has values that are not finite.
        """
        (match,) = _consumers(node)
        weight_scale = expand_channels(_weight_scale(model, match), match)
        return self.derive(self.finite(bias), _input_scale(model, match), weight_scale)

    def finite(self, bias: Tensor) -> Tensor:
        """Return ``bias``.

        Raises:
            CalibrationError: it has values that are not finite.
        """
        if not bool(torch.isfinite(bias).all()):
            raise CalibrationError(f"{self.name}: its bias has values that are not finite")
        return bias

    def derive(
        self, bias: Tensor, input_scale: float, weight_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Integers and scale of a bias.

        Args:
            bias: float, ``(out_channels,)``.
            input_scale: scale of the activation.
            weight_scale: float32, scalar or ``(out_channels,)``.

        Returns:
            int32 ``(out_channels,)`` and float32 of the shape of ``weight_scale``: the derived
            scale, times a power of two where the format has fewer than 32 bits.
        """
        shift = torch.zeros_like(weight_scale, dtype=torch.int64)
        if self.quant_max < (1 << 31) - 1:
            shift = bias_shift(bias, input_scale, weight_scale, self.quant_max)
        values = quantize_bias(bias, input_scale, weight_scale, shift)
        return values, torch.ldexp(derived_scale(input_scale, weight_scale), shift)


def _consumers(node: Node) -> list[PatternMatch]:
    """The ops an observed constant goes to."""
    matches = []
    for user in node.users:
        rule = rule_of(user)
        bound = rule.match(rule, user) if rule is not None else "unknown op"
        if isinstance(bound, str):
            raise ConversionError(f"{describe(user)} uses a quantized constant, but {bound}")
        matches.append(bound)
    return matches


def activation_observer(model: GraphModule, node: Node) -> ActivationObserver | None:
    """The observer of activations that a node of a prepared graph calls, if it calls one."""
    module = _observer_of(model, node)
    return module if isinstance(module, ActivationObserver) else None


def _observer_of(model: GraphModule, node: Node) -> Any:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _input_scale(model: GraphModule, match: PatternMatch) -> float:
    """Scale of the op's activation, whether already converted or not."""
    (source,) = match.inputs
    if is_dequantize(source):
        return cast(float, qparams_of(model, source).scale)
    observer = _observer_of(model, source)
    if observer is not None:
        scale, _ = observer.calculate_qparams()
        return float(scale)
    raise ConversionError(
        f"{describe(match.node)}: its input is not quantized, so no bias scale can be derived"
    )


def _input_bits(model: GraphModule, match: PatternMatch) -> int:
    """Width of the op's activation, whether already converted or not."""
    (source,) = match.inputs
    if is_dequantize(source):
        return qparams_of(model, source).bits
    observer = _observer_of(model, source)
    return int(getattr(observer, "quant_max", 127)).bit_length() + 1


def _weight_scale(model: GraphModule, match: PatternMatch) -> Tensor:
    """Final weight scale, whether already converted or not: float32, scalar or per channel."""
    source = cast(Node, match.weight)
    if is_dequantize(source):
        scale = qparams_of(model, source).scale
        return scale if isinstance(scale, Tensor) else torch.tensor(scale)
    observer = _observer_of(model, source)
    if isinstance(observer, WeightObserver):
        return observer.final_scale(model, source)
    raise ConversionError(
        f"{describe(match.node)}: its weight is not quantized, so no bias scale can be derived"
    )


def _bias_constant(model: GraphModule, match: PatternMatch) -> Tensor | None:
    """The float bias that will be derived, or ``None`` if there is none.

    Raises:
        CalibrationError: it is not finite; the weight's scale would not be either.
    """
    source = match.bias
    if source is None:
        return None
    if is_dequantize(source):
        return cast("Tensor | None", source.meta.get(_FLOAT_BIAS))
    observer = _observer_of(model, source)
    if isinstance(observer, BiasObserver):
        value = cast(Node, source.args[0])
        return observer.finite(constant_of(model, value)) if is_constant(value) else None
    return None
