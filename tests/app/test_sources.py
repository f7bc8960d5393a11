from __future__ import annotations

import io
import os
import sys
import textwrap
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support import cifar_models
from torch import Tensor, nn
from torchvision.transforms import v2

from custom_quantizer.app.capture import arguments_of, capture
from custom_quantizer.app.data import Batch, DataSource, Preprocess, load_data
from custom_quantizer.app.models import load_model, load_weights
from custom_quantizer.calibration.run import GraphInputs
from custom_quantizer.errors import InputError

# --- models ---


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(
        textwrap.dedent(
            """
            import torch
            from beside_nets import WIDTH

            def build(width=WIDTH, fail=False):
                import later_nets
                if fail:
                    raise ValueError("too wide")
                return torch.nn.Linear(width, later_nets.OUT)

            class Net(torch.nn.Linear):
                def __init__(self, width=3):
                    super().__init__(width, 1)

            class family:
                small = Net(1)

            instance = torch.nn.Sequential(torch.nn.Dropout()).train()
            number = 3

            def wrong():
                return [1]
            """
        )
    )
    (tmp_path / "beside_nets.py").write_text("WIDTH = 5\n")
    (tmp_path / "later_nets.py").write_text("OUT = 2\n")
    return path


@pytest.mark.parametrize("spec", ["resnet18", "torchvision:resnet18"])
def test_a_torchvision_model_without_weights_warns(spec: str) -> None:
    with pytest.warns(UserWarning, match=f"{spec} has random weights.*weights=") as caught:
        model = load_model(spec, num_classes=3)
    assert caught[0].filename == __file__
    assert type(model).__name__ == "ResNet"
    assert not model.training
    assert model.get_parameter("fc.weight").shape == (3, 512)


@pytest.mark.parametrize(
    ("spec", "near"), [("resnet81", "resnet18"), ("torchvision:mobilenetv2", "mobilenet_v2")]
)
def test_an_unknown_model_names_its_neighbours(spec: str, near: str) -> None:
    with pytest.raises(InputError, match=rf"did you mean .*\b{near}\b.*package.module:function"):
        load_model(spec)


def test_an_argument_the_model_does_not_have_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"Cannot build resnet18 .*'classes'"):
        load_model("resnet18", classes=3)


def test_published_weights_have_names() -> None:
    with pytest.raises(InputError, match="one of: IMAGENET1K_V1, DEFAULT"):
        load_model("resnet18", weights="IMAGENET1K_V9")


def test_without_a_network_the_message_says_how_to_pass_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"download.*https://.*resnet18.*pass its path as weights"):
        load_model("resnet18", weights="DEFAULT")


def test_no_backbone_is_downloaded_for_a_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", os.devnull)
    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("ssdlite320_mobilenet_v3_large", num_classes=2)
    assert type(model).__name__ == "SSD"


def test_a_file_gives_its_function_class_and_instance(code: Path) -> None:
    path = list(sys.path)
    built = load_model(f"{code}:build", width=7)
    assert isinstance(built, nn.Linear)
    assert (built.in_features, built.out_features) == (7, 2)
    assert not built.training
    net = load_model(f"{code}:Net")
    assert isinstance(net, nn.Linear)
    assert net.in_features == 3
    small = load_model(f"{code}:family.small")
    assert isinstance(small, nn.Linear)
    assert small.in_features == 1
    assert not load_model(f"{code}:instance").training
    assert sys.path == path


def test_an_instance_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cq_test_shared.py").write_text(
        "import torch\nmodel = torch.nn.Sequential(torch.nn.Linear(1, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    first = load_model("cq_test_shared:model")
    with torch.no_grad():
        first.get_parameter("0.bias").fill_(7)
    second = load_model("cq_test_shared:model")
    assert second.get_parameter("0.bias").item() != 7
    assert sys.modules.pop("cq_test_shared").model.training


