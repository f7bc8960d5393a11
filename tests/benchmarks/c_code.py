"""C code of networks: values against NumPy, bytes on a Cortex-M4, time against the program.

    python tests/benchmarks/c_code.py --output docs/results

Needs gcc and, for the bytes, arm-none-eabi-gcc; ResNet-20 needs the shared weights. Writes
``c_code.json`` and, rendered from it, ``c_code.md``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from support.cifar_models import cifar10_calibration, cifar10_test, resnet20
from support.models import convert
from torch import Tensor, nn

import custom_quantizer as cq
from custom_quantizer.app.digits import load_digits_data, train_digits
from custom_quantizer.core.files import write_json_atomic, write_text_atomic

SCHEMES = ("a8w8", "a8w4", "a16w8")
HOST = ("gcc", "-std=c99", "-O3", "-march=native")
CORTEX_M4 = ("arm-none-eabi-gcc", "-std=c99", "-Os", "-mcpu=cortex-m4", "-mthumb")
SECTIONS = ("-ffunction-sections", "-fdata-sections")

# What a bare machine lacks, so that the size is that of all the network needs.
STRING = """
#include <stddef.h>
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
"""
BARE = """
#include <string.h>
#include "net.h"
void *memcpy(void *to, const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++) ((unsigned char *)to)[i] = ((const unsigned char *)from)[i];
    return to;
}
void *memset(void *to, int value, size_t size)
{
    for (size_t i = 0; i < size; i++) ((unsigned char *)to)[i] = (unsigned char)value;
    return to;
}
extern const signed char input[];
extern signed char output[];
void _start(void);
void _start(void) { net_run((const void *)input, (void *)output); }
const signed char input[1];
signed char output[1];
"""
TIMER = """
#include <stdio.h>
#include <time.h>
#include "net.h"
static %(type)s input[NET_INPUT0_SIZE];
static %(type)s output[NET_OUTPUT0_SIZE];
int main(void)
{
    const clock_t start = clock();
    for (int i = 0; i < %(runs)d; i++) net_run(input, output);
    printf("%%.9f\\n", (double)(clock() - start) / CLOCKS_PER_SEC / %(runs)d);
    return 0;
}
"""


def networks() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Float models, 100 images each, and images to calibrate on."""
    digits = load_digits_data()
    trained = train_digits(progress=False, data=digits)
    return {
        "digits CNN": (trained, digits.test_images[:100], digits.train_images[:128]),
        "ResNet-20": (resnet20(), cifar10_test(100)[0], cifar10_calibration(128)[0]),
    }


def measure_one(model: nn.Module, images: Tensor, calibration: Tensor, scheme: str) -> Any:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    example = (images[:1],)
    graph = convert(model, example, quantizer, [(image,) for image in calibration.split(1)]).graph
    with tempfile.TemporaryDirectory() as folder:
        row: dict[str, Any] = {"images": len(images), **compare(graph, images, Path(folder) / "x")}
        one = Path(folder) / "one"
        code = cq.save_c(graph, one, vectors=1)
        row |= {
            "constant_bytes": code.constant_bytes,
            "arena_bytes": code.arena_bytes,
            "peak_bytes": code.peak_bytes,
            "scratch_bytes": code.scratch_bytes,
            **sizes(one),
            **times(one, cq.lower(graph, example), example, scheme),
        }
    return row


def compare(graph: torch.fx.GraphModule, images: Tensor, folder: Path) -> dict[str, int]:
    """All images as one batch, against NumPy."""
    cq.save_c(graph, folder, batch=len(images), inputs=(images,), vectors=1)
    sources = [*folder.glob("*.c")]
    subprocess.run([*HOST, *sources, "-o", folder / "test"], check=True)
    done = subprocess.run([folder / "test"], capture_output=True, text=True)
    found = re.fullmatch(r"(\d+) of (\d+) values differ\n", done.stdout)
    assert found is not None, done
    return {"differ": int(found[1]), "values": int(found[2])}


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of flash and RAM, of everything that is linked."""
    (folder / "string.h").write_text(STRING)
    (folder / "bare.c").write_text(BARE)
    names = ("net.c", "net_constants.c", "cq_kernels.c", "bare.c")
    linked = folder / "bare.elf"
    command = [*CORTEX_M4, *SECTIONS, f"-I{folder}", "-Wl,--gc-sections", "-nostdlib"]
    subprocess.run(
        [*command, *(folder / name for name in names), "-lgcc", "-o", linked], check=True
    )
    listed = subprocess.run(
        ["arm-none-eabi-size", linked], capture_output=True, text=True, check=True
    )
    text, data, bss = map(int, listed.stdout.splitlines()[1].split()[:3])
    return {"flash_bytes": text + data, "ram_bytes": data + bss}


def times(
    folder: Path, lowered: cq.LoweredProgram, example: tuple[Tensor, ...], scheme: str
) -> dict[str, float]:
    """Seconds for one image, of the code and of the program in turn, medians of nine."""
    kind = "int16_t" if scheme.startswith("a16") else "int8_t"
    (folder / "timer.c").write_text(TIMER % {"type": kind, "runs": 5})
    sources = [folder / name for name in ("net.c", "net_constants.c", "cq_kernels.c", "timer.c")]
    subprocess.run([*HOST, *sources, "-o", folder / "timer"], check=True)
    code, program = [], []
    for _ in range(9):
        done = subprocess.run([folder / "timer"], capture_output=True, text=True, check=True)
        code.append(float(done.stdout))
        start = time.process_time()
        for _ in range(20):
            lowered.run(*example)
        program.append((time.process_time() - start) / 20)
    return {
        "code_seconds": statistics.median(code),
        "program_seconds": statistics.median(program),
    }


def measure() -> dict[str, Any]:
    """Every network at every scheme."""
    torch.set_num_threads(1)
    if shutil.which(CORTEX_M4[0]) is None:
        raise SystemExit(f"needs {CORTEX_M4[0]}")
    rows = []
    for name, (model, images, calibration) in networks().items():
        for scheme in SCHEMES:
            row = {"network": name, "scheme": scheme}
            row |= measure_one(model, images, calibration, scheme)
            rows.append(row)
            print(row, flush=True)
    compiler = subprocess.run([CORTEX_M4[0], "-dumpversion"], capture_output=True, text=True)
    return {"version": 1, "compiler": compiler.stdout.strip(), "rows": rows}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        f"Bytes: linked for a Cortex-M4 by arm-none-eabi-gcc {result['compiler']}, -Os, all that "
        "the network needs. Time: of one image on one core of an x86-64 CPU, gcc -O3 "
        "-march=native, over that of the `.pte` (XNNPACK, called from Python) in the same run.",
        "",
        "| network | scheme | values compared | differ | flash, bytes | of these, constants "
        "| RAM, bytes | of these, activations | time, x `.pte` |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [
            row["network"],
            row["scheme"],
            *(
                f"{row[key]:,}"
                for key in ("values", "differ", "flash_bytes", "constant_bytes", "ram_bytes")
            ),
            f"{row['arena_bytes']:,}",
            f"{row['code_seconds'] / row['program_seconds']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    folder = parser.parse_args().output
    result = measure()
    write_json_atomic(folder / "c_code.json", result)
    write_text_atomic(folder / "c_code.md", render(result))


if __name__ == "__main__":
    main()
