"""CIFAR-10 networks and images for the slow tests and the measurements.

They need a data folder that is not part of the repository; ``shared_data_dir()`` finds it or
returns None. Its accuracies are to be compared with each other only: the images were compressed
again.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from custom_quantizer.app.data import load_data
from custom_quantizer.app.models import load_weights
from custom_quantizer.errors import InputError
from support.cifar_networks import CifarResNet, half_width_mobilenet_v2

REPOSITORY = Path(__file__).resolve().parents[2]


def shared_data_dir() -> Path | None:
    """The folder with ``cifar10/`` and ``weights/``, or None where there is none.

    It is what the environment variable CUSTOM_QUANTIZER_DATA names, else ``shared/data`` beside
    the repository.
    """
    named = os.environ.get("CUSTOM_QUANTIZER_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def shared_file(name: str) -> Path:
    """The path of a file in the data folder; InputError where it is missing."""
    folder = shared_data_dir()
    if folder is None or not (folder / name).is_file():
        raise InputError(
            f"No {name} in {folder or 'the data folder'}: set CUSTOM_QUANTIZER_DATA to the folder "
            "that holds it."
        )
    return folder / name


@lru_cache(maxsize=4)
def cifar10_test(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Test images, float32 normalized of shape (n, 3, 32, 32), and their int64 labels.

    With a limit, as many of each class. Decoded once per process: do not write to the result.
    """
    return _images("cifar10/test.zip", limit)


@lru_cache(maxsize=4)
def cifar10_calibration(n: int) -> tuple[Tensor, Tensor]:
    """As :func:`cifar10_test`, drawn from the training images."""
    return _images("cifar10/train.zip", n)


def _images(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
    # The default preprocessing has the mean and std that the networks below were trained with.
    # Shuffled, so that a slice of it is no single class.
    source = load_data(shared_file(name), batch_size=250, limit=limit, shuffle=True)
    if source.labels is None:
        raise InputError(f"{name} has no class folders.")
    return torch.cat([batch.inputs[0] for batch in source]), source.labels


class SmallCNN(nn.Module):
    """Three convolutions of 32, 64 and 64 channels and two linear layers, 0.12 M parameters."""

    def __init__(self, batch_norm: bool, image_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for in_channels, channels in ((image_channels, 32), (32, 64), (64, 64)):
            layers.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(channels))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x)))


def resnet20(pretrained: bool = True) -> nn.Module:
    return _loaded(CifarResNet(3), "cifar_resnet20" if pretrained else None)


def resnet32(pretrained: bool = True) -> nn.Module:
    return _loaded(CifarResNet(5), "cifar_resnet32" if pretrained else None)


def cifar_mobilenet_v2(pretrained: bool = True) -> nn.Module:
    return _loaded(half_width_mobilenet_v2(), "cifar_mobilenet_v2_w0.5" if pretrained else None)


def _loaded(model: nn.Module, weights: str | None) -> nn.Module:
    if weights is not None:
        load_weights(model, shared_file(f"weights/{weights}.safetensors"))
    return model.eval()
