"""Reading fx graphs: where a node comes from, which constant it is, which integers surround it.

Nothing here knows an op family and nothing here changes a graph, except :func:`add_constant`.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.utils._pytree as pytree
import torchao.quantization.quant_primitives  # noqa: F401  registers torchao::dequantize_affine
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers quantized_decomposed.*
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from custom_quantizer.core.arithmetic import QParams
from custom_quantizer.core.memory import overwritten_by, reached, viewed_by, written_inputs
from custom_quantizer.errors import ConversionError, InputError

__all__ = [
    "add_constant",
    "are_static",
    "check_inputs",
    "constant_of",
    "describe",
    "detached_copy",
    "distinct",
    "dynamic_sizes",
    "effective_users",
    "expression_bounds",
    "fake_constant",
    "has_zero_points",
    "is_complex",
    "is_constant",
    "is_dequantize",
    "is_empty",
    "is_float32",
    "is_number",
    "is_observer",
    "is_parameter",
    "is_quantize",
    "is_run_time_quantization",
    "is_same_shape",
    "is_sized_by_data",
    "is_static",
    "is_whole",
    "module_path",
    "module_stack",
    "qparams_of",
    "reads_sizes",
    "recorded_value",
    "reduced_dims",
    "set_argument",
    "set_state",
    "shape_of",
    "size_bounds",
    "some_state",
    "source_of",
    "state_buffers",
    "state_kept",
    "state_of",
    "tensor_meta",
    "view_sizes",
    "what_wraps",
    "why_lifted",
]

M = TypeVar("M", bound=torch.nn.Module)

_q = torch.ops.quantized_decomposed

FOLDED_KEY = "custom_quantizer_folded"
"""Marks, in ``meta``, a call that only reads parameters and becomes a constant at conversion."""

RESCALED_KEY = "custom_quantizer_rescaled"
"""In the ``meta`` of a prepared graph: algorithms that changed the numbers of the float network."""

ADOPTED_KEY = "custom_quantizer_adopted"
"""In the ``meta`` of a graph to be trained: whether it starts from another graph's integers."""

FLOAT_KEY = "custom_quantizer_all_in_float"
"""Key in the ``meta`` of a model: a quantizer found nothing to quantize, and has said so."""

STATE_KEY = "custom_quantizer_state"
"""In the ``meta`` of a prepared or converted graph: what buffers it writes held at capture."""

DEQUANTIZE_PER_TENSOR = _q.dequantize_per_tensor.default
DEQUANTIZE_PER_CHANNEL = _q.dequantize_per_channel.default
QUANTIZE_PER_TENSOR = _q.quantize_per_tensor.default
QUANTIZE_PER_CHANNEL = _q.quantize_per_channel.default

CHOOSE_QPARAMS = _q.choose_qparams.tensor
QUANTIZE_DYNAMIC = _q.quantize_per_tensor.tensor
DEQUANTIZE_DYNAMIC = _q.dequantize_per_tensor.tensor
DEQUANTIZE_GROUPED = torch.ops.torchao.dequantize_affine.default

_QUANTIZE = (QUANTIZE_PER_TENSOR, QUANTIZE_PER_CHANNEL, QUANTIZE_DYNAMIC)
_DEQUANTIZE = (DEQUANTIZE_PER_TENSOR, DEQUANTIZE_PER_CHANNEL, DEQUANTIZE_DYNAMIC)

ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_size.int,
)
"""Checks and size queries: they compute nothing of the network."""


def is_quantize(node: object) -> bool:
    """Whether ``node`` turns a float tensor into integers."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in _QUANTIZE


def is_dequantize(node: object) -> bool:
    """Whether ``node`` turns integers into a float tensor."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in _DEQUANTIZE


def is_static(node: Node) -> bool:
    """Whether a quantize or dequantize node has parameters that are known before it runs."""
    return node.target in (QUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_CHANNEL) or isinstance(
        node.args[1], float
    )


def what_wraps(value: torch.Tensor) -> str:
    """What a tensor is that wraps other tensors, in words; empty for any other."""
    if not hasattr(value, "__tensor_flatten__"):
        return ""
    kind = type(value).__name__
    return f"a {kind}, which wraps other tensors, as weights do that torchao.quantize_ made"


