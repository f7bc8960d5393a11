"""Models in which a batch norm cannot be folded into the weight where it is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.graphs import Function
from support.models import conv, randomize_batch_norms


def norm(channels: int, rank: int, seed: int = 0, **options: bool) -> nn.Module:
    """A batch norm for tensors of a rank, with statistics that folding has to get right."""
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    torch.manual_seed(1)
    module = kinds[rank](channels, **options)
    return module if not module.affine else randomize_batch_norms(module, seed)


def two_norms(layer: nn.Module, other: Callable[[Tensor], Tensor], rank: int = 4) -> nn.Module:
    """One layer, applied twice, with a batch norm for each application."""

    def forward(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm1(self.layer(x)), self.norm2(self.layer(other(x)))

    channels = layer.weight.shape[0]
    norms = {f"norm{i}": norm(channels, rank, seed=i) for i in (1, 2)}
    return Function(forward, layer=layer, **norms)


def tied(what: str) -> nn.Module:
    """Two convolutions that share a parameter; a batch norm behind one of them."""

    def forward(self: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.first(x)), self.second(x)

    model = Function(forward, first=conv(), second=conv(), norm=norm(4, 4))
    setattr(model.second, what, getattr(model.first, what))
    return model


def using(
    function: Callable[..., Any], layer: nn.Module, rank: int = 4, count: int = 1
) -> nn.Module:
    channels = layer.weight.shape[0] if not isinstance(layer, nn.ConvTranspose2d) else 4
    norms = {f"norm{i}": norm(channels, rank, seed=i) for i in range(count)}
    return Function(function, layer=layer, **norms)


def image_to_rows(self: Function, x: Tensor) -> Tensor:
    """A convolution without a batch; the norm takes its rows for channels."""
    return self.norm0(self.layer(x))


IMAGES, MATRIX, VOLUME = (2, 4, 9, 9), (7, 6), (1, 2, 4, 6, 6)
SHARED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a norm a level": (lambda: two_norms(conv(bias=False), lambda x: F.avg_pool2d(x, 2)), IMAGES),
    "a norm a level, bias": (lambda: two_norms(conv(), lambda x: F.avg_pool2d(x, 2)), IMAGES),
    "a norm a level, same": (lambda: two_norms(conv(padding_mode="zeros"), torch.neg), IMAGES),
    "a norm a level, 1d": (
        lambda: two_norms(nn.Conv1d(4, 4, 3, bias=False), lambda x: x[..., ::2], rank=3),
        (2, 4, 20),
    ),
    "a norm a level, 3d": (
        lambda: two_norms(nn.Conv3d(2, 3, 3, bias=False), torch.neg, rank=5),
        VOLUME,
    ),
    "norm(z) + z": (
        lambda: using(lambda self, x: self.norm0(z := self.layer(x)) + z, conv()),
        IMAGES,
    ),
    "norm(z) and z": (
        lambda: using(lambda self, x: (self.norm0(z := self.layer(x)), z), conv()),
        IMAGES,
    ),
    "two norms of one result": (
        lambda: using(
            lambda self, x: self.norm0(z := self.layer(x)) * self.norm1(z), conv(), count=2
        ),
        IMAGES,
    ),
    "norm(z) + z, 3d": (
        lambda: using(
            lambda self, x: self.norm0(z := self.layer(x)) + z, nn.Conv3d(2, 3, 3), rank=5
        ),
        VOLUME,
    ),
    "with and without": (
        lambda: using(lambda self, x: (self.norm0(self.layer(x)), self.layer(-x)), conv()),
        IMAGES,
    ),
    "without and with": (
        lambda: using(lambda self, x: (self.layer(-x), self.norm0(self.layer(x))), conv()),
        IMAGES,
    ),
    "tied weights": (lambda: tied("weight"), IMAGES),
    "tied biases": (lambda: tied("bias"), IMAGES),
    "the weight is read": (
        lambda: using(
            lambda self, x: (self.norm0(self.layer(x)), F.conv2d(x, self.layer.weight * 2)), conv()
        ),
        IMAGES,
    ),
    "norm of a norm": (
        lambda: using(lambda self, x: self.norm1(self.norm0(self.layer(x))), conv(), count=2),
        IMAGES,
    ),
    "layer and norm twice": (
        lambda: using(
            lambda self, x: self.norm0(self.layer(self.norm0(self.layer(x)).relu())), conv()
        ),
        IMAGES,
    ),
    "transposed in groups": (
        lambda: using(
            lambda self, x: self.norm0(self.layer(x)), nn.ConvTranspose2d(4, 4, 3, 2, groups=2)
        ),
        IMAGES,
    ),
    "transposed depthwise": (
        lambda: using(
            lambda self, x: self.norm0(self.layer(x)), nn.ConvTranspose2d(4, 4, 3, 2, groups=4)
        ),
        IMAGES,
    ),
    "linear, with and without": (
        lambda: using(
            lambda self, x: (self.norm0(self.layer(x)), self.layer(-x)), nn.Linear(6, 5), rank=2
        ),
        MATRIX,
    ),
    "linear, norm(z) + z": (
        lambda: using(lambda self, x: self.norm0(z := self.layer(x)) + z, nn.Linear(6, 5), rank=2),
        MATRIX,
    ),
    "linear over rows": (
        lambda: using(lambda self, x: self.norm0(self.layer(x)), nn.Linear(6, 7), rank=3),
        (3, 7, 6),
    ),
    "no batch": (
        lambda: using(image_to_rows, nn.Conv2d(4, 9, 3, padding=1), rank=3),
        (4, 9, 9),
    ),
    "weight norm": (
        lambda: using(
            lambda self, x: self.norm0(self.layer(x)),
            nn.utils.parametrizations.weight_norm(conv()),
        ),
        IMAGES,
    ),
}


def shared_layer(name: str) -> tuple[nn.Module, Tensor]:
    """A model in eval mode, and an input: the same every time."""
    torch.manual_seed(3)
    build, shape = SHARED[name]
    return build().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(4))
