"""A second device, where there is none: who mixes its tensors with those of the CPU is told.

Tensors are all on the CPU. Which of them would be on the other device follows from how they came
to be: the given ones, what is computed from them, and what was made or moved with ``device=``
(the text ``"cpu"`` names the CPU; an object of ``torch.device``, the other one).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CROSSES = {"copy_", "__get__", "__set__", "is_set_to", "data_ptr", "item", "tolist", "__repr__"}
"""What may have tensors of two devices, or asks one of them for a property."""


class TwoDevices(TorchFunctionMode):
    """Raises AssertionError where an operation would fail on CUDA for its operands' devices.

    Tensors of no dimension on the CPU may go along with others, and so may indices on the CPU.

    Args:
        there: tensors on the other device.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}
        self.operations = 0
        for value in there:
            self._put(value)

    def _put(self, value: Tensor) -> None:
        # Held, so that no other storage gets its number.
        storage = value.untyped_storage()
        self._storages[storage._cdata] = storage

    def is_there(self, value: Tensor) -> bool:
        """Whether a tensor would be on the other device."""
        return value.untyped_storage()._cdata in self._storages

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).removesuffix(".default")
        values = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        result = func(*args, **kwargs)
        made = [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]
        if name == "cpu" or (name == "to" and isinstance(args[1], str) and args[1] == "cpu"):
            return result.clone()
        if name in ("to", "_to_copy") and any(
            isinstance(v, torch.device) for v in (*args[1:], *kwargs.values())
        ):
            result = result.clone()
            self._put(result)
            return result
        if not values:
            if kwargs.get("device") not in (None, "cpu"):
                assert kwargs.get("generator") is None, f"{name} draws with a generator of the CPU"
                for value in made:
                    self._put(value)
            return result
        there = [v for v in values if v.numel() and self.is_there(v)]
        if not there:
            return result
        self.operations += 1
        if name in _CROSSES:
            if name == "__get__":  # a view such as .T, or .data
                for value in made:
                    self._put(value)
            return result
        here = [v for v in values if v.numel() and not self.is_there(v)]
        if name in ("__getitem__", "index") and self.is_there(values[0]):
            here = []
        mixed = [v for v in here if v.dim() or name in ("stack", "cat", "gather")]
        assert not mixed, f"{name} mixes devices: {[tuple(v.shape) for v in mixed]} is on the CPU"
        in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        assert not (in_place and values[0] in here), f"{name} changes a tensor of the CPU"
        for value in made:
            self._put(value)
        return result
