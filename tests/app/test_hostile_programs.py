"""Files from strangers: nothing in them runs, damage is refused, and no process is taken down."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from click.testing import CliRunner
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from support.file_fuzz import damaged, outcome_of_graph, outcome_of_program, repacked, rewritten
from support.flow import small_images, small_result
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.app.cli import cli
from custom_quantizer.app.saved_graph import load_lowered
from custom_quantizer.backends.xnnpack import _child, isolation
from custom_quantizer.backends.xnnpack.checksum import SIZE, seal
from custom_quantizer.backends.xnnpack.readback import read_program
from custom_quantizer.ops import known_targets
from custom_quantizer.reference import graph_document
from custom_quantizer.reference.graph_targets import name_of, resolve

IMAGES = (small_images(4),)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved result: ``net.pte`` and its graph and report."""
    folder = tmp_path_factory.mktemp("saved")
    small_result().save(folder / "net.pte")
    return folder


@pytest.fixture(scope="module")
def graph(saved: Path) -> bytes:
    return (saved / "net.graph.safetensors").read_bytes()


@pytest.fixture(scope="module")
def program(saved: Path) -> bytes:
    return (saved / "net.pte").read_bytes()


# -- code in files ---------------------------------------------------------------------------------


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_in_the_place_of_a_graph(saved: Path, tmp_path: Path) -> None:
    marker, old = tmp_path / "was_here", tmp_path / "net.pt2"
    payload = pickle.dumps(Payload(marker))
    pickle.loads(payload)
    assert marker.is_dir(), "the payload works where it is read"
    marker.rmdir()
    with zipfile.ZipFile(old, "w") as archive:
        for name in ("archive_format", "data.pkl", "data/sample_inputs/model.pt"):
            archive.writestr(f"net/{name}", payload)
    for path in (old, tmp_path / "net.graph.safetensors"):
        path.write_bytes(old.read_bytes())
        with pytest.raises(cq.InputError, match=r"pt2 file .* can run code .* not read"):
            cq.load_graph(path)
    (tmp_path / "net.graph.safetensors").write_bytes(payload)
    with pytest.raises(cq.InputError, match="not a graph that save_graph wrote"):
        cq.load_graph(tmp_path / "net.graph.safetensors")
    # An older file beside the program is named, and not read.
    (tmp_path / "net.graph.safetensors").unlink()
    (tmp_path / "net.pte").write_bytes((saved / "net.pte").read_bytes())
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "net.pte")])
    assert result.exit_code == 1
    assert "net.pt2" in result.output
    assert not marker.exists()


def changed(graph: bytes, change: Callable[[dict[str, Any]], None], path: Path) -> Path:
    """A graph file whose document was changed, with the checksum of what it is now."""
    document, tensors = graph_document.unpack(graph)
    content = json.loads(document.model_dump_json(exclude_defaults=True))
    change(content)
    path.write_bytes(repacked(json.dumps(content), tensors))
    return path


def node(document: dict[str, Any], op: str) -> dict[str, Any]:
    """The first node of a kind, or call of a target."""
    found: dict[str, Any] = next(
        node for node in document["graph"]["nodes"] if op in (node["op"], node["target"])
    )
    return found


