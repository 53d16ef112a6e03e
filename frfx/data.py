"""Image classification data sets from disk, as one tensor, in instance-normalised batches.

Nothing is ever downloaded. The readers are torchvision's and scikit-learn's (the extra ``data``).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from frfx import image_files
from frfx.errors import DataError, nearest
from frfx.image_files import Size, extra

Split = Literal["train", "test"]
KINDS = (
    "digits, mnist:PATH, cifar10:PATH, cifar100:PATH, tiny-imagenet:PATH, imagenette:PATH, "
    "imagewoof:PATH or imagefolder:PATH"
)
RESIZED = ("imagenette", "imagewoof", "imagefolder")
"""Kinds whose images have many sizes, and take one in `load`."""


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image set, held in memory.

    Attributes:
        images: uint8 tensor ``(N, C, H, W)``.
        labels: int64 tensor ``(N,)``, indices into `classes`.
        classes: The class names.

    Raises:
        DataError: If a tensor has another shape or dtype, or a label names no class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(
                f"images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels must be int64 ({len(images)},), one per image, "
                f"not {labels.dtype} {tuple(labels.shape)}"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, "
                f"but there are {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, n: int, seed: int) -> Images:
        """Return `n` images drawn without replacement, in their present order.

        Args:
            n: How many, from 1 to ``len(self)``.
            seed: The same seed draws the same images.

        Raises:
            DataError: If there are no `n` images.
        """
        if not 1 <= n <= len(self):
            raise DataError(f"cannot draw {n} of {len(self)} images")
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randperm(len(self), generator=generator, device="cpu")[:n]
        kept = drawn.sort().values.to(self.images.device)
        return Images(self.images[kept], self.labels[kept], self.classes)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Batches:
        """Return an iterable over instance-normalised batches; the last one may be smaller.

        Args:
            batch_size: Images per batch.
            shuffle: Whether each pass over the batches draws a new order.
            generator: What the orders are drawn from; torch's global generator by default.
            device: Where the batches go; by default they stay where the images are.

        Raises:
            DataError: If `batch_size` is less than 1.
        """
        return Batches(self, batch_size, shuffle, generator, device)


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches ``(x, y)`` of an image set: float32 ``(B, C, H, W)`` and int64 ``(B,)``.

    Can be iterated over any number of times. Its length is the number of batches. Usually made by
    `Images.batches`, which describes the attributes.
    """

    data: Images
    batch_size: int
    shuffle: bool = False
    generator: torch.Generator | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size must be at least 1, not {self.batch_size}")

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.data.images, self.data.labels
        order = None
        if self.shuffle:
            where = self.generator.device if self.generator is not None else None
            order = torch.randperm(len(images), generator=self.generator, device=where)
            order = order.to(images.device)
        for start in range(0, len(images), self.batch_size):
            rows: slice | Tensor = slice(start, start + self.batch_size)
            if order is not None:
                rows = order[rows]
            # The bytes travel, and are normalised where they arrive: a quarter of the traffic.
            x = instance_normalise(images[rows].to(self.device))
            # A copy, as x is: what callers do to a batch must not reach the data.
            yield x, labels[rows].to(self.device, copy=True)


def instance_normalise(images: Tensor) -> Tensor:
    """Shift and scale each image to zero mean and unit (population) deviation, channels together.

    A constant image becomes zeros.

    Args:
        images: Real tensor ``(..., C, H, W)``.

    Returns:
        float32 tensor of the same shape.

    Source: FR-PT, Section 4 ("Data sets are all instance normalized"). It does not say whether each
    channel is taken alone. Together, the network for CIFAR-10 comes to the accuracy of the paper's
    baseline; alone, which takes the cast of colour away, it ends two points below.
    """
    x = images.float()
    # Differences of bytes are exact in float32, a mean of large bytes is not: taken first, they
    # leave a constant image exactly zero, whatever its size.
    x = x - x[..., :1, :1, :1]
    x = x - x.mean(dim=(-3, -2, -1), keepdim=True)
    deviation = x.square().mean(dim=(-3, -2, -1), keepdim=True).sqrt()
    return x / torch.where(deviation > 0, deviation, 1.0)


def load(spec: str, *, split: Split, size: int | Size | None = None) -> Images:
    """Read one split of a data set from disk.

    Args:
        spec: ``digits`` (inside scikit-learn: 8x8, values 0 to 16, every fifth image of a class is
            for testing), or one of ``mnist:PATH``, ``cifar10:PATH``, ``cifar100:PATH``,
            ``tiny-imagenet:PATH`` (tested on its validation images), ``imagenette:PATH``,
            ``imagewoof:PATH`` (of both the largest published size that is there) and
            ``imagefolder:PATH`` (a folder per class in ``PATH/train``, and in ``PATH/test`` or
            else ``PATH/val``; read as RGB).
        split: ``"train"`` or ``"test"``.
        size: Height and width, or the side of a square, that imagenette, imagewoof and imagefolder
            images are centrally cropped and resized to. By default 224 for the first two, as in the
            paper; images of a folder must then all have the size of the first.

    Raises:
        DataError: If the spec, split or size cannot be used, the data are missing, incomplete or
            damaged, or the extra ``data`` is not installed.
    """
    kind, _, path = spec.partition(":")
    _check(kind, path, split, size)
    if kind == "digits":
        return _digits(split)
    source, root = _SOURCES[kind], Path(path).expanduser()
    try:
        return source.read(root, split, (size, size) if isinstance(size, int) else size)
    except DataError:
        raise
    except _UNREADABLE as error:
        folder = root / source.folder
        # torchvision ends with an offer to download, which is not made here.
        reason = str(error).partition(" You can use download")[0].rstrip(".")
        if not folder.is_dir():
            reason = "there is no such folder"
        raise DataError(
            f"cannot read {kind} from {folder}: {reason or 'the files are damaged'}.\n"
            f"  expected there: {source.layout}\n"
            f"  published by: {source.publisher}"
        ) from error


