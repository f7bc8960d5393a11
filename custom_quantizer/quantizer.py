"""``IntegerQuantizer``: applies a plan to a captured graph, as torchao's PT2E flow asks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    EdgeOrNode,
    QuantizationAnnotation,
    QuantizationConfig,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
    SharedQuantizationSpec,
)

from custom_quantizer.canonical import canonicalize
from custom_quantizer.config import Config, Rule, Scope, operator_names
from custom_quantizer.config_file import dump_config, load_config
from custom_quantizer.errors import CaptureError, ConfigError
from custom_quantizer.graph import argument, describe, is_dequantize, is_quantize
from custom_quantizer.observers import META_KEY, ActivationObserver, BiasObserver, WeightObserver
from custom_quantizer.planner import Edge, Plan, make_plan
from custom_quantizer.schemes import OpScheme, TensorScheme, activation_scheme, coerce_scheme

__all__ = ["IntegerQuantizer"]

ANNOTATION_KEY = "quantization_annotation"
"""Where torchao's ``prepare_pt2e`` looks for annotations (``Q_ANNOTATION_KEY``)."""

SchemeLike: TypeAlias = str | OpScheme | QuantizationConfig | None


class IntegerQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates captured aten graphs with integer schemes, set per op.

    Setters return the quantizer, so calls chain. Every setter takes a scheme name (``"a8w8"``),
    an :class:`~custom_quantizer.schemes.OpScheme`, a torchao ``QuantizationConfig``, or ``None``
    for "leave it in float". A more specific scope wins (node name, module name, module type,
    operator type, global); within a scope, the later call.

    Example::

        quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("head", None)
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
        ...  # calibrate
        converted = convert_pt2e(prepared)
    """

    def __init__(self) -> None:
        super().__init__()
        self._config = Config()
        self._plan: Plan | None = None

    @classmethod
    def from_config(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> IntegerQuantizer:
        """Make a quantizer from a YAML or JSON file, or from what :meth:`to_config` returns.

        Raises:
            ConfigError: the file says something that is not legal; file, line and column are named.
            InputError: the file cannot be read.
        """
        quantizer = cls()
        quantizer._config = load_config(source)
        return quantizer

    def to_config(self) -> dict[str, Any]:
        """The rules as plain data, which :meth:`from_config` turns into an equal quantizer.

        Raises:
            ConfigError: there is a filter function, or a scheme without a name.
        """
        return dump_config(self._config)

    # -- setters ------------------------------------------------------------------------------

    def set_global(self, scheme: SchemeLike) -> IntegerQuantizer:
        """Set the scheme of all ops that no other rule selects."""
        return self._add(Scope.GLOBAL, "", scheme)

    def set_operator_type(self, operator_type: Any, scheme: SchemeLike) -> IntegerQuantizer:
        """Set the scheme of every call of an aten overload, such as ``aten.linear.default``.

        Raises:
            ConfigError: no op family knows the overload; the nearest ones are named.
        """
        for name in operator_names(operator_type):
            self._add(Scope.OPERATOR_TYPE, name, scheme)
        return self

    def set_module_type(
        self, module_type: type[torch.nn.Module] | str, scheme: SchemeLike
    ) -> IntegerQuantizer:
        """Set the scheme of ops captured inside modules of a type (or its qualified name)."""
        if isinstance(module_type, type):
            module_type = f"{module_type.__module__}.{module_type.__qualname__}"
        return self._add(Scope.MODULE_TYPE, module_type, scheme)

    def set_module_name(self, module_name: str, scheme: SchemeLike) -> IntegerQuantizer:
        """Set the scheme of ops inside a module; globs select several (``"layer3.*"``)."""
        return self._add(Scope.MODULE_NAME, module_name, scheme)

    def set_node_name(self, node_name: str, scheme: SchemeLike) -> IntegerQuantizer:
        """Set the scheme of one node of the captured graph; globs select several."""
        return self._add(Scope.NODE_NAME, node_name, scheme)

    def set_filter_function(self, filter_function: Callable[[Node], bool]) -> IntegerQuantizer:
        """Leave every node in float for which ``filter_function`` is false."""
        if not callable(filter_function):
            raise ConfigError(f"a filter function is called with a node; got {filter_function!r}")
        self._config.filter_function = filter_function
        return self

    def set_io(
        self,
        inputs: str | TensorScheme | Mapping[str, str | TensorScheme] | None = None,
        outputs: str | TensorScheme | Mapping[str, str | TensorScheme] | None = None,
    ) -> IntegerQuantizer:
        """Set the format of the model's inputs and outputs.

        An input is quantized to its format first, whatever its consumers want; an output is
        requantized to its format last.

        Args:
            inputs: a format (``"a8"``, ``"a16"``) for all inputs, or one for each input name.
            outputs: likewise, by position: ``{"0": "a16"}``.
        """
        for given, target in ((inputs, self._config.inputs), (outputs, self._config.outputs)):
            if given is None:
                continue
            formats = given if isinstance(given, Mapping) else {"*": given}
            target.update({str(name): activation_scheme(fmt) for name, fmt in formats.items()})
        return self

    def _add(self, scope: Scope, key: str, scheme: SchemeLike) -> IntegerQuantizer:
        if not isinstance(key, str) or (scope is not Scope.GLOBAL and not key):
            raise ConfigError(f"{scope.setter} takes a name, got {key!r}")
        self._config.rules.append(Rule(scope, key, coerce_scheme(scheme)))
        return self

    # -- planning -----------------------------------------------------------------------------

    @property
    def last_plan(self) -> Plan:
        """The plan of the last graph that was prepared.

        Raises:
            ConfigError: none was prepared yet.
        """
        if self._plan is None:
            raise ConfigError("nothing was prepared yet: call plan(exported) or prepare_pt2e first")
        return self._plan

    def plan(self, exported: torch.export.ExportedProgram | GraphModule) -> Plan:
        """Show what would become of every op, without calibrating; changes nothing.

        Args:
            exported: an ``ExportedProgram``, or what its ``.module()`` returns.

        Raises:
            CaptureError: it is neither, or was captured in training mode.
            ConfigError: a rule names something that does not exist, or no rule selects anything.
        """
        if isinstance(exported, torch.export.ExportedProgram):
            model = exported.module()
            _check_captured(model)
        else:
            _check_captured(exported)
            model = copy.deepcopy(exported)
        prepare_pt2e(model, self)
        return self.last_plan

    # -- what prepare_pt2e calls --------------------------------------------------------------

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Make in-place ops functional and numbers tensors, so that they can be annotated."""
        _check_captured(model)
        return canonicalize(model)

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan's annotations into the graph.

        Raises:
            ConfigError: a rule names something that does not exist, or no rule selects anything.
        """
        plan = make_plan(model, self._config)
        self._plan = plan
        if not plan.quantized:
            raise ConfigError(_nothing_to_quantize(plan))
        _apply(plan, model)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the plan is legal by construction."""