def test_an_installed_module_is_imported() -> None:
    model = load_model("custom_quantizer.app.digits:DigitsNet", width=8)
    assert model.get_parameter("classifier.weight").shape == (10, 16)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{code}:biuld", "has no 'biuld'.*did you mean build"),
        ("{code}:number", "is of type int.*function that returns"),
        ("{code}:wrong", "returned list, not an nn.Module"),
        ("{code}.py:build", "No Python file"),
        ("{code}", "torchvision has no model"),
        ("no_such_package.nets:build", "no Python module 'no_such_package.nets'"),
        ("custom_quantizer.no_such:build", "no Python module 'custom_quantizer.no_such'"),
        (":build", "names no model"),
        ("torchvision:", "names no model"),
        ("", "names no model"),
    ],
)
def test_a_wrong_spec_is_explained(code: Path, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(spec.format(code=code))


def test_errors_in_the_users_code_are_passed_on(code: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="build failed: ValueError: too wide") as caught:
        load_model(f"{code}:build", fail=True)
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(InputError, match=r"takes no arguments, but got width"):
        load_model(f"{code}:instance", width=1)
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    with pytest.raises(InputError, match=r"broken\.py failed: ModuleNotFoundError"):
        load_model(f"{tmp_path / 'broken.py'}:build")
    (tmp_path / "syntax.py").write_text("def build(:\n")
    with pytest.raises(InputError, match=r"syntax\.py failed: SyntaxError"):
        load_model(f"{tmp_path / 'syntax.py'}:build")


def test_a_missing_import_of_a_module_is_not_taken_for_the_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cq_test_broken.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"Importing cq_test_broken failed.*no_such_thing"):
        load_model("cq_test_broken:build")


Saver = Callable[[dict[str, Tensor], Path], None]


def save_pt(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


@pytest.mark.parametrize(
    ("suffix", "save"),
    [
        (".safetensors", save_file),
        (".pt", save_pt),
        (".pth", save_pt),
        (".pth", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path)),
        (".pt", lambda state, path: torch.save({"model": state}, path)),
        (".pt", lambda state, path: torch.save({"model_state_dict": state}, path)),
        (".pt", lambda s, path: torch.save({f"module.{key}": s[key] for key in s}, path)),
        (
            ".pt",
            lambda s, path: torch.save({"model": {f"module.{key}": s[key] for key in s}}, path),
        ),
    ],
)
def test_weights_are_loaded(tmp_path: Path, suffix: str, save: Saver) -> None:
    source, model = tiny(), tiny()
    state = source.state_dict()
    path = tmp_path / f"weights{suffix}"
    save(state, path)
    assert not same_state(model, state)
    load_weights(model, path)
    assert same_state(model, state)


@pytest.mark.parametrize("names", [("module", "head"), ("module",), ("head",)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_may_be_called_module(
    tmp_path: Path, names: tuple[str, ...], wrapped: bool
) -> None:
    """The prefix that DataParallel writes is dropped only where all keys have it more often."""
    source, model = (nn.ModuleDict({name: nn.Linear(2, 2) for name in names}) for _ in range(2))
    state = source.state_dict()
    written = {f"module.{key}": state[key] for key in state} if wrapped else state
    torch.save(written, tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    assert same_state(model, state)


def test_a_prefix_of_some_keys_is_not_dropped(tmp_path: Path) -> None:
    state = {"module.weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"1 unexpected keys: module\.weight"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.pt")


def test_load_model_takes_a_weights_file(code: Path, tmp_path: Path) -> None:
    state = nn.Linear(5, 2).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    assert same_state(load_model(f"{code}:build", tmp_path / "weights.safetensors"), state)
    torch.save(state, tmp_path / "weights.bin")
    with pytest.raises(InputError, match=r"weights files end in \.pt, \.pth, \.safetensors"):
        load_model(f"{code}:build", tmp_path / "weights.bin")
    with pytest.raises(InputError, match=r"No weights file .*missing\.pt"):
        load_model(f"{code}:build", tmp_path / "missing.pt")
    with pytest.raises(InputError, match=r"No weights file DEFAULT; names .* torchvision"):
        load_model(f"{code}:build", "DEFAULT")


def test_a_torchvision_model_with_a_file_does_not_warn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="random"):
        state = load_model("squeezenet1_1").state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_state(load_model("squeezenet1_1", tmp_path / "weights.safetensors"), state)


def test_other_keys_are_listed(tmp_path: Path) -> None:
    state = {f"old.{index}": torch.zeros(1) for index in range(9)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError,
        match=r"missing keys: 0\.weight, 0\.bias, .*; "
        r"9 unexpected keys: old\.0, old\.1, old\.2, old\.3, old\.4, old\.5 and 3 more; pass",
    ):
        load_weights(tiny(), tmp_path / "w.safetensors")


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    save_file(nn.Sequential(nn.Conv2d(3, 2, 1)).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"0\.weight \[2, 3, 1, 1\] \(model: \[2, 1, 1, 1\]\)"):
        load_weights(tiny(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tiny(),
            r"holds a torch.nn.modules.*could run code; save tensors alone: torch\.save\(model\.",
        ),
        ([torch.zeros(1)], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"epoch": 3, "a": torch.zeros(1)}, "epoch are not tensors"),
    ],
)
def test_files_that_are_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        load_weights(tiny(), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_damaged_weights(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        load_weights(tiny(), tmp_path / name)


# --- preprocessing ---


def pixels(index: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("preprocess", "size"),
    [
        (Preprocess(), (6, 8)),
        (Preprocess(resize=12), (12, 16)),
        (Preprocess(resize=(5, 4)), (5, 4)),
        (Preprocess(crop=4), (4, 4)),
        (Preprocess(resize=9, crop=(8, 10)), (8, 10)),
        (Preprocess(mean=(0.5, 0.25, 0.0), std=(1.0, 0.1, 2.0)), (6, 8)),
    ],
)
def test_an_image_is_what_torchvision_makes_of_it(
    tmp_path: Path, preprocess: Preprocess, size: tuple[int, int]
) -> None:
    image = Image.fromarray(pixels(0))
    image.save(tmp_path / "a.png")
    steps: list[nn.Module] = []
    if preprocess.resize is not None:
        resize = preprocess.resize
        steps.append(v2.Resize([resize] if isinstance(resize, int) else list(resize)))
    if preprocess.crop is not None:
        steps.append(v2.CenterCrop(preprocess.crop))
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(preprocess.mean), list(preprocess.std)),
    ]
    [batch] = load_data(tmp_path, preprocess=preprocess)
    assert batch.inputs[0].shape == (1, 3, *size)
    assert torch.equal(batch.inputs[0][0], v2.Compose(steps)(image))


