"""The executor's step beside torch's own, on two ranks of this machine: python benchmarks/twins.py [--profile P.toml].

For each model and each of ddp, fsdp and tp: launches of the executor and of the twin in turn (A B A B), so that a slow
minute of the machine touches both; of each launch the median of the steps at the usual pace of the cores
(rtp_sim/executor/pace.py), and of the launches the median and the spread. Ranks are pinned. Then rotation against the
executor's own fsdp, with what the simulator says of the two on the profile. What other programs took of the cores
meanwhile is measured and printed: above a few percent the figures are worth little.

    --launches 5  --steps 30  --models gpt2-tiny,wide  --strategies ddp,fsdp,tp,rtp    to do a part
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rtp_sim.executor.calibrate.host import busy_core_s
from rtp_sim.executor.pace import steady, usual_ns
from rtp_sim.experiment import Request, prepare
from rtp_sim.experiment import run as simulate

RANKS = 2
WIDE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408,
    "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 2048,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
"""Two layers of width 512: kernels that take milliseconds on a core, where gpt2-tiny's take microseconds."""
WORKLOAD = {"gpt2-tiny": (64, 8), "wide": (128, 4)}
"""Tokens per sequence, sequences per replica."""


@dataclass(frozen=True)
class Contender:
    """What is launched: a strategy of the executor, or its twin."""

    model: str
    strategy: str
    twin: bool

    @property
    def name(self) -> str:
        """As a column shows it."""
        return f"{self.strategy}{' twin' if self.twin else ''}"


@dataclass(frozen=True, slots=True)
class Launch:
    """Times of the measured steps of one launch, in seconds, and the pace of the slowest core in each."""

    times_s: tuple[float, ...]
    pace_ns: tuple[int, ...]

    def median_s(self, usual: int) -> float | None:
        """Of the steps at the usual pace; None if there are none."""
        found = [t for t, pace in zip(self.times_s, self.pace_ns, strict=True) if steady(pace, usual)]
        return statistics.median(found) if found else None


def launch(contender: Contender, model: str, steps: int) -> Launch:
    """The steps of one launch."""
    seq, batch = WORKLOAD[contender.model]
    sequences = batch * RANKS
    if contender.strategy == "tp":
        # One replica does what two do: as many sequences per step.
        batch = sequences
    with tempfile.TemporaryDirectory() as path:
        words = [
            "run", "--model", model, "--strategy", contender.strategy, "--nproc-per-node", RANKS, "--precision", "fp32",
            "--seq-len", seq, "--micro-batch", batch, "--steps", steps, "--warmup", 3, "--quiet", "--format", "json",
            "--pin", "-o", f"{path}/run", *(["--twin"] if contender.twin else []),
        ]  # fmt: skip
        command = [sys.executable, "-m", "rtp_sim", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads(done.stdout)
    times = tuple(t / 1e9 for t in result["step_times_ns"])
    return Launch(times, tuple(result["pace_ns"][-len(times) :]))


def in_turn(contenders: list[Contender], model: str, launches: int, steps: int) -> dict[Contender, list[float]]:
    """Medians of launches of all, one of each at a time; of all steps where none was at the usual pace."""
    found: dict[Contender, list[Launch]] = {c: [] for c in contenders}
    for _ in range(launches):
        for contender in contenders:
            found[contender].append(launch(contender, model, steps))
    usual = usual_ns([pace for mine in found.values() for one in mine for pace in one.pace_ns])
    medians = {c: [m for one in mine if (m := one.median_s(usual)) is not None] for c, mine in found.items()}
    return {c: medians[c] or [statistics.median(one.times_s) for one in found[c]] for c in contenders}


def pairs(model: str, strategies: list[str]) -> Iterator[list[Contender]]:
    """What is set beside what."""
    for strategy in strategies:
        if strategy == "rtp":
            yield [Contender(model, "rtp", False), Contender(model, "fsdp", False)]
        else:
            yield [Contender(model, strategy, False), Contender(model, strategy, True)]


def predicted(contender: Contender, model: str, profile: str) -> float:
    """The simulator's step, in seconds."""
    seq, batch = WORKLOAD[contender.model]
    request = Request(model, profile, contender.strategy, gpus=RANKS, micro_batch=batch, seq_len=seq, precision="fp32")
    return simulate(prepare(request)).metrics.step_time_s


def main() -> None:
    """The table, a line per pair."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--models", default="gpt2-tiny,wide")
    parser.add_argument("--strategies", default="ddp,fsdp,tp,rtp")
    parser.add_argument("--profile", help="a profile of this machine (rtp-sim calibrate), for what the simulator says")
    a = parser.parse_args()
    begun, busy = time.monotonic(), busy_core_s()
    print(f"{'model':10} {'pair':22} {'first':>18} {'second':>18} {'first/second':>13} {'simulated':>10}")
    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide.json"
        wide.write_text(json.dumps(WIDE), encoding="utf-8")
        for name in a.models.split(","):
            model = str(wide) if name == "wide" else name
            for first, second in pairs(name, a.strategies.split(",")):
                times = in_turn([first, second], model, a.launches, a.steps)
                medians = [statistics.median(times[c]) for c in (first, second)]
                spread = [f"{1e3 * min(times[c]):.0f}-{1e3 * max(times[c]):.0f}" for c in (first, second)]
                shown = [f"{1e3 * m:.1f} ({s}) ms" for m, s in zip(medians, spread, strict=True)]
                says = ""
                if a.profile and first.strategy == "rtp":
                    says = f"{predicted(first, model, a.profile) / predicted(second, model, a.profile):.2f}"
                pair = f"{first.name} / {second.name}"
                print(f"{name:10} {pair:22} {shown[0]:>18} {shown[1]:>18} {medians[0] / medians[1]:13.2f} {says:>10}",
                      flush=True)  # fmt: skip
    after = busy_core_s()
    if busy is not None and after is not None:
        own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        cores = (time.monotonic() - begun) * (os.cpu_count() or 1)
        print(f"other programs took {max(0.0, after - busy - own) / cores:.1%} of the cores meanwhile")


if __name__ == "__main__":
    main()
