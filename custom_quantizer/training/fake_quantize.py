"""Fake quantizers: what an integer would lose, in training, with gradients straight through.

They are the observers of :mod:`custom_quantizer.calibration.observers` that also round. What leaves
them in the forward pass is bit for bit what the converted graph computes from the integers: weights
and biases are rounded in float64 by the same functions, activations by the same sequence of float32
operations. So are the scales: a bias is rounded with the scales that its
input and its weight have in that step.

``torchao.quantization.pt2e.disable_fake_quant``, ``disable_observer`` and their opposites work on
them, with ``prepared.apply(...)``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase

from custom_quantizer.calibration.observers import (
    ActivationObserver,
    BiasObserver,
    WeightObserver,
    refuse_export,
)
from custom_quantizer.calibration.ranges import Statistics, solve
from custom_quantizer.core.arithmetic import SMALLEST_NORMAL, QParams
from custom_quantizer.core.bias import raise_scale
from custom_quantizer.core.grid import fake_quantize
from custom_quantizer.core.schemes import TensorScheme
from custom_quantizer.errors import CalibrationError, ConfigError

__all__ = ["ActivationFakeQuantize", "BiasFakeQuantize", "Slot", "WeightFakeQuantize"]


class Slot:
    """Where a fake quantizer can be found once torchao has made it."""

    module: nn.Module | None = None


class _StraightThrough(torch.autograd.Function):
    """A value computed elsewhere; the gradient passes where ``mask`` is true."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad if ctx.mask is None else grad * ctx.mask, None, None