def has_zero_points(model: torch.nn.Module, node: Node) -> bool:
    """Whether a quantize or dequantize node has a zero point other than 0 for any channel.

    :class:`QParams` has one for all channels, and nothing here makes others; torchao's quantizers
    of embeddings and of affine weights do.
    """
    if node.target not in (QUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_CHANNEL):
        return False
    zero_points = node.args[2]
    return (
        isinstance(zero_points, Node)
        and is_constant(zero_points)
        and bool(constant_of(model, zero_points).any())
    )


def is_run_time_quantization(node: Node) -> bool:
    """Whether a node helps to choose scales at run time, or dequantizes weights in groups."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and is_run_time_quantization(source)
    return node.target in (CHOOSE_QPARAMS, DEQUANTIZE_GROUPED)


def module_stack(node: Node) -> list[tuple[str, str]]:
    """``(module path, fully qualified type)`` of the modules around ``node``, outermost first."""
    stack = []
    for path, kind in (node.meta.get("nn_module_stack") or {}).values():
        name = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
        # Export numbers the second and later calls of one module: "conv@1".
        plain = re.sub(r"@\d+", "", str(path))
        stack.append((plain.removeprefix("L['self'].").removeprefix("L['self']"), name))
    return stack


def module_path(node: Node) -> str:
    """Path of the innermost module that ``node`` was captured from; ``""`` for the model itself."""
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def describe(node: Node) -> str:
    """``node name (module path)``, as every message names a node."""
    path = module_path(node)
    return f"{node.name} ({path})" if path else node.name


def tensor_meta(node: Node) -> torch.Tensor | None:
    """The fake tensor that capture recorded for ``node``, if its value is one tensor.

    ``prepare_pt2e`` and ``convert_pt2e`` record none for the observers and dequantize nodes they
    make: these have the shape of what is quantized. Nor do they for the constants that are folded:
    these are tensors of the module.
    """
    value, last = node.meta.get("val"), node
    while value is None and (is_dequantize(last) or is_quantize(last) or is_observer(last)):
        last = cast(Node, last.args[0])
        value = last.meta.get("val")
    if value is None and last.op == "get_attr":
        value = _shape_of_constant(last, torch.float32 if is_dequantize(node) else None)
    if not isinstance(value, torch.Tensor):
        return None
    if last is not node and is_dequantize(node) and not value.is_floating_point():
        value = value.to(torch.float32)  # integers that no node quantized: a table's, an input's
    return value


def is_observer(node: Node) -> bool:
    """Whether a node is the call of what ``prepare_pt2e`` inserted."""
    return node.op == "call_module" and str(node.target).startswith("activation_post_process")


def is_float32(node: object) -> bool:
    """Whether a node gives one float32 tensor."""
    meta = tensor_meta(node) if isinstance(node, Node) else None
    return meta is not None and meta.dtype == torch.float32


def is_whole(node: object) -> bool:
    """Whether a node gives one tensor of integers or booleans."""
    meta = tensor_meta(node) if isinstance(node, Node) else None
    return meta is not None and not (meta.is_floating_point() or meta.is_complex())


def is_complex(node: Node) -> bool:
    """Whether a node gives complex numbers: a tensor, or a list that has some."""
    values = pytree.tree_leaves(node.meta.get("val", tensor_meta(node)))
    return any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)


def is_empty(node: Node) -> bool:
    """Whether the tensor of ``node`` has no elements."""
    meta = tensor_meta(node)
    return meta is not None and any(isinstance(size, int) and size == 0 for size in meta.shape)


def is_sized_by_data(node: Node) -> bool:
    """Whether a size of a tensor is known only once it is computed, as of ``nonzero``.

    Such a tensor may turn out to have no elements.
    """
    meta = tensor_meta(node)
    sizes = () if meta is None else tuple(meta.shape)
    return not all(type(size) is int for size in sizes) and has_free_unbacked_symbols(sizes)


def _shape_of_constant(node: Node, dtype: torch.dtype | None) -> torch.Tensor | None:
    """A tensor without memory like the one that a ``get_attr`` node reads.

    It computes with those that capture recorded in the graph.
    """
    try:
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    except AttributeError:
        return None
    if not isinstance(value, torch.Tensor):
        return None
    mode = _fake_mode_of(node)
    if mode is None:
        return torch.empty(value.shape, dtype=dtype or value.dtype, device="meta")
    with mode:
        return torch.empty(value.shape, dtype=dtype or value.dtype, device=value.device)


def check_inputs(values: Sequence[Any], metas: Sequence[torch.Tensor | None]) -> None:
    """Raise ``InputError`` unless inputs have the recorded dtypes and shapes.

    Dynamic sizes may be any, but those that capture knows as one are one, and what it computes from
    them is that: kernels read as far as one of them says.
    """
    sizes: list[tuple[str, int, Any]] = []
    for i, (value, meta) in enumerate(zip(values, metas, strict=True)):
        _check_input(i, value, meta)
        if meta is not None:
            shape: Iterable[tuple[Any, int]] = zip(meta.shape, value.shape, strict=True)
            sizes += [
                (f"dim {dim} of input {i}", given, wanted.node.expr)
                for dim, (wanted, given) in enumerate(shape)
                if isinstance(wanted, torch.SymInt)
            ]
    known: dict[Any, tuple[int, str]] = {}
    for where, given, expression in sizes:
        if expression.is_Symbol:
            size, first = known.setdefault(expression, (given, where))
            if size != given:
                raise InputError(
                    f"{where} is {given}, and {first} is {size}: the model was captured with one "
                    f"size ({expression}) for both"
                )
    found = {symbol: size for symbol, (size, _) in known.items()}
    for where, given, expression in sizes:
        size = expression if expression.is_Symbol else expression.subs(found)
        if size.is_Integer and int(size) != given:
            symbols = sorted(expression.free_symbols & found.keys(), key=str)
            of = ", ".join(f"{symbol} = {found[symbol]}" for symbol in symbols)
            raise InputError(
                f"{where} is {given}, and has to be {size}: the model was captured with a size of "
                f"{expression} there, where {of}"
            )


def _check_input(index: int, value: Any, meta: torch.Tensor | None) -> None:
    if meta is None:
        return
    if not isinstance(value, torch.Tensor):
        raise InputError(f"input {index} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_meta:
        kind = "has no values (device meta)" if value.is_meta else f"is {value.layout}"
        raise InputError(f"input {index} must be a dense tensor, and {kind}")
    if value.dtype != meta.dtype:
        raise InputError(
            f"input {index} must be {meta.dtype}, got {value.dtype}; convert it with "
            f".to({meta.dtype})"
        )
    wanted, given = tuple(meta.shape), tuple(value.shape)
    if len(wanted) != len(given) or not _fit(wanted, given):
        shown = ", ".join(str(w) if isinstance(w, int) else "*" for w in wanted)
        hint = shape_hint(wanted, given)
        raise InputError(f"input {index} must have shape ({shown}), got {given}{hint}")


def shape_hint(wanted: Sequence[object], given: Sequence[int]) -> str:
    """What is wrong with a shape, where it is one of the usual mistakes; dynamic sizes fit all."""
    if len(given) == len(wanted) - 1 and _fit(wanted[1:], given):
        return "; it has no batch dimension: x.unsqueeze(0)"
    if len(given) != len(wanted) or len(given) < 2:
        return ""
    if len(given) > 2 and _fit(wanted, (given[0], given[-1], *given[1:-1])):
        return "; it looks channels-last: x.movedim(-1, 1)"
    if _fit(wanted[1:], given[1:]):
        return "; the size of its batch is fixed: capture with dynamic_batch, or pass such batches"
    if len(given) == 4 and _fit(wanted[1:2], given[1:2]):
        return "; images have to be of one size: resize them, as in Preprocess(resize) or --resize"
    return ""


def _fit(wanted: Sequence[object], given: Sequence[int]) -> bool:
    return all(not isinstance(w, int) or w == g for w, g in zip(wanted, given, strict=True))


def distinct(inputs: Any) -> Any:
    """The same inputs, with a copy wherever a tensor comes again.

    ``torch.export`` (2.15) takes one tensor that is given twice for one input: the graph of
    ``f(x, x)`` reads its last placeholder alone.
    """
    seen: set[int] = set()

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        again = id(value) in seen
        seen.add(id(value))
        return value.detach().clone() if again else value

    return pytree.tree_map(own, inputs)


def shape_of(node: Node) -> tuple[int, ...]:
    """Shape recorded at capture; sizes that depend on inputs stay symbolic.

    Raises:
        ConversionError: nothing was recorded.
    """
    value = tensor_meta(node)
    if value is None:
        raise _not_recorded(node)
    return tuple(map(_as_number, value.shape))


def are_static(sizes: Iterable[Any]) -> bool:
    """Whether all sizes are known at capture."""
    return all(isinstance(size, int) for size in sizes)


def dynamic_sizes(sizes: Iterable[Any]) -> int:
    """How many sizes depend on inputs."""
    return sum(not isinstance(size, int) for size in sizes)


def recorded_value(node: Node) -> Any:
    """What capture recorded for ``node``: a fake tensor, a size, or several of them.

    Raises:
        ConversionError: nothing was recorded.
    """
    value = node.meta.get("val")
    value = tensor_meta(node) if value is None else value
    if value is None:
        raise _not_recorded(node)
    return value


def _not_recorded(node: Node) -> ConversionError:
    return ConversionError(
        f"{describe(node)} carries no shape; hand in the graph as torch.export made it"
    )


def _as_number(size: Any) -> Any:
    """A size; that of ``x.view(-1, n // 4, ...)`` may be a number without being one."""
    if isinstance(size, int) or not size.node.expr.is_Integer:
        return size
    return int(size.node.expr)


def is_same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are the same for all inputs.

    ``==`` of a dynamic size is about the example that was captured, and fixes the size to it.
    """
    return len(a) == len(b) and all(_written(x) == _written(y) for x, y in zip(a, b, strict=True))


def _written(size: Any) -> Any:
    """A size as a number, or as an expression over symbols, of which ``==`` compares the form."""
    return size if isinstance(size, int) else size.node.expr


def view_sizes(shape: Sequence[Any]) -> list[int]:
    """Sizes for a reshape to ``shape``: -1 in the place of a symbolic one."""
    return [size if isinstance(size, int) else -1 for size in shape]


def size_bounds(size: Any) -> tuple[int, int | None]:
    """Smallest and largest value of an int or SymInt; ``None``: capture recorded no upper bound.

    Export never traces a dynamic size below 2, so a recorded lower bound of 2 means 1.
    """
    if isinstance(size, int):
        return size, size
    return expression_bounds(size, size.node.expr)


def expression_bounds(size: torch.SymInt, expression: Any) -> tuple[int, int | None]:
    """As :func:`size_bounds`, of an expression over the symbols of ``size``."""
    env = size.node.shape_env
    if env is None:
        return 1, None
    bounds = env.bound_sympy(expression)
    # The infinities of sympy and of torch are no Integer.
    low = int(bounds.lower) if bounds.lower.is_Integer else 1
    high = int(bounds.upper) if bounds.upper.is_Integer else None
    if high is not None and high > 1 << 24:  # sys.maxsize and its like
        high = None
    return (1 if low <= 2 else low), high


def is_negative(number: torch.SymInt) -> bool | None:
    """Whether a number is below 0 for all sizes; ``None``: for some, or that cannot be told."""
    env = number.node.shape_env
    if env is None:
        return None
    expression = number.node.expr
    ranges = {symbol: env.var_to_range.get(symbol) for symbol in expression.free_symbols}
    if any(known is None for known in ranges.values()):
        return None
    bounds = bound_sympy(expression, {s: _from_one(known) for s, known in ranges.items()})
    if bounds.upper < 0:
        return True
    return False if bounds.lower >= 0 else None


def _from_one(known: Any) -> Any:
    """Sizes that are recorded: from 2 on means from 1 on, see :func:`size_bounds`."""
    return ValueRanges(1, known.upper) if known.lower == 2 else known


def is_number(node: Node) -> bool:
    """Whether a node is a number that the graph computes: a dynamic size, or made of one."""
    numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(node.meta.get("val"), numbers)


def reads_sizes(node: Node) -> bool:
    """Whether an argument is a number that the graph computes."""
    return any(map(is_number, node.all_input_nodes))


def effective_users(node: Node) -> list[Node]:
    """Users of the value; checks and size queries do not count."""
    return [user for user in node.users if user.target not in ASSERTIONS]


def state_of(graph: torch.fx.Graph) -> list[Node]:
    """The inputs and constants that some call of the graph writes into, views of them included."""
    reads = {
        read
        for node in graph.nodes
        for written in written_inputs(node)
        for read in reached(written, _same_memory)
        if read.op in ("get_attr", "placeholder")
    }
    return [node for node in graph.nodes if node in reads]


def some_state(graph: torch.fx.Graph) -> str:
    """Names of the first three of :func:`state_of`, for messages; empty where there are none."""
    return ", ".join(str(node.target) for node in state_of(graph)[:3])


def _same_memory(node: Node) -> list[Node]:
    """The tensors of which the result of ``node`` may be a view, or which it is."""
    if node.op == "call_module":  # an observer of a prepared graph hands on what it sees
        return [source for source in node.args[:1] if isinstance(source, Node)]
    return [*viewed_by(node), *written_inputs(node)]


def state_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a call of ``model`` may change, by name.

    Of a captured graph those that its calls write; of any other module, all.
    """
    if not isinstance(model, GraphModule):
        return dict(model.named_buffers())
    written = dict.fromkeys(str(n.target) for n in state_of(model.graph) if n.op == "get_attr")
    return {name: operator.attrgetter(name)(model) for name in written}


@contextmanager
def state_kept(model: torch.nn.Module) -> Iterator[None]:
    """Run ``model`` in this block, and its buffers hold afterwards what they held before."""
    before = {name: value.detach().clone() for name, value in state_buffers(model).items()}
    try:
        yield
    finally:
        set_state(model, before)


def set_state(model: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Write ``values``, by name, into those buffers that a call of ``model`` may change."""
    buffers = state_buffers(model)
    with torch.no_grad():
        for name, value in values.items():
            if name in buffers:
                if not buffers[name].is_leaf:  # gradients were recorded; nobody needs them now
                    buffers[name].detach_()
                buffers[name].copy_(value)


def detached_copy(model: M, *, share_constants: bool = False) -> M:
    """A deep copy; tensors that were computed while gradients were recorded lose their history.

    Such are buffers that were written, and what a forward keeps of its parameters (weight norms).
    PyTorch copies none of them.

    Args:
        model: a graph or another module.
        share_constants: let both hold the same tensors, but for buffers that calls write: for who
            puts other constants in their place instead of writing into them.
    """
    memo: dict[int, Any] = {}
    if share_constants:
        written = {id(value) for value in state_buffers(model).values()}
        held = (*model.parameters(), *model.buffers())
        memo = {id(value): value for value in held if id(value) not in written}
    for module in model.modules():
        for value in pytree.tree_leaves(vars(module)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def is_constant(node: object) -> bool:
    """Whether ``node`` reads a parameter, buffer or attribute of the module that no call writes.

    So does a call that is folded into one at conversion (batch norms in training).
    """
    if not isinstance(node, Node):
        return False
    return (node.op == "get_attr" and overwritten_by(node) is None) or FOLDED_KEY in node.meta


_LIFTED = ("p_", "b_", "c_")
"""How ``torch.export`` calls inputs that are parameters, buffers and constants."""


def why_lifted(model: GraphModule) -> str:
    """What is wrong with a graph whose inputs are its weights; empty for any other.

    ``ExportedProgram.graph_module`` is such a graph: of ``torch.export``, without a record of how
    a call nests, which only what ``ExportedProgram.module()`` returns has.
    """
    nested = getattr(model.graph._codegen, "pytree_info", None) is not None
    if nested or "inline_constraints" not in model.meta:
        return ""
    inputs = [node.name for node in model.graph.nodes if node.op == "placeholder"]
    lifted = [name for name in inputs if name.startswith(_LIFTED)]
    if not lifted:
        return ""
    shown = ", ".join(lifted[:3]) + ", ..." * (len(lifted) > 3)
    return (
        f"weights are inputs of the graph ({shown}), as in ExportedProgram.graph_module, so that "
        "it holds no numbers; hand in exported.module() instead of exported.graph_module"
    )


def is_parameter(model: torch.nn.Module, node: Node) -> bool:
    """Whether ``node`` reads what training changes."""
    if node.op != "get_attr":
        return False
    return isinstance(operator.attrgetter(str(node.target))(model), torch.nn.Parameter)


def constant_of(model: torch.nn.Module, node: Node) -> torch.Tensor:
    """The tensor a ``get_attr`` node reads.

    Raises:
        ConversionError: the node reads no tensor.
    """
    try:
        value = operator.attrgetter(str(node.target))(model)
    except AttributeError:
        value = None
    if node.op != "get_attr" or not isinstance(value, torch.Tensor):
        raise ConversionError(f"{describe(node)} is not a constant tensor of the module")
    return value.detach()


def qparams_of(model: torch.nn.Module, node: Node) -> QParams:
    """Quantization parameters of a static quantize or dequantize node.

    Raises:
        ConversionError: the node is neither, or its scale is only known at run time; or it has a
            zero point for each channel (:func:`has_zero_points`).
    """
    if has_zero_points(model, node):
        raise ConversionError(
            f"{describe(node)} has a zero point for each channel, which another quantizer chose; "
            "integers of this package have none"
        )
    args = node.args
    if node.target in (QUANTIZE_PER_TENSOR, DEQUANTIZE_PER_TENSOR):
        _, scale, zero_point, quant_min, quant_max = args[:5]
        return QParams(
            scale=float(cast(float, scale)),
            zero_point=int(cast(int, zero_point)),
            quant_min=int(cast(int, quant_min)),
            quant_max=int(cast(int, quant_max)),
        )
    if node.target in (QUANTIZE_PER_CHANNEL, DEQUANTIZE_PER_CHANNEL):
        _, scale, _, axis, quant_min, quant_max = args[:6]
        return QParams(
            scale=constant_of(model, cast(Node, scale)).to(torch.float32),
            zero_point=0,
            quant_min=int(cast(int, quant_min)),
            quant_max=int(cast(int, quant_max)),
            axis=int(cast(int, axis)),
        )
    raise ConversionError(f"{describe(node)} has no static quantization parameters")


def source_of(node: Node) -> Node:
    """The node behind a chain of quantize and dequantize nodes."""
    while is_quantize(node) or is_dequantize(node):
        node = cast(Node, node.args[0])
    return node


def tensor_args(node: Node) -> Iterator[Node]:
    """The node's inputs that are tensors, in argument order, each once."""
    # Control flow also reads the graphs it runs.
    runs = isinstance(node.target, torch._ops.HigherOrderOperator)
    for arg in node.all_input_nodes:
        if tensor_meta(arg) is not None or (is_constant(arg) and not runs):
            yield arg


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A positional-or-keyword argument of an aten call, with the schema's default.

    Args:
        node: the call.
        index: position in the aten schema.
        name: name in the aten schema.
        default: value when the call leaves it out.
    """
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def set_argument(node: Node, index: int, name: str, value: Any) -> None:
    """Change what :func:`argument` gives."""
    if name in node.kwargs or len(node.args) < index:
        node.update_kwarg(name, value)
    else:
        node.args = (*node.args[:index], value, *node.args[index + 1 :])


def reduced_dims(given: int | Sequence[int] | None, rank: int) -> list[int]:
    """The dims that a reduction names, in order, counted from the front; all, if it names none.

    Of a number, which has no dims, PyTorch takes 0 and -1 for names of one.
    """
    named = [given] if isinstance(given, int) else given or range(rank)
    return sorted({int(dim) % rank for dim in named if rank})


def add_constant(
    model: GraphModule, name: str, value: torch.Tensor, before: Node, made_of: Node | None = None
) -> Node:
    """Register ``value`` as a buffer under a free name and read it just before ``before``.

    Args:
        model: the graph, in place.
        name: of the buffer, which gets a number if there is one.
        value: what it holds.
        before: the node that reads it.
        made_of: the constant in whose place it is, which may be tagged with the name of a data
            file; so is the new one then.
    """
    name = name.replace(".", "_")
    free, count = name, 0
    while hasattr(model, free):
        count += 1
        free = f"{name}_{count}"
    model.register_buffer(free, value.detach().clone(memory_format=torch.contiguous_format))
    constant = read_constant(model, free, before)
    if made_of is not None and "custom" in made_of.meta:
        constant.meta["custom"] = made_of.meta["custom"]
    return constant


def read_constant(model: GraphModule, name: str, before: Node) -> Node:
    """Read the parameter or buffer ``name`` just before ``before``."""
    value = operator.attrgetter(name)(model)
    with model.graph.inserting_before(before):
        node = model.graph.get_attr(name)
    fake_mode = _fake_mode_of(before)
    if fake_mode is not None:
        node.meta["val"] = fake_constant(value, fake_mode)
    return node


def fake_constant(value: torch.Tensor, mode: Any) -> FakeTensor:
    """The fake tensor of a contiguous constant.

    Made of a meta tensor, as the mode itself makes it of a call, in a sixth of the time that
    ``mode.from_tensor`` takes.
    """
    meta = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return FakeTensor(mode, meta, value.device)


def _fake_mode_of(node: Node) -> Any:
    """The mode of the fake tensors in a graph, from the nearest node at or before ``node``."""
    before, first = node, next(iter(node.graph.nodes))
    while (mode := _own_fake_mode(before)) is None and before is not first:
        before = before.prev
    return mode or next(filter(None, map(_own_fake_mode, node.graph.nodes)), None)


def _own_fake_mode(node: Node) -> Any:
    return getattr(node.meta.get("val"), "fake_mode", None)