def test_a_tensor_of_pixels_is_resized_as_an_image_is() -> None:
    """With antialiasing, which PIL images have in any case."""
    image = torch.arange(256, dtype=torch.uint8).repeat(96)[: 3 * 64 * 64].reshape(3, 64, 64)
    fine = (image // 4 % 2) * 255  # stripes that a sample here and there would miss
    got = Preprocess(resize=(9, 7)).fit(fine)
    assert got.dtype == torch.uint8
    assert torch.equal(got, v2.functional.resize(fine, [9, 7], antialias=True))
    assert not torch.equal(got, v2.functional.resize(fine, [9, 7], antialias=False))
    of_image = Preprocess(resize=(9, 7)).fit(Image.fromarray(fine.permute(1, 2, 0).numpy()))
    by_pil = torch.from_numpy(np.asarray(of_image).copy()).permute(2, 0, 1)
    assert int((got.int() - by_pil.int()).abs().max()) <= 1  # torch and PIL round apart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resize": 0}, "resize=0"),
        ({"crop": (4, -1)}, "crop="),
        ({"crop": (4,)}, "crop="),
        ({"mean": (0.5,)}, "mean has 1 values and std 3"),
        ({"mean": (), "std": ()}, "mean has 0 values"),
        ({"std": (0.1, 0.2, 0.0)}, "std above 0"),
        ({"mean": (0.1, 0.2, float("nan"))}, "finite"),
    ],
)
def test_impossible_preprocessing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocess(**arguments)


# --- images ---


def png(index: int, height: int = 6, width: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(index, height, width)).save(buffer, format="png")
    return buffer.getvalue()


def make_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


CLASSES = {f"{c}/{i:04}.png": png(10 * k + i) for k, c in enumerate("ba") for i in range(3)}


