"""What another tool makes of a network: run by the Python of that tool's own environment.

    python peers_worker.py PEER METHOD ITERATIONS NETWORK FOLDER RESULT

``FOLDER`` has what ``peers.py`` put there (images without labels, the network as ONNX and as
weights); the logits of all test images go to ``RESULT.npy``, the rest to ``RESULT.json``. Nothing
of this package is imported. Each method follows the tool's own documentation.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 50
SEED = 0

Predict = Callable[[np.ndarray], np.ndarray]


class Task:
    """What is given: a network, and images to calibrate with."""

    def __init__(self, network: str, folder: Path, scratch: Path) -> None:
        images = np.load(folder / "images.npz")
        self.network = network
        self.calibration: np.ndarray = images["calibration"]
        self.test: np.ndarray = images["test"]
        self.onnx = folder / f"{network}.onnx"
        self.weights = folder / f"{network}.pt"
        self.scratch = scratch

    def batches(self) -> Iterator[np.ndarray]:
        """The images to calibrate with, in full batches."""
        whole = len(self.calibration) // BATCH * BATCH
        yield from np.split(self.calibration[:whole], whole // BATCH)


# -- ONNX Runtime ---------------------------------------------------------------------------------


def onnxruntime_static(
    task: Task, activations: str, weights: str, method: str
) -> tuple[Predict, dict[str, Any]]:
    """``quantize_static``, QDQ format, per channel, after the documented preprocessing."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(task.batches())

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._left, None)
            return None if batch is None else {"x": batch}

    ready, written = task.scratch / "ready.onnx", task.scratch / "quantized.onnx"
    quant_pre_process(str(task.onnx), str(ready))
    quantize_static(
        str(ready),
        str(written),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType[activations],
        weight_type=QuantType[weights],
        calibrate_method=CalibrationMethod[method],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.optimized_model_filepath = str(task.scratch / "optimized.onnx")
    session = ort.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
    runs = Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)
    grid = onnx_grid(onnx.load(str(written)))
    integer = sum(runs[name] for name in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger"))
    floating = sum(runs[name] for name in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"))
    grid["execution"] = {"integer": integer, "float": floating}
    return lambda x: session.run(None, {"x": x})[0], grid


def onnx_grid(model: Any) -> dict[str, Any]:
    """What a QDQ model quantizes: tensors between layers, weights, biases, ops that read them."""
    constants = {t.name: t.data_type for t in model.graph.initializer}
    produced = {name: node for node in model.graph.node for name in node.output}
    activations, weights, biases = set(), Counter[str](), 0
    ops, floating = Counter[str](), Counter[str]()
    from onnx import TensorProto

    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            activations.add(node.output[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            kind = TensorProto.DataType.Name(constants[node.input[0]]).lower()
            if kind == "int32":
                biases += 1
            else:
                weights[kind] += 1
        elif node.op_type != "DequantizeLinear":
            sources = [produced.get(name) for name in node.input]
            reads = [s for s in sources if s is not None and s.op_type != "Constant"]
            read = bool(reads) and all(s.op_type == "DequantizeLinear" for s in reads)
            (ops if read else floating)[node.op_type] += 1
    return {
        "activations": len(activations),
        "weights": dict(weights),
        "bias": "int32" if biases else "float32",
        "ops": dict(ops),
        "float_ops": dict(floating),
    }


# -- NNCF, with OpenVINO ---------------------------------------------------------------------------


def _openvino(task: Task) -> Any:
    import openvino as ov

    return ov.convert_model(str(task.onnx))


def nncf_quantize(task: Task, fast: bool, weight_bits: int) -> tuple[Predict, dict[str, Any]]:
    """``nncf.quantize`` of the OpenVINO model: min-max with (fast) bias correction."""
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        QuantizationParameters,
    )

    advanced, device = None, nncf.TargetDevice.ANY
    if weight_bits != 8:
        device = nncf.TargetDevice.NPU  # no other one takes fewer bits
        parameters = QuantizationParameters(num_bits=weight_bits)
        advanced = AdvancedQuantizationParameters(weights_quantization_params=parameters)
    model = nncf.quantize(
        _openvino(task),
        nncf.Dataset(list(task.batches())),
        subset_size=len(list(task.batches())),
        fast_bias_correction=fast,
        target_device=device,
        advanced_parameters=advanced,
    )
    return _compiled(model)


def nncf_compress(task: Task, mode: str) -> tuple[Predict, dict[str, Any]]:
    """``nncf.compress_weights``, which leaves activations in float."""
    import nncf

    model = nncf.compress_weights(
        _openvino(task),
        mode=nncf.CompressWeightsMode[mode],
        ratio=1.0,
        group_size=-1,
        all_layers=True,
        dataset=nncf.Dataset(list(task.batches())),
    )
    return _compiled(model)


def openvino_grid(model: Any) -> dict[str, Any]:
    """What an OpenVINO model quantizes: its ``FakeQuantize`` nodes, and its constants' types."""
    activations, weights = 0, Counter[str]()
    ops, floating = Counter[str](), Counter[str]()
    levels, narrow = Counter[int](), ("i4", "u4", "i8", "u8")
    computing = {"Convolution", "GroupConvolution", "MatMul", "Add", "AvgPool", "ReduceMean"}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "FakeQuantize":
            of_weight = node.input_value(0).get_node().get_type_name() == "Constant"
            if of_weight:
                weights[f"{node.get_attributes()['levels']} levels"] += 1
            else:
                activations += 1
                levels[int(node.get_attributes()["levels"])] += 1
        elif kind == "Constant" and node.get_element_type().get_type_name() in narrow:
            # Zero points have one dimension.
            if sum(size > 1 for size in node.get_output_shape(0)) > 1:
                weights[f"int{node.get_element_type().bitwidth}"] += 1
        elif kind in computing:
            sources = [node.input_value(i).get_node() for i in range(node.get_input_size())]
            if kind == "Add" and any(s.get_type_name() == "Constant" for s in sources):
                continue  # a bias
            first = sources[0]
            while first.get_type_name() in ("Reshape", "Squeeze"):
                first = first.input_value(0).get_node()
            read = first.get_type_name() == "FakeQuantize"
            (ops if read else floating)[kind] += 1
    return {
        "activations": activations,
        "activation_levels": {str(k): v for k, v in levels.items()},
        "weights": dict(weights),
        "bias": "float32",
        "ops": dict(ops),
        "float_ops": dict(floating),
    }


def _compiled(model: Any) -> tuple[Predict, dict[str, Any]]:
    import openvino as ov

    grid = openvino_grid(model)

    # Without the hint a processor with bfloat16 would compute the float parts in it.
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    layers = Counter[str]()
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if str(info["layerType"].astype(str)) in ("Convolution", "FullyConnected", "MatMul"):
            layers[str(info["runtimePrecision"].astype(str))] += 1

    def predict(x: np.ndarray) -> np.ndarray:
        return np.asarray(compiled([x])[0])

    floating = sum(count for kind, count in layers.items() if not kind.endswith(("i8", "u8")))
    grid["execution"] = {"integer": sum(layers.values()) - floating, "float": floating}
    return predict, grid


# -- AIMET ----------------------------------------------------------------------------------------

_PER_CHANNEL = "default_config_per_channel.json"


def _aimet_model(task: Task) -> Any:
    """The network as AIMET wants it: functions as modules, batch norms folded."""
    import torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.model_preparer import prepare_model

    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    from cifar_networks import CifarResNet, half_width_mobilenet_v2

    built = {
        "ResNet-20": lambda: CifarResNet(3),
        "ResNet-32": lambda: CifarResNet(5),
        "MobileNetV2 w0.5": half_width_mobilenet_v2,
    }[task.network]()
    built.load_state_dict(torch.load(task.weights, weights_only=True))
    model = prepare_model(built.eval())
    fold_all_batch_norms(model, input_shapes=(BATCH, *task.test.shape[1:]))
    return model.eval()


def aimet(task: Task, bits: int, how: str, iterations: int) -> tuple[Predict, dict[str, Any]]:
    """A ``QuantizationSimModel``, its weights by AdaRound, by SeqMSE, or by their ranges."""
    import torch
    from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
    from aimet_torch.common.defs import QuantScheme
    from aimet_torch.common.quantsim_config import __file__ as configurations
    from aimet_torch.quantsim import QuantizationSimModel
    from aimet_torch.seq_mse import SeqMseParams, apply_seq_mse

    torch.manual_seed(SEED)
    model = _aimet_model(task)
    config = str(Path(configurations).parent / _PER_CHANNEL)
    batches = [torch.from_numpy(batch) for batch in task.batches()]
    scheme = QuantScheme.post_training_tf_enhanced

    def forward(model: Any, x: Any) -> Any:
        return model(x[0] if isinstance(x, (list, tuple)) else x)

    if how == "AdaRound":
        parameters = AdaroundParameters(
            batches, len(batches), default_num_iterations=iterations, forward_fn=forward
        )
        model = Adaround.apply_adaround(
            model,
            batches[0],
            parameters,
            path=str(task.scratch),
            filename_prefix="adaround",
            default_param_bw=bits,
            default_quant_scheme=scheme,
            default_config_file=config,
        )
    simulated = QuantizationSimModel(
        model, batches[0], scheme, default_output_bw=8, default_param_bw=bits, config_file=config
    )
    if how == "AdaRound":
        simulated.set_and_freeze_param_encodings(str(task.scratch / "adaround.encodings"))
    elif how == "SeqMSE":
        options = SeqMseParams(num_batches=len(batches), forward_fn=forward)
        apply_seq_mse(model, simulated, batches, options)

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    simulated.compute_encodings(calibrate)

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = simulated.model(torch.from_numpy(x)).numpy()
        return logits

    return predict, aimet_grid(simulated)


def aimet_grid(simulated: Any) -> dict[str, Any]:
    """Quantizers of inputs, outputs and parameters that are on."""
    activations, weights, biases = 0, Counter[str](), 0
    ops, floating = Counter[str](), Counter[str]()
    for module in simulated.model.modules():
        if not hasattr(module, "param_quantizers"):
            continue
        quantizers = (*module.input_quantizers, *module.output_quantizers)
        on = sum(quantizer is not None for quantizer in quantizers)
        activations += on
        kind = type(module).__name__.removeprefix("Quantized").removeprefix("Fake")
        (ops if module.output_quantizers[0] is not None else floating)[kind] += 1
        for name, quantizer in module.param_quantizers.items():
            if quantizer is not None and name == "weight":
                weights[f"int{quantizer.bitwidth}"] += 1
            biases += quantizer is not None and name == "bias"
    return {
        "activations": activations,
        "weights": dict(weights),
        "bias": "int" if biases else "float32",
        "ops": dict(ops),
        "float_ops": dict(floating),
        "execution": {"integer": 0, "float": sum(weights.values())},
    }


METHODS: dict[str, dict[str, Callable[[Task, int], tuple[Predict, dict[str, Any]]]]] = {
    "aimet": {
        "int8": lambda t, n: aimet(t, 8, "ranges", n),
        "int4 weights, ranges": lambda t, n: aimet(t, 4, "ranges", n),
        "int4 weights, SeqMSE": lambda t, n: aimet(t, 4, "SeqMSE", n),
        "int4 weights, AdaRound": lambda t, n: aimet(t, 4, "AdaRound", n),
    },
    "onnxruntime": {
        "int8, u8s8, MinMax": lambda t, _: onnxruntime_static(t, "QUInt8", "QInt8", "MinMax"),
        "int8, s8s8, MinMax": lambda t, _: onnxruntime_static(t, "QInt8", "QInt8", "MinMax"),
        "int8, u8s8, Percentile": lambda t, _: onnxruntime_static(
            t, "QUInt8", "QInt8", "Percentile"
        ),
        "int4 weights, u8, MinMax": lambda t, _: onnxruntime_static(t, "QUInt8", "QInt4", "MinMax"),
    },
    "nncf": {
        "int8, FastBiasCorrection": lambda t, _: nncf_quantize(t, True, 8),
        "int8, BiasCorrection": lambda t, _: nncf_quantize(t, False, 8),
        "int4 weights, FastBiasCorrection": lambda t, _: nncf_quantize(t, True, 4),
        "int4 weights, BiasCorrection": lambda t, _: nncf_quantize(t, False, 4),
        "compress_weights, INT4_SYM": lambda t, _: nncf_compress(t, "INT4_SYM"),
    },
}


def main(peer: str, method: str, iterations: int, network: str, folder: Path, result: Path) -> None:
    """Quantize, run all test images, write what came of it."""
    np.random.seed(SEED)
    scratch = result.with_suffix(".work")
    scratch.mkdir(parents=True, exist_ok=True)
    task = Task(network, folder, scratch)
    begin = time.process_time()
    predict, grid = METHODS[peer][method](task, iterations)
    seconds = time.process_time() - begin
    logits = np.concatenate([predict(x) for x in np.split(task.test, len(task.test) // BATCH)])
    np.save(result.with_suffix(".npy"), logits)
    answer = {"cpu_seconds": round(seconds, 1), "grid": grid}
    result.write_text(json.dumps(answer, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4], *map(Path, sys.argv[5:7]))