def test_code_where_a_size_is_expected(graph: bytes, tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    code = f"__import__('os').mkdir({str(marker)!r})"
    sympy.sympify(code)
    assert marker.is_dir(), "sympy evaluates it"
    marker.rmdir()

    def sizes(size: Any) -> Callable[[dict[str, Any]], None]:
        def change(document: dict[str, Any]) -> None:
            document["dims"] = {"s0": {"low": 1, "high": 8, "hint": 4}}
            node(document, "placeholder")["value"]["shape"][0] = size

        return change

    for size in (code, {"dim": code}, {"dim": "s0", "times": code}, {"dim": "s0", "plus": code}):
        with pytest.raises(cq.InputError, match="not a valid graph"):
            cq.load_graph(changed(graph, sizes(size), tmp_path / "g"))
    loaded, _ = cq.load_graph(changed(graph, sizes({"dim": "s0"}), tmp_path / "g"))
    assert str(next(n for n in loaded.graph.nodes if n.op == "placeholder").meta["val"].shape[1:])
    assert not marker.exists()


CODE = "x=__import__('os').abort()"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["arguments"].__setitem__(0, CODE),
        lambda d: node(d, "placeholder").update(target=CODE),
        lambda d: node(d, "placeholder").update(target="class"),
        lambda d: node(d, "placeholder").update(name=CODE),
        lambda d: node(d, "get_attr").update(target=CODE),
        lambda d: node(d, "get_attr").update(target="__class__"),
        lambda d: d["constants"].update({"graph": {"tensor": "c0"}}),
        lambda d: d["constants"].update({"_parameters.x": {"tensor": "c0"}}),
        lambda d: d.update(inputs={"tuple": [{"tuple": []}, {"dict": [[CODE, "*"]]}]}),
        lambda d: node(d, "output").update(kwargs={CODE: None}),
    ],
)
def test_names_become_code_and_are_names(
    change: Callable[[dict[str, Any]], None], graph: bytes, tmp_path: Path
) -> None:
    with pytest.raises(cq.InputError):
        cq.load_graph(changed(graph, change, tmp_path / "g"))


