"""Convolutions keep what the registry promises."""

from __future__ import annotations

import pytest
import torch
from support.contracts import GemmContract

from custom_quantizer.errors import ConversionError
from custom_quantizer.ops.gemm import symmetric_padding

aten = torch.ops.aten


class TestContract(GemmContract):
    families = ("conv",)


def test_a_kernel_of_unknown_size_is_an_error_that_names_the_op() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(aten.conv2d.default, (graph.placeholder("x"),))
    node.args = (node.args[0], graph.placeholder("weight"))
    with pytest.raises(ConversionError, match=r"^conv2d_default: no shape is recorded"):
        symmetric_padding(node)