class _LearnedStep(torch.autograd.Function):
    """A value computed elsewhere, with the gradients of LSQ for scale and zero point.

    With ``v = x / scale + zero_point`` and ``q = clamp(round(v))`` the gradient of the scale is
    ``q - v`` inside the range and ``q - zero_point`` outside it; that of the zero point is 0 inside
    and ``-scale`` outside.

    References:
        Esser et al., "Learned Step Size Quantization", ICLR 2020, equations 3 and 5; Bhalgat et
        al., "LSQ+", CVPR Workshops 2020, equations 5 and 6.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        value: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        strength: float,
    ) -> Tensor:
        ctx.save_for_backward(x, value, scale, zero_point)
        ctx.limits = quant_min, quant_max, strength
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, value, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, strength = ctx.limits
        steps = x / scale
        unclamped = torch.round(steps) + zero_point
        inside = (unclamped >= quant_min) & (unclamped <= quant_max)
        grad_x = grad * inside
        by_scale = value / scale - torch.where(inside, steps, torch.zeros_like(steps))
        grad_scale = _sum_to(grad * by_scale, scale) * strength
        grad_zero = None
        if ctx.needs_input_grad[3]:
            grad_zero = _sum_to((grad - grad_x) * -scale, zero_point) * strength
        return grad_x, None, grad_scale, grad_zero, None, None, None


def _sum_to(values: Tensor, like: Tensor) -> Tensor:
    """Sum over the axes along which ``like`` (of the same rank, or a scalar) has size 1."""
    if like.dim() == 0:
        return values.sum()
    axes = [i for i, size in enumerate(like.shape) if size == 1]
    return values.sum(dim=axes, keepdim=True)


class ActivationFakeQuantize(ActivationObserver, FakeQuantizeBase):  # type: ignore[misc]
    """Watches an activation as long as its observer is enabled, and rounds it.

    Extremes are averaged over the batches of a training, since weights change, and kept as they
    are while nothing is rounded yet (calibration). Observers that count are solved again each time
    the number of values has doubled. With ``observer="lsq"`` the range that histogram would choose
    is where learning starts.

    Args:
        scheme: format and observer.
        name: of the tensor, for messages.
        slot: takes a reference to this module.
        averaging_constant: weight of a new batch in the average of extremes.
        shared: as for :class:`~custom_quantizer.calibration.observers.ActivationObserver`.

    Attributes:
        scale: with ``lsq`` a float32 scalar parameter.
        zero_point: with ``lsq`` a float32 scalar, a parameter where the scheme has zero points.
        initialized: with ``lsq``, whether scale and zero point have their first values.
    """

    initialized: Tensor
    solved_scale: Tensor
    solved_zero_point: Tensor
    solved_at: Tensor

    def __init__(
        self,
        scheme: TensorScheme,
        name: str = "",
        slot: Slot | None = None,
        averaging_constant: float = 0.01,
        shared: tuple[int, ...] = (),
        **spec: Any,
    ) -> None:
        if scheme.observer == "minmax":
            scheme = replace(scheme, observer="moving_average")
        super().__init__(scheme, name, averaging_constant, shared, **spec)
        self.learned = scheme.observer == "lsq" and not self.is_dynamic
        self.register_buffer("initialized", torch.tensor([0], dtype=torch.uint8))
        self.register_buffer("solved_scale", torch.tensor(1.0))
        self.register_buffer("solved_zero_point", torch.tensor(0))
        self.register_buffer("solved_at", torch.tensor(0))
        if self.learned:
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.zero_point = nn.Parameter(torch.tensor(0.0), requires_grad=not scheme.symmetric)
        if slot is not None:
            slot.module = self

    def forward(self, x: Tensor) -> Tensor:
        """Record and round ``x`` (any shape).

        Raises:
            CalibrationError: ``x`` has values that are not finite.
            ConversionError: ``torch.export`` captures the prepared graph.
        """
        refuse_export(self.name)
        if self.is_dynamic:
            return self.round_at_run_time(x) if self.fake_quant_enabled[0] else x
        learning = self.learned and bool(self.initialized)
        if self.observer_enabled[0] and not learning:
            super().forward(x)
        if not self.fake_quant_enabled[0] or x.numel() == 0:
            return x
        if self.learned and not self.frozen:
            return self._round_and_learn(x)
        return fake_quantize(x, self.qparams())

    @property
    def _averages(self) -> bool:
        return super()._averages and bool(self.fake_quant_enabled[0])

    @property
    def statistics(self) -> Statistics:
        """What was recorded, as a copy on the CPU."""
        return super().statistics

    @statistics.setter
    def statistics(self, given: Statistics) -> None:
        """Start from ``given``; exact extremes are as good a start of an average as any.

        Raises:
            CalibrationError: it lacks what this observer records.
        """
        if self.kind == "average" and given.kind != "average":
            given = Statistics("average", given.count, given.low, given.high)
        cast(Any, ActivationObserver.statistics).fset(self, given)
        self.solved_at.zero_()
        self.initialized.zero_()

    def qparams(self) -> QParams:
        """Scale and zero point of this step.

        Raises:
            CalibrationError: nothing was seen.
        """
        if self.frozen:
            return super().qparams()
        if self.learned and self.initialized:
            scale, zero_point = self._learned_values()
            return self._make(float(scale), int(zero_point))
        if self.kind != "counts" or self.count == 0:
            return super().qparams()
        if int(self.count) >= 2 * int(self.solved_at):
            solved = solve(self.statistics, self.scheme)
            self.solved_scale.fill_(cast(float, solved.scale))
            self.solved_zero_point.fill_(solved.zero_point)
            self.solved_at.copy_(self.count)
        return self._make(float(self.solved_scale), int(self.solved_zero_point))

    @property
    def has_range(self) -> bool:
        """Whether scale and zero point can be told: something was seen, or they were supplied."""
        return bool(self.count > 0) or self.frozen or bool(self.initialized)

    def start_at(self, qparams: QParams) -> None:
        """Learn from this scale and zero point on; where nothing is learned, keep them.

        Raises:
            CalibrationError: they are not of this format (see :meth:`freeze`).
        """
        self.freeze(qparams)
        if self.learned:
            self.unfreeze()
            self._begin(qparams)

    def _begin(self, first: QParams) -> None:
        with torch.no_grad():
            self.scale.fill_(cast(float, first.scale))
            self.zero_point.fill_(first.zero_point)
            self.initialized.fill_(1)

    def _make(self, scale: float, zero_point: int) -> QParams:
        return QParams(scale, zero_point, self.quant_min, self.quant_max)

    def _learned_values(self) -> tuple[Tensor, Tensor]:
        """The scale as it is used (positive) and the zero point as an integer in range."""
        scale = self.scale.detach().abs().clamp_min(SMALLEST_NORMAL)
        zero_point = self.zero_point.detach().round().clamp(self.quant_min, self.quant_max)
        return scale, zero_point

    def _round_and_learn(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self._begin(super().qparams() if self.kind != "counts" else self.qparams())
        scale, zero_point = self._learned_values()
        with torch.no_grad():
            value = fake_quantize(x, self._make(float(scale), int(zero_point)))
        # Equal in value, and differentiable: the parameters pass through abs and round unharmed.
        live_scale = self.scale.abs().clamp_min(SMALLEST_NORMAL)
        live_zero = self.zero_point + (zero_point - self.zero_point).detach()
        strength = 1.0 / math.sqrt(max(x.numel(), 1) * self.quant_max)
        return cast(
            Tensor,
            _LearnedStep.apply(
                x, value, live_scale, live_zero, self.quant_min, self.quant_max, strength
            ),
        )


class WeightFakeQuantize(WeightObserver, FakeQuantizeBase):  # type: ignore[misc]
    """Rounds a weight, folded batch norm included, with a scale for the weight as it is now.

    Its scale always follows the weight, also where observers are disabled, because it is the final
    weight that will be shipped. With a learned scale (``observer="lsq"``) the first one is that of
    the least squared error. A supplied scale (:meth:`set_scale`) stays, and what is beyond the last
    integer has no gradient; with a learned scale it is where learning starts.

    Args:
        scheme: format, granularity and observer.
        axis: output-channel axis.
        name: of the op, for messages.
        slot: takes a reference to this module.
        channels: output channels on ``axis``.

    Attributes:
        scale_parameter: with ``lsq``, float32, scalar or ``(channels,)``.
        least_scale: what the biases of the ops that use the weight need: see
            :func:`custom_quantizer.core.bias.raise_scale`.
        step_scale: what the last forward pass rounded with.

    Raises:
        ConfigError: learned scales for groups of channels.
    """

    initialized: Tensor
    least_scale: Tensor

    def __init__(
        self,
        scheme: TensorScheme,
        axis: int = 0,
        name: str = "",
        slot: Slot | None = None,
        channels: int = 1,
        **spec: Any,
    ) -> None:
        super().__init__(scheme, axis, name, **spec)
        self.learned = scheme.observer == "lsq"
        shape = (channels,) if scheme.granularity == "per_channel" else ()
        self.register_buffer("least_scale", torch.zeros(shape))
        self.register_buffer("initialized", torch.tensor([0], dtype=torch.uint8))
        if self.learned:
            if scheme.group_size is not None:
                raise ConfigError(
                    f"{name}: the scales of weight groups cannot be learned; leave out lsq"
                )
            self.scale_parameter = nn.Parameter(torch.ones(shape))
        self.step_scale = torch.zeros(())
        if slot is not None:
            slot.module = self

    def scale(self, weight: Tensor) -> Tensor:
        """The scale of this step, before it is raised for a bias.

        Raises:
            CalibrationError: the weight is not finite.
        """
        largest = super().scale(weight)
        if not self.learned:
            return largest
        if not self.initialized:
            with torch.no_grad():
                given = self.supplied_scale is not None
                first = largest if given else self._least_error(weight.detach(), largest)
                self.scale_parameter.copy_(first)
                self.initialized.fill_(1)
        return self.scale_parameter.detach().abs().clamp_min(SMALLEST_NORMAL)

    def forward(self, weight: Tensor) -> Tensor:
        """Round ``weight``."""
        if not self.fake_quant_enabled[0]:
            return weight
        with torch.no_grad():
            scale = self.scale(weight)
            if self.scheme.group_size is None:
                scale = torch.maximum(scale, self.least_scale)
            self.step_scale = scale
            integers = self.integers(weight, scale)
            spread = self._spread(scale, weight)
            value = integers.to(weight.dtype) * spread
        if not self.learned:
            mask = None  # a scale that covers the largest weight clips nothing
            if self.supplied_scale is not None:
                steps = torch.round(weight.detach() / spread)
                fmt = self.scheme.format
                mask = (steps >= fmt.quant_min) & (steps <= fmt.quant_max)
            return cast(Tensor, _StraightThrough.apply(weight, value, mask))
        live = self.scale_parameter.abs().clamp_min(SMALLEST_NORMAL)
        # A copy: the bias may change it before the gradients are computed.
        live = self._spread(torch.maximum(live, self.least_scale.clone()), weight)
        fmt = self.scheme.format
        features = weight.numel() / max(self.scale_parameter.numel(), 1)
        strength = 1.0 / math.sqrt(features * fmt.quant_max)
        zero = torch.zeros((), device=weight.device)
        return cast(
            Tensor,
            _LearnedStep.apply(weight, value, live, zero, fmt.quant_min, fmt.quant_max, strength),
        )

    def _least_error(self, weight: Tensor, largest: Tensor) -> Tensor:
        """Of the fractions of the largest scale, the one with the least squared error."""
        best, least = largest, torch.full_like(largest, torch.inf)
        for fraction in torch.linspace(0.25, 1.0, 31).tolist():
            scale = largest * fraction
            spread = self._spread(scale, weight)
            error = (self.integers(weight, scale).to(weight.dtype) * spread - weight).square()
            error = (
                error.sum()
                if scale.dim() == 0
                else error.movedim(self.ch_axis, 0).flatten(1).sum(1)
            )
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best


class BiasFakeQuantize(BiasObserver, FakeQuantizeBase):  # type: ignore[misc]
    """Rounds the derived bias with the scales that input and weight have in this step.

    Where the bias would not fit, the weight's scale is raised from the next step on, as it will be
    at conversion.

    Args:
        quant_min: smallest integer of the format.
        quant_max: largest.
        name: of the op, for messages.
        input_slot: holds the fake quantizer of the op's input.
        weight_slot: holds that of its weight.
        repeats: how often the channels of the weight's axis repeat in the op's output.
        input_bits: width of the input.
    """

    def __init__(
        self,
        quant_min: int,
        quant_max: int,
        name: str = "",
        input_slot: Slot | None = None,
        weight_slot: Slot | None = None,
        repeats: int = 1,
        input_bits: int = 8,
        **spec: Any,
    ) -> None:
        super().__init__(quant_min, quant_max, name, **spec)
        self._input = input_slot or Slot()
        self._weight = weight_slot or Slot()
        self.repeats = repeats
        self.input_bits = input_bits

    @property
    def source(self) -> ActivationFakeQuantize | None:
        """That of the op's input; ``None`` where it has none of ours."""
        module = self._input.module
        return module if isinstance(module, ActivationFakeQuantize) else None

    def forward(self, bias: Tensor) -> Tensor:
        """Round ``bias``, ``(out_channels,)``.

        Raises:
            CalibrationError: the op's input or weight has no fake quantizer of ours.
        """
        source, weight = self.source, self._weight.module
        if source is None or not isinstance(weight, WeightFakeQuantize):
            raise CalibrationError(
                f"{self.name}: no fake quantizer was made for its input or its weight, so its bias "
                "cannot be derived; another quantizer annotated the same op"
            )
        enabled = (module.fake_quant_enabled[0] for module in (self, source, weight))
        if not all(enabled):
            return bias
        with torch.no_grad():
            input_scale = cast(float, source.qparams().scale)
            scale = weight.step_scale
            self._make_room(bias, input_scale, weight)
            expanded = scale.repeat(self.repeats) if scale.dim() else scale
            integers, derived = self.derive(bias, input_scale, expanded)
            value = integers.to(bias.dtype) * derived
        return cast(Tensor, _StraightThrough.apply(bias, value, None))

    def _make_room(self, bias: Tensor, input_scale: float, weight: WeightFakeQuantize) -> None:
        limit = weight.limits.of(max(weight.scheme.format.bits, self.input_bits))
        scale = weight.step_scale
        if self.repeats > 1 and scale.dim():
            bias = bias.abs().reshape(self.repeats, -1).amax(dim=0)
        needed = raise_scale(scale, [(input_scale, bias)], limit)
        if bool((needed > scale).any()):
            torch.maximum(weight.least_scale, needed, out=weight.least_scale)
