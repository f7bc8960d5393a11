"""ExecuTorch's passes over a delegate, without tracing the graph again for each.

Before it writes a delegate, ExecuTorch (1.5.1) applies seventeen passes to it, of which fifteen
trace the whole graph again whether they changed it or not: about a third of the time of a lowering.
A pass that meets none of the ops it is for is left out here; and of those that rewrite the graph in
place, and trace it to tell what new calls return, only the new calls are computed. There is no seam
to say so, so the class that applies the passes is exchanged while a program is lowered: of the
ExecuTorch whose passes were read (:func:`passes_known`), and of no other.

To write the program it computes all of each delegate once more, for the shapes of its outputs,
which are known (:func:`outputs_known`); and to write a delegate it evaluates the type hints of a
class for each field of each object, which are as many times the same.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any, cast

import torch
import torch.utils._pytree as pytree
from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from executorch.exir import EdgeProgramManager
from executorch.exir._serialize import _dataclass
from executorch.exir.dialects._ops import ops
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.pass_base import ExportPass
from executorch.exir.program import _program
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from custom_quantizer.backends.xnnpack.signature import remember_constants
from custom_quantizer.core.exchange import exchanged
from custom_quantizer.core.graph import are_static, tensor_meta

__all__ = ["QuickPassManager", "outputs_known", "passes_known", "quick_passes", "returned"]

_READ = "1.5.1"


def passes_known() -> bool:
    """Whether the passes of the installed ExecuTorch are those described here."""
    return version("executorch").partition("+")[0] == _READ


def _calls(*names: str) -> Callable[[Node], bool]:
    """Whether a node calls an op whose name has one of these parts."""
    return lambda node: any(name in str(node.target) for name in names)


def _convolves_signals(node: Node) -> bool:
    meta = tensor_meta(node)
    return "convolution" in str(node.target) and (meta is None or meta.dim() == 3)


def _reads_constants_only(node: Node) -> bool:
    return all(source.op == "get_attr" for source in node.all_input_nodes)


def _joins_many(node: Node) -> bool:
    """XNNPACK joins up to five tensors at once."""
    return "cat." in str(node.target) and len(cast("list[Node]", node.args[0])) > 5


def _weighs_scaled(node: Node) -> bool:
    """Whether a softmax can be that of an attention, which scales queries and keys by a number."""
    scaled = ops.edge.aten.mul.Scalar
    return "softmax" in str(node.target) and bool(
        node.graph.find_nodes(op="call_function", target=scaled, sort=False)
    )


def _any_call(_node: Node) -> bool:
    return True


CHANGES: Mapping[str, Callable[[Node], bool]] = {
    "ConstPropPass": _reads_constants_only,
    "Conv1dUnsqueezePass": _convolves_signals,
    "ConvertToLinearPass": _calls("mm."),
    "ConvertToSDPAPass": _weighs_scaled,
    "ConvertToUpsampleBilinear2d": _calls("index"),  # of which it is made, where it is not whole
    "DecomposeBatchNorm": _calls("batch_norm"),
    "DecomposeConcatenate": _joins_many,
    "DimOrderOpsRevertPass": _calls("dim_order"),
    "FuseBatchNormPass": _calls("batch_norm"),
    "PReLUReshapePass": _calls("prelu"),
    "RemoveGetItemPass": _calls("max_pool2d", ".max."),
    "RemoveRedundantCopyPass": _calls("_to_copy"),
}
"""By pass, which calls it may change. Passes that are not here always run."""


IN_PLACE = frozenset(
    (
        "ChannelsLastTaggedReshapePass",
        "ConvertToLinearPass",
        "ConvertToSDPAPass",
        "DecomposeConcatenate",
        "FuseActivationPass",
        "InsertPadQDQPass",
        "PropagateCustomMetaPass",
        "RemoveGetItemPass",
        "RemoveRedundantCopyPass",
        "XNNPACKRemoveCloneOpsTransform",
    )
)
"""Passes that change the graph they are given, and then let ``ExportPass.call`` trace it."""


class _Refreshed(ExportPass):  # type: ignore[misc]  # ExecuTorch is untyped
    """In the place of ``ExportPass`` behind a pass: tells what new calls return, and no others.

    The rest return what they did, but for strides, which the serializer does not read: the layout
    of a tensor is a tag of its node.
    """

    known: frozenset[Node]

    def call(self, module: GraphModule) -> PassResult:
        """Compute the fake values of new calls."""
        for node in module.graph.nodes:
            if node.op == "call_function" and node not in self.known:
                node.meta["val"] = returned(node)
        return PassResult(module, True)


def returned(node: Node) -> Any:
    """The fake value of a call, from those of its inputs."""
    args = map_arg(node.args, lambda source: source.meta["val"])
    kwargs = map_arg(node.kwargs, lambda source: source.meta["val"])
    mode = next(source.meta["val"].fake_mode for source in node.all_input_nodes)
    with mode:
        return cast(Any, node.target)(*args, **kwargs)


def _in_place(kind: type[Any], program: ExportedProgram) -> None:
    """Apply a pass of :data:`IN_PLACE`."""
    # Behind ``kind``, which calls it by super(), and before ``ExportPass``.
    quick = type(kind.__name__, (kind, _Refreshed), {})
    apply = quick(program) if issubclass(kind, _passes.XNNPACKPass) else quick()
    apply.known = frozenset(program.graph.nodes)
    apply.call(program.graph_module)


class QuickPassManager(_passes.XNNPACKPassManager):  # type: ignore[misc]  # ExecuTorch is untyped
    """Upstream's passes in their order, but for those that would change nothing."""

    def transform(self) -> ExportedProgram:
        """Apply them."""
        program: ExportedProgram = self.exported_program
        for kind in self.passes:
            name = kind.__name__
            changes = CHANGES.get(name, _any_call)
            if not any(changes(node) for node in program.graph.nodes if node.op == "call_function"):
                continue
            remember_constants(program)
            if name in IN_PLACE:
                _in_place(kind, program)
                # The signature names outputs, which the pass may have put others in the place of.
                module = program.graph_module
                program = _program._update_exported_program_graph_module(program, module)
            else:
                program = _passes.XNNPACKPassManager(program, [kind]).transform()
        remember_constants(program)
        return program


