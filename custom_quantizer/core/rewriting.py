"""Replacing calls of a captured graph by other calls, before anything is annotated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    FOLDED_KEY,
    add_constant,
    are_static,
    constant_of,
    is_constant,
    is_float32,
    is_parameter,
    is_same_shape,
    reads_sizes,
    shape_of,
    view_sizes,
)
from custom_quantizer.core.memory import overwritten_by, reached, shares_memory, viewed_by

__all__ = [
    "ALIKE",
    "FULL_PRECISION",
    "IDLE_KEY",
    "IN_FLOAT",
    "MADE_UP",
    "MERGED",
    "ORIGINAL_NAME",
    "STEP",
    "Insertion",
    "NoForm",
    "Rewrite",
    "fake_result",
    "idle_calls",
    "is_inner",
    "merge_into",
    "original_name",
    "original_target",
    "renamed",
    "replace",
    "rewrite_calls",
    "step_target",
]

aten = torch.ops.aten


ALIKE = "custom_quantizer_alike"
"""Key in ``node.meta``: what calls of one value compute has one range, as it would in a loop."""

FULL_PRECISION = "custom_quantizer_full_precision"
"""Key in ``node.meta``: the model computes the node where it has turned autocast off."""

IDLE_KEY = "custom_quantizer_idle_calls"
"""Key in the ``meta`` of a model: what :func:`idle_calls` said of the captured graph."""

IN_FLOAT = "custom_quantizer_in_float"
"""Key in ``node.meta``: why a call that a rewrite made is computed in float."""

MADE_UP = "custom_quantizer_made_up"
"""Key in ``node.meta``: a rewrite made the constant, of nothing that the model holds."""

MERGED = "custom_quantizer_merged"
"""Key in ``node.meta``: names of captured calls that became part of a layer's weight and bias."""

ORIGINAL_NAME = "original_name"
"""Key in ``node.meta``: name of the captured call that the node is a part of."""

STEP = "custom_quantizer_step"
"""Key in ``node.meta``: op of the step of a composite call that the node is, or is a part of."""


def idle_calls(model: GraphModule) -> dict[str, str]:
    """Calls of a captured graph that no program runs, by name, and why."""
    used: set[Node] = set()
    for node in reversed(model.graph.nodes):
        if node in used or node.is_impure():
            used.update((node, *node.all_input_nodes))
    varying: set[Node] = set()
    idle: dict[str, str] = {}
    for node in model.graph.nodes:
        if node.op == "placeholder" or not varying.isdisjoint(node.all_input_nodes):
            varying.add(node)
        if node.op == "call_function" and node not in used:
            idle[node.name] = "nothing reads its result"
        elif node.op == "call_function" and node not in varying:
            idle[node.name] = "it computes a constant, once and for all"
    return idle


def fake_result(mode: Any, target: Any, args: Any, kwargs: Any) -> Any:
    """What a call gives of fake values, as export computes it.

    Without the dispatcher, kernels in C++ (a pad's) fix dynamic sizes at those of the example.
    """
    with mode, enable_python_dispatcher():
        return target(*args, **kwargs)


class NoForm(Exception):
    """A form cannot be written for the sizes at hand; the call stays."""


