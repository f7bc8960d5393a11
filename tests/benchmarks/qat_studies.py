"""Studies of quantization-aware training, all accuracies measured on the ``.pte``.

    python tests/benchmarks/qat_studies.py widths     # small CNN, with and without batch norm
    python tests/benchmarks/qat_studies.py bias       # bias of 32, 16, 8, 4 bits and float
    python tests/benchmarks/qat_studies.py rates      # optimizer and learning rate, 4 and 8 bits
    python tests/benchmarks/qat_studies.py networks   # ResNet-20 and MobileNetV2
    python tests/benchmarks/qat_studies.py starts     # from calibrated and from improved weights

CIFAR-10 and its weights come from the data folder (see ``tests/support/cifar_models.py``);
``--dataset fashionmnist --data-root FOLDER`` takes FashionMNIST as torchvision stores it (for
``widths``, ``bias`` and ``rates``). Every cell of a study is kept in ``--work`` when it is done,
and a training that was interrupted goes on where it stopped: run the same command again.

Each study writes ``docs/results/qat_<study>.json`` and, rendered from it, the table in ``.md``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torchao.quantization.pt2e.quantize_pt2e import (
    convert_pt2e,
    prepare_pt2e,
    prepare_qat_pt2e,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.cifar_models import (
    SmallCNN,
    cifar10_calibration,
    cifar10_test,
    cifar_mobilenet_v2,
    resnet20,
)

import custom_quantizer as cq
from custom_quantizer.analysis.paired import compare_values
from custom_quantizer.core.files import write_json_atomic, write_text_atomic
from custom_quantizer.reference.converted import read_converted
from custom_quantizer.training import qat

BATCH = 128
TEST_BATCH = 100
CALIBRATION = 512


# -- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Images and labels in memory.

    Attributes:
        name: for files.
        channels: of an image.
        train: ``(n, channels, 32, 32)`` and int64 labels.
        test: likewise.
    """

    name: str
    channels: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def test_batches(self) -> list[tuple[Tensor, Tensor]]:
        images, labels = self.test
        return list(zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True))


def cifar10() -> Dataset:
    return Dataset("cifar10", 3, cifar10_calibration(50_000), cifar10_test())


def fashionmnist(root: Path) -> Dataset:
    """FashionMNIST, padded to 32x32 and normalized; InputError where it is not in ``root``."""
    from torchvision.datasets import FashionMNIST

    splits = []
    for train in (True, False):
        try:
            found = FashionMNIST(root, train=train, download=False)
        except RuntimeError as error:
            raise cq.InputError(
                f"FashionMNIST is not in {root}. Where there is a network, fetch it with: python "
                f"-c \"from torchvision.datasets import FashionMNIST; FashionMNIST('{root}', "
                'download=True)"'
            ) from error
        images = F.pad(found.data.unsqueeze(1).to(torch.float32) / 255, (2, 2, 2, 2))
        splits.append(((images - 0.286) / 0.353, found.targets.to(torch.int64)))
    return Dataset("fashionmnist", 1, splits[0], splits[1])


