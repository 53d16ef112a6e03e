"""The commands of `nox -s paper`, on tiny data sets in their true on-disk formats."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("torchvision")

from paper.__main__ import app
from paper.experiments import feature_shapes, reversed_channels
from paper.plots import half_width, mosaic
from paper.records import read_compact
from paper.repairs import STRATEGIES
from torchvision import datasets

from frfx import networks
from tests.test_data import (
    CIFAR10_NAMES,
    accept_checksums,
    random_bytes,
    write_cifar10,
    write_idx,
    write_image,
)


def mnist(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random_bytes(count, 28, 28, seed=count)
        write_idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte", labels)


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    write_cifar10(root)
    folder = root / "cifar-10-batches-py"
    assert set(CIFAR10_NAMES) <= {path.name for path in folder.iterdir()}
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    accept_checksums(monkeypatch, datasets.CIFAR10, root)


def cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, count in (("train", 40), ("test", 10)):
        rows = {"data": random_bytes(count, 3072, seed=count), "fine_labels": list(range(count))}
        (folder / name).write_bytes(pickle.dumps(rows))
    meta = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(meta))
    accept_checksums(monkeypatch, datasets.CIFAR100, root)


def tiny_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "tiny-imagenet-200"
    ids = [f"n{i:08}" for i in range(200)]
    for i, name in enumerate(ids):
        write_image(folder / "train" / name / "images" / f"{name}_0.JPEG", 64, 64, seed=i)
    lines = []
    for i in range(5):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", 64, 64, seed=i)
        lines.append(f"val_{i}.JPEG\t{ids[i]}\t0\t0\t62\t57\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(ids))
    (folder / "words.txt").write_text("".join(f"{name}\tword {name}\n" for name in ids))


def sorted_into_folders(folder: Path, ids: list[str]) -> None:
    for i, name in enumerate(ids):
        write_image(folder / "train" / name / f"{name}_0.JPEG", 120, 100, seed=i)
        if i < 2:
            write_image(folder / "train" / name / f"{name}_1.JPEG", 100, 120, seed=50 + i)
        write_image(folder / "val" / name / f"{name}_2.JPEG", 90, 90, seed=100 + i)


def imagenette(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_into_folders(root / "imagenette2-160", list(datasets.Imagenette._WNID_TO_CLASS))


def imagewoof(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_into_folders(root / "imagewoof2-160", [f"n{i:08}" for i in range(10)])


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("write", "pairs"),
    [
        (mnist, "0,2 2,3"),
        (cifar10, "1,4"),
        (cifar100, "3,5"),
        (tiny_imagenet, "4,6"),
        (imagenette, "6,7"),
        (imagewoof, "5,6"),
    ],
)
def test_a_table_of_every_format(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, pytest.MonkeyPatch], None],
    pairs: str,
) -> None:
    name = write.__name__.replace("_", "-")
    write(tmp_path / "data", monkeypatch)
    options = ["--runs", "2", "--epochs", "1", "--baseline-epochs", "1", "--no-costs"]
    options += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    arguments = ["table", name, *options, "--pairs", pairs, "--methods", "bp,fr,hold"]
    output = call(*arguments)
    folder = tmp_path / "out" / name
    records = read_compact(folder / "records.json")
    assert len(records) == 2 * 3 * len(pairs.split())
    assert {record.cell.method for record in records} == {"bp", "fr", "hold"}
    assert all(0 <= record.accuracies[1] <= 100 for record in records)
    assert f"FR({pairs.split()[-1]})" in (folder / "table.md").read_text()
    assert "Table" in output
    baseline = (folder / "baseline.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    call(*arguments)
    assert (folder / "baseline.safetensors").read_bytes() == baseline
    after = {path: path.stat().st_mtime_ns for path in (folder / "records").iterdir()}
    assert after == before  # nothing is run again
    call(*arguments, "--runs", "3", "--no-run")
    assert read_compact(folder / "records.json") == records


def test_a_baseline_that_is_not_as_good_is_trained_on_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mnist(tmp_path / "data", monkeypatch)
    options = ["--runs", "1", "--epochs", "1", "--no-costs", "--pairs", "2,3", "--methods", "bp"]
    options += ["--data", str(tmp_path / "data"), "--output", str(tmp_path)]
    facts = tmp_path / "mnist/baseline.json"
    for epochs, trained in (("1", 1), ("2", 2), ("1", 2)):
        call("table", "mnist", *options, "--baseline-epochs", epochs)
        assert json.loads(facts.read_text())["epochs"] == trained
    (record,) = read_compact(tmp_path / "mnist/records.json")
    assert record.settings["baseline"] == json.loads(facts.read_text())["sha256"]


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist(tmp_path / "data", monkeypatch)
    options = ["--of", "mnist", "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    options += ["--runs", "2", "--epochs", "2", "--baseline-epochs", "1"]
    call("figure", "4", *options, "--samples", "2")
    call("figure", "5", *options)
    call("figure", "6", *options, "--stages", "2", "--every", "2", "--pairs", "1,2")
    call("figure", "7", *options, "--pairs", "0,2")
    folder = tmp_path / "out" / "mnist"
    for number in (4, 5, 6, 7):
        assert (folder / f"figure-{number}.png").read_bytes().startswith(b"\x89PNG")
    embedded = read_compact(folder / "figure-5.json")
    assert {record.cell.method for record in embedded} == {"bp", "one-hot", "ma", "ne"}
    assert {record.cell.pair for record in embedded} == {(2, 3)}
    staged = read_compact(folder / "figure-6.json")
    assert len({record.settings["baseline"] for record in staged}) == 2
    assert len(staged) == 2 * 2 * 3
    known = json.loads((folder / "figure-6/stages.json").read_text())
    assert {known[epoch]["sha256"] for epoch in ("2", "4")} == {
        record.settings["baseline"] for record in staged
    }
    assert len(read_compact(folder / "figure-7.json")) == 2 * 2 * 2


def test_weights_of_the_loss_and_mending(tmp_path: Path) -> None:
    options = ["--output", str(tmp_path), "--baseline-epochs", "2"]
    methods = "bp,hold@0.9,fr-joint+relative@0.9,fr-joint+fresh@1"
    training = ["--runs", "2", "--epochs", "2", "--no-costs", "--pairs", "1,2"]
    call("table", "digits", *options, *training, "--methods", methods)
    records = read_compact(tmp_path / "digits/records.json")
    assert sorted(r.settings["alpha"] for r in records) == [0, 0, 0.9, 0.9, 0.9, 0.9, 1, 1]
    page = (tmp_path / "digits/table.md").read_text()
    assert "FR, joint, relative, alpha 0.9 − hold, alpha 0.9" in page
    mending = ["--pairs", "2,3", "--handful", "3", "--repeats", "2", "--steps", "20"]
    output = call("repair", "digits", *options, *mending)
    outcomes = json.loads((tmp_path / "digits/repair.json").read_text())
    assert len(outcomes) == 2 * len(STRATEGIES)
    assert "joint, others held" in output


def test_wrong_arguments_are_told(tmp_path: Path) -> None:
    for arguments, told in (
        (["table", "mnits"], "no data set 'mnits'"),
        (["table", "digits", "--pairs", "2,1"], "no pair 2,1"),
        (["table", "digits", "--pairs", "2"], "no pair l_S,l_R"),
        (["table", "digits", "--methods", "bp,rf"], "no method 'rf'"),
        (["table", "digits", "--methods", "fr@2"], "no method 'fr@2'"),
        (["figure", "3"], "no figure 3"),
    ):
        done = CliRunner().invoke(
            app, [*arguments, "--output", str(tmp_path), "--baseline-epochs", "1"]
        )
        assert done.exit_code == 2
        assert told in " ".join(done.output.replace("│", " ").split())


def test_shapes_of_features() -> None:
    for name in ("digits", "mnist", "cifar10", "tiny-imagenet"):
        spec = networks.NETWORKS[name]
        model, x = networks.build(name), torch.zeros(1, *spec.input_shape)
        seen, expected = x, []
        for module in model:  # a layer's feature is what the next parametric op reads
            if list(module.parameters()) and module is not model[0]:
                expected.append(seen.numel())
            seen = module(seen)
        expected.append(seen.numel())
        shapes = feature_shapes(spec)
        assert [int(np.prod(shape)) for shape in shapes] == expected


def test_channels_the_other_way_round() -> None:
    spec = reversed_channels(networks.NETWORKS["cifar10"])
    assert [out for out, _, _ in spec.convolutions] == [15, 10, 5]
    assert spec.convolutions[0] == (15, 5, True)
    assert networks.build(spec)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_mosaic_holds_every_channel_once() -> None:
    feature = torch.arange(1.0, 61).view(5, 3, 4)
    drawn = mosaic(feature.flatten(), (5, 3, 4))
    assert drawn.shape == (2 * 4 - 1, 3 * 5 - 1)
    assert sorted(drawn[~drawn.isnan()].tolist()) == list(range(1, 61))
    assert torch.equal(drawn[:3, 5:9], feature[1])
    assert mosaic(torch.ones(10), (10,)).sum() == 10


def test_half_width_of_two_values() -> None:
    assert half_width([1.0]) == 0
    assert half_width([1.0, 2.0]) == pytest.approx(12.7062 * 0.5, rel=1e-4)  # t(0.975, 1)
