"""What each rank of ``test_distributed.py`` runs; also imported for its model and data."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from custom_quantizer.calibration.statistics import (
    all_reduce_statistics,
    save_statistics,
    solved_qparams,
)
from custom_quantizer.errors import CalibrationError
from custom_quantizer.planning.quantizer import IntegerQuantizer

SCHEMES = ("a8w8", "a8w8-percentile99", "a4w8-histogram", "a8w8-entropy")


def images() -> Tensor:
    """20 images, float32 ``(20, 3, 8, 8)``, the same in every process."""
    return torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def prepared_net(scheme: str, head: str | None = None) -> GraphModule:
    """A small network for one image, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    quantizer = IntegerQuantizer().set_global(scheme)
    if head is not None:
        quantizer.set_module_name("3", head)
    program = torch.export.export(model, (torch.zeros(1, 3, 8, 8),))
    prepared: GraphModule = prepare_pt2e(program.module(), quantizer)
    return prepared


def _reduce(shares: list[int], folder: Path) -> None:
    rank = distributed.get_rank()
    mine = images().split(shares)[rank]
    for scheme in SCHEMES:
        model = prepared_net(scheme)
        for image in mine:
            model(image[None])
        all_reduce_statistics(model)
        save_statistics(model, folder / f"{scheme}.{rank}.safetensors")
        qparams = {n: (float(q.scale), q.zero_point) for n, q in solved_qparams(model).items()}
        (folder / f"{scheme}.{rank}.json").write_text(json.dumps(qparams))


def _refuse(folder: Path) -> None:
    rank = distributed.get_rank()
    twice = prepared_net("a8w8")
    twice(images()[:1])
    all_reduce_statistics(twice)
    other = prepared_net("a8w8", head="a16w8" if rank else None)
    errors = []
    for model in (other, prepared_net("a8w8-moving_average"), twice):
        try:
            all_reduce_statistics(model)
        except CalibrationError as error:
            errors.append(str(error))
    (folder / f"errors.{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    sizes, target = sys.argv[1:]
    _reduce([int(size) for size in sizes.split(",")], Path(target))
    _refuse(Path(target))
    distributed.destroy_process_group()
