"""``IntegerQuantizer``: applies a plan to a captured graph, as torchao's PT2E flow asks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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

from custom_quantizer.calibration.exponents import EXPONENT
from custom_quantizer.calibration.observers import (
    META_KEY,
    ActivationObserver,
    BiasObserver,
    WeightObserver,
    forget_models,
)
from custom_quantizer.config.file import dump_config, load_config
from custom_quantizer.config.improvement import check_accuracy, check_algorithms
from custom_quantizer.config.rules import Config, Rule, Scope, border_kind, operator_names
from custom_quantizer.core import borders
from custom_quantizer.core.bias import BiasLimits
from custom_quantizer.core.graph import (
    FLOAT_KEY,
    STATE_KEY,
    describe,
    detached_copy,
    is_dequantize,
    is_quantize,
    state_buffers,
    tensor_meta,
    what_wraps,
    why_lifted,
)
from custom_quantizer.core.names import record_names
from custom_quantizer.core.rewriting import IDLE_KEY, idle_calls
from custom_quantizer.core.schemes import OpScheme, TensorScheme, activation_scheme, coerce_scheme
from custom_quantizer.core.threads import tools
from custom_quantizer.errors import CaptureError, ConfigError
from custom_quantizer.ops.backend import Backend, BackendLike, get_backend
from custom_quantizer.ops.rewrites.batch_norms import is_counter
from custom_quantizer.ops.rewrites.canonical import canonicalize
from custom_quantizer.ops.rewrites.training_graph import (
    DROPOUTS,
    MODE_NAME,
    as_evaluated,
    fold_batch_norms,
    insert_normalization,
    is_training_call,
    norms_that_stand_still,
    origin_of,
)
from custom_quantizer.planning.drafts import ANNOTATED_BEFORE, is_annotated
from custom_quantizer.planning.insertion import ANNOTATION_KEY, insert_observers
from custom_quantizer.planning.plan import Derivation, Edge, Plan
from custom_quantizer.planning.planner import make_plan
from custom_quantizer.planning.torchao_patches import (
    compile_converted_once,
    finish_before_converting,
    fold_rightly,
    leave_state_alone,
    leave_weights_packed,
    prepares_for,
    prepares_for_training,
)
from custom_quantizer.training.fake_quantize import (
    ActivationFakeQuantize,
    BiasFakeQuantize,
    Slot,
    WeightFakeQuantize,
)

__all__ = ["IntegerQuantizer"]

logger = logging.getLogger(__name__)

SchemeLike: TypeAlias = str | OpScheme | QuantizationConfig | None
Format: TypeAlias = str | TensorScheme


class IntegerQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates captured aten graphs with integer schemes, set per op.

    Setters return the quantizer, so calls chain. Every setter takes a scheme name (``"a8w8"``), an
    :class:`~custom_quantizer.core.schemes.OpScheme`, a torchao ``QuantizationConfig``, or ``None``
    for "leave it in float". A more specific scope wins (node name, module name, module type,
    operator type, global); within a scope, the later call.

    Args:
        backend: what the program will run on, by name or value. ``None`` plans for pure integers,
            which no runtime's kernels limit: for :func:`~custom_quantizer.save_integers` and
            ``integer_reference(..., mode="fixed_point")``.

    Raises:
        ConfigError: there is no such backend.

    Example::

        quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("head", None)
        prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
        ...  # calibrate
        converted = convert_pt2e(prepared)
    """

    def __init__(self, backend: BackendLike = "xnnpack") -> None:
        super().__init__()
        self._backend = get_backend(backend)
        self._config = Config()
        self._plan: Plan | None = None
        self._shows_plan = False  # the plan is returned, with its warnings

    @classmethod
    def from_config(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any],
        backend: BackendLike = "xnnpack",
    ) -> IntegerQuantizer:
        """Make a quantizer from a YAML or JSON file, or from what :meth:`to_config` returns.

        Args:
            source: the file, or plain data.
            backend: as of the class; a file has rules only.

        Raises:
            ConfigError: the file says something that is not legal; file, line and column are named.
            InputError: the file cannot be read.
        """
        quantizer = cls(backend)
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
        inputs: Format | Mapping[str | int, Format | None] | None = None,
        outputs: Format | Mapping[str | int, Format | None] | None = None,
        *,
        integer: bool | str | None = None,
    ) -> IntegerQuantizer:
        """Set the format of the model's inputs and outputs.

        An input is quantized to its format first, whatever its consumers want; an output is
        requantized to its format last.

        With ``integer=True`` the program itself takes and returns integers in place of float32:
        int8, or int16 above 8 bits. Scale and zero point are in the report and in the program. An
        input without a format gets the widest one that its readers want. What is not float32, such
        as indices, stays as it is.

        Args:
            inputs: a format (``"a8"``, ``"a16"``) for all inputs, or one for each name or position
                of an input; ``None`` for what its readers want.
            outputs: likewise, by position: ``{0: "a16"}``.
            integer: for the inputs and outputs of this call, or all of them if it names none:
                ``True``, ``False`` (float32), or a dtype: ``"uint8"`` for int8 with 128 added, as
                images have it. ``None`` leaves it as it was.

        Raises:
            ConfigError: ``integer`` is something else.
            SchemeError: a format is none.

        Example::

            quantizer.set_io(integer=True)
            quantizer.set_io(inputs={"image": "a8"}, integer="uint8")
        """
        given = {"inputs": inputs, "outputs": outputs}
        for field, formats in given.items():
            if formats is None and (integer is None or any(v is not None for v in given.values())):
                continue
            named = formats if isinstance(formats, Mapping) else {"*": formats}
            wanted = {str(name): fmt for name, fmt in named.items()}
            getattr(self._config, field).update(
                {name: activation_scheme(f) for name, f in wanted.items() if f is not None}
            )
            if integer is not None:
                kind = border_kind(integer)
                getattr(self._config, f"integer_{field}").update(dict.fromkeys(wanted, kind))
        return self

    def _add(self, scope: Scope, key: str, scheme: SchemeLike) -> IntegerQuantizer:
        if not isinstance(key, str) or (scope is not Scope.GLOBAL and not key):
            raise ConfigError(f"{scope.setter} takes a name, got {key!r}")
        self._config.rules.append(Rule(scope, key, coerce_scheme(scheme)))
        return self

    def set_accuracy(
        self, accuracy: str | None = None, improve: Sequence[str] | None = None
    ) -> IntegerQuantizer:
        """Set what :func:`~custom_quantizer.quantize` does beyond rounding to nearest.

        It has no effect on ``prepare_pt2e`` alone: call :func:`~custom_quantizer.improve` then.

        Args:
            accuracy: ``"plain"``, ``"fast"`` or ``"best"``.
            improve: names of algorithms, instead of those that ``accuracy`` stands for.

        Raises:
            ConfigError: a name is none of these.
        """
        self._config.accuracy = None if accuracy is None else check_accuracy(accuracy)
        self._config.improve = None if improve is None else check_algorithms(improve)
        return self

    @property
    def backend(self) -> Backend:
        """What it plans for."""
        return self._backend

    @property
    def accuracy(self) -> str | None:
        """As set, or as a config file says."""
        return self._config.accuracy

    @property
    def improve(self) -> tuple[str, ...] | None:
        """Likewise: names of algorithms."""
        return self._config.improve

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
            model = detached_copy(exported)
        with tools():
            self._shows_plan = True
            try:
                prepare_pt2e(model, self)
            finally:
                self._shows_plan = False
            self.check_plan()
            return self.last_plan

    def check_plan(self) -> None:
        """Make sure that something is quantized.

        Raises:
            ConfigError: the last plan has nothing to quantize.
        """
        if not self.last_plan.annotations:
            raise ConfigError(_nothing_to_quantize(self.last_plan, self._config))

    # -- what prepare_pt2e calls --------------------------------------------------------------

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Make in-place ops functional and numbers tensors, so that they can be annotated.

        For ``prepare_qat_pt2e`` also fold batch norms into the layers before them.
        """
        training = prepares_for_training()
        _check_captured(model, training)
        if not training:  # what training leaves in buffers is trained
            held = {name: value.detach().clone() for name, value in state_buffers(model).items()}
            model.meta[STATE_KEY] = held
        idle = idle_calls(model)
        backend = self._backend
        model = canonicalize(
            model, backend.legalize, whole=backend.float_targets, training=training
        )
        model.meta[IDLE_KEY] = idle
        if training:
            if still := norms_that_stand_still(model):
                logger.warning(
                    "%s %s captured with momentum 0, as momentum=None is in evaluation mode: "
                    "training leaves the running statistics as they are, with which the network "
                    "ships; give the module a momentum (0.1) before torch.export.export",
                    ", ".join(map(describe, still)),
                    "was" if len(still) == 1 else "were",
                )
            fold_batch_norms(model, self._is_ours)
        return model

    def _is_ours(self, node: Node) -> bool:
        """Whether a layer is this quantizer's affair, rather than of another one beside it."""
        if prepares_for(self):
            return True
        rules = self._config.rules
        all_are = self._config.filter_function is None and any(
            rule.scope is Scope.GLOBAL and rule.scheme is not None for rule in rules
        )
        return all_are or self._config.resolve(node).scheme is not None

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write the plan's annotations into the graph, and log what it warns of.

        A graph in which rules for all ops find nothing stays as it is, with a warning.

        Raises:
            ConfigError: a rule names something that does not exist, or none selects anything.
        """
        training = prepares_for_training()
        with as_evaluated(model) if training else contextlib.nullcontext():
            plan = make_plan(model, self._config, self._backend, training=training)
        self._plan = plan
        for warning in () if self._shows_plan else plan.warnings:
            logger.warning("%s", warning)
        if not plan.annotations:
            if not _is_for_all(self._config):
                self.check_plan()
            logger.warning("%s", _nothing_to_quantize(plan, self._config))
            model.meta[FLOAT_KEY] = True
        _apply(plan, model, training, self._backend.limits)
        borders.mark(model, plan.integer_inputs, plan.integer_outputs)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: the plan is legal by construction."""

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, torch.nn.Module]
    ) -> None:
        """Insert the observers, so that torchao, which is slow at it, finds none to insert."""
        insert_observers(model, edge_or_node_to_obs_or_fq)
        forget_models()