class Insertion:
    """Inserts calls in place of ``node``, with fake values and the module path of ``node``.

    They are named after it (``mean_permute``, ``mean_linear``), so that names do not depend on
    what else is rewritten; the last one takes over its name.

    Attributes:
        model: the graph.
        node: the call that is replaced.
        training: parameters change, so nothing that is computed from them is a constant.
    """

    def __init__(self, model: GraphModule, node: Node, *, training: bool = False) -> None:
        self.model = model
        self.node = node
        self.training = training

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call of ``target`` before the node."""
        name = f"{self.node.name}_{getattr(target, 'overloadpacket', target).__name__}"
        with self.model.graph.inserting_before(self.node):
            new = self.model.graph.create_node("call_function", target, args, kwargs, name)
        for key in ("nn_module_stack", "stack_trace", FULL_PRECISION, IN_FLOAT, STEP):
            if key in self.node.meta:
                new.meta[key] = self.node.meta[key]
        new.meta["original_target"] = original_target(self.node)
        # Else quantizers that go by types of modules take it for what the module is called.
        new.meta["source_fn_stack"] = [(new.name, target)]
        new.meta[ORIGINAL_NAME] = original_name(self.node)
        # An op of several results has a list of fake values.
        sources = (*new.all_input_nodes, self.node)
        values = pytree.tree_leaves([source.meta.get("val") for source in sources])
        mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
        if mode is not None:
            mapped = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta.get("val"))
            new.meta["val"] = fake_result(mode, target, *mapped)
        return new

    def formed(self, rewrite: Rewrite, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call in the form that a rewrite gives it; as it is, where it has none."""
        call = self.call(target, *args, **kwargs)
        form = rewrite(Insertion(self.model, call, training=self.training))
        if form is None:
            return call
        replace(self.model, call, form)
        return form

    def constant(self, name: str, value: Tensor) -> Node:
        """A new constant before the node, made of nothing that the model holds."""
        constant = self._constant(name, value)
        constant.meta[MADE_UP] = True
        return constant

    def _constant(self, name: str, value: Tensor) -> Node:
        constant = add_constant(self.model, f"{self.node.name}_{name}", value, self.node)
        constant.meta["nn_module_stack"] = self.node.meta.get("nn_module_stack", {})
        return constant

    def is_trained(self, value: Node) -> bool:
        """Whether ``value`` is a parameter that changes, or computed from some."""
        if not self.training or value.op != "get_attr":
            return self.training
        return is_parameter(self.model, value)

    def number_beside(self, tensor: object, other: object) -> float | None:
        """The number that all elements of a constant are, beside a tensor of float32.

        ``None``: it is none, it is trained, or it gives the result more dims than ``other`` has.
        Of parameters, which are equal only before they are trained, it is that of a single one.
        """
        if not isinstance(tensor, Node) or self.is_trained(tensor) or not is_float32(other):
            return None
        value = constant_of(self.model, tensor) if is_constant(tensor) else None
        sizes = shape_of(cast(Node, other))
        if value is None or not value.numel() or value.dim() > len(sizes):
            return None
        if value.numel() > 1:
            spread = zip(reversed(value.shape), reversed(sizes), strict=False)
            fits = all(n == 1 or (isinstance(size, int) and n == size) for n, size in spread)
            if not fits or is_parameter(self.model, tensor) or bool((value != value.min()).any()):
                return None
        return float(value.flatten()[0])

    def again(self, value: Node) -> Node:
        """What is computed of constants, once more before the node: where it is read may be behind.

        A constant itself is moved: of two nodes that read one, torchao's ``constant_fold`` takes
        the tensor away with the first that nothing uses.
        """
        if value.op == "get_attr":
            if value > self.node:
                self.node.prepend(value)
            return value
        sources = {source: self.again(source) for source in value.all_input_nodes}
        with self.model.graph.inserting_before(self.node):
            return self.model.graph.node_copy(value, sources.__getitem__)

    def settled(self, value: Node, name: str) -> Node:
        """What is computed from parameters alone, as a constant; while they change, as it is.

        Args:
            value: a parameter, or a function of some.
            name: of the constant, behind that of the node.
        """
        if value.op == "get_attr" or not are_static(shape_of(value)):
            return value
        parts = reached(value, lambda part: part.all_input_nodes)
        if any(map(_is_state, parts)):
            return value
        if self.training:
            value.meta[FOLDED_KEY] = True
            return value
        constant = self._constant(name, self._evaluate(value))
        if all(MADE_UP in part.meta for part in parts if part.op == "get_attr"):
            constant.meta[MADE_UP] = True
        return constant

    def _evaluate(self, value: Node) -> Tensor:
        if value.op == "get_attr":
            return constant_of(self.model, value)
        args, kwargs = cast(Any, torch.fx.node.map_arg((value.args, value.kwargs), self._evaluate))
        with torch.no_grad():
            return cast(Tensor, cast("Callable[..., Any]", value.target)(*args, **kwargs))

    def reshape(self, value: Node, shape: Sequence[Any]) -> Node:
        """Reshape unless the shape is that already.

        Raises:
            NoForm: several sizes are symbolic.
        """
        if is_same_shape(shape, shape_of(value)):
            return value
        sizes = view_sizes(shape)
        if sizes.count(-1) > 1:
            raise NoForm(f"{self.node.name}: a reshape to {list(shape)} has two dynamic sizes")
        return self.call(aten.reshape.default, value, sizes)

    def permute(self, value: Node, order: Sequence[int]) -> Node:
        """Permute unless the order is that already."""
        if list(order) == sorted(order):
            return value
        return self.call(aten.permute.default, value, list(order))

    def slice(self, value: Node, dim: int, start: int, stop: int) -> Node:
        """``value[start:stop]`` along a dim of static size, unless that is all of it."""
        if start == 0 and stop == shape_of(value)[dim]:
            return value
        return self.call(aten.slice.Tensor, value, dim, start, stop)


def merge_into(layer: Node, node: Node, result: Node | None = None) -> None:
    """Take away a call that became part of the weight and bias of a layer.

    Args:
        layer: before it.
        node: the call.
        result: what is read instead: the layer, unless something moves its values.
    """
    names = (*node.meta.get(MERGED, ()), original_name(node))
    layer.meta[MERGED] = (*layer.meta.get(MERGED, ()), *names)
    node.replace_all_uses_with(layer if result is None else result)
    node.graph.erase_node(node)


