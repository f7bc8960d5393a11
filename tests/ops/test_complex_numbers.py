"""Complex numbers are two real ones: rotary embeddings, and what models write around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.graphs import Function, canonicalize, capture, lowered_exactly, quantized
from support.selection import slow_but
from torch import Tensor, nn

from custom_quantizer.core.graph import is_complex
from custom_quantizer.ops.placement import Placement

aten = torch.ops.aten
TURNS = torch.complex(torch.tensor([[1.0, 2.0], [0.0, -3.0]]), torch.tensor([[2.0, 0], [1, 4]]))
WHOLE = torch.arange(-8.0, 8).reshape(2, 2, 4)


def as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))


def as_real(z: Tensor) -> Tensor:
    return torch.view_as_real(z).flatten(-2)


# Of complex numbers z (2, 2, 2) with whole parts, and constant ones w (2, 2).
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda z, w: as_real(z * w),
    "product with numbers": lambda z, w: as_real(2 * z * 1j * (1 - 2j)),
    "sums": lambda z, w: as_real((z + w - 2 * z) + (1 + 2j)),
    "differences from numbers": lambda z, w: as_real((1 - z) - 1j),
    "real and imaginary": lambda z, w: torch.cat([(z * w).real, z.imag]),
    "conjugates": lambda z, w: as_real(z.conj() * w.conj()),
    "a transpose": lambda z, w: (z.mT.conj() * w).real,
    "adjoints": lambda z, w: as_real(z.mH @ w.adjoint() @ w.H.resolve_conj()),
    "quotients": lambda z, w: as_real(z / 2 / z.real.clamp(4, 4) / 2j),
    "a quotient": lambda z, w: as_real(z * 8 / torch.complex(z.real * 0 + 2, z.real * 0 - 2)),
    "moves": lambda z, w: as_real(z.transpose(0, 1)[:, :1].flip(-1).expand(-1, 3, -1) * w[0]),
    "pieces": lambda z, w: as_real(torch.cat([*z.split(1, 1), torch.stack([w[:1]] * 2)], 1)),
    "matrix products": lambda z, w: as_real(z @ w @ z.mT),
    "einsum": lambda z, w: as_real(torch.einsum("bij,jk->kbi", torch.einsum("bij->bji", z), w)),
    "totals": lambda z, w: as_real(z.sum(-1) * z.mean(0)),
    "real ones among them": lambda z, w: as_real((z.real + 1j * z.imag[:, :1]) * w.real),
    "imaginary ones": lambda z, w: as_real(1j * z.real + w),
    "a real one": lambda z, w: as_real(z.real[..., :1].to(torch.complex64)),
    "polar": lambda z, w: as_real(torch.polar(z.real, z.imag * 0)),
    "exponentials": lambda z, w: as_real(torch.exp(1j * (z.real * 0)) * torch.exp(0 * z) * w),
    "absolute values": lambda z, w: (torch.complex(z.real * 3, z.real * 4) * 1j).abs(),
    "angles": lambda z, w: (z * w).angle(),
    "copies": lambda z, w: as_real(z.clone().contiguous().to(torch.complex64) * w),
}


OF_ANY_BATCH = ("product", "conjugates", "moves")


@pytest.mark.parametrize(
    ("name", "dynamic"),
    slow_but(
        [*((n, False) for n in list(FORMS)[::2]), ("moves", True)],
        [*((n, False) for n in FORMS), *((n, True) for n in OF_ANY_BATCH)],
    ),
)
def test_complex_numbers_are_two_real_ones(name: str, dynamic: bool) -> None:
    model = Function(lambda s, x: FORMS[name](as_complex(x), s.w))
    model.register_buffer("w", TURNS)
    batch = torch.export.Dim("batch", min=2, max=9)
    graph = capture(model, (WHOLE,), dynamic_shapes=(({0: batch},),) if dynamic else None)
    want = graph(WHOLE)
    assert any(map(is_complex, graph.graph.nodes))
    canonicalize(graph)
    assert not any(map(is_complex, graph.graph.nodes))
    assert torch.equal(graph(WHOLE), want)


def transforms(s: Function, x: Tensor) -> list[Tensor]:
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    signal = torch.fft.rfft(x, 7, 1)
    return [
        *(torch.fft.fftn(x, dim=(1, 2)).real, torch.fft.fft2(x).imag, torch.fft.fftn(x).abs()),
        torch.fft.irfft2(spectrum * s.filter, s=(5, 6), dim=(1, 2), norm="ortho"),
        *(torch.fft.irfft(signal, 7, 1), torch.fft.ifft(signal, dim=1, norm="forward").imag),
        *(torch.fft.irfftn(torch.fft.rfftn(x, (4, 6)), (4, 6)), torch.fft.ifftn(x, (3, 4)).real),
        torch.fft.ifft2(torch.fft.fft(x, dim=0), norm="backward").real,
    ]


def test_fourier_transforms_are_layers() -> None:
    model = Function(transforms)
    model.filter = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
    x = torch.randn(3, 5, 6)
    graph = canonicalize(capture(model, (x,)))
    assert not any(map(is_complex, graph.graph.nodes))
    for got, want in zip(graph(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def spectrograms(_self: Function, x: Tensor) -> list[Tensor]:
    window = torch.hann_window(12)
    options: dict[str, Any] = {"return_complex": True, "pad_mode": "constant"}
    return [
        torch.stft(x, 16, 4, window=torch.hann_window(16), **options).abs(),
        torch.stft(x[0], 16, None, 12, window, center=False, normalized=True, **options).real,
        torch.stft(x, 8, 3, onesided=False, **options).imag,
    ]


def test_spectrograms_are_convolutions() -> None:
    x = torch.randn(2, 64)
    graph = canonicalize(capture(Function(spectrograms), (x,)))
    assert not any(map(is_complex, graph.graph.nodes))
    for got, want in zip(graph(x), spectrograms(Function(spectrograms), x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_has_no_form_stays() -> None:
    model = Function(lambda s, x: as_real(as_complex(x) * 2) + as_real(as_complex(x).tan()))
    graph = canonicalize(capture(model, (WHOLE,)))
    assert [n.name for n in graph.graph.nodes if is_complex(n)] == ["view_as_complex_1", "tan"]
    assert torch.equal(graph(WHOLE), model(WHOLE))


class Attention(nn.Module):
    """Queries and keys are turned as in the first code of Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        angles = torch.outer(torch.arange(8.0), 100.0 ** -(torch.arange(0, 8, 2) / 8))
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (2, 8)) for f in (self.query, self.key, self.value)]
        freqs = self.freqs[: x.shape[1]].view(1, x.shape[1], 1, 4)
        for i in range(2):
            turned = torch.view_as_real(as_complex(heads[i]) * freqs).flatten(3)
            heads[i] = turned.type_as(x)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in heads))