fold_rightly(IntegerQuantizer)
leave_state_alone()
leave_weights_packed()
compile_converted_once()
finish_before_converting()


def _is_for_all(config: Config) -> bool:
    """Whether rules ask for all ops, and name none."""
    wanted = [rule for rule in config.rules if rule.scheme is not None]
    return bool(wanted) and all(rule.scope is Scope.GLOBAL for rule in wanted)


def _nothing_to_quantize(plan: Plan, config: Config) -> str:
    if not plan.ops:
        return "there is nothing to quantize: the graph has no ops"
    reasons = dict.fromkeys(f"{op.node}: {op.reason}" for op in plan.ops)
    shown = "; ".join(list(reasons)[:5])
    wanted = [rule for rule in config.rules if rule.scheme is not None]
    all_are = any(rule.scope is Scope.GLOBAL for rule in wanted)
    scheme = wanted[0].scheme.name if wanted and wanted[0].scheme is not None else "a8w8"
    if any(op.reason == ANNOTATED_BEFORE for op in plan.ops):
        hint = "; the first quantizer of a ComposableQuantizer that wants an op gets it"
    else:
        hint = "" if all_are else f"; set_global('{scheme}') selects all ops"
    return f"there is nothing to quantize in the graph{hint} ({shown})"


def _check_captured(model: object, training: bool = False) -> None:
    """Refuse what is not an exported, eval-mode, real floating-point graph."""
    if not isinstance(model, GraphModule):
        raise CaptureError(
            f"expected a captured graph, got {type(model).__name__}: hand in "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    if lifted := why_lifted(model):
        raise CaptureError(lifted)
    targets = [node.target for node in model.graph.nodes if node.op == "call_function"]
    modules = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    if any(name.startswith("activation_post_process") for name in modules):
        raise CaptureError(
            "the graph already has observers: it was prepared before; hand in a fresh "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    if set(modules) - {"_guards_fn", MODE_NAME}:
        raise CaptureError(
            "the graph calls modules, so it was traced with torch.fx; capture it with "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    if targets and not any(isinstance(target, torch._ops.OperatorBase) for target in targets):
        raise CaptureError(
            "the graph calls Python functions instead of aten ops; capture it with "
            "torch.export.export(model.eval(), example_inputs).module()"
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if wrapped := what_wraps(value):
            raise CaptureError(
                f"{name} is {wrapped}; hand in the float model: this quantizer chooses the "
                "integers of weights itself"
            )
    for node in model.graph.nodes:
        _check_node(node, training)


def _check_node(node: Node, training: bool) -> None:
    value = node.meta.get("val")
    if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_complex():
        raise CaptureError(f"input {node.name} is {value.dtype}; complex numbers have no integers")
    if is_quantize(node) or is_dequantize(node):
        raise CaptureError(
            f"the graph is already quantized ({describe(node)}); hand in the float graph that "
            "torch.export.export(model.eval(), example_inputs).module() returns"
        )
    if not training and _is_training(node):
        raise CaptureError(
            f"{describe(node)} was captured in training mode; call model.eval() before "
            "torch.export.export (or prepare_qat_pt2e, to train), and hand functions such as "
            "F.dropout training=self.training"
        )


def _is_training(node: Node) -> bool:
    """Whether a call behaves as it does in training: batch norms, dropouts of all kinds."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # prepare_pt2e has folded such a batch norm by now; what counted its batches is left.
    return is_counter(node) or is_training_call(node)


class _Specs:
    """torchao specs for the edges of a plan: one real spec per group, the rest share it.

    Args:
        training: with fake quantizers in the place of observers.
        limits: of biases.
    """

    def __init__(self, training: bool, limits: BiasLimits) -> None:
        self._training = training
        self._limits = limits
        self._first: dict[int, EdgeOrNode] = {}
        self._slots: dict[int, Slot] = defaultdict(Slot)

    def spec(self, edge: Edge, where: EdgeOrNode) -> QuantizationSpecBase:
        if edge.group in self._first:
            return SharedQuantizationSpec(self._first[edge.group])
        self._first[edge.group] = where
        maker = self._made_before(edge, where)
        if maker is not None:
            self._first[edge.group] = maker
            return SharedQuantizationSpec(maker)
        if edge.kind == "bias":
            fmt = edge.bias
            if fmt is None:
                raise ConfigError(f"{edge.name}: the plan has a bias edge without a format")
            return QuantizationSpec(
                dtype=torch.int32,
                observer_or_fake_quant_ctr=self._bias(edge),
                quant_min=fmt.quant_min,
                quant_max=fmt.quant_max,
            )
        scheme = cast(TensorScheme, edge.scheme)
        return QuantizationSpec(
            dtype=scheme.format.storage_dtype,
            observer_or_fake_quant_ctr=(
                self._weight(edge, scheme, where)
                if edge.kind == "weight"
                else self._activation(edge, scheme)
            ),
            quant_min=scheme.format.quant_min,
            quant_max=scheme.format.quant_max,
            qscheme=torch.per_tensor_symmetric if scheme.symmetric else torch.per_tensor_affine,
            is_dynamic=edge.dynamic,
        )

    def _made_before(self, edge: Edge, where: EdgeOrNode) -> Node | None:
        """The tensor of an edge, if an earlier quantizer gave it the same integers.

        A second observer would round what is rounded already, to a scale of its own.
        """
        if edge.kind != "activation" or self._training or not isinstance(where, tuple):
            return None
        scheme, (maker, _) = cast(TensorScheme, edge.scheme), where
        spec = maker.meta[ANNOTATION_KEY].output_qspec if is_annotated(maker) else None
        if edge.dynamic or not isinstance(spec, QuantizationSpec) or spec.is_dynamic:
            return None
        symmetric = spec.qscheme == torch.per_tensor_symmetric
        fmt = scheme.format
        same = (spec.dtype, spec.quant_min, spec.quant_max, symmetric) == (
            fmt.storage_dtype,
            fmt.quant_min,
            fmt.quant_max,
            scheme.symmetric,
        )
        return maker if same else None

    def _activation(self, edge: Edge, scheme: TensorScheme) -> Any:
        if not self._training:
            return ActivationObserver.with_args(scheme=scheme, name=edge.name, shared=edge.shared)
        slot = self._slots[edge.group]
        return ActivationFakeQuantize.with_args(
            scheme=scheme, name=edge.name, slot=slot, shared=edge.shared
        )

    def _weight(self, edge: Edge, scheme: TensorScheme, where: EdgeOrNode) -> Any:
        if not self._training:
            return WeightObserver.with_args(
                scheme=scheme, axis=edge.axis, name=edge.name, limits=self._limits
            )
        weight = tensor_meta(where[0] if isinstance(where, tuple) else where)
        return WeightFakeQuantize.with_args(
            scheme=scheme,
            axis=edge.axis,
            name=edge.name,
            slot=self._slots[edge.group],
            limits=self._limits,
            channels=1 if weight is None else int(weight.shape[edge.axis]),
        )

    def _bias(self, edge: Edge) -> Any:
        if not self._training:
            return BiasObserver.with_args(name=edge.name)
        derived = cast(Derivation, edge.derivation)
        return BiasFakeQuantize.with_args(
            name=edge.name,
            input_slot=self._slots[derived.input_group],
            weight_slot=self._slots[derived.weight_group],
            repeats=derived.repeats,
            input_bits=derived.input_bits,
        )


def _apply(plan: Plan, model: GraphModule, training: bool, limits: BiasLimits) -> None:
    """Annotate every node, in graph order: the first edge of a group carries the spec.

    ``prepare_pt2e`` creates observers in this same order, so what is shared always exists.
    """
    record_names(model.graph)
    norms = insert_normalization(model)
    layers = {layer for layer, _ in norms.values()}
    specs = _Specs(training, limits)
    by_anchor = {op.node: op for op in plan.parts}
    for node in model.graph.nodes:
        if node.name in by_anchor:
            op = by_anchor[node.name]
            if not is_annotated(node):
                node.meta[META_KEY] = {"scheme": op.scheme, "reason": op.reason}
        if node.name in plan.exponents:
            node.meta[EXPONENT] = plan.exponents[node.name]
        layer, bias = norms.get(node, (node, None))
        annotation = plan.annotations.get(layer.name)
        if annotation is None or (training and origin_of(node) is not node):
            continue
        if bias is None:
            origins = {s: origin_of(s) if training else s for s in node.all_input_nodes}
            names = {s: norms.get(o, (o,))[0].name for s, o in origins.items()}
            inputs = _input_specs(plan, specs, node, names)
        else:  # a batch norm sees the bias of its layer
            edge = annotation.inputs.get(bias.name)
            inputs = {} if edge is None else {bias: specs.spec(edge, (bias, node))}
        # The result of a layer with a batch norm is what leaves the batch norm.
        output = None
        if annotation.output is not None and node not in layers:
            output = specs.spec(annotation.output, node)
        if is_annotated(node):
            raise ConfigError(
                f"{describe(node)} is annotated by another quantizer before; in a "
                "ComposableQuantizer, call set_io on one of them"
            )
        node.meta[ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=inputs,
            output_qspec=output,
            # The plan already says who shares; implicit sharing would merge distinct biases.
            allow_implicit_sharing=False,
            _annotated=True,
        )


def _input_specs(
    plan: Plan, specs: _Specs, node: Node, names: dict[Node, str]
) -> dict[Node, QuantizationSpecBase]:
    """Specs of the inputs of ``node``; ``names`` says which tensor of the plan each of them is."""
    edges = plan.annotations[node.name].inputs
    inputs: dict[Node, QuantizationSpecBase] = {}
    for source, name in names.items():
        edge = edges.get(name)
        if edge is None:
            continue
        made = plan.annotations.get(name)
        rounded = made is not None and made.output is not None and made.output.group == edge.group
        # What was rounded before a dropout is not rounded again behind it.
        if source.target in DROPOUTS and name != source.name and rounded:
            continue
        inputs[source] = specs.spec(edge, (source, node))
    return inputs
