from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from custom_quantizer.app.digits import DigitsData, DigitsNet, load_digits_data, train_digits


@pytest.fixture(scope="module")
def data() -> DigitsData:
    return load_digits_data()


@pytest.fixture(scope="module")
def trained(data: DigitsData) -> DigitsNet:
    return train_digits(data=data)


def rows(images: torch.Tensor) -> list[bytes]:
    return [(image * 16).to(torch.uint8).numpy().tobytes() for image in images]


def test_the_split_is_a_partition_of_the_digits(data: DigitsData) -> None:
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == data.test_images.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    original = load_digits()
    expected = sorted(
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    )
    labels = [*data.train_labels.tolist(), *data.test_labels.tolist()]
    images = rows(data.train_images) + rows(data.test_images)
    assert sorted(zip(images, labels, strict=True)) == expected


def test_pixels_are_sixteenths(data: DigitsData) -> None:
    pixels = torch.cat([data.train_images, data.test_images])
    assert torch.equal(pixels * 16, (pixels * 16).round())
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)


def test_a_fifth_of_each_class_is_held_out(data: DigitsData) -> None:
    held_out = torch.bincount(data.test_labels)
    everything = held_out + torch.bincount(data.train_labels)
    assert len(held_out) == 10
    assert ((held_out - everything / 5).abs() < 1).all()


def test_the_split_follows_its_seed(data: DigitsData) -> None:
    again, other = load_digits_data(), load_digits_data(seed=1)
    assert torch.equal(again.test_images, data.test_images)
    assert not torch.equal(other.test_images, data.test_images)


def test_the_network_has_every_kind_of_operator() -> None:
    graph = torch.export.export(DigitsNet().eval(), (torch.zeros(1, 1, 8, 8),))
    convs = [m for m in DigitsNet().modules() if isinstance(m, nn.Conv2d)]
    assert [(c.kernel_size, c.groups) for c in convs] == [
        ((3, 3), 1),
        ((3, 3), 24),
        ((1, 1), 1),
        ((3, 3), 1),
    ]
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    # Export writes relu6 as a hardtanh from 0 to 6.
    for name in ("batch_norm", "relu", "hardtanh", "add", "max_pool2d", "adaptive_avg", "linear"):
        assert any(name in target for target in called), name
    assert sum(parameter.numel() for parameter in DigitsNet().parameters()) == 12_106


@pytest.mark.slow
def test_held_out_accuracy(trained: DigitsNet, data: DigitsData) -> None:
    assert not trained.training
    with torch.no_grad():
        correct = (trained(data.test_images).argmax(1) == data.test_labels).sum().item()
    assert correct >= 350  # 97 % of 360, rounded up


def test_training_is_deterministic_and_leaves_no_trace(data: DigitsData) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    first = train_digits(seed=3, epochs=2, data=data).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        second = train_digits(seed=3, epochs=2).state_dict()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = train_digits(seed=4, epochs=2, data=data).state_dict()
    assert not torch.equal(other["classifier.weight"], first["classifier.weight"])


def test_progress_is_shown_when_asked_for(
    data: DigitsData, capsys: pytest.CaptureFixture[str]
) -> None:
    train_digits(epochs=1, progress=True, data=data)
    assert "1/1" in capsys.readouterr().err
    train_digits(epochs=1, progress=False, data=data)
    assert capsys.readouterr().err == ""
