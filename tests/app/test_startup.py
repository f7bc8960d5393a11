"""What a command imports before it answers: a user waits seconds for each of these libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIBRARIES = (
    "numpy",
    "torch",
    "torchao",
    "torchvision",
    "executorch",
    "scipy",
    "sklearn",
    "matplotlib",
)

# One interpreter runs them in this order: a command, its exit code, and the libraries it needs that
# no command above it needed.
COMMANDS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("--help", 0, ()),
    ("quantize --help", 0, ()),
    ("inspect no.json", 1, ()),
    ("report no.pte", 1, ()),
    ("report no.json --html no.html", 1, ()),
    ("plan no.py:make", 1, ("numpy", "torch")),
    ("quantize no.py:make --calibration no.npz -o net.pte", 1, ()),
    ("evaluate no.pte --data no.npz --model no.py:make", 1, ()),
    ("verify no.pte --model no.py:make", 1, ()),
    ("evaluate no.pte --data no.npz", 1, ()),
    ("plan net.py:make --scheme a8w8w8", 1, ("torchao",)),
    ("plan net.py:make --input-shape 2,3", 0, ()),
    ("quantize net.py:make --calibration no.npz -o net.pte", 1, ()),
    ("plan resnte18", 1, ("torchvision",)),
    ("plan squeezenet1_1 --input-shape 1,3,32,32", 0, ()),
    ("quantize resnte18 --calibration no.npz -o net.pte", 1, ()),
    ("verify no.pte", 1, ("executorch",)),
)

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU())
"""

RUN = """
import gc, json, sys
from custom_quantizer.app.cli import main

libraries, commands = json.loads(sys.argv[1])
answers = []
for command in commands:
    sys.argv = ["custom-quantizer", *command.split()]
    try:
        main()
    except SystemExit as stop:
        answers.append((stop.code, [name for name in libraries if name in sys.modules]))
print(json.dumps([answers, gc.get_stats()[2]["collections"]]), file=sys.stderr)
"""


Answers = tuple[list[tuple[int, list[str]]], int]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Exit code of every command and libraries loaded by then; full garbage collections in all."""
    folder = tmp_path_factory.mktemp("startup")
    (folder / "net.py").write_text(NET)
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([LIBRARIES, [line[0] for line in COMMANDS]])],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    found, collections = json.loads(done.stderr.splitlines()[-1])
    assert len(found) == len(COMMANDS)
    return found, collections


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=[line[0] for line in COMMANDS])
def test_a_command_imports_what_it_needs_and_no_more(index: int, answers: Answers) -> None:
    code, loaded = answers[0][index]
    needed = {name for _, _, names in COMMANDS[: index + 1] for name in names}
    assert set(loaded) == needed
    assert code == COMMANDS[index][1]


@pytest.mark.slow
def test_imports_are_not_searched_for_garbage(answers: Answers) -> None:
    """What libraries are made of stays: each full collection would walk over all of it."""
    assert answers[1] == 0
