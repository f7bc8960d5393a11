"""Bundles beside the reference, and bundles that were changed and signed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import custom_quantizer as cq
from custom_quantizer.reference.bundle import load_integers, save_integers
from custom_quantizer.reference.numpy_runner import checksum

__all__ = ["assert_bundle_equals_fixed_point", "signed", "write_signed"]


def signed(document: Any) -> bytes:
    """The text of a description with a checksum that fits, if it has one at all.

    Such a bundle is what a reader sees who checks the SHA-256 only.
    """
    if isinstance(document, dict) and "checksum" in document:
        document["checksum"] = "0" * 64
    text = json.dumps(document).encode()
    zeros = "0" * 64
    return text.replace(zeros.encode(), checksum(text, zeros).encode(), 1)


def write_signed(document: Any, path: Path) -> None:
    """Replace the description of the bundle at ``path``."""
    path.with_suffix(".json").write_bytes(signed(document))


def assert_bundle_equals_fixed_point(
    converted: GraphModule, path: Path, *inputs: Tensor
) -> dict[str, Any]:
    """Every output and every integer in between; returns the description."""
    outputs, integers = cq.integer_reference(converted, "fixed_point").with_integers(*inputs)
    save_integers(converted, path)
    bundle = load_integers(path)
    actual, actual_integers = bundle.with_integers(*(x.numpy() for x in inputs))
    actual = actual if isinstance(actual, tuple) else (actual,)
    for real, expected in zip(actual, tree_leaves(outputs), strict=True):
        assert real.dtype == np.float32
        np.testing.assert_array_equal(real, expected.numpy(), strict=True)
    for name, stored in actual_integers.items():
        assert stored.dtype == bundle.description["tensors"][name]["dtype"]
        if name in integers:  # what is quantized a second time goes by another name there
            np.testing.assert_array_equal(stored, integers[name].numpy(), err_msg=name)
    again = bundle(*(x.numpy() for x in inputs))
    np.testing.assert_array_equal(again[0] if isinstance(again, tuple) else again, actual[0])
    return dict(bundle.description)
