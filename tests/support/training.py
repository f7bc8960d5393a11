"""Networks that are trained in the tests, and the loop that trains them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import (
    move_exported_model_to_train,
)
from torchao.quantization.pt2e.quantize_pt2e import (
    prepare_qat_pt2e,
)

import custom_quantizer as cq


class Everything(nn.Module):
    """Every kind of layer with a batch norm behind it, bias or not; a residual; a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, bias=False)
        self.up_norm = nn.BatchNorm2d(6, affine=False)
        self.plain = nn.Conv2d(6, 6, 1)
        self.drop = nn.Dropout(0.2)
        self.hidden = nn.Linear(6, 16, bias=False)
        self.hidden_norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + F.relu6(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.plain(self.up_norm(self.up(x))))
        x = self.drop(x.mean((2, 3)))
        x = torch.relu(self.hidden_norm(self.hidden(x)))
        return cast(Tensor, self.head(x))


class Grouped(nn.Module):
    """Groups of channels in a transposed convolution, which torchao's own folding gets wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(3, 6, 2, 2, groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class Layered(nn.Module):
    """One dimension: convolution, transposed convolution, batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.ConvTranspose1d(6, 4, 2, 2),
            nn.BatchNorm1d(4),
            nn.ReLU6(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x.flatten(2)))


def made(build: Callable[[], nn.Module] = Everything, train: bool = True) -> nn.Module:
    torch.manual_seed(3)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
    return model.train(train)


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def captured(model: nn.Module) -> GraphModule:
    shapes = ({0: torch.export.Dim("batch", min=2, max=256)},)
    return torch.export.export(model, (images(4),), dynamic_shapes=shapes).module()


@cache
def _prepared(scheme: str, build: Callable[[], nn.Module], train: bool) -> GraphModule:
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    return prepare_qat_pt2e(captured(made(build, train)), quantizer)


def prepared_for(
    scheme: str = "a8w8", build: Callable[[], nn.Module] = Everything, train: bool = True
) -> GraphModule:
    """A graph to train, new to each caller; preparing takes a second, copying it does not."""
    prepared = copy.deepcopy(_prepared(scheme, build, train))
    torch.manual_seed(3)  # whoever was first
    return prepared


def some_steps(prepared: GraphModule, count: int = 6) -> None:
    """The usual loop of a user who ignores ``finetune``."""
    move_exported_model_to_train(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05, momentum=0.9)
    for i in range(count):
        x = images(32, seed=i)
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
