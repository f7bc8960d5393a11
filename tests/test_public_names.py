"""The public surface: adding, losing or renaming a name is a decision, so it is pinned."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import custom_quantizer as cq

NAMES = [
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


def test_public_names_are_these_and_load() -> None:
    assert sorted(cq.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(cq, name).__module__.startswith("custom_quantizer.")


def test_no_module_hides_a_public_name() -> None:
    modules = {path.stem for path in Path(cq.__file__).parent.iterdir()}
    assert not modules & set(NAMES)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, custom_quantizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
