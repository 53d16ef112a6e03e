"""One JSON record for every finished run, so that nothing is run twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One run: what is trained, how, and from which seed."""

    benchmark: str
    l_s: int
    l_r: int
    method: str
    seed: int

    @property
    def pair(self) -> tuple[int, int]:
        """The paper's (l_S, l_R)."""
        return self.l_s, self.l_r

    @property
    def file(self) -> str:
        """The name of its record."""
        return f"{self.l_s}-{self.l_r}-{self.method}-{self.seed}.json"


@dataclass(frozen=True)
class Record:
    """What a run came to.

    Attributes:
        cell: The run.
        settings: What else the result depends on; a record of other settings counts for nothing.
        accuracies: Test accuracy in % by epoch.
        versions: Of torch and of frfx, for the reader.
    """

    cell: Cell
    settings: dict[str, Any]
    accuracies: dict[int, float]
    versions: dict[str, str]

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Record:
        """Return what was stored as JSON, where keys are strings."""
        accuracies = {int(epoch): value for epoch, value in stored["accuracies"].items()}
        return cls(Cell(**stored["cell"]), stored["settings"], accuracies, stored["versions"])


class Store:
    """The records of one benchmark in a folder.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, record: Record) -> None:
        """Write a record; a reader sees all of it or nothing."""
        write_whole(self.folder / record.cell.file, json.dumps(asdict(record), indent=1) + "\n")

    def find(self, cell: Cell, settings: dict[str, Any]) -> Record | None:
        """Return the record of a run with these settings, if it is finished."""
        path = self.folder / cell.file
        if not path.exists():
            return None
        record = Record.of(json.loads(path.read_text()))
        return record if record.settings == json.loads(json.dumps(settings)) else None

    def __iter__(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.json")):
            yield Record.of(json.loads(path.read_text()))


def write_whole(path: Path, text: str) -> None:
    """Write a file through another one beside it, so that no half of it is ever read."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_text(text)
    draft.replace(path)


def write_compact(records: Iterable[Record], path: Path) -> None:
    """Write records as one file, a line each."""
    rows = [json.dumps(asdict(record), separators=(",", ":")) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "[\n" + ",\n".join(rows) + "\n]\n")


def read_compact(path: Path) -> list[Record]:
    """Read what `write_compact` wrote."""
    return [Record.of(stored) for stored in json.loads(path.read_text())]
