"""Predicted against measured step times on this machine's CPUs: python benchmarks/validate_cpu.py -o DIR.

Needs torch, a quiet machine and patience (`--settings`, `--cases` and `--launches` make it shorter). It calibrates once
for 2 and for 4 ranks (`rtp-sim calibrate`; profiles that are there already are used), then measures 24 cases in every
setting: each launch is a fresh set of processes, a case's time the median over its launches of the launch's median
step. In every step each rank watches the pace of its core (rtp_sim/executor/pace.py): a virtual machine's
neighbours slow it down for a second or so and show in nothing else. Steps at another pace than the calibration's do
not count. A launch of which fewer than three steps count, or during which other programs took more than `--foreign`
of the cores, is made again, up to three times in a row. Every launch is written to DIR/launches.jsonl at once, so that
a benchmark that was interrupted goes on where it was, and `--report` predicts again without measuring, with the program
as it is now. Nothing is fitted to these cases.

Writes DIR/validation.md and DIR/validation.json. Exit code 1 if a setting misses its bar.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from rtp_sim.cost.stated import StatedCost, priced
from rtp_sim.engine.simulate import simulate
from rtp_sim.executor import distributed, machine, shm, worker  # noqa: F401 - forked ranks find torch imported
from rtp_sim.executor.collect import collect
from rtp_sim.executor.launcher import HOST, LAUNCHER_PID, free_port
from rtp_sim.executor.pace import TOLERANCE, steady
from rtp_sim.executor.request import RunRequest
from rtp_sim.executor.rundir import RunDirectory
from rtp_sim.experiment import Prepared, Request, prepare
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.link import Link
from rtp_sim.model.network import transformer_network
from rtp_sim.model.presets import find_model
from rtp_sim.stated import StatedTimes
from rtp_sim.validation.predict import Conditions, predict

LINK = Link(200_000, 10**9)
STATED_PROFILE, STATED_STEP_NS = "dgx-a100-80g", 300_000_000
"""Ranks that sleep take what this profile predicts, stretched to a step of about this long."""
RETRIES = 3
STATED_STEPS = 3
FEWEST_STEPS = 3
"""At the usual pace, for a launch to count: the median of one or two is whatever they happened to meet."""
TOLERANCE_IN_TURNS = 0.3
"""By how much the pace may be off where several ranks take turns on a core: readings behind another's turn are 5 to
20 % longer, and that of the slowest of four ranks counts."""
PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class Setting:
    """How ranks run. `mean` and `most` are the bars: the mean and the largest error, as fractions; None: no bar."""

    name: str
    ranks: int
    transport: str
    mean: float | None
    most: float | None

    @property
    def tolerance(self) -> float:
        """By how much a step's pace may be off the usual one."""
        return TOLERANCE if self.ranks <= (os.cpu_count() or 1) else TOLERANCE_IN_TURNS

    @property
    def key(self) -> str:
        """As --settings names it: stated-2, shm-2, emulated-4 ..."""
        return f"{'stated' if self.transport == 'none' else self.transport}-{self.ranks}"


