"""What every test shares: a seed, and hypothesis examples that repeat."""

from __future__ import annotations

import gc
import logging
import os
from functools import cache
from typing import Any

import pytest
import torch
import torch._export.utils
from hypothesis import Phase, settings

# "explore" looks for new examples; CI must not fail on a Tuesday for what passed on Monday.
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
# tests/benchmarks/mutation_score.py wants to know that a test fails, not the smallest example.
settings.register_profile("mutation", deadline=None, derandomize=True, phases=[Phase.generate])
# Asserts of shared tests show what they compared, too.
pytest.register_assert_rewrite("support")

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# torch's structured trace would bury every failure under thousands of empty DEBUG records.
logging.getLogger("torch.__trace").propagate = False


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the tests: it took a fifth of their time.

    Graphs are full of cycles, and every full collection walks all of PyTorch and ExecuTorch, too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind complains on the way out of what is left


def remember_composite_ops() -> None:
    """Spare every lowering what took a fifth of it: to list the composite ops of each library.

    PyTorch lists them three times in every lowering, as a library may have registered more by then;
    this lists them again when one has.
    """
    listed = torch._export.utils._collect_all_valid_cia_ops_for_namespace

    @cache
    def remembered(namespace: Any, _registered: int) -> Any:
        return listed(namespace)

    def composite_ops(namespace: Any) -> Any:
        registrations = torch._C._dispatch_get_registrations_for_dispatch_key
        return remembered(namespace, len(registrations("CompositeImplicitAutograd")))

    torch._export.utils._collect_all_valid_cia_ops_for_namespace = composite_ops


remember_composite_ops()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
