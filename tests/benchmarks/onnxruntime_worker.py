"""Quantizes an ONNX model with ONNX Runtime and runs it: see ``onnxruntime_latency.py``.

Runs in an environment with onnxruntime and onnx only. Prints the outputs of the images to check,
then, for each number that it reads, the CPU milliseconds of so many runs: JSON, a line each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    """Images, one at a time."""

    def __init__(self, images: np.ndarray) -> None:
        self._left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._left, None)
        return None if image is None else {"x": image}


def main() -> None:
    """Quantize, check, and run whenever asked."""
    answers = os.fdopen(os.dup(1), "w")  # what others print goes to standard error
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    images = np.load(folder / "images.npz")
    ready, written = folder / "ready.onnx", folder / "quantized.onnx"
    quant_pre_process(str(folder / "float.onnx"), str(ready))
    quantize_static(
        str(ready),
        str(written),
        Reader(images["calibration"]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"x": x})[0].tolist() for x in images["checked"]]
    print(json.dumps(outputs), file=answers, flush=True)
    given = {"x": images["checked"][0]}
    for line in sys.stdin:
        milliseconds = []
        for _ in range(int(line)):
            start = time.process_time()
            session.run(None, given)
            milliseconds.append(1e3 * (time.process_time() - start))
        print(json.dumps(milliseconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
