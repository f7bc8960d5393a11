"""Reading back what a device computed, and comparing it with the integer reference.

Nothing is run here: a device test (:mod:`custom_quantizer.reference.device_manifest`) holds the
outputs of the reference, and the device has written its own beside them.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from custom_quantizer.core.file_hashes import sha256_of
from custom_quantizer.core.files import memory_limit, printable, read_bytes
from custom_quantizer.errors import InputError
from custom_quantizer.reference.device_manifest import (
    MANIFEST,
    DeviceManifest,
    NumericOutput,
    TensorEntry,
    read_manifest,
    tensor_from_bytes,
)

__all__ = ["DeviceCheck", "DeviceOutput", "FirstElement", "check_device_outputs"]

_EXPECTED, _OUTPUTS = "expected", "outputs"


@dataclass(frozen=True)
class FirstElement:
    """The first element of an output that differs.

    Attributes:
        sample: number of the sample.
        at: index in the output.
        device: what the device computed.
        reference: what the integer reference computed.
    """

    sample: int
    at: tuple[int, ...]
    device: float
    reference: float

    def __str__(self) -> str:
        return (
            f"first in sample {self.sample} at {list(self.at)}: {self.device:.9g} on the device, "
            f"{self.reference:.9g} by the reference"
        )


@dataclass(frozen=True)
class DeviceOutput:
    """One output of the program, over all samples.

    Attributes:
        index: position among the outputs.
        node: the op that computes it, if the test is of every op.
        path: module path of that op.
        values: how many numbers were compared.
        mismatches: how many differ.
        max_units: largest difference in units of the output's scale, or of its integers; ``None``
            for real numbers.
        max_abs: largest absolute difference.
        first: the first element that differs.
    """

    index: int
    node: str
    path: str
    values: int
    mismatches: int
    max_units: float | None
    max_abs: float
    first: FirstElement | None

    def __str__(self) -> str:
        name = f"output {self.index}"
        if self.node:
            name = f"{self.node} ({self.path})" if self.path else self.node
        units = "" if self.max_units is None else f", by up to {self.max_units:g} units"
        if self.first is None:
            return f"{name}: 0 of {self.values:,} values differ"
        return f"{name}: {self.mismatches:,} of {self.values:,} values differ{units}; {self.first}"


@dataclass(frozen=True)
class DeviceCheck:
    """What was compared, and whether it is equal.

    Attributes:
        outputs: one entry per output; of every op in graph order if the test is of every op.
        samples: how many inputs the device computed.
        exact_expected: every op is integer, so the outputs must be equal bit for bit.
        inexact_ops: ops that are float or emulated, so that equality is not expected, and why.
    """

    outputs: tuple[DeviceOutput, ...]
    samples: int
    exact_expected: bool
    inexact_ops: tuple[str, ...]

    @property
    def bit_exact(self) -> bool:
        """Every output of the device is that of the integer reference."""
        return all(output.mismatches == 0 for output in self.outputs)

    @property
    def first(self) -> DeviceOutput | None:
        """The first output that differs; the first op, if the test is of every op."""
        return next((output for output in self.outputs if output.mismatches), None)

    def to_json(self) -> str:
        """All fields as JSON."""
        record = {**asdict(self), "bit_exact": self.bit_exact, "version": 1}
        return json.dumps(record, indent=2)

    def __str__(self) -> str:
        samples = "1 sample" if self.samples == 1 else f"{self.samples:,} samples"
        lines = [f"bit-exact on the device: {'yes' if self.bit_exact else 'NO'} ({samples})"]
        by_op = any(output.node for output in self.outputs)
        if by_op and self.first is not None:
            lines.append(f"  first op that differs: {self.first}")
            wrong = sum(1 for output in self.outputs if output.mismatches)
            lines.append(f"  {wrong:,} of {len(self.outputs):,} quantized tensors differ")
        elif by_op:
            lines.append(f"  0 of {len(self.outputs):,} quantized tensors differ")
        else:
            lines += [f"  {output}" for output in self.outputs]
        lines += [f"  not bit-exact by design: {op}" for op in self.inexact_ops]
        return "\n".join(lines)


def check_device_outputs(
    program: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> DeviceCheck:
    """Compare what a device computed with the integer reference.

    Values are compared as numbers; NaN equals NaN.

    Args:
        program: the ``.pte`` that the test is for.
        folder: of the device test, with the device's outputs in ``outputs``; or a folder of outputs
            directly in that of the test.

    Raises:
        InputError: the test is of another program; a file of it is missing, damaged, too short or
            too long; or there are files that are not of this test.
    """
    test, outputs = _find(Path(folder))
    manifest = read_manifest(test)
    if sha256_of(read_bytes(program, memory_limit())) != manifest.verified_program:
        raise InputError(
            f"{test} is a test of another program than {os.fspath(program)} (their SHA-256 "
            "differ); name the program that it was saved from, or save a new test"
        )
    _check_names(manifest, outputs)
    statistics = [_Statistics(i, output) for i, output in enumerate(manifest.outputs)]
    for n, sample in enumerate(manifest.samples):
        for found, entry in zip(statistics, sample.outputs, strict=True):
            want, got = _expected(test, entry), _computed(outputs, entry)
            found.add(n, got, want)
    return DeviceCheck(
        tuple(found.result() for found in statistics),
        len(manifest.samples),
        manifest.exact,
        manifest.inexact,
    )


def _find(folder: Path) -> tuple[Path, Path]:
    """The folder of the test, and that of the outputs."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; name the folder of a device test")
    if (folder / MANIFEST).is_file():
        test, outputs = folder, folder / _OUTPUTS
    else:
        test, outputs = folder.resolve().parent, folder
    if not (test / MANIFEST).is_file():
        raise InputError(
            f"there is no {MANIFEST} in {folder} or in the folder around it; put the outputs into "
            "the folder that LoweredProgram.save_device_test wrote, and name that"
        )
    if not outputs.is_dir():
        raise InputError(
            f"{outputs} does not exist: run the program on the device as {test / 'README.md'} says "
            "and copy its folder of outputs there"
        )
    return test, outputs