FORBIDDEN = [
    *("builtins.eval", "os.system", "operator.attrgetter", "operator.pow", "torch.load"),
    *("aten.from_file.default", "aten.save.default", "aten.set_.source_Tensor"),
    *("aten.as_strided.default", "aten.resize_.default", "aten._unsafe_index.Tensor"),
    *("aten.add.out", "aten.add.str", "aten.sort.any", "aten.nonzero.default", "aten.item.default"),
    *("aten.max_pool2d_with_indices_backward.default", "aten.rand.default", "aten.add.nothing"),
    *("aten.__class__.default", "aten.add.__class__", "aten.add._schema", "aten.add", "aten", ""),
    *("higher_order.while_loop", "quantized_decomposed.embedding_byte.default", "prim.Print"),
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_targets_outside_the_list(name: str) -> None:
    assert resolve(name) is None


def test_targets_and_names_are_inverse() -> None:
    for target in (torch.ops.aten.relu_.default, torch.ops.aten.add.Tensor, torch.sym_max):
        name = name_of(target)
        assert name is not None
        assert resolve(name) is target
    assert name_of(torch.ops.aten.from_file.default) is None
    assert name_of(os.system) is None


def test_every_op_that_is_known_can_be_saved() -> None:
    """What the quantizer quantizes, or keeps in float by a rule, and what passes make of it."""
    targets = [target for target in known_targets() if isinstance(target, torch._ops.OpOverload)]
    assert len(targets) > 80
    assert [str(target) for target in targets if name_of(target) is None] == []


# -- what a graph may ask for ----------------------------------------------------------------------


def called(target: str, *args: Any) -> Callable[[dict[str, Any]], None]:
    """Put calls before the output; ``args`` may be the input's name."""

    def change(document: dict[str, Any]) -> None:
        nodes = document["graph"]["nodes"]
        nodes.insert(
            len(nodes) - 1,
            {"op": "call_function", "name": "extra", "target": target, "args": list(args)},
        )

    return change


def doubled(times: int) -> Callable[[dict[str, Any]], None]:
    """A chain of multiplications of numbers, each of which has twice the digits."""

    def change(document: dict[str, Any]) -> None:
        nodes = document["graph"]["nodes"]
        for i in range(times):
            last = {"node": f"big_{i}"} if i else 1 << 40
            made = {"op": "call_function", "name": f"big_{i + 1}", "target": "operator.mul"}
            nodes.insert(len(nodes) - 1, {**made, "args": [last, last]})

    return change


X = {"node": "x"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (called("aten.full.default", [1 << 20, 1 << 20], 1.0), "takes 4096.0 GiB"),
        (called("aten.arange.default", 1 << 40), "GiB"),
        (called("aten.expand.default", X, [4, 1 << 30, 8, 8]), "extra"),
        (called("aten.repeat.default", X, [1 << 12, 1 << 12, 1, 1]), "GiB"),
        (called("aten.chunk.default", X, 1 << 40), "1,099,511,627,776 parts"),
        (called("aten.relu.default"), "its argument 'self' is missing"),
        (called("aten.relu.default", X, X), "takes 1 arguments, 2 are given"),
        (called("aten.relu.default", {"string": "x"}), "is no Tensor"),
        (called("aten.gelu.default", X), "extra_is_fine"),
        (called("aten.einsum.default", {"string": "import os"}, [X]), "extra"),
        (called("aten.linear.default", X, {"node": "later"}), "not before it"),
        (called("aten.full.default", [1 << 63], 1.0), "is no value"),
        (called("aten.view.default", X, [7]), "extra: aten.view.default"),
        (called("operator.mul", {"string": "x"}, 1 << 40), "wrong number or kind"),
        (called("operator.getitem", X, 0), "an item of what is no list"),
        (called("operator.add", X, X), "arithmetic on what is no number"),
        (doubled(60), "more than 64 bits"),
        (lambda d: d.update(arguments=[]), "structure do not fit"),
        (lambda d: d["graph"]["nodes"].pop(), "has no output"),
        (lambda d: d["graph"]["nodes"].append(d["graph"]["nodes"][-1]), "after the output"),
        (lambda d: d["graph"]["nodes"].insert(1, d["graph"]["nodes"][0]), "there twice"),
        (lambda d: d["constants"].popitem(), "not in the file"),
        (lambda d: d["constants"].update({"a": {"tensor": "c99"}}), "not in the file"),
        (lambda d: node(d, "placeholder")["value"]["shape"].pop(), "does not fit the input"),
        (lambda d: node(d, "placeholder")["value"].update(dtype="float16"), "does not fit"),
        (lambda d: d.update(example=[]), "do not fit"),
        (lambda d: d.update(example=[{"tensor": {"a": 1}}]), "neither a tensor of the file nor"),
        (lambda d: d.update(extra=1), "not a valid graph: extra"),
        (lambda d: node(d, "get_attr").update(modules=[["a", "b\x1b[2J", "c"]]), "modules"),
        (
            lambda d: node(d, "quantized_decomposed.quantize_per_tensor.default")[
                "args"
            ].__setitem__(1, math.nan),
            "is no value",
        ),
    ],
)
def test_graphs_that_are_not_built(
    change: Callable[[dict[str, Any]], None], message: str, graph: bytes, tmp_path: Path
) -> None:
    path = changed(graph, change, tmp_path / "g")
    start = time.perf_counter()
    if message == "extra_is_fine":  # the others fail for what they add, not for adding
        cq.load_graph(path)
        return
    with pytest.raises(cq.InputError, match=message) as raised:
        cq.load_graph(path)
    assert str(path) in str(raised.value)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"graph":' * 100_000])
