"""Capture with ``torch.export``, and errors that say whose fault a refusal is.

Apart from the pipeline, so that who wants a plan waits for no backend.
"""

from __future__ import annotations

import keyword
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from inspect import signature
from typing import Any, TextIO, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule

from custom_quantizer.core.calls import CallForm
from custom_quantizer.core.formats import dtype_name
from custom_quantizer.core.graph import detached_copy, distinct, what_wraps, why_lifted
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import CaptureError, InputError, first_line, where_raised

__all__ = ["DEFAULT_MAX_BATCH", "arguments_of", "capture"]

logger = logging.getLogger(__name__)

DEFAULT_MAX_BATCH = 64
"""Largest batch of a program with a dynamic one: its memory is planned ahead."""


def arguments_of(
    model: object, example_inputs: tuple[Any, ...] | Mapping[str, Any]
) -> tuple[Any, ...]:
    """Example inputs as the tuple that ``torch.export`` takes.

    Args:
        model: a module, or what was captured of one.
        example_inputs: such a tuple; or inputs by the names of the model's arguments, or by the
            keys of a dictionary that is its only one.

    Raises:
        InputError: they are neither, or the model has no arguments of these names.
    """
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs)
    if not isinstance(example_inputs, Mapping):
        raise InputError(
            f"example_inputs is a tuple of the model's inputs, got {type(example_inputs).__name__};"
            " for one tensor x write (x,)"
        )
    if isinstance(model, torch.export.ExportedProgram):
        model = _module(model)
    if isinstance(model, GraphModule):
        form = CallForm.of(model)
        values = form.sort(example_inputs)
        if isinstance(values, str):
            raise InputError(f"the example {values}")
        args, kwargs = form.arguments(values)
        return (*args, *kwargs.values())
    return _by_signature(model, example_inputs)


def _by_signature(model: Any, named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inputs by name in the order of ``forward``'s arguments."""
    parameters = list(signature(getattr(model, "forward", model)).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in positional]
    if not set(named) & set(names) and len(positional) == 1:
        return (dict(named),)
    kind, given = type(model).__name__, ", ".join(map(str, named))
    by_keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in named]
    if by_keyword:
        raise InputError(
            f"{kind}.forward takes {', '.join(by_keyword)} by keyword alone: pass "
            "torch.export.export(model.eval(), args, kwargs)"
        )
    unknown = [str(name) for name in named if name not in names]
    missing = [p.name for p in positional if p.default is p.empty and p.name not in named]
    if unknown or missing:
        what = f"no {' and no '.join(unknown)}" if unknown else f"also {', '.join(missing)}"
        raise InputError(
            f"{kind}.forward takes {', '.join(names) or 'no inputs by name'}, {what}; the inputs "
            f"are called {given}"
        )
    last = max(names.index(name) for name in named)
    return tuple(named.get(p.name, p.default) for p in positional[: last + 1])


@tools()
def capture(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    dynamic_batch: bool | int = False,
) -> tuple[GraphModule, tuple[Any, ...]]:
    """Capture a model with ``torch.export``; what is captured already passes through.

    Args:
        model: as for :func:`~custom_quantizer.app.pipeline.quantize`.
        example_inputs: one set of inputs, as :func:`arguments_of` takes it.
        dynamic_batch: as for :func:`~custom_quantizer.app.pipeline.quantize`.

    Returns:
        The captured graph, and the inputs it was captured with: a batch of one is doubled where
        the batch is dynamic, because export takes a size of one for a constant.

    Raises:
        InputError: the example is not a tuple, or the model does not run on it.
        CaptureError: ``torch.export`` refused the model.
    """
    if isinstance(model, GraphModule) and (lifted := why_lifted(model)):
        raise CaptureError(lifted)
    example = arguments_of(model, example_inputs)
    if isinstance(model, (torch.export.ExportedProgram, GraphModule)):
        if dynamic_batch:
            raise CaptureError(
                "dynamic_batch is decided when a model is captured, and this one is captured "
                "already: pass the module itself, or dynamic_shapes to torch.export.export"
            )
        return (model if isinstance(model, GraphModule) else _module(model)), example
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}; "
            "torch.export captures neither scripts nor functions"
        )
    shapes = None
    _check_values(model)
    eager = _eval_copy(model)
    if dynamic_batch:
        example = pytree.tree_map(_at_least_two, example)
        largest = DEFAULT_MAX_BATCH if dynamic_batch is True else dynamic_batch
        shapes = _by_parameter(eager, _dynamic_batch(example, largest))
    example = distinct(example)
    try:
        with torch.no_grad(), _no_graph_dumps():
            exported = torch.export.export(eager, example, dynamic_shapes=shapes)
    except Exception as error:
        raise _refused(eager, example, bool(dynamic_batch), error) from error
    return capture(exported, example)


