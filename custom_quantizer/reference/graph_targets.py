"""What a saved graph may call: a closed list, so that a file can ask for nothing else.

A name is looked up in the lists below before it is looked up in ``torch.ops``. Left out on purpose:
ops that read or write files (``from_file``), change what memory a tensor stands for (``set_``,
``as_strided``, ``resize_``), trust indices they are given (``_unsafe_*``, ``max_unpool``, every
``*_backward``), draw random numbers, have sizes that depend on values (``nonzero``, ``item``), and
whatever has no place in a network at inference.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from custom_quantizer.core.graph import (
    DEQUANTIZE_GROUPED,  # importing it registers all quantized ops
)

__all__ = ["CONTROL_FLOW", "SYMBOLIC", "check_arguments", "name_of", "resolve"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ATEN = _names(
    """
    abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr alias
    all amax amin aminmax any arange argmax argmin argsort asin asinh atan atan2 atanh
    avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear bitwise_and bitwise_not
    bitwise_or bitwise_xor bmm broadcast_tensors broadcast_to bucketize cat ceil celu
    channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im concat concatenate
    constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d convolution copy copysign cos cosh cosine_similarity cross cummax cummin
    cumprod cumsum deg2rad detach detach_copy diag diag_embed diagonal diff dist div divide dot
    dropout einsum elu embedding embedding_bag empty empty_like eq erf erfc erfinv exp exp2
    expand expand_as expand_copy expm1 eye feature_dropout fill flatten flip fliplr flipud floor
    floor_divide fmax fmin fmod frac full full_like gather ge gelu glu greater greater_equal
    grid_sampler grid_sampler_2d group_norm gru gru_cell gt hardshrink hardsigmoid hardswish
    hardtanh heaviside hypot im2col index index_add index_copy index_fill index_put index_select
    inner instance_norm isclose isfinite isinf isnan kron layer_norm leaky_relu lerp less
    less_equal le lift_fresh lift_fresh_copy linalg_norm linalg_vecdot linalg_vector_norm linear
    linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logcumsumexp logical_and
    logical_not logical_or logical_xor logit logsumexp lstm lstm_cell lt masked_fill
    masked_scatter matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum
    mean median meshgrid min minimum mish mm movedim moveaxis mul multiply mv nan_to_num nansum
    narrow native_batch_norm native_group_norm native_layer_norm ne neg negative new_empty
    new_full new_ones new_zeros norm not_equal one_hot ones ones_like outer pad
    pairwise_distance permute permute_copy pixel_shuffle pixel_unshuffle positive pow prelu prod
    rad2deg reciprocal reflection_pad1d reflection_pad2d reflection_pad3d relu relu6 remainder
    repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll rot90 round rsqrt rsub
    scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted
    select select_copy select_scatter selu sigmoid sign silu sin sinc sinh slice slice_copy
    slice_scatter softmax softplus softshrink sort special_expit split split_with_sizes sqrt
    square squeeze squeeze_copy stack std std_mean sub subtract sum swapaxes swapdims sym_numel
    sym_size t take_along_dim tan tanh tensordot threshold tile to topk transpose transpose_copy
    tril triu true_divide trunc type_as unbind unflatten unfold unsqueeze unsqueeze_copy
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean view view_as
    view_copy where xlogy zero zeros zeros_like _adaptive_avg_pool2d _adaptive_avg_pool3d
    _assert_scalar _assert_tensor_metadata _log_softmax _native_batch_norm_legit_no_training
    _safe_softmax _softmax _to_copy _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _weight_norm
    """
)
"""Base names; ``add`` stands for ``add_`` too, and for every overload that has no ``out``."""

_NOT_TENSORS = frozenset(
    {
        "_assert_scalar.default",
        "_assert_tensor_metadata.default",
        "sym_numel.default",
        "sym_size.int",
    }
)
"""Overloads that return no tensors."""

_QUANTIZED = _names(
    """
    choose_qparams.tensor choose_qparams_symmetric.tensor dequantize_per_channel.default
    dequantize_per_tensor.default dequantize_per_tensor.tensor quantize_per_channel.default
    quantize_per_tensor.default quantize_per_tensor.tensor
    """
)
_TORCHAO = frozenset({"dequantize_affine.default"})

_OPERATORS = _names("add eq floordiv ge gt le lt mod mul ne neg sub truediv")
_OF_SIZES = _names("sym_float sym_max sym_min sym_not sym_sum")
SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"torch.{name}": getattr(torch, name) for name in _OF_SIZES},
}
"""Arithmetic on sizes."""

CONTROL_FLOW: Mapping[str, HigherOrderOperator] = {
    "cond": torch.ops.higher_order.cond,
    "map_impl": torch.ops.higher_order.map_impl,
}
"""``while_loop`` is not among them: a file could ask for a loop without an end."""

_OTHER: Mapping[str, Callable[..., Any]] = {
    "operator.getitem": operator.getitem,
    **SYMBOLIC,
    **{f"higher_order.{name}": op for name, op in CONTROL_FLOW.items()},
}
_NAMES = {function: name for name, function in _OTHER.items()}

_TEXTS: Mapping[tuple[str, str], re.Pattern[str]] = {
    ("_assert_scalar", "assert_msg"): re.compile("[ -~]{0,1000}"),
    ("einsum", "equation"): re.compile("[A-Za-z,.> -]{0,256}"),
    **{
        key: re.compile("[a-z_]{0,32}")
        for key in (
            ("conv1d", "padding"),
            ("conv2d", "padding"),
            ("conv3d", "padding"),
            ("div", "rounding_mode"),
            ("divide", "rounding_mode"),
            ("gelu", "approximate"),
            ("meshgrid", "indexing"),
            ("pad", "mode"),
            ("scatter", "reduce"),
            ("scatter_reduce", "reduce"),
            ("searchsorted", "side"),
        )
    },
}
"""The arguments that are strings: op, argument -> what it may be."""

_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "number": (int, float),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "Device": (torch.device,),
    "MemoryFormat": (torch.memory_format,),
}


def name_of(target: object) -> str | None:
    """The name of a call's target in a file; ``None``: a file cannot hold it."""
    if isinstance(target, OpOverload):
        name = str(target)
        return name if resolve(name) is target else None
    # Some targets cannot be hashed, and none of ours is among those.
    return next((name for own, name in _NAMES.items() if own is target), None)