Rewrite = Callable[[Insertion], "Node | None"]
"""Makes what a call is replaced by; ``None``: the call stays."""


def renamed(target: Any) -> Rewrite:
    """The same op by another name, with the same arguments."""
    return lambda insert: insert.call(target, *insert.node.args, **insert.node.kwargs)


def rewrite_calls(
    model: GraphModule,
    rewrites: Mapping[Any, Rewrite],
    *,
    training: bool = False,
    of_sizes: Collection[Rewrite] = (),
) -> int:
    """Replace calls by what the rewrite of their target makes, in place.

    Args:
        model: the graph.
        rewrites: by overload.
        training: parameters change.
        of_sizes: those that take numbers that the graph computes from sizes of the inputs, too.
            Forms that have windows or shifts cannot.

    Returns:
        The number of calls that were replaced.
    """
    count = 0
    for node in list(model.graph.nodes):
        rewrite = rewrites.get(node.target) if node.op == "call_function" else None
        if rewrite is not None and reads_sizes(node) and rewrite not in of_sizes:
            continue
        if overwritten_by(node) is not None:
            continue  # a view has to stay one, and what is viewed has to keep its strides
        # What an earlier rewrite took along has no users any more.
        alive = rewrite is not None and bool(node.users)
        insert = Insertion(model, node, training=training)
        result = _form(cast(Rewrite, rewrite), insert) if alive else None
        if result is not None and _sees_later_writes(result, node):
            result = insert.call(torch.ops.aten.clone.default, result)
        if result is not None and _gives_the_same(result, node):
            replace(model, node, result)
            count += 1
    if count:
        model.graph.eliminate_dead_code()
    return count


def _form(rewrite: Rewrite, insert: Insertion) -> Node | None:
    """What a rewrite makes; of one that gives up half way nothing is left."""
    before = insert.node.prev
    try:
        return rewrite(insert)
    except NoForm:
        while (last := insert.node.prev) is not before:
            last.graph.erase_node(last)
        return None


def _gives_the_same(result: Node, node: Node) -> bool:
    """Whether a form has dtype and shape of the call, and cannot see writes that the call did not.

    Memory that is written in place (:mod:`custom_quantizer.core.memory`) has to be read when the
    call reads it: the form may read no more of it.
    """
    wanted, given = (pytree.tree_leaves(n.meta.get("val")) for n in (node, result))
    if len(wanted) == len(given) and not all(map(_is_like, given, wanted)):
        return False
    seen, stack = {result}, [result]
    while stack:
        part = stack.pop()
        if original_name(part) != original_name(node) or part is node:
            if overwritten_by(part) is not None and part not in node.all_input_nodes:
                return False
            continue
        new = [source for source in part.all_input_nodes if source not in seen]
        seen.update(new)
        stack += new
    return True


def _sees_later_writes(result: Node, node: Node) -> bool:
    """Whether a form is a view of memory that is written in place, where the call copies."""
    return not shares_memory(node) and any(map(overwritten_by, reached(result, viewed_by)))


def _is_like(given: Any, wanted: Any) -> bool:
    if not isinstance(given, Tensor) or not isinstance(wanted, Tensor):
        return True
    if given.dtype != wanted.dtype or given.dim() != wanted.dim():
        return False
    # Dynamic sizes may be written in different ways.
    sizes = zip(given.shape, wanted.shape, strict=True)
    return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _is_state(node: Node) -> bool:
    return node.op == "get_attr" and overwritten_by(node) is not None


def original_name(node: Node) -> str:
    """Name of the captured call that the node is, or is a part of."""
    return str(node.meta.get(ORIGINAL_NAME, node.name))


def original_target(node: Node) -> Any:
    """Op of the captured call that the node is, or is a part of."""
    return node.meta.get("original_target", node.target)


def step_target(node: Node) -> Any:
    """Op that PyTorch calls there: of a composite call one of its steps, else the captured op."""
    return node.meta.get(STEP, original_target(node))


def is_inner(node: Node) -> bool:
    """Whether a node is a part of what a captured call was rewritten to, but not its result."""
    return original_name(node) != node.name


def replace(model: GraphModule, node: Node, result: Node) -> None:
    """Put ``result`` in the place of ``node``, under its name if it was made for it."""
    node.replace_all_uses_with(result)
    model.graph.erase_node(node)
    if result.meta.get(ORIGINAL_NAME) == node.meta.get(ORIGINAL_NAME, node.name):
        result.name = node.name
