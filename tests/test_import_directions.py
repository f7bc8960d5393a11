"""Data flows one way: imports go down one list, and one package knows the backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import custom_quantizer

ROOT = Path(custom_quantizer.__file__).parent
# Imports go down this list. A room may import from itself and from the rooms above it.
ROOMS = (
    "errors",
    "core",
    "ops",
    "config",
    "calibration",
    "training",
    "planning",
    "accuracy",
    "reference",
    "backends",
    "analysis",
    "report",
    "app",
    "__init__",
    "__main__",
)
FLOOR_OF = {name: i for i, name in enumerate(ROOMS)}


def imports() -> Iterator[tuple[str, str, Path]]:
    """``(importing room, imported module, file)`` within the package; typing-only ones too."""
    for path in sorted(ROOT.rglob("*.py")):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                # ``from custom_quantizer import qat`` names its module last.
                package = node.module == "custom_quantizer"
                names = [f"{node.module}.{a.name}" if package else node.module for a in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                yield room, name, path


def test_every_room_has_its_floor() -> None:
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert found == set(FLOOR_OF)


def test_there_are_at_most_a_dozen_rooms() -> None:
    assert len([path for path in ROOT.iterdir() if (path / "__init__.py").exists()]) <= 12


def test_imports_go_down() -> None:
    wrong = []
    for room, name, path in imports():
        parts = name.split(".")
        if parts[0] != "custom_quantizer" or len(parts) < 2:
            continue
        if FLOOR_OF[parts[1]] > FLOOR_OF[room]:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_allocation_stands_above_the_rest_of_analysis() -> None:
    """It is a room within a room: evaluation and diagnosis know nothing of it."""
    users = {
        path.relative_to(ROOT).parts[:2]
        for _, name, path in imports()
        if name.startswith("custom_quantizer.analysis.allocation")
    }
    assert ("analysis", "allocation") in users
    assert {user for user in users if user[0] == "analysis"} == {("analysis", "allocation")}


def test_only_backends_know_executorch() -> None:
    users = {room for room, name, _ in imports() if name.split(".")[0] == "executorch"}
    assert users == {"backends"}