def everything(source: DataSource) -> Batch:
    batches = list(source)
    inputs = tuple(torch.cat(parts) for parts in zip(*(b.inputs for b in batches), strict=True))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(inputs, torch.cat(labels) if labels else None)


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("prefix", ["", "test/", "some/where/"])
def test_folders_are_classes(tmp_path: Path, archive: bool, prefix: str) -> None:
    files = {prefix + name: content for name, content in CLASSES.items()}
    files |= {"notes.txt": b"", "__MACOSX/a/._0.png": b"no image", ".cache/b.png": b"no image"}
    path = make_zip(tmp_path / "d.zip", files) if archive else make_tree(tmp_path / "d", files)
    source = load_data(path, batch_size=4)
    assert source.classes == ("a", "b")
    assert source.num_examples == 6
    assert len(source) == len(list(source)) == 2
    inputs, labels = everything(source)
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.labels is not None
    assert torch.equal(source.labels, labels)
    expected = torch.stack(
        [torch.from_numpy(pixels(index)).permute(2, 0, 1) for index in (10, 11, 12, 0, 1, 2)]
    )
    assert torch.equal(inputs[0], Preprocess().normalize(expected))
    assert torch.equal(everything(source).inputs[0], inputs[0])  # a second pass is the same


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("folder", ["", "photos/"])
def test_images_side_by_side_have_no_labels(tmp_path: Path, archive: bool, folder: str) -> None:
    files = {f"{folder}{index}.png": png(index) for index in range(3)}
    path = make_zip(tmp_path / "d.zip", files) if archive else make_tree(tmp_path / "d", files)
    source = load_data(path)
    assert source.labels is None
    assert source.classes == ()
    [(inputs, labels)] = source
    assert labels is None
    assert inputs[0].shape == (3, 3, 6, 8)


@pytest.mark.parametrize("archive", [False, True])
def test_a_split_is_chosen(tmp_path: Path, archive: bool) -> None:
    files = {f"{s}/{c}/0.png": png(i) for s in ("train", "val") for i, c in enumerate("xy")}
    path = make_zip(tmp_path / "d.zip", files) if archive else make_tree(tmp_path / "d", files)
    with pytest.raises(InputError, match=r"several data sets.*train, val.*split='train'"):
        load_data(path)
    source = load_data(path, split="val")
    assert (source.classes, source.num_examples) == (("x", "y"), 2)
    with pytest.raises(InputError, match=r"no images in .*folder test; folders there: train, val"):
        load_data(path, split="test")


def test_folders_below_a_class_belong_to_it(tmp_path: Path) -> None:
    files = {"a/left/0.png": png(0), "a/right/0.png": png(1), "b/0.png": png(2)}
    source = load_data(make_tree(tmp_path, files))
    assert source.labels is not None
    assert (source.classes, source.labels.tolist()) == (("a", "b"), [0, 0, 1])


def test_gray_images(tmp_path: Path) -> None:
    Image.fromarray(pixels(0, channels=1)).save(tmp_path / "a.png")
    preprocess = Preprocess(mean=(0.0,), std=(1.0,))
    [(inputs, _)] = load_data(tmp_path, preprocess=preprocess)
    assert inputs[0].shape == (1, 1, 6, 8)
    back = (inputs[0][0, 0] * 255).round().to(torch.uint8)
    assert torch.equal(back, torch.from_numpy(pixels(0, channels=1)))
    [(inputs, _)] = load_data(tmp_path)
    assert inputs[0].shape == (1, 3, 6, 8)


def damaged_png() -> bytes:
    return png(0, 64, 64)[:400]


