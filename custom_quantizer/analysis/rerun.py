"""Running a graph once more without leaving a trace: on other grids, in float64, tensor by tensor.

Observers record nothing, buffers that the graph writes keep what they hold, and random numbers are
the same in every run.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

from custom_quantizer.calibration.channel_factors import ChannelFactors
from custom_quantizer.calibration.observers import ActivationObserver, WeightObserver
from custom_quantizer.calibration.run import GraphInputs
from custom_quantizer.core.arithmetic import along
from custom_quantizer.core.checkpoint import fingerprint
from custom_quantizer.core.graph import (
    DEQUANTIZE_PER_CHANNEL,
    detached_copy,
    distinct,
    is_dequantize,
    size_bounds,
    state_of,
    tensor_meta,
)
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import CaptureError, first_line

__all__ = ["Rerun", "capture_like", "copied", "float_fingerprint", "is_float", "rerun_in_float64"]

logger = logging.getLogger(__name__)

aten = torch.ops.aten

_SKIPPED = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
    }
)


def copied(value: Any) -> Any:
    """A tensor of its own; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def is_float(value: Any) -> bool:
    """Whether a value is a tensor of real numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


class Rerun(Interpreter):
    """Runs a graph without touching it: observers see nothing, and state stays as it is.

    Args:
        model: captured, prepared or converted.
        state: the captured graph whose values buffers that the graph writes begin with; ``model``
            itself by default.
        dtype: for all floating-point tensors; ``None``: as they are.
        rounding: put what is observed on its grid.
        wanted: nodes whose values are kept in ``seen``, by name; ``None``: no one's.
        weights: weights as they are rounded or dequantized, by node. Runs of the same graph in the
            same way that share it compute each of them once; a float copy of all weights.
    """

    def __init__(
        self,
        model: GraphModule,
        *,
        state: GraphModule | None = None,
        dtype: torch.dtype | None = None,
        rounding: bool = False,
        wanted: Callable[[Node], bool] | None = None,
        weights: dict[Node, Any] | None = None,
    ) -> None:
        super().__init__(model)
        self._weights = weights
        self._dtype, self._rounding, self._wanted = dtype, rounding, wanted
        self.seen: dict[str, Tensor] = {}
        origin = state or model
        self._state = {
            str(node.target): self._cast(_attribute(origin, model, str(node.target)).clone())
            for node in state_of(model.graph)
            if node.op == "get_attr"
        }

    def outputs(self, values: list[Any]) -> list[Any]:
        """The flat outputs for one value per placeholder."""
        given = [self._cast(copied(value)) for value in values]
        # Random numbers are the same in every run, and nobody else draws meanwhile.
        with torch.no_grad(), tools():
            torch.manual_seed(0)
            return pytree.tree_leaves(self.run(*given, enable_io_processing=False))

    def _cast(self, value: Any) -> Any:
        if self._dtype is None or not is_float(value):
            return value
        return value.to(self._dtype)

    def run_node(self, n: Node) -> Any:
        """Run one node of the graph; assertions are left out."""
        if n.op == "call_function" and n.target in _SKIPPED:
            return None
        if self._weights is None or not self._is_weight(n):
            result = super().run_node(n)
        elif n in self._weights:
            result = self._weights[n]
        else:
            result = self._weights[n] = super().run_node(n)
        if self._wanted is not None and isinstance(result, Tensor) and self._wanted(n):
            self.seen[n.name] = result.detach().clone()
        return result

    def _is_weight(self, node: Node) -> bool:
        """Whether a node observes or dequantizes what no input and no run changes."""
        if node.op != "call_module" and not is_dequantize(node):
            return False
        sources = node.all_input_nodes
        return bool(sources) and all(
            source.op == "get_attr" and str(source.target) not in self._state for source in sources
        )

    def fetch_attr(self, target: str) -> Any:
        """A constant or a buffer, in the dtype of this run."""
        if target in self._state:
            return self._state[target]
        return self._cast(super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an op, in the dtype of this run."""
        if self._dtype is not None:
            # ``dtype=torch.float32`` in the graph stands for the dtype of the model.
            args, kwargs = pytree.tree_map(
                lambda v: self._dtype if v is torch.float32 else v, (args, kwargs)
            )
        if target is aten.conv2d.default:
            args = (args[0], ChannelFactors.of(args[1]), *args[2:])
        if target is DEQUANTIZE_PER_CHANNEL:
            quick = _dequantized(*args, **kwargs)
            if quick is not None:
                return quick
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module; observers and fake quantizers pass their input on."""
        module = self.fetch_attr(str(target))
        if isinstance(module, (ObserverBase, FakeQuantizeBase)):
            return _on_grid(module, args[0]) if self._rounding else args[0]
        if str(target) == "_guards_fn":
            return None
        return super().call_module(target, args, kwargs)


def _dequantized(
    stored: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    *_range: object,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """What ``dequantize_per_channel`` returns, bit for bit; ``None`` where it is to be called.

    That (PyTorch 2.15) makes int64 of the weights to subtract zeros, which takes 20 times as long.
    """
    plain = scales.dtype is torch.float32 and out_dtype in (None, torch.float32)
    if not plain or (zero_points is not None and bool(zero_points.any())):
        return None
    return stored.to(torch.float32).mul_(along(scales, axis, stored))


def _attribute(model: GraphModule, fallback: GraphModule, target: str) -> Tensor:
    try:
        return cast(Tensor, operator.attrgetter(target)(model))
    except AttributeError:
        return cast(Tensor, operator.attrgetter(target)(fallback))


def _on_grid(observer: nn.Module, x: Tensor) -> Tensor:
    """``x`` rounded to the scale that an observer found, without the ends of the range."""
    scale: Tensor | float
    if isinstance(observer, WeightObserver):
        found = observer.scale(x)
        if observer.scheme.group_size is not None:
            grouped = x.reshape(len(x), -1, observer.scheme.group_size)
            return _rounded(grouped, found.unsqueeze(-1)).reshape(x.shape)
        scale = along(found, observer.ch_axis, x)
    elif not isinstance(observer, ActivationObserver) or x.numel() == 0:
        return x  # a bias is rounded far more finely than anything else
    elif observer.is_dynamic:
        return observer.round_at_run_time(x)
    elif int(observer.count) == 0:
        return x
    else:
        scale = cast(float, observer.qparams().scale)
    return _rounded(x, scale)


def _rounded(x: Tensor, scale: Tensor | float) -> Tensor:
    """``x`` on the grid."""
    return (x / scale).round_().mul_(scale).to(x.dtype)


def float_fingerprint(model: GraphModule) -> str:
    """SHA-256 of what a graph computes where observers hand on their input: ops and constants.

    Graphs with equal ones have equal outputs for equal inputs. Names of nodes do not count.
    """
    names: dict[Node, str] = {}
    lines: list[str] = []
    constants: list[Tensor] = []
    for node in model.graph.nodes:
        what: object = node.target
        if node.op in ("get_attr", "call_module"):
            what = operator.attrgetter(str(node.target))(model)
        if isinstance(what, (ObserverBase, FakeQuantizeBase)):
            names[node] = names[node.args[0]]
            continue
        if isinstance(what, Tensor):
            constants.append(what)
            what = "constant"
        elif isinstance(what, GraphModule):  # of a loop or a branch
            what = float_fingerprint(what)
        names[node] = f"%{len(names)}"
        given = map_arg((node.args, node.kwargs), names.__getitem__)
        lines.append(f"{node.op} {what} {given}")
    return fingerprint(constants, "\n".join(lines))


def rerun_in_float64(
    captured: GraphModule, values: list[Any], before: Iterable[list[Any]] = ()
) -> list[Any] | None:
    """Outputs of a captured graph in float64; ``None`` where an op does not know that dtype.

    Args:
        captured: the graph.
        values: one for each placeholder.
        before: those of calls before, which leave their state to this one.
    """
    try:
        rerun = Rerun(captured, dtype=torch.float64)
        for earlier in before:
            rerun.outputs(earlier)
        return rerun.outputs(values)
    except Exception as error:  # whatever a kernel raises
        logger.debug("the float model does not run in float64: %s", error)
        return None


@tools()
def capture_like(
    model: nn.Module | torch.export.ExportedProgram, graph: GraphModule, values: list[Any]
) -> GraphModule:
    """The float model as a captured graph of its own, with the inputs that ``graph`` has.

    Args:
        model: a module, an ``ExportedProgram`` or a captured graph; not changed.
        graph: prepared or converted from it.
        values: one set of inputs, by placeholder.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model.
    """
    if isinstance(model, torch.export.ExportedProgram):
        return model.module()
    if isinstance(model, GraphModule):
        return detached_copy(model)
    inputs = GraphInputs.of(graph)
    args, kwargs = inputs.arguments(distinct(values))
    sizes: dict[str, Any] = {}
    dynamic = [
        _dynamic_sizes(node, sizes) for node in graph.graph.nodes if node.op == "placeholder"
    ]
    dynamic_args, dynamic_kwargs = inputs.arguments(dynamic)
    # Export numbers the shapes of positional and keyword arguments together.
    shapes = (*dynamic_args, *dynamic_kwargs.values()) if any(dynamic) else None
    try:
        program = torch.export.export(
            detached_copy(model).eval(), args, kwargs, dynamic_shapes=shapes
        )
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {first_line(error)}; pass the "
            "captured graph that was quantized"
        ) from error
    return program.module()


def _dynamic_sizes(node: Node, known: dict[str, Any]) -> dict[int, Any]:
    """The sizes of an input that vary, as export was told; equal symbols are one ``Dim``."""
    meta = tensor_meta(node)
    dynamic = {}
    for index, size in enumerate(() if meta is None else meta.shape):
        low, high = size_bounds(size)
        if low == high:
            continue
        name = str(size)
        if name not in known:
            # A size that follows from others has no bounds of its own.
            plain = name.isidentifier()
            known[name] = Dim(name, min=low, max=high) if plain else Dim.AUTO
        dynamic[index] = known[name]
    return dynamic
