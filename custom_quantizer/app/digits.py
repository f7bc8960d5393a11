"""The demo's data and model: 8x8 handwritten digits, nothing to download.

The images come with scikit-learn. The network trains in seconds and has each kind of operator
that integer deployment has to get right: plain, depthwise and pointwise convolutions with batch
norm, with ReLU, with ReLU6 and with no activation behind it; a residual addition; max and average
pooling; and a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from custom_quantizer.core.progress import track
from custom_quantizer.core.threads import exclusive

__all__ = ["DigitsData", "DigitsNet", "load_digits_data", "train_digits"]

_BATCH = 96


@dataclass(frozen=True, eq=False)
class DigitsData:
    """Digits, split into a part to train and calibrate on and a part held out.

    Attributes:
        train_images: float32 of shape ``(1437, 1, 8, 8)``, multiples of 1/16 in [0, 1].
        train_labels: int64 of shape ``(1437,)``, the digits.
        test_images: float32 of shape ``(360, 1, 8, 8)``.
        test_labels: int64 of shape ``(360,)``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_data(seed: int = 0) -> DigitsData:
    """Load the 1,797 digits of scikit-learn; a fifth of each class is held out.

    Args:
        seed: Chooses what is held out.

    References:
        E. Alpaydin, C. Kaynak. Optical Recognition of Handwritten Digits. UCI Machine Learning
        Repository, 1998. https://doi.org/10.24432/C50P49
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # Pixels count the set ones of 4x4 in the original bitmap: 0 to 16, so float32 is exact.
    images = (data.images / 16).astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return DigitsData(train_images, train_labels, test_images, test_labels)


class DigitsNet(nn.Module):
    """A small residual network for images of shape ``(N, 1, 8, 8)``; 10 logits each.

    Args:
        width: Channels of the first stage; the second has twice as many.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.depthwise = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU6(),
        )
        self.pointwise = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape ``(N, 10)``."""
        x = self.stem(x)
        x = self.relu(x + self.pointwise(self.depthwise(x)))
        x = self.head(self.pool(x))
        return cast(Tensor, self.classifier(torch.flatten(self.average(x), 1)))


@exclusive()
def train_digits(
    seed: int = 0, epochs: int = 20, progress: bool | None = None, data: DigitsData | None = None
) -> DigitsNet:
    """Train a :class:`DigitsNet` on the training part of the digits.

    The same arguments give the same weights on the same machine, however many cores it has; the
    state of the global random generator is neither used nor changed.

    Args:
        seed: For the initial weights, the order of the examples and their random shifts.
        epochs: Passes over the training images.
        progress: True shows a bar, None does so at a terminal.
        data: None is :func:`load_digits_data` with its default split.

    Returns:
        The network in eval mode, weights float32.
    """
    data = data or load_digits_data()
    threads = torch.get_num_threads()
    # The order of a sum depends on the number of threads; for tensors this small one is fastest.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed accelerators too.
            torch.default_generator.manual_seed(seed)
            return _train(data.train_images, data.train_labels, epochs, progress)
    finally:
        torch.set_num_threads(threads)


def _train(images: Tensor, labels: Tensor, epochs: int, progress: bool | None) -> DigitsNet:
    model = DigitsNet().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = epochs * -(-len(images) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps)
    for _ in track(range(epochs), "train", enabled=progress):
        for batch in torch.split(torch.randperm(len(images)), _BATCH):
            loss = F.cross_entropy(model(_shifted(images[batch])), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def _shifted(images: Tensor) -> Tensor:
    """Move a batch by up to one pixel each way: 1,437 images alone are soon learned by heart."""
    dy, dx = torch.randint(0, 3, (2,)).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (1, 1, 1, 1))[..., dy : dy + height, dx : dx + width]
