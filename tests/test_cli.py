"""The commands, as a user types them."""

import sys

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from typer.testing import CliRunner

import frfx
from frfx import demo, models, networks, plot
from frfx.__main__ import main
from frfx.cli import app

run = CliRunner().invoke


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "digits.safetensors"
    models.save_weights(networks.build("digits"), path)
    return path


def test_layers():
    result = run(app, ["layers", "paper:cifar10"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    rows = [line.split("│") for line in result.output.splitlines() if line.startswith("│")]
    numbered = {row[1].strip(): (row[2].strip(), row[4].strip()) for row in rows if row[1].strip()}
    assert numbered == {
        "0": ("input", ""),
        "1": ("pool1", "380"),
        "2": ("pool2", "460"),
        "3": ("flatten", "1,365"),
        "4": ("tanh4", "30,848"),
        "5": ("fc2", "1,290"),
    }


def test_layers_of_a_branching_network():
    result = run(app, ["layers", "torchvision:resnet18"])
    assert result.exit_code == 0
    assert "branches between its layers" in result.output


UNSUPPORTED = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = x.flatten(1).cumsum(1)
        x = torch.tanh(x + x.sin())
        return self.fc(x).cumprod(1)
"""


@pytest.fixture
def unsupported(tmp_path):
    path = tmp_path / "network.py"
    path.write_text(UNSUPPORTED)
    return f"{path}:Block"


def test_layers_down_to_a_layer(tmp_path):
    arguments = ["layers", "torchvision:resnet18", "--upto", "layer3.1", "--policy", "minimal"]
    result = run(app, arguments, env={"COLUMNS": "40"})
    assert result.exit_code == 0, result.output
    model = models.load_model("torchvision:resnet18", None)
    found = frfx.layers(model, upto_layer="layer3.1", policy="minimal")
    assert result.stdout.rstrip() == str(found)
    assert "RegionRule, a region from 'layer3.1.relu_1'" in result.stdout
    result = run(app, [*arguments, "--branches", "rules"])
    policy = frfx.policy.minimal(branches="rules")
    assert result.stdout.rstrip() == str(frfx.layers(model, upto_layer="layer3.1", policy=policy))
    assert "SumRule" in result.stdout
    result = run(app, ["layers", "paper:digits", "--upto", "1"])
    digits = models.load_model("paper:digits", None)
    assert result.stdout.rstrip() == str(frfx.layers(digits, upto_layer=1))


@pytest.mark.parametrize("branches", ["region", "rules"])
def test_layers_down_to_a_layer_that_cannot_be_reached(unsupported, branches):
    result = run(app, ["layers", unsupported, "--upto", "flatten", "--branches", branches])
    assert result.exit_code == 1
    assert result.stdout.count("not supported") == 2
    assert "2 ops between the layer and the output cannot be inverted" in result.stdout
    for text in (
        'cumsum: "cumsum"',
        "reason: no rule is registered for it",
        "way out: @frfx.reg",
    ):
        assert text in result.stdout
    result = run(app, ["layers", unsupported, "--upto", "fc"])
    assert result.exit_code == 1
    assert "cumprod" in result.stdout
    assert "cumsum" not in result.stdout


def test_invert_says_what_is_not_supported(unsupported):
    result = run(app, ["invert", unsupported, "--upto", "flatten"])
    assert result.exit_code == 1
    assert "UnsupportedOpsError: 2 ops between" in result.stderr
    assert "Traceback" not in result.output


def test_invert_writes_what_the_library_computes(weights, tmp_path):
    output, figure = tmp_path / "out" / "features.safetensors", tmp_path / "maps.png"
    result = run(
        app,
        ["invert", "paper:digits", "--weights", str(weights), "--upto", "1", "--policy", "minimal"]
        + ["--samples", "40", "--code", "--output", str(output), "--figure", str(figure)],
    )
    assert result.exit_code == 0, result.output
    assert "label consistency" in result.output
    assert "conv2_inverse" in result.output
    assert figure.stat().st_size > 1000
    images = frfx.data.load("digits", split="test").subset(40, seed=0)
    ((x, y),) = images.batches(40)
    model = models.load_model("paper:digits", weights)
    saved = load_file(output)
    torch.testing.assert_close(saved["target"], frfx.invert(model, 1, policy="minimal")(x, y))
    torch.testing.assert_close(saved["forward"], model[:3](x))


def test_what_is_printed_is_not_wrapped(weights):
    result = run(
        app,
        ["invert", "paper:digits", "--weights", str(weights), "--upto", "1", "--code"],
        env={"COLUMNS": "40"},
    )
    inverse = frfx.invert(models.load_model("paper:digits", weights), 1)
    assert inverse.code in result.output
    assert "ElementwiseRule(tanh)" in result.output


@pytest.mark.parametrize("samples", [1, 3, 6])
def test_few_images_are_drawn_once_each(tmp_path, monkeypatch, samples):
    drawn = []
    monkeypatch.setattr(plot, "feature_maps", lambda f, *_, **__: drawn.append(f) or Figure())
    images = frfx.data.load("digits", split="test").subset(samples, seed=0)
    demo.draw(frfx.invert(networks.build("digits"), 1), images, tmp_path / "maps.png")
    assert len(drawn[0].unique(dim=0)) == len(drawn[0]) == min(samples, 5)


def test_a_node_that_is_called_like_a_number(tmp_path):
    file = tmp_path / "nets.py"
    file.write_text(
        "from torch import nn\n"
        "chain = lambda: nn.Sequential(nn.Tanh(), nn.Flatten(), nn.Linear(64, 9), nn.Tanh(),"
        " nn.Linear(9, 10))\n"
    )
    found = {}
    for upto in ("1", "node:1"):
        path = tmp_path / f"{upto.removeprefix('node:')}{len(found)}.pt"
        arguments = ["invert", f"{file}:chain", "--upto", upto, "--output", str(path)]
        result = run(app, arguments)
        assert result.exit_code == 0, result.output
        found[upto] = torch.load(path, weights_only=True)["target"].shape[1:]
    assert found == {"1": (9,), "node:1": (64,)}


def test_a_figure_of_no_known_kind_is_refused_at_once(tmp_path):
    path = tmp_path / "figure.xyz"
    result = run(app, ["invert", "paper:nothing", "--upto", "2", "--figure", str(path)])
    assert result.exit_code == 1
    assert "is no figure: its name ends in" in result.stderr.replace("\n", " ")


def test_invert_writes_what_the_name_says(tmp_path):
    path = tmp_path / "features.pt"
    result = run(app, ["invert", "paper:digits", "--upto", "2", "--output", str(path)])
    assert result.exit_code == 0, result.output
    assert set(torch.load(path, weights_only=True)) == {"target", "forward"}


def test_without_weights_a_network_is_said_to_be_untrained(weights, tmp_path):
    arguments = ["post-train", "paper:digits", "--upto", "2", "--epochs", "1", "--output"]
    results = [run(app, [*arguments, str(tmp_path / f"{i}.pt"), "--seed", "3"]) for i in range(2)]
    assert all("paper:digits without --weights is not trained" in r.stderr for r in results)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    result = run(app, ["invert", "paper:digits", "--weights", str(weights), "--upto", "2"])
    assert "not trained" not in result.stderr


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = run(
        app, ["invert", "paper:digits", "--upto", "2", "--output", str(tmp_path / "file" / "a.pt")]
    )
    assert result.exit_code == 1
    assert "file" in result.stderr
    assert "Traceback" not in result.output


def test_without_its_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "frfx.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'frfx\[cli\]'"):
        main()


def test_post_train_changes_the_layers_asked_for(weights, tmp_path):
    output = tmp_path / "trained.pt"
    result = run(
        app,
        ["post-train", "paper:digits", "--weights", str(weights), "--upto", "2"]
        + ["--freeze-upto", "1", "--epochs", "2", "--output", str(output)],
    )
    assert result.exit_code == 0, result.output
    before, after = load_file(weights), torch.load(output, weights_only=True)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"conv2.weight", "conv2.bias"}


def test_demo_runs(tmp_path):
    result = run(app, ["demo", "--output", str(tmp_path), "--runs", "1", "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "features.png").stat().st_size > 1000
    assert (tmp_path / "digits.safetensors").exists()
    for text in ("policy paper", "policy minimal", "(0, 2)", "FR minimal"):
        assert text in result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["layers", "paper:mnits"], "ModelError: there is no network"),
        (["layers", "mnist"], "expected paper:NAME"),
        (["invert", "paper:digits", "--upto", "9"], "LayerError: layer 9"),
        (["invert", "paper:digits", "--upto", "conv9"], "Did you mean 'conv"),
        (["invert", "paper:digits", "--upto", "1", "--policy", "papre"], "Did you mean 'paper'"),
        (["invert", "paper:digits", "--upto", "1", "--data", "mnist:nowhere"], "DataError"),
        (["layers", "paper:digits", "--upto", "conv9"], "Did you mean 'conv"),
        (["layers", "paper:digits", "--upto", "1", "--policy", "papre"], "Did you mean 'paper'"),
        (["layers", "paper:digits", "--upto", "1", "--branches", "rule"], "branches='rule'"),
        (["demo", "--data", "mnist"], "DataError"),
    ],
)
def test_mistakes_are_messages_not_tracebacks(arguments, text):
    result = run(app, arguments, env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert text in result.stderr
    assert "Traceback" not in result.output
