"""Networks of any number of ops, of many kinds, and what each stage of the whole flow takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.graphs import outside

__all__ = ["KINDS", "Made"]

SIZE = 8
"""Features of a tensor, which is [2, SIZE], or an image of that many channels."""

Made = tuple[nn.Module, tuple[Tensor, ...]]
"""A network and its inputs."""


class Loop(nn.Module):
    """A body that is called so often, each time with its number; layers are those of ``layer``."""

    def __init__(
        self,
        times: int,
        body: Callable[[nn.Module | None, Any, int], Any],
        layer: Callable[[], nn.Module] | None = None,
        *,
        image: bool,
        buffer: bool,
    ) -> None:
        super().__init__()
        self.times, self.body = times, body
        self.first = nn.Conv2d(SIZE, SIZE, 1) if image else nn.Linear(SIZE, SIZE)
        self.layers = nn.ModuleList(layer() for _ in range(times if layer else 0))
        if buffer:
            self.register_buffer("state", torch.zeros(2, SIZE))

    def forward(self, *inputs: Tensor) -> Any:
        value: Any = self.first(inputs[0])
        if hasattr(self, "state"):
            value = (value, self.state)
        for i in range(self.times):
            value = self.body(self.layers[i] if len(self.layers) else None, value, i)
        return value[0] if hasattr(self, "state") else value


def _loop(
    per_step: int,
    body: Callable[[Any, Any, int], Any],
    layer: Callable[[], nn.Module] | None = None,
    *,
    image: bool = False,
    buffer: bool = False,
) -> Callable[[int], Made]:
    """A network of steps with so many ops each."""

    def make(ops: int) -> Made:
        x = torch.randn(1, SIZE, 4, 4) if image else torch.randn(2, SIZE)
        times = max(1, ops // per_step)
        return Loop(times, body, layer, image=image, buffer=buffer).eval(), (x,)

    return make


class Nested(nn.Module):
    """A layer below so many modules."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner: nn.Module = Nested(depth - 1) if depth else nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Fan(nn.Module):
    """One tensor, read by so many ops, each of which is an output."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.ops, self.first = ops, nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.first(x)
        return [torch.relu(y) if i % 2 else y + x for i in range(self.ops)]


class Joined(nn.Module):
    """One tensor, read by so many ops, the results of which become one tensor."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(ops))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


class Ports(nn.Module):
    """As many inputs and outputs as ops."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.first(inputs[0]), *(a + b for a, b in pairwise(inputs))]


def _in_place(_: Any, x: Tensor, i: int) -> Tensor:
    if not i:
        x = x + 1
    x[:, i % SIZE] += 0.5
    return x


def _write_rows(_: Any, x: Tensor, i: int) -> Tensor:
    if not i:
        x = x + 1
    x[:, i % SIZE : i % SIZE + 1] = x[:, :1] * 0.5
    return x


def _views_written(_: Any, x: Tensor, i: int) -> Tensor:
    if not i:
        x = x + 1
    x.view(-1)[i % SIZE :].relu_()
    return x


def _write_buffer(_: Any, value: tuple[Tensor, Tensor], i: int) -> tuple[Tensor, Tensor]:
    x, state = value
    state[:, i % SIZE] = x[:, 0]
    return x + state, state


def _rotated(_: Any, x: Tensor, i: int) -> Tensor:
    return torch.cat([x[:, 2:], x[:, :2]], 1)


def _moved(_: Any, x: Tensor, i: int) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(1, 4, SIZE, 4).transpose(1, 2).contiguous()


def _function(_: Any, x: Tensor, i: int) -> Tensor:
    return (torch.sigmoid, torch.tanh, lambda y: y * 0.9, F.silu)[i % 4](x)


def _small_delegates(layer: Any, x: Tensor, i: int) -> Tensor:
    return outside(layer(x))


KINDS: Mapping[str, Callable[[int], Made]] = MappingProxyType(
    {
        "linear, relu": _loop(
            2, lambda layer, x, i: torch.relu(layer(x)), lambda: nn.Linear(SIZE, SIZE)
        ),
        "conv, relu": _loop(
            2,
            lambda layer, x, i: torch.relu(layer(x)),
            lambda: nn.Conv2d(SIZE, SIZE, 1),
            image=True,
        ),
        "residual": _loop(3, lambda _, x, i: F.hardtanh(x + torch.relu(x))),
        "movement": _loop(4, _moved, image=True),
        "slices, cat": _loop(3, _rotated),
        "writes of columns": _loop(2, _in_place),
        "writes of slices": _loop(4, _write_rows),
        "writes through views": _loop(3, _views_written),
        "writes of a buffer": _loop(4, _write_buffer, buffer=True),
        "functions": _loop(1, _function),
        "many readers": lambda ops: (Fan(ops).eval(), (torch.randn(2, SIZE),)),
        "joined": lambda ops: (Joined(ops).eval(), (torch.randn(2, SIZE),)),
        "many inputs": lambda ops: (Ports().eval(), tuple(torch.randn(ops, 2, SIZE))),
        "nested": _loop(1, lambda layer, x, i: layer(x), lambda: Nested(20)),
        "float": _loop(1, lambda _, x, i: torch.sin(x)),
        "small delegates": _loop(3, _small_delegates, lambda: nn.Linear(SIZE, SIZE)),
    }
)
"""By name, a network of about so many ops, and its inputs."""
