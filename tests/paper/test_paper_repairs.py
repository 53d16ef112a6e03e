"""Mending a handful of mistakes, against the network itself."""

from __future__ import annotations

import pytest
import torch
from paper.repairs import STRATEGIES, Outcome, Repair, table
from paper.study import Study

from frfx import networks
from tests.paper.test_paper_stack import SPEC, some_images


@pytest.fixture(scope="module")
def repair() -> Repair:
    """Of the first three of four layers, untrained: most images are mistakes."""
    torch.manual_seed(0)
    return Repair(Study(networks.build(SPEC), some_images(40, 1), some_images(30, 2)), (0, 3))


def test_mistakes_are_those_of_the_network(repair: Repair) -> None:
    x, y = next(iter(repair.study.test.batches(30)))
    assert torch.equal(repair.wrong, (repair.study.model(x).argmax(-1) != y).nonzero().flatten())


@pytest.mark.parametrize("policy", ["minimal", "joint"])
def test_targets_have_their_labels(repair: Repair, policy: str) -> None:
    chosen = repair.wrong[:4]
    target = repair.target(chosen, "joint")
    assert torch.equal(repair.tail(target).argmax(-1), repair.test.labels[chosen])
    assert repair.target(chosen, policy).shape == target.shape


@pytest.mark.parametrize("name", STRATEGIES)
def test_mending(repair: Repair, name: str) -> None:
    before = {key: weight.clone() for key, weight in repair.study.model.state_dict().items()}
    nothing = repair.mend(name, seed=0, count=3, most=0)
    assert (nothing.steps, nothing.mended, nothing.changed, nothing.accuracy) == (0, 0, 0, 0)
    assert repair.mend(name, seed=0, count=3, most=3) == repair.mend(name, seed=0, count=3, most=3)
    outcome = repair.mend(name, seed=0, count=3, most=300)
    assert 0 < outcome.steps <= 300
    if name in ("BP", "joint"):
        assert outcome.mended == 1
    assert 0 <= outcome.changed <= 100
    assert abs(outcome.accuracy) <= outcome.changed + 1e-9
    for key, weight in repair.study.model.state_dict().items():
        assert torch.equal(weight, before[key])


def test_a_table_of_two_handfuls() -> None:
    outcomes = [
        Outcome((1, 3), name, seed, 10 + seed, 1.0, 2.0 + seed + i, -0.5)
        for i, name in enumerate(STRATEGIES)
        for seed in range(2)
    ]
    rows = {row[1]: row for row in table(outcomes).rows}
    assert rows["BP"][2:6] == ("2", "100.0", "10.5", "2.500 ± 0.707")
    assert rows["BP"][7] == "-2.000"
    assert rows["BP, others held"][7:] == ("", "")
