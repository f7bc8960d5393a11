"""ExecuTorch's passes over a delegate, without those that find nothing to do in it.

Before it writes a delegate, ExecuTorch (1.5.1) applies seventeen passes to it, of which fifteen
trace the whole graph again whether they changed it or not: about a third of the time of a lowering.
A pass that meets none of the ops it is for is left out here. There is no seam to say so, so the
class that applies the passes is exchanged while a program is lowered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from executorch.backends.xnnpack import _passes, xnnpack_preprocess
from torch.export import ExportedProgram
from torch.fx import Node

from custom_quantizer.core.graph import tensor_meta
from custom_quantizer.core.threads import exclusive

__all__ = ["QuickPassManager", "quick_passes"]


def _calls(*names: str) -> Callable[[Node], bool]:
    """Whether a node calls an op whose name has one of these parts."""
    return lambda node: any(name in str(node.target) for name in names)


def _convolves_signals(node: Node) -> bool:
    meta = tensor_meta(node)
    return "convolution" in str(node.target) and (meta is None or meta.dim() == 3)


def _reads_constants_only(node: Node) -> bool:
    return all(source.op == "get_attr" for source in node.all_input_nodes)


def _any_call(_node: Node) -> bool:
    return True


CHANGES: Mapping[str, Callable[[Node], bool]] = {
    "ConstPropPass": _reads_constants_only,
    "Conv1dUnsqueezePass": _convolves_signals,
    "ConvertToLinearPass": _calls("mm."),
    "ConvertToSDPAPass": _calls("softmax"),
    "ConvertToUpsampleBilinear2d": _calls("index", "upsample"),
    "DecomposeBatchNorm": _calls("batch_norm"),
    "DecomposeConcatenate": _calls("cat."),
    "DimOrderOpsRevertPass": _calls("dim_order"),
    "FuseBatchNormPass": _calls("batch_norm"),
    "PReLUReshapePass": _calls("prelu"),
    "RemoveGetItemPass": _calls("max_pool2d", "max."),
    "RemoveRedundantCopyPass": _calls("_to_copy"),
}
"""By pass, which calls it may change. Passes that are not here always run."""


class QuickPassManager(_passes.XNNPACKPassManager):  # type: ignore[misc]  # ExecuTorch is untyped
    """Upstream's passes in their order, but for those that would change nothing."""

    def transform(self) -> ExportedProgram:
        """Apply them."""
        program: ExportedProgram = self.exported_program
        for kind in self.passes:
            changes = CHANGES.get(kind.__name__, _any_call)
            if any(changes(node) for node in program.graph.nodes if node.op == "call_function"):
                program = _passes.XNNPACKPassManager(program, [kind]).transform()
        return program


@contextmanager
def quick_passes() -> Iterator[None]:
    """Let delegates be written with :class:`QuickPassManager`."""
    with exclusive():
        upstream: Any = xnnpack_preprocess.XNNPACKPassManager
        xnnpack_preprocess.XNNPACKPassManager = QuickPassManager
        try:
            yield
        finally:
            xnnpack_preprocess.XNNPACKPassManager = upstream
