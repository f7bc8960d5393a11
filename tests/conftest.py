"""What every test shares: a seed, and hypothesis examples that repeat."""

from __future__ import annotations

import gc
import logging
import os

import pytest
from hypothesis import Phase, settings

# "explore" looks for new examples; CI must not fail on a Tuesday for what passed on Monday.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=30, print_blob=True
)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
# tests/benchmarks/mutation_score.py wants to know that a test fails, not the smallest example.
settings.register_profile("mutation", deadline=None, derandomize=True, phases=[Phase.generate])
# Asserts of shared tests show what they compared, too.
pytest.register_assert_rewrite("support")

settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# pytest-xdist (3.8) says 80 to its workers, where tests mean that there is no terminal.
os.environ.pop("COLUMNS", None)

# torch's structured trace would bury every failure under thousands of empty DEBUG records.
logging.getLogger("torch.__trace").propagate = False


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # runs no test, so it need not wait for PyTorch
    from support import remembered  # not before its asserts are rewritten

    remembered.composite_ops()
    remembered.training_patterns()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as the tests: it took a fifth of their time.

    Graphs are full of cycles, and every full collection walks all of PyTorch and ExecuTorch, too.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind complains on the way out of what is left


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
