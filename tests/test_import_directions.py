"""Data flows one way: imports go down one list, and one package knows the backend."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import custom_quantizer

ROOT = Path(custom_quantizer.__file__).parent
# A module may import from its own line and from the lines above it.
LAYERS = (
    {"errors"},
    {
        "formats",
        "_io",
        "_file_hashes",
        "_tensor_file",
        "_progress",
        "_html",
        "_views",
        "_paired",
        "sources",
        "threads",
    },
    {"arithmetic"},
    {"schemes", "bias", "graph"},
    {"ops"},
    {
        "_torchao",
        "config",
        "config_file",
        "_located",
        "batch_norms",
        "canonical",
        "constants",
        "decompositions",
        "factors",
        "forms",
        "rewriting",
        "converted",
        "ranges",
        "training_graph",
        "weighing",
    },
    {"planner", "observers", "insertion"},
    {"fake_quantize"},
    {"quantizer", "statistics"},
    {
        "integer",
        "_settling",
        "_checkpoint",
        "_graph_building",
        "_graph_document",
        "_graph_targets",
        "_plot",
        "_training_checkpoint",
    },
    {"calibration", "xnnpack"},
    {"_rerun"},
    {"fidelity"},
    {"qat", "verification", "evaluation", "diagnosis", "saved_graph"},
    {"report"},
    {"pipeline", "digits"},
    {"demo", "_terminal"},
    {"cli", "__main__", "__init__"},
)
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}


def imports() -> Iterator[tuple[str, str, Path]]:
    """``(importing module, imported module, file)`` within the package; typing-only ones too."""
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                yield module, name, path


def test_every_module_has_its_place() -> None:
    found = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert found == set(LAYER_OF)


def test_imports_go_down() -> None:
    wrong = []
    for module, name, path in imports():
        parts = name.split(".")
        if parts[0] != "custom_quantizer" or len(parts) < 2:
            continue
        if LAYER_OF[parts[1]] > LAYER_OF[module]:
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_one_package_knows_the_backend() -> None:
    users = {module for module, name, _ in imports() if name.split(".")[0] == "executorch"}
    assert users == {"xnnpack"}
