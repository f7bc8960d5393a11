"""The page of op families says what the registry says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from custom_quantizer.ops import REGISTRY

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", DOCS / "make_ops_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date(generator: ModuleType) -> None:
    reference = generator.REFERENCE_FILE.read_text(encoding="utf-8")
    assert reference == generator.reference_text(reference)
    for rule in REGISTRY:
        assert f"\n| {rule.family} | " in reference
