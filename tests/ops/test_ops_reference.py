"""The page of op families says what the registry says."""

from __future__ import annotations

import pytest
from support.scripts import documentation_script

from custom_quantizer.ops import REGISTRY


@pytest.mark.slow
def test_the_table_is_up_to_date() -> None:
    generator = documentation_script("make_ops_reference.py")
    reference = generator.REFERENCE_FILE.read_text(encoding="utf-8")
    assert reference == generator.reference_text(reference)
    for rule in REGISTRY:
        assert f"\n| {rule.family} | " in reference
