"""The engine of the paper's tables against `frfx.PostTraining`, run by run."""

from __future__ import annotations

import copy

import pytest
import torch
from paper.settings import METHODS, method, order
from paper.stack import Stack
from paper.study import Study
from torch import Tensor, nn
from torch.nn import functional as F

import frfx
from frfx import data, networks

SPEC = networks.NetworkSpec((2, 12, 12), ((3, 3, True), (4, 2, False)), (6, 5), alpha=0.3)
PAIRS = [(s, r) for r in range(1, 5) for s in range(r)]
ALPHA = 0.3
BATCH = 16


def some_images(count: int, seed: int) -> data.Images:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 2, 12, 12), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    return data.Images(images, labels, tuple("abcde"))


@pytest.fixture(scope="module")
def study() -> Study:
    """Four layers of each kind, untrained."""
    torch.manual_seed(0)
    return Study(networks.build(SPEC), some_images(40, 1), some_images(30, 2))


def held(step: frfx.PostTraining, x: Tensor, y: Tensor) -> Tensor:
    """Return the feature as the network before training gives it."""
    assert step.targets is not None
    return [*step.targets.inverse.reconstruct(x, y).values()][-1].forward


def alone(
    study: Study, pair: tuple[int, int], method: str, seed: int, epochs: int
) -> tuple[nn.Module, float]:
    """Post-train one network as a user would; return it and its test accuracy in %."""
    model = copy.deepcopy(study.model).requires_grad_(True)
    kind = METHODS[method].targets
    step = frfx.PostTraining(
        model,
        freeze_upto=pair[0],
        upto_layer=pair[1],
        alpha=0.0 if kind == "none" else ALPHA,
        policy="paper" if kind in ("none", "forward") else kind,
    )
    optimizer = torch.optim.Adam(step.trained_parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    with step:
        for _ in range(epochs):
            for x, y in study.train.batches(BATCH, shuffle=True, generator=generator):
                target = None
                if kind == "forward":
                    assert step.targets is not None
                    target = held(step, x, y)
                optimizer.zero_grad()
                step(x, y, target).total.backward()
                optimizer.step()
    return model, 100 * frfx.accuracy(model, study.test.batches(100))


def weights_of(stack: Stack, seed: int, method: int) -> dict[str, Tensor]:
    return {name: weight[seed, method].detach() for name, weight in stack.weights.items()}


@pytest.mark.parametrize(
    ("seeds", "names"),
    [
        ((5,), ["bp", "fr", "hold", "fr-minimal"]),
        ((5, 3), ["bp", "fr", "hold", "fr-minimal"]),
        ((5, 3), ["fr"]),
        ((5,), ["fr"]),
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_stacked_run_is_a_single_one(
    study: Study, pair: tuple[int, int], seeds: tuple[int, ...], names: list[str]
) -> None:
    stack = Stack(study, pair, [METHODS[name] for name in names], seeds, ALPHA, BATCH)
    for _ in range(2):
        stack.train()
    scores = stack.accuracies()
    for i, seed in enumerate(seeds):
        for j, name in enumerate(names):
            model, accuracy = alone(study, pair, name, seed, 2)
            for key, weight in weights_of(stack, i, j).items():
                moved = (model.get_parameter(key) - study.model.get_parameter(key)).abs().max()
                assert moved > 1e-3  # six steps of Adam
                torch.testing.assert_close(
                    weight, model.get_parameter(key), rtol=0, atol=1e-2 * float(moved.detach())
                )
            assert float(scores[i, j]) == pytest.approx(accuracy, abs=100 / 30 + 1e-6)


@pytest.mark.parametrize("name", ["bp", "fr", "hold", "fr-joint"])
@pytest.mark.parametrize("pair", [(0, 2), (1, 3), (2, 4)])
def test_losses_and_gradients_are_those_of_post_training(
    study: Study, pair: tuple[int, int], name: str
) -> None:
    rows = torch.arange(10)
    stack = Stack(study, pair, [METHODS["bp"], METHODS[name]], [0], ALPHA, BATCH)
    x, y = next(iter(study.train.batches(10)))
    with torch.no_grad():  # away from the baseline, where `hold` is zero
        for weight in stack.weights.values():
            weight.mul_(1.1)
    loss = stack.losses(rows.unsqueeze(0))[0, 1]
    loss.backward()
    model = copy.deepcopy(study.model).requires_grad_(True)
    kind = METHODS[name].targets
    policy = "paper" if kind in ("none", "forward") else kind
    alpha = 0.0 if kind == "none" else ALPHA
    with frfx.PostTraining(
        model, freeze_upto=pair[0], upto_layer=pair[1], alpha=alpha, policy=policy
    ) as step:
        target = None
        if step.targets is not None:
            hold = kind == "forward"
            target = held(step, x, y) if hold else step.targets(x, y)
        with torch.no_grad():
            for parameter in step.trained_parameters():
                parameter.mul_(1.1)
        expected = step(x, y, target).total
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for key, weight in stack.weights.items():
        assert weight.grad is not None
        wanted = model.get_parameter(key).grad
        torch.testing.assert_close(weight.grad[0, 1], wanted, rtol=1e-3, atol=1e-5)


def test_embeddings_are_trained_with_their_own_losses(study: Study) -> None:
    names = ["bp", "one-hot", "ma", "ne", "fr"]
    stack = Stack(study, (3, 4), [METHODS[name] for name in names], [0], ALPHA, BATCH)
    rows = torch.arange(10)
    x, y = next(iter(study.train.batches(10)))
    logits = study.model(x)
    # Written out, entry by entry: a tie of the label with the largest, or with those in its way.
    one_hot, assigned = torch.zeros_like(logits), logits.clone()
    for i, label in enumerate(y.tolist()):
        one_hot[i, label] = 1
        assigned[i, label] = logits[i].max()
    losses = stack.losses(rows.unsqueeze(0))[0].detach()
    entropy = F.cross_entropy(logits, y)

    def mixed(reconstruction: Tensor) -> Tensor:
        return (1 - ALPHA) * entropy + ALPHA * reconstruction

    torch.testing.assert_close(losses[0], entropy)
    torch.testing.assert_close(losses[1], mixed(F.mse_loss(logits, one_hot)))
    torch.testing.assert_close(losses[2], mixed(F.l1_loss(logits, assigned)))
    torch.testing.assert_close(losses[3], losses[4])  # the paper's policy embeds so
    with pytest.raises(frfx.LayerError, match="gives logits"):
        Stack(study, (2, 3), [METHODS["ma"]], [0], ALPHA, BATCH)


def test_methods_have_an_alpha_and_a_weighing_of_their_own(study: Study) -> None:
    names = ["hold", "fr-minimal@0.9", "fr-minimal+relative@0.5", "fr@1"]
    stack = Stack(study, (1, 3), [method(name) for name in names], [0], ALPHA, BATCH)
    with torch.no_grad():
        for weight in stack.weights.values():
            weight.mul_(1.1)
    trained, tail = (copy.deepcopy(part) for part in study.parts(1, 3))
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1.1)
    index = torch.arange(10)
    features = trained(study.inputs(1)[0].values[index])
    entropy = F.cross_entropy(tail(features), study.train.labels[index])
    distances = {
        kind: F.mse_loss(features, study.targets(3, kind)[index])
        for kind in ("forward", "minimal", "paper")
    }
    at_first = F.mse_loss(study.targets(3, "minimal"), study.targets(3, "forward"))
    expected = [
        (1 - ALPHA) * entropy + ALPHA * distances["forward"],
        0.1 * entropy + 0.9 * distances["minimal"],
        0.5 * entropy + 0.5 * distances["minimal"] / at_first,
        distances["paper"],
    ]
    torch.testing.assert_close(stack.losses(index.unsqueeze(0))[0], torch.stack(expected))


def test_fresh_targets_follow_the_weights(study: Study) -> None:
    names = ["fr-minimal@0.5", "fr-minimal+fresh@0.5"]
    stack = Stack(study, (0, 2), [method(name) for name in names], [3, 4], ALPHA, BATCH)
    baseline = study.targets(2, "minimal")
    stack.train()
    for by_seed in stack.targets:
        assert all(target is baseline for target in by_seed)
    models = []
    for seed in range(2):
        model = copy.deepcopy(study.model)
        for name, weight in weights_of(stack, seed, 1).items():
            model.get_parameter(name).copy_(weight)
        models.append(model)
    stack.train()
    assert all(target is baseline for target in stack.targets[0])
    x, y = next(iter(study.train.batches(len(study.train))))
    for target, model in zip(stack.targets[1], models, strict=True):
        torch.testing.assert_close(target, frfx.invert(model, 2, policy="minimal")(x, y))
        assert not torch.allclose(target, baseline)


def test_without_a_loss_of_labels_the_tail_is_not_run(study: Study) -> None:
    stack = Stack(study, (0, 2), [method("fr@1"), method("hold@1")], [0], ALPHA, BATCH)
    stack.tail.register_forward_hook(lambda *_: pytest.fail("the tail was run"))
    assert stack.losses(torch.arange(4).unsqueeze(0))[0, 0] > 0


def test_names_of_methods() -> None:
    found = method("fr-joint+relative+fresh@0.9")
    assert (found.targets, found.alpha, found.relative, found.fresh) == ("joint", 0.9, True, True)
    assert found.label == "FR, joint, relative, fresh, alpha 0.9"
    for wrong in ("rf", "fr@", "fr@2", "fr@x", "bp@0.1", "fr+new", "hold+fresh"):
        with pytest.raises(KeyError):
            method(wrong)
    names = ["fr@0.9", "hold@0.1", "fr@0.1", "bp", "fr+relative@0.1"]
    assert sorted(names, key=order) == ["bp", "fr+relative@0.1", "fr@0.1", "hold@0.1", "fr@0.9"]


def test_a_stack_goes_on_where_another_one_was(study: Study) -> None:
    def made() -> Stack:
        return Stack(study, (0, 2), [METHODS["bp"], METHODS["fr"]], [1, 2], ALPHA, BATCH)

    through, first, second = made(), made(), made()
    for _ in range(3):
        through.train()
    first.train()
    second.load(copy.deepcopy(first.state()))
    second.train()
    second.train()
    assert second.epoch == 3
    for name, weight in through.weights.items():
        torch.testing.assert_close(second.weights[name], weight, rtol=0, atol=0)


def test_bytes_are_normalised_when_they_are_read(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = study.inputs(0)
    monkeypatch.setattr("paper.study.WHOLE", 0)
    fresh, _ = Study(study.model, study.train, study.test).inputs(0)
    assert kept.values.dtype == torch.float32
    assert fresh.values.dtype == torch.uint8
    index = torch.tensor([3, 0, 7])
    torch.testing.assert_close(fresh.rows(index), kept.rows(index))


@pytest.mark.parametrize("pair", [(2, 2), (3, 1), (0, 5), (-1, 2)])
def test_pairs_that_do_not_exist(study: Study, pair: tuple[int, int]) -> None:
    with pytest.raises(frfx.LayerError, match="0 <= l_S < l_R <= L"):
        study.parts(*pair)


def test_what_no_run_changes_is_what_the_network_computes(study: Study) -> None:
    x, y = next(iter(study.train.batches(len(study.train))))
    inputs, _ = study.inputs(2)
    torch.testing.assert_close(inputs.values, study.model[:6](x))
    torch.testing.assert_close(study.targets(2, "forward"), study.model[:6](x))
    torch.testing.assert_close(study.targets(2, "paper"), frfx.invert(study.model, 2)(x, y))
    logits = study.parts(2, 3)[1](study.parts(2, 3)[0](inputs.values))
    torch.testing.assert_close(logits, study.model(x))
    assert F.cross_entropy(logits, y) > 0
