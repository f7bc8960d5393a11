"""The exception tree.

::

    CustomQuantizerError
    |-- ConfigError            a setter or a file asks for something that does not exist
    |   `-- SchemeError        a bit-width, granularity or name no scheme can have
    |-- CaptureError           the model is not an exported, eval-mode, float32 aten graph
    |-- CalibrationError       no data, NaN or inf, wrong shapes
    |-- TrainingError          training data, loss or checkpoint of quantization-aware training
    |-- ConversionError        a converted graph does not hold what it must
    |-- LoweringError          the backend refused, or the program it gave is wrong
    |   `-- VerificationError  the program's integers or outputs differ from the graph's
    |-- ProgramError           a .pte that cannot be read or run
    `-- InputError             inputs, files, models or datasets the user named

Every message says what was wrong, where (node and module path, or file), and what to do.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable, Sequence

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "ConversionError",
    "CustomQuantizerError",
    "InputError",
    "LoweringError",
    "ProgramError",
    "SchemeError",
    "TrainingError",
    "VerificationError",
    "first_line",
    "where_raised",
]


class CustomQuantizerError(Exception):
    """Base class: ``except CustomQuantizerError`` catches all that this package raises itself."""


class ConfigError(CustomQuantizerError):
    """A setter, rule or config file names something that does not exist."""


class SchemeError(ConfigError):
    """A scheme asks for a bit-width, granularity or combination that is not legal."""


class CaptureError(CustomQuantizerError):
    """The model handed in is not an exported, eval-mode, floating-point aten graph."""


class CalibrationError(CustomQuantizerError):
    """Calibration data is missing, empty, of the wrong shape, or not finite."""


class TrainingError(CustomQuantizerError):
    """Quantization-aware training cannot begin, or cannot go on."""


class ConversionError(CustomQuantizerError):
    """A converted graph does not hold what the next stage needs."""


class LoweringError(CustomQuantizerError):
    """The backend refused the graph, or what it wrote is wrong."""


class VerificationError(LoweringError):
    """Integers or outputs of the program differ from those of the converted graph."""


class ProgramError(CustomQuantizerError):
    """A ``.pte`` file cannot be read, loaded or run."""


class InputError(CustomQuantizerError):
    """Inputs, files, models or datasets that the user named cannot be used."""


def first_line(error: BaseException) -> str:
    """Class and first line of somebody else's error, without a period, to be put into ours."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"


def where_raised(error: BaseException) -> str:
    """``, at net.py:7``: the last line of a user's own code in a traceback; nothing if none is."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_PACKAGE, "<"))]
    own = [f for f in own if "site-packages" not in f.filename and _LIBRARY not in f.filename]
    return f", at {own[-1].filename}:{own[-1].lineno}" if own else ""


_PACKAGE = os.path.dirname(__file__)
_LIBRARY = os.path.dirname(os.__file__)

_LONGEST_WORD = 200


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> str:
    """``; did you mean a, b or c?``, or nothing when nothing is near."""
    if len(word) > _LONGEST_WORD:  # difflib takes the square of the length
        return ""
    near = difflib.get_close_matches(word, list(candidates), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def some(names: Sequence[str], limit: int = 6) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
