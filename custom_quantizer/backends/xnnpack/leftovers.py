"""What PyTorch and ExecuTorch would keep of every program that was lowered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from executorch.exir.backend.utils import is_same_node
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["programs_forgotten"]


@contextmanager
def programs_forgotten() -> Iterator[None]:
    """Let go, in the end, of delegates in caches that live as long as the process.

    They hold the weights.

    torch 2.15 knows what calls give of fake values by their arguments, of which a call of a
    delegate has the delegate; executorch 1.5 knows which nodes it has compared. There is no public
    way to one entry of the first: all others, which make the next capture quick, stay.
    """
    try:
        yield
    finally:
        is_same_node.cache_clear()
        known = FakeTensorMode.cache
        for call in list(known):
            if any(isinstance(part, LoweredBackendModule) for part in call.key):
                known.pop(call, None)
