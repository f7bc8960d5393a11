"""Data named by a path, as the command line gets it.

Nothing here knows about quantization: :func:`load_data` hands on an immutable, re-iterable
:class:`DataSource` of batches. What a user can get wrong (a path, a file's content) raises
:class:`~custom_quantizer.errors.InputError`.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from custom_quantizer.app.tensor_files import WEIGHT_SUFFIXES, described, read_tensor_file
from custom_quantizer.core.batch import LABEL_KEYS, Batch
from custom_quantizer.core.files import (
    AnyPath,
    check_regular,
    memory_limit,
    open_regular,
    printable,
)
from custom_quantizer.errors import InputError, some

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Batch", "DataSource", "Preprocess", "load_data"]

# torchvision is imported inside the functions that use it: it costs a second, and most commands
# do without.


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pillow would start Ghostscript for PostScript that is called .png.
_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MOST_IMAGE_BYTES = 2**29
_MOST_ARCHIVE_BYTES = 2**44  # is not read into memory
_SPLITS = frozenset({"calibration", "dev", "eval", "test", "train", "val", "valid", "validation"})
_INPUT_KEYS = ("images", "inputs", "input", "x")


@dataclass(frozen=True)
class Preprocess:
    """What happens to an image between its 8-bit pixels and the model.

    Resize, then center crop, then scale to [0, 1], then ``(x - mean) / std``: torchvision's
    evaluation transform, from the same functions. The default normalizes as the ImageNet models
    need it and leaves the size alone; they were evaluated with ``Preprocess(256, 224)``.

    Attributes:
        resize: Length of the shorter side, or (height, width), in pixels; None keeps the size.
        crop: Side, or (height, width), of the part cut from the center; None keeps all.
        mean: Per channel, on the [0, 1] scale. As many values as the images have channels: 3
            reads image files as RGB, 1 as gray.
        std: Per channel, positive.

    Raises:
        InputError: A size or a ``std`` is not positive, or ``mean`` and ``std`` differ in length.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            sides = (size, size) if isinstance(size, int) else size
            if sides is not None and (len(sides) != 2 or min(sides) < 1):
                raise InputError(f"{name}={size}: give one or two positive numbers of pixels")
        if not self.mean or len(self.mean) != len(self.std):
            raise InputError(
                f"mean has {len(self.mean)} values and std {len(self.std)}: give one per channel"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise InputError(
                f"mean={self.mean}, std={self.std}: both must be finite, and std above 0"
            )

    def __str__(self) -> str:
        sizes = [
            f"{name} {size if isinstance(size, int) else f'{size[0]}x{size[1]}'}"
            for name, size in (("resized to", self.resize), ("cropped to", self.crop))
            if size is not None
        ]
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return ", ".join([*sizes, f"scaled to [0, 1], less mean {mean}, by std {std}"])

    def fit(self, image: Any) -> Any:
        """Resize and crop.

        Args:
            image: A PIL image, or a uint8 tensor of shape ``(..., C, H, W)``.

        Returns:
            The same kind of image.

        Raises:
            InputError: The image is smaller than the crop.
        """
        if self.resize is None and self.crop is None:
            return image
        from torchvision.transforms.v2 import functional as F

        if self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            image = F.resize(image, size, antialias=True)
        if self.crop is not None:
            crop = [self.crop] * 2 if isinstance(self.crop, int) else list(self.crop)
            height, width = F.get_size(image)
            # torchvision would pad with black.
            if height < crop[0] or width < crop[1]:
                raise InputError(
                    f"An image of {height}x{width} pixels is smaller than the crop "
                    f"{crop[0]}x{crop[1]}; resize to at least that, or crop less"
                )
            image = F.center_crop(image, crop)
        return image

    def normalize(self, images: Tensor) -> Tensor:
        """Scale to [0, 1], subtract the mean and divide by the standard deviation.

        Args:
            images: uint8, of shape ``(N, C, H, W)``.

        Returns:
            float32, of the same shape.
        """
        from torchvision.transforms.v2 import functional as F

        scaled = F.to_dtype(images, torch.float32, scale=True)
        return cast(Tensor, F.normalize(scaled, list(self.mean), list(self.std), inplace=True))


class _Reader(Protocol):
    """Where examples come from. Reading the same indices twice gives the same tensors."""

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]: ...

    @property
    def treatment(self) -> str: ...


