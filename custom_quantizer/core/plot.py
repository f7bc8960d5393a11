"""Pictures, for those who installed matplotlib: it is an optional dependency."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from custom_quantizer.core.files import write_bytes_atomic
from custom_quantizer.errors import InputError

__all__ = ["check_figure_path", "new_figure", "save_figure"]


def check_figure_path(path: str | os.PathLike[str]) -> None:
    """Refuse, before there is anything to draw, what :func:`save_figure` would refuse.

    Raises:
        InputError: matplotlib is not installed, or does not know the format.
    """
    _format(new_figure(1, 1), path)


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib`` figure, which belongs to no window.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "plots need matplotlib, which is not installed: pip install 'custom-quantizer[plot]'"
        ) from error
    # Not pyplot: its figures stay in memory until somebody closes them.
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` to ``path`` in one step; the suffix chooses the format.

    Raises:
        InputError: matplotlib does not know the format, or the file cannot be written.
    """
    suffix = _format(figure, path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=120)
    write_bytes_atomic(path, buffer.getvalue())


def _format(figure: Any, path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower().removeprefix(".")
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise InputError(
            f"cannot draw {path}: its suffix names no format; use .svg, .png or .pdf, or one of "
            f"{', '.join(sorted(known.keys() - {'pdf', 'png', 'svg'}))}"
        )
    return suffix