def deep_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "bad.png: it cannot be decoded"),
        (b"", "bad.png: it cannot be decoded"),
        (damaged_png(), "bad.png: it cannot be decoded"),
        (deep_png(), "bad.png: The pixels are not 8-bit"),
        (png(0, 3, 9), "bad.png: An image of 3x9 pixels is smaller than the crop 4x4"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(
    tmp_path: Path, archive: bool, content: bytes, message: str
) -> None:
    files = {"a/good.png": png(1), "b/bad.png": content}
    path = make_zip(tmp_path / "d.zip", files) if archive else make_tree(tmp_path / "d", files)
    source = load_data(path, batch_size=1, preprocess=Preprocess(crop=4))
    batches = iter(source)
    next(batches)
    with pytest.raises(InputError, match=message):
        next(batches)


def test_images_of_several_sizes_are_refused_with_the_cure(tmp_path: Path) -> None:
    path = make_tree(tmp_path, {"a.png": png(0), "b.png": png(1, 7, 9)})
    for batch_size in (1, 2):
        with pytest.raises(InputError, match=r"b\.png has 7x9 pixels, a\.png has 6x8.*resize"):
            list(load_data(path, batch_size=batch_size))
    [(inputs, _)] = load_data(path, preprocess=Preprocess(resize=5, crop=5))
    assert inputs[0].shape == (2, 3, 5, 5)


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    source = load_data(make_tree(tmp_path, {"a.png": png(0)}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: Cannot read .*no such file"):
        list(source)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no images in"),
        ({"a.txt": b""}, "no images in"),
        ({"a.png": b"", "b/c.png": b""}, "beside folders"),
    ],
)
def test_folders_that_are_no_data_set(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_data(make_tree(tmp_path, files))
    with pytest.raises(InputError, match=message):
        load_data(make_zip(tmp_path / "d.zip", files))


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No file or folder"):
        load_data(tmp_path / "missing")
    for name in ("missing.zip", "missing.npy"):
        with pytest.raises(InputError, match=f"No .*file .*{name}"):
            load_data(tmp_path / name)
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"cannot be read as a \.zip"):
        load_data(tmp_path / "a.zip")
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(InputError, match="unknown kind of data"):
        load_data(tmp_path / "a.csv")
    make_tree(tmp_path, {"a.png": png(0)})
    with pytest.raises(InputError, match="batch_size=0"):
        load_data(tmp_path, batch_size=0)
    with pytest.raises(InputError, match="mean has 2 values"):
        load_data(tmp_path, preprocess=Preprocess(mean=(0.0, 0.0), std=(1.0, 1.0)))


# --- tensors ---

X = torch.arange(24.0).reshape(4, 6)
Y = torch.tensor([1, 0, 1, 2])


def npz(path: Path, *args: Tensor, **kwargs: Tensor) -> None:
    arrays: dict[str, Any] = {key: value.numpy() for key, value in kwargs.items()}
    np.savez(path, *[value.numpy() for value in args], **arrays)


@pytest.mark.parametrize(
    ("name", "save", "inputs", "labels"),
    [
        ("d.npy", lambda p: np.save(p, X.numpy()), 1, False),
        ("d.npy", lambda p: np.save(p, np.asfortranarray(X.numpy()).astype(">f4")), 1, False),
        ("d.pt", lambda p: torch.save(X, p), 1, False),
        ("d.pt", lambda p: torch.save((X, X + 1), p), 2, False),
        ("d.pth", lambda p: torch.save({"inputs": [X, X + 1], "labels": Y}, p), 2, True),
        ("d.pt", lambda p: torch.save({"images": X, "targets": Y}, p), 1, True),
        ("d.npz", lambda p: npz(p, x=X, y=Y), 1, True),
        ("d.npz", lambda p: npz(p, X), 1, False),
        ("d.npz", lambda p: npz(p, X, X + 1), 2, False),
        ("d.npz", lambda p: npz(p, anything=X), 1, False),
        ("d.safetensors", lambda p: save_file({"input": X, "label": Y}, p), 1, True),
        (
            "d.safetensors",
            lambda p: save_file({"inputs.1": X + 1, "target": Y, "inputs.0": X}, p),
            2,
            True,
        ),
    ],
)
def test_tensor_files(
    tmp_path: Path, name: str, save: Callable[[Path], None], inputs: int, labels: bool
) -> None:
    save(tmp_path / name)
    source = load_data(tmp_path / name, batch_size=3)
    assert [len(batch.inputs[0]) for batch in source] == [3, 1]
    got = everything(source)
    assert len(got.inputs) == inputs
    for index, tensor in enumerate(got.inputs):
        assert torch.equal(tensor, X + index)
    assert (source.labels is not None) == labels
    if labels:
        assert got.labels is not None
        assert torch.equal(got.labels, Y)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> Tensor:
        return (left - right) * scale


class OneDictionary(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["left"] - batch["right"]) * 2.0


@pytest.mark.parametrize("model", [TwoInputs(), OneDictionary()])
def test_inputs_are_named_as_the_arguments_of_the_model(tmp_path: Path, model: nn.Module) -> None:
    """Whatever their order in the file: safetensors, for one, sorts them."""
    save_file({"right": X + 1, "left": X, "labels": Y}, tmp_path / "d.safetensors")
    source = load_data(tmp_path / "d.safetensors", batch_size=2)
    assert set(source.input_names) == {"left", "right"}
    batch = next(iter(source))
    assert isinstance(batch.inputs, dict)
    assert batch.labels is not None
    flat = pytree.tree_leaves(arguments_of(model, source.example_inputs(2)))
    assert torch.equal(flat[0], X[:2])
    assert torch.equal(flat[1], X[:2] + 1)
    graph, _ = capture(model, source.example_inputs(2))
    called = GraphInputs.of(graph).fit(batch, "a batch")
    assert torch.equal(called[0], X[:2])
    assert torch.equal(called[1], X[:2] + 1)
    captured = pytree.tree_leaves(arguments_of(graph, source.example_inputs(2)))
    assert torch.equal(captured[1], X[:2] + 1)


def test_y_beside_labels_is_an_input(tmp_path: Path) -> None:
    save_file({"x": X, "y": X + 1, "labels": Y}, tmp_path / "d.safetensors")
    (batch,) = load_data(tmp_path / "d.safetensors")
    assert isinstance(batch.inputs, dict)
    assert torch.equal(batch.inputs["x"], X)
    assert torch.equal(batch.inputs["y"], X + 1)
    assert batch.labels is not None
    assert torch.equal(batch.labels, Y)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"left": X, "rihgt": X}, "TwoInputs.forward takes left, right, scale, no rihgt"),
        ({"left": X}, "takes left, right, scale, also right"),
    ],
)
def test_inputs_of_other_names(named: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arguments_of(TwoInputs(), named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": X, "x": X}, "images and x, which mean the same"),
        ({"x": X, "label": Y, "labels": Y}, "labels and label, which mean the same"),
        ({"x": X, "y": X}, r"y means labels, .* name the inputs of a model with several inputs\.0"),
        ({"a": X, "b": 3}, "holds int where a tensor"),
        ({"a": X, "b": X[:2]}, "different numbers of examples: 4, 2"),
        ({"labels": Y}, "holds labels and no inputs; name them as the arguments of the model"),
        ({"inputs": 3}, "holds int where a tensor"),
        ((X, Y), "an input or the labels"),
        ((), "no input tensor"),
        (3, "holds int, not tensors"),
        (X[:0], "no example"),
        (torch.tensor(1.0), "examples first"),
        ({"x": X, "y": Y[:3]}, "different numbers of examples: 4, 3"),
        ((X, X[:2]), "different numbers of examples: 4, 2"),
        ({"x": X, "y": Y.float()}, "labels are float32"),
        ({"x": X, "y": Y[:, None]}, "labels are int64 of shape"),
        (X.to(torch.complex64), "complex64 .*no rule"),
        (X.to(torch.int8), "int8 .*no rule"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "int64 .*as uint8 .* or as float32"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), r"uint8 means .*\[N, 3, H, W\].*transpose"),
    ],
)
def test_tensors_that_cannot_be_used(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "d.pt")
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "d.pt")


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(InputError, match="must be dense"):
        DataSource.from_tensors(X.to_sparse())


