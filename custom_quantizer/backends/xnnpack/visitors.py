"""How the delegate's file says what XNNPACK can compute and ExecuTorch (1.5.1) does not write.

ExecuTorch writes each op of a delegate with the ``NodeVisitor`` that is registered for it. Those of
this module take the place of six of its own and differ from them only at nodes that our passes
marked (``node.meta["custom"]``) and at what our partitioner alone puts into integers, so that
graphs of other flows are written as before.

A product whose second operand was transposed by a marked permute is written with
``XNN_FLAG_TRANSPOSE_B``, and reads what the permute reads; the permute itself is not written.
XNNPACK (92a7ad50, ``optimize_common_subgraphs_gemm_rhs_transpose``) takes such a flag back where
the operand comes from a transpose of its last two dims alone, so a copy is written between them.

A marked pointwise convolution is written as a fully connected layer: both read channels last, and
only the latter takes 4-bit weights. Sums, requantization and clamps are the same.

A convolution that is marked for it reads columns of its input that were joined to channels
(:mod:`~custom_quantizer.backends.xnnpack.columns`): a reshape of data with channels last, which
leaves every byte where it is, goes before it.

Floats of an image with few channels are put channels last before they are quantized, where
ExecuTorch does it after: XNNPACK is faster at that, and the integers are the same.

A bilinear resize between int8 Q/DQ boundaries is written with its scale and zero point, which
ExecuTorch leaves out.

A slice of a tensor with dynamic sizes takes all there is of those that it does not cut, where
ExecuTorch would write their bounds.
"""

from __future__ import annotations

from copy import deepcopy
from importlib.metadata import version
from typing import Any

import executorch.backends.xnnpack.operators  # noqa: F401  # registers ExecuTorch's own visitors
from executorch.backends.xnnpack._passes.fuse_activation_pass import FuseActivationPass
from executorch.backends.xnnpack.operators.node_visitor import (
    NodeVisitor,
    get_node_visitors,
    register_node_visitor,
)
from executorch.backends.xnnpack.operators.quant_params import QuantParams
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    XNNBatchMatrixMultiply,
    XNNConv2d,
    XNNConvert,
    XNNDatatype,
    XNNFullyConnected,
    XNNStaticReshape,
    XNNStaticResizeBilinear2D,
    XNNStaticTranspose,
    XNNTensorValue,
    XNode,
    XValue,
)
from executorch.backends.xnnpack.utils.quant_utils import (
    is_dequant,
    is_quant,
    is_tagged_as_implicit_q_dq,
)
from executorch.backends.xnnpack.utils.utils import PERM_NCHW_TO_NHWC
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    XNN_FLAG_ALIGN_CORNERS,
    XNN_FLAG_TRANSPOSE_B,
    XNN_INVALID_VALUE_ID,
)
from torch import Tensor
from torch.fx import Node

from custom_quantizer.backends.xnnpack.columns import JoinedColumns, join_columns
from custom_quantizer.backends.xnnpack.passes import (
    Mark,
)
from custom_quantizer.core.graph import is_same_shape
from custom_quantizer.errors import LoweringError

__all__ = ["VISITORS"]


def _registered(target: str) -> Any:
    """The visitor that writes an op so far; upstream's modules do not keep the name of the class.

    Raises:
        LoweringError: there is none, so that this is another ExecuTorch than is known here.
    """
    found = get_node_visitors(None, {}, None).get(target)
    if found is None:
        raise LoweringError(
            f"ExecuTorch {version('executorch')} has no XNNPACK visitor for {target}; install "
            "executorch 1.5.1"
        )
    return type(found)


_Permute: Any = _registered("aten.permute_copy.default")
_Product: Any = _registered("aten.bmm.default")
_Convolution: Any = _registered("aten.convolution.default")
_Resize: Any = _registered("aten.upsample_bilinear2d.vec")
_Layout: Any = _registered("aten._to_copy.default")
_Slice: Any = _registered("aten.slice_copy.Tensor")


class TransposeVisitor(_Permute):  # type: ignore[misc]  # ExecuTorch is untyped
    """A permute, unless the product behind it does without."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write a permute; nothing, if only products read it, and read what is before it."""
        readers = _readers(node)
        if not readers or any(_transpose_before(reader) is not node for reader in readers):
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)


