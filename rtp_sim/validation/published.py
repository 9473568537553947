"""Predicts the rows of measured-run files: in a few processes, each different experiment once, results kept as they
come.

With a folder for results every estimate is appended to `estimates.jsonl` at once, under a key of the experiment and of
everything its price depends on (the cluster profile and the program's own version of the model). A run that was broken
off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rtp_sim import __version__
from rtp_sim.compose.memory import StageMemory
from rtp_sim.errors import InputError
from rtp_sim.validation.accuracy import Outcome
from rtp_sim.validation.evaluate import Estimate, cluster_of, evaluate
from rtp_sim.validation.interpret import Experiment, Interpretation, Unsupported, interpret
from rtp_sim.validation.measured import Problem, Row, Table

WORKERS = 2
KEPT = "estimates.jsonl"

Progress = Callable[[int, int], None]
Answer = Estimate | str
"""An estimate, or why there is none."""


@dataclass(frozen=True, slots=True)
class Cache:
    """Estimates on disk: one JSON object a line, {"key", "estimate"}; a line cut short by an interruption is
    ignored."""

    path: Path | None

    def load(self) -> dict[str, Answer]:
        """Everything kept so far."""
        if self.path is None or not self.path.exists():
            return {}
        found: dict[str, Answer] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                item = json.loads(line)
                answer = item["estimate"]
                found[item["key"]] = answer if isinstance(answer, str) else _estimate(answer)
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def keep(self, key: str, answer: Answer) -> None:
        """Appends one estimate."""
        if self.path is None:
            return
        kept = answer if isinstance(answer, str) else asdict(answer)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "estimate": kept}) + "\n")


def _estimate(kept: dict[str, Any]) -> Estimate:
    stages = (
        StageMemory(s["held"], s["op"], tuple((str(name), int(size)) for name, size in s["largest"]))
        for s in kept["stages"]
    )
    return Estimate(**kept | {"stages": tuple(stages)})


def predict(tables: Sequence[Table], folder: Path | None = None, workers: int = WORKERS,
            progress: Progress = lambda done, total: None) -> list[Outcome]:  # fmt: skip
    """The outcome of every row, in order. InputError if the folder for results cannot be made."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from None
    entries = [entry for table in tables for entry in table.entries]
    read = [(entry, _interpreted(entry)) for entry in entries]
    wanted = dict.fromkeys(
        found.experiment for _, found in read if isinstance(found, Interpretation) and not found.refused
    )
    answers = _answers(list(wanted), Cache(folder / KEPT if folder is not None else None), workers, progress)
    return [_outcome(entry, found, answers) for entry, found in read]


def _interpreted(entry: Row | Problem) -> Interpretation | Unsupported | InputError | None:
    if isinstance(entry, Problem):
        return None
    try:
        return interpret(entry)
    except Unsupported as error:
        return error
    except InputError as error:
        # What is wrong with a model's numbers is said by the model, which knows no files.
        where = f"{entry.file}, line {entry.line}"
        return error if str(error).startswith(where) else InputError(f"{where}: {error}")


def _outcome(entry: Row | Problem, found: object, answers: dict[Experiment, Answer]) -> Outcome:
    if isinstance(entry, Problem):
        return Outcome(entry.file, entry.line, entry.row_id, None, False, invalid=str(entry))
    row = entry.file, entry.line, entry.cells.row_id, entry.cells, entry.calibration
    if isinstance(found, InputError):
        return Outcome(*row, invalid=str(found))
    if not isinstance(found, Interpretation):
        return Outcome(*row, skipped=str(found))
    if found.refused:
        return Outcome(*row, assumptions=found.assumptions, refused=found.refused, reading=found.reading)
    answer = answers[found.experiment]
    if isinstance(answer, str):
        return Outcome(*row, assumptions=found.assumptions, skipped=answer)
    left = cluster_of(found.experiment.cluster, found.experiment.gpus).residuals
    spread = None if left is None else (left.low.value, left.high.value)
    return Outcome(*row, estimate=answer, assumptions=found.assumptions, reading=found.reading, spread=spread)


def _answers(experiments: list[Experiment], cache: Cache, workers: int, progress: Progress) -> dict[Experiment, Answer]:
    kept, found, left = cache.load(), {}, []
    for experiment in experiments:
        key = key_of(experiment)
        if key in kept:
            found[experiment] = kept[key]
        else:
            left.append((experiment, key))
    progress(len(found), len(experiments))
    for experiment, key, answer in _computed(left, workers):
        found[experiment] = answer
        cache.keep(key, answer)
        progress(len(found), len(experiments))
    return found


def _computed(left: list[tuple[Experiment, str]], workers: int) -> Iterator[tuple[Experiment, str, Answer]]:
    """Estimates as they come; in this process where there are few."""
    if workers <= 1 or len(left) < 2 * workers:
        for experiment, key in left:
            yield experiment, key, estimate_or_reason(experiment)
        return
    # The largest first, so that none is left over for the end.
    left = sorted(left, key=lambda item: -_size(item[0]))
    with ProcessPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(estimate_or_reason, experiment): (experiment, key) for experiment, key in left}
        try:
            for done in as_completed(waiting):
                yield *waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _size(e: Experiment) -> int:
    return e.model.num_layers * max(1, e.inner) * e.pp


def estimate_or_reason(experiment: Experiment) -> Answer:
    """The estimate, or the message of what is wrong with the experiment."""
    try:
        return evaluate(experiment)
    except InputError as error:
        return str(error)


def key_of(experiment: Experiment) -> str:
    """What an estimate is kept under: the experiment, the numbers of its machine and the version of this program."""
    try:
        cluster = cluster_of(experiment.cluster, experiment.gpus)
    except InputError as error:
        return f"{__version__} {experiment!r} {error}"
    links = sorted({(link.kind, link.bandwidth_bytes_per_s, link.latency_ns) for link in cluster.topology.links})
    text = repr((__version__, experiment, cluster.device, cluster.communication, links))
    return hashlib.sha256(text.encode()).hexdigest()
