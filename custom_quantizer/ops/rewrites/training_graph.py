"""The form a graph has while it is trained, and how conversion undoes it.

``prepare_qat_pt2e`` fuses some batch norms itself, after annotation: with ``eps=1e-5`` whatever the
model says, with a zero bias where the folded one will be, and not after linear layers. Here the
convolution or linear layer before a batch norm gets the weight and the bias it will ship with, as
functions of the trained parameters and the running statistics::

    factor = gamma / sqrt(running_var + eps)
    y = conv(x, weight * factor, beta + (bias - running_mean) * factor)

so that the fake quantizers stand where the integers will be. In eval mode that is all. In training
mode :func:`normalize` behind the layer undoes the folding and normalizes with the statistics of
the batch, as Krishnamoorthi (2018, section 3.2.2) describes and ``nniqat.ConvBn2d`` does; what the
bias lost by rounding is added back, so that the network is trained with the bias of that step.

A dropout is the identity once the network ships, so nothing is rounded behind it.

At conversion :func:`fold_for_good` puts constants in the place of the functions, and removes the
dropouts. What was learned is a number then: a power with such an exponent, or a bound, becomes the
op that has the number as an argument, and it is planned as that op from the first.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from custom_quantizer.core.graph import (
    FOLDED_KEY,
    add_constant,
    argument,
    constant_of,
    describe,
    is_constant,
    is_same_shape,
    set_argument,
    shape_of,
    tensor_meta,
)
from custom_quantizer.core.memory import overwritten_by
from custom_quantizer.core.rewriting import Insertion
from custom_quantizer.errors import CaptureError, ConversionError
from custom_quantizer.ops import PatternMatch, rule_of
from custom_quantizer.ops.rewrites.batch_norms import (
    give_layers,
    layer_before,
    reads_constants,
    scale_channels,
    uses_own_statistics,
)
from custom_quantizer.ops.rewrites.constants import (
    draws_numbers,
    fold_constants,
    training_switches,
)

__all__ = [
    "DROPOUTS",
    "MODE_NAME",
    "TrainingMode",
    "as_evaluated",
    "dropouts_behind",
    "fold_batch_norms",
    "fold_for_good",
    "folded_value",
    "insert_normalization",
    "is_foldable_parameter",
    "is_training_call",
    "mark_computed_parameters",
    "norms_that_stand_still",
    "origin_of",
    "planned_tensor",
    "put_folded",
    "recorded",
    "switch_calls",
    "training_mode_of",
]

aten = torch.ops.aten

# Calls that are the identity in evaluation.
DROPOUTS = frozenset(
    {
        aten.alpha_dropout.default,
        aten.dropout.default,
        aten.feature_alpha_dropout.default,
        aten.feature_dropout.default,
    }
)

_SWITCHED_BY_TORCHAO = frozenset({aten.batch_norm.default, aten.dropout.default})
"""What torchao (0.18) moves between training and evaluation."""

# In ``meta`` of other calls that are in evaluation: their arguments in training.
_TRAINING_KEY = "custom_quantizer_training"

MODE_NAME = "batch_norm_mode"
"""Name of the module that says whether batch norms use statistics of the batch."""

# In ``meta`` of a graph that has this form.
_TRAINED_KEY = "custom_quantizer_trained"

_BATCH_NORM_KEY = "custom_quantizer_batch_norm"
"""Of a folded layer: its bias, and what else :func:`normalize` takes behind it."""

_SMALLEST_FACTOR = 1e-8
"""A batch norm that multiplies by less cannot be undone, so it multiplies by this."""


_REFINEMENTS = 3
"""Steps to the running mean of a wanted bias: each takes up what rounding left of the last one."""


class TrainingMode(nn.Module):
    """Whether the batch norms of a prepared graph use the statistics of the batch.

    torchao moves an exported model between training and evaluation by rewriting calls of batch
    norm and dropout. A dropout of the constant 1 is therefore 1 in evaluation only.

    Attributes:
        frozen: use the running statistics in training, too, and leave them as they are.
    """

    frozen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.tensor([0], dtype=torch.uint8))

    def forward(self, probe: Tensor) -> bool:
        """Whether statistics of the batch are used; ``probe`` is the dropout of a 1."""
        return float(probe) != 1.0 and not bool(self.frozen)


# ---------------------------------------------------------------------------------------------
# The functions that stand in a prepared graph
# ---------------------------------------------------------------------------------------------


def fold_factor(
    gamma: Tensor | None, running_var: Tensor, eps: float, use_batch: bool | None = None
) -> Tensor:
    """``gamma / sqrt(running_var + eps)``, ``(channels,)``.

    With statistics of the batch the factor only scales what is undone later, so no gradient flows.
    """
    factor = torch.rsqrt(running_var + eps)
    if gamma is not None:
        factor = gamma * factor
    smallest = torch.full_like(factor, _SMALLEST_FACTOR)
    factor = torch.where(factor.abs() < smallest, torch.copysign(smallest, factor), factor)
    return factor.detach() if use_batch else factor


def fold_bias(
    bias: Tensor | None, factor: Tensor, beta: Tensor | None, running_mean: Tensor
) -> Tensor:
    """``beta + (bias - running_mean) * factor``, ``(channels,)``."""
    folded = (-running_mean if bias is None else bias - running_mean) * factor
    return folded if beta is None else beta + folded


def normalize(
    y: Tensor,
    quantized_bias: Tensor,
    folded_bias: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    use_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """What the batch norm makes of the folded layer's output ``y``.

    With running statistics, ``y`` itself. Otherwise ``y`` is divided by the factor it was folded
    with and normalized with the statistics of the batch, which also move the running ones; the
    rounding error of the bias is added, since a batch norm would subtract it again.

    Args:
        y: ``(N, channels, ...)``.
        quantized_bias: ``(channels,)``, what the layer added.
        folded_bias: ``(channels,)``, before it was quantized.
        bias: of the layer before folding.
        factor: ``(channels,)``.
        gamma: weight of the batch norm.
        beta: bias of the batch norm.
        running_mean: ``(channels,)``, updated in place.
        running_var: ``(channels,)``, updated in place.
        use_batch: statistics of the batch.
        momentum: of the running statistics.
        eps: of the batch norm.
    """
    if not use_batch:
        return y
    error = (quantized_bias - folded_bias).detach()
    raw = y / factor.reshape(-1, *[1] * (y.dim() - 2))
    # A batch norm does not see a constant, so only the running mean needs to know the biases.
    with torch.no_grad():
        offset = quantized_bias / factor
        offset = offset if bias is None else offset - bias
        mean = running_mean + offset
    shifted = error if beta is None else beta + error
    scale = torch.ones_like(factor) if gamma is None else gamma
    result = F.batch_norm(raw, mean, running_var, scale, shifted, True, momentum, eps)
    with torch.no_grad():
        running_mean.copy_(mean - offset)
    return result


# ---------------------------------------------------------------------------------------------
# Before annotation
# ---------------------------------------------------------------------------------------------


def fold_batch_norms(model: GraphModule, wanted: Callable[[Node], bool]) -> None:
    """Fold the batch norms behind the layers that ``wanted`` selects, in place.

    The layer's weight and bias become functions of parameters (``FOLDED_KEY`` in their node's
    ``meta``), and its result that of the batch norm. :func:`insert_normalization` completes it.
    """
    mark_computed_parameters(model)
    give_layers(model, wanted)
    found = [(_foldable(node), node) for node in model.graph.nodes]
    folded = [(b, node) for b, node in found if b is not None and wanted(b.node)]
    training = any(is_training_call(node) for node in model.graph.nodes)
    model.meta[_TRAINED_KEY] = True
    if folded:
        mode = _insert_mode(model, training)
        for match, norm in folded:
            _fold(model, match, norm, mode)
    _forget_counters(model)
    model.graph.eliminate_dead_code()
    read_constants_late(model)
    model.recompile()


def _foldable(node: Node) -> PatternMatch | None:
    """The layer that a batch norm can be folded into, if ``node`` is such a batch norm."""
    if node.target is not aten.batch_norm.default:
        return None
    # The graph may say that statistics of the batch are used.
    return layer_before(node) if reads_constants(node) else None


def _insert_mode(model: GraphModule, training: bool) -> Node:
    """A node whose value says whether batch norms use statistics of the batch."""
    setattr(model, MODE_NAME, TrainingMode())
    first = next(node for node in model.graph.nodes if node.op != "placeholder")
    with model.graph.inserting_before(first):
        one = model.graph.call_function(
            aten.ones.default, ([1],), {"dtype": torch.float32, "device": torch.device("cpu")}
        )
        probe = model.graph.call_function(aten.dropout.default, (one, 0.5, training))
        return model.graph.call_module(MODE_NAME, (probe,))


def _fold(model: GraphModule, match: PatternMatch, norm: Node, mode: Node) -> None:
    layer, weight, bias = match.node, cast(Node, match.weight), match.bias
    gamma, beta, mean, var = (cast("Node | None", norm.args[i]) for i in (1, 2, 3, 4))
    momentum, eps = float(cast(float, norm.args[6])), float(cast(float, norm.args[7]))
    meta, channels = tensor_meta(weight), tensor_meta(cast(Node, var))
    # Parameters of the batch norm are read behind the layer.
    reads = [node for node in (gamma, beta, mean, var) if node is not None]
    insert = Insertion(model, layer)
    read = {node: insert.again(node) for node in reads}
    with model.graph.inserting_before(layer):
        gamma, beta, mean, var = (None if n is None else read[n] for n in (gamma, beta, mean, var))
        factor = model.graph.call_function(fold_factor, (gamma, var, eps, mode))
        folded_weight = model.graph.call_function(
            scale_channels, (weight, factor, match.weight_axis, match.groups)
        )
        folded_bias = model.graph.call_function(fold_bias, (bias, factor, beta, mean))
    folded_weight.meta = {**weight.meta, FOLDED_KEY: True, "val": meta}
    folded_bias.meta = {**folded_weight.meta, "val": channels}
    args = list(layer.args) + [None] * (3 - len(layer.args))
    args[1], args[2] = folded_weight, folded_bias
    layer.kwargs = {k: v for k, v in layer.kwargs.items() if k not in ("weight", "bias")}
    layer.args = tuple(args)
    rest = (bias, factor, gamma, beta, mean, var, mode, momentum, eps)
    layer.meta[_BATCH_NORM_KEY] = folded_bias, rest
    norm.replace_all_uses_with(layer)
    model.graph.erase_node(norm)


def mark_computed_parameters(model: GraphModule) -> None:
    """Mark what is computed from parameters alone, which training changes and shipping does not.

    A scaled weight or an expanded class token is planned like a constant.
    """
    written = {
        str(source.target)
        for node in model.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for source in node.all_input_nodes
    }
    for node in model.graph.nodes:
        target, sources = node.target, node.all_input_nodes
        if not sources or not isinstance(node.meta.get("val"), (Tensor, list, tuple)):
            continue
        constant = all(is_constant(s) and str(s.target) not in written for s in sources)
        if constant and (target is operator.getitem or _repeats(target)):
            node.meta[FOLDED_KEY] = True


def _repeats(target: Any) -> bool:
    """Whether a call gives the same for the same inputs, and leaves them as they are."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not (target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags)


