"""A measured run judged against a prediction: reads what `rtp-sim run -o RUN/` left, simulates the schedule, checks.

    request.json    what was asked for: model, strategy and training (shown in reports)
    schedule.json   the schedule that was executed
    measured.json   the timeline of the median step
    stated.json     what every op takes, of a run whose ranks only slept
    result.json     "step_times_ns" of all measured steps; by rank "bytes_sent", "messages", "peak_memory_bytes"

A run is as predicted if the median step time and the highest peak memory are within the tolerance, and every rank sent
exactly the bytes and messages that are counted from the schedule. What a run did not measure is not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from rtp_sim.cost.model import ClusterCost
from rtp_sim.errors import InputError, ScheduleError
from rtp_sim.executor.pace import steady
from rtp_sim.hardware.spec import Cluster
from rtp_sim.link import Link
from rtp_sim.metrics import communication_totals
from rtp_sim.model.json_file import read_json_object, validated
from rtp_sim.schedule.ir import Compute, Schedule
from rtp_sim.schedule.serialize import from_json
from rtp_sim.stated import from_json as from_stated_json
from rtp_sim.timeline import Timeline
from rtp_sim.timeline_file import load_timeline
from rtp_sim.validation.diff import TimelineDiff, diff, relative_error, with_numbers
from rtp_sim.validation.predict import Conditions, predict
from rtp_sim.validation.same_schedule import first_difference

REQUEST, SCHEDULE, MEASURED, RESULT = FILES = ("request.json", "schedule.json", "measured.json", "result.json")
STATED = "stated.json"


PROFILER = "torch.profiler"
"""The meta "clocks" of a timeline that was read from the ranks' traces."""


class ResultFile(BaseModel):
    """The keys of result.json that are read here; others may be there."""

    model_config = ConfigDict(strict=True)

    step_times_ns: list[int] = Field(
        description="the time of every measured step in ns, for example [1200000, 1190000]"
    )
    failure: str | None = Field(None, description="what the run ended with, or null")
    bytes_sent: list[int] | None = Field(None, description="bytes that each rank sent in one step, by rank, or null")
    messages: list[int] | None = Field(None, description="messages that each rank sent in one step, by rank, or null")
    peak_memory_bytes: list[int] | None = Field(None, description="peak memory of each rank in bytes, by rank, or null")
    warmup: int = Field(0, description="how many steps came before the measured ones")
    pace_ns: list[int] = Field([], description="the pace of the slowest core in every step, warm-up included, in ns")
    only_rank: int | None = Field(None, description="the rank that ran alone, without its partners, or null")
    twin: str | None = Field(None, description="what of torch ran in the place of the schedule, or null")
    communication: str = Field("real", description="what took the place of its partners: fake or copy")


@dataclass(frozen=True)
class MeasuredRun:
    """What a run left. Numbers by rank are empty where they were not measured; `failure` says how it broke off. Of a
    rank that ran alone (`only_rank`) there is one number each. `paces_ns` is what a fixed piece of work took on the
    slowest core during each step (empty: not known)."""

    path: Path
    request: Mapping[str, object]
    timeline: Timeline
    conditions: Conditions
    failure: str
    step_times_ns: tuple[int, ...]
    bytes_sent: tuple[int, ...]
    messages: tuple[int, ...]
    peak_memory_bytes: tuple[int, ...]
    only_rank: int | None = None
    communication: str = "real"
    paces_ns: tuple[int, ...] = ()

    @property
    def schedule(self) -> Schedule:
        """What was executed."""
        return self.timeline.schedule