@dataclass(frozen=True, eq=False)
class DataSource:
    """Batches of examples in a fixed order, as often as one iterates.

    ``len(source)`` is the number of batches, of which the last may be smaller. Images are decoded
    when their batch is asked for. Made by :func:`load_data` or :meth:`from_tensors`; never
    changed: :meth:`subset` and :meth:`with_batch_size` return others.

    Attributes:
        name: Where the data is from, for messages.
        batch_size: Examples per batch.
        classes: Names of the classes, sorted; empty when there are no labels or no names.
        labels: int64 class of each example in the order of iteration, shape ``(examples,)``, or
            None.
        input_names: Arguments of the model that the inputs are; empty where they have an order
            alone.
    """

    name: str
    batch_size: int
    classes: tuple[str, ...] = field(repr=False)
    labels: Tensor | None = field(repr=False)
    _order: Tensor = field(repr=False)
    _reader: _Reader = field(repr=False)
    input_names: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}: it must be at least 1")

    @classmethod
    def from_tensors(
        cls,
        inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        labels: Tensor | None = None,
        *,
        batch_size: int = 64,
        preprocess: Preprocess | None = None,
        name: str = "tensors",
    ) -> DataSource:
        """Wrap tensors held in memory.

        Args:
            inputs: One tensor per argument of the model, in their order or by their names,
                examples first. The dtype says what is done: float32 is used as it is and other
                floating dtypes are converted to it; int32, int64 and bool of fewer than four
                dimensions (indices, masks) are used as they are; uint8 of shape ``(N, C, H, W)``
                are images, and go through ``preprocess`` like decoded files. Others are refused.
            labels: Integer classes of shape ``(N,)``, or None.
            batch_size: Examples per batch.
            preprocess: For uint8 images; None is ``Preprocess()``.
            name: For messages.

        Raises:
            InputError: A dtype or shape is not as above, lengths differ, or there is no example.
        """
        names: tuple[str, ...] = ()
        if isinstance(inputs, Mapping):
            names, inputs = tuple(inputs), tuple(inputs.values())
        tensors = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not tensors:
            raise InputError(f"{name}: there is no input tensor")
        preprocess = preprocess or Preprocess()
        checked = tuple(
            _checked_input(tensor, f"{name}: input {index}", preprocess)
            for index, tensor in zip(names or range(len(tensors)), tensors, strict=True)
        )
        count = len(checked[0])
        if labels is not None:
            labels = _checked_labels(labels, name)
        lengths = [len(tensor) for tensor in (*checked, *([] if labels is None else [labels]))]
        if len(set(lengths)) > 1:
            raise InputError(
                f"{name}: inputs and labels have different numbers of examples: "
                f"{', '.join(map(str, lengths))}"
            )
        if count == 0:
            raise InputError(f"{name}: there is no example in it")
        reader = _TensorReader(checked, preprocess)
        return cls(name, batch_size, (), labels, torch.arange(count), reader, names)

    @property
    def num_examples(self) -> int:
        """Number of examples."""
        return len(self._order)

    @property
    def treatment(self) -> str:
        """What is done to the values on their way to the model, in a few words."""
        return self._reader.treatment

    @property
    def inputs(self) -> InputBatches:
        """The batches without their labels, as calibration takes them."""
        return InputBatches(self)

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises:
            InputError: An image cannot be read, or has another size than those before it.
        """
        batches = torch.split(self._order, self.batch_size)
        labels: Sequence[Tensor | None] = (
            [None] * len(batches)
            if self.labels is None
            else torch.split(self.labels, self.batch_size)
        )
        for inputs, known in zip(self._reader.read(batches), labels, strict=True):
            by_name = dict(zip(self.input_names, inputs, strict=True)) if self.input_names else None
            yield Batch(by_name or inputs, known)

    def subset(self, n: int, seed: int = 0) -> DataSource:
        """Draw ``n`` examples at random, as evenly over the classes as they allow.

        Examples keep their order. For one ``seed``, the draw of a smaller ``n`` is part of the
        draw of a larger one.

        Raises:
            InputError: ``n`` is below 1 or above the number of examples.
        """
        if not 1 <= n <= self.num_examples:
            raise InputError(
                f"{self.name}: cannot draw {n} of {self.num_examples} examples; ask for 1 to "
                f"{self.num_examples}"
            )
        return self._take(_balanced_order(self.num_examples, self.labels, seed)[:n].sort().values)

    def shuffled(self, seed: int = 0) -> DataSource:
        """Return the same examples in a random order."""
        return self._take(torch.randperm(self.num_examples, generator=_generator(seed)))

    def with_batch_size(self, batch_size: int) -> DataSource:
        """Return the same examples in batches of another size."""
        return replace(self, batch_size=batch_size)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, ...] | Mapping[str, Tensor]:
        """Return the inputs of the first ``batch_size`` examples, to export a model with.

        By name where the data have names.
        """
        first = self._take(torch.arange(min(batch_size, self.num_examples)))
        return next(iter(first.with_batch_size(batch_size))).inputs

    def _take(self, positions: Tensor) -> DataSource:
        return replace(
            self,
            labels=None if self.labels is None else self.labels[positions],
            _order=self._order[positions],
        )


@dataclass(frozen=True, eq=False)
class InputBatches:
    """The inputs of a :class:`DataSource`, batch by batch, as often as one iterates."""

    source: DataSource

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, ...] | Mapping[str, Tensor]]:
        for batch in self.source:
            yield batch.inputs


def load_data(
    path: AnyPath,
    *,
    preprocess: Preprocess | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    split: str | None = None,
    classes: Sequence[str] | None = None,
) -> DataSource:
    """Read examples from images or tensors.

    Args:
        path: One of

            - a folder, or a ``.zip`` archive, of images. With one folder per class the sorted
              folder names are the classes (torchvision's ``ImageFolder``); images side by side,
              or in one folder only, have no labels. Folders that enclose everything are looked
              through, files that are no images are ignored, and archives are not unpacked;
            - ``.npy``, ``.npz``, ``.pt``, ``.pth`` or ``.safetensors`` with tensors: a single
              one; several by the names of the model's arguments, or in their order, as a list or
              tuple or called ``inputs.0``, ``inputs.1``, ...; or ``images``, ``inputs``,
              ``input`` or ``x`` for a single one; and beside them ``labels``, ``targets``,
              ``label``, ``target`` or ``y``. What happens to each dtype is told by
              :meth:`DataSource.from_tensors`.
        preprocess: What to do with 8-bit images; None is ``Preprocess()``. Tensors of other
            dtypes are taken as they are.
        batch_size: Examples per batch.
        limit: At most that many examples, drawn by :meth:`DataSource.subset`.
        shuffle: Whether to shuffle them (once: every iteration has the same order).
        seed: For ``limit`` and ``shuffle``.
        split: Folder inside ``path`` to read, such as ``"val"``.
        classes: Names of the model's classes, in the order of its scores, for folders that are
            named by class; a class may have no folder. Default: the folders in the order of their
            names, which are the model's classes only if none is missing.

    A file may come from anywhere: what takes more than half of the memory, packed or unpacked,
    is refused before it is read, and so is an image of more than ``PIL.Image.MAX_IMAGE_PIXELS``
    (89 million). Objects that would have to be unpickled are refused.

    Raises:
        InputError: The path is missing, empty, of an unknown kind or unreadable, too large, or its
            content is not as above; a folder is none of ``classes``. An image that cannot be
            decoded raises while iterating.
    """
    path = Path(path)
    preprocess = preprocess or Preprocess()
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".zip":
        source = _image_source(path, preprocess, batch_size, split, classes)
    elif suffix in _TENSOR_SUFFIXES:
        if split is not None or classes is not None:
            what = "classes" if split is None else f"split={split!r}"
            raise InputError(f"{path}: {what} is for folders and archives of images")
        inputs, labels = _named_tensors(read_tensor_file(path, "data", _TENSOR_SUFFIXES), path)
        source = DataSource.from_tensors(
            inputs, labels, batch_size=batch_size, preprocess=preprocess, name=str(path)
        )
    elif path.exists():
        raise InputError(
            f"{path}: unknown kind of data; name a folder or a .zip of images, or a file that "
            f"ends in {', '.join(sorted(_TENSOR_SUFFIXES))}"
        )
    else:
        raise InputError(f"No file or folder {path}; check the path")
    if limit is not None:
        source = source.subset(min(limit, source.num_examples), seed)
    return source.shuffled(seed) if shuffle else source


_TENSOR_SUFFIXES = WEIGHT_SUFFIXES | {".npy", ".npz"}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _balanced_order(count: int, labels: Tensor | None, seed: int) -> Tensor:
    """Order positions at random, so that each beginning is as even over the classes as can be.

    A shuffled example that is the k-th of its class belongs to round k; the rounds follow each
    other, and a class that has run out is missing from the later ones.
    """
    shuffled = torch.randperm(count, generator=_generator(seed))
    if labels is None:
        return shuffled
    seen: dict[int, int] = {}
    rounds = []
    for label in labels[shuffled].tolist():
        rounds.append(seen.get(label, 0))
        seen[label] = rounds[-1] + 1
    return shuffled[torch.tensor(rounds).sort(stable=True).indices]


_TO_ONE_SIZE = "as with --resize 256 --crop 224, in Python Preprocess(resize=256, crop=224)"


# --- data: images ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _ImageReader:
    """Images in a folder or in an archive, decoded one batch at a time."""

    root: Path
    names: tuple[str, ...]
    preprocess: Preprocess

    @property
    def treatment(self) -> str:
        return f"8-bit images, {self.preprocess}"

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        first: tuple[str, torch.Size] | None = None
        with ExitStack() as stack:
            archive = None if self.root.is_dir() else stack.enter_context(_open_zip(self.root))
            for batch in batches:
                images: list[Tensor] = []
                for index in batch.tolist():
                    name = self.names[index]
                    image = self._decode(archive, name)
                    if not images:
                        self._check_memory(image, len(batch))
                    first = first or (name, image.shape)
                    if image.shape != first[1]:
                        raise InputError(
                            f"{self.root}: images differ in size: {name} has "
                            f"{_pixels(image.shape)} pixels, {first[0]} has {_pixels(first[1])}; "
                            f"resize and crop them, {_TO_ONE_SIZE}"
                        )
                    images.append(image)
                yield (self.preprocess.normalize(torch.stack(images)),)

    def _decode(self, archive: zipfile.ZipFile | None, name: str) -> Tensor:
        """Return an image as uint8 of shape (C, H, W)."""
        from torchvision.transforms.v2 import functional as F

        mode = "RGB" if len(self.preprocess.mean) == 3 else "L"
        try:
            with self._open(archive, name) as file, _open_image(file) as image:
                # Converting these would clip all above 255.
                if image.mode.startswith(("I", "F")):
                    raise InputError(
                        f"The pixels are not 8-bit (Pillow calls them {image.mode}); convert the "
                        "image, or save the data as float32 tensors"
                    )
                return cast(Tensor, F.pil_to_tensor(self.preprocess.fit(image.convert(mode))))
        except InputError as exc:
            raise InputError(f"{self.root}, image {printable(name)}: {exc}") from exc
        except UnidentifiedImageError as exc:
            raise InputError(
                f"{self.root}, image {printable(name)}: it cannot be decoded: no image "
                f"of a kind that is read ({', '.join(_IMAGE_FORMATS)}); repair or remove it"
            ) from exc
        except Exception as exc:  # Pillow and zipfile raise a dozen kinds for a damaged file.
            raise InputError(
                f"{self.root}, image {printable(name)}: it cannot be decoded ({described(exc)}); "
                "repair or remove it"
            ) from exc

    def _open(self, archive: zipfile.ZipFile | None, name: str) -> IO[bytes]:
        if archive is None:
            return open_regular(self.root / name, _MOST_IMAGE_BYTES)
        size = archive.getinfo(name).file_size
        if size > _MOST_IMAGE_BYTES:
            raise InputError(
                f"It has {size:,} bytes unpacked, and at most {_MOST_IMAGE_BYTES:,} are read; "
                "make it smaller, or remove it"
            )
        return archive.open(name)

    def _check_memory(self, image: Tensor, count: int) -> None:
        """Refuse a batch that would not fit: 8-bit pixels, and two times float32."""
        needed, limit = count * image.numel() * 9, memory_limit()
        if needed > limit:
            raise InputError(
                f"{self.root}: a batch of {count} images of {_pixels(image.shape)} pixels takes "
                f"{needed:,} bytes, more than half of the memory ({limit:,}); resize and crop "
                f"them, {_TO_ONE_SIZE}, or use smaller batches"
            )


@contextmanager
def _open_image(file: IO[bytes]) -> Iterator[Image.Image]:
    """An image whose size is bounded before its pixels are decoded.

    Pillow itself only warns of up to twice as many pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        opened = Image.open(file, formats=_IMAGE_FORMATS)
    with opened as image:
        most = Image.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            raise InputError(
                f"It has {image.height:,}x{image.width:,} pixels, and at most {most:,} are read; "
                "make it smaller, or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
            )
        yield image


def _image_source(
    path: Path,
    preprocess: Preprocess,
    batch_size: int,
    split: str | None,
    asked: Sequence[str] | None,
) -> DataSource:
    if len(preprocess.mean) not in (1, 3):
        raise InputError(
            f"mean has {len(preprocess.mean)} values, but image files are read with 1 or 3 channels"
        )
    if path.is_dir():
        # In the order of the names: the order of the file system is no order at all.
        names = sorted(
            Path(folder, file).relative_to(path).as_posix()
            for folder, _, files in os.walk(path, onerror=_refuse_folder, followlinks=True)
            for file in files
        )
    else:
        with _open_zip(path) as archive:
            # Not is_dir(), which fails for a name without a character.
            names = sorted(name for name in archive.namelist() if not name.endswith("/"))
    prefix = f"{split.strip('/')}/" if split else ""
    images = tuple(name for name in names if name.startswith(prefix) and _is_image(name))
    if not images:
        folders = sorted({name.split("/")[0] for name in names if "/" in name})
        where = f"{path}, folder {split}" if split else str(path)
        hint = f"; folders there: {some(folders)}" if folders else ""
        raise InputError(
            f"There are no images in {where}{hint}; files count that end in "
            f"{', '.join(sorted(_IMAGE_SUFFIXES))}"
        )
    classes, labels = _classes([name.split("/")[:-1] for name in images], path)
    if asked is not None:
        classes, labels = _as_asked(tuple(asked), classes, labels, path)
    reader = _ImageReader(path, images, preprocess)
    order = torch.arange(len(images))
    return DataSource(str(path), batch_size, classes, labels, order, reader)


def _refuse_folder(exc: OSError) -> None:
    raise InputError(f"Cannot list the folder {exc.filename}: {exc.strerror}") from exc


def _is_image(name: str) -> bool:
    parts = name.split("/")
    # macOS puts "._photo.jpg" and "__MACOSX/" beside the photos; neither holds an image.
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES


def _classes(folders: list[list[str]], path: Path) -> tuple[tuple[str, ...], Tensor | None]:
    """Read the classes off the folders that each image is in.

    Returns:
        The sorted class names and an int64 label for each image; or ``()`` and None.
    """
    while all(folders) and len({folder[0] for folder in folders}) == 1:
        folders = [folder[1:] for folder in folders]
    if not any(folders):
        return (), None
    if not all(folders):
        raise InputError(
            f"{path} has images beside folders of images; put each image into the folder of its "
            "class, or all side by side"
        )
    names = sorted({folder[0] for folder in folders})
    if _SPLITS.issuperset(name.lower() for name in names):
        raise InputError(
            f"{path} holds several data sets, not classes: {some(names)}; choose one with "
            f"split, as in split={names[0]!r}"
        )
    indices = {name: index for index, name in enumerate(names)}
    return tuple(names), torch.tensor([indices[folder[0]] for folder in folders])


def _as_asked(
    asked: tuple[str, ...], folders: tuple[str, ...], labels: Tensor | None, path: Path
) -> tuple[tuple[str, ...], Tensor]:
    """Classes in the order of the model, and the label of each image among them."""
    if labels is None:
        raise InputError(f"{path} has no folder per class, so classes= means nothing for it")
    twice = sorted({name for name in asked if asked.count(name) > 1})
    if twice:
        raise InputError(f"classes holds {some(twice)} twice; each class has one number")
    unknown = [name for name in folders if name not in set(asked)]
    if unknown:
        raise InputError(
            f"{path}: {some(unknown)} is none of the {len(asked)} classes; add it to them, or take "
            "the folder away"
        )
    numbers = torch.tensor([asked.index(name) for name in folders])
    return asked, numbers[labels]


def _open_zip(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise InputError(f"No file {path}")
    check_regular(path, _MOST_ARCHIVE_BYTES)
    try:
        return zipfile.ZipFile(path)
    # Besides BadZipFile: NotImplementedError, struct.error, UnicodeDecodeError, ValueError.
    except Exception as exc:
        raise InputError(f"{path} cannot be read as a .zip archive: {exc}") from exc


def _pixels(shape: torch.Size) -> str:
    return f"{shape[-2]}x{shape[-1]}"


# --- data: tensors --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _TensorReader:
    """Tensors in memory; uint8 ones are images, normalized when their batch is asked for."""

    tensors: tuple[Tensor, ...]
    preprocess: Preprocess

    @property
    def treatment(self) -> str:
        return "; ".join(dict.fromkeys(map(self._treatment, self.tensors)))

    def _treatment(self, tensor: Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype == torch.uint8:
            return f"{dtype} images, {self.preprocess}"
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"{dtype} values, converted to float32, not scaled"
        return f"{dtype} values, taken as they are"

    def read(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        for batch in batches:
            yield tuple(self._convert(tensor.index_select(0, batch)) for tensor in self.tensors)

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            return self.preprocess.normalize(cast(Tensor, self.preprocess.fit(tensor)))
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def _checked_input(tensor: Tensor, where: str, preprocess: Preprocess) -> Tensor:
    tensor = tensor.detach()
    kind = f"{where} is {str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
    if tensor.dim() == 0 or tensor.layout != torch.strided:
        raise InputError(f"{kind} ({tensor.layout}): it must be dense, with the examples first")
    if tensor.dtype == torch.uint8:
        channels = len(preprocess.mean)
        if tensor.dim() != 4 or tensor.shape[1] != channels:
            raise InputError(
                f"{kind}: uint8 means images of shape [N, {channels}, H, W] ({channels} channels, "
                "as mean has values); transpose them, or pass float32"
            )
        return tensor
    if tensor.is_floating_point():
        _refuse_nan(tensor, where)
        return tensor
    if tensor.dtype in (torch.int32, torch.int64, torch.bool) and tensor.dim() < 4:
        return tensor
    raise InputError(
        f"{kind}: no rule says how to scale that; pass images as uint8 (scaled to [0, 1] and "
        "normalized here) or as float32 (used as it is)"
    )


def _refuse_nan(tensor: Tensor, where: str) -> None:
    # Infinities pass: masks are made of them.
    for first in range(0, len(tensor), 1024):  # bounds the memory that is needed for it
        part = tensor[first : first + 1024]
        bad = part.isnan().reshape(len(part), -1)
        if bool(bad.any()):
            example = first + int(bad.any(1).nonzero()[0])
            raise InputError(
                f"{where} has NaN in example {example}; mend or remove what is no number"
            )


def _checked_labels(labels: Tensor, where: str) -> Tensor:
    dtype = labels.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or labels.dim() != 1:
        raise InputError(
            f"{where}: labels are {str(dtype).removeprefix('torch.')} of shape "
            f"{list(labels.shape)}; they must be integer class indices of shape [N]"
        )
    return labels.detach().to(torch.int64)


def _named_tensors(
    content: object, path: Path
) -> tuple[Tensor | tuple[Tensor, ...] | dict[str, Tensor], Tensor | None]:
    """Find inputs and labels in what a file holds."""
    if isinstance(content, Tensor):
        return content, None
    if isinstance(content, (list, tuple)):
        tensors = _tensors(content, path)
        if len(tensors) == 2 and tensors[1].dim() == 1 and not tensors[1].is_floating_point():
            raise InputError(
                f"{path}: is the second of the two tensors an input or the labels? Save "
                "{'inputs': ..., 'labels': ...}"
            )
        return tensors, None
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}, not tensors")
    named = {str(key): value for key, value in content.items()}
    # Beside labels of another name, y is an input, as in forward(x, y).
    label_key = _one_of(LABEL_KEYS[:-1], named, path) or _one_of(LABEL_KEYS[-1:], named, path)
    labels = None if label_key is None else _tensors([named.pop(label_key)], path)[0]
    if labels is not None and label_key == "y" and labels.is_floating_point() and labels.dim() > 1:
        raise InputError(
            f"{path}: y means labels, one integer for each sample, and is no integers of shape "
            f"{list(labels.shape)}; name the inputs of a model with several inputs.0, inputs.1, ..."
        )
    input_key = _one_of(_INPUT_KEYS, named, path)
    if input_key is None and len(named) == 1 and labels is None:
        input_key = next(iter(named))
    if input_key is not None and len(named) == 1:
        value = named[input_key]
        return _tensors(value if isinstance(value, (list, tuple)) else [value], path), labels
    for pattern in ("inputs.{}", "arr_{}"):
        numbered = [pattern.format(index) for index in range(len(named))]
        if named and set(numbered) == set(named):
            return _tensors([named[key] for key in numbered], path), labels
    if not named:
        raise InputError(
            f"{path} holds {label_key or 'nothing'} and no inputs; name them as the arguments of "
            f"the model, {', '.join(_INPUT_KEYS)} or inputs.0, inputs.1, ..., and the labels "
            f"{', '.join(LABEL_KEYS)}"
        )
    return dict(zip(named, _tensors(list(named.values()), path), strict=True)), labels


def _one_of(keys: Sequence[str], named: Mapping[str, object], path: Path) -> str | None:
    found = [key for key in keys if key in named]
    if len(found) > 1:
        raise InputError(f"{path} has {' and '.join(found)}, which mean the same; keep one")
    return found[0] if found else None


def _tensors(values: Sequence[object], path: Path) -> tuple[Tensor, ...]:
    for value in values:
        if not isinstance(value, Tensor):
            raise InputError(f"{path} holds {type(value).__name__} where a tensor should be")
    return tuple(cast("Sequence[Tensor]", values))