def test_object_arrays_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"d\.npy: It holds Python objects, .* not read"):
        load_data(tmp_path / "d.npy")


def test_a_split_is_not_for_tensors(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X.numpy())
    with pytest.raises(InputError, match="for folders and archives"):
        load_data(tmp_path / "d.npy", split="val")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floating_inputs_become_float32(dtype: torch.dtype) -> None:
    [batch] = DataSource.from_tensors(X.to(dtype))
    assert batch.inputs[0].dtype == torch.float32
    assert torch.equal(batch.inputs[0], X)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool])
def test_indices_and_masks_stay_as_they_are(dtype: torch.dtype) -> None:
    [batch] = DataSource.from_tensors(X.to(dtype))
    assert batch.inputs[0].dtype == dtype
    assert torch.equal(batch.inputs[0], X.to(dtype))


def test_uint8_tensors_are_images() -> None:
    images = torch.stack([torch.from_numpy(pixels(i)).permute(2, 0, 1) for i in range(3)])
    preprocess = Preprocess(crop=4, std=(0.5, 0.5, 0.5))
    [batch] = DataSource.from_tensors(images, preprocess=preprocess)
    assert torch.equal(batch.inputs[0], preprocess.normalize(images[..., 1:5, 2:6]))


# --- order and subsets ---


def positions(source: DataSource) -> list[int]:
    return everything(source).inputs[0].flatten().to(torch.int64).tolist()


def numbered(labels: list[int] | None, count: int = 0) -> DataSource:
    count = count if labels is None else len(labels)
    return DataSource.from_tensors(
        torch.arange(float(count)), None if labels is None else torch.tensor(labels), batch_size=3
    )


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_subset_is_as_even_over_the_classes_as_they_allow(
    labels: list[int], seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(labels)))
    source = numbered(labels)
    subset = source.subset(n, seed)
    drawn = positions(subset)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == n == subset.num_examples
    assert subset.labels is not None
    assert subset.labels.tolist() == [labels[index] for index in drawn]
    # Nobody has two more than a class that still had one to give.
    got, had = Counter(labels[index] for index in drawn), Counter(labels)
    most = max(got.values())
    assert all(got[label] >= most - 1 or got[label] == had[label] for label in had)
    assert positions(source.subset(n, seed)) == drawn
    if n > 1:
        assert set(positions(source.subset(n - 1, seed))) < set(drawn)


