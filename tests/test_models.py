"""Models by name, and their weights."""

import pytest
import torch

import frfx
from frfx import models, networks


def test_paper_network_with_either_kind_of_weights(tmp_path):
    torch.manual_seed(0)
    model = networks.build("mnist")
    for name in ("weights.safetensors", "folder/weights.pt"):
        models.save_weights(model, tmp_path / name)
        loaded = models.load_model("paper:mnist", tmp_path / name)
        assert not loaded.training
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


def test_torchvision_by_name():
    assert type(models.load_model("torchvision:squeezenet1_1")).__name__ == "SqueezeNet"


def test_factory_in_a_file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("import torch\ndef tiny():\n    return torch.nn.Linear(3, 2)\nnumber = 3\n")
    assert models.load_model(f"{path}:tiny").out_features == 2
    with pytest.raises(frfx.ModelError, match=r"has no function 'tinny'.*'tiny'"):
        models.load_model(f"{path}:tinny")
    path.write_text("def tiny():\n    return 3\n")
    with pytest.raises(frfx.ModelError, match="returned int, not a module"):
        models.load_model(f"{path}:tiny")
    path.write_text("def tiny(width, *, depth, kernel=3):\n    return 3\n")
    with pytest.raises(frfx.ModelError, match="tiny needs width, depth"):
        models.load_model(f"{path}:tiny")


def test_a_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "parts_of_nets.py").write_text("WIDTH = 5\n")
    text = (
        "import torch\nfrom parts_of_nets import WIDTH\ntiny = lambda: torch.nn.Linear(WIDTH, 2)\n"
    )
    (tmp_path / "nets.py").write_text(text)
    assert models.load_model(f"{tmp_path / 'nets.py'}:tiny").in_features == 5


def test_a_file_with_a_dataclass(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
        "@dataclass\nclass Config:\n    width: int = 3\n"
        "def tiny():\n    return torch.nn.Linear(Config().width, 2)\n"
    )
    assert models.load_model(f"{path}:tiny").in_features == 3


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("mnist", "expected paper:NAME"),
        ("paper:mnits", "Did you mean 'mnist'"),
        ("torchvision:resnet19", "Did you mean 'resnet"),
        ("torchvision:fcn_resnet50", "no classifier"),
        ("nowhere.py:factory", "no file 'nowhere.py'"),
    ],
)
def test_names_that_mean_nothing(spec, text):
    with pytest.raises(frfx.ModelError, match=text):
        models.load_model(spec)


def test_weights_that_do_not_fit(tmp_path):
    models.save_weights(networks.build("mnist"), tmp_path / "mnist.pt")
    with pytest.raises(frfx.ModelError, match="do not fit"):
        models.load_model("paper:digits", tmp_path / "mnist.pt")
    with pytest.raises(frfx.ModelError, match="no weights at"):
        models.load_model("paper:digits", tmp_path / "absent.pt")


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"a": networks.build("digits")}, tmp_path / "model.pt")
    with pytest.raises(frfx.ModelError, match=r"[Ww]eights.only.*state dict is expected"):
        models.load_model("paper:digits", tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["page.safetensors", "page.pt"])
def test_files_that_are_no_weights(tmp_path, name):
    (tmp_path / name).write_text("<html>not found</html>")
    with pytest.raises(frfx.ModelError, match=f"{name}' cannot be read as weights"):
        models.load_model("paper:digits", tmp_path / name)


def test_a_tensor_is_no_state_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(frfx.ModelError, match="do not fit"):
        models.load_model("paper:digits", tmp_path / "tensor.pt")


@pytest.mark.parametrize("name", ["tied.safetensors", "tied.pt"])
def test_tied_weights_are_saved(tmp_path, name):
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    models.save_weights(tied, tmp_path / name)
    twin = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    models.load_weights(twin, tmp_path / name)
    assert torch.equal(twin[2].weight, tied[0].weight)
