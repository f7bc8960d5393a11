"""Rows of tables that calibration did not read: said where they would be cut off, else not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from custom_quantizer import CalibrationSummary, IntegerQuantizer, calibrate

Read = Callable[[Tensor, Tensor], Tensor]

READS: dict[str, Read] = {
    "index": lambda table, position: table[position],
    "index and move": lambda table, position: table[position].unsqueeze(0).transpose(1, 2)[:, :, 0],
    "index_select": lambda table, position: table.index_select(0, position),
    "embedding": lambda table, position: nn.functional.embedding(position, table),
    "gather": lambda table, position: table.gather(0, position[:, None].expand(-1, 8)),
    "take_along_dim": lambda table, position: table.take_along_dim(position[:, None], 0),
}


class Step(nn.Module):
    """A product with rows of a table whose i-th row reaches from ``-growth ** i`` to it."""

    def __init__(self, read: Read, growth: float) -> None:
        super().__init__()
        self.read = read
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer(
            "table", torch.linspace(-1, 1, 8) * growth ** torch.arange(16)[:, None]
        )

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.last(self.first(x) * self.read(self.table, position))


def summary(
    read: Read, positions: int, growth: float = 1.2, scheme: str = "a8w8"
) -> CalibrationSummary:
    torch.manual_seed(0)
    x = torch.randn(1, 8)
    graph = torch.export.export(Step(read, growth).eval(), (x, torch.tensor([0]))).module()
    prepared = prepare_pt2e(graph, IntegerQuantizer().set_global(scheme))
    return calibrate(prepared, [(torch.randn(1, 8), torch.tensor([i])) for i in range(positions)])


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_rows_that_would_be_cut_off_are_named(read: Read) -> None:
    """Eleven rows of sixteen lie beyond the fifth; the twelfth reaches 3.6 times as far."""
    found = summary(read, positions=5)
    (table,) = found.unread
    assert (table.rows, table.outside) == (16, 11)
    assert table.table == "table"
    (warning,) = found.warnings
    assert f"{table.reader} (11 of 16 rows of table)" in warning


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_table_that_was_read_to_its_end_is_not(read: Read) -> None:
    assert summary(read, positions=16).unread == ()


def test_less_than_rounding_costs_is_not_said() -> None:
    """The last row reaches 1.0012 times as far as the first, a sixth of a step of 8 bits."""
    growth = 1.0012 ** (1 / 15)
    assert summary(READS["index"], positions=1, growth=growth).unread == ()
    assert summary(READS["index"], positions=1, growth=growth, scheme="a16w8").unread != ()


def test_what_is_quantized_at_run_time_has_no_range() -> None:
    assert summary(READS["index"], positions=1, scheme="dyn8w8").unread == ()