def resolve(name: str) -> Callable[..., Any] | None:
    """The function that a name in a file stands for; ``None`` for all but the lists above."""
    if name in _OTHER:
        return _OTHER[name]
    namespace, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    if namespace == "quantized_decomposed" and rest in _QUANTIZED:
        return _overload(torch.ops.quantized_decomposed, base, overload)
    if namespace == "torchao" and rest in _TORCHAO:
        return DEQUANTIZE_GROUPED
    if namespace != "aten" or not (base in _ATEN or base.removesuffix("_") in _ATEN):
        return None
    return _overload(torch.ops.aten, base, overload)


def _overload(namespace: Any, base: str, overload: str) -> OpOverload | None:
    packet = getattr(namespace, base, None)
    if packet is None or overload not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload)
    written = [
        argument
        for argument in found._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    kinds = {str(returned.type) for returned in found._schema.returns}
    # aten has overloads for strings, lists and numbers of TorchScript, too; and in-place ops write
    # into their first argument, while an ``out`` comes last.
    computes = bool(kinds) and kinds <= {"Tensor", "List[Tensor]"}
    if any(argument.kwarg_only for argument in written):
        return None
    return found if computes or f"{base}.{overload}" in _NOT_TENSORS else None


def check_arguments(
    target: OpOverload,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    is_node: Callable[[Any], bool],
) -> str | None:
    """What is wrong with the arguments of a call, by the op's schema; ``None`` if nothing is.

    Args:
        target: the op.
        args: by position.
        kwargs: by name.
        is_node: whether a value is the result of another call, whose type only running the graph
            can tell.
    """
    base = target._schema.name.partition("::")[2].removesuffix("_")
    parameters = target._schema.arguments
    positional = [parameter for parameter in parameters if not parameter.kwarg_only]
    if len(args) > len(positional):
        return f"it takes {len(positional)} arguments, {len(args)} are given"
    given = {parameter.name: value for parameter, value in zip(positional, args, strict=False)}
    twice = given.keys() & kwargs.keys()
    unknown = kwargs.keys() - {parameter.name for parameter in parameters}
    if twice or unknown:
        return f"it takes no (second) argument {sorted(twice | unknown)[0]!r}"
    given.update(kwargs)
    for parameter in parameters:
        if parameter.name not in given:
            if not parameter.has_default_value():
                return f"its argument {parameter.name!r} is missing"
            continue
        kind, value = str(parameter.real_type), given[parameter.name]
        if not _fits(kind, value, _TEXTS.get((base, parameter.name)), is_node):
            return f"its argument {parameter.name!r} is no {kind}"
    return None


def _fits(
    kind: str, value: Any, text: re.Pattern[str] | None, is_node: Callable[[Any], bool]
) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(kind[len("Optional[") : -1], value, text, is_node)
    if is_node(value):
        return kind != "str"
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(_fits(inner, part, None, is_node) for part in value)
        # A list of a fixed length takes one number for all of them.
        return type(value) is int and inner == "int"
    if kind == "str":
        return isinstance(value, str) and text is not None and text.fullmatch(value) is not None
    if isinstance(value, bool):
        return kind in ("bool", "number")
    if kind == "Tensor":
        # ``mul.Tensor(x, 2.0)``: a number stands for a tensor of no dimensions.
        return isinstance(value, (int, float))
    return isinstance(value, _KINDS.get(kind, ()))
