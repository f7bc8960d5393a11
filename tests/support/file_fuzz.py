"""Seeded damage to files: what a disk, a network or a stranger does to them.

::

    python -m support.file_fuzz program 1000 --seed 1     (in tests/)
    python -m support.file_fuzz graph 1000 --seed 1

prints how often each outcome was met, and fails on the first that must not be.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack.checksum import SIZE
from custom_quantizer.reference import graph_document

WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def damaged(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield ``count`` damaged copies of a file, each with the name of what was done to it."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.choice(("flip", "flip", "bit", "word", "word", "cut", "splice", "zero", "grow"))
        new = bytearray(data)
        # Most of a file is weights; its structure stands at either end.
        near = draw.choice((len(data), 2048, 256))
        at = draw.choice((draw.randrange(min(near, len(data))), draw.randrange(len(data))))
        if kind == "flip":
            for _ in range(draw.randint(1, 4)):
                new[(at + draw.randrange(64)) % len(new)] ^= draw.randint(1, 255)
        elif kind == "bit":
            new[at] ^= 1 << draw.randrange(8)
        elif kind == "word":
            at -= at % 4
            new[at : at + 4] = draw.choice((*WORDS, draw.getrandbits(32))).to_bytes(4, "little")
        elif kind == "cut":
            del new[draw.choice((at, len(new) - 1 - draw.randrange(64))) :]
        elif kind == "splice":
            source, size = draw.randrange(len(data)), draw.randint(1, 512)
            new[at : at + size] = data[source : source + size]
        elif kind == "zero":
            size = draw.randint(1, 256)
            new[at : at + size] = bytes(len(new[at : at + size]))
        else:
            new += draw.randbytes(draw.randint(1, 64))
        if bytes(new) != data:
            yield kind, bytes(new)


VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 7, 2**31, -(2**63), 2**63, 2**100, 0.5, -0.0, 1e308),
    *(
        "",
        "x",
        "self",
        "forward",
        "__class__",
        "__init__",
        "import os",
        "é\u202e\x1b[31m",
        "a" * 5000,
    ),
    *("aten.save.default", "aten.from_file.default", "aten.add.out", "os.system", "builtins.eval"),
    *("operator.pow", "aten.set_.source_Tensor", "aten.as_strided.default", "float32", "s0", "cpu"),
    *("placeholder", "output", "call_function", "call_module", "get_attr", "call_method", "*"),
    *({"node": "x"}, {"node": "output"}, {"float": "nan"}, {"string": "__import__('os')"}, {}),
    *({"tuple": []}, {"dtype": "complex64"}, {"device": "cuda"}, {"dim": "s0", "times": 2}, []),
    [[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]],
)


def rewritten(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield ``count`` graph files that say something else and carry a checksum that fits."""
    draw = random.Random(seed)
    document, tensors = graph_document.unpack(data)
    whole = json.loads(document.model_dump_json(exclude_defaults=True))
    for _ in range(count):
        new = json.loads(json.dumps(whole))
        kinds = [_change(new, draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        text = json.dumps(new)
        yield "+".join(kinds), repacked(text, tensors)


def repacked(text: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """A graph file with any text at all in the place of its document, and the checksum of that."""

    class Anything:
        def model_dump_json(self, **_options: Any) -> str:
            return text

    return graph_document.pack(Anything(), tensors)  # type: ignore[arg-type]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


def _change(document: Any, draw: random.Random) -> str:
    places = list(_places(document))
    holder, key = draw.choice(places)
    kind = draw.choice(("value", "number", "drop", "copy", "swap"))
    old = holder[key]
    if kind == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 1000, 1 << 40, 0))
    elif kind == "drop":
        del holder[key]
    elif kind == "copy":
        other, name = draw.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if name in _keys(other) else None
    elif kind == "swap" and isinstance(holder, list) and len(holder) > 1:
        other = draw.randrange(len(holder))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        kind = "value"
        holder[key] = draw.choice(VALUES)
    return kind


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def outcome_of_graph(path: Path) -> str:
    """Load a graph file and run what it holds: ``refused``, or ``loaded``, or what running said.

    Only errors of ours may come out of reading; running a graph on the example may fail as
    PyTorch's ops do, and nothing worse.
    """
    try:
        graph, example = cq.load_graph(path)
    except (cq.InputError, cq.ConversionError):
        return "refused"
    try:
        with torch.no_grad():
            graph(*pytree.tree_unflatten(list(pytree.tree_leaves(example)), _spec(graph))[0])
    except Exception as error:
        return f"loaded, does not run ({type(error).__name__})"
    return "loaded"


def _spec(graph: torch.fx.GraphModule) -> Any:
    return graph.graph._codegen.pytree_info.in_spec


def outcome_of_program(path: Path, inputs: tuple[torch.Tensor, ...], wanted: Any) -> str:
    """Load and run a program: ``refused``, ``same``, or ``other`` results than the right ones."""
    try:
        got = cq.load_program(path).run(*inputs)
    except (cq.ProgramError, cq.InputError) as error:
        return "child ended" if "the process" in str(error) else "refused"
    same = len(got) == len(wanted) and all(map(torch.equal, got, wanted))
    return "same" if same else "other"


def main() -> None:
    """Damage the files of a small network."""
    from support.flow import small_images, small_result

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("program", "graph"))
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unsealed", action="store_true", help="programs without a checksum")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        saved = small_result().save(Path(folder) / "net.pte")
        assert saved.program is not None
        assert saved.graph is not None
        file = Path(folder) / "other" / ("damaged.pte" if options.kind == "program" else "damaged")
        file.parent.mkdir()
        data = (saved.program if options.kind == "program" else saved.graph).read_bytes()
        inputs = (small_images(4),)
        if options.kind == "program":
            wanted = cq.load_program(saved.program).run(*inputs)
            kinds = damaged(data[:-SIZE] if options.unsealed else data, options.count, options.seed)
        else:
            rest = options.count // 2
            kinds = iter(
                [
                    *damaged(data, options.count - rest, options.seed),
                    *rewritten(data, rest, options.seed),
                ]
            )
        for i, (kind, new) in enumerate(kinds):
            file.write_bytes(new)
            start = time.perf_counter()
            if options.kind == "program":
                found = outcome_of_program(file, inputs, wanted)
            else:
                found = outcome_of_graph(file)
            slowest = max(slowest, time.perf_counter() - start)
            counts[found] += 1
            print(f"{i} {kind}: {found}", file=sys.stderr)
    print(json.dumps({"outcomes": counts, "slowest_s": round(slowest, 2)}, indent=2))


if __name__ == "__main__":
    main()
