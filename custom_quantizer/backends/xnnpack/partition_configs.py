"""Which ops XNNPACK takes: upstream's list, elu, integer products of activations, resizes, slices.

XNNPACK multiplies batches of int8 matrices, ``(a - z_a) @ b`` requantized like a linear layer, if
the zero point of the second operand is 0. ExecuTorch's partitioner (1.5.1) offers it batched
products in float only; its serializer and its runtime know both. They know elu as well, which is
not on the partitioner's list, the bilinear resize of int8 images, slices of tensors with dynamic
sizes, and products over several batch dims.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    BMMConfig,
    EluConfig,
    SliceCopyConfig,
    UnsqueezeCopyConfig,
    UpsampleBilinear2dConfig,
    ViewCopyConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_quant

from custom_quantizer.backends.xnnpack import visitors as _visitors  # noqa: F401  # registers them
from custom_quantizer.backends.xnnpack.kernels import MOST_DIMS, refuses_resize, refuses_slice
from custom_quantizer.backends.xnnpack.passes import Mark
from custom_quantizer.backends.xnnpack.quick_partitioner import QuickPartitioner
from custom_quantizer.core.graph import are_static, dynamic_sizes, reads_sizes, shape_of
from custom_quantizer.ops.movement import slice_of
from custom_quantizer.ops.resize import steps_otherwise

__all__ = ["configurations", "partitioner"]


class IntegerBatchMatmul(BMMConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """Batched products in float or, between int8 tensors, in integers."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float and static int8."""
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def get_node_and_deps(self, node: torch.fx.Node, ep: Any) -> list[torch.fx.Node]:
        """The product and, if it can run in integers, the q/dq nodes that become part of it."""
        right = node.args[1]
        centered = (
            isinstance(right, torch.fx.Node)
            and "dequantize_per_tensor" in str(right.target)
            and right.args[2] == 0
        )
        if not centered:
            return [node]
        nodes: list[torch.fx.Node] = super().get_node_and_deps(node, ep)
        return nodes


class WholeProduct(IntegerBatchMatmul):
    """Products over several batch dims that a pass has marked; ExecuTorch must leave them whole.

    It would make views of them, with two dynamic sizes.
    """

    target_name = "matmul.default"

    def get_original_aten(self) -> torch._ops.OpOverload:
        """What is not decomposed, where :meth:`check_constraints` says so."""
        return torch.ops.aten.matmul.default

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Whether a pass has marked it."""
        return Mark.WHOLE.on(node) and self.check_common_constraints(node, ep) is True


class IntegerResize(UpsampleBilinear2dConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """Bilinear resizes in float or, between int8 tensors of one scale, in integers."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float and static int8."""
        return [ConfigPrecisionType.FP32, ConfigPrecisionType.STATIC_QUANT]

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Leave out what XNNPACK would compute otherwise: it steps by the ratio of the sizes.

        Upstream leaves out whatever has a dynamic size; the kernel needs those of the image only.
        """
        sizes = (*shape_of(node.all_input_nodes[0])[-2:], *shape_of(node)[-2:])
        static = are_static(sizes)
        common = self.check_common_constraints(node, ep) is True
        return common and static and not steps_otherwise(node)

    def get_node_and_deps(self, node: torch.fx.Node, ep: Any) -> list[torch.fx.Node]:
        """The resize and, if it can run in integers, the q/dq nodes that become part of it."""
        around = _integers_around(node)
        if around is None or refuses_resize(node):
            return [node]
        before, after = around
        if before.args[1:3] != after.args[1:3]:
            return [node]
        nodes: list[torch.fx.Node] = super().get_node_and_deps(node, ep)
        return nodes


class AnySlice(SliceCopyConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """Slices, in float or of integers; sizes may be dynamic, which upstream leaves out."""

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Leave out steps, and what counts from the end of a dynamic size."""
        sizes = (*shape_of(node.all_input_nodes[0]), *shape_of(node))
        if are_static(sizes):
            return super().check_constraints(node, ep) is True
        around = _integers_around(node)
        other_scale = around is not None and around[0].args[1:] != around[1].args[1:]
        empty = any(isinstance(size, int) and size == 0 for size in sizes)
        left_out = other_scale or empty or reads_sizes(node) or slice_of(node)[3] != 1
        common = self.check_common_constraints(node, ep) is True
        return common and not left_out and not refuses_slice(node)


class ViewOfFewDims(ViewCopyConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """Views between tensors that XNNPACK has; those of the model's own many dims are left out."""

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Leave out tensors of too many dims."""
        ranks = (len(shape_of(tensor)) for tensor in (node, cast(torch.fx.Node, node.args[0])))
        return max(ranks) <= MOST_DIMS and super().check_constraints(node, ep) is True


class UnsqueezeOfOneDynamicSize(UnsqueezeCopyConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """Unsqueezes that are views for XNNPACK; others stay that upstream takes and then refuses."""

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Leave out results of several dynamic sizes."""
        dynamic = dynamic_sizes(shape_of(node))
        return dynamic <= 1 and super().check_constraints(node, ep) is True


def _integers_around(node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node] | None:
    """The dequantize node that an op reads, and the quantize node that alone reads its result."""
    before: Any = node.args[0]
    after = list(node.users)
    if len(after) == 1 and is_dequant(before) and is_quant(after[0]):
        return before, after[0]
    return None


class FloatElu(EluConfig):  # type: ignore[misc]  # ExecuTorch is untyped
    """elu in float; between int8 Q/DQ boundaries XNNPACK makes a table of the three steps."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float."""
        return [ConfigPrecisionType.FP32]

    def check_constraints(self, node: torch.fx.Node, ep: Any) -> bool:
        """Leave out what the serializer gets wrong: it drops scales and wants alpha spelled out.

        selu is an elu with a scale; :mod:`custom_quantizer.backends.xnnpack.passes.functions`
        spells out.
        """
        spelled_out = len(node.args) == 2 and not node.kwargs
        return spelled_out and super().check_constraints(node, ep) is True


def configurations() -> list[Any]:
    """Upstream's configs, with those of this module in the place of their base classes."""
    ours = {
        BMMConfig: IntegerBatchMatmul,
        SliceCopyConfig: AnySlice,
        UnsqueezeCopyConfig: UnsqueezeOfOneDynamicSize,
        UpsampleBilinear2dConfig: IntegerResize,
        ViewCopyConfig: ViewOfFewDims,
    }
    upstream = (ours.get(config, config) for config in ALL_PARTITIONER_CONFIGS)
    return [*upstream, FloatElu, WholeProduct]


def partitioner() -> XnnpackPartitioner:
    """Upstream's partitioner with these configs, for graphs that are rewritten already."""
    return QuickPartitioner(configs=configurations())