class _NoGraphs:
    """Standard error without the graphs that are printed before an error is raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        line_end = self._dropped and text == "\n"  # print() writes it apart
        self._dropped = "\ndef forward(self, " in text
        return len(text) if self._dropped or line_end else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _no_graph_dumps() -> Iterator[None]:
    """Keep torch 2.15's ``export`` from printing half a graph, and that twice, before it raises.

    The error says what is wrong in a line. There is no option against it:
    ``torch/export/_trace.py`` prints an exception's ``partial_fx_graph`` to standard error.
    """
    if sys.stderr is None:
        yield
        return
    with redirect_stderr(cast("TextIO", _NoGraphs(sys.stderr))):
        yield


def _eval_copy(model: nn.Module) -> nn.Module:
    try:
        eager = detached_copy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and the flow does "
            "not change the module it is given; pass torch.export.export(model.eval(), example)"
        ) from error
    training = sum(module.training for module in model.modules())
    if training:
        logger.info(
            "%s has %d modules in training mode; a copy in eval mode is quantized",
            type(model).__name__,
            training,
        )
    return eager


def _check_values(model: nn.Module) -> None:
    """Refuse parameters without values, and those that a training which diverged left behind."""
    kind = type(model).__name__
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise InputError(
                f"{kind}: {name} has no shape yet; call the model on an example once, and load its "
                "weights"
            )
        if value.is_meta:
            raise InputError(
                f"{kind}: {name} is on the meta device, and has no values; call "
                "model.to_empty(device='cpu') and load its weights"
            )
        if wrapped := what_wraps(value):
            raise InputError(f"{kind}: {name} is {wrapped}; hand in the float model")
        # Infinity is a number of masks, which are not trained; NaN may lie in a buffer that is
        # written before it is read.
        statistics = name.endswith(("running_mean", "running_var"))
        checked = statistics or isinstance(value, nn.Parameter)
        if not checked or not value.is_floating_point():
            continue
        wrong = value.isnan() if not (statistics or value.requires_grad) else ~value.isfinite()
        if count := int(wrong.sum()):
            what = "NaN" if bool(value[wrong].isnan().all()) else "not finite"
            raise InputError(
                f"{kind}: {count:,} of the {value.numel():,} values of {name} are {what}; take a "
                "checkpoint from before the training diverged"
            )


def _module(program: torch.export.ExportedProgram) -> GraphModule:
    """What ``module()`` returns, whose code names parameters by their paths."""
    try:
        return program.module()
    except SyntaxError as error:
        paths = (*program.state_dict, *program.constants)
        words = {part for path in paths for part in path.split(".") if keyword.iskeyword(part)}
        raise CaptureError(
            f"PyTorch cannot write code for the graph ({first_line(error)}): "
            f"{', '.join(sorted(words)) or 'the name of a module or parameter'} is a word of "
            "Python's own; give the module or parameter another name"
        ) from error


def _at_least_two(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1:
        return torch.cat((value, value))
    return value


def _dynamic_batch(example: tuple[Any, ...], largest: int) -> Any:
    """One symbol for the first dimension of every input."""
    sizes = {len(v) for v in pytree.tree_leaves(example) if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1:
        raise InputError(
            "dynamic_batch needs inputs that share their first dimension; the example's have "
            f"{', '.join(map(str, sorted(sizes))) or 'none'}"
        )
    if not min(sizes):
        raise InputError("the example is an empty batch; dynamic_batch needs one sample at least")
    if not max(sizes) <= largest:
        raise InputError(
            f"the example is a batch of {max(sizes)}, more than the largest batch {largest} of "
            "dynamic_batch; two is the least it can be"
        )
    batch = torch.export.Dim("batch", min=1, max=largest)

    def shape(value: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(value, Tensor) and value.dim() else None

    return pytree.tree_map(shape, example)


def _by_parameter(eager: nn.Module, shapes: tuple[Any, ...]) -> Any:
    """Shapes of inputs by the names of ``forward``'s parameters: ``*args`` is one of them."""
    try:
        return dict(signature(eager.forward).bind(*shapes).arguments)
    except (TypeError, ValueError):  # not what forward takes, as the error of export will say
        return shapes


def _refused(
    eager: nn.Module, example: tuple[Any, ...], dynamic: bool, error: Exception
) -> CaptureError | InputError:
    """Say whether the example, the batch or the model is at fault."""
    name = type(eager).__name__
    try:
        with torch.no_grad():
            eager(*example)
    except Exception as own:
        return InputError(
            f"{name} does not run on the example inputs ({_shapes(example)}): {first_line(own)}"
            f"{where_raised(own)}; {_half_hint(eager)}pass what its forward takes, batch first"
            f"{_layout_hint(example)}"
        )
    text = f"torch.export cannot capture {name}: {first_line(error)}; "
    if dynamic and ("specialized" in str(error) or "Constraints violated" in str(error)):
        return CaptureError(
            text + "its code fixes the size of the batch, as x.view(8, -1) does; write "
            "x.flatten(1), or leave dynamic_batch off"
        )
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        return CaptureError(
            text + "it branches on the value of a tensor; use torch.where or torch.cond, or "
            "capture the part that does not"
        )
    return CaptureError(
        text + "make torch.export.export(model.eval(), example_inputs) work first; "
        "torch.export.draft_export lists everything in the way"
    )


def _half_hint(eager: nn.Module) -> str:
    """What a model in another precision needs before anything else."""
    other = {p.dtype for p in eager.parameters() if p.is_floating_point()} - {torch.float32}
    if not other:
        return ""
    names = ", ".join(sorted(dtype_name(dtype) for dtype in other))
    return f"its parameters are {names}: convert it with model.float(); "


def _layout_hint(example: tuple[Any, ...]) -> str:
    """What images are most often given as instead."""
    for value in pytree.tree_leaves(example):
        shape = list(value.shape) if isinstance(value, Tensor) else []
        if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4):
            return f"; {shape} looks channels-last: images are [N, C, H, W], x.permute(0, 3, 1, 2)"
        if len(shape) == 3 and shape[0] in (1, 3, 4):
            return f"; {shape} has no batch: one image is {[1, *shape]}"
    return ""


def _shapes(example: tuple[Any, ...]) -> str:
    return ", ".join(
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for value in pytree.tree_leaves(example)
    )
