"""A program as text, one line per op and kernel call, for tests that compare all of it."""

from __future__ import annotations

import numpy as np

from custom_quantizer.backends.xnnpack.contents import (
    DelegateContents,
    DelegateOp,
    DelegateTensor,
    KernelCall,
    ProgramContents,
)


def describe(program: ProgramContents) -> str:
    """One line per op and kernel call, with dtype, shape, scale and zero point of each."""
    lines = [f"{program.size_bytes} bytes, {program.constant_bytes} of them constants"]
    for method in program.methods:
        arguments = ", ".join(map(str, method.inputs))
        results = ", ".join(map(str, method.outputs))
        lines.append(f"method {method.name}({arguments}) -> {results}")
        for call in method.calls:
            if isinstance(call, KernelCall):
                lines.append(f"  kernel {call.name}({', '.join(map(str, call.arguments))})")
                continue
            delegate = method.delegates[call.delegate]
            lines.append(
                f"  delegate {call.delegate}: {delegate.backend_id}, {len(delegate.ops)} ops, "
                f"{delegate.size_bytes} bytes"
            )
            lines.extend(f"    {_op_line(delegate, op)}" for op in delegate.ops)
    return "\n".join(lines)


def _op_line(delegate: DelegateContents, op: DelegateOp) -> str:
    operands = [_tensor_text(delegate.tensors[i]) for i in op.inputs]
    if op.weight is not None:
        operands.append(f"weight {_tensor_text(delegate.tensors[op.weight])}")
    if op.bias is not None:
        operands.append(f"bias {_tensor_text(delegate.tensors[op.bias])}")
    results = ", ".join(_tensor_text(delegate.tensors[i]) for i in op.outputs)
    params = " ".join(f"{name}={value}" for name, value in op.params.items())
    if op.is_transposed:
        params += " (second matrix transposed)"
    return f"{op.kind}({', '.join(operands)}) -> {results}  {params}"


def _tensor_text(tensor: DelegateTensor) -> str:
    text = f"%{tensor.id} {tensor.dtype}{list(tensor.shape)}"
    if tensor.quantization is None:
        return text
    if tensor.scale is None:
        return f"{text} {tensor.quantization}"
    if isinstance(tensor.scale, float):
        return f"{text} scale={np.float32(tensor.scale)!s} zp={tensor.zero_point}"
    span = f"{tensor.scale.min()!s}..{tensor.scale.max()!s}" if tensor.scale.size else "none"
    return f"{text} scale={span} {tensor.quantization} zp={tensor.zero_point}"
