"""`nvidia-smi topo -m`: how every GPU and NIC of a node reaches every other one, as a matrix of levels.

A cell says what the way between two devices crosses: NV12 twelve NVLinks, PIX at most one PCIe bridge, PXB several,
PHB the host bridge, NODE host bridges of one NUMA node, SYS the link between NUMA nodes (drivers before 2017: SOC).
Real files come with prompts, colour codes, lost tabs and legends around the table; all of that is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rtp_sim.errors import InputError

LEVELS = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Ways over PCIe, the nearest first."""
SELF = "X"

_ALIASES = {"SOC": "SYS", "PSB": "PXB"}
_NVLINK = re.compile(r"NV([1-9]\d*)")
_DEVICE = re.compile(r"GPU\d+|NIC\d+|[a-z][a-z0-9]*_\w+")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LEGEND = re.compile(r"\s*(NIC\d+):\s+(\S+)\s*")
_EXPECTED = "expected the output of: nvidia-smi topo -m"


@dataclass(frozen=True, slots=True)
class TopoMatrix:
    """Devices are "GPU0" to "GPU<gpus-1>" and `nics`, both as the columns are headed. `cells[a, b]` is a level or
    "NV<links>"; it is missing where the file lost the row of a NIC. `numa` has the NUMA node of each GPU (None: not
    said), `affinity` its CPU cores as printed ("": not said), `nic_names` what the legend calls a NIC."""

    gpus: int
    nics: tuple[str, ...]
    cells: Mapping[tuple[str, str], str]
    numa: tuple[int | None, ...]
    affinity: tuple[str, ...]
    nic_names: Mapping[str, str]

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices, GPUs first."""
        return (*(f"GPU{i}" for i in range(self.gpus)), *self.nics)

    def nvlinks(self, a: int, b: int) -> int:
        """NVLinks between two GPUs, 0 if they talk over PCIe."""
        found = _NVLINK.fullmatch(self.cells[f"GPU{a}", f"GPU{b}"])
        return int(found[1]) if found else 0


def read_topo(path: Path) -> TopoMatrix:
    """The matrix in a file. InputError naming the file and line, what was found and what was expected."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"{path}: cannot be read: {reason}; {_EXPECTED}") from None
    return parse_topo(text, str(path))


def parse_topo(text: str, name: str) -> TopoMatrix:
    """The matrix in `text`; `name` stands in errors. A second, equal matrix (another node) is fine."""
    lines = [_ANSI.sub("", line).replace("\r", "") for line in text.splitlines()]
    _refuse_others(lines, name)
    headers = [i for i, line in enumerate(lines) if _is_header(line.split())]
    if not headers:
        raise InputError(
            f"{name}: no line with the columns GPU0, GPU1 ... was found in {len(lines)} lines; {_EXPECTED}"
        )
    ends = [*headers[1:], len(lines)]
    found = [_matrix(lines, start, end, name) for start, end in zip(headers, ends, strict=True)]
    for other, start in zip(found[1:], headers[1:], strict=True):
        if other.cells != found[0].cells:
            raise InputError(
                f"{name}, line {start + 1}: a second matrix that differs from the one at line {headers[0] + 1}; "
                "expected one file per kind of node"
            )
    return found[0]


def _refuse_others(lines: list[str], name: str) -> None:
    """InputError for what other tools print."""
    for number, line in enumerate(lines, 1):
        words = line.split()
        if "ROCm" in line or "XGMI" in words:
            raise InputError(f"{name}, line {number}: found {line.strip()[:60]!r}, AMD's rocm-smi; {_EXPECTED}")
        if "XeLink" in line or re.match(r"\s*GPU \d+/\d+", line):
            raise InputError(f"{name}, line {number}: found {line.strip()[:60]!r}, Intel's xpu-smi; {_EXPECTED}")


def _is_header(words: list[str]) -> bool:
    columns = _columns(words)
    return bool(columns) and columns[0] == "GPU0" and len(columns) == len(_before_cpu(words))


def _before_cpu(words: list[str]) -> list[str]:
    return words[: words.index("CPU")] if "CPU" in words else words


def _columns(words: list[str]) -> list[str]:
    columns = []
    for word in _before_cpu(words):
        if not _DEVICE.fullmatch(word):
            break
        columns.append(word)
    return columns


def _matrix(lines: list[str], start: int, end: int, name: str) -> TopoMatrix:
    header = lines[start].split()
    columns = _columns(header)
    gpus = sum(1 for column in columns if column.startswith("GPU"))
    if columns[:gpus] != [f"GPU{i}" for i in range(gpus)] or len(set(columns)) != len(columns):
        raise InputError(
            f"{name}, line {start + 1}: columns {' '.join(columns)}; expected GPU0, GPU1, ... and then NICs"
        )
    cells: dict[tuple[str, str], str] = {}
    rest: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for number, line in enumerate(lines[start + 1 : end], start + 2):
        words = line.split()
        if words and words[0] in columns and not line.strip().endswith(":") and words[0] not in rest:
            rest[words[0]] = _row(cells, columns, words, f"{name}, line {number}")
        elif legend := _LEGEND.fullmatch(line):
            names[legend[1]] = legend[2]
    if missing := [f"GPU{i}" for i in range(gpus) if f"GPU{i}" not in rest]:
        raise InputError(
            f"{name}: the row of {missing[0]} is missing below line {start + 1}; expected one row for each "
            f"of {gpus} GPUs"
        )
    _check_symmetry(cells, name)
    with_numa = "NUMA" in header
    numa = tuple(_numa(rest[f"GPU{i}"]) if with_numa else None for i in range(gpus))
    affinity = tuple(_affinity(rest[f"GPU{i}"]) if "CPU" in header else "" for i in range(gpus))
    return TopoMatrix(gpus, tuple(columns[gpus:]), cells, numa, affinity, names)


def _row(cells: dict[tuple[str, str], str], columns: list[str], words: list[str], where: str) -> list[str]:
    """Puts a row into the matrix; returns what follows its cells (CPU and NUMA affinity)."""
    device, values = words[0], words[1 : 1 + len(columns)]
    if len(values) < len(columns):
        raise InputError(
            f"{where}: the row of {device} has {len(values)} cells; expected {len(columns)}, one per column"
        )
    for column, value in zip(columns, values, strict=True):
        level = _ALIASES.get(value, value)
        if (level == SELF) != (device == column) or not (level in (SELF, *LEVELS) or _NVLINK.fullmatch(level)):
            expected = f'"{SELF}" between a device and itself' if device == column else f"NV#, {', '.join(LEVELS)}"
            raise InputError(f"{where}: {device} to {column} is {value!r}; expected {expected}")
        if level != SELF:
            cells[device, column] = level
    return words[1 + len(columns) :]


def _check_symmetry(cells: dict[tuple[str, str], str], name: str) -> None:
    for (a, b), level in list(cells.items()):
        back = cells.setdefault((b, a), level)
        if back != level:
            raise InputError(f"{name}: {a} to {b} is {level}, {b} to {a} is {back}; expected the same both ways")


def _affinity(rest: list[str]) -> str:
    return rest[0] if rest and re.fullmatch(r"[\d,-]+", rest[0]) else ""


def _numa(rest: list[str]) -> int | None:
    """The NUMA node, where exactly one is named."""
    return int(rest[1]) if len(rest) > 1 and rest[1].isdigit() else None
