"""XNNPACK as a :class:`~custom_quantizer.ops.backend.Backend`; executorch is not imported.

XNNPACK computes on the integers of batches of images: convolutions, linear layers, pooling and
means in two dims, and moves. So all of ``LEGALIZATIONS`` (:mod:`custom_quantizer.ops.rewrites`)
are taken; of those that are not for want of a kernel:

- a mean of a dynamic batch of images is a linear layer, because XNNPACK's own writes beyond its
  memory where the batch grows between two calls (its accumulators are not allocated again:
  ``reshape_reduce_operator`` in XNNPACK 92a7ad50);
- average pooling exists in float only, with a pad in float before it where padding counts, so a
  depthwise convolution takes its place;
- ExecuTorch's partitioner (1.5.1) takes pools of single images and then fails on them, so that they
  become batches of one.
"""

from __future__ import annotations

import torch

from custom_quantizer.backends.xnnpack.arithmetic import XNNPACK, XNNPACK_NEON
from custom_quantizer.backends.xnnpack.kernels import (
    EMULATED,
    FLOAT,
    PORTABLE,
    SUPPORT,
    refuses_integers,
    refuses_tensor,
)
from custom_quantizer.backends.xnnpack.passes import IN_STEPS
from custom_quantizer.backends.xnnpack.passes.comparisons import read_as_numbers
from custom_quantizer.backends.xnnpack.run_time import RUN_TIME
from custom_quantizer.core.bias import MAX_EXACT_BIAS, WIDE_BIAS, BiasLimits
from custom_quantizer.ops.backend import Backend
from custom_quantizer.ops.rewrites.legalization import LEGALIZATIONS, legalize_by

__all__ = ["BACKEND"]

aten = torch.ops.aten

_TAKEN = frozenset({aten.sin.default, aten.cos.default, aten.pow.Tensor_Scalar, aten.max.dim})
"""Ops of no family that ExecuTorch's partitioner hands to XNNPACK as they are."""

BACKEND = Backend(
    name="xnnpack",
    title="XNNPACK",
    arithmetic=XNNPACK,
    others=(XNNPACK_NEON,),
    kernels=SUPPORT,
    missing=FLOAT,
    float_targets=_TAKEN | IN_STEPS,
    in_steps=read_as_numbers,
    outside=PORTABLE,
    wide=EMULATED,
    limits=BiasLimits(MAX_EXACT_BIAS, WIDE_BIAS),
    legalize=lambda model, training: legalize_by(model, LEGALIZATIONS, training=training),
    refuses_tensor=refuses_tensor,
    refuses_integers=refuses_integers,
    run_time=RUN_TIME,
)
