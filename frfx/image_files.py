"""Data sets that are published as folders of image files, read by torchvision."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frfx.errors import DataError

Size = tuple[int, int]
Read = tuple[Tensor, Tensor, tuple[str, ...]]
"""Images, uint8 ``(N, 3, H, W)``; labels, int64 ``(N,)``; names of the classes."""


def extra(module: str) -> Any:
    """Import a module of the optional extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"reading this data set needs {module.partition('.')[0]} ({error}): "
            "pip install 'frfx[data]'"
        ) from error


def imagenette(root: Path, split: str, size: Size | None) -> Read:
    sizes = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    there = next((name for name, folder in sizes.items() if (root / folder).is_dir()), None)
    if there is None:
        raise FileNotFoundError(f"none of {', '.join(sizes.values())} is there")
    datasets = extra("torchvision.datasets")
    read = datasets.Imagenette(
        root,
        split="train" if split == "train" else "val",
        size=there,
        download=False,
        loader=_decoder(size or (224, 224)),
    )
    return (*_decode(read), tuple(names[0] for names in read.classes))


def image_folder(root: Path, split: str, size: Size | None) -> Read:
    names = ("train",) if split == "train" else ("test", "val")
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no folder {' or '.join(names)} is there")
    read = extra("torchvision.datasets").ImageFolder(folder, loader=_decoder(size))
    train = root / "train"
    if train.is_dir():
        # Labels are positions in the sorted class names: other names would silently shift them.
        trained = sorted(entry.name for entry in train.iterdir() if entry.is_dir())
        if differing := sorted(set(trained) ^ set(read.classes)):
            raise DataError(
                f"{folder} and {train} have different classes: {', '.join(differing[:8])}"
                f"{', ...' if len(differing) > 8 else ''} in only one of them"
            )
    return (*_decode(read), tuple(read.classes))


def imagewoof(root: Path, split: str, size: Size | None) -> Read:
    """Read ImageWoof, the largest of its published sizes that is there."""
    sizes = ("imagewoof2", "imagewoof2-320", "imagewoof2-160")
    there = next((root / folder for folder in sizes if (root / folder).is_dir()), None)
    if there is None:
        raise FileNotFoundError(f"none of {', '.join(sizes)} is there")
    return image_folder(there, split, size or (224, 224))


def tiny_imagenet(root: Path, split: str, size: Size | None) -> Read:
    """Read Tiny ImageNet as it is published; its validation images are what is tested on.

    The images to train on lie in a folder per class; those to validate on in one folder, with their
    classes in a text file. The published images to test on have no labels.
    """
    folder = root / "tiny-imagenet-200"
    ids = tuple(sorted((folder / "wnids.txt").read_text().split()))
    named = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines())
    if split == "train":
        make_dataset = extra("torchvision.datasets.folder").make_dataset
        index = {name: label for label, name in enumerate(ids)}
        files = make_dataset(str(folder / "train"), index, extensions=(".jpeg",))
    else:
        rows = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        marked = [row.split("\t")[:2] for row in rows]
        if strange := sorted({name for _, name in marked} - set(ids)):
            raise DataError(
                f"{folder / 'val' / 'val_annotations.txt'} names classes that are not in "
                f"wnids.txt: {', '.join(strange[:8])}"
            )
        files = [(str(folder / "val" / "images" / file), ids.index(name)) for file, name in marked]
    if not files:
        raise FileNotFoundError("there are no images")
    load = _decoder(size)
    images, labels = _decode(_Files(files, load))
    return images, labels, tuple(named.get(name, name) for name in ids)


class _Files(Sequence[tuple[tuple[str, Tensor], int]]):
    """Files and labels, decoded when they are asked for, as torchvision's data sets are."""

    def __init__(
        self, files: list[tuple[str, int]], load: Callable[[str], tuple[str, Tensor]]
    ) -> None:
        self._files, self._load = files, load

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: Any) -> Any:
        path, label = self._files[row]
        return self._load(path), label


def _decoder(size: Size | None) -> Callable[[str], tuple[str, Tensor]]:
    """Return a torchvision loader: a file's path to that path and uint8 ``(3, H, W)``."""
    image_class, ops = extra("PIL.Image"), extra("PIL.ImageOps")
    functional = extra("torchvision.transforms.functional")

    def decode(path: str) -> tuple[str, Tensor]:
        try:
            with image_class.open(path) as file:
                mode, image = file.mode, file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
            raise DataError(f"{path} cannot be decoded as an image: {error}") from error
        if mode[0] in "IF":
            raise DataError(
                f"{path} has more than 8 bits a channel (mode {mode}), which would be cut off: "
                "convert it first"
            )
        if size is not None:
            height, width = size
            image = ops.fit(image, (width, height), image_class.Resampling.BILINEAR)
        return path, functional.pil_to_tensor(image)

    return decode


def _decode(read: Sequence[tuple[tuple[str, Tensor], int]]) -> tuple[Tensor, Tensor]:
    """Decode a torchvision data set that was made with `_decoder`."""
    (first_path, first), _ = read[0]
    images = torch.empty((len(read), *first.shape), dtype=torch.uint8)
    labels = torch.empty(len(read), dtype=torch.int64)

    def fill(row: int) -> None:
        (path, image), labels[row] = read[row]
        if image.shape != first.shape:
            raise DataError(
                f"images differ in size: {first_path} is {first.shape[1]}x{first.shape[2]}, "
                f"{path} is {image.shape[1]}x{image.shape[2]} (height x width); "
                "give size= to resize them all"
            )
        images[row] = image

    def fill_some(start: int) -> None:
        for row in range(start, min(start + 64, len(read))):
            fill(row)

    # Pillow decodes without the GIL, but a small file costs more Python than decoding, and there
    # threads only contend (two cores: 10,000 32x32 files 1.6 s on one thread, 2.3 s on two; 400
    # files of 500x375 0.6 s and 0.24 s).
    small = os.path.getsize(first_path) < 8192
    with ThreadPoolExecutor(1 if small else os.cpu_count()) as pool:
        for _ in pool.map(fill_some, range(0, len(read), 64)):
            pass
    return images, labels
