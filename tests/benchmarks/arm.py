"""Programs on ARM and on older x86-64 CPUs, emulated by QEMU, against the integer reference.

    CUSTOM_QUANTIZER_ARM_CACHE=/some/folder python tests/benchmarks/arm.py --output docs/results

Needs what ``tests/backends/test_arm.py`` needs. Writes ``arm.json`` and, rendered from it,
``arm.md``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.device import CPUS, emulator_version, missing, run_on
from support.device_programs import MODES, PROGRAMS, DeviceProgram

from custom_quantizer.core.files import write_json_atomic, write_text_atomic


def measure(folder: Path) -> dict[str, Any]:
    """Run every program on every CPU."""
    for cpu in CPUS:
        if why := missing(cpu):
            raise SystemExit(why)
    rows: list[dict[str, Any]] = []
    for name, scheme in PROGRAMS:
        program = DeviceProgram(name, scheme)
        kits = {
            machine: program.save(folder / f"{name} {scheme} {machine}", machine)
            for machine in MODES
        }
        for cpu in CPUS:
            kit = kits[cpu.machine]
            run_on(cpu, kit, "program.pte", folder)
            judged = asdict(program.judge(kit))
            judged["wrong"] = len(judged["wrong"])
            row = {"network": name, "scheme": scheme, "cpu": cpu.name, **judged}
            rows.append(row)
            print(row, flush=True)
    return {
        "version": 1,
        "executorch": version("executorch"),
        "emulator": f"QEMU {emulator_version('aarch64')}",
        "cpus": [asdict(cpu) for cpu in CPUS],
        "rows": rows,
    }


def render(result: dict[str, Any]) -> str:
    """The result as two Markdown tables: by CPU, and by program."""
    rows = result["rows"]
    names = [cpu["name"] for cpu in result["cpus"]]
    lines = [
        f"ExecuTorch {result['executorch']}, CPUs emulated by {result['emulator']}; values that "
        "were compared with those of the integer reference.",
        "",
        "| CPU | XNNPACK's kernels | mode | integer programs: values | differ | other programs: "
        "values | outside their bound |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cpu in result["cpus"]:
        mine = [row for row in rows if row["cpu"] == cpu["name"]]
        exact = [row for row in mine if row["exact"]]
        other = [row for row in mine if not row["exact"]]
        lines.append(
            f"| {cpu['name']} ({cpu['machine']}) | {cpu['kernels']} | `{MODES[cpu['machine']]}` "
            f"| {total(exact, 'values')} | {total(exact, 'different')} | {total(other, 'values')} "
            f"| {total(other, 'wrong')} |"
        )
    lines += [
        "",
        f"| program | scheme | compared | values | differ: {' | '.join(names)} |",
        f"| {' | '.join(['---'] * (4 + len(names)))} |",
    ]
    for network, scheme in dict.fromkeys((row["network"], row["scheme"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["scheme"]) == (network, scheme)]
        how = "outputs" if mine[0]["exact"] else "each quantized tensor"
        how = "outputs, relative error" if scheme.startswith("dyn") else how
        cells = " | ".join(cell(row) for row in mine)
        lines.append(f"| {network} | {scheme} | {how} | {mine[0]['values']:,} | {cells} |")
    return "\n".join(lines) + "\n"


def total(rows: list[dict[str, Any]], key: str) -> str:
    """A sum with thousands separated."""
    return f"{sum(row[key] for row in rows):,}"


def cell(row: dict[str, Any]) -> str:
    """How many values differ; for dynamic quantization, which has no exact reference, nothing."""
    if row["scheme"].startswith("dyn"):
        return "outside" if row["wrong"] else "within 0.02"
    return f"{row['different']:,}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    write_json_atomic(options.output / "arm.json", result)
    write_text_atomic(options.output / "arm.md", render(result))
    print(render(result))


if __name__ == "__main__":
    main()
