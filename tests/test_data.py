"""The data readers on tiny files in the true formats, and the batches made of what they read."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from frfx.data import Images, instance_normalise, load
from frfx.errors import DataError

datasets = pytest.importorskip("torchvision.datasets")
pillow = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def some_images(n: int = 10) -> Images:
    """Images whose labels are their row numbers."""
    return Images(
        torch.from_numpy(random_bytes(n, 2, 4, 3)), torch.arange(n), tuple(map(str, range(n)))
    )


# --- files in the published formats -----------------------------------------------------------


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


def write_mnist(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for split, prefix, n in (("train", "train", 5), ("test", "t10k", 3)):
        images, labels = random_bytes(n, 28, 28, seed=n), np.arange(n, dtype=np.uint8)
        write_idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte", labels)
        written[split] = (images, labels)
    return written


def write_cifar(
    folder: Path, names: list[str], label_key: str, meta: dict[str, list[str]], meta_name: str
) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir()
    written = {}
    for seed, name in enumerate(names):
        data, labels = random_bytes(2, 3072, seed=seed), [seed % 3, (seed + 1) % 3]
        (folder / name).write_bytes(pickle.dumps({"data": data, label_key: labels}))
        written[name] = (data, labels)
    (folder / meta_name).write_bytes(pickle.dumps(meta))
    return written


def accept_checksums(monkeypatch: pytest.MonkeyPatch, reader: Any, root: Path) -> None:
    """Make torchvision, which only reads files of known MD5, know those under `root`."""
    folder = root / reader.base_folder

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    for attribute in ("train_list", "test_list"):
        files = [[name, md5(name)] for name, _ in getattr(reader, attribute)]
        monkeypatch.setattr(reader, attribute, files)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": md5(reader.meta["filename"])})


CIFAR10_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar10(root: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    meta = {"label_names": ["cat", "dog", "eel"]}
    return write_cifar(root / "cifar-10-batches-py", CIFAR10_NAMES, "labels", meta, "batches.meta")


def write_image(path: Path, height: int = 4, width: int = 6, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random_bytes(height, width, 3, seed=seed)
    pillow.fromarray(pixels).save(path)
    return pixels


def write_folder(root: Path, test: str = "test") -> list[np.ndarray]:
    """Two classes of two images to train on, one image each to test; return the training images."""
    written = [
        write_image(root / f"train/{name}/{i}.png", seed=seed * 2 + i)
        for seed, name in enumerate(("ant", "bee"))
        for i in range(2)
    ]
    for name in ("ant", "bee"):
        write_image(root / f"{test}/{name}/0.png")
    return written


# --- readers ----------------------------------------------------------------------------------


def test_digits_are_split_by_class_without_loss() -> None:
    train, test = load("digits", split="train"), load("digits", split="test")
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    assert train.classes == test.classes == tuple("0123456789")
    assert len(train) + len(test) == 1797
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert share.min() >= 0.2
    assert share.max() < 0.21
    assert int(train.images.max()) == 16


def test_digits_are_the_same_every_time() -> None:
    first, second = load("digits", split="test"), load("digits", split="test")
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist(tmp_path: Path, split: Any) -> None:
    images, labels = write_mnist(tmp_path)[split]
    read = load(f"mnist:{tmp_path}", split=split)
    assert read.images.shape == (len(images), 1, 28, 28)
    np.testing.assert_array_equal(read.images[:, 0], images)
    np.testing.assert_array_equal(read.labels, labels)
    assert read.classes == tuple("0123456789")


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_cifar10(tmp_path)
    accept_checksums(monkeypatch, datasets.CIFAR10, tmp_path)
    for split, names in (("train", CIFAR10_NAMES[:5]), ("test", CIFAR10_NAMES[5:])):
        read = load(f"cifar10:{tmp_path}", split=split)  # type: ignore[arg-type]
        pixels = np.concatenate([written[name][0] for name in names]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(read.images, pixels)
        assert read.labels.tolist() == [label for name in names for label in written[name][1]]
        assert read.classes == ("cat", "dog", "eel")
        assert read.images.is_contiguous()


def test_cifar100_reads_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"fine_label_names": ["cat", "dog", "eel"]}
    folder = tmp_path / "cifar-100-python"
    written = write_cifar(folder, ["train", "test"], "fine_labels", meta, "meta")
    accept_checksums(monkeypatch, datasets.CIFAR100, tmp_path)
    read = load(f"cifar100:{tmp_path}", split="test")
    np.testing.assert_array_equal(read.images, written["test"][0].reshape(-1, 3, 32, 32))
    assert read.labels.tolist() == written["test"][1]
    assert read.classes == ("cat", "dog", "eel")


def write_imagenette(root: Path, side: int) -> None:
    for part in ("train", "val"):
        for i, wnid in enumerate(("n01440764", "n03888257")):
            write_image(root / part / wnid / f"{wnid}_{i}.JPEG", side, side + 3 * i)


def test_imagenette_takes_the_largest_size_there(tmp_path: Path) -> None:
    write_imagenette(tmp_path / "imagenette2-160", 16)
    read = load(f"imagenette:{tmp_path}", split="test")
    assert read.images.shape == (2, 3, 224, 224)
    assert read.classes == ("tench", "parachute")
    assert read.labels.tolist() == [0, 1]
    write_imagenette(tmp_path / "imagenette2", 32)
    larger = load(f"imagenette:{tmp_path}", split="train", size=32).images
    assert larger.shape == (2, 3, 32, 32)
    (tmp_path / "imagenette2").rename(tmp_path / "elsewhere")
    assert not torch.equal(larger, load(f"imagenette:{tmp_path}", split="train", size=32).images)


TINY_IDS = ["n02124075", "n01443537"]  # not sorted, as they are published


def write_tiny_imagenet(root: Path) -> dict[str, list[np.ndarray]]:
    """Two classes of two images to train on, three to validate on; return the images by split."""
    folder = root / "tiny-imagenet-200"
    written: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for name in TINY_IDS:
        for i in range(2):
            path = folder / "train" / name / "images" / f"{name}_{i}.JPEG"
            written["train"].append(write_image(path, 64, 64, seed=i))
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t9\t9\n")
    lines = []
    for i in range(3):
        path = folder / "val" / "images" / f"val_{i}.JPEG"
        written["val"].append(write_image(path, 64, 64, seed=10 + i))
        lines.append(f"val_{i}.JPEG\t{TINY_IDS[i % 2]}\t0\t0\t62\t57\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("".join(f"{name}\n" for name in TINY_IDS))
    words = {"n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat", "n1": "other"}
    (folder / "words.txt").write_text("".join(f"{k}\t{v}\n" for k, v in words.items()))
    return written


def decoded(path: Path) -> np.ndarray:
    with pillow.open(path) as file:
        return np.asarray(file.convert("RGB"))


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    folder = tmp_path / "tiny-imagenet-200"
    train = load(f"tiny-imagenet:{tmp_path}", split="train")
    assert train.classes == ("goldfish, Carassius auratus", "Egyptian cat")
    assert train.labels.tolist() == [0, 0, 1, 1]
    first = decoded(folder / "train/n01443537/images/n01443537_0.JPEG")
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0), first)
    test = load(f"tiny-imagenet:{tmp_path}", split="test")
    assert test.labels.tolist() == [1, 0, 1]
    for i in range(3):
        image = decoded(folder / f"val/images/val_{i}.JPEG")
        np.testing.assert_array_equal(test.images[i].permute(1, 2, 0), image)


def test_grey_images_of_tiny_imagenet_become_rgb(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    path = tmp_path / "tiny-imagenet-200/val/images/val_0.JPEG"
    pillow.fromarray(random_bytes(64, 64)).save(path)
    image = load(f"tiny-imagenet:{tmp_path}", split="test").images[0]
    assert image.shape == (3, 64, 64)
    assert bool((image == image[:1]).all())


def test_tiny_imagenet_with_an_unknown_class(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    marked = tmp_path / "tiny-imagenet-200/val/val_annotations.txt"
    marked.write_text("val_0.JPEG\tn7\t0\t0\t1\t1\n")
    with pytest.raises(DataError, match=r"not in wnids\.txt: n7"):
        load(f"tiny-imagenet:{tmp_path}", split="test")


@pytest.mark.parametrize("folder", ["imagewoof2", "imagewoof2-320", "imagewoof2-160"])
def test_imagewoof(tmp_path: Path, folder: str) -> None:
    for i, name in enumerate(("n02086240", "n02087394")):
        write_image(tmp_path / folder / "train" / name / f"{name}_1.JPEG", 40, 30, seed=i)
        write_image(tmp_path / folder / "val" / name / f"{name}_2.JPEG", 30, 40, seed=i)
    read = load(f"imagewoof:{tmp_path}", split="train")
    assert read.images.shape == (2, 3, 224, 224)
    assert read.classes == ("n02086240", "n02087394")
    assert load(f"imagewoof:{tmp_path}", split="test", size=20).images.shape == (2, 3, 20, 20)


def test_image_folder(tmp_path: Path) -> None:
    written = write_folder(tmp_path)
    read = load(f"imagefolder:{tmp_path}", split="train")
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1), np.stack(written))
    assert read.labels.tolist() == [0, 0, 1, 1]
    assert read.classes == ("ant", "bee")


def test_image_folder_of_many_large_files_keeps_their_order(tmp_path: Path) -> None:
    # Noise does not compress: files this large are decoded on several threads.
    written = [write_image(tmp_path / f"train/a/{i:03}.png", 64, 64, seed=i) for i in range(150)]
    read = load(f"imagefolder:{tmp_path}", split="train")
    np.testing.assert_array_equal(read.images.permute(0, 2, 3, 1), np.stack(written))


@pytest.mark.parametrize("folder", ["test", "val"])
def test_image_folder_tests_on_test_or_val(tmp_path: Path, folder: str) -> None:
    write_folder(tmp_path, test=folder)
    assert load(f"imagefolder:{tmp_path}", split="test").labels.tolist() == [0, 1]


def test_image_folder_needs_no_training_images_to_test(tmp_path: Path) -> None:
    write_image(tmp_path / "test/ant/0.png")
    assert load(f"imagefolder:{tmp_path}", split="test").classes == ("ant",)


def test_grey_images_of_a_folder_become_rgb(tmp_path: Path) -> None:
    (tmp_path / "train/ant").mkdir(parents=True)
    pixels = random_bytes(4, 6)
    pillow.fromarray(pixels).save(tmp_path / "train/ant/0.png")
    read = load(f"imagefolder:{tmp_path}", split="train")
    np.testing.assert_array_equal(read.images[0], np.stack([pixels] * 3))


@pytest.mark.parametrize(("size", "shape"), [(5, (5, 5)), ((3, 8), (3, 8))])
def test_image_folder_is_resized_to_height_and_width(
    tmp_path: Path, size: int | tuple[int, int], shape: tuple[int, int]
) -> None:
    write_image(tmp_path / "train/ant/0.png", 4, 6)
    write_image(tmp_path / "train/ant/1.png", 9, 7)
    read = load(f"imagefolder:{tmp_path}", split="train", size=size)
    assert read.images.shape == (2, 3, *shape)


def test_resizing_crops_to_the_centre(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "train/ant/0.png", 4, 8)
    read = load(f"imagefolder:{tmp_path}", split="train", size=4)
    np.testing.assert_array_equal(read.images[0].permute(1, 2, 0), pixels[:, 2:6])


def test_a_path_may_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(load("mnist:~/data", split="train")) == 5


# --- what users are told ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("cifar11:p", {}, "unknown data set 'cifar11'. Did you mean 'cifar10'"),
        ("", {}, "Give one of digits, mnist:PATH, cifar10:PATH, cifar100:PATH, tiny-imagenet:PATH"),
        ("digits", {"split": "validation"}, "unknown split 'validation': give 'train' or 'test'"),
        ("digits:p", {}, "take no path, got 'p'"),
        ("mnist", {}, "mnist needs the path of its data: 'mnist:PATH'"),
        ("imagefolder:", {}, "'imagefolder:PATH'"),
        ("mnist:p", {"size": 8}, "size= is for imagenette, imagewoof, imagefolder"),
        ("digits", {"size": 8}, "size= is for imagenette, imagewoof, imagefolder"),
        ("imagefolder:p", {"size": 0}, "size must be positive, not 0"),
        ("imagefolder:p", {"size": (3, -1)}, "size must be positive, not (3, -1)"),
    ],
)
def test_arguments_that_make_no_sense(spec: str, arguments: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load(spec, **{"split": "train", **arguments})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "folder", "layout", "publisher"),
    [
        ("mnist", "MNIST/raw", "-images-idx3-ubyte", "Yann LeCun"),
        ("cifar10", "cifar-10-batches-py", "batches.meta", "University of Toronto"),
        ("cifar100", "cifar-100-python", "train, test and meta", "University of Toronto"),
        ("imagenette", ".", "imagenette2-160", "fast.ai"),
        ("imagewoof", ".", "imagewoof2-160", "fast.ai"),
        ("tiny-imagenet", "tiny-imagenet-200", "val/val_annotations.txt", "Stanford"),
        ("imagefolder", ".", "train/<class>/<image file>", "whoever made it"),
    ],
)
def test_missing_data(tmp_path: Path, kind: str, folder: str, layout: str, publisher: str) -> None:
    root = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        load(f"{kind}:{root}", split="train")
    message = str(caught.value)
    assert message.startswith(f"cannot read {kind} from {root / folder}: there is no such folder.")
    assert layout in message.split("expected there: ")[1]
    assert publisher in message.split("published by: ")[1]
    assert "download" not in message


def missing_labels(root: Path) -> str:
    write_mnist(root)
    (root / "MNIST/raw/train-labels-idx1-ubyte").unlink()
    return "mnist"


def truncated_mnist(root: Path) -> str:
    write_mnist(root)
    path = root / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    return "mnist"


def empty_mnist(root: Path) -> str:
    write_mnist(root)
    (root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"")
    return "mnist"


def mnist_of_no_idx_files(root: Path) -> str:
    write_mnist(root)
    (root / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"no idx file at all")
    return "mnist"


def cifar10_of_other_checksums(root: Path) -> str:
    write_cifar10(root)
    return "cifar10"


def imagenette_without_train(root: Path) -> str:
    (root / "imagenette2").mkdir()
    return "imagenette"


def imagenette_of_unknown_ids(root: Path) -> str:
    write_image(root / "imagenette2/train/n00000000/0.JPEG")
    return "imagenette"


def tiny_imagenet_without_words(root: Path) -> str:
    write_tiny_imagenet(root)
    (root / "tiny-imagenet-200/words.txt").unlink()
    return "tiny-imagenet"


def tiny_imagenet_with_an_empty_class(root: Path) -> str:
    write_tiny_imagenet(root)
    for path in (root / "tiny-imagenet-200/train/n01443537/images").iterdir():
        path.unlink()
    return "tiny-imagenet"


def imagewoof_of_no_size(root: Path) -> str:
    return "imagewoof"


def folder_without_train(root: Path) -> str:
    (root / "test").mkdir()
    return "imagefolder"


def folder_without_classes(root: Path) -> str:
    (root / "train").mkdir()
    return "imagefolder"


def folder_with_an_empty_class(root: Path) -> str:
    write_folder(root)
    (root / "train/cow").mkdir()
    return "imagefolder"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing_labels, "Dataset not found"),
        (truncated_mnist, ""),
        (empty_mnist, ""),
        (mnist_of_no_idx_files, "the files are damaged"),
        (cifar10_of_other_checksums, "Dataset not found or corrupted"),
        (imagenette_without_train, "No such file"),
        (imagenette_of_unknown_ids, "n00000000"),
        (tiny_imagenet_without_words, "No such file"),
        (tiny_imagenet_with_an_empty_class, "no valid file for the classes n01443537"),
        (imagewoof_of_no_size, "none of imagewoof2"),
        (folder_without_train, "no folder train is there"),
        (folder_without_classes, "any class folder"),
        (folder_with_an_empty_class, "no valid file for the classes cow"),
    ],
)
def test_damaged_data(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    kind = damage(tmp_path)
    with pytest.raises(DataError) as caught:
        load(f"{kind}:{tmp_path}", split="train")
    told = str(caught.value)
    assert told.startswith(f"cannot read {kind} from {tmp_path}")
    assert message in told.splitlines()[0]
    assert "expected there: " in told
    assert "download" not in told


def test_image_folder_without_test_images(tmp_path: Path) -> None:
    write_image(tmp_path / "train/ant/0.png")
    with pytest.raises(DataError, match="no folder test or val is there"):
        load(f"imagefolder:{tmp_path}", split="test")


def test_image_folder_of_differing_sizes(tmp_path: Path) -> None:
    write_image(tmp_path / "train/ant/0.png", 4, 6)
    write_image(tmp_path / "train/ant/1.png", 5, 6)
    with pytest.raises(DataError) as caught:
        load(f"imagefolder:{tmp_path}", split="train")
    message = str(caught.value)
    first, second = tmp_path / "train/ant/0.png", tmp_path / "train/ant/1.png"
    assert f"{first} is 4x6, {second} is 5x6 (height x width)" in message
    assert "give size=" in message


def test_image_folder_with_other_test_classes(tmp_path: Path) -> None:
    write_folder(tmp_path)
    write_image(tmp_path / "test/cow/0.png")
    with pytest.raises(DataError, match="different classes: cow in only one of them"):
        load(f"imagefolder:{tmp_path}", split="test")


def test_more_than_eight_bits_are_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "train/ant/0.png"
    path.parent.mkdir(parents=True)
    pillow.fromarray(np.full((8, 8), 1000, dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match=r"^\S*png has more than 8 bits a channel \(mode I"):
        load(f"imagefolder:{tmp_path}", split="train")


@pytest.mark.parametrize("damaged", [b"not an image", None])
def test_undecodable_image(tmp_path: Path, damaged: bytes | None) -> None:
    path = tmp_path / "train/ant/0.png"
    write_image(path, 40, 40)
    path.write_bytes(path.read_bytes()[:2000] if damaged is None else damaged)
    with pytest.raises(DataError) as caught:
        load(f"imagefolder:{tmp_path}", split="train")
    assert str(caught.value).startswith(f"{path} cannot be decoded as an image: ")


@pytest.mark.parametrize(
    ("spec", "module"),
    [
        ("digits", "sklearn.datasets"),
        ("mnist:p", "torchvision.datasets"),
        ("cifar10:p", "torchvision.datasets"),
        ("imagefolder:p", "torchvision.datasets"),
    ],
)
def test_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p/train").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError) as caught:
        load(spec, split="train")
    assert f"needs {module.partition('.')[0]}" in str(caught.value)
    assert "pip install 'frfx[data]'" in str(caught.value)


# --- images and batches -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), "images must be uint8"),
        (torch.zeros(2, 3, 3).byte(), torch.zeros(2).long(), r"not torch.uint8 \(2, 3, 3\)"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2), "labels must be int64"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(3).long(), "one per image"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, 2]), "from 0 to 2, but there are 2"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([-1, 1]), "from -1 to 1"),
    ],
)
def test_images_check_themselves(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Images(images, labels, ("a", "b"))


def test_subset_is_drawn_by_its_seed_in_order() -> None:
    data = some_images(100)
    first, again, other = data.subset(30, 1), data.subset(30, 1), data.subset(30, 2)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    assert bool((first.labels.diff() > 0).all())
    assert torch.equal(first.images, data.images[first.labels])
    assert first.classes == data.classes
    assert torch.equal(data.subset(100, 3).images, data.images)


def test_subset_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    some_images().subset(3, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n", [0, -1, 11])
def test_subset_of_too_few_or_too_many(n: int) -> None:
    with pytest.raises(DataError, match=f"cannot draw {n} of 10 images"):
        some_images().subset(n, 0)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 99])
def test_batches_are_sized_complete_and_repeatable(batch_size: int) -> None:
    data = some_images()
    batches = data.batches(batch_size)
    for _ in range(2):
        seen = list(batches)
        assert len(seen) == len(batches)
        assert all(x.dtype == torch.float32 and len(x) == len(y) <= batch_size for x, y in seen)
        assert torch.equal(torch.cat([y for _, y in seen]), data.labels)
        x = torch.cat([x for x, _ in seen])
        torch.testing.assert_close(x, instance_normalise(data.images))


def test_shuffled_batches_are_a_new_order_of_the_same_pairs() -> None:
    data = some_images(50)
    batches = data.batches(8, shuffle=True, generator=torch.Generator().manual_seed(0))
    epochs = [list(batches) for _ in range(2)]
    orders = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    assert not torch.equal(orders[0], orders[1])
    for epoch, order in zip(epochs, orders, strict=True):
        assert torch.equal(order.sort().values, data.labels)
        x = torch.cat([x for x, _ in epoch])
        torch.testing.assert_close(x, instance_normalise(data.images[order]))


def test_shuffling_is_decided_by_the_generator() -> None:
    def orders(seed: int | None) -> list[int]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        batches = some_images(50).batches(8, shuffle=True, generator=generator)
        return [int(label) for _ in range(2) for _, y in batches for label in y]

    assert orders(0) == orders(0)
    assert orders(0) != orders(1)
    torch.manual_seed(7)
    first = orders(None)
    torch.manual_seed(7)
    assert orders(None) == first


def test_changing_a_batch_leaves_the_data_alone() -> None:
    data = some_images()
    images, labels = data.images.clone(), data.labels.clone()
    for x, y in data.batches(4):
        x.zero_()
        y.zero_()
    assert torch.equal(data.images, images)
    assert torch.equal(data.labels, labels)


def test_batches_go_to_the_device() -> None:
    for x, y in some_images().batches(4, shuffle=True, device="meta"):
        assert x.device.type == y.device.type == "meta"


def test_no_images_make_no_batches() -> None:
    data = Images(torch.zeros(0, 1, 2, 2).byte(), torch.zeros(0).long(), ())
    assert len(data.batches(4)) == 0
    assert list(data.batches(4)) == []


def test_batches_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="batch_size must be at least 1, not 0"):
        some_images().batches(0)


# --- normalisation ----------------------------------------------------------------------------


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 40, 40))),
    low=st.integers(0, 255),
    high=st.integers(0, 255),
    seed=st.integers(0, 2**16),
)
def test_each_image_has_mean_zero_and_deviation_one_or_is_zero(
    shape: tuple[int, ...], low: int, high: int, seed: int
) -> None:
    low, high = sorted((low, high))
    values = np.random.default_rng(seed).integers(low, high + 1, shape, dtype=np.uint8)
    x = instance_normalise(torch.from_numpy(values))
    assert x.shape == shape
    assert x.dtype == torch.float32
    constant = torch.from_numpy(values.min((1, 2, 3)) == values.max((1, 2, 3)))
    x = x.double()
    means = x.mean((1, 2, 3))
    torch.testing.assert_close(means, torch.zeros(shape[:1]).double(), atol=1e-5, rtol=0)
    deviation = x.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(deviation, (~constant).double(), atol=1e-5, rtol=0)
    assert not x[constant].any()


def test_normalisation_is_the_textbooks() -> None:
    values = torch.from_numpy(random_bytes(4, 3, 9, 7))
    x = values.double()
    deviation, mean = torch.std_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
    expected = ((x - mean) / deviation).float()
    torch.testing.assert_close(instance_normalise(values), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0, 3, 253, 255])
def test_a_large_constant_image_gives_zeros(value: int) -> None:
    # The float32 mean of a million equal bytes need not be that byte.
    assert not instance_normalise(torch.full((1, 1, 1000, 1000), value, dtype=torch.uint8)).any()


def test_one_differing_pixel_is_no_constant_image() -> None:
    values = torch.full((1, 1, 500, 500), 255, dtype=torch.uint8)
    values[0, 0, 3, 4] = 254
    x = instance_normalise(values)
    assert float(x.double().square().mean()) == pytest.approx(1, rel=1e-4)
