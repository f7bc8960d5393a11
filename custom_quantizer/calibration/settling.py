"""What is decided as soon as no more data come: what stays float, and what shares a scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import GraphModule

from custom_quantizer.calibration.exponents import leave_coarse
from custom_quantizer.calibration.joins import share_scales, shared_scales

__all__ = ["settle_scales", "settled_scales"]


def settle_scales(prepared: GraphModule) -> None:
    """Decide what depends on all data, in place; once more changes nothing.

    Args:
        prepared: what ``prepare_pt2e`` returns, calibrated. Observers that saw nothing, or are
            frozen, stay.
    """
    leave_coarse(prepared)
    share_scales(prepared)


@contextmanager
def settled_scales(prepared: GraphModule) -> Iterator[None]:
    """:func:`settle_scales`, undone where the body raises."""
    undo = leave_coarse(prepared)
    try:
        with shared_scales(prepared):
            yield
    except BaseException:
        undo()
        raise
