"""What PyTorch runs below a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Dispatched"]


class Dispatched(TorchDispatchMode):
    """Names of the ops that are run, and dtype and shape of the tensors that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.results: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.results.append((result.dtype, tuple(result.shape)))
        return result
