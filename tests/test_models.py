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


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("mnist", "expected paper:NAME"),
        ("paper:mnits", "Did you mean 'mnist'"),
        ("torchvision:resnet19", "Did you mean 'resnet"),
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
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        models.load_model("paper:digits", tmp_path / "model.pt")