@dataclass(frozen=True, slots=True)
class Spread:
    """Times of several steps: their number, median (of two the lower: a step that took place, whose timeline is the
    measured one), 10th and 90th percentile (linear between the nearest two)."""

    steps: int
    median_ns: int
    p10_ns: float
    p90_ns: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the slowest core took for the same work as when the profile was measured, as a ratio (median of the
    steps); how many steps were within 15 % of that pace, and their median time (None if there are none)."""

    slower: float
    steps: int
    median_ns: int | None


@dataclass(frozen=True, slots=True)
class Check:
    """One number of the verdict. `unit` is "ns", "bytes" or "messages"; `limit` bounds the relative error, 0 asks for
    equality on every rank (`note` then names the first rank that differs)."""

    name: str
    unit: str
    predicted: float
    measured: float
    limit: float
    passed: bool
    note: str = ""

    @property
    def relative_error(self) -> float | None:
        """The error as a fraction of what was measured; None where that is 0."""
        return relative_error(self.predicted, self.measured)


@dataclass(frozen=True)
class Validation:
    """A run against its prediction on `cluster`."""

    run: MeasuredRun
    cluster: Cluster
    tolerance: float
    step_times: Spread
    diff: TimelineDiff
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def pace(self) -> Pace | None:
        """The cores' pace during the run."""
        return pace_of(self.run, self.cluster)

    @property
    def passed(self) -> bool:
        """Whether everything that was measured is as predicted."""
        return all(check.passed for check in self.checks)


def load_run(path: Path) -> MeasuredRun:
    """Reads a run's directory. InputError naming the file that is missing, cut off or does not fit the others."""
    if not path.is_dir():
        raise InputError(f"{path} is no directory; expected what rtp-sim run -o {path} leaves: {', '.join(FILES)}")
    for name in (REQUEST, SCHEDULE, RESULT):
        _require(path / name)
    request, schedule = read_json_object(path / REQUEST), _read_schedule(path / SCHEDULE)
    result = validated(ResultFile, read_json_object(path / RESULT), path / RESULT)
    if result.twin is not None:
        raise InputError(f"{path} is a run of a twin ({result.twin}): it has no ops to compare; run without --twin")
    if not result.step_times_ns:
        why = f": the run failed ({result.failure})" if result.failure else ""
        raise InputError(f"{path / RESULT}: 'step_times_ns' is empty, no measured step was finished{why}")
    if min(result.step_times_ns) < 1:
        raise InputError(f"{path / RESULT}: 'step_times_ns' holds {min(result.step_times_ns)}; expected at least 1 ns")
    _require(path / MEASURED)
    timeline = load_timeline(path / MEASURED)
    if difference := first_difference(timeline.schedule, schedule, MEASURED, SCHEDULE):
        raise InputError(f"{path}: {MEASURED} and {SCHEDULE} do not belong together: {difference}")
    ranks = schedule.world_size if result.only_rank is None else 1
    sent, messages, peak = (
        _by_rank(path / RESULT, name, getattr(result, name), ranks)
        for name in ("bytes_sent", "messages", "peak_memory_bytes")
    )
    conditions, times = _conditions(path, request), tuple(result.step_times_ns)
    paces = tuple(result.pace_ns[result.warmup :])
    return MeasuredRun(
        path, request, timeline, conditions, result.failure or "", times, sent, messages, peak,
        result.only_rank, result.communication, paces if len(paces) == len(times) and all(paces) else (),
    )  # fmt: skip


def validate(run: MeasuredRun, cluster: Cluster, tolerance: float, engine: str = "simpy") -> Validation:
    """Simulates the run's schedule on `cluster`, joins both timelines and checks them.

    `tolerance` bounds the relative error of step time and peak memory. InputError if the cluster has another number of
    ranks than the run.
    """
    schedule, cost = run.schedule, ClusterCost(cluster)
    if cluster.world_size != schedule.world_size:
        raise InputError(
            f"{run.path} was run on {schedule.world_size} ranks, {cluster.name} as asked for has {cluster.world_size}; "
            "expected a profile with as many"
        )
    predicted = predict(schedule, cluster, run.conditions, engine)
    measured = run.timeline
    for key in ("bytes_sent", "messages", "peak_memory_bytes"):
        measured = with_numbers(measured, key, dict(enumerate(getattr(run, key))))
    joined = diff(replace(predicted, meta={**predicted.meta, "cluster": cluster.name}), measured)
    spread = spread_of(run.step_times_ns)
    checks = [near("step time", "ns", predicted.step_time_ns, spread.median_ns, tolerance)]
    if run.peak_memory_bytes:
        peaks = [rank.predicted.peak_memory_bytes or 0 for rank in joined.ranks]
        checks.append(near("peak memory", "bytes", max(peaks), max(run.peak_memory_bytes), tolerance))
    totals = [communication_totals(schedule, rank) for rank in range(schedule.world_size)]
    if run.bytes_sent:
        checks.append(equal("bytes sent", "bytes", [sent for sent, _, _ in totals], run.bytes_sent))
    if run.messages:
        checks.append(equal("messages", "messages", [count for _, count, _ in totals], run.messages))
    return Validation(run, cluster, tolerance, spread, joined, tuple(checks), notes(run, cost))