def test_documents_that_are_none(text: str, graph: bytes, tmp_path: Path) -> None:
    _, tensors = graph_document.unpack(graph)
    (tmp_path / "g").write_bytes(repacked(text, tensors))
    with pytest.raises(cq.InputError):
        cq.load_graph(tmp_path / "g")


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_headers_that_claim_any_length(length: int, graph: bytes, tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(length.to_bytes(8, "little") + graph[8:])
    with pytest.raises(cq.InputError, match="not a graph that save_graph wrote"):
        cq.load_graph(tmp_path / "g")


class Unknown(nn.Module):
    """Calls an op that no file may ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0e(self.linear(x))


def test_a_graph_that_no_file_can_hold(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    result = cq.quantize(Unknown(), (x,), (x,), lower=False, progress=False)
    with pytest.raises(cq.ConversionError, match=r"special_i0e.*which no file may ask for"):
        cq.save_graph(result.converted, (x,), tmp_path / "g")
    (tmp_path / "model.graph.safetensors").write_bytes(b"of an earlier result")
    files = result.save(tmp_path)
    assert files.graph is None
    assert "special_i0e" in files.graph_reason
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    recorded = json.loads(files.report.read_text())["files"]
    assert recorded == {"program": None, "graph": {"file": None, "reason": files.graph_reason}}


# -- damage ----------------------------------------------------------------------------------------


def test_every_byte_counts(program: bytes, graph: bytes, tmp_path: Path) -> None:
    for at in range(0, len(program), 97):
        new = bytearray(program)
        new[at] ^= 1
        with pytest.raises(cq.ProgramError):
            read_program(bytes(new))
    file = tmp_path / "g"
    for at in range(0, len(graph), 97):
        new = bytearray(graph)
        new[at] ^= 1
        file.write_bytes(new)
        with pytest.raises(cq.InputError):
            cq.load_graph(file)


def test_what_the_report_beside_a_file_says(saved: Path, tmp_path: Path) -> None:
    names = ("net.pte", "net.graph.safetensors", "net.json")
    for name in names:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    assert not cq.load_program(tmp_path / "net.pte").isolated
    # A whole file, with a checksum that fits: of something else.
    data = (saved / "net.pte").read_bytes()[:-SIZE]
    at = data.index(b"XN01") + 200
    (tmp_path / "net.pte").write_bytes(seal(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]))
    for load in (cq.load_program, cq.read_program, cq.inspect_program):
        with pytest.raises(cq.ProgramError, match=r"net\.json beside it has another SHA-256"):
            load(tmp_path / "net.pte")
    other = changed(
        (saved / "net.graph.safetensors").read_bytes(),
        lambda d: node(d, "get_attr").update(original="other"),
        tmp_path / "net.graph.safetensors",
    )
    with pytest.raises(cq.InputError, match=r"net\.json beside it has another SHA-256"):
        cq.load_graph(other)
    (tmp_path / "net.json").unlink()
    cq.load_graph(other)
    # No report of ours says nothing.
    (tmp_path / "net.json").write_text('{"files": [1]}')
    cq.load_graph(other)


def test_damaged_files_are_refused(program: bytes, graph: bytes, tmp_path: Path) -> None:
    file = tmp_path / "damaged"
    for seed, data, outcome in (
        (0, graph, outcome_of_graph),
        (1, program, lambda path: outcome_of_program(path, IMAGES, ())),
    ):
        for kind, new in damaged(data, 30, seed):
            if new == data[:-SIZE]:
                continue  # cut where the checksum begins: a whole program without one
            file.write_bytes(new)
            assert outcome(file) == "refused", kind
    for kind, new in rewritten(graph, 30, 2):
        file.write_bytes(new)
        assert outcome_of_graph(file), kind


@pytest.mark.slow
def test_a_thousand_damaged_files(program: bytes, graph: bytes, tmp_path: Path) -> None:
    file = tmp_path / "damaged"
    for kind, new in damaged(graph, 500, 10):
        file.write_bytes(new)
        assert outcome_of_graph(file) == "refused", kind
    found = set()
    for _kind, new in rewritten(graph, 500, 11):
        file.write_bytes(new)
        start = time.perf_counter()
        found.add(outcome_of_graph(file).partition(",")[0])
        assert time.perf_counter() - start < 10
    assert found == {"refused", "loaded"}
    wanted = cq.load_program(_whole(program, tmp_path))
    for kind, new in damaged(program, 1000, 12):
        file.write_bytes(new)
        outcome = outcome_of_program(file, IMAGES, wanted.run(*IMAGES))
        # Cut where the checksum begins, it is the whole program, and one without a checksum.
        assert outcome == ("same" if new == program[:-SIZE] else "refused"), kind
    # Without its checksum: some are the same network still, a few another, and none is a crash.
    for _kind, new in damaged(program[:-SIZE], 40, 13):
        file.write_bytes(new)
        assert outcome_of_program(file, IMAGES, wanted.run(*IMAGES))


def _whole(program: bytes, folder: Path) -> Path:
    (folder / "whole.pte").write_bytes(program)
    return folder / "whole.pte"


# -- programs without a checksum -------------------------------------------------------------------


def test_a_program_without_a_checksum_runs_apart(program: bytes, tmp_path: Path) -> None:
    bare = tmp_path / "bare.pte"
    bare.write_bytes(program[:-SIZE])
    with_checksum = cq.load_program(_whole(program, tmp_path))
    assert not with_checksum.isolated
    stored = cq.load_program(bare)
    assert stored.isolated
    for seed in (1, 2):
        images = small_images(4, seed)
        assert torch.equal(stored.run(images)[0], with_checksum.run(images)[0])
    method: isolation.IsolatedMethod = stored._method
    os.kill(method._process.pid, signal.SIGSEGV)
    with pytest.raises(cq.ProgramError, match=r"bare\.pte: .* ended \(SIGSEGV\) while it ran"):
        stored.run(*IMAGES)
    # And it stays an error.
    with pytest.raises(cq.ProgramError, match="ended"):
        stored.run(*IMAGES)


@pytest.mark.slow
def test_any_program_runs_apart_if_asked(saved: Path) -> None:
    converted, lowered, _ = load_lowered(
        saved / "net.pte", saved / "net.graph.safetensors", isolated=True
    )
    assert cq.verify(converted, lowered, IMAGES).bit_exact
    lowered.run(*IMAGES)
    assert isinstance(lowered._method, isolation.IsolatedMethod)
    assert cq.load_program(saved / "net.pte", isolated=True).isolated


def test_a_program_that_hangs(program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    method = isolation.IsolatedMethod(program, "it", "forward")
    monkeypatch.setattr(isolation, "TIME_LIMIT_S", 0.5)
    os.kill(method._process.pid, signal.SIGSTOP)
    with pytest.raises(cq.ProgramError, match=r"did not answer within 0 s while it ran"):
        method.execute(IMAGES)
    assert method._process.returncode == -signal.SIGKILL


def test_a_program_that_takes_all_memory(program: bytes, tmp_path: Path) -> None:
    file = deserialize_pte_binary(program[:-SIZE])
    file.program.execution_plan[0].non_const_buffer_sizes[-1] = 200 << 30
    data = bytes(serialize_pte_binary(file, extract_delegate_segments=True))
    (tmp_path / "large.pte").write_bytes(data)
    with pytest.raises(cq.ProgramError, match=r"large\.pte: .* while it was loaded"):
        cq.load_program(tmp_path / "large.pte")


def test_the_limit_of_memory() -> None:
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert isolation.memory_limit(1) == min(2 << 30, half)
    assert isolation.memory_limit(1 << 50) == half


def test_messages_between_the_processes(tmp_path: Path) -> None:
    values = [torch.arange(6).reshape(2, 3), 3, None, torch.zeros(0, 2), 0.5, torch.tensor(True)]
    file = tmp_path / "pipe"
    with file.open("wb") as stream:
        _child.send(stream, {"a": "b"}, values)
    with file.open("rb") as stream:
        message, got = _child.receive(stream, 1 << 20)
    assert message == {"a": "b"}
    for one, two in zip(values, got, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two
    with file.open("rb") as stream, pytest.raises(ValueError, match="a message of"):
        _child.receive(stream, 8)
    with (tmp_path / "empty").open("wb+") as stream, pytest.raises(EOFError):
        _child.receive(stream, 8)


def test_a_named_pipe_is_no_program(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pte")
    with pytest.raises(cq.ProgramError, match="is no regular file"):
        cq.load_program(tmp_path / "pipe.pte")
    with pytest.raises(cq.InputError, match="no such file"):
        cq.load_graph(tmp_path / "pipe.pte")