def _check_names(manifest: DeviceManifest, outputs: Path) -> None:
    """Raise ``InputError`` unless the files are those that the runner writes for this test."""
    wanted = {entry.file for sample in manifest.samples for entry in sample.outputs}
    found = {path.name for path in outputs.iterdir() if path.suffix == ".bin"}
    if missing := wanted - found:
        raise InputError(
            f"{outputs} lacks {len(missing)} of {len(wanted)} outputs ({_some(missing)}): the "
            "runner did not come to its end, or not all was copied; run it again"
        )
    if other := found - wanted:
        raise InputError(
            f"{outputs} holds {_some(other)}, which this test does not have: these are outputs of "
            "another test, or of several; remove them and copy the outputs of this one again"
        )


def _some(names: set[str]) -> str:
    shown = ", ".join(printable(name) for name in sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown}, ..."


def _expected(test: Path, entry: TensorEntry) -> Tensor:
    path = test / _EXPECTED / entry.file
    data = read_bytes(path, memory_limit())
    if sha256_of(data) != entry.sha256:
        raise InputError(
            f"{path} was changed after it was written: its SHA-256 is not that of the manifest; "
            "copy the device test again, or save a new one"
        )
    return tensor_from_bytes(data, entry, str(path))


def _computed(outputs: Path, entry: TensorEntry) -> Tensor:
    path = outputs / entry.file
    return tensor_from_bytes(read_bytes(path, memory_limit()), entry, str(path))


class _Statistics:
    """Differences of one output over samples."""

    def __init__(self, index: int, output: NumericOutput) -> None:
        self._index, self._output = index, output
        self._values = self._mismatches = 0
        self._max = 0.0
        self._integers = False
        self._first: FirstElement | None = None

    def add(self, sample: int, got: Tensor, want: Tensor) -> None:
        self._values += want.numel()
        self._integers = not want.is_floating_point()
        # float64 holds every difference of float32 and of integers up to 2**53 exactly.
        mine, theirs = want.to(torch.float64), got.to(torch.float64)
        wrong = (got != want) & ~(mine.isnan() & theirs.isnan())
        if not wrong.any():
            return
        self._mismatches += int(wrong.sum())
        self._max = max(self._max, _largest((theirs - mine).abs()[wrong]))
        if self._first is None:
            at = tuple(int(i) for i in wrong.nonzero()[0])
            self._first = FirstElement(sample, at, float(theirs[at]), float(mine[at]))

    def result(self) -> DeviceOutput:
        scale = 1.0 if self._integers else self._output.scale
        units = None if scale is None else float(round(self._max / scale))
        return DeviceOutput(
            self._index,
            self._output.node,
            self._output.path,
            self._values,
            self._mismatches,
            units,
            self._max,
            self._first,
        )


def _largest(differences: Tensor) -> float:
    """The largest difference; one to NaN or an infinity is the largest float32 there is."""
    return float(torch.nan_to_num(differences, nan=torch.inf).max().clamp(max=_LARGEST))


_LARGEST = torch.finfo(torch.float32).max