def _nothing_to_quantize(plan: Plan) -> str:
    if not plan.ops:
        return "there is nothing to quantize: the graph has no ops"
    reasons = dict.fromkeys(f"{op.node}: {op.reason}" for op in plan.ops)
    shown = "; ".join(list(reasons)[:5])
    return (
        f"there is nothing to quantize in the graph; set_global('a8w8') selects all ops ({shown})"
    )


def _check_captured(model: object) -> None:
    """Refuse what is not an exported, eval-mode, real floating-point graph."""
    if not isinstance(model, GraphModule):
        raise CaptureError(
            f"expected a captured graph, got {type(model).__name__}: hand in "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    targets = [node.target for node in model.graph.nodes if node.op == "call_function"]
    modules = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    if any(name.startswith("activation_post_process") for name in modules):
        raise CaptureError(
            "the graph already has observers: it was prepared before; hand in a fresh "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    if any(name != "_guards_fn" for name in modules):
        raise CaptureError(
            "the graph calls modules, so it was traced with torch.fx; capture it with "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    if targets and not any(isinstance(target, torch._ops.OpOverload) for target in targets):
        raise CaptureError(
            "the graph calls Python functions instead of aten ops; capture it with "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    for node in model.graph.nodes:
        _check_node(node)


def _check_node(node: Node) -> None:
    value = node.meta.get("val")
    if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_complex():
        raise CaptureError(f"input {node.name} is {value.dtype}; complex numbers have no integers")
    if is_quantize(node) or is_dequantize(node):
        raise CaptureError(
            f"the graph is already quantized ({describe(node)}); hand in the float graph that "
            "torch.export.export(model.eval(), example_inputs).module() returns"
        )
    if _is_training(node):
        raise CaptureError(
            f"{describe(node)} was captured in training mode; call model.eval() before "
            "torch.export.export"
        )


def _is_training(node: Node) -> bool:
    """Whether a call behaves as it does in training: batch norms, dropouts of all kinds."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # prepare_pt2e has folded such a batch norm by now; what counted its batches is left.
    written = node.args[0] if node.args and node.target is torch.ops.aten.add_.Tensor else None
    if isinstance(written, Node) and str(written.target).endswith("num_batches_tracked"):
        return True
    return any(
        parameter.name in ("train", "training") and argument(node, i, parameter.name) is True
        for i, parameter in enumerate(node.target._schema.arguments)
    )


class _Specs:
    """torchao specs for the edges of a plan: one real spec per group, the rest share it."""

    def __init__(self) -> None:
        self._first: dict[int, EdgeOrNode] = {}

    def spec(self, edge: Edge, where: EdgeOrNode) -> QuantizationSpecBase:
        if edge.group in self._first:
            return SharedQuantizationSpec(self._first[edge.group])
        self._first[edge.group] = where
        if edge.kind == "bias":
            fmt = edge.bias
            if fmt is None:
                raise ConfigError(f"{edge.name}: the plan has a bias edge without a format")
            return QuantizationSpec(
                dtype=torch.int32,
                observer_or_fake_quant_ctr=BiasObserver.with_args(name=edge.name),
                quant_min=fmt.quant_min,
                quant_max=fmt.quant_max,
            )
        scheme = cast(TensorScheme, edge.scheme)
        constructor = (
            WeightObserver.with_args(scheme=scheme, axis=edge.axis, name=edge.name)
            if edge.kind == "weight"
            else ActivationObserver.with_args(scheme=scheme, name=edge.name)
        )
        return QuantizationSpec(
            dtype=scheme.format.storage_dtype,
            observer_or_fake_quant_ctr=constructor,
            quant_min=scheme.format.quant_min,
            quant_max=scheme.format.quant_max,
            qscheme=torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine,
            is_dynamic=edge.dynamic,
        )


def _apply(plan: Plan, model: GraphModule) -> None:
    """Annotate every node, in graph order: the first edge of a group carries the spec.

    ``prepare_pt2e`` creates observers in this same order, so what is shared always exists.
    """
    specs = _Specs()
    by_anchor = {op.node: op for op in plan.ops}
    for node in model.graph.nodes:
        if node.name in by_anchor:
            op = by_anchor[node.name]
            node.meta[META_KEY] = {"scheme": op.scheme, "reason": op.reason}
        annotation = plan.annotations.get(node.name)
        if annotation is None:
            continue
        sources = {source.name: source for source in node.all_input_nodes}
        inputs = {
            sources[name]: specs.spec(edge, (sources[name], node))
            for name, edge in annotation.inputs.items()
        }
        output = specs.spec(annotation.output, node) if annotation.output is not None else None
        node.meta[ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=inputs,
            output_qspec=output,
            # The plan already says who shares; implicit sharing would merge distinct biases.
            allow_implicit_sharing=False,
            _annotated=True,
        )
