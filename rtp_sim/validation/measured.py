"""Published measured runs as rows of a CSV file: reads them, checks each cell, and names what is wrong by line and
column.

The schema is described in docs/measured.md. A cell that is blank is unknown; a row with a mistake is kept as a
`Problem` and the others are read on. Nothing is guessed here: what an unknown cell is taken for is decided, and said,
in `interpret.py`.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rtp_sim.errors import InputError

DATA_AXES = ("single", "ddp", "zero1", "zero2", "fsdp", "hsdp", "rtp", "rtp-inplace")
"""What the column `strategy` may say: how the data-parallel axis keeps weights, gradients and optimizer state."""

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _boolean(value: object) -> object:
    """CSV files write True, true or 1."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower(), value)


Flag = Annotated[bool, BeforeValidator(_boolean)]


class RowFile(BaseModel):
    """One row as the file has it. Fields without a default are required columns and cells; unknown columns are let
    be."""

    model_config = ConfigDict(extra="ignore")

    row_id: str = Field(min_length=1, description="a name of the row, unique in its file")
    cluster: str = Field(min_length=1, description="the profile of the machine")
    seq_len: Count
    hidden_size: Count
    gpus: Count
    strategy: str = Field(min_length=1)
    micro_batch: Count
    num_microbatches: Count
    num_layers: Count | None = None
    num_heads: Count | None = None
    num_kv_heads: Count | None = None
    ffn_hidden_size: Count | None = None
    vocab_size: Count | None = None
    gated_mlp: Flag | None = None
    tied_embeddings: Flag | None = None
    learned_positions: Flag | None = None
    source: str = ""
    framework: str = ""
    model: str = ""
    attention: str = ""
    gpus_per_node: Count | None = None
    dp: Count = 1
    tp: Count = 1
    pp: Count = 1
    vpp: Count = 1
    cp: Count = 1
    ep: Count = 1
    sequence_parallel: Flag = False
    pipeline_schedule: str = ""
    global_batch: Count | None = None
    precision: str = ""
    grad_precision: str = ""
    recompute: str = ""
    step_time_s: Seconds | None = None
    peak_memory_gib: Seconds | None = None
    memory_metric: str = ""
    status: str = Field("ok", pattern="^(ok|failed)$")
    note: str = ""


REQUIRED = tuple(name for name, field in RowFile.model_fields.items() if field.is_required())


@dataclass(frozen=True, slots=True)
class Row:
    """A row of `file` at `line` (of the text, the header is line 1). Blank cells hold the defaults of `RowFile`."""

    file: str
    line: int
    cells: RowFile
    calibration: bool = False
    """Whether fits may look at this row (`calibration_half`)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A row that cannot be read: where, and what is wrong with which column."""

    file: str
    line: int
    row_id: str
    column: str
    message: str

    def __str__(self) -> str:
        """As errors are shown: file, line, column, then what is wrong."""
        return f"{self.file}, line {self.line}, column {self.column}: {self.message}"


@dataclass(frozen=True, slots=True)
class Table:
    """What a file holds: `entries` are its rows in order, those with mistakes as problems."""

    path: Path
    entries: tuple[Row | Problem, ...]


def calibration_half(row_ids: Sequence[str]) -> frozenset[str]:
    """The declared rows of a file that fits may use: those whose id has a SHA-256 below half of its range, the lowest
    first, and never more than half of the file. The rest is for validation alone."""
    digests = sorted((hashlib.sha256(name.encode()).digest(), name) for name in row_ids)
    return frozenset(name for digest, name in digests[: len(digests) // 2] if digest[0] < 128)


def read_measured(path: Path) -> Table:
    """The rows of a CSV file. InputError if it cannot be read, is no table, or lacks a required column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            entries = tuple(_entries(path, file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not entries:
        raise InputError(f"{path}: holds no rows; expected a header and one row per measured run")
    half = calibration_half([e.cells.row_id for e in entries if isinstance(e, Row)])
    marked = (replace(e, calibration=e.cells.row_id in half) if isinstance(e, Row) else e for e in entries)
    return Table(path, tuple(marked))


def _entries(path: Path, file: Any) -> Iterator[Row | Problem]:
    reader = csv.DictReader(file)
    header = reader.fieldnames or []
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise InputError(f"{path}, line 1: lacks the column {', '.join(missing)}; expected {', '.join(REQUIRED)}")
    seen: dict[str, int] = {}
    for raw in reader:
        entry = _entry(path.name, reader.line_num, raw)
        name = entry.cells.row_id if isinstance(entry, Row) else entry.row_id
        if isinstance(entry, Row) and name in seen:
            entry = Problem(path.name, reader.line_num, name, "row_id", f"{name!r} is that of line {seen[name]} too")
        seen.setdefault(name, reader.line_num)
        yield entry


def _entry(file: str, line: int, raw: Mapping[str, Any]) -> Row | Problem:
    name = str(raw.get("row_id") or "")
    if None in raw or None in raw.values():
        return Problem(file, line, name, "row_id", "the row has not as many cells as the header")
    given = {key: value.strip() for key, value in raw.items() if value.strip()}
    try:
        cells = RowFile.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        return Problem(file, line, name, str(first["loc"][0]), _reason(first))
    degrees = cells.dp * cells.tp * cells.pp * cells.cp
    if degrees != cells.gpus:
        equation = f"dp x tp x pp x cp = {cells.dp} x {cells.tp} x {cells.pp} x {cells.cp} = {degrees}"
        return Problem(file, line, name, "gpus", f"given {cells.gpus}, but {equation}; expected the product")
    if cells.strategy not in DATA_AXES:
        expected = f"expected one of {', '.join(DATA_AXES)}"
        return Problem(file, line, name, "strategy", f"given {cells.strategy!r}; {expected}")
    return Row(file, line, cells)


def _reason(error: Any) -> str:
    if error["type"] == "missing":
        return "blank; expected a value"
    return f"given {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
