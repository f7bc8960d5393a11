"""What rounding loses in a layer, made up for by its other integers and its bias.

All look at what arrives at the layer in the float model and in the quantized one, whose layers
before this one are finished. They need no gradients, and seconds for a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from custom_quantizer.accuracy.layers import Layer
from custom_quantizer.accuracy.rounding import (
    Moments,
    MomentsAccumulator,
    coordinate_descent,
    damped,
    gptq,
    output_error,
    refit,
)
from custom_quantizer.accuracy.streams import Stream

__all__ = [
    "correct_bias",
    "correct_bias_by_means",
    "fitted_rows",
    "input_moments",
    "round_by_error",
    "set_integers",
]

_POSITIONS = 1 << 14
"""Places at which second moments of a layer's inputs are taken; more changed nothing."""

_SCALES = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52)
"""Weight scales that are tried, in units of the one that clips nothing."""


def input_moments(
    layer: Layer,
    rounded: Sequence[Tensor],
    floating: Sequence[Tensor],
    generator: torch.Generator,
    positions: int = _POSITIONS,
) -> Moments:
    """Moments of what meets the weight, at places drawn evenly from all batches.

    Args:
        layer: the layer.
        rounded: its input in the quantized model, one tensor per batch.
        floating: the same in the float model.
        generator: draws the places, on the CPU.
        positions: how many.
    """
    share = -(-positions // len(rounded))
    sums = MomentsAccumulator()
    for p, f in zip(rounded, floating, strict=True):
        chosen: list[Tensor | None] = []

        def draw(count: int, chosen: list[Tensor | None] = chosen) -> Tensor | None:
            if not chosen:  # the same places of both
                drawn = torch.randperm(count, generator=generator)[:share]
                chosen.append(drawn if count > share else None)
            return chosen[0]

        sums.add(layer.patches(p, draw), layer.patches(f, draw))
    return sums.moments()


def fitted_rows(
    layer: Layer, moments: Moments, weight: Tensor, *, centered: bool
) -> tuple[Tensor, Tensor]:
    """The weight refitted: it makes of rounded inputs what the float weight makes of float ones.

    Args:
        layer: the layer.
        moments: of its inputs.
        weight: of the float model.
        centered: a bias takes up differences of means, so that only deviations from them count.

    Returns:
        Float64 ``(groups, outputs, inputs)``, and the second moments of the rounded inputs,
        ``(groups, inputs, inputs)``: the error of other rows is a quadratic form of these.

    References:
        The first step of asymmetric calibration in Y. Li et al. GPTAQ: efficient finetuning-free
        quantization for asymmetric calibration. ICML 2025. https://arxiv.org/abs/2504.02692
    """
    square, cross = moments.square, moments.cross
    if not centered:
        square = square + moments.mean.unsqueeze(2) * moments.mean.unsqueeze(1)
        cross = cross + moments.float_mean.unsqueeze(2) * moments.mean.unsqueeze(1)
    rows = layer.to_rows(weight.to(torch.float64))
    return refit(rows, cross - square, damped(square)), square


def round_by_error(layer: Layer, moments: Moments, weight: Tensor, *, centered: bool) -> None:
    """Give a layer the scales and integers that change its outputs least: GPTQ.

    The weight is first refitted. Then every output channel is rounded with several scales, and
    keeps the best one.

    Args:
        layer: the layer; its weight is changed.
        moments: of its inputs.
        weight: of the float model.
        centered: see :func:`fitted_rows`.
    """
    rows, square = fitted_rows(layer, moments, weight, centered=centered)
    hessian = damped(square)
    observer = layer.observer
    widest = observer.largest_scale(layer.from_rows(rows))
    scales = torch.stack([layer.fitting_scale(widest * share) for share in _SCALES])
    spread = torch.cat(
        [layer.scale_of_rows(scale).expand_as(rows) for scale in scales.to(torch.float64)], dim=1
    )
    many = rows.repeat(1, len(scales), 1)
    fmt = observer.scheme.format
    limits = fmt.quant_min, fmt.quant_max
    integers = gptq(many.float(), spread.float(), hessian, limits).to(torch.float64)
    errors = output_error(many, integers * spread, square)
    groups, _, inputs = rows.shape
    by_scale = errors.reshape(groups, len(scales), -1)
    best = layer.sum_by_scale(by_scale.movedim(1, 0)).argmin(0)
    scale = scales.gather(0, best.unsqueeze(0)).squeeze(0)
    chosen = layer.scale_of_rows(best.to(torch.float64)).expand_as(rows).long()
    candidates = integers.reshape(groups, len(scales), -1, inputs)
    rounded = candidates.gather(1, chosen.unsqueeze(1)).squeeze(1)
    spread = layer.scale_of_rows(scale.to(torch.float64))
    rounded = coordinate_descent(rows, rounded, spread, hessian, limits)
    set_integers(layer, layer.from_rows(rounded), scale)


def set_integers(layer: Layer, integers: Tensor, scale: Tensor) -> None:
    """Let conversion find ``integers`` and ``scale``: the weight becomes their product."""
    layer.observer.set_scale(scale)
    with torch.no_grad():
        layer.weight.copy_(layer.observer.dequantized(integers, scale))


def correct_bias(layer: Layer, rounded: Stream, means: Tensor, batches: int) -> str | None:
    """Move the bias by the mean difference of the outputs, in units of the derived bias.

    Args:
        layer: the layer; its bias is changed.
        rounded: the quantized model, at this layer; it then holds the changed layer's outputs.
        means: of the layer's outputs in the float model, float64, ``(out_channels,)``.
        batches: use that many, the first ones.

    Returns:
        Why nothing was changed, or ``None``.

    References:
        M. Nagel et al. Data-free quantization through weight equalization and bias correction.
        ICCV 2019, section 4.2 (here with data). https://arxiv.org/abs/1906.04721
    """
    rounded.run_products(layer)
    bias = layer.rounded_bias()
    if bias is None:
        reason: str | None = "it has no bias"
    else:
        products = layer.channel_means(rounded.batches(layer.node)[:batches])
        reason = _move_bias(layer, means - (products + bias))
    rounded.add_bias(layer)
    return reason


def correct_bias_by_means(layer: Layer, weight: Tensor, inputs: Sequence[Tensor]) -> str | None:
    """Move the bias by what the rounded weight makes of the mean input, in whole units.

    That is ``(W - Wq) E[x]``, with the mean of the float model's inputs. A layer is linear, so that
    its outputs for the mean of all samples have the mean of all outputs, borders of images
    included. What rounding activations adds is not in it.

    Args:
        layer: the layer; its bias is changed.
        weight: of the float model.
        inputs: of the layer in the float model, one tensor per batch.

    Returns:
        Why nothing was changed, or ``None``.

    References:
        M. Nagel et al. Data-free quantization through weight equalization and bias correction.
        ICCV 2019, section 4.2.1 (there with means that follow from batch norms, which are folded
        here). https://arxiv.org/abs/1906.04721
    """
    if layer.bias is None:
        return "it has no bias"
    lost = weight - layer.rounded_weight()
    total, samples = torch.zeros_like(layer.bias, dtype=torch.float64), 0
    for x in inputs:
        many = layer.takes_samples(x)
        outputs = layer.compute(x.mean(0, keepdim=True) if many else x, lost, None)
        size = len(x) if many else 1
        total += layer.channel_means([outputs]) * size
        samples += size
    return _move_bias(layer, total / samples)


def _move_bias(layer: Layer, difference: Tensor) -> str | None:
    """Add ``difference`` (float64, ``(out_channels,)``) to a bias; why not, or ``None``."""
    bias = cast(Tensor, layer.bias)
    before, scale = bias.detach().clone(), layer.final_scale()
    ships = layer.rounded_bias()
    assert ships is not None
    with torch.no_grad():
        bias.copy_(ships.to(torch.float64) + difference)
        ships = layer.rounded_bias()
        assert ships is not None
        bias.copy_(ships)
    if not torch.equal(layer.final_scale(), scale):
        with torch.no_grad():
            bias.copy_(before)
        return "the corrected bias would not fit the weight's scale"
    return None
