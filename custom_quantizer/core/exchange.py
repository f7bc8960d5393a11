"""Something of upstream's, exchanged for a while, where upstream has no seam for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from custom_quantizer.core.threads import exclusive

__all__ = ["exchanged"]


@contextmanager
def exchanged(owner: Any, name: str, substitute: Any) -> Iterator[None]:
    """Let an attribute of a module, class or object be something else in this block.

    Other threads that use this package wait. What is exchanged was read in one version of upstream,
    and each use has a test that fails with another.
    """
    with exclusive():
        upstream = getattr(owner, name)
        setattr(owner, name, substitute)
        try:
            yield
        finally:
            setattr(owner, name, upstream)
