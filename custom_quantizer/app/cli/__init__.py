"""The command line: thin commands over the library.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. A command
imports what it needs when it needs it: first what finds a user's mistakes, last the backend.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong use of the command, 130
interrupted.
"""

from __future__ import annotations

import gc
import sys

import click

from custom_quantizer.app.cli import exporting, looking, measuring, quantizing, widths
from custom_quantizer.app.cli.console import Group, open_closed_streams, silence_upstream
from custom_quantizer.app.cli.options import debug_option, examples

__all__ = ["cli", "main"]


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "custom-quantizer demo",
        "custom-quantizer plan resnet18",
        "custom-quantizer quantize resnet18 --weights w.pth --calibration images/ -o resnet18.pte",
        "custom-quantizer inspect resnet18.pte",
        "custom-quantizer verify resnet18.pte",
        "custom-quantizer evaluate resnet18.pte --data val/",
    ),
)
@click.version_option(package_name="custom-quantizer")
@debug_option
def cli() -> None:
    """Quantize PyTorch models to integers, bias included, and check every one of them."""


for _command in (
    quantizing.demo_command,
    quantizing.plan_command,
    quantizing.calibrate_command,
    quantizing.quantize_command,
    looking.inspect_command,
    looking.report_command,
    looking.profile_command,
    measuring.verify_command,
    measuring.evaluate_command,
    measuring.diagnose_command,
    widths.sensitivity_command,
    widths.search_command,
    exporting.export_integers_command,
    exporting.export_c_command,
    exporting.export_onnx_command,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line."""
    gc.set_threshold(*_COLLECTIONS)
    open_closed_streams()
    if "--debug" not in sys.argv:
        silence_upstream()
    from custom_quantizer.core.progress import print_lines

    print_lines(_SECONDS_PER_LINE)
    cli(prog_name="custom-quantizer")


_COLLECTIONS = (20_000, 10, 50)
"""Thresholds of Python's collector of cycles, in a process that is the command's own.

With its defaults it walks over all that PyTorch and ExecuTorch are made of eight times while they
are imported, a fifth of that time, and once or twice in a lowering. Copies of weights do not wait
for it: where they are large, a lowering frees them itself.
"""

_SECONDS_PER_LINE = 15.0
"""Of progress, where standard error is a file."""