class ProductVisitor(_Product):  # type: ignore[misc]
    """A batch of products; of a second operand that a marked permute transposed, with a flag."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write the products."""
        transpose = _transpose_before(node)
        if transpose is None:
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
            return
        operands = (node.args[0], transpose.args[0])
        outputs = QuantParams.from_outputs(node)
        self.define_tensor(node, xnn_graph, vals_to_ids, quant_params=outputs)
        for operand in operands:
            inputs = QuantParams.from_inputs(operand, self._exported_program)
            self.define_tensor(operand, xnn_graph, vals_to_ids, quant_params=inputs)
        product = XNNBatchMatrixMultiply(
            input1_id=vals_to_ids[operands[0]],
            input2_id=_behind_a_copy(vals_to_ids[operands[1]], xnn_graph, debug_handle),
            output_id=vals_to_ids[node],
            flags=XNN_FLAG_TRANSPOSE_B,
        )
        xnn_graph.xnodes.append(XNode(xnode_union=product, debug_handle=debug_handle))


class WholeProductVisitor(ProductVisitor):
    """Products over several batch dims, of which a view that joins them would have two dynamic."""

    target = "aten.matmul.default"


class ConvolutionVisitor(_Convolution):  # type: ignore[misc]
    """A convolution; a marked one as a fully connected layer, or over joined columns."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write the layer."""
        if Mark.PACKED.on(node):
            self._write_packed(node, xnn_graph, vals_to_ids, debug_handle)
        elif Mark.JOINED_COLUMNS.on(node):
            self._write_joined(node, xnn_graph, vals_to_ids, debug_handle)
        else:
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)

    def _write_joined(
        self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int
    ) -> None:
        """Write a reshape of the input, and a convolution that reads joined columns."""
        arguments: Any = node.args
        data, weight, *_ = arguments
        inputs = QuantParams.from_inputs(data, self._exported_program)
        self.define_tensor(data, xnn_graph, vals_to_ids, quant_params=inputs, convert_to_nhwc=True)
        columns, axis = _columns_of(node)
        # Upstream's visitor takes what is defined already for input and weight.
        known = {
            **vals_to_ids,
            data: _behind_a_reshape(vals_to_ids[data], columns, axis, xnn_graph, debug_handle),
            weight: self._joined_weight(weight, columns, axis, xnn_graph),
        }
        super().define_node(node, xnn_graph, known, debug_handle)
        vals_to_ids.update({k: v for k, v in known.items() if k not in (data, weight)})
        # Upstream writes a convolution of one channel as a depthwise one.
        conv = XNNConv2d(**vars(xnn_graph.xnodes[-1].xnode_union))
        xnn_graph.xnodes[-1].xnode_union = conv
        conv.group_input_channels *= columns.factor
        if axis == _WIDTH:
            conv.kernel_width, conv.subsampling_width = columns.taps, columns.stride
            conv.padding_left, conv.padding_right = columns.padding
        else:
            conv.kernel_height, conv.subsampling_height = columns.taps, columns.stride
            conv.padding_top, conv.padding_bottom = columns.padding

    def _joined_weight(
        self, weight: Node, columns: JoinedColumns, axis: int, xnn_graph: Any
    ) -> int:
        """Write the weight of a convolution over joined columns; the id of the value."""
        weights = QuantParams.from_weights(weight, self._exported_program)
        quantize = weights.quantize_tensor

        def joined(values: Tensor) -> Tensor:
            wide = columns.weight(quantize(values).transpose(axis, -1)).transpose(axis, -1)
            return wide.contiguous()

        weights.quantize_tensor = joined
        ids: dict[Node, int] = {}
        self.define_tensor(
            weight, xnn_graph, ids, quant_params=weights, convert_to_nhwc=True, force_fp32=True
        )
        stored = xnn_graph.xvalues[ids[weight]].xvalue_union.tensor_value
        stored.dims = _joined_dims(stored.dims, axis, columns.factor, columns.taps)
        return ids[weight]

    def _write_packed(
        self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int
    ) -> None:
        """Write a fully connected layer with two weights to a byte."""
        data, weight, bias = node.args[:3]
        inputs = QuantParams.from_inputs(data, self._exported_program)
        nhwc = {"convert_to_nhwc": True}
        self.define_tensor(data, xnn_graph, vals_to_ids, quant_params=inputs, **nhwc)
        weights = QuantParams.from_weights(weight, self._exported_program)
        weights.is_qc4w = True
        self.define_tensor(weight, xnn_graph, vals_to_ids, quant_params=weights)
        stored = xnn_graph.xvalues[vals_to_ids[weight]].xvalue_union.tensor_value
        stored.num_dims, stored.dims = 2, stored.dims[:2]
        if bias is not None:
            biases = QuantParams.from_bias(bias, weights, inputs)
            self.define_tensor(bias, xnn_graph, vals_to_ids, quant_params=biases)
        outputs = QuantParams.from_outputs(node)
        self.define_tensor(node, xnn_graph, vals_to_ids, quant_params=outputs, **nhwc)
        layer = XNNFullyConnected(
            input1_id=vals_to_ids[data],
            filter_id=vals_to_ids[weight],
            bias_id=XNN_INVALID_VALUE_ID if bias is None else vals_to_ids[bias],
            output_id=vals_to_ids[node],
            flags=0,
        )
        bounds = FuseActivationPass.get_fused_activation(node)
        written = XNode(xnode_union=layer, debug_handle=debug_handle, output_min_max=bounds)
        xnn_graph.xnodes.append(written)