SETTINGS = (
    Setting("stated times, N = 2", 2, "none", 0.02, 0.04),
    Setting("stated times, N = 4", 4, "none", 0.02, 0.04),
    Setting("stated times, N = 8", 8, "none", 0.02, 0.04),
    Setting("shared memory, N = 2", 2, "shm", 0.05, 0.12),
    Setting("emulated link, N = 2", 2, "emulated", 0.05, 0.12),
    Setting("emulated link, N = 4", 4, "emulated", 0.10, 0.20),
    Setting("gloo, N = 2", 2, "gloo", 0.12, 0.25),
    Setting("gloo, N = 4", 4, "gloo", None, None),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One training step. `slow` only counts where times are stated: that rank computes 1.3 times as long."""

    strategy: str
    hidden: int
    layers: int
    micro_batch: int
    seq_len: int
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.strategy} h{self.hidden} L{self.layers} b{self.micro_batch} s{self.seq_len}"


STRATEGIES = ("ddp", "zero1", "zero2", "fsdp", "tp", "tp-sp", "rtp", "rtp-inplace")
SIZES = ((320, 3, 3, 96), (448, 2, 3, 112), (704, 2, 1, 96), (256, 4, 6, 64), (576, 2, 2, 72), (384, 3, 1, 208))
"""(hidden, layers, micro-batch, sequence); 8 heads each. Every strategy meets three of them."""


def cases() -> list[Case]:
    """24 cases: the first 8 are all strategies once."""
    return [
        Case(strategy, *SIZES[(2 * turn + s) % len(SIZES)], slow=turn == 1)
        for turn in range(3)
        for s, strategy in enumerate(STRATEGIES)
    ]


# ---- what is run


@dataclass(frozen=True)
class Job:
    """A case in a setting, ready to run and to predict."""

    setting: Setting
    case: Case
    prepared: Prepared
    times: StatedTimes | None

    @property
    def conditions(self) -> Conditions:
        link = LINK if self.setting.transport == "emulated" else None
        return Conditions("cpu", link, self.times)


def job(setting: Setting, case: Case) -> Job:
    """Builds the schedule, and states times where ranks only sleep."""
    spec = replace(
        find_model("gpt2-tiny"), hidden_size=case.hidden, num_layers=case.layers, num_heads=8, num_kv_heads=8,
        head_dim=case.hidden // 8, ffn_hidden_size=4 * case.hidden, vocab_size=2048, max_positions=256, name=case.name,
    )  # fmt: skip
    cluster = load_cluster(STATED_PROFILE, 1, setting.ranks)
    request = Request(case.name, STATED_PROFILE, case.strategy, micro_batch=case.micro_batch, precision="fp32")
    prepared = prepare(request, cluster, transformer_network(spec, case.seq_len))
    if setting.transport != "none":
        return Job(setting, case, prepared, None)
    slow = {1: 1300} if case.slow else {}
    alone = priced(prepared.schedule, prepared.cost, 1.0, slow)
    stretch = STATED_STEP_NS / simulate(prepared.schedule, StatedCost(alone)).step_time_ns
    return Job(setting, case, prepared, priced(prepared.schedule, prepared.cost, stretch, slow))


def run_request(a: argparse.Namespace, job: Job) -> RunRequest:
    """The executor's side of the job."""
    own = RunRequest(job.prepared.network, job.prepared.training, steps=a.steps, warmup=1, pin=a.pin)
    if job.times is not None:
        return replace(own, stated=True, pin=False, steps=min(a.steps, STATED_STEPS), warmup=1)
    if job.setting.transport != "emulated":
        return replace(own, transport=job.setting.transport)
    latency_ns, bandwidth = LINK.latency_ns, LINK.bandwidth_bytes_per_s
    return replace(own, transport="emulated", link_latency_ns=latency_ns, link_bandwidth_bytes_per_s=bandwidth)


# ---- measuring

Usual = tuple[int, float]
"""The usual pace in ns (0: none is known), and by what part of it a step's may be off."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: its steps' times, the pace of the slowest core in each, and what other programs took of the cores
    meanwhile."""

    setting: str
    case: str
    times_ns: tuple[int, ...]
    pace_ns: tuple[int, ...]
    foreign: float

    def steady_ns(self, usual: Usual) -> list[int]:
        """Times of the steps at the usual pace."""
        return [t for t, pace in zip(self.times_ns, self.pace_ns, strict=True) if steady(pace, *usual)]

    def counts(self, most_foreign: float, usual: Usual) -> bool:
        """Whether the launch was quiet enough."""
        enough = len(self.steady_ns(usual)) >= min(FEWEST_STEPS, len(self.times_ns))
        return self.foreign <= most_foreign and enough


def measure(a: argparse.Namespace, job: Job) -> Launch:
    """Runs the job once on fresh processes."""
    run, request = RunDirectory(a.output / "run"), run_request(a, job)
    run.prepare(job.prepared.schedule, request, job.times)
    busy_s, own_s, start_s = _busy_core_s(), _own_core_s(), time.monotonic()
    run_ranks(run, job.setting.ranks)
    took_s = time.monotonic() - start_s
    others_s = (_busy_core_s() - busy_s) - (_own_core_s() - own_s)
    foreign = max(0.0, others_s / took_s / (os.cpu_count() or 1))
    result = collect(run, job.prepared.schedule, request)
    times, paces = result["step_times_ns"], result["pace_ns"][request.warmup :]
    return Launch(job.setting.name, job.case.name, tuple(times), tuple(paces), foreign)


def run_ranks(run: RunDirectory, ranks: int) -> None:
    """A fresh process per rank, forked from this one: that torch is there already saves most of a launch's time."""
    port, children = free_port(), []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _be_rank(run, rank, ranks, port)
        children.append(child)
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while children:
            found, status = os.waitpid(-1, os.WNOHANG)
            if found in children:
                children.remove(found)
                if status:
                    raise SystemExit(f"a rank failed: see {run.path}/ranks/*/log.txt")
            elif time.monotonic() > deadline_s:
                raise SystemExit(f"the ranks took longer than {PATIENCE_S} s: see {run.path}/ranks/*/log.txt")
            else:
                time.sleep(0.01)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _be_rank(run: RunDirectory, rank: int, ranks: int, port: int) -> NoReturn:
    """In the child: what the launcher sets up, then the worker."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port, LAUNCHER_PID: os.getppid()}
    os.environ.update({key: str(value) for key, value in words.items()} | {"MASTER_ADDR": HOST})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    log = os.open(run.of_rank(rank, "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os._exit(worker.main([str(run.path)]))


def _busy_core_s() -> float:
    """Core-seconds of everybody since the machine started (Linux)."""
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_core_s() -> float:
    """Core-seconds of this process and of those it has waited for."""
    return sum(os.times()[:4])


def measure_all(a: argparse.Namespace, jobs: Sequence[Job], log: Path) -> None:
    """Round after round over all cases, so that a case's launches lie apart in time; not again what is on file."""
    done: dict[tuple[str, str], int] = {}
    usual = {job.setting.name: usual_of(a, job) for job in jobs}
    for one in read(log):
        if one.setting in usual and one.counts(a.foreign, usual[one.setting]):
            done[one.setting, one.case] = done.get((one.setting, one.case), 0) + 1
    for number in range(a.launches):
        for job in jobs:
            key = (job.setting.name, job.case.name)
            if done.get(key, 0) > number:
                continue
            for _ in range(RETRIES + 1):
                found = measure(a, job)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
                counts, times = found.counts(a.foreign, usual[key[0]]), found.steady_ns(usual[key[0]])
                say(f"{job.setting.name}, launch {number + 1}: {job.case.name}: "
                    f"{statistics.median(times or found.times_ns) / 1e6:.1f} ms, others {found.foreign:.0%}, "
                    f"{len(times)}/{len(found.times_ns)} steps{'' if counts else ', again'}")  # fmt: skip
                if counts:
                    break


def read(log: Path) -> Iterator[Launch]:
    """The launches on file."""
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                times, paces = tuple(record.pop("times_ns")), tuple(record.pop("pace_ns"))
                yield Launch(**record, times_ns=times, pace_ns=paces)


def calibrated(a: argparse.Namespace, setting: Setting) -> Path:
    """The profile for so many ranks and what they send with, made if it is not there."""
    transport = "gloo" if setting.transport == "gloo" else "shm"
    path: Path = a.output / f"{transport}{setting.ranks}.toml"
    if not path.exists():
        if a.report:
            raise SystemExit(f"{path} is missing: --report predicts with the profiles of the measurement")
        say(f"calibrating for {setting.ranks} ranks over {transport}")
        command = [sys.executable, "-m", "rtp_sim", "calibrate", "-o", str(path), "--nproc", str(setting.ranks)]
        command += ["--transport", transport, "--quiet", *(["--pin"] if a.pin else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def usual_of(a: argparse.Namespace, job: Job) -> Usual:
    """The cores' usual pace while the profile was made; none where ranks only sleep."""
    if job.times is not None:
        return 0, 0.0
    text = calibrated(a, job.setting).with_suffix(".calibration.json").read_text(encoding="utf-8")
    return int(json.loads(text)["facts"]["pace_ns"]), job.setting.tolerance


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- reporting


@dataclass(frozen=True, slots=True)
class Row:
    """A case: times in ms, the error of the prediction, the run-to-run coefficient of variation, how many steps were at
    the usual pace and what others took at most of the cores, as fractions."""

    setting: str
    case: str
    predicted_ms: float
    measured_ms: float
    error: float
    cv: float
    launches: int
    steady: float
    foreign: float


def rows(a: argparse.Namespace, jobs: Sequence[Job], log: Path) -> list[Row]:
    """Every case that has been measured, predicted now."""
    launches = list(read(log))
    found = []
    for job in jobs:
        usual = usual_of(a, job)
        of_case = [one for one in launches if (one.setting, one.case) == (job.setting.name, job.case.name)]
        mine = [one for one in of_case if one.counts(a.foreign, usual)]
        if not mine:
            continue
        cluster = job.prepared.cluster
        if job.times is None:
            cluster = load_cluster(str(calibrated(a, job.setting)), 1, job.setting.ranks)
        predicted_ns = predict(job.prepared.schedule, cluster, job.conditions).step_time_ns
        times = [statistics.median(one.steady_ns(usual)) for one in mine]
        measured_ns = statistics.median(times)
        cv = statistics.stdev(times) / statistics.fmean(times) if len(times) > 1 else 0.0
        found.append(Row(
            job.setting.name, job.case.name, predicted_ns / 1e6, measured_ns / 1e6, predicted_ns / measured_ns - 1, cv,
            len(times), sum(len(x.steady_ns(usual)) for x in mine) / sum(len(x.times_ns) for x in mine),
            max(one.foreign for one in mine),
        ))  # fmt: skip
    return found


def markdown(found: Sequence[Row]) -> Iterator[str]:
    """The tables: one of settings against their bars, one of cases per setting."""
    yield "| setting | cases | mean error | largest | bar | held | run-to-run CV, median |"
    yield "|---|---|---|---|---|---|---|"
    for setting in SETTINGS:
        mine = [row for row in found if row.setting == setting.name]
        if mine:
            bar = "none" if setting.mean is None else f"{setting.mean:.0%} / {setting.most:.0%}"
            repeated = [row.cv for row in mine if row.launches > 1]
            cv = f"{statistics.median(repeated):.1%}" if repeated else "-"
            yield (f"| {setting.name} | {len(mine)} | {mean_error(mine):.1%} | {largest_error(mine):.1%} | {bar} | "
                   f"{'yes' if holds(setting, mine) else 'NO'} | {cv} |")  # fmt: skip
    for setting in SETTINGS:
        mine = [row for row in found if row.setting == setting.name]
        if mine:
            yield from ("", f"**{setting.name}**", "")
            yield "| case | predicted | measured | error | CV | launches | steps at the usual pace | others |"
            yield "|---|---|---|---|---|---|---|---|"
            for row in mine:
                yield (f"| {row.case} | {row.predicted_ms:.1f} ms | {row.measured_ms:.1f} ms | {row.error:+.1%} | "
                       f"{row.cv:.1%} | {row.launches} | {row.steady:.0%} | {row.foreign:.0%} |")  # fmt: skip


def mean_error(found: Sequence[Row]) -> float:
    return statistics.fmean(abs(row.error) for row in found)


def largest_error(found: Sequence[Row]) -> float:
    return max(abs(row.error) for row in found)


def holds(setting: Setting, found: Sequence[Row]) -> bool:
    """Whether the setting keeps its bars; one without bars does."""
    if setting.mean is None or setting.most is None:
        return True
    return mean_error(found) <= setting.mean and largest_error(found) <= setting.most


def main() -> int:
    """Measures what is missing, predicts all, writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--settings", default=",".join(s.key for s in SETTINGS), help="which (%(default)s)")
    parser.add_argument("--cases", type=int, default=24, metavar="N", help="the first N cases (24)")
    parser.add_argument("--launches", type=int, default=5, metavar="N", help="launches of each case (5)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="measured steps of a launch (12)")
    parser.add_argument("--foreign", type=float, default=0.03, metavar="X", help="most that others may take (0.03)")
    parser.add_argument("--pin", action="store_true", help="keep each rank on one core, also when calibrating")
    parser.add_argument("--report", action="store_true", help="measure nothing, predict what is on file")
    a = parser.parse_args()
    a.output.mkdir(parents=True, exist_ok=True)
    wanted = [word.strip() for word in a.settings.split(",")]
    if unknown := set(wanted) - {s.key for s in SETTINGS}:
        parser.error(f"unknown setting {sorted(unknown)[0]!r}; expected some of {', '.join(s.key for s in SETTINGS)}")
    chosen = [s for s in SETTINGS if s.key in wanted]
    log = a.output / "launches.jsonl"
    jobs = [job(setting, case) for setting in chosen for case in cases()[: a.cases]]
    if not a.report:
        for setting in chosen:
            if setting.transport != "none":
                calibrated(a, setting)
        measure_all(a, jobs, log)
    found = rows(a, jobs, log)
    text = "\n".join(markdown(found)) + "\n"
    (a.output / "validation.md").write_text(text, encoding="utf-8")
    (a.output / "validation.json").write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    print(text, end="")
    by_setting = {s: [row for row in found if row.setting == s.name] for s in chosen}
    return 0 if all(holds(s, mine) for s, mine in by_setting.items() if mine) else 1


if __name__ == "__main__":
    sys.exit(main())