def _forget_counters(model: GraphModule) -> None:
    """Remove what counts the batches of batch norms: nothing reads it."""
    for node in list(model.graph.nodes):
        counted = node.args[0] if node.target is aten.add_.Tensor else None
        if not isinstance(counted, Node) or counted.op != "get_attr" or node.users:
            continue
        if str(counted.target).endswith("num_batches_tracked"):
            model.graph.erase_node(node)


@contextlib.contextmanager
def as_evaluated(model: GraphModule) -> Iterator[None]:
    """Give ``model`` the form in which it ships, to plan it: no training, no dropouts.

    Nor :func:`normalize`, which an earlier quantizer may have inserted.
    """
    trained = [node for node in model.graph.nodes if is_training_call(node)]
    forms = [(node, _as_shipped(model, node), _call_of(node)) for node in model.graph.nodes]
    transparent = [
        (node, cast(Node, node.args[0]), list(node.users))
        for node in model.graph.nodes
        if (node.target in DROPOUTS and not _is_probe(node)) or node.target is normalize
    ]
    for node in trained:
        _set_training(node, training=False)
    for node, shipped, _ in forms:
        _become(node, shipped)
    for node, source, users in transparent:
        for user in users:
            user.replace_input_with(node, origin_of(source))
    for node, _, _ in transparent:  # a tensor has no users but those behind
        node.update_arg(0, None)
        node.meta[FOLDED_KEY] = True
    try:
        yield
    finally:
        for node, source, _ in transparent:
            node.update_arg(0, source)
            del node.meta[FOLDED_KEY]
        for node, source, users in transparent:
            for user in users:
                user.replace_input_with(origin_of(source), node)
        for node, shipped, given in forms:
            _become(node, given if shipped else None)
        for node in trained:
            _set_training(node, training=True)


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""Target and arguments of a call."""


def _call_of(node: Node) -> _Call:
    return node.target, node.args, dict(node.kwargs)


def _become(node: Node, call: _Call | None) -> None:
    """Make ``node`` another call; ``None``: it stays."""
    if call is not None:
        node.target, node.args, node.kwargs = call


def _as_shipped(model: GraphModule, node: Node) -> _Call | None:
    """The call that ``node`` is once what it learned is a number; ``None``: it stays as it is."""
    if node.target not in _BY_NUMBERS or overwritten_by(node) is not None:
        return None
    target, before, commutes = _BY_NUMBERS[node.target]
    for data, learned in (node.args[:2], node.args[1::-1])[: 1 + commutes]:
        if not (isinstance(data, Node) and is_constant(learned)) or is_constant(data):
            continue
        meta, value = recorded(data), folded_value(model, cast(Node, learned))
        if meta is None or meta.dtype != torch.float32 or value.numel() != 1:
            continue
        if is_same_shape(meta.shape, shape_of(node)):
            return target, (data, *before, float(value)), {}
    return None


def recorded(node: Node) -> Tensor | None:
    """What capture recorded for a tensor; observers hand it on."""
    while node.op == "call_module":
        node = node.all_input_nodes[0]
    return tensor_meta(node)


_BY_NUMBERS: dict[Any, tuple[Any, tuple[None, ...], bool]] = {
    aten.maximum.default: (aten.clamp.default, (), True),
    aten.minimum.default: (aten.clamp.default, (None,), True),
    aten.pow.Tensor_Tensor: (aten.pow.Tensor_Scalar, (), False),
}
"""Ops of two tensors: what they are with a number, what stands before it, whether either is it."""


def _is_probe(node: Node) -> bool:
    return any(user.target == MODE_NAME for user in node.users)


def origin_of(node: Node) -> Node:
    """The tensor that ``node`` is once dropouts are gone."""
    while node.target in DROPOUTS:
        node = cast(Node, node.args[0])
    return node


def planned_tensor(node: Node) -> Node:
    """The node by whose name plans and statistics know a tensor: the layer of a folded norm."""
    return cast(Node, node.args[0]) if node.target is normalize else node


def dropouts_behind(rounded: Node) -> Iterator[Node]:
    """Dropouts of a tensor that is not rounded again behind them: there, too, it is the plan's."""
    for user in rounded.users:
        again = any(after.op == "call_module" for after in user.users)
        if user.target in DROPOUTS and not again:
            yield user
            yield from dropouts_behind(user)