class LayoutVisitor(_Layout):  # type: ignore[misc]
    """A change of layout; of what a marked quantize node gives, before it is quantized."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write the change of layout."""
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        if not _reads_what_is_moved_first(node):
            return
        move = xnn_graph.xnodes[-1].xnode_union
        quantized = move.input_id
        makers = (
            i
            for i, written in enumerate(xnn_graph.xnodes)
            if isinstance(written.xnode_union, XNNConvert)
            and written.xnode_union.output_id == quantized
        )
        at = next(makers, None)
        if at is None:
            return
        convert = xnn_graph.xnodes.pop(at)
        result = xnn_graph.xvalues[move.output_id].xvalue_union.tensor_value
        # The value between the two is float now, and in the new layout.
        xnn_graph.xvalues[quantized] = XValue(
            xvalue_union=XNNTensorValue(
                datatype=XNNDatatype.xnn_datatype_fp32,
                num_dims=result.num_dims,
                dims=list(result.dims),
                external_id=XNN_INVALID_VALUE_ID,
                constant_buffer_idx=0,
                flags=0,
                id_out=quantized,
            )
        )
        move.input_id, convert.xnode_union.output_id = (
            convert.xnode_union.input_id,
            move.output_id,
        )
        move.output_id = convert.xnode_union.input_id = quantized
        xnn_graph.xnodes.append(convert)


class ResizeVisitor(_Resize):  # type: ignore[misc]  # ExecuTorch is untyped
    """A bilinear resize; of integers with what they stand for."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write the resize."""
        data, outputs = node.args[0], QuantParams.from_outputs(node)
        inputs = QuantParams.from_inputs(data, self._exported_program)
        if inputs is None or outputs is None:
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
            return
        nhwc = {"convert_to_nhwc": True}
        self.define_tensor(node, xnn_graph, vals_to_ids, quant_params=outputs, **nhwc)
        self.define_tensor(data, xnn_graph, vals_to_ids, quant_params=inputs, **nhwc)
        height, width = node.meta["val"].shape[-2:]
        resize = XNNStaticResizeBilinear2D(
            new_height=height,
            new_width=width,
            input_id=vals_to_ids[data],
            output_id=vals_to_ids[node],
            flags=XNN_FLAG_ALIGN_CORNERS if node.args[2] else 0,
        )
        xnn_graph.xnodes.append(XNode(xnode_union=resize, debug_handle=debug_handle))