def _check(kind: str, path: str, split: str, size: int | Size | None) -> None:
    """Raise DataError if `load` cannot make sense of its arguments."""
    if kind != "digits" and kind not in _SOURCES:
        hint = nearest(kind, ["digits", *_SOURCES])
        raise DataError(f"unknown data set {kind!r}.{hint} Give one of {KINDS}.")
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}: give 'train' or 'test'")
    if kind == "digits" and path:
        raise DataError(f"digits lie inside scikit-learn and take no path, got {path!r}")
    if kind != "digits" and not path:
        raise DataError(f"{kind} needs the path of its data: '{kind}:PATH'")
    if size is not None and kind not in RESIZED:
        raise DataError(f"{kind} images have one size; size= is for {', '.join(RESIZED)}")
    if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
        raise DataError(f"size must be positive, not {size}")


def _digits(split: Split) -> Images:
    digits = extra("sklearn.datasets").load_digits()
    labels = torch.from_numpy(digits.target).long()
    # Not scikit-learn's random split, so that it is the same one under every version.
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero().flatten()[::5]] = True
    rows = test if split == "test" else ~test
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return Images(images[rows], labels[rows], _DIGITS)


def _mnist(root: Path, split: Split, _: Size | None) -> Images:
    read = extra("torchvision.datasets").MNIST(root, train=split == "train", download=False)
    return Images(read.data.unsqueeze(1), read.targets, _DIGITS)


def _cifar(reader: str, root: Path, split: Split, _: Size | None) -> Images:
    datasets = extra("torchvision.datasets")
    read = getattr(datasets, reader)(root, train=split == "train", download=False)
    images = torch.from_numpy(read.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(read.targets), tuple(read.classes))


def _folders(
    read: Callable[[Path, str, Size | None], image_files.Read],
) -> Callable[[Path, Split, Size | None], Images]:
    """Return a reader of image files as one of `Images`."""
    return lambda root, split, size: Images(*read(root, split, size))


@dataclass(frozen=True)
class _Source:
    """How to read a kind of data set, and what to tell users who have none."""

    read: Callable[[Path, Split, Size | None], Images]
    folder: str
    layout: str
    publisher: str


_DIGITS = tuple(map(str, range(10)))

_SOURCES = {
    "mnist": _Source(
        _mnist,
        "MNIST/raw",
        "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte, uncompressed",
        "Yann LeCun, 'The MNIST database of handwritten digits'",
    ),
    "cifar10": _Source(
        partial(_cifar, "CIFAR10"),
        "cifar-10-batches-py",
        "data_batch_1 to data_batch_5, test_batch and batches.meta, all unchanged",
        "Alex Krizhevsky, the CIFAR page at the University of Toronto ('python version')",
    ),
    "cifar100": _Source(
        partial(_cifar, "CIFAR100"),
        "cifar-100-python",
        "train, test and meta, all unchanged",
        "Alex Krizhevsky, the CIFAR page at the University of Toronto ('python version')",
    ),
    "imagenette": _Source(
        _folders(image_files.imagenette),
        "",
        "imagenette2, imagenette2-320 or imagenette2-160, "
        "each with train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG",
        "fast.ai, the project fastai/imagenette on GitHub",
    ),
    "imagewoof": _Source(
        _folders(image_files.imagewoof),
        "",
        "imagewoof2, imagewoof2-320 or imagewoof2-160, "
        "each with train/<WordNet id>/*.JPEG and val/<WordNet id>/*.JPEG",
        "fast.ai, the project fastai/imagenette on GitHub",
    ),
    "tiny-imagenet": _Source(
        _folders(image_files.tiny_imagenet),
        "tiny-imagenet-200",
        "wnids.txt, words.txt, train/<WordNet id>/images/*.JPEG, val/images/*.JPEG and "
        "val/val_annotations.txt, all unchanged",
        "Stanford University, the course CS231n ('Tiny ImageNet')",
    ),
    "imagefolder": _Source(
        _folders(image_files.image_folder),
        "",
        "train/<class>/<image file>, and test/<class>/<image file> or val/<class>/<image file>",
        "whoever made it: any images sorted into a folder per class will do",
    ),
}

# What torchvision's readers raise on missing, incomplete or damaged files.
_UNREADABLE = (
    *(AssertionError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    pickle.UnpicklingError,
)
