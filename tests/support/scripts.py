"""Scripts of ``docs/`` as modules, and what pages say commands print."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"


def documentation_script(name: str) -> ModuleType:
    """Run a file of ``docs/`` as a module of its own, without its ``main``."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), DOCS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(page: Path, language: str) -> list[str]:
    """The blocks of a language in a page."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_numbers(output: str) -> list[str]:
    """The lines of an output; numbers and the width of columns differ between machines."""
    masked = re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?%?", "#", output)
    lines = (" ".join(line.replace("─", "").split()) for line in masked.splitlines())
    return [line for line in lines if line]
