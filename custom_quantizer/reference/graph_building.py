"""From a converted graph to a ``Document`` (:mod:`.graph_document`) and back.

What a file says is checked before anything is built of it: names, targets and arguments first, then
sizes, by running the graph once on fake tensors, which have shapes and no numbers. Only what passes
both ever sees a real tensor.
"""

from __future__ import annotations

import keyword
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
    optimization_hint,
)
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.fx.traceback import NodeSource
from torch.utils._pytree import TreeSpec
from torch.utils._sympy.value_ranges import ValueRanges
from torchao.quantization.pt2e import FROM_NODE_KEY

from custom_quantizer.calibration.observers import META_KEY
from custom_quantizer.core.borders import mark, marks_of
from custom_quantizer.core.graph import (
    constant_of,
    describe,
    expression_bounds,
    fake_constant,
    is_quantize,
    module_stack,
)
from custom_quantizer.core.memory import OVERWRITTEN
from custom_quantizer.core.rewriting import ORIGINAL_NAME
from custom_quantizer.reference.graph_document import (
    ConstantEntry,
    DimEntry,
    Document,
    FormatError,
    GraphEntry,
    NodeEntry,
    Record,
    SizeEntry,
    TensorEntry,
    is_number,
)
from custom_quantizer.reference.graph_targets import (
    CONTROL_FLOW,
    SYMBOLIC,
    check_arguments,
    name_of,
    resolve,
)

__all__ = ["build", "document_of"]

aten = torch.ops.aten

_DEEPEST = 16
"""Levels of containers, and of graphs in graphs."""

_LARGEST_VALUE = 4 << 30
_MOST_ALIVE = 16 << 30
"""Bytes of one tensor, and of all that a graph holds at one moment, at the sizes of capture."""

_MOST_PARTS = 4096
"""Tensors that one call returns."""

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}
_LAYOUTS = {"strided": torch.strided}
_DEVICES = {"cpu": torch.device("cpu")}
_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.contiguous_format,
        torch.channels_last,
        torch.channels_last_3d,
        torch.preserve_format,
    )
}
_ENUMS: Mapping[str, tuple[type, Mapping[str, Any]]] = {
    "dtype": (torch.dtype, _DTYPES),
    "layout": (torch.layout, _LAYOUTS),
    "device": (torch.device, _DEVICES),
    "memory_format": (torch.memory_format, _FORMATS),
}
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def document_of(
    model: GraphModule, example: Sequence[Any], dynamic_max: int
) -> tuple[Document, dict[str, Tensor]]:
    """Describe a converted graph.

    Args:
        model: the graph.
        example: one value per input, in the order of the placeholders.
        dynamic_max: upper bound of dynamic sizes for which capture recorded none.

    Returns:
        The document, and its tensors by the names that it gives them.

    Raises:
        FormatError: the graph holds what a file cannot.
    """
    return _Writer(dynamic_max).document(model, example)