class SliceVisitor(_Slice):  # type: ignore[misc]
    """A slice, of tensors with dynamic sizes, too."""

    def define_node(self, node: Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
        """Write the slice; a size of 0 is that of the input."""
        super().define_node(node, xnn_graph, vals_to_ids, debug_handle)
        written = xnn_graph.xnodes[-1].xnode_union
        given, kept = (tensor.meta["val"].shape for tensor in (node.all_input_nodes[0], node))
        order = PERM_NCHW_TO_NHWC if "XNN_NHWC_NODE" in node.meta else range(len(kept))
        for position, dim in enumerate(order):
            if not isinstance(kept[dim], int) and is_same_shape([given[dim]], [kept[dim]]):
                written.sizes[position] = 0


def _reads_what_is_moved_first(node: Node) -> bool:
    """Whether a marked quantize node gives the integers that a change of layout alone reads."""
    dequantize: Any = node.args[0]
    if not is_dequant(dequantize) or len(dequantize.users) != 1:
        return False
    quantize = dequantize.args[0]
    return is_quant(quantize) and len(quantize.users) == 1 and Mark.MOVED_FIRST.on(quantize)


_HEIGHT, _WIDTH = 2, 3
"""Dims of an image as PyTorch has it. A signal is written as an image of width 1."""


def _columns_of(node: Node) -> tuple[JoinedColumns, int]:
    """How to join the columns of a marked convolution, and which dim they are."""
    arguments: Any = node.args
    data, weight, _, stride, padding, *_ = arguments
    sizes, kernel = data.meta["val"].shape, weight.meta["val"].shape
    axis = _HEIGHT if sizes[_WIDTH] == 1 else _WIDTH

    def along_axis(values: Any) -> int:  # one number may stand for all dims
        return int(values[(axis - _HEIGHT) % len(values)])

    columns = join_columns(
        sizes[1], sizes[axis], kernel[axis], along_axis(stride), along_axis(padding)
    )
    if columns is None:
        raise LoweringError(
            f"{node} was marked as one over joined columns, and became another convolution"
        )
    return columns, axis


def _joined_dims(dims: list[int], axis: int, factor: int, columns: int) -> list[int]:
    """The dims of a value with channels last, once columns are joined."""
    joined = [*dims[:-1], dims[-1] * factor]
    joined[axis - 1] = columns
    return joined


def _behind_a_reshape(
    data: int, columns: JoinedColumns, axis: int, xnn_graph: Any, debug_handle: int
) -> int:
    """The id of a value with channels last whose columns were joined."""
    joined = deepcopy(xnn_graph.xvalues[data])
    tensor = joined.xvalue_union.tensor_value
    width = tensor.dims[axis - 1] // columns.factor
    tensor.dims = _joined_dims(tensor.dims, axis, columns.factor, width)
    tensor.id_out = len(xnn_graph.xvalues)
    tensor.external_id, tensor.flags = XNN_INVALID_VALUE_ID, 0
    xnn_graph.xvalues.append(joined)
    reshape = XNNStaticReshape(
        num_dims=len(tensor.dims),
        new_shape=tensor.dims,
        input_id=data,
        output_id=tensor.id_out,
        flags=0,
    )
    xnn_graph.xnodes.append(XNode(xnode_union=reshape, debug_handle=debug_handle))
    return int(tensor.id_out)


def _behind_a_copy(operand: int, xnn_graph: Any, debug_handle: int) -> int:
    """The id of a value that no transpose of the last two dims alone computes."""
    makers = (node.xnode_union for node in xnn_graph.xnodes)
    maker = next((m for m in makers if getattr(m, "output_id", None) == operand), None)
    if not isinstance(maker, XNNStaticTranspose):
        return operand
    same = list(range(maker.num_dims))
    if list(maker.perm) != [*same[:-2], same[-1], same[-2]]:
        return operand
    copied = deepcopy(xnn_graph.xvalues[operand])
    result = len(xnn_graph.xvalues)
    copied.xvalue_union.tensor_value.id_out = result
    xnn_graph.xvalues.append(copied)
    copy = XNNStaticTranspose(
        num_dims=len(same),
        perm=same,
        input_id=operand,
        output_id=result,
        flags=0,
    )
    xnn_graph.xnodes.append(XNode(xnode_union=copy, debug_handle=debug_handle))
    return result


def _transpose_before(node: Node) -> Node | None:
    """The marked permute of a product's second operand, if only integers stand between the two."""
    if getattr(node.target, "__name__", "") not in (_Product.target, WholeProductVisitor.target):
        return None
    dequantize: Any = node.args[1]
    if not (is_dequant(dequantize) and is_tagged_as_implicit_q_dq(dequantize)):
        return None
    quantize = dequantize.args[0]
    if not (is_quant(quantize) and is_tagged_as_implicit_q_dq(quantize)):
        return None
    found: Node = quantize.args[0]
    return found if Mark.OPERAND_TRANSPOSE.on(found) else None


def _readers(transpose: Node) -> list[Node]:
    """What reads the result of a marked permute, behind quantize and dequantize."""
    if not Mark.OPERAND_TRANSPOSE.on(transpose):
        return []
    return [
        reader
        for quantize in transpose.users
        for dequantize in (quantize.users if is_quant(quantize) else [quantize])
        for reader in (dequantize.users if is_dequant(dequantize) else [dequantize])
    ]


VISITORS: tuple[type[NodeVisitor], ...] = (
    TransposeVisitor,
    ProductVisitor,
    WholeProductVisitor,
    ConvolutionVisitor,
    LayoutVisitor,
    ResizeVisitor,
    SliceVisitor,
)
"""Registered when this module is imported; each writes what is not marked as the one before it."""

for _visitor in VISITORS:
    register_node_visitor(_visitor)
