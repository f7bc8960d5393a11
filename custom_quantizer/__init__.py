"""PT2E quantization with per-op integer formats and an explicit int32 bias.

The public names; see ``README.md`` for a quick start and ``docs/`` for everything else. They are
loaded when they are first used: importing PyTorch, torchao and ExecuTorch takes seconds, which
``custom-quantizer --help`` need not wait for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from custom_quantizer.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ConversionError,
    CustomQuantizerError,
    InputError,
    LoweringError,
    ProgramError,
    SchemeError,
    TrainingError,
    VerificationError,
)

if TYPE_CHECKING:
    from custom_quantizer.accuracy.adoption import Adoption, adopt
    from custom_quantizer.accuracy.improving import Improvement, improve
    from custom_quantizer.analysis.allocation.searching import SearchPoint, SearchResult
    from custom_quantizer.analysis.allocation.sensitivity import Loss, Sensitivity
    from custom_quantizer.analysis.diagnosis import Diagnosis, diagnose
    from custom_quantizer.analysis.evaluation import Evaluation, evaluate
    from custom_quantizer.analysis.fidelity import (
        Fidelity,
        FloatCheck,
        OutputFidelity,
        check_prepared,
    )
    from custom_quantizer.analysis.verification import Verification, verify
    from custom_quantizer.app.data import DataSource, Preprocess, load_data
    from custom_quantizer.app.models import load_model
    from custom_quantizer.app.pipeline import (
        QuantizationResult,
        quantize,
        record_calibration,
    )
    from custom_quantizer.app.saved_graph import load_graph, save_graph
    from custom_quantizer.app.widths import search, sensitivity
    from custom_quantizer.backends import lower
    from custom_quantizer.backends.tosa import TosaProgram, TosaReport
    from custom_quantizer.backends.xnnpack import (
        LoweredProgram,
        LoweringReport,
        load_program,
        read_program,
    )
    from custom_quantizer.backends.xnnpack.partitioner import (
        XnnpackPartitioner,
        check,
        export_converted,
        io_constants,
    )
    from custom_quantizer.backends.xnnpack.recipe import IntegerRecipe, session_program
    from custom_quantizer.calibration.run import CalibrationSummary, calibrate
    from custom_quantizer.calibration.statistics import (
        all_reduce_statistics,
        freeze_ranges,
        load_statistics,
        merge_statistics,
        save_statistics,
        set_ranges,
        set_weight_scales,
    )
    from custom_quantizer.core.arithmetic import QParams
    from custom_quantizer.core.formats import IntFormat
    from custom_quantizer.core.schemes import OpScheme, TensorScheme, scheme
    from custom_quantizer.planning.plan import OpPlan, Plan, TensorPlan
    from custom_quantizer.planning.quantizer import IntegerQuantizer
    from custom_quantizer.reference import (
        Accumulator,
        IntegerReference,
        accumulators,
        integer_reference,
        load_integers,
        save_integers,
    )
    from custom_quantizer.reference.c_code import CCode, save_c
    from custom_quantizer.reference.interchange.encodings import (
        EncodingSummary,
        load_encodings,
        save_encodings,
    )
    from custom_quantizer.reference.interchange.onnx_file import OnnxSummary, save_onnx
    from custom_quantizer.report.graph_record import inspect
    from custom_quantizer.report.profiles import Profile, profile
    from custom_quantizer.report.program_record import inspect_program
    from custom_quantizer.report.record import ProgramReport, Report

__all__ = [
    "Accumulator",
    "Adoption",
    "CCode",
    "CalibrationError",
    "CalibrationSummary",
    "CaptureError",
    "ConfigError",
    "ConversionError",
    "CustomQuantizerError",
    "DataSource",
    "Diagnosis",
    "EncodingSummary",
    "Evaluation",
    "Fidelity",
    "FloatCheck",
    "Improvement",
    "InputError",
    "IntFormat",
    "IntegerQuantizer",
    "IntegerRecipe",
    "IntegerReference",
    "Loss",
    "LoweredProgram",
    "LoweringError",
    "LoweringReport",
    "OnnxSummary",
    "OpPlan",
    "OpScheme",
    "OutputFidelity",
    "Plan",
    "Preprocess",
    "Profile",
    "ProgramError",
    "ProgramReport",
    "QParams",
    "QuantizationResult",
    "Report",
    "SchemeError",
    "SearchPoint",
    "SearchResult",
    "Sensitivity",
    "TensorPlan",
    "TensorScheme",
    "TosaProgram",
    "TosaReport",
    "TrainingError",
    "Verification",
    "VerificationError",
    "XnnpackPartitioner",
    "accumulators",
    "adopt",
    "all_reduce_statistics",
    "calibrate",
    "check",
    "check_prepared",
    "diagnose",
    "evaluate",
    "export_converted",
    "freeze_ranges",
    "improve",
    "inspect",
    "inspect_program",
    "integer_reference",
    "io_constants",
    "load_data",
    "load_encodings",
    "load_graph",
    "load_integers",
    "load_model",
    "load_program",
    "load_statistics",
    "lower",
    "merge_statistics",
    "profile",
    "quantize",
    "read_program",
    "record_calibration",
    "save_c",
    "save_encodings",
    "save_graph",
    "save_integers",
    "save_onnx",
    "save_statistics",
    "scheme",
    "search",
    "sensitivity",
    "session_program",
    "set_ranges",
    "set_weight_scales",
    "verify",
]

# No module may be called like a public name: importing it would hide what is meant.
_NAMES = {
    "accuracy.adoption": ("Adoption", "adopt"),
    "accuracy.improving": ("Improvement", "improve"),
    "calibration.run": ("CalibrationSummary", "calibrate"),
    "analysis.diagnosis": ("Diagnosis", "diagnose"),
    "analysis.evaluation": ("Evaluation", "evaluate"),
    "analysis.fidelity": ("Fidelity", "FloatCheck", "OutputFidelity", "check_prepared"),
    "core.arithmetic": ("QParams",),
    "core.formats": ("IntFormat",),
    "reference": (
        "Accumulator",
        "IntegerReference",
        "accumulators",
        "integer_reference",
        "load_integers",
        "save_integers",
    ),
    "reference.c_code": ("CCode", "save_c"),
    "reference.interchange.encodings": ("EncodingSummary", "load_encodings", "save_encodings"),
    "reference.interchange.onnx_file": ("OnnxSummary", "save_onnx"),
    "app.pipeline": ("QuantizationResult", "quantize", "record_calibration"),
    "planning.plan": ("OpPlan", "Plan", "TensorPlan"),
    "planning.quantizer": ("IntegerQuantizer",),
    "report.profiles": ("Profile", "profile"),
    "report.graph_record": ("inspect",),
    "report.program_record": ("inspect_program",),
    "report.record": ("ProgramReport", "Report"),
    "app.saved_graph": ("load_graph", "save_graph"),
    "core.schemes": ("OpScheme", "TensorScheme", "scheme"),
    "analysis.allocation.searching": ("SearchPoint", "SearchResult"),
    "analysis.allocation.sensitivity": ("Loss", "Sensitivity"),
    "app.widths": ("search", "sensitivity"),
    "app.data": ("DataSource", "Preprocess", "load_data"),
    "app.models": ("load_model",),
    "calibration.statistics": (
        "all_reduce_statistics",
        "freeze_ranges",
        "load_statistics",
        "merge_statistics",
        "save_statistics",
        "set_ranges",
        "set_weight_scales",
    ),
    "analysis.verification": ("Verification", "verify"),
    "backends": ("lower",),
    "backends.tosa": ("TosaProgram", "TosaReport"),
    "backends.xnnpack": (
        "LoweredProgram",
        "LoweringReport",
        "load_program",
        "read_program",
    ),
    "backends.xnnpack.partitioner": (
        "XnnpackPartitioner",
        "check",
        "export_converted",
        "io_constants",
    ),
    "backends.xnnpack.recipe": ("IntegerRecipe", "session_program"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "qat":  # a module, so that it need not be imported first: cq.qat.finetune
            return import_module(f"{__name__}.training.qat")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
