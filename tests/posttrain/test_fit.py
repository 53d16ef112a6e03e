"""The loop: what it changes, what it leaves, how it resumes."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import frfx
from frfx import data, networks


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="train").subset(400, seed=0)


@pytest.fixture(scope="module")
def baseline(digits):
    torch.manual_seed(0)
    model = networks.build("digits")
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = digits.batches(50, shuffle=True, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def model(baseline):
    return copy.deepcopy(baseline)


@pytest.mark.parametrize("targets", ["recompute", "cache"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_only_the_trained_layers_change(model, digits, alpha, targets):
    before = copy.deepcopy(model.state_dict())
    history = frfx.post_train(
        model, digits.batches(100), upto_layer=2, freeze_upto=1, alpha=alpha, epochs=3,
        targets=targets, val_loader=digits.batches(100),
    )  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("conv2"), name
    assert all(p.requires_grad for p in model.parameters())
    assert [record.epoch for record in history] == [1, 2, 3]
    assert history[-1].loss < history[0].loss
    assert (history[0].reconstruction is None) == (alpha == 0)
    assert (history[0].classification is None) == (alpha == 1)
    assert history[-1].val_accuracy == frfx.accuracy(model, digits.batches(100))


def test_first_loss_is_that_of_the_baseline(model, digits):
    (x, y), *_ = digits.batches(400)
    a_star = frfx.invert(model, 1)(x, y)
    rec = torch.nn.functional.mse_loss(model[:3](x), a_star)
    cls = torch.nn.functional.cross_entropy(model(x), y)
    for targets in ("recompute", "cache"):
        (record,) = frfx.post_train(
            copy.deepcopy(model), digits.batches(400), upto_layer=1, alpha=0.25, epochs=1,
            targets=targets,
        )  # fmt: skip
        assert record.reconstruction == pytest.approx(rec.item(), rel=1e-4)
        assert record.classification == pytest.approx(cls.item(), rel=1e-4)
        assert record.loss == pytest.approx((0.75 * cls + 0.25 * rec).item(), rel=1e-4)


def test_an_exception_in_the_loader_leaves_the_flags(model):
    def loader():
        yield torch.randn(4, 1, 8, 8), torch.arange(4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        frfx.post_train(model, loader(), upto_layer=1, epochs=1)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_resuming_gives_what_an_uninterrupted_run_gives(model, digits, tmp_path, alpha):
    def train(model, epochs, checkpoint=None):
        return frfx.post_train(
            model, digits.batches(100), upto_layer=2, alpha=alpha, epochs=epochs,
            checkpoint=checkpoint,
        )  # fmt: skip

    whole, first, second = (copy.deepcopy(model) for _ in range(3))
    expected = train(whole, 4)
    path = tmp_path / "post.ckpt"
    train(first, 2, path)
    history = train(second, 4, path)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, msg=name)
    assert [record.loss for record in history] == pytest.approx([r.loss for r in expected])
    assert train(copy.deepcopy(model), 4, path) == history  # nothing left to do


def test_a_checkpoint_of_other_layers_changes_nothing(model, digits, tmp_path):
    path = tmp_path / "new" / "post.ckpt"
    frfx.post_train(
        copy.deepcopy(model), digits.batches(100), upto_layer=2, epochs=1, checkpoint=path
    )
    weights = tmp_path / "weights.pt"
    torch.save(model.state_dict(), weights)
    before = copy.deepcopy(model.state_dict())
    for file, text in ((path, "other layers"), (weights, "no checkpoint")):
        with pytest.raises(frfx.FrfxError, match=text):
            frfx.post_train(model, digits.batches(100), upto_layer=1, epochs=2, checkpoint=file)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_checkpoint_of_other_layers_of_the_same_shapes(tmp_path):
    torch.manual_seed(0)
    layers = (layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()))
    model, path = nn.Sequential(*layers, nn.Linear(6, 3)).eval(), tmp_path / "post.ckpt"
    batches = [(torch.randn(8, 6), torch.arange(8) % 3)]
    twin = copy.deepcopy(model)
    frfx.post_train(twin, batches, upto_layer=1, epochs=1, checkpoint=path)
    before = copy.deepcopy(model.state_dict())
    text = r"is of other layers: it holds '0\.weight' and 6 more, and what is trained here is '3\.w"
    with pytest.raises(frfx.FrfxError, match=text):
        frfx.post_train(model, batches, freeze_upto=1, upto_layer=2, epochs=2, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_of_another_optimizer_changes_nothing(model, digits, tmp_path):
    path, batches = tmp_path / "post.ckpt", digits.batches(100)
    frfx.post_train(copy.deepcopy(model), batches, upto_layer=1, epochs=1, checkpoint=path)
    before = copy.deepcopy(model.state_dict())
    for optimizer in (
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.AdamW(parameters),  # an Adam of the same options
        lambda parameters: torch.optim.Adam(parameters[:1]),
    ):
        with pytest.raises(frfx.FrfxError, match="is of another optimizer"):
            frfx.post_train(
                model, batches, upto_layer=1, epochs=2, checkpoint=path, optimizer=optimizer
            )
    saved = torch.load(path)
    saved["reference"].pop()
    torch.save(saved, path)
    with pytest.raises(frfx.FrfxError, match="targets of another network"):
        frfx.post_train(model, batches, upto_layer=1, epochs=2, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_written_is_told_before_anything_is_trained(model, digits, tmp_path):
    (tmp_path / "file").touch()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="file"):
        frfx.post_train(
            model, digits.batches(100), upto_layer=1, checkpoint=tmp_path / "file" / "post.ckpt"
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


X, Y = torch.zeros(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": X, "label": Y}, "not a dict of 'image', 'label': give one that makes pairs"),
        ((X, Y, Y), "not a tuple of Tensor, Tensor, Tensor"),
        ((X.numpy(), Y), "not a tuple of ndarray, Tensor"),
        (X, "not a Tensor"),
    ],
)
def test_what_is_no_pair(model, batch, text):
    for loader, val_loader in (([batch], None), ([(X, Y)], [batch])):
        with pytest.raises(frfx.TargetError, match=text):
            frfx.post_train(model, loader, upto_layer=1, epochs=1, val_loader=val_loader)


def test_batches_of_other_types_are_cast(model, digits):
    x, y = next(iter(digits.batches(50)))
    losses = [
        frfx.post_train(copy.deepcopy(model), [batch], upto_layer=1, epochs=1)[0].loss
        for batch in ((x, y), (x.double(), y.int()), [x, y.to(torch.uint8)])
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2)


def test_an_optimizer_that_needs_a_closure(model, digits):
    with pytest.raises(frfx.FrfxError, match="LBFGS evaluates the loss more than once a step"):
        frfx.post_train(
            model, digits.batches(50), upto_layer=1, optimizer=lambda p: torch.optim.LBFGS(p)
        )


def test_losses_of_a_half_model_are_summed_in_single(model):
    model.bfloat16()
    batches = [(torch.randn(32, 1, 8, 8).bfloat16(), torch.arange(32) % 10) for _ in range(60)]
    (record,) = frfx.post_train(
        model, batches, upto_layer=1, alpha=0, epochs=1,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    losses = [torch.nn.functional.cross_entropy(model(x).float(), y) for x, y in batches]
    assert record.loss == pytest.approx(torch.stack(losses).mean().item(), rel=5e-3)


def test_fabric_trains_as_plain_torch_does(model, digits, tmp_path):
    fabric_module = pytest.importorskip("lightning.fabric")
    (x, y), *_ = digits.batches(400)
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    plain, fabricated = copy.deepcopy(model), copy.deepcopy(model)
    expected = frfx.post_train(plain, loader, upto_layer=2, alpha=0.5, epochs=2)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    path = tmp_path / "post.ckpt"
    frfx.post_train(
        copy.deepcopy(model), loader, upto_layer=2, alpha=0.5, epochs=1, fabric=fabric,
        checkpoint=path,
    )  # fmt: skip
    history = frfx.post_train(
        fabricated, loader, upto_layer=2, alpha=0.5, epochs=2, fabric=fabric, checkpoint=path
    )
    assert [record.loss for record in history] == pytest.approx([r.loss for r in expected])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fabricated.state_dict()[name], value, msg=name)


def test_fabric_in_bfloat16_solves_in_single(model, digits):
    fabric_module = pytest.importorskip("lightning.fabric")
    (x, y), *_ = digits.batches(200)
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    (expected,) = frfx.post_train(
        copy.deepcopy(model), loader, upto_layer=2, alpha=1, epochs=1,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    (record,) = frfx.post_train(
        copy.deepcopy(model), loader, upto_layer=2, alpha=1, epochs=1, fabric=fabric,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
    )  # fmt: skip
    assert record.reconstruction == pytest.approx(expected.reconstruction, rel=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("targets", ["recompute", "cache"])
def test_fabric_in_true_bfloat16(model, digits, alpha, targets):
    fabric_module = pytest.importorskip("lightning.fabric")
    (x, y), *_ = digits.batches(200)
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    (record,) = frfx.post_train(
        model, loader, upto_layer=2, alpha=alpha, epochs=1, fabric=fabric, val_loader=loader,
        targets=targets,
    )  # fmt: skip
    assert record.val_accuracy == frfx.accuracy(model, loader)


def _post_train_in_two_processes(fabric, model, x, y, path):
    torch.set_num_threads(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    history = []
    for epochs in (1, 2):  # the second call resumes
        history = frfx.post_train(
            model, loader, upto_layer=2, alpha=0.5, epochs=epochs, fabric=fabric, checkpoint=path
        )
    torch.save([record.loss for record in history], f"{path}.{fabric.global_rank}")


@pytest.mark.skipif(
    os.environ.get("FRFX_HYPOTHESIS_PROFILE") != "thorough",
    reason="forks a process that has run autograd, which may fail: part of nox -s tests_thorough",
)
def test_two_processes_train_as_one_does(model, digits, tmp_path):
    fabric_module = pytest.importorskip("lightning.fabric")
    (x, y), *_ = digits.batches(200)
    path = tmp_path / "post.ckpt"
    # Forked processes start faster, but not where CUDA may be in use already.
    strategy = "ddp_spawn" if torch.cuda.is_available() else "ddp_fork"
    fabric = fabric_module.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch(_post_train_in_two_processes, model, x, y, path)
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    expected = frfx.post_train(copy.deepcopy(model), loader, upto_layer=2, alpha=0.5, epochs=2)
    for rank in range(2):
        losses = torch.load(f"{path}.{rank}")
        assert losses == pytest.approx([record.loss for record in expected], rel=1e-4)


def test_an_exhausted_loader_is_named(model):
    once = iter([(torch.randn(4, 1, 8, 8), torch.arange(4))])
    with pytest.raises(frfx.TargetError, match="anew every epoch"):
        frfx.post_train(model, once, upto_layer=1, epochs=2)


def test_unknown_way_of_making_targets(model):
    with pytest.raises(frfx.TargetError, match="recompute"):
        frfx.post_train(model, [], upto_layer=1, targets="disk")


def test_accuracy_of_a_network_that_returns_labels():
    class Labels(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    model, x = Labels(5, 3), torch.randn(20, 5)
    y = model(x)
    y[:5] = (y[:5] + 1) % 3
    assert frfx.accuracy(model, [(x, y)]) == 0.75


@pytest.mark.parametrize("shape", [(4, 1), (1,), (4, 10)])
def test_accuracy_refuses_labels_of_another_shape(model, shape):
    with pytest.raises(frfx.TargetError, match="do not fit outputs of shape"):
        frfx.accuracy(model, [(torch.randn(4, 1, 8, 8), torch.zeros(shape, dtype=torch.long))])


def test_accuracy_of_images_that_do_not_fit(model):
    text = r"the model cannot take a batch of shape \(4, 3, 8, 8\): RuntimeError: Given groups=1"
    with pytest.raises(frfx.InputError, match=text):
        frfx.accuracy(model, [(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))])


def test_accuracy_counts_in_evaluation_mode():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9))
    x = torch.eye(6).view(6, 1, 2, 3).repeat(3, 1, 1, 1)
    y = torch.arange(6).repeat(3)
    y[0] = 5
    assert frfx.accuracy(model, [(x[:7], y[:7]), (x[7:], y[7:])]) == 17 / 18
    assert model.training


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_a_network_of_images_takes_a_loss_of_its_own(alpha):
    """As probabilities of classes, pixels would be trained on without a complaint."""
    torch.manual_seed(0)
    layers = (
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 3, 3, padding=1),
    )
    model, images = torch.nn.Sequential(*layers).eval(), torch.rand(8, 3, 6, 6)
    options = {"upto_layer": 1, "alpha": alpha, "epochs": 3, "policy": "minimal"}
    with pytest.raises(frfx.TargetError, match="cross_entropy reads float labels"):
        frfx.post_train(model, [(images, images)], **options)
    history = frfx.post_train(
        model, [(images, images)], **options, classification_loss=torch.nn.functional.mse_loss
    )
    assert history[-1].classification < history[0].classification


def test_soft_labels_are_probabilities(model, digits):
    """Smoothed or mixed ones, as they come."""
    (x, y), *_ = digits.batches(50)
    soft = 0.9 * torch.nn.functional.one_hot(y, 10).float() + 0.01
    (record,) = frfx.post_train(model, [(x, soft)], upto_layer=1, alpha=0, epochs=1)
    assert record.classification > 0


def test_parametrized_layers_are_trained():
    """What their weights are computed from is, and nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(8, 3)),
    )  # fmt: skip
    x = torch.randn(60, 6)
    batches = [(x[i : i + 20], x[i : i + 20, :3].argmax(1)) for i in range(0, 60, 20)]
    before = copy.deepcopy(model.state_dict())
    records = frfx.post_train(
        model, batches, upto_layer=2, alpha=0.5, epochs=4, policy="minimal", targets="cache"
    )
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.partition(".")[0] for name in changed} == {"0", "2"}
    assert changed >= {"0.bias", "0.parametrizations.weight.original", "2.bias"}
    assert not any("_u" in name or "_v" in name for name in changed)  # no power iteration
    assert records[-1].loss < records[0].loss


@pytest.mark.parametrize("options", [{"targets": "cache"}, {"weighing": "relative"}], ids=str)
def test_no_default_device_is_read(options):
    """It may be another than the model's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    batches = [(torch.randn(3, 8), torch.tensor([0, 1, 2]))]
    trained = []
    for device in ("cpu", "meta"):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        with torch.device(device):
            frfx.post_train(
                twin, batches, upto_layer="1", epochs=1,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options,
            )  # fmt: skip
        trained.append(twin[1].weight.detach())
    assert torch.equal(*trained)
    assert not torch.equal(trained[0], model[1].weight)