@contextmanager
def quick_passes() -> Iterator[None]:
    """Let delegates be written with :class:`QuickPassManager`, where it knows the passes."""
    if not passes_known():
        yield
        return
    # ``_DataclassEncoder`` evaluates the type hints of each class once.
    hints = functools.cache(typing.get_type_hints)
    with (
        exchanged(xnnpack_preprocess, "XNNPACKPassManager", QuickPassManager),
        exchanged(_dataclass, "get_type_hints", hints),
    ):
        yield


@contextmanager
def outputs_known(edge: EdgeProgramManager) -> Iterator[None]:
    """Let delegates of a partitioned program return the fake values that their graphs have.

    Of sizes that are dynamic, and of other layouts than the runtime's, all is computed: the values
    of a delegate's graph do not say everything of them.
    """
    with ExitStack() as stack:
        for module in (
            m for name in edge.methods for m in edge.exported_program(name).graph_module.modules()
        ):
            if isinstance(module, LoweredBackendModule) and passes_known():
                known = _Known.of(module.original_module)
                stack.enter_context(exchanged(module, "_original_exported_program", known))
        yield


class _Known:
    """A program whose ``module()`` computes nothing; all else is that of the program."""

    def __init__(self, program: ExportedProgram, outputs: list[torch.Tensor]) -> None:
        self._program = program
        self._outputs = outputs

    @classmethod
    def of(cls, program: ExportedProgram) -> _Known | ExportedProgram:
        """A program of which all outputs are known; if they are not, ``program``."""
        leaves = pytree.tree_leaves(program.graph.output_node().args)
        metas = [tensor_meta(leaf) if isinstance(leaf, Node) else None for leaf in leaves]
        # Delegates are called without autograd: their outputs require no gradients, which the
        # file says of each tensor.
        known = [meta.detach() for meta in metas if meta is not None and _is_plain(meta)]
        return cls(program, known) if len(known) == len(leaves) else program

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def module(self) -> Callable[..., Any]:
        """What returns the outputs, as fake values."""
        structure = self._program.call_spec.out_spec
        return lambda *_: pytree.tree_unflatten(self._outputs, structure)


def _is_plain(meta: torch.Tensor) -> bool:
    """Whether all sizes of a fake value are numbers, and it lies as they say."""
    return are_static(meta.shape) and meta.is_contiguous()