class Loader:
    """Shuffled batches of augmented images: flipped and shifted by up to 4 pixels."""

    def __init__(self, dataset: Dataset, steps: int) -> None:
        self._images, self._labels = dataset.train
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.cat([torch.randperm(len(self._images)) for _ in range(self._passes)])
        for chosen in order.split(BATCH)[: self._steps]:
            images = self._images[chosen]
            flipped = torch.rand(len(chosen)) < 0.5
            images = torch.where(flipped.reshape(-1, 1, 1, 1), images.flip(3), images)
            top, left = torch.randint(0, 9, (2,)).tolist()
            padded = F.pad(images, (4, 4, 4, 4))
            yield padded[:, :, top : top + 32, left : left + 32], self._labels[chosen]

    @property
    def _passes(self) -> int:
        return -(-self._steps * BATCH // len(self._images))


# -- networks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network of a study.

    Attributes:
        name: in tables.
        build: makes it, in eval mode; trained networks come with their weights.
        trained: whether it has weights, or has to be trained first.
    """

    name: str
    build: Callable[[int], nn.Module]
    trained: bool = True


NETWORKS = {
    "cnn": Network("CNN", lambda channels: SmallCNN(False, channels).eval(), trained=False),
    "cnn_bn": Network(
        "CNN with batch norm", lambda channels: SmallCNN(True, channels).eval(), trained=False
    ),
    "resnet20": Network("ResNet-20", lambda _channels: resnet20()),
    "mobilenet_v2": Network("MobileNetV2", lambda _channels: cifar_mobilenet_v2()),
}


class Study:
    """Runs cells and keeps what they gave.

    Args:
        dataset: to train and test on.
        work: folder for trained weights, checkpoints and finished cells.
        scale: multiplies the numbers of training steps, to try a study out.

    Attributes:
        held_out: images and labels to compare settings on; see :meth:`holding_out`.
    """

    def __init__(self, dataset: Dataset, work: Path, scale: float) -> None:
        self.dataset = dataset
        self.work = work
        self.scale = scale
        self.held_out = dataset.train
        self._improved: dict[tuple[str, str], GraphModule] = {}
        work.mkdir(parents=True, exist_ok=True)

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def float_network(self, key: str) -> nn.Module:
        """The float network; trained the first time, where it has no weights."""
        network = NETWORKS[key]
        model = network.build(self.dataset.channels)
        if network.trained:
            return model
        path = self.work / f"float_{self.dataset.name}_{key}.safetensors"
        if not path.exists():
            _train_float(model, Loader(self.dataset, self.steps(9 * 390)))
            save_file({n: v.contiguous() for n, v in model.state_dict().items()}, path)
        model.load_state_dict(load_file(path))
        return model

    def cell(
        self, name: str, key: str, build: Callable[[nn.Module], nn.Module] | None
    ) -> dict[str, Any]:
        """Accuracy of what ``build`` makes of the float network, or of itself for ``None``."""
        path = self.work / f"cell_{self.dataset.name}_{name}.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        model = self.float_network(key)
        models: dict[str, Callable[..., Any]] = {"float": model}
        extra: dict[str, Any] = {}
        built = model if build is None else build(model)
        if built is not model and not isinstance(built, GraphModule):
            models["trained further"] = built
        elif built is not model:
            lowered = _lower(built, self.dataset)
            models["pte"] = lowered.run
            extra = {"delegates": lowered.report.delegates, "bytes": lowered.report.size_bytes}
        evaluation = cq.evaluate(models, self.dataset.test_batches())
        score = evaluation.scores[-1]
        row = {"top1": score.top1, "samples": score.samples, **extra}
        if (against := score.against_first) is not None:
            row |= {
                "difference": against.difference,
                "interval": [against.low, against.high],
                "p_value": against.p_value,
            }
        write_json_atomic(path, row)
        print(f"{name}: {row}", flush=True)
        return row

    def ptq(self, model: nn.Module, scheme: str) -> GraphModule:
        """Calibrated on 512 training images."""
        prepared = prepare_pt2e(self._capture(model), cq.IntegerQuantizer().set_global(scheme))
        cq.calibrate(prepared, self.dataset.train[0][:CALIBRATION].split(64))
        return convert_pt2e(prepared)

    def qat(
        self,
        model: nn.Module,
        scheme: str,
        steps: int,
        name: str,
        start: GraphModule | None = None,
        **recipe: Any,
    ) -> GraphModule:
        """Trained for a number of batches of 128, from its first ones or from another graph."""
        # A captured graph shares its parameters with the model, which is compared with.
        captured = self._capture(copy.deepcopy(model))
        prepared = prepare_qat_pt2e(captured, cq.IntegerQuantizer().set_global(scheme))
        if start is not None:
            cq.adopt(prepared, start)
        qat.finetune(
            prepared,
            Loader(self.dataset, self.steps(steps)),
            recipe=qat.Recipe(**recipe),
            checkpoint=self.work / f"training_{self.dataset.name}_{name}.safetensors",
        )
        return convert_pt2e(prepared)

    def improved(self, model: nn.Module, scheme: str) -> GraphModule:
        """Calibrated on 512 training images, and improved on them; not converted."""
        captured = self._capture(copy.deepcopy(model))
        prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global(scheme))
        images = self.dataset.train[0][:CALIBRATION].split(64)
        cq.calibrate(prepared, images)
        cq.improve(prepared, images)
        return prepared

    # -- from plain and from improved weights ---------------------------------------------------

    def holding_out(self, count: int) -> Study:
        """This study without some training images, to compare settings on; calibration's stay."""
        images, labels = self.dataset.train
        generator = torch.Generator().manual_seed(7)
        order = CALIBRATION + torch.randperm(len(images) - CALIBRATION, generator=generator)
        kept = torch.cat([torch.arange(CALIBRATION), order[count:]])
        dataset = replace(self.dataset, train=(images[kept], labels[kept]))
        study = Study(dataset, self.work, self.scale)
        study.held_out = images[order[:count]], labels[order[:count]]
        return study

    def improved_once(self, key: str, scheme: str, model: nn.Module) -> GraphModule:
        """As :meth:`improved`; a copy of what the first call for a network and a scheme found."""
        if (key, scheme) not in self._improved:
            self._improved = {(key, scheme): self.improved(model, _ptq_scheme(scheme))}
        return copy.deepcopy(self._improved[key, scheme])

    def from_start(
        self,
        key: str,
        scheme: str,
        start: str,
        batches: int,
        seed: int,
        model: nn.Module,
        **recipe: Any,
    ) -> GraphModule:
        """Trained from ``plain`` or ``improved`` weights."""
        source = self.improved_once(key, scheme, model) if start == "improved" else None
        name = "_".join([key, scheme, start, "start", str(batches), str(seed), _told(recipe)])
        return self.qat(model, _qat_scheme(scheme), batches, name, source, seed=seed, **recipe)

    def held_out_accuracy(
        self, key: str, start: str, batches: int, recipe: dict[str, Any]
    ) -> float:
        """Share of the images held out that a training at a4w4 gets right."""
        name = "_".join(["held_out", self.dataset.name, key, start, str(batches), _told(recipe)])
        path = self.work / f"{name}.json"
        if not path.exists():
            model = self.float_network(key)
            trained = self.from_start(key, "a4w4", start, batches, 0, model, **recipe)
            share = float(_right(trained, *self.held_out).double().mean())
            write_json_atomic(path, {"top1": share})
            print(f"{name}: {share:.2%}", flush=True)
        return float(json.loads(path.read_text())["top1"])

    def right(self, name: str, key: str, build: Callable[[nn.Module], nn.Module]) -> Tensor:
        """Which test images what ``build`` makes of the float network gets right, ``(images,)``.

        A graph is lowered, and the ``.pte`` run.
        """
        path = self.work / f"right_{self.dataset.name}_{name}.safetensors"
        if not path.exists():
            built = build(self.float_network(key))
            run = _lower(built, self.dataset).run if isinstance(built, GraphModule) else built
            right = _right(run, *self.dataset.test)
            save_file({"right": right.to(torch.uint8)}, path)
            print(f"{name}: {right.double().mean():.2%}", flush=True)
        return load_file(path)["right"].bool()

    def train_further(self, model: nn.Module, steps: int) -> nn.Module:
        """The float network after as much training as QAT gets: what the data alone explain."""
        model = copy.deepcopy(model)
        _train_float(model, Loader(self.dataset, self.steps(steps)), 1e-2)
        return model

    def _capture(self, model: nn.Module) -> GraphModule:
        shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
        example = (self.dataset.test[0][:2],)
        return torch.export.export(model, example, dynamic_shapes=shapes).module()


def _train_float(model: nn.Module, loader: Loader, rate: float = 0.06) -> None:
    """The float networks of the studies: SGD, one cycle."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(loader))
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _right(run: Callable[..., Any], images: Tensor, labels: Tensor) -> Tensor:
    """Which of the images have their highest score at the label."""
    with torch.no_grad():
        classes = torch.cat([run(batch).argmax(1) for batch in images.split(TEST_BATCH)])
    return classes == labels


def _lower(graph: GraphModule, dataset: Dataset) -> cq.LoweredProgram:
    """For batches of ``TEST_BATCH``."""
    example = (dataset.test[0][:TEST_BATCH],)
    return cq.lower(torch.export.export(graph, example).module(), example)


# -- studies ------------------------------------------------------------------------------------


def _ptq_scheme(scheme: str) -> str:
    """The observer that did best at few bits (docs/calibration.md)."""
    return f"{scheme}-histogram"


def _qat_scheme(scheme: str) -> str:
    """Learned scales below 8 bits."""
    return scheme if "w8" in scheme and "a8" in scheme else f"{scheme}-lsq"


def widths(study: Study) -> dict[str, Any]:
    """Float, PTQ and QAT at 4, 6 and 8 bits."""
    rows: dict[str, Any] = {}
    for key in ("cnn", "cnn_bn"):
        rows[f"{NETWORKS[key].name}, float"] = study.cell(f"{key}_float", key, None)
        for bits in (8, 6, 4):
            scheme = f"a{bits}w{bits}"
            rows[f"{NETWORKS[key].name}, {scheme}, PTQ, one scale a tensor, extremes"] = study.cell(
                f"{key}_{scheme}_ptq_per_tensor",
                key,
                lambda m, s=scheme: study.ptq(m, f"{s}-per_tensor"),
            )
            rows[f"{NETWORKS[key].name}, {scheme}, PTQ"] = study.cell(
                f"{key}_{scheme}_ptq", key, lambda m, s=scheme: study.ptq(m, _ptq_scheme(s))
            )
            rows[f"{NETWORKS[key].name}, {scheme}, QAT"] = study.cell(
                f"{key}_{scheme}_qat",
                key,
                lambda m, s=scheme, b=bits, k=key: study.qat(
                    m, _qat_scheme(s), 780 if b == 4 else 390, f"{k}_{s}"
                ),
            )
    return {"training_batches": {"a8w8": 390, "a6w6": 390, "a4w4": 780}, "rows": rows}


def bias(study: Study) -> dict[str, Any]:
    """Widths of the bias, at 8 bits and at 4; and what saturating biases do."""
    rows: dict[str, Any] = {}
    for base in ("a8w8", "a4w4"):
        for suffix in ("", "-bias16", "-bias8", "-bias4", "-biasfloat"):
            if base == "a4w4" and suffix == "-biasfloat":
                continue  # the backend quantizes it unseen, and four bits show the difference
            scheme = base + suffix
            shown = f"{base}, bias {suffix.removeprefix('-bias') or '32'}"
            rows[f"{shown}, PTQ"] = study.cell(
                f"bias_{scheme}_ptq", "cnn_bn", lambda m, s=scheme: study.ptq(m, _ptq_scheme(s))
            )
            if base == "a8w8":
                rows[f"{shown}, QAT"] = study.cell(
                    f"bias_{scheme}_qat",
                    "cnn_bn",
                    lambda m, s=scheme: study.qat(m, s, 200, f"bias_{s}"),
                )
        for bits in (16, 8, 4):
            rows[f"{base}, bias saturated to {bits} bits of s_x s_w, PTQ"] = study.cell(
                f"bias_{base}_saturated{bits}",
                "cnn_bn",
                lambda m, s=base, b=bits: saturated(study.ptq(m, _ptq_scheme(s)), b),
            )
    return {"model": NETWORKS["cnn_bn"].name, "training_batches": 200, "rows": rows}


def saturated(graph: GraphModule, bits: int) -> GraphModule:
    """Every bias cut off at the range of a narrow integer in units of ``s_x * s_w``."""
    limit = (1 << (bits - 1)) - 1
    for op in read_converted(graph).with_bias():
        source = op.match.bias.args[0]  # type: ignore[union-attr]
        name = str(source.target)  # type: ignore[union-attr]
        graph.get_buffer(name).clamp_(-limit - 1, limit)
    return graph


def rates(study: Study) -> dict[str, Any]:
    """Optimizer and first learning rate."""
    rows: dict[str, Any] = {}
    grid = {"sgd": (1e-3, 1e-2, 1e-1), "adam": (1e-4, 1e-3, 1e-2)}
    for base in ("a8w8", "a4w4"):
        rows[f"{base}, PTQ"] = study.cell(
            f"cnn_bn_{base}_ptq", "cnn_bn", lambda m, s=base: study.ptq(m, _ptq_scheme(s))
        )
        for optimizer, values in grid.items():
            for rate in values:
                rows[f"{base}, {optimizer}, {rate:g}"] = study.cell(
                    f"rates_{base}_{optimizer}_{rate:g}",
                    "cnn_bn",
                    lambda m, s=base, o=optimizer, r=rate: study.qat(
                        m, _qat_scheme(s), 120, f"rates_{s}_{o}_{r:g}", optimizer=o, learning_rate=r
                    ),
                )
    return {"model": NETWORKS["cnn_bn"].name, "training_batches": 120, "rows": rows}


def networks(study: Study) -> dict[str, Any]:
    """ResNet-20 and MobileNetV2 at a8w8, a8w4 and a4w4."""
    rows: dict[str, Any] = {}
    batches = {
        "resnet20": {"a8w8": 100, "a8w4": 300, "a4w4": 600},
        "mobilenet_v2": {"a8w8": 60, "a8w4": 200, "a4w4": 400},
    }
    for key, by_scheme in batches.items():
        name = NETWORKS[key].name
        rows[f"{name}, float"] = study.cell(f"{key}_float", key, None)
        further = by_scheme["a8w4"]
        rows[f"{name}, float, {further} more batches"] = study.cell(
            f"{key}_further", key, lambda m, n=further: study.train_further(m, n)
        )
        for scheme, steps in by_scheme.items():
            rows[f"{name}, {scheme}, PTQ"] = study.cell(
                f"{key}_{scheme}_ptq", key, lambda m, s=scheme: study.ptq(m, _ptq_scheme(s))
            )
            rows[f"{name}, {scheme}, QAT"] = study.cell(
                f"{key}_{scheme}_qat",
                key,
                lambda m, s=scheme, n=steps, k=key: study.qat(m, _qat_scheme(s), n, f"{k}_{s}"),
            )
    return {"training_batches": batches, "rows": rows}


START_TRAININGS = {
    ("resnet20", "a4w4"): {25: 3, 200: 1},
    ("resnet20", "a8w3"): {25: 1},
    ("resnet20", "a4w3"): {25: 1},
    ("mobilenet_v2", "a4w4"): {30: 3},
}
"""How many batches, and how many seeds with that many, by network and scheme."""

START_RATES = {200: (1e-3, 3e-3)}
"""Other learning rates from improved weights, by the batches of the training."""

HELD_OUT = 2_000

START_SETTINGS: dict[str, tuple[dict[str, float], ...]] = {
    "plain": (
        {},
        {"learning_rate": 3e-3},
        {"learning_rate": 3e-2},
        {"freeze_batch_norms": 0.0},
    ),
    "improved": (
        {},
        {"learning_rate": 3e-3},
        {"learning_rate": 1e-2},
        {"freeze_batch_norms": 0.5},
    ),
}
"""Compared with the defaults on training images that are held out."""


def starts(study: Study) -> dict[str, Any]:
    """A little training, from plain and from improved weights, each with its defaults.

    The defaults were chosen on training images held out, for ResNet-20 at a4w4.
    """
    study = study.holding_out(HELD_OUT)
    rows: dict[str, Any] = {}
    for (key, scheme), trainings in START_TRAININGS.items():
        name, file = f"{NETWORKS[key].name} {scheme}", f"{key}_{scheme}"
        right = {
            "float": study.right(f"{key}_float", key, lambda m: m),
            "PTQ": study.right(
                f"{file}_ptq", key, lambda m, s=scheme: study.ptq(m, _ptq_scheme(s))
            ),
            "improved": study.right(
                f"{file}_improved",
                key,
                lambda m, k=key, s=scheme: convert_pt2e(study.improved_once(k, s, m)),
            ),
        }
        for (batches, seeds), start in itertools.product(trainings.items(), START_SETTINGS):
            trained = [
                study.right(
                    f"{file}_{start}_start_{batches}_seed_{seed}",
                    key,
                    partial(study.from_start, key, scheme, start, batches, seed),
                )
                for seed in range(seeds)
            ]
            right[f"{start}, {batches} batches"] = torch.stack(trained)
        for batches in trainings:
            for rate in START_RATES.get(batches, ()):
                right[f"improved, {batches} batches, learning rate {rate:g}"] = study.right(
                    f"{file}_improved_start_{batches}_seed_0_rate_{rate:g}",
                    key,
                    partial(
                        study.from_start, key, scheme, "improved", batches, 0, learning_rate=rate
                    ),
                )
        for label, correct in right.items():
            row = rows[f"{name}, {label}"] = _row(correct, right["float"])
            start, *told = label.split(", ")
            if start == "improved" and told:
                row["against_plain"] = _difference(correct, right[f"plain, {told[0]}"])
    batches = next(iter(START_TRAININGS["resnet20", "a4w4"]))
    held_out = {
        f"{start}, {_told(recipe)}": study.held_out_accuracy("resnet20", start, batches, recipe)
        for start, recipes in START_SETTINGS.items()
        for recipe in recipes
    }
    return {
        "trainings": {" ".join(k): [*counts.items()] for k, counts in START_TRAININGS.items()},
        "held_out": {"model": NETWORKS["resnet20"].name, "samples": HELD_OUT, "top1": held_out},
        "rows": rows,
    }


def _told(recipe: dict[str, Any]) -> str:
    """What differs from the default."""
    return ", ".join(f"{key} {value:g}" for key, value in recipe.items()) or "default"


def _row(right: Tensor, of_float: Tensor) -> dict[str, Any]:
    """Accuracies of one training or of several: ``(images,)`` or ``(seeds, images)``, bool."""
    row: dict[str, Any] = {"top1": float(right.double().mean()), "samples": right.shape[-1]}
    if right.dim() > 1:
        row["by_seed"] = right.double().mean(1).tolist()
    return row if right is of_float else row | _difference(right, of_float)


def _difference(right: Tensor, other: Tensor) -> dict[str, Any]:
    """By image; of several trainings, the mean of each image."""
    means = [r.double().reshape(-1, r.shape[-1]).mean(0) for r in (right, other)]
    found = compare_values((means[0] - means[1]).tolist())
    return {
        "difference": found.difference,
        "interval": [found.low, found.high],
        "p_value": found.p_value,
    }


STUDIES: dict[str, Callable[[Study], dict[str, Any]]] = {
    "widths": widths,
    "bias": bias,
    "rates": rates,
    "networks": networks,
    "starts": starts,
}


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    header = ["", "top-1 of the `.pte`", "against float (95 % interval)", "p"]
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    for name, row in result["rows"].items():
        cells = [name, f"{row['top1']:.2%}", "-", "-"]
        if len(seeds := row.get("by_seed", [])) > 1:
            cells[1] += f" ({', '.join(f'{100 * share:.2f}' for share in seeds)})"
        if row.get("difference") is not None:
            cells[2:] = _difference_cells(row)
        lines.append(f"| {' | '.join(cells)} |")
        if (against := row.get("against_plain")) is not None:
            cells = [f"{name}, against plain", "", *_difference_cells(against)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _difference_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    difference = f"{100 * row['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return [difference, f"{row['p_value']:.2g}"]


class Options(argparse.Namespace):
    """What the command line said."""

    studies: list[str]
    dataset: str
    data_root: Path
    output: Path
    work: Path
    scale: float

    @cached_property
    def loaded(self) -> Dataset:
        return cifar10() if self.dataset == "cifar10" else fashionmnist(self.data_root)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--dataset", choices=("cifar10", "fashionmnist"), default="cifar10")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="of FashionMNIST")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("build/qat_studies"))
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiply all training steps, to try it out"
    )
    options = parser.parse_args(namespace=Options())
    if options.dataset != "cifar10" and {"networks", "starts"} & {*options.studies}:
        parser.error("networks have weights for CIFAR-10 only")
    try:
        study = Study(options.loaded, options.work, options.scale)
    except cq.InputError as error:
        parser.exit(2, f"{error}\n")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.studies:
        result = {"version": 1, "study": name, "dataset": options.dataset}
        result |= STUDIES[name](study)
        suffix = "" if options.dataset == "cifar10" else f"_{options.dataset}"
        stem = options.output / f"qat_{name}{suffix}"
        write_json_atomic(stem.with_suffix(".json"), result)
        write_text_atomic(stem.with_suffix(".md"), render(result))
        print(render(result), flush=True)


if __name__ == "__main__":
    main()