def test_a_rotary_embedding_is_integers_in_one_delegate() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 16)
    model = Attention()
    trained = canonicalize(capture(model, (x,)), training=True)
    torch.testing.assert_close(trained(x), model(x))
    lowered = lowered_exactly(quantized(model, (x,)), (x,))
    assert lowered.report.fully_delegated
    floats = {op.node for op in lowered.report.ops if op.placement is Placement.FLOAT}
    assert floats == {"scaled_dot_product_attention_mul", "scaled_dot_product_attention_softmax"}


@pytest.mark.parametrize(
    "options",
    [
        {"hop_length": 4, "window": torch.hann_window(16)},
        {"hop_length": 3, "win_length": 12, "window": torch.hamming_window(12), "length": 40},
        {"hop_length": 8, "normalized": True, "center": False},
    ],
)
def test_signals_of_spectrograms_are_convolutions(options: dict[str, Any]) -> None:
    def there_and_back(s: Function, x: Tensor) -> Tensor:
        given = {k: v for k, v in options.items() if k != "length"}
        spectrum = torch.stft(x, 16, return_complex=True, **given)
        return torch.istft(spectrum * s.w, 16, **options)

    model, x = Function(there_and_back), torch.randn(2, 48)
    model.register_buffer("w", torch.polar(torch.rand(9, 1) + 0.5, torch.randn(9, 1)))
    graph = canonicalize(capture(model, (x,)))
    assert not any(map(is_complex, graph.graph.nodes))
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