def pace_of(run: MeasuredRun, cluster: Cluster) -> Pace | None:
    """The cores' pace during the run, against that at which the machine's profile was measured; None where one of the
    two is not known."""
    usual = cluster.device.host_pace_ns
    if usual is None or not run.paces_ns:
        return None
    pairs = zip(run.step_times_ns, run.paces_ns, strict=True)
    usual_ns = [time_ns for time_ns, pace_ns in pairs if steady(pace_ns, round(usual.value))]
    slower = median_low(run.paces_ns) / usual.value
    return Pace(slower, len(usual_ns), median_low(usual_ns) if usual_ns else None)


def spread_of(times_ns: Sequence[int]) -> Spread:
    """Median and percentiles of the step times."""
    p10, p90 = (float(value) for value in np.percentile(times_ns, (10, 90)))
    return Spread(len(times_ns), median_low(times_ns), p10, p90)


def _conditions(path: Path, request: Mapping[str, object]) -> Conditions:
    """How the run was made, by its request."""
    link = times = None
    if request.get("transport") == "emulated":
        link = Link(*(_whole(path, request, name) for name in ("link_latency_ns", "link_bandwidth_bytes_per_s")))
    if request.get("stated"):
        _require(path / STATED)
        times = from_stated_json((path / STATED).read_text(encoding="utf-8"))
    return Conditions(str(request.get("device", "")), link, times)


def _whole(path: Path, request: Mapping[str, object], name: str) -> int:
    value = request.get(name)
    if not isinstance(value, int):
        raise InputError(f"{path / REQUEST}: {name!r} is {value!r}; expected a whole number")
    return value


def notes(run: MeasuredRun, cost: ClusterCost) -> tuple[str, ...]:
    """What a reader should know: rates taken from another dtype, a run made for exactness."""
    actions = (op.action for program in run.schedule.programs for op in program.ops)
    dtypes = dict.fromkeys(action.dtype for action in actions if isinstance(action, Compute))
    notes = [note for note in map(cost.rate_note, dtypes) if note]
    if run.timeline.meta.get("clocks") == PROFILER:
        median_ns = median_low(run.step_times_ns)
        longer = run.timeline.step_time_ns / median_ns - 1
        notes.append(f"the ops are those of a step under the profiler, {longer:+.1%} against the median step")
    if run.failure:
        notes.append(f"the run broke off: {run.failure}; what it finished before is compared")
    if run.conditions.times is not None:
        notes.append(f"ranks slept for the times in {STATED}: they are predicted with these, not with the profile's")
    if computed_in := run.request.get("float_dtype"):
        notes.append(f"the run computed in {computed_in}, whatever the schedule says: times and memory do not compare")
    return tuple(notes)


def near(name: str, unit: str, predicted: float, measured: float, tolerance: float) -> Check:
    """Passes where the relative error is within the tolerance."""
    error = relative_error(predicted, measured)
    return Check(name, unit, predicted, measured, tolerance, error is not None and abs(error) <= tolerance)


def equal(name: str, unit: str, counted: Sequence[int], measured: Sequence[int]) -> Check:
    """Sums over the ranks, equal only if every rank is."""
    wrong = next((r for r, (c, m) in enumerate(zip(counted, measured, strict=True)) if c != m), None)
    note = "" if wrong is None else f"rank {wrong}: {counted[wrong]} predicted, {measured[wrong]} measured"
    return Check(name, unit, sum(counted), sum(measured), 0.0, wrong is None, note)


def _read_schedule(path: Path) -> Schedule:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None
    except ScheduleError as error:
        raise InputError(f"{path}: {error}") from None


def _require(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; a measured run holds {', '.join(FILES)}")


def _by_rank(path: Path, name: str, values: list[int] | None, ranks: int) -> tuple[int, ...]:
    """The numbers of all ranks; none if the run has not measured them."""
    if values and len(values) != ranks:
        raise InputError(f"{path}: {name!r} has {len(values)} entries; expected {ranks}, one per rank")
    return tuple(values or ())
