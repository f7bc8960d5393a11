"""Inputs in the order of a graph's placeholders, however somebody nests and names them."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from custom_quantizer import InputError
from custom_quantizer.core.batch import Batch
from custom_quantizer.core.calls import CallForm

A, B, C = (torch.full((2, 3), float(value)) for value in range(3))
LABELS = torch.tensor([0, 1])


class Pair(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        return (pair[0] - pair[1]) * scale


class Named(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["x"] - batch["mask"]) * batch["scale"]


class ByKeyword(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor, scale: Tensor) -> Tensor:
        return (x - mask) * scale


class Deep(nn.Module):
    def forward(self, xs: list[Tensor], options: dict[str, dict[str, Tensor]]) -> Tensor:
        return (xs[0] - options["o"]["mask"]) * options["o"]["scale"]


def form_of(model: nn.Module, args: Any, kwargs: Any = None) -> CallForm:
    return CallForm.of(torch.export.export(model, args, kwargs).module())


PAIR = form_of(Pair(), ((A, B), C))
NAMED = form_of(Named(), ({"x": A, "mask": B, "scale": C},))
KEYWORD = form_of(ByKeyword(), (A,), {"mask": B, "scale": C})
DEEP = form_of(Deep(), ([A], {"o": {"mask": B, "scale": C}}))


@pytest.mark.parametrize(
    ("form", "batch"),
    [
        (PAIR, ((A, B), C)),
        (PAIR, [[A, B], C]),
        (PAIR, (A, B, C)),
        (PAIR, {"scale": C, "pair": (A, B)}),
        (PAIR, (((A, B), C), LABELS)),
        (PAIR, Batch((A, B, C), LABELS)),
        (NAMED, {"scale": C, "mask": B, "x": A}),
        (NAMED, OrderedDict(scale=C, x=A, mask=B)),
        (NAMED, ({"scale": C, "mask": B, "x": A},)),
        (NAMED, {"batch": {"scale": C, "mask": B, "x": A}}),
        (NAMED, {"scale": C, "mask": B, "x": A, "labels": LABELS}),
        (NAMED, ({"scale": C, "mask": B, "x": A}, LABELS)),
        (NAMED, (A, B, C)),
        (NAMED, Batch({"scale": C, "mask": B, "x": A}, LABELS)),
        (KEYWORD, {"scale": C, "mask": B, "x": A}),
        (KEYWORD, ((A,), {"scale": C, "mask": B})),
        (KEYWORD, (A, B, C)),
        (DEEP, ([A], {"o": {"scale": C, "mask": B}})),
        (DEEP, ((A,), {"o": {"scale": C, "mask": B}})),
        (DEEP, {"options": {"o": {"scale": C, "mask": B}}, "xs": [A]}),
    ],
)
def test_keys_decide_and_not_the_order_in_which_they_were_written(
    form: CallForm, batch: Any
) -> None:
    found = form.sort(batch)
    assert not isinstance(found, str), found
    for value, wanted in zip(found, (A, B, C), strict=True):
        assert value is wanted


@pytest.mark.parametrize(
    ("form", "batch", "message"),
    [
        (PAIR, (A, B), "holds 2 values where the graph takes 3"),
        (NAMED, {"x": A, "mask": B}, "has no batch, only x, mask"),
        (NAMED, ({"x": A, "mask": B, "size": C},), r"'size': \*.* where the graph takes .*'scale'"),
        (KEYWORD, {"x": A}, "has no mask and no scale, only x"),
        (DEEP, ([A], {"o": {"mask": B, "size": C}}), "where the graph takes"),
    ],
)
def test_what_is_wrong_with_others_is_told(form: CallForm, batch: Any, message: str) -> None:
    found = form.sort(batch)
    assert isinstance(found, str)
    assert re.search(message, found), found


def test_a_call_is_stricter_than_data() -> None:
    """Keys that the model does not know are a mistake in a call."""
    more = {"x": A, "mask": B, "scale": C, "labels": LABELS}
    with pytest.raises(InputError, match=r"'labels': .* and the model takes .*'scale'"):
        NAMED.flat((more,))
    with pytest.raises(InputError, match="takes mask, scale by keyword, got mask"):
        KEYWORD.flat((A,), {"mask": B})
    assert KEYWORD.flat((A,), {"scale": C, "mask": B})[2] is C
    assert NAMED.flat(({"scale": C, "mask": B, "x": A},))[2] is C


def test_several_calls() -> None:
    """One call may be a tuple; several are in a list, or in a tuple of tuples."""
    assert len(PAIR.calls(((A, B), C))) == 1
    assert len(DEEP.calls(([A], {"o": {"mask": B, "scale": C}}))) == 1
    assert len(PAIR.calls([((A, B), C), (A, B, C)])) == 2
    assert len(NAMED.calls({"x": A, "mask": B, "scale": C})) == 1
    with pytest.raises(InputError, match="takes 3 inputs, got 2"):
        PAIR.calls([(A, B)])
    with pytest.raises(InputError, match="names of inputs are not known"):
        CallForm(2).calls({"x": A, "y": B})
