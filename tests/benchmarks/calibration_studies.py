"""Studies of calibration on CIFAR-10, measured on the ``.pte``.

    python tests/benchmarks/calibration_studies.py observers      # MobileNetV2, per observer
    python tests/benchmarks/calibration_studies.py batches        # the same images, other batches
    python tests/benchmarks/calibration_studies.py samples        # 8 to 2,048 images
    python tests/benchmarks/calibration_studies.py networks       # ResNet-20 and -32, top-1 and -5
    python tests/benchmarks/calibration_studies.py low_bits       # 4-bit activations, per observer

Need the CIFAR-10 images and weights (see ``tests/support/cifar_models.py``). Each writes
``docs/results/calibration_<study>.json`` and, rendered from it, the table in ``.md``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import (
    cifar10_calibration,
    cifar10_test,
    cifar_mobilenet_v2,
    resnet20,
    resnet32,
)

import custom_quantizer as cq
from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.core.graph import is_quantize

BATCH = 100


def convert(model: nn.Module, scheme: str, batches: Iterable[Tensor]) -> GraphModule:
    """Capture with a dynamic batch, prepare, calibrate, convert."""
    images, _ = cifar10_test(BATCH)
    shapes = ({0: torch.export.Dim("batch", min=1, max=2048)},)
    captured = torch.export.export(model, (images,), dynamic_shapes=shapes).module()
    prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global(scheme))
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    return convert_pt2e(prepared)


def lower(graph: GraphModule) -> cq.LoweredProgram:
    """Lower for batches of ``BATCH``: memory for the largest calibration batch is not needed."""
    images, _ = cifar10_test(BATCH)
    static = torch.export.export(graph, (images,)).module()
    return cq.lower(static, (images,))


def test_batches(limit: int | None) -> list[tuple[Tensor, Tensor]]:
    """Test images and labels."""
    images, labels = cifar10_test(limit)
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def score(models: dict[str, Callable[..., Any]], limit: int | None) -> dict[str, dict[str, Any]]:
    """Top-1, top-5, agreement and the paired difference to the first model, by model."""
    evaluation = cq.evaluate(models, test_batches(limit), slices=5)
    rows = {}
    for entry in evaluation.scores:
        found = entry.against_first
        rows[entry.name] = {
            "samples": entry.samples,
            "top1": entry.top1,
            "top5": entry.top5,
            "agreement": entry.agreement,
            "slices": list(entry.slices),
            "difference": None if found is None else found.difference,
            "interval": None if found is None else [found.low, found.high],
            "p_value": None if found is None else found.p_value,
        }
    return rows


def observers(limit: int | None) -> dict[str, Any]:
    """MobileNetV2: granularity of weights and observer of activations."""
    model = cifar_mobilenet_v2()
    calibration, _ = cifar10_calibration(512)
    schemes = ["a8w8-per_tensor"] + [
        "a8w8" if name == "minmax" else f"a8w8-{name}"
        for name in ("minmax", "percentile", "histogram", "entropy")
    ]
    models: dict[str, Callable[..., Any]] = {"float": model}
    sizes = {}
    for scheme in schemes:
        lowered = lower(convert(model, scheme, calibration.split(64)))
        models[scheme] = lowered.run
        sizes[scheme] = lowered.report.size_bytes
    rows = score(models, limit)
    for scheme, size in sizes.items():
        rows[scheme]["bytes"] = size
    return {"model": "MobileNetV2 (width 0.5)", "calibration_images": 512, "rows": rows}


def batches(limit: int | None) -> dict[str, Any]:
    """ResNet-20: the same 512 images in batches of 1, 8, 32, 128, and shuffled."""
    model = resnet20()
    calibration, _ = cifar10_calibration(512)
    shuffled = calibration[torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    feeds = {f"batches of {n}": calibration.split(n) for n in (1, 8, 32, 128)}
    feeds["shuffled, batches of 32"] = shuffled.split(32)
    result: dict[str, Any] = {"model": "ResNet-20", "calibration_images": 512, "rows": {}}
    for observer in ("", "-percentile", "-histogram", "-entropy"):
        models: dict[str, Callable[..., Any]] = {"float": model}
        qparams = {}
        for name, feed in feeds.items():
            graph = convert(model, f"a8w8{observer}", feed)
            qparams[name] = [n.args[1:3] for n in graph.graph.nodes if is_quantize(n)]
            models[name] = lower(graph).run
        rows = score(models, limit)
        first = qparams["batches of 1"]
        for name, found in qparams.items():
            pairs = list(zip(first, found, strict=True))
            rows[name]["equal_qparams"] = sum(a == b for a, b in pairs)
            rows[name]["qparams"] = len(pairs)
            rows[name]["largest_relative_scale_difference"] = max(
                abs(a[0] - b[0]) / a[0] for a, b in pairs
            )
        result["rows"].update(
            {f"{observer.removeprefix('-') or 'minmax'}, {k}": v for k, v in rows.items()}
        )
    return result


def samples(limit: int | None) -> dict[str, Any]:
    """ResNet-20: number of calibration images."""
    model = resnet20()
    calibration, _ = cifar10_calibration(2048)
    order = torch.randperm(2048, generator=torch.Generator().manual_seed(0))
    models: dict[str, Callable[..., Any]] = {"float": model}
    for count in (8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        graph = convert(model, "a8w8", calibration[order[:count]].split(128))
        models[f"{count} images"] = lower(graph).run
    return {"model": "ResNet-20", "scheme": "a8w8", "rows": score(models, limit)}


def networks(limit: int | None) -> dict[str, Any]:
    """ResNet-20 and -32: float, converted graph, integer reference and program."""
    calibration, _ = cifar10_calibration(512)
    rows: dict[str, Any] = {}
    for name, build in (("ResNet-20", resnet20), ("ResNet-32", resnet32)):
        model = build()
        graph = convert(model, "a8w8", calibration.split(128))
        models: dict[str, Callable[..., Any]] = {
            "float": model,
            "converted graph": graph,
            "integer reference": cq.integer_reference(graph),
            ".pte": lower(graph).run,
        }
        outputs: dict[str, list[Tensor]] = {key: [] for key in models}
        scores = score({k: keeping(m, outputs[k]) for k, m in models.items()}, limit)
        program = torch.cat(outputs[".pte"])
        for key, row in scores.items():
            row["logits"] = program.numel()
            row["different_logits"] = int((torch.cat(outputs[key]) != program).sum())
        rows.update({f"{name}, {k}": v for k, v in scores.items()})
    return {"model": "ResNet-20 and ResNet-32", "calibration_images": 512, "rows": rows}


def keeping(model: Callable[..., Any], outputs: list[Tensor]) -> Callable[..., Any]:
    """``model``, which appends what it returns to ``outputs``."""

    def run(images: Tensor) -> Tensor:
        outputs.append(model(images).detach())
        return outputs[-1]

    return run


def low_bits(limit: int | None) -> dict[str, Any]:
    """ResNet-20 and -32: 4-bit activations by observer, in the converted graph."""
    calibration, _ = cifar10_calibration(512)
    rows: dict[str, Any] = {}
    for name, build in (("ResNet-20", resnet20), ("ResNet-32", resnet32)):
        model = build()
        models: dict[str, Callable[..., Any]] = {"float": model}
        for observer in ("minmax", "percentile99.9", "histogram"):
            scheme = "a4w8" if observer == "minmax" else f"a4w8-{observer}"
            models[f"a4w8, {observer}"] = convert(model, scheme, calibration.split(128))
        rows.update({f"{name}, {k}": v for k, v in score(models, limit).items()})
    return {"model": "ResNet-20 and ResNet-32", "calibration_images": 512, "rows": rows}


STUDIES: dict[str, Callable[[int | None], dict[str, Any]]] = {
    "observers": observers,
    "batches": batches,
    "samples": samples,
    "networks": networks,
    "low_bits": low_bits,
}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = result["rows"]
    names = {
        "bytes": "`.pte` bytes",
        "equal_qparams": "equal scales and zero points",
        "largest_relative_scale_difference": "largest relative difference of a scale",
        "different_logits": "logits that are not the `.pte`'s",
    }
    extra = [key for key in names if any(key in row for row in rows.values())]
    header = ["", "top-1", "top-5", "agrees with float", "against float (95 % interval)", "p"]
    header += [names[key] for key in extra]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    for name, row in rows.items():
        interval = "-"
        if row["difference"] is not None:
            low, high = row["interval"]
            interval = f"{100 * row['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        p_value = "-" if row["p_value"] is None else f"{row['p_value']:.2g}"
        cells = [name, f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['agreement']:.2%}"]
        cells += [interval, p_value]
        for key in extra:
            value = row.get(key)
            if key == "equal_qparams" and value is not None:
                cells.append(f"{value} of {row['qparams']}")
            elif key == "different_logits" and value is not None:
                cells.append(f"{value:,} of {row['logits']:,}")
            elif isinstance(value, float):
                cells.append(f"{value:.2g}")
            else:
                cells.append("" if value is None else f"{value:,}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=None, help="test images (default: all)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.studies:
        result = {"version": 1, "study": name, **STUDIES[name](options.images)}
        stem = options.output / f"calibration_{name}"
        write_json_atomic(stem.with_suffix(".json"), result)
        write_text_atomic(stem.with_suffix(".md"), render(result))
        print(render(result), flush=True)


if __name__ == "__main__":
    main()
