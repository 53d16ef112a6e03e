"""Writes what a table command found: Markdown, CSV, LaTeX and one file of records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paper import layout, published
from paper.cost import Cost
from paper.layout import Costs, Grid
from paper.records import Record, write_compact, write_whole
from paper.settings import BENCHMARKS, METHODS, base_name


def save_costs(costs: Costs, path: Path) -> None:
    """Write costs as JSON."""
    rows = [
        {"pair": pair, "method": name, **asdict(cost)}
        for pair, methods in costs.items()
        for name, cost in methods.items()
    ]
    write_whole(path, json.dumps(rows, indent=1) + "\n")


def load_costs(path: Path) -> Costs:
    """Read what `save_costs` wrote; nothing where there is no file."""
    costs: Costs = {}
    for row in json.loads(path.read_text()) if path.exists() else []:
        pair, name = tuple(row.pop("pair")), row.pop("method")
        costs.setdefault(pair, {})[name] = Cost(**row)
    return costs


def write(
    benchmark: str, records: Sequence[Record], costs: Costs, facts: dict[str, Any], folder: Path
) -> list[Path]:
    """Write the tables of a data set.

    Args:
        benchmark: Its name.
        records: Finished runs.
        costs: What runs cost; may be empty.
        facts: What is known of the baseline.
        folder: Where to.

    Returns:
        The files.
    """
    last = max((max(record.accuracies) for record in records), default=0)
    grids = {
        "table": layout.results(benchmark, records, costs),
        "differences": layout.differences(records, last),
    }
    if costs:
        grids["costs"] = layout.costs_table(costs)
    written = []
    for name, grid in grids.items():
        for suffix, text in (("csv", grid.csv()), ("tex", grid.latex())):
            written.append(folder / f"{name}.{suffix}")
            write_whole(written[-1], text)
    written += [folder / "table.md", folder / "records.json"]
    write_whole(written[-2], page(benchmark, records, grids, facts, last))
    ordered = sorted(records, key=lambda r: (r.cell.l_r, r.cell.l_s, r.cell.method, r.cell.seed))
    write_compact(ordered, written[-1])
    return written


def page(
    benchmark: str,
    records: Sequence[Record],
    grids: dict[str, Grid],
    facts: dict[str, Any],
    last: int,
) -> str:
    """Return the tables as one Markdown page."""
    theirs, number = published.baseline(benchmark), BENCHMARKS[benchmark].table
    beside = "" if theirs is None else f" The paper's (its Table {number}) has {theirs:.2f} %."
    alphas = sorted({r.settings["alpha"] for r in records if r.cell.method != "bp"})
    names = {r.cell.method for r in records}
    kinds = set(map(base_name, names))
    shown = [f"*{m.label}*: {_describe(m.targets)}" for m in METHODS.values() if m.name in kinds]
    done = {len(runs) for methods in layout.grouped(records).values() for runs in methods.values()}
    text = [
        f"Baseline: {facts['accuracy']:.2f} % test accuracy after {facts['epochs']} epochs.{beside}"
        f" Loss coefficient alpha {', '.join(f'{a:g}' for a in alphas) or 0}; Adam, learning rate"
        f" {records[0].settings['learning rate'] if records else 0:g}, batches of"
        f" {records[0].settings['batch size'] if records else 0}; {last} epochs. Accuracy in %,"
        " mean ± standard deviation over the runs, which differ in the order of their batches;"
        f" the best of a pair is bold. {'. '.join(shown)}.",
        "" if len(done) < 2 else f"Not complete: {min(done)} to {max(done)} runs are finished.",
        grids["table"].markdown(),
        f"Differences after {last} epochs in points of %, paired over the seeds: 95 % interval of"
        " the mean (bold where it excludes 0), p of the paired t-test and of Wilcoxon's"
        " signed-rank test. No p is corrected for the number of rows.",
        grids["differences"].markdown(),
    ]
    if "costs" in grids:
        text += [
            "Cost of a training step, one run at a time. *BP*: the output of the frozen front is"
            " kept in memory, as for all methods. *Plain BP*: the front is run in every step.",
            grids["costs"].markdown(),
        ]
    return "\n\n".join(part.rstrip() for part in text if part) + "\n"


def _describe(targets: str) -> str:
    if targets == "none":
        return "backpropagation alone"
    if targets == "forward":
        return "the target is the baseline's own forward feature, no label in it"
    return f'targets of `frfx.invert(policy="{targets}")`'
