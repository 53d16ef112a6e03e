"""Tables in the paper's layout, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from paper import published, statistics
from paper.cost import PLAIN, Cost
from paper.records import Record
from paper.settings import STAGES, method, order

Pair = tuple[int, int]
Costs = dict[Pair, dict[str, Cost]]


@dataclass(frozen=True)
class Grid:
    """A table of texts.

    Attributes:
        header: Names of the columns.
        rows: As many texts each.
        bold: (row, column) of what stands out.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.header, ("---",) * len(self.header)]
        for i, row in enumerate(self.rows):
            lines.append(
                tuple(f"**{text}**" if (i, j) in self.bold else text for j, text in enumerate(row))
            )
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self) -> str:
        """Return the table as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.header, *self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """Return the table as a LaTeX tabular (package booktabs)."""
        lines = [" & ".join(map(_latex, self.header)), "\\midrule"]
        for i, row in enumerate(self.rows):
            cells = (
                f"\\textbf{{{_latex(text)}}}" if (i, j) in self.bold else _latex(text)
                for j, text in enumerate(row)
            )
            lines.append(" & ".join(cells))
        body = " \\\\\n".join(lines).replace("\\midrule \\\\", "\\midrule")
        columns = "l" + "r" * (len(self.header) - 1)
        return (
            f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body} \\\\\n\\bottomrule\n"
            "\\end{tabular}\n"
        )


def _latex(text: str) -> str:
    for sign, spelt in (("±", "$\\pm$"), ("−", "$-$"), ("_", "\\_"), ("%", "\\%"), ("#", "\\#")):
        text = text.replace(sign, spelt)
    return text


def grouped(records: Sequence[Record]) -> dict[Pair, dict[str, dict[int, Record]]]:
    """Return records by pair, method and seed, the pairs in the order of the paper's tables."""
    found: dict[Pair, dict[str, dict[int, Record]]] = {}
    for record in sorted(records, key=lambda r: (r.cell.l_r, r.cell.l_s, r.cell.seed)):
        methods = found.setdefault(record.cell.pair, {})
        methods.setdefault(record.cell.method, {})[record.cell.seed] = record
    return found


def accuracies(runs: dict[int, Record], epoch: int) -> dict[int, float]:
    """Return the accuracies of one method by seed, of the runs that have them."""
    return {s: r.accuracies[epoch] for s, r in runs.items() if epoch in r.accuracies}


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    mean, deviation = statistics.mean_and_deviation(values)
    return f"{mean:.3f} ± {deviation:.3f}"


def results(benchmark: str, records: Sequence[Record], costs: Costs) -> Grid:
    """Return the table of a data set, the paper's figures beside ours."""
    epochs = [e for e in _epochs(records) if e in STAGES or e == max(_epochs(records))]
    theirs = published.table(benchmark)
    header = ["PT (l_S, l_R)", "runs", "#paras", "memory, MB", "time / BP"]
    header += [f"epoch {epoch}" for epoch in epochs]
    header += [f"paper, epoch {epoch}" for epoch in STAGES] + ["paper, MB"]
    rows: list[tuple[str, ...]] = []
    bold = set()
    for pair, methods in grouped(records).items():
        best: list[tuple[float, int, int]] = []
        for name in sorted(methods, key=order):
            label = method(name).label
            cost, paper = costs.get(pair, {}), theirs.get((label, pair))
            row = [f"{label}({pair[0]},{pair[1]})", str(len(methods[name])), *_cost(cost, name)]
            for epoch in epochs:
                values = list(accuracies(methods[name], epoch).values())
                mean, _ = statistics.mean_and_deviation(values)
                best.append((round(mean, 3), len(rows), len(row)))
                row.append(spread(values))
            row += ["" if paper is None else "{:.3f} ± {:.3f}".format(*paper.accuracy[e])
                    for e in STAGES]  # fmt: skip
            rows.append((*row, "" if paper is None else f"{paper.memory:.2f}"))
        top = max(value for value, _, _ in best)
        bold |= {(i, j) for value, i, j in best if value == top}
    return Grid(tuple(header), tuple(rows), frozenset(bold))


def _epochs(records: Sequence[Record]) -> list[int]:
    return sorted({epoch for record in records for epoch in record.accuracies})


def _cost(costs: dict[str, Cost], name: str) -> tuple[str, str, str]:
    if name not in costs:
        return "", "", ""
    cost = costs[name]
    ratio = f"{cost.step / costs['bp'].step:.2f}" if "bp" in costs else ""
    return str(cost.parameters), f"{cost.memory:.2f}", ratio


def differences(records: Sequence[Record], epoch: int) -> Grid:
    """Return paired comparisons after an epoch: FR and every other method against BP, FR against
    `hold`.
    """
    header = (
        *("(l_S, l_R)", "difference", "runs", "mean", "95 % interval"),
        *("p (t)", "p (Wilcoxon)"),
    )
    rows: list[tuple[str, ...]] = []
    bold = set()
    for pair, methods in grouped(records).items():
        names = sorted(methods, key=order)
        against = [(name, "bp") for name in names if name != "bp"]
        against += [(name, holding) for name in names if (holding := _holding(name)) != name]
        for name, other in against:
            if other not in methods:
                continue
            ours, others = (accuracies(methods[key], epoch) for key in (name, other))
            seeds = sorted(set(ours) & set(others))
            found = statistics.paired([ours[s] for s in seeds], [others[s] for s in seeds])
            if found is None:
                continue
            if found.low > 0 or found.high < 0:
                bold.add((len(rows), 4))
            rows.append(
                (
                    f"({pair[0]}, {pair[1]})",
                    f"{method(name).label} − {method(other).label}",
                    str(found.runs),
                    f"{found.mean:+.3f}",
                    f"{found.low:+.3f} to {found.high:+.3f}",
                    f"{found.t:.3f}",
                    f"{found.wilcoxon:.3f}",
                )
            )
    return Grid(header, tuple(rows), frozenset(bold))


def _holding(name: str) -> str:
    """Return the control of a method: `hold` with the same weight."""
    alpha = name.partition("@")[2]
    return f"hold@{alpha}" if alpha else "bp" if name == "bp" else "hold"


def costs_table(costs: Costs) -> Grid:
    """Return time and memory of every method as ratios to backpropagation."""
    header = (
        *("(l_S, l_R)", "method", "ms a step", "time / BP", "time / plain BP", "MB"),
        *("memory / BP", "memory / plain BP", "targets, once, s"),
    )
    rows = []
    for pair, methods in sorted(costs.items(), key=lambda item: item[0][::-1]):
        plain, bp = methods[PLAIN], methods.get("bp", methods[PLAIN])
        for name, cost in methods.items():
            label = "plain BP" if name == PLAIN else method(name).label
            rows.append(
                (
                    f"({pair[0]}, {pair[1]})",
                    label,
                    f"{1e3 * cost.step:.2f}",
                    f"{cost.step / bp.step:.2f}",
                    f"{cost.step / plain.step:.2f}",
                    f"{cost.memory:.2f}",
                    f"{cost.memory / bp.memory:.2f}",
                    f"{cost.memory / plain.memory:.2f}",
                    f"{cost.targets:.2f}" if cost.targets else "",
                )
            )
    return Grid(header, tuple(rows))
