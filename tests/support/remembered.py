"""What upstream computes anew in every call, and a run of all tests only once.

Of torch 2.15 and torchao 0.18; the results are those of upstream's own functions.
"""

from __future__ import annotations

import copy
import sys
from functools import cache
from typing import Any

import torch
import torch._export.utils
import torchao.quantization.pt2e.utils

__all__ = ["OF_UPSTREAM", "composite_ops", "training_patterns"]

OF_UPSTREAM = (
    torch._export.utils._collect_all_valid_cia_ops_for_namespace,
    torchao.quantization.pt2e.utils._get_aten_graph_module_for_pattern,
)
"""The functions themselves, for the test that compares what they give with what is remembered."""


def composite_ops() -> None:
    """Spare every lowering a sixth of its time: to list the composite ops of each library.

    PyTorch lists them three times in every lowering, as a library may have registered more by then;
    here they are listed again when one may have: something was registered or imported since.
    """
    listed = OF_UPSTREAM[0]

    @cache
    def remembered(namespace: Any, *_registered: int) -> Any:
        return listed(namespace)

    def composite_ops(namespace: Any) -> Any:
        library = torch.library
        return remembered(namespace, len(library._impls), len(library._defs), len(sys.modules))

    torch._export.utils._collect_all_valid_cia_ops_for_namespace = composite_ops


def training_patterns() -> None:
    """Spare every move between training and evaluation half a second.

    It captures a dropout and a batch norm in both modes, which are always the same.
    """
    capture = OF_UPSTREAM[1]
    known: dict[Any, Any] = {}

    def pattern_graph(pattern: Any, inputs: tuple[Any, ...], *device: bool, **kwargs: Any) -> Any:
        function = getattr(pattern, "fn", None)
        if function is None or kwargs:
            return capture(pattern, inputs, *device, **kwargs)
        closure = tuple(cell.cell_contents for cell in function.__closure__ or ())
        key = (function.__code__, closure, device, tuple(x.shape for x in inputs))
        if key not in known:
            known[key] = capture(pattern, inputs, *device)
        return copy.deepcopy(known[key])

    torchao.quantization.pt2e.utils._get_aten_graph_module_for_pattern = pattern_graph