def test_subsets_differ_by_seed_and_reach_all() -> None:
    source = numbered([0, 1] * 50)
    draws = [tuple(positions(source.subset(10, seed))) for seed in range(30)]
    assert len(set(draws)) == 30
    assert len({index for draw in draws for index in draw}) > 80
    unlabelled = numbered(None, 100)
    assert unlabelled.subset(7).labels is None
    assert len(positions(unlabelled.subset(7))) == 7


def test_a_subset_of_a_subset_keeps_labels_and_inputs_together() -> None:
    labels = [index % 3 for index in range(30)]
    source = numbered(labels).shuffled(1).subset(20, 2).shuffled(3).subset(9, 4)
    inputs, got = everything(source)
    assert got is not None
    assert got.tolist() == [labels[int(index)] for index in inputs[0]]
    assert Counter(got.tolist()) == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize("n", [0, -1, 5])
def test_a_subset_has_a_possible_size(n: int) -> None:
    with pytest.raises(InputError, match=f"cannot draw {n} of 4 examples"):
        numbered(None, 4).subset(n)


def test_limit_and_shuffle(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.arange(40.0), y=np.repeat(np.arange(4), 10))
    path = tmp_path / "d.npz"
    assert positions(load_data(path)) == list(range(40))
    assert positions(load_data(path, limit=99)) == list(range(40))
    limited = load_data(path, limit=8, seed=5)
    assert limited.labels is not None
    assert limited.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    shuffled = positions(load_data(path, shuffle=True, seed=5))
    assert shuffled != list(range(40))
    assert sorted(shuffled) == list(range(40))
    assert positions(load_data(path, shuffle=True, seed=5)) == shuffled
    assert positions(load_data(path, shuffle=True, seed=6)) != shuffled
    both = positions(load_data(path, limit=8, shuffle=True, seed=5))
    assert sorted(both) == positions(limited)
    with pytest.raises(InputError, match="cannot draw 0"):
        load_data(path, limit=0)


def test_views_of_a_source() -> None:
    source = numbered([0, 1, 0, 1, 0, 1, 0])
    assert len(source) == 3
    assert len(source.inputs) == 3
    for _ in range(2):  # calibration may go through the data more than once
        assert [inputs[0].tolist() for inputs in source.inputs] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [len(batch.inputs[0]) for batch in source.with_batch_size(5)] == [5, 2]
    assert source.example_inputs()[0].tolist() == [0]
    assert source.shuffled(1).example_inputs(2)[0].tolist() == positions(source.shuffled(1))[:2]
    assert source.example_inputs(99)[0].shape == (7,)
    assert repr(source) == "DataSource(name='tensors', batch_size=3)"


# --- the networks of the slow tests ---


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (cifar_models.resnet20, 269_722),
        (cifar_models.resnet32, 464_154),
        (cifar_models.cifar_mobilenet_v2, 700_490),
    ],
)
def test_cifar_networks(build: Callable[..., nn.Module], parameters: int) -> None:
    model = build(pretrained=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_data_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSTOM_QUANTIZER_DATA", str(tmp_path))
    assert cifar_models.shared_data_dir() == tmp_path
    with pytest.raises(InputError, match=r"No weights/cifar_resnet20.safetensors"):
        cifar_models.resnet20()
    monkeypatch.setenv("CUSTOM_QUANTIZER_DATA", str(tmp_path / "missing"))
    assert cifar_models.shared_data_dir() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "correct"),
    [(cifar_models.resnet20, 4051), (cifar_models.resnet32, 4145)],
)
def test_cifar_accuracy(build: Callable[..., nn.Module], correct: int) -> None:
    model = build()
    images, labels = cifar_models.cifar10_test()
    with torch.inference_mode():
        predicted = torch.cat([model(batch).argmax(1) for batch in torch.split(images, 250)])
    # Another processor may turn one tie or two.
    assert abs((predicted == labels).sum().item() - correct) <= 2