class _Writer:
    def __init__(self, dynamic_max: int) -> None:
        self._dynamic_max = dynamic_max
        self._dims: dict[str, DimEntry] = {}
        self._constants: dict[str, ConstantEntry] = {}
        self._tensors: dict[str, Tensor] = {}
        self._known: dict[int, str] = {}
        self._graphs: dict[int, int] = {}

    def document(
        self, model: GraphModule, example: Sequence[Any]
    ) -> tuple[Document, dict[str, Tensor]]:
        info = getattr(model.graph._codegen, "pytree_info", None)
        flat = [node for node in model.graph.nodes if node.op == "placeholder"]
        graph = self._graph(model, 0)
        names = [str(node.target) for node in flat] if info is None else list(info.orig_args)
        structure = pytree.tree_structure((tuple(flat), {})) if info is None else info.in_spec
        returned = None if info is None else info.out_spec
        marks: list[Any] = [{str(i): kind for i, kind in side.items()} for side in marks_of(model)]
        document = Document(
            graph=graph,
            dims=self._dims,
            arguments=names,
            inputs=_spec_entry(structure, "inputs"),
            outputs=None if returned is None else {"tree": _spec_entry(returned, "")},
            constants=self._constants,
            example=[self._example(i, value) for i, value in enumerate(example)],
            integer_inputs=marks[0],
            integer_outputs=marks[1],
        )
        return document, self._tensors

    def _graph(self, model: GraphModule, depth: int) -> GraphEntry:
        nodes, graphs = [], {}
        for node in model.graph.nodes:
            if node.op == "call_module":
                # Export's own checks of sizes: Python code, made anew where a graph is exported.
                if node.target == "_guards_fn" and not node.users:
                    continue
                raise FormatError(f"{describe(node)} calls a module, which only code could say")
            inner = getattr(model, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(inner, GraphModule):
                if depth == _DEEPEST:
                    raise FormatError(f"{describe(node)}: control flow is nested too deep")
                graphs[str(node.target)] = self._graph(inner, depth + 1)
            elif node.op == "get_attr":
                if depth:
                    raise FormatError(f"{describe(node)}: a constant inside control flow")
                self._constant(model, node)
            nodes.append(self._node(node))
        return GraphEntry(nodes=nodes, graphs=graphs)

    def _node(self, node: Node) -> NodeEntry:
        target: str | None = str(node.target)
        if node.op == "call_function":
            target = name_of(node.target)
        if target is None:
            raise FormatError(f"{describe(node)} calls {node.target}, which no file may ask for")
        record = node.meta.get(META_KEY) or {}
        raised = record.get("raised")
        return NodeEntry(
            op=cast(Any, node.op),
            name=node.name,
            target=target,
            args=[_value_entry(node, arg) for arg in node.args],
            kwargs={name: _value_entry(node, arg) for name, arg in node.kwargs.items()},
            value=self._input(node) if node.op == "placeholder" else None,
            modules=_modules(node),
            record=Record(
                scheme=record.get("scheme"),
                reason=_line(record.get("reason")),
                raised=None if raised is None else {str(c): v for c, v in raised.items()},
            )
            if record
            else None,
            source=self._source(node),
            original=_line(node.meta.get(ORIGINAL_NAME)),
            overwritten=_line(node.meta.get(OVERWRITTEN)),
        )

    def _source(self, node: Node) -> str | None:
        """Which node of an earlier graph this one goes back to (see ExecuTorch's debug handles)."""
        sources = node.meta.get(FROM_NODE_KEY)
        if not sources:
            return None
        while sources:
            first = sources[-1]
            sources = first.from_node
        graph = self._graphs.setdefault(first.graph_id, len(self._graphs))
        return _line(f"{first.name}.{graph}")

    def _input(self, node: Node) -> TensorEntry | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape: list[int | SizeEntry] = [
            size if isinstance(size, int) else self._size(node, size) for size in value.shape
        ]
        return TensorEntry(dtype=_name_in(_DTYPES, value.dtype, describe(node)), shape=shape)

    def _size(self, node: Node, size: torch.SymInt) -> SizeEntry:
        """A size as ``times * dim + plus``: ``dynamic_shapes`` of export can ask for no others."""
        expression = size.node.expr
        symbols = sorted(expression.free_symbols, key=str)
        if len(symbols) != 1:
            raise FormatError(f"{describe(node)} has the size {size}, which depends on several")
        (symbol,) = symbols
        times, plus = expression.coeff(symbol, 1), expression.coeff(symbol, 0)
        if expression != times * symbol + plus or not (times.is_Integer and plus.is_Integer):
            raise FormatError(f"{describe(node)} has the size {size}, which no file can say")
        name = str(symbol)
        if name not in self._dims:
            low, high = expression_bounds(size, symbol)
            hint = (optimization_hint(size, fallback=2) - int(plus)) // int(times)
            high = max(2, self._dynamic_max if high is None else high)
            self._dims[name] = DimEntry(low=low, high=high, hint=min(max(hint, 2), high))
        return SizeEntry(dim=name, times=int(times), plus=int(plus))

    def _constant(self, model: GraphModule, node: Node) -> None:
        name = str(node.target)
        try:
            value = constant_of(model, node)
        except Exception as error:
            raise FormatError(f"{describe(node)} reads {name!r}, which is no tensor") from error
        held = operator.attrgetter(name)(model)
        key = self._known.get(id(held))
        if key is None:
            key = self._known[id(held)] = f"c{len(self._known)}"
            self._tensors[key] = _storable(value, describe(node))
        self._constants[name] = ConstantEntry(tensor=key, parameter=isinstance(held, nn.Parameter))

    def _example(self, index: int, value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            self._tensors[f"x{index}"] = _storable(value, f"input {index}")
            return {"tensor": f"x{index}"}
        return {"value": _plain_entry(f"input {index}", value)}


def _storable(value: Tensor, where: str) -> Tensor:
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise FormatError(f"{where}: a tensor that is not dense or not on the CPU")
    _name_in(_DTYPES, value.dtype, where)
    return value.detach()


def _name_in(names: Mapping[str, Any], value: Any, where: str) -> str:
    for name, known in names.items():
        if known == value:
            return name
    raise FormatError(f"{where}: {value} is nothing that a file may hold")


def _line(text: object) -> str | None:
    """Text without control characters, which a file may not hold."""
    if text is None:
        return None
    return "".join(c if c.isprintable() else " " for c in str(text))[:4000]


def _modules(node: Node) -> list[tuple[str, str, str]]:
    stack = node.meta.get("nn_module_stack") or {}
    kinds = [kind for _, kind in module_stack(node)]
    return [
        (cast(str, _line(key)), cast(str, _line(path)), cast(str, _line(kind)))
        for (key, (path, _)), kind in zip(stack.items(), kinds, strict=True)
    ]


def _value_entry(node: Node, value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise FormatError(f"{describe(node)}: arguments nested too deep")
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_value_entry(node, part, depth + 1) for part in value]}
    if isinstance(value, list):
        return [_value_entry(node, part, depth + 1) for part in value]
    for tag, (kind, names) in _ENUMS.items():
        if isinstance(value, kind):
            return {tag: _name_in(names, value, describe(node))}
    return _plain_entry(describe(node), value)


def _plain_entry(where: str, value: Any) -> Any:
    if value is None or is_number(value):
        return value
    if isinstance(value, float):
        return {"float": str(value)}
    if isinstance(value, str) and len(value) <= 4000:
        return {"string": value}
    raise FormatError(f"{where}: a {type(value).__name__}, which no file can hold")


def _spec_entry(spec: TreeSpec, what: str, depth: int = 0) -> Any:
    """The JSON of a structure.

    Args:
        spec: the structure.
        what: of what, where it must come back as it is; ``""``: containers of kinds that a file
            does not know may come back as tuples.
        depth: of ``spec`` in the whole.
    """
    if depth > _DEEPEST:
        raise FormatError(f"{what or 'outputs'} nested too deep")
    if spec.is_leaf():
        return "*"
    entries = [_spec_entry(child, what, depth + 1) for child in spec.children()]
    kind = getattr(spec.type, "__name__", str(spec.type))
    if kind == "NoneType":
        return None
    if spec.type in (tuple, list):
        return {kind: entries}
    if kind in ("dict", "OrderedDict") and all(isinstance(key, str) for key in spec.context):
        return {"dict": [list(pair) for pair in zip(spec.context, entries, strict=True)]}
    if what:
        raise FormatError(f"{what} of the type {kind}: a file knows tuples, lists and dicts")
    return {"tuple": entries}


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def build(document: Document, tensors: Mapping[str, Tensor]) -> tuple[GraphModule, tuple[Any, ...]]:
    """The graph that a document describes, and its example inputs.

    Raises:
        FormatError: the document asks for something that no converted graph holds.
    """
    example = [_example_of(entry, tensors) for entry in document.example]
    root = nn.Module().eval()
    _attach_constants(root, document, tensors)
    model = _graph_module(document.graph, 0, root, frozenset(document.constants))
    _check_dims(document)
    _set_structure(model, document)
    _mark_borders(model, document)
    _Sizes(document).record(model, example)
    model.recompile()
    structure = _spec_of(document.inputs)
    args, kwargs = pytree.tree_unflatten(example, structure)
    return model, (*args, *kwargs.values())


def _example_of(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    name = entry.get("tensor")
    if len(entry) == 1 and isinstance(name, str) and name in tensors:
        return tensors[name]
    if set(entry) == {"value"}:
        return _plain(entry["value"], "an example input")
    raise FormatError("an example input is neither a tensor of the file nor a value")


_TAKEN = GraphModule(nn.Module(), Graph())


def _is_free(name: str) -> bool:
    """Whether an attribute of a graph module may have this name."""
    return not hasattr(_TAKEN, name) and name not in ("_in_spec", "_out_spec")


def _attach_constants(root: nn.Module, document: Document, tensors: Mapping[str, Tensor]) -> None:
    held: dict[tuple[str, bool], Tensor] = {}
    for path, entry in document.constants.items():
        if entry.tensor not in tensors:
            raise FormatError(f"the constant {path!r} is not in the file")
        key = (entry.tensor, entry.parameter)
        if key not in held:
            value = tensors[entry.tensor]
            if entry.parameter and not value.is_floating_point():
                raise FormatError(f"the parameter {path!r} is {value.dtype}")
            held[key] = nn.Parameter(value) if entry.parameter else value
        *parents, name = path.split(".")
        module = root
        for part in parents:
            if not _is_free(part) or isinstance(getattr(module, part, None), Tensor):
                raise FormatError(f"{path!r} cannot be the name of a constant")
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = cast(nn.Module, getattr(module, part))
        if not _is_free(name) or hasattr(module, name):
            raise FormatError(f"{path!r} cannot be the name of a constant")
        if entry.parameter:
            module.register_parameter(name, cast(nn.Parameter, held[key]))
        else:
            module.register_buffer(name, held[key])


def _graph_module(
    entry: GraphEntry, depth: int, root: nn.Module, constants: frozenset[str]
) -> GraphModule:
    if depth > _DEEPEST:
        raise FormatError("control flow is nested too deep")
    for name, inner in entry.graphs.items():
        if not _is_free(name) or hasattr(root, name):
            raise FormatError(f"{name!r} cannot be the name of a graph")
        root.add_module(name, _graph_module(inner, depth + 1, nn.Module(), frozenset()))
    readable = constants | entry.graphs.keys()
    graph, nodes, sources = Graph(), cast("dict[str, Node]", {}), _Sources()
    finished = False
    for node in entry.nodes:
        if finished:
            raise FormatError(f"{node.name} comes after the output")
        if node.op == "get_attr" and node.target not in readable:
            raise FormatError(f"{node.name} reads {node.target!r}, which is not in the file")
        if node.op == "placeholder" and not _is_argument(node.target):
            raise FormatError(f"{node.target!r} cannot be the name of an input")
        made = _add_node(graph, node, nodes, sources)
        if made.name != node.name:
            raise FormatError(f"{node.name!r} cannot be the name of a node, or is there twice")
        nodes[node.name] = made
        finished = node.op == "output"
    if not finished:
        raise FormatError("a graph has no output")
    return GraphModule(root, graph)


def _is_argument(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name) and name != "self"


class _Sources:
    """Stand-ins for the nodes of earlier graphs: only which are the same matters."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._known: dict[str, list[NodeSource]] = {}

    def __getitem__(self, name: str) -> list[NodeSource]:
        if name not in self._known:
            self._known[name] = [NodeSource(self._graph.placeholder(f"n{len(self._known)}"))]
        return self._known[name]


def _add_node(graph: Graph, entry: NodeEntry, nodes: Mapping[str, Node], sources: _Sources) -> Node:
    args = tuple(_value(arg, entry.name, nodes) for arg in entry.args)
    kwargs = {name: _value(arg, entry.name, nodes) for name, arg in entry.kwargs.items()}
    target: Any = entry.target
    if entry.op == "call_function":
        target = resolve(entry.target)
        if target is None:
            raise FormatError(f"{entry.name} calls {entry.target!r}, which no graph may")
        wrong = _wrong_call(entry.target, target, args, kwargs)
        if wrong is not None:
            raise FormatError(f"{entry.name}: {entry.target}: {wrong}")
    elif kwargs or len(args) != (entry.op == "output"):
        raise FormatError(f"{entry.name}: a node of this kind takes no such arguments")
    node = graph.create_node(entry.op, target, args, kwargs, entry.name)
    if entry.modules:
        node.meta["nn_module_stack"] = {key: (path, kind) for key, path, kind in entry.modules}
    if entry.source is not None:
        node.meta[FROM_NODE_KEY] = list(sources[entry.source])
    if entry.record is not None:
        record = entry.record.model_dump(exclude_none=True)
        if "raised" in record:
            record["raised"] = {int(c): value for c, value in record["raised"].items()}
        node.meta[META_KEY] = record
    for key, text in ((ORIGINAL_NAME, entry.original), (OVERWRITTEN, entry.overwritten)):
        if text is not None:
            node.meta[key] = text
    return node


def _wrong_call(
    name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if isinstance(target, OpOverload):
        return check_arguments(target, args, kwargs, lambda value: isinstance(value, Node))
    shape = [_kind_of(arg) for arg in args]
    if name == "operator.getitem":
        fits = len(args) == 2 and isinstance(args[0], Node) and type(args[1]) is int
    elif name == "higher_order.cond":
        fits = len(args) == 4 and shape[1:] == ["node", "node", "list"]
    elif name == "higher_order.map_impl":
        fits = shape == ["node", "list", "list"] and bool(args[1])
    else:
        numbers = args[0] if name == "torch.sym_sum" and len(args) == 1 else args
        fits = isinstance(numbers, (list, tuple)) and all(
            _kind_of(number) in ("node", "number") for number in numbers
        )
    return None if fits and not kwargs else "its arguments are of the wrong number or kind"


def _kind_of(value: Any) -> str:
    if isinstance(value, Node):
        return "node"
    if isinstance(value, (list, tuple)):
        flat = all(isinstance(part, Node) or _kind_of(part) == "number" for part in value)
        return "list" if flat else ""
    return "number" if isinstance(value, (int, float)) else ""


def _value(entry: Any, where: str, nodes: Mapping[str, Node], depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise FormatError(f"{where}: arguments nested too deep")
    if isinstance(entry, list):
        return [_value(part, where, nodes, depth + 1) for part in entry]
    if isinstance(entry, dict) and len(entry) == 1:
        ((tag, inner),) = entry.items()
        if tag == "node" and isinstance(inner, str):
            if inner not in nodes:
                raise FormatError(f"{where} reads {inner!r}, which is not before it")
            return nodes[inner]
        if tag == "tuple" and isinstance(inner, list):
            return tuple(_value(part, where, nodes, depth + 1) for part in inner)
        if tag in _ENUMS and isinstance(inner, str) and inner in _ENUMS[tag][1]:
            return _ENUMS[tag][1][inner]
    return _plain(entry, where)


def _plain(entry: Any, where: str) -> Any:
    if entry is None or is_number(entry):
        return entry
    if isinstance(entry, dict) and len(entry) == 1:
        ((tag, inner),) = entry.items()
        if tag == "float" and isinstance(inner, str) and inner in _FLOATS:
            return _FLOATS[inner]
        if tag == "string" and isinstance(inner, str) and len(inner) <= 4000:
            return inner
    raise FormatError(f"{where}: {str(entry)[:80]!r} is no value")


def _spec_of(entry: Any) -> TreeSpec:
    return pytree.tree_structure(_tree_of(entry))


def _tree_of(entry: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise FormatError("inputs or outputs nested too deep")
    if entry == "*":
        return 0
    if entry is None:
        return None
    if isinstance(entry, dict) and len(entry) == 1:
        ((kind, parts),) = entry.items()
        if kind in ("tuple", "list") and isinstance(parts, list):
            children = [_tree_of(part, depth + 1) for part in parts]
            return tuple(children) if kind == "tuple" else children
        if kind == "dict" and isinstance(parts, list):
            found = {}
            for part in parts:
                if not (isinstance(part, list) and len(part) == 2 and isinstance(part[0], str)):
                    break
                found[part[0]] = _tree_of(part[1], depth + 1)
            if len(found) == len(parts):
                return found
    raise FormatError("inputs or outputs are nested in a way that no graph has")


def _set_structure(model: GraphModule, document: Document) -> None:
    """Give the graph the calling convention of what it was captured from.

    fx writes the names into the code of ``forward``, so each must be a name and nothing else.
    """
    flat = [node for node in model.graph.nodes if node.op == "placeholder"]
    spec = _spec_of(document.inputs)
    ours = (
        spec.type is tuple
        and [child.type for child in spec.children()] == [tuple, dict]
        and spec.num_leaves == len(flat) == len(document.example)
    )
    names = document.arguments
    keywords = list(spec.child(1).context) if ours else []
    positional = spec.child(0).num_children if ours else 0
    if not (
        ours
        and len(names) == len(set(names)) == positional + len(keywords)
        and all(map(_is_argument, (*names, *keywords)))
    ):
        raise FormatError("the inputs of the graph and their structure do not fit")
    returned = None
    if document.outputs is not None:
        if not (isinstance(document.outputs, dict) and set(document.outputs) == {"tree"}):
            raise FormatError("inputs or outputs are nested in a way that no graph has")
        returned = _spec_of(document.outputs["tree"])
        (result,) = model.graph.output_node().args
        count = len(result) if isinstance(result, (list, tuple)) else -1
        if returned.num_leaves != count:
            raise FormatError("the outputs of the graph and their structure do not fit")
    model.graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(names), spec, returned)))


def _mark_borders(model: GraphModule, document: Document) -> None:
    """Note which inputs and outputs shall be integers."""
    inputs = sum(node.op == "placeholder" for node in model.graph.nodes)
    outputs = len(pytree.tree_leaves(model.graph.output_node().args[0]))
    marks = []
    for given, count in ((document.integer_inputs, inputs), (document.integer_outputs, outputs)):
        marks.append({int(i): dtype for i, dtype in given.items()})
        if any(i >= count for i in marks[-1]):
            raise FormatError("an input or output that shall be integers does not exist")
    mark(model, *marks)


def _check_dims(document: Document) -> None:
    for name, dim in document.dims.items():
        if not dim.low <= dim.hint <= dim.high:
            raise FormatError(f"the bounds of {name} do not hold its value at capture")


# ---------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------


class _Sizes:
    """Runs a graph on fake tensors and records their shapes at its nodes.

    Every value is bounded before the next call sees it, so that no graph can ask for more memory
    than a network of its kind needs.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        # A mode of its own per file: the symbols of two files have nothing to do with each other.
        self._shapes = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self._sizes = {name: self._symbol(name, dim) for name, dim in document.dims.items()}
        self._symbols = {size.node.expr for size in self._sizes.values()}

    def _symbol(self, name: str, dim: DimEntry) -> torch.SymInt:
        vector = self._mode.from_tensor(
            torch.empty(dim.hint, dtype=torch.bool, device="meta"),
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[DimDynamic.DYNAMIC],
                constraint_sizes=[
                    # Export never traces a size below 2, either.
                    StrictMinMaxConstraint(
                        warn_only=False, vr=ValueRanges(max(dim.low, 2), dim.high)
                    )
                ],
            ),
            source=ConstantSource(name),
        )
        return cast(torch.SymInt, vector.shape[0])

    def record(self, model: GraphModule, example: Sequence[Any]) -> None:
        """Give every node of a graph its fake value.

        Raises:
            FormatError: a call refuses its arguments, or its result is too large.
        """
        given = iter(example)
        inputs = []
        entries = {entry.name: entry for entry in self._document.graph.nodes}
        with torch.no_grad(), self._mode, self._shapes.suppress_guards():
            for node in model.graph.nodes:
                if node.op == "placeholder":
                    inputs.append(self._input(entries[node.name], next(given)))
            self._run(model, inputs)

    def _input(self, entry: NodeEntry, example: Any) -> Any:
        if entry.value is None:
            return example
        shape = [
            size if isinstance(size, int) else self._size(entry.name, size)
            for size in entry.value.shape
        ]
        dtype = _DTYPES.get(entry.value.dtype)
        fits = isinstance(example, Tensor) and example.dtype == dtype
        if not fits or len(example.shape) != len(shape):
            raise FormatError(f"the example does not fit the input {entry.name}")
        for size, own in zip(shape, example.shape, strict=True):
            if isinstance(size, int) and size != own:
                raise FormatError(f"the example does not fit the input {entry.name}")
        return torch.empty(shape, dtype=dtype)

    def _size(self, name: str, size: SizeEntry) -> Any:
        if size.dim not in self._sizes:
            raise FormatError(f"{name} has the size {size.dim!r}, which is nowhere bounded")
        return size.times * self._sizes[size.dim] + size.plus

    def _run(self, model: GraphModule, inputs: Sequence[Any]) -> Any:
        values: dict[Node, Any] = {}
        given = iter(inputs)
        last_use = {source: node for node in model.graph.nodes for source in node.all_input_nodes}
        ends: dict[Node, list[Node]] = {}
        for source, user in last_use.items():
            ends.setdefault(user, []).append(source)
        alive = 0
        for node in model.graph.nodes:
            value = self._compute(model, node, values, given)
            if node.op == "output":
                return value
            values[node] = value
            # convert_pt2e records none for quantize nodes, either (see graph.tensor_meta).
            if not isinstance(value, GraphModule) and not is_quantize(node):
                node.meta["val"] = value
            alive += self._measure(node, value)
            if alive > _MOST_ALIVE:
                raise FormatError(
                    f"{describe(node)}: the graph holds {alive / 2**30:.1f} GiB at once, more than "
                    f"the {_MOST_ALIVE >> 30} GiB that a file may ask for"
                )
            for source in ends.get(node, ()):
                alive -= self._measure(source, values[source])
        raise FormatError("a graph has no output")

    def _compute(
        self, model: GraphModule, node: Node, values: Mapping[Node, Any], given: Iterator[Any]
    ) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "placeholder":
            return next(given)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            held = operator.attrgetter(str(node.target))(model)
            if isinstance(held, GraphModule):
                return held
            return fake_constant(held, self._mode)
        try:
            if node.target is CONTROL_FLOW["cond"]:
                return self._cond(*args)
            if node.target is CONTROL_FLOW["map_impl"]:
                return self._map(*args)
            self._check_operands(node, args, kwargs)
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        except FormatError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FormatError(f"{describe(node)}: {node.target}: {first}") from error

    def _check_operands(self, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if node.target in SYMBOLIC.values():
            numbers = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
            # Strings and lists would be repeated, and tensors have operators of their own.
            if not all(isinstance(value, numbers) for value in pytree.tree_leaves(args)):
                raise FormatError(f"{describe(node)}: arithmetic on what is no number")
        elif node.target is operator.getitem and not isinstance(args[0], (list, tuple)):
            raise FormatError(f"{describe(node)}: an item of what is no list")
        parts = _count_parts(node.target, args, kwargs)
        if parts > _MOST_PARTS:
            raise FormatError(f"{describe(node)}: {parts:,} parts, more than {_MOST_PARTS:,}")

    def _cond(
        self, condition: Any, yes: GraphModule, no: GraphModule, operands: Sequence[Any]
    ) -> Any:
        del condition
        first, second = self._branch(yes, operands), self._branch(no, operands)
        if _shapes_in(first) != _shapes_in(second):
            raise FormatError("the two branches of a condition differ in what they return")
        return first

    def _map(self, body: GraphModule, mapped: Sequence[Any], more: Sequence[Any]) -> Any:
        if not all(isinstance(value, Tensor) and value.dim() for value in mapped):
            raise FormatError("a map runs over tensors with a first dimension")
        count = mapped[0].shape[0]
        results = self._branch(body, [*(value[0] for value in mapped), *more])
        return tuple(value.new_empty((count, *value.shape)) for value in results)

    def _branch(self, graph: Any, operands: Sequence[Any]) -> tuple[Any, ...]:
        if not isinstance(graph, GraphModule):
            raise FormatError("control flow runs what is no graph")
        wanted = sum(node.op == "placeholder" for node in graph.graph.nodes)
        if wanted != len(operands):
            raise FormatError("control flow gives a graph the wrong number of inputs")
        found = self._run(graph, operands)
        if not isinstance(found, (list, tuple)) or not all(isinstance(v, Tensor) for v in found):
            raise FormatError("a graph of control flow returns something else than tensors")
        return tuple(found)

    def _measure(self, node: Node, value: Any) -> int:
        """Bytes of a value at the sizes of capture.

        Raises:
            FormatError: too many, or they depend on values that only running the graph tells.
        """
        total = 0
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                count = leaf.element_size() * math.prod(self._hint(node, n) for n in leaf.shape)
                if count > _LARGEST_VALUE:
                    raise FormatError(
                        f"{describe(node)} takes {count / 2**30:.1f} GiB, more than the "
                        f"{_LARGEST_VALUE >> 30} GiB that a file may ask for"
                    )
                total += count
            elif isinstance(leaf, (int, torch.SymInt)):
                self._hint(node, leaf)
        return total

    def _hint(self, node: Node, size: Any) -> int:
        if isinstance(size, torch.SymInt):
            if not size.node.expr.free_symbols <= self._symbols:
                raise FormatError(f"{describe(node)}: a size that depends on values")
            size = optimization_hint(size)
        if abs(size) >= 1 << 63:
            raise FormatError(f"{describe(node)}: a number of more than 64 bits")
        return int(size)


def _count_parts(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many tensors a call will return, where its arguments and no list of them say it."""
    if target not in (aten.chunk.default, aten.unbind.int, aten.split.Tensor):
        return 1
    names = [parameter.name for parameter in target._schema.arguments]
    given = {"dim": 0, **dict(zip(names, args, strict=False)), **kwargs}
    if target is aten.chunk.default:
        return int(given["chunks"])
    size = given["self"].shape[given["dim"]]
    extent = size if isinstance(size, int) else optimization_hint(size)
    step = given.get("split_size", 1)
    return -(-extent // max(1, step if isinstance(step, int) else optimization_hint(step)))


def _shapes_in(values: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(value.dtype, tuple(map(str, value.shape))) for value in values]