def _set_training(node: Node, *, training: bool) -> None:
    for i, parameter in enumerate(cast(Any, node.target)._schema.arguments):
        if parameter.name in ("train", "training"):
            set_argument(node, i, parameter.name, training)


def read_constants_late(model: GraphModule) -> None:
    """Let every op read its parameters right before it runs.

    torchao observes a parameter where it is read; a bias is rounded with the scales of its op's
    input and weight, so it has to come after both, and is read again for each op. All else is read
    once: ``constant_fold`` of torchao takes a parameter away with the first reading that is
    rounded.
    """
    moved = set[Node]()
    for node in list(model.graph.nodes):
        rule = rule_of(node) if FOLDED_KEY not in node.meta else None
        match = None if rule is None else rule.match(rule, node)
        bias = None if match is None or isinstance(match, str) else match.bias
        for source in node.all_input_nodes:
            if source.op != "get_attr":
                continue
            if bias is not None and source is bias:
                with model.graph.inserting_before(node):
                    late = model.graph.node_copy(source)
                node.replace_input_with(source, late)
            elif source not in moved:
                node.prepend(source)
                moved.add(source)
    for node in reversed(list(model.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)


# ---------------------------------------------------------------------------------------------
# After annotation
# ---------------------------------------------------------------------------------------------


def insert_normalization(model: GraphModule) -> dict[Node, tuple[Node, Node]]:
    """Put :func:`normalize` behind every folded layer.

    Returns:
        ``(layer, folded bias)`` of every such call, also of earlier ones; whoever annotates the
        graph has to move the annotation of the layer's output to the call.
    """
    for layer in list(model.graph.nodes):
        norm = layer.meta.pop(_BATCH_NORM_KEY, None)
        if norm is None:
            continue
        users, (folded_bias, rest) = list(layer.users), norm
        # Annotations belong to pairs of nodes: what is not to be rounded is a node of its own.
        with model.graph.inserting_before(layer):
            exact = model.graph.node_copy(folded_bias)
        with model.graph.inserting_after(layer):
            call = model.graph.call_function(normalize, (layer, folded_bias, exact, *rest))
        call.meta = {
            key: layer.meta[key] for key in ("val", "nn_module_stack") if key in layer.meta
        }
        for user in users:
            user.replace_input_with(layer, call)
    return {
        call: (cast(Node, call.args[0]), cast(Node, call.args[1]))
        for call in model.graph.nodes
        if call.target is normalize
    }


# ---------------------------------------------------------------------------------------------
# At conversion
# ---------------------------------------------------------------------------------------------


def fold_for_good(model: GraphModule) -> None:
    """Replace folded weights and biases by constants, as the running statistics make them.

    Raises:
        ConversionError: the graph is in training mode.
    """
    if not model.meta.pop(_TRAINED_KEY, False):
        return
    for node in list(model.graph.nodes):
        if _is_probe(node):
            continue
        if is_training_call(node) or (draws_numbers(node) and training_switches(node)):
            known = node.target in _SWITCHED_BY_TORCHAO
            call = "torchao.quantization.pt2e.move_exported_model_to_eval(prepared)"
            if not known:
                call = "custom_quantizer.qat.evaluation_mode(prepared), as torchao leaves it so,"
            raise ConversionError(
                f"{describe(node)} is in training mode; call {call} before convert_pt2e"
            )
        if node.target not in DROPOUTS:
            continue
        node.replace_all_uses_with(cast(Node, node.args[0]))
        model.graph.erase_node(node)
    for node in model.graph.nodes:
        _become(node, _as_shipped(model, node))
    for node in model.graph.nodes:
        node.meta.pop(FOLDED_KEY, None)
    stale: list[Node] = []
    for node in list(model.graph.nodes):
        if node.target is normalize:
            node.replace_all_uses_with(cast(Node, node.args[0]))
            model.graph.erase_node(node)
    for node in list(model.graph.nodes):
        if node.target in (scale_channels, fold_bias):
            reads = node.all_input_nodes
            source = next(filter(is_constant, reads), reads[0])
            constant = add_constant(model, f"{source.target}_folded", _evaluate(model, node), node)
            constant.meta.update(
                {key: value for key, value in node.meta.items() if key not in ("val", FOLDED_KEY)}
            )
            node.replace_all_uses_with(constant)
            stale.append(node)
    for node in model.graph.nodes:
        if node.target is fold_factor or node.target == MODE_NAME:
            stale.append(node)
        if node.target == MODE_NAME:
            stale.extend(
                itertools.chain(node.all_input_nodes, node.all_input_nodes[0].all_input_nodes)
            )
    # Users come after what they use.
    order = {node: i for i, node in enumerate(model.graph.nodes)}
    for node in sorted(dict.fromkeys(stale), key=order.__getitem__, reverse=True):
        if not node.users:
            model.graph.erase_node(node)
    fold_constants(model)


def folded_value(model: GraphModule, node: Node) -> Tensor:
    """A parameter, or a function of parameters with the running statistics."""
    return constant_of(model, node) if node.op == "get_attr" else _evaluate(model, node)


def _evaluate(model: GraphModule, node: Node) -> Tensor:
    """The value of a function of parameters, with the running statistics."""

    def value(arg: Node) -> Any:
        return False if arg.target == MODE_NAME else folded_value(model, arg)

    args, kwargs = cast(Any, torch.fx.node.map_arg((node.args, node.kwargs), value))
    with torch.no_grad():
        return cast(Tensor, cast(Callable[..., Any], node.target)(*args, **kwargs))


# ---------------------------------------------------------------------------------------------
# The other way
# ---------------------------------------------------------------------------------------------


def is_foldable_parameter(node: Node) -> bool:
    """Whether a weight or bias is a parameter, or one that a batch norm was folded into."""
    if node.target is scale_channels:
        return cast(Node, node.args[0]).op == "get_attr"
    if node.target is fold_bias:
        return cast(Node, node.args[3]).op == "get_attr"
    return node.op == "get_attr"


def put_folded(model: GraphModule, node: Node, value: Tensor) -> None:
    """Give a layer the weight or bias whose folded form is ``value``, up to float rounding.

    Of a bias the running mean of the batch norm takes up what is new. In training the statistics of
    the batch come in its place: had a parameter taken it up, it would be there twice.

    Args:
        model: a graph in this form.
        node: of which :func:`is_foldable_parameter` is true.
        value: of the parameter's shape.
    """
    if node.target is scale_channels:
        weight, factor, axis, groups = cast("tuple[Node, Node, int, int]", node.args)
        inverse = 1 / folded_value(model, factor).double()
        _put(model, weight, scale_channels(value.double(), inverse, axis, groups))
        return
    if node.target is not fold_bias:
        _put(model, node, value)
        return
    factor, mean = cast("tuple[Node, Node]", (node.args[1], node.args[3]))
    wide = folded_value(model, factor).double()
    for _ in range(_REFINEMENTS):
        missing = value.double() - folded_value(model, node).double()
        _put(model, mean, folded_value(model, mean).double() - missing / wide)


def _put(model: GraphModule, node: Node, value: Tensor) -> None:
    with torch.no_grad():
        operator.attrgetter(str(node.target))(model).copy_(value)


def is_training_call(node: Node) -> bool:
    """Whether an aten call behaves as it does in training: batch norms, dropouts of all kinds.

    A batch norm that keeps no statistics does the same in both modes.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or uses_own_statistics(node):
        return False
    return any(
        parameter.name in ("train", "training") and argument(node, i, parameter.name) is True
        for i, parameter in enumerate(node.target._schema.arguments)
    )


def norms_that_stand_still(model: GraphModule) -> list[Node]:
    """Batch norms whose running statistics no training moves: those with a momentum of 0.

    ``momentum=None``, a mean over all batches, is captured so in evaluation mode: how many batches
    there were is not in the graph.
    """
    return [
        node
        for node in model.graph.nodes
        if node.target is aten.batch_norm.default
        and not uses_own_statistics(node)
        and argument(node, 6, "momentum") == 0
    ]


def switch_calls(model: GraphModule, training: bool) -> None:
    """Move calls between training and evaluation that torchao leaves as they were captured.

    These are dropouts of whole channels and of other distributions, and what drops inside of
    attention, recurrent layers and randomized activations. What was captured in evaluation stays
    so, except for dropouts, which say how much they drop all the same.
    """
    for node in model.graph.nodes:
        if node.target in _SWITCHED_BY_TORCHAO or uses_own_statistics(node):
            continue
        held = node.meta.setdefault(_TRAINING_KEY, {})
        for i, name, value in training_switches(node):
            if value and not training:
                held[name] = value
                set_argument(node, i, name, type(value)(0))
            elif training and (name in held or node.target in DROPOUTS):
                set_argument(node, i, name, held.get(name, True))


def training_mode_of(prepared: GraphModule) -> TrainingMode | None:
    """The module that decides which statistics folded batch norms use; ``None``: there are none.

    Raises:
        CaptureError: ``prepared`` is no graph.
    """
    if not isinstance(prepared, GraphModule):
        raise CaptureError(f"expected what prepare_qat_pt2e returns, got {type(prepared).__name__}")
    found = getattr(prepared, MODE_NAME, None)
    return found if isinstance(found, TrainingMode) else None
