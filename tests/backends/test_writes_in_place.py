"""Rows that a program writes into its buffers, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import quantized
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import read_program
from custom_quantizer.ops.placement import Placement

ROWS, FEATURES = 12, 8

Write = Callable[["Cache", Tensor, Tensor], Tensor]


class Cache(nn.Module):
    """Keeps a row of each call; ``write`` returns what is read of the buffer."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 4)
        self.write = write
        self.register_buffer("rows", torch.randn(1, ROWS, FEATURES))
        self.register_buffer("grid", torch.randn(2, ROWS // 2, FEATURES))
        self.rows: Tensor
        self.grid: Tensor

    def forward(self, x: Tensor, at: Tensor) -> Any:
        return self.last(self.write(self, self.layer(x), at).relu())


def copied(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    return self.rows.index_copy_(1, at, row)


def of_the_last_dim(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    turned = row.reshape(1, FEATURES, 1)[:, :1].expand(1, ROWS, 1)
    return self.rows.index_copy_(2, at % FEATURES, turned)


def repeated(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    """As keys of several queries are."""
    rows = self.rows.index_copy_(1, at, row).unsqueeze(1)
    return rows.expand(1, 2, ROWS, FEATURES).reshape(1, 2 * ROWS, FEATURES)


def seen_through_an_earlier_view(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    """Which is no reshape: it would show what was there before."""
    rows = self.rows.unsqueeze(1)
    self.rows.index_copy_(1, at, row)
    return rows.expand(1, 2, ROWS, FEATURES).reshape(1, 2 * ROWS, FEATURES)


def assigned(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    """Where ``at`` may be negative."""
    self.rows[:, at] = row
    return self.rows


def added(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    return self.rows.index_put_((torch.zeros_like(at), at), row[0], accumulate=True)


def at_two_indices(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    self.grid[at % 2, at // 2] = row[0]
    return self.grid


def read_before(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    """By what may run behind the write."""
    before = self.rows.relu()
    return self.rows.index_copy_(1, at, row) + before


def both(self: Cache, row: Tensor, at: Tensor) -> Tensor:
    """One that may be in place next to one that may not."""
    return copied(self, row, at)[:, :1] + at_two_indices(self, row, at)[:1, :1]


def _slow(write: Write) -> Any:
    return pytest.param(write, marks=pytest.mark.slow)


IN_PLACE = [copied, repeated, _slow(of_the_last_dim)]
COPIED = [assigned, _slow(added), _slow(at_two_indices), read_before, both]


def run_of(write: Write) -> tuple[list[str], list[tuple[Tensor, Tensor]]]:
    """The kernels of a program, and what reference and program return call by call.

    The report says of the write that a kernel outside the delegates computes it.
    """
    torch.manual_seed(0)
    positions = [0, 3, 3, ROWS - 1, *([-1] if write in (assigned, added) else [])]
    calls = [(torch.randn(1, 1, FEATURES), torch.tensor([at])) for at in positions]
    converted = quantized(Cache(write), calls[0], calibration=calls)
    lowered = cq.lower(converted, calls[0])
    reference = cq.integer_reference(converted)
    returned = [(reference(*call), lowered.run(*call)) for call in calls]
    writes = [row for row in lowered.report.ops if row.family.startswith("aten.index_")]
    assert {row.placement for row in writes} == {Placement.OUTSIDE}
    return [str(kernel) for kernel in read_program(lowered.buffer).kernels], returned


@pytest.mark.parametrize("write", IN_PLACE, ids=lambda write: write.__name__)
def test_rows_are_written_where_they_are(write: Write) -> None:
    """Nothing is copied, neither to make room for a row nor back into the buffer."""
    kernels, returned = run_of(write)
    assert all(torch.equal(want, got) for want, got in returned)
    # And the index of the last dim is computed.
    assert {*kernels} <= {"aten::index_put_", "aten::remainder.Scalar_out"}


@pytest.mark.parametrize("write", COPIED, ids=lambda write: write.__name__)
def test_what_the_kernel_does_not_take_is_copied(write: Write) -> None:
    """Or what others read of the memory."""
    kernels, returned = run_of(write)
    assert all(torch.equal(want, got) for want, got in returned)
    assert "aten::index_put.out" in kernels
    assert "aten::index_put_" not in kernels


def test_a_view_that_was_made_before_shows_what_is_written() -> None:
    _, returned = run_of(seen_through_an_earlier_view)
    assert all(torch.equal(want, got) for want, got in returned)
    assert not torch.equal(returned[0][0], returned[1][0])


def test_a_cache_that_is_returned_is_a_tensor_of_its_own() -> None:
    """The next call writes the buffer, and not what was returned."""
    torch.manual_seed(0)

    class Returned(Cache):
        def forward(self, x: Tensor, at: Tensor) -> Any:
            return copied(self, self.layer(x), at)

    calls = [(torch.randn(1, 1, FEATURES), torch.tensor([at])) for at in range(3)]
    converted = quantized(Returned(copied), calls[0], calibration=calls)
    lowered = cq.lower(converted, calls[0])
    kernels = [str(kernel) for kernel in read_program(lowered.buffer).kernels]
    assert "aten::index_put.out" in kernels
    reference = cq.integer_reference(converted)
    for call in calls:
        assert torch.equal(lowered.run(*call), reference(*call))
