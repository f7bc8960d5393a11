"""Data flows one way: imports go down one list, and one package knows the backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
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


@cache
def imports() -> tuple[tuple[str, str, Path], ...]:
    """``(importing room, imported module, file)`` within the package; typing-only ones too."""
    return tuple(_imports())


def _imports() -> Iterator[tuple[str, str, Path]]:
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


# A method for convenience: what writes a device test works with programs.
CONVENIENCE = ("custom_quantizer.backends.xnnpack.program", "device_test")


def local_and_global(node: ast.AST) -> Iterator[ast.ImportFrom]:
    """The imports in a piece of code, in functions as well, but for those that are for typing."""
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from local_and_global(child)


def test_no_import_goes_in_a_circle() -> None:
    """Those hidden in functions count: what needs them stands in the wrong module."""
    names = {
        ".".join(("custom_quantizer", *path.relative_to(ROOT).with_suffix("").parts)): path
        for path in ROOT.rglob("*.py")
    }
    needs: dict[str, set[str]] = {}
    for name, path in names.items():
        found = needs.setdefault(name.removesuffix(".__init__"), set())
        for node in local_and_global(ast.parse(path.read_text())):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in names else str(node.module))
    importer, imported = CONVENIENCE
    needs[importer].remove(f"custom_quantizer.backends.xnnpack.{imported}")
    TopologicalSorter(needs).prepare()  # raises CycleError, which names the modules
