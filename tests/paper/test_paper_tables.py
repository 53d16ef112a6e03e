"""Records, statistics and layout of the paper's tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics as plain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper import layout, pages, published, runs, statistics
from paper.cost import PLAIN, Cost, measure, peak
from paper.records import Cell, Record, Store, read_compact, write_compact
from paper.settings import BENCHMARKS, METHODS, STAGES

from tests.paper.test_paper_stack import ALPHA, SPEC, some_images

torch = pytest.importorskip("torch")


def record(method: str, seed: int, *values: float, pair: tuple[int, int] = (0, 3)) -> Record:
    accuracies = dict(zip(STAGES, values, strict=False))
    settings = {"alpha": 0.0 if method == "bp" else 0.1, "learning rate": 1e-3, "batch size": 256}
    return Record(Cell("mnist", *pair, method, seed), settings, accuracies, {"torch": "2"})


# --- the paper's figures ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.table])
def test_the_papers_tables_are_complete(name: str) -> None:
    table, benchmark = published.table(name), BENCHMARKS[name]
    assert set(table) == set(itertools.product(("BP", "FR"), benchmark.pairs()))
    assert published.baseline(name) == benchmark.goal
    stored = json.loads(published.FILE.read_text())["tables"][name]
    assert (stored["table"], stored["alpha"]) == (benchmark.table, benchmark.spec.alpha)


@pytest.mark.parametrize("name", [name for name, b in BENCHMARKS.items() if b.table])
def test_the_papers_parameter_counts_are_those_of_the_networks(name: str) -> None:
    from frfx import networks

    with torch.device("meta"):
        model = networks.build(name)
    counts = [
        sum(p.numel() for p in module.parameters()) for module in model if list(module.parameters())
    ]
    for (_, (l_s, l_r)), row in published.table(name).items():
        assert row.parameters == sum(counts[l_s:l_r])


def test_some_rows_as_printed() -> None:
    row = published.table("cifar10")["FR", (0, 4)]
    assert (row.parameters, row.memory) == (33053, 19.65)
    assert row.accuracy == {1: (62.393, 0.313), 5: (62.693, 0.194), 10: (62.982, 0.215)}
    assert published.table("imagewoof")["BP", (6, 7)].accuracy[10] == (27.167, 0.116)
    assert published.table("digits") == {}
    assert published.baseline("digits") is None


# --- records ----------------------------------------------------------------------------------


def test_a_record_of_other_settings_counts_for_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "records")
    saved = record("fr", 3, 97.1, 97.2)
    store.save(saved)
    assert store.find(saved.cell, saved.settings) == saved
    assert store.find(saved.cell, {**saved.settings, "alpha": 0.2}) is None
    assert store.find(record("fr", 4).cell, saved.settings) is None
    assert list(store) == [saved]


def test_compact_records(tmp_path: Path) -> None:
    saved = [record("bp", 0, 1.0, 2.0, 3.0), record("fr", 0, 1.5)]
    write_compact(saved, tmp_path / "sub/records.json")
    assert read_compact(tmp_path / "sub/records.json") == saved


# --- statistics -------------------------------------------------------------------------------

accuracy = st.integers(9700, 9800).map(lambda n: n / 100)


@given(st.lists(st.tuples(accuracy, accuracy), min_size=2, max_size=12))
def test_paired_against_the_formulas(pairs: list[tuple[float, float]]) -> None:
    ours, others = zip(*pairs, strict=True)
    found = statistics.paired(ours, others)
    assert found is not None
    differences = np.subtract(ours, others)
    assert found.mean == pytest.approx(differences.mean(), abs=1e-9)
    assert found.runs == len(pairs)
    mirrored = statistics.paired(others, ours)
    assert mirrored is not None
    assert mirrored.low == pytest.approx(-found.high, abs=1e-9)
    assert mirrored.t == pytest.approx(found.t)
    # The interval excludes 0 exactly where the t-test rejects at 5 %.
    if abs(found.t - 0.05) > 1e-9:
        assert (found.low > 1e-9 or found.high < -1e-9) == (found.t < 0.05)


def test_intervals_cover_as_they_should() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        sample = generator.normal(0.3, 1.0, 10)
        found = statistics.paired(list(sample), [0.0] * 10)
        assert found is not None
        covered += found.low <= 0.3 <= found.high
    assert 365 <= covered <= 393  # 380 expected, 3 standard deviations about


def test_wilcoxon_against_all_signs() -> None:
    differences = [0.31, -0.05, 0.17, 0.22, -0.12, 0.4, 0.09]
    found = statistics.paired(differences, [0.0] * 7)
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    seen = sum(rank for rank, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [
        sum(rank for rank, up in zip(ranks, signs, strict=True) if up)
        for signs in itertools.product((0, 1), repeat=7)
    ]
    tail = min(np.mean(np.array(sums) >= seen), np.mean(np.array(sums) <= seen))
    assert found is not None
    assert found.wilcoxon == pytest.approx(min(1.0, 2 * tail))


def test_runs_that_do_not_differ() -> None:
    same = statistics.paired([97.1, 97.2], [97.1, 97.2])
    assert same == statistics.Paired(0.0, 0.0, 0.0, 1.0, 1.0, 2)
    assert statistics.paired([97.1], [97.2]) is None


# --- layout -----------------------------------------------------------------------------------


def table_of_three() -> layout.Grid:
    records = [
        *(record("bp", seed, 97.70 + 0.01 * seed, 97.8) for seed in range(3)),
        *(record("fr", seed, 97.60, 97.9 + 0.02 * seed) for seed in range(3)),
        record("bp", 0, 97.0, 97.1, pair=(2, 3)),
    ]
    costs = {
        (0, 3): {
            PLAIN: Cost(2826, 2e-3, 4.0, 0.0),
            "bp": Cost(2826, 1e-3, 2.0, 0.0),
            "fr": Cost(2826, 1.1e-3, 2.5, 0.7),
        }
    }
    return layout.results("mnist", records, costs)


def test_a_table_has_the_papers_figures_beside_ours() -> None:
    grid = table_of_three()
    assert [row[0] for row in grid.rows] == ["BP(0,3)", "FR(0,3)", "BP(2,3)"]
    bp, fr, alone = grid.rows
    deviation = plain.stdev([97.70, 97.71, 97.72])
    assert bp[1:7] == ("3", "2826", "2.00", "1.00", f"97.710 ± {deviation:.3f}", "97.800 ± 0.000")
    assert fr[2:5] == ("2826", "2.50", "1.10")
    assert fr[7:] == ("97.676 ± 0.036", "97.744 ± 0.047", "97.781 ± 0.058", "7.98")
    assert alone[1:5] == ("1", "", "", "")
    assert grid.bold == {(1, 6), (2, 6)}  # the best of each pair


def test_every_format_has_every_figure() -> None:
    grid = table_of_three()
    assert list(csv.reader(io.StringIO(grid.csv()))) == [list(r) for r in (grid.header, *grid.rows)]
    lines = grid.markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "**97.920 ± 0.020**" in lines[3]
    latex = grid.latex()
    assert latex.count("\\\\") == 1 + len(grid.rows)
    assert "\\textbf{97.920 $\\pm$ 0.020}" in latex
    assert all(
        line.count("&") == len(grid.header) - 1 for line in latex.splitlines() if "&" in line
    )


def test_differences_are_of_the_same_seeds() -> None:
    records = [
        *(record("bp", seed, 97.0 + 0.1 * seed) for seed in range(4)),
        *(record("fr", seed, 97.2 + 0.1 * seed + 0.01 * (seed % 2)) for seed in range(1, 4)),
        *(record("hold", seed, 97.2 + 0.1 * seed) for seed in range(4)),
    ]
    rows = {row[1]: row for row in layout.differences(records, 1).rows}
    assert set(rows) == {"FR − BP", "hold − BP", "FR − hold"}
    assert rows["FR − BP"][2:4] == ("3", "+0.207")
    assert rows["FR − hold"][3] == "+0.007"


def test_pages_say_what_is_missing(tmp_path: Path) -> None:
    records = [record("bp", 0, 97.0), record("bp", 1, 97.1), record("fr", 0, 97.0)]
    costs = {(0, 3): {PLAIN: Cost(1, 2.0, 1.0, 0.0), "bp": Cost(1, 1.0, 1.0, 0.0)}}
    pages.save_costs(costs, tmp_path / "costs.json")
    assert pages.load_costs(tmp_path / "costs.json") == costs
    facts = {"accuracy": 97.5, "epochs": 7}
    written = pages.write("mnist", records, costs, facts, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "97.50 % test accuracy after 7 epochs. The paper's (its Table 1) has 97.62 %." in text
    assert "Not complete: 1 to 2 runs are finished." in text
    assert {path.name for path in written} >= {"table.tex", "differences.csv", "records.json"}


# --- runs and costs ---------------------------------------------------------------------------


def test_finished_runs_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paper.stack import Stack
    from paper.study import Study

    from frfx import networks

    torch.manual_seed(0)
    study = Study(networks.build(SPEC), some_images(40, 1), some_images(30, 2))
    cells = [Cell("digits", 0, 2, m, seed) for seed in (0, 1) for m in ("bp", "fr")]

    def go(folder: str, some: list[Cell]) -> list[Record]:
        return runs.run_cells(
            study, Store(tmp_path / folder), some, alpha=ALPHA, epochs=3, fingerprint="f",
            stages=(1,), tell=lambda line: None,
        )  # fmt: skip

    through = go("a", cells)
    assert [r.cell for r in through] == cells
    assert set(through[0].accuracies) == {1, 3}
    assert go("b", cells[:3])[0] == through[0]
    trained: list[int] = []
    train = Stack.train

    def counted(stack: Stack) -> None:
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(len(stack.methods))
        train(stack)

    monkeypatch.setattr(Stack, "train", counted)
    assert go("a", cells) == through  # nothing is trained
    assert trained == []
    with pytest.raises(KeyboardInterrupt):
        go("b", cells)
    assert trained == [1, 1]  # one method of the last seed is left; two of its epochs are done
    trained.clear()
    assert go("b", cells) == through
    assert trained == [1]  # the third epoch, from the checkpoint
    assert not list((tmp_path / "b").glob("*.ckpt"))


def test_peak_counts_what_is_alive() -> None:
    def step() -> None:
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        third = second * 2
        last = torch.empty(500, 1000)
        del second, third, last

    assert peak(step, torch.device("cpu")) == 10_000_000


def test_costs_of_methods() -> None:
    from paper.study import Study

    from frfx import networks

    torch.manual_seed(0)
    study = Study(networks.build(SPEC), some_images(400, 1), some_images(30, 2))
    found = measure(study, (1, 3), ["bp", "fr"], ALPHA, rounds=1)
    assert list(found) == [PLAIN, "bp", "fr"]
    assert found["fr"].parameters == sum(p.numel() for p in study.part(1, 3).parameters())
    assert min(cost.step for cost in found.values()) > 0
    assert found["fr"].targets > 0 == found["bp"].targets
    # The targets of a batch may add to the peak; the front that is run again adds more.
    assert found["bp"].memory <= found["fr"].memory < found[PLAIN].memory


def test_methods_have_their_own_names() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
