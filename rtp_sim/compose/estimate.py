"""`estimate`: the metrics of a step without simulating every layer and micro-batch of it.

A pipeline is composed of stretches (pipeline.py). Any other step repeats its micro-batches and its blocks: it is
simulated with few of each, and what is found is a straight line in both numbers from there on. How far the straight
lines carry is measured in tests/test_compose_estimate.py; where the numbers are small anyway the step is simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rtp_sim.compose.composition import Composition, composition
from rtp_sim.compose.landmarks import Held, highest, landmarks, repeated
from rtp_sim.compose.lockstep import Lockstep, in_lockstep
from rtp_sim.compose.memory import StageMemory
from rtp_sim.compose.passes import in_passes, stands
from rtp_sim.compose.pipeline import StageResult, Walked, walked
from rtp_sim.compose.steady import Gone, in_rounds
from rtp_sim.engine.fold import Folds
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, Setting, built, run, settle, usable_memory_bytes
from rtp_sim.hardware.spec import Cluster
from rtp_sim.metrics import NS_PER_S, StepMetrics, peak_memory_rank
from rtp_sim.model.layers import Layer
from rtp_sim.model.network import Block, Network
from rtp_sim.schedule.build import step_meta
from rtp_sim.schedule.ir import CATEGORIES
from rtp_sim.schedule.pipeline_order import PIPELINES

PASSES = "simulated, passes of micro-batches in a few ops each"
FEW_BLOCKS = (6, 12)
FEW_MICROS = (2, 3)


@dataclass(frozen=True)
class Estimate:
    """`how` says what the metrics rest on: "simulated", "composed", or what was simulated instead. Of a composed step
    the share of measured prices is not known, and messages between stages count as bubble, not as communication.
    `host_s` is how long kernels waited for nothing but the host to issue them; None from the events. `memory` is that
    of each stage, of which there is one without a pipeline."""

    metrics: StepMetrics
    extrapolated: bool
    how: str
    host_s: float | None = None
    memory: tuple[StageMemory, ...] = ()


def estimate(
    request: Request | Setting, cluster: Cluster | None = None, network: Network | None = None, engine: str = "simpy",
    folds: Folds | None = None, alike: bool = False,
) -> Estimate:  # fmt: skip
    """The metrics of a request, or of one that is looked up already; `engine` is one of `experiment.ENGINES` or
    "lockstep" (lockstep.py). InputError as `experiment.prepare`. `folds` spares estimates of one cost model after each
    other what they have in common. With `alike` the ranks of a pipeline's stage are taken to behave alike
    (engine/fold.py)."""
    setting = request if isinstance(request, Setting) else settle(request, cluster, network)
    if setting.request.strategy in PIPELINES:
        if setting.request.slow_gpus:
            raise InputError("slow GPUs: a composed pipeline takes all ranks of a stage to be equal; expected --engine "
                             "simpy or longest-path with them")  # fmt: skip
        made = composition(setting, slowdown=engine != "longest-path", folds=folds, alike=alike)
        return composed(made, walked(made).stages)
    blocks = len(repeated(setting.network))
    micros = setting.training.num_microbatches
    few_blocks = FEW_BLOCKS if blocks > FEW_BLOCKS[1] + 2 and not setting.request.options.eval_passes else (blocks,)
    few_micros = FEW_MICROS if micros > FEW_MICROS[1] else (micros,)
    if few_blocks == (blocks,) and few_micros == (micros,):
        whole = _run(setting, engine, folds)
        return Estimate(whole.metrics, False, "simulated", whole.host_s, _memory(whole, whole.metrics))
    rows = [[_simulated(setting, b, m, engine, folds) for m in few_micros] for b in few_blocks]
    metrics = _over_both([[run.metrics for run in row] for row in rows], few_blocks, blocks, few_micros, micros)
    metrics = _with_peak(metrics, [[run.landmarks for run in row] for row in rows], few_blocks, blocks, few_micros,
                         micros)  # fmt: skip
    host = [[run.host_s for run in row if run.host_s is not None] for row in rows]
    host_s = None
    if all(host):
        host_s = max(0.0, _line(few_blocks, [_line(few_micros, row, micros) for row in host], blocks))
    how = f"simulated with {_and(few_blocks)} blocks, {_and(few_micros)} micro-batches"
    return Estimate(with_rates(setting, metrics), True, how, host_s, _memory(rows[-1][-1], metrics))


def _memory(largest: Lockstep, metrics: StepMetrics) -> tuple[StageMemory]:
    """The peak of the whole step, with the moment of the largest that was simulated."""
    moment = largest.memory or StageMemory({})
    return (replace(moment, held=metrics.memory_by_category),)


def _and(numbers: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in numbers[:-1]) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


# ---- fewer of what repeats


def _run(setting: Setting, engine: str, folds: Folds | None) -> Lockstep:
    if engine == "lockstep":
        return in_lockstep(setting)
    found = run(built(setting), engine, folds=folds)
    rank = peak_memory_rank(found.memory)
    marks = landmarks(found.prepared.schedule.program(rank), found.timeline.times(rank), found.memory[rank],
                      repeated(setting.network), setting.training.num_microbatches)  # fmt: skip
    return Lockstep(found.metrics, None, None, marks)


def _simulated(setting: Setting, blocks: int, micros: int, engine: str, folds: Folds | None) -> Lockstep:
    training = replace(setting.training, num_microbatches=micros)
    smaller = replace(setting, network=shortened(setting.network, blocks), training=training)
    return _run(smaller, engine, folds)


def shortened(network: Network, count: int) -> Network:
    """The network with only the first `count` of its repeated blocks; what follows reads the last of these."""
    middle = repeated(network)
    if count >= len(middle):
        return network
    kept, dropped = middle[:count], set(middle[count:])
    renamed = {middle[-1].layers[-1].output: kept[-1].layers[-1].output}

    def reading(layer: Layer) -> Layer:
        return replace(layer, inputs=tuple(renamed.get(t, t) for t in layer.inputs))

    blocks = tuple(b for b in network.blocks if b not in dropped)
    after = blocks.index(kept[-1]) + 1
    rest = tuple(Block(b.name, tuple(reading(x) for x in b.layers), b.recomputable) for b in blocks[after:])
    return replace(network, blocks=(*blocks[:after], *rest))


# ---- straight lines


def _over_both(
    rows: list[list[StepMetrics]], few_blocks: tuple[int, ...], blocks: int, few_micros: tuple[int, ...], micros: int
) -> StepMetrics:
    return _on_line([_on_line(row, few_micros, micros) for row in rows], few_blocks, blocks)


def _line(at: tuple[int, ...], found: list[float], wanted: int) -> float:
    if len(found) == 1:
        return found[0]
    return _linear(found[0], found[1], (wanted - at[0]) / (at[1] - at[0]))


def _on_line(found: list[StepMetrics], at: tuple[int, ...], wanted: int) -> StepMetrics:
    """The metrics at `wanted` on the line through two points; the point itself if there is only one."""
    if len(found) == 1:
        return found[0]
    first, second = found
    factor = (wanted - at[0]) / (at[1] - at[0])
    changes: dict[str, Any] = {
        f.name: _linear(getattr(first, f.name), getattr(second, f.name), factor)
        for f in fields(StepMetrics)
        if isinstance(getattr(first, f.name), int | float) and not isinstance(getattr(first, f.name), bool)
    }
    memory = {c: int(_linear(first.memory_by_category[c], second.memory_by_category[c], factor)) for c in CATEGORIES}
    return replace(second, **changes, memory_by_category=memory)


def _with_peak(
    metrics: StepMetrics, rows: list[list[Mapping[str, Held]]], few_blocks: tuple[int, ...], blocks: int,
    few_micros: tuple[int, ...], micros: int,
) -> StepMetrics:  # fmt: skip
    """With the highest of the landmarks, each on its own line (landmarks.py), where that is more."""
    common = set.intersection(*(set(found) for row in rows for found in row))
    if not common:
        return metrics
    peak = highest({
        name: _line_of(few_blocks, [_line_of(few_micros, [f[name] for f in row], micros) for row in rows], blocks)
        for name in sorted(common)
    })  # fmt: skip
    total = sum(peak.values())
    if total <= metrics.peak_memory_bytes:
        return metrics
    return replace(metrics, peak_memory_bytes=total, memory_by_category=peak)


def _line_of(at: tuple[int, ...], found: list[Held], wanted: int) -> Held:
    if len(found) == 1:
        return found[0]
    return found[0] + (found[1] - found[0]) * ((wanted - at[0]) / (at[1] - at[0]))


def _linear(a: float, b: float, factor: float) -> float:
    value = a + (b - a) * factor
    return round(value) if isinstance(a, int) else value


def with_rates(setting: Setting, metrics: StepMetrics) -> StepMetrics:
    """With what follows from step time and memory for the whole network."""
    meta = step_meta(setting.request.strategy, setting.network, setting.training, setting.layout,
                     setting.request.options)  # fmt: skip
    ranks, step_s = setting.layout.world_size, metrics.step_time_s
    peak = setting.cost.peak_flops_per_s(setting.training.policy.compute_dtype)
    tokens, flops = float(meta["tokens"] or 0), float(meta["model_flops"] or 0)
    return replace(
        metrics, tokens_per_s=tokens / step_s if step_s else None,
        tokens_per_s_per_gpu=tokens / step_s / ranks if step_s else None,
        mfu=flops / (step_s * ranks * peak) if step_s and peak else None,
        fits=metrics.peak_memory_bytes <= usable_memory_bytes(setting.cluster),
    )  # fmt: skip


# ---- pipelines


def composed(made: Composition, stages: list[StageResult], how: str = "composed") -> Estimate:
    """The metrics of a composed step with these stages."""
    waited_s = last_stage(stages).host_ns / NS_PER_S
    return Estimate(_of_stages(made.setting, stages), True, how, waited_s, tuple(s.memory for s in stages))


def by_passes(made: Composition, walk: Walked, folds: Folds | None = None, alike: bool = False) -> Estimate:
    """The metrics of a composed step whose passes are simulated by the events, a few ops each (passes.py); how a
    stage's time splits is that of the composed step. `folds` and `alike` as in `estimate`."""
    from rtp_sim.engine.simulate import simulate

    def simulated(micros: int) -> Gone:
        schedule, cost = in_passes(made.of_length(micros))
        return stands(simulate(schedule, cost, folds=folds, alike=alike), micros)

    lengths = walk.lengths
    if lengths[-1] == made.micros:
        found = simulated(made.micros)
    else:
        found, lengths = in_rounds(simulated, len(made.orders), made.micros)
    late_ns = found.end_ns - last_stage(walk.stages).end_ns
    how = PASSES if lengths[-1] == made.micros else f"{PASSES} ({_and(lengths)} of {made.micros} micro-batches)"
    return composed(made, [replace(stage, end_ns=stage.end_ns + late_ns) for stage in walk.stages], how)


def last_stage(stages: list[StageResult]) -> StageResult:
    """The stage that ends last, the first of several."""
    return max(stages, key=lambda stage: stage.end_ns)


def _of_stages(setting: Setting, stages: list[StageResult]) -> StepMetrics:
    """Times are those of the stage that ends last, memory that of the one with the highest peak."""
    last = last_stage(stages)
    step_ns = last.end_ns
    # What a stretch leaves exposed at rest may find the kernels of another to hide behind.
    exposed_ns = min(last.exposed_ns, step_ns - last.compute_ns)
    highest = max((stage.memory for stage in stages), key=lambda memory: memory.total_bytes)
    metrics = StepMetrics(
        strategy=setting.request.strategy, layout=str(setting.layout), step_time_s=step_ns / NS_PER_S,
        tokens_per_s=None, tokens_per_s_per_gpu=None, mfu=None, peak_memory_bytes=highest.total_bytes,
        memory_by_category=dict(highest.held), fits=False, compute_time_s=last.compute_ns / NS_PER_S,
        exposed_communication_s=exposed_ns / NS_PER_S,
        overlapped_communication_s=max(0, last.communication_ns - exposed_ns) / NS_PER_S,
        bubble_s=max(0, step_ns - last.compute_ns - exposed_ns) / NS_PER_S,
        bytes_sent_per_rank=last.sent_bytes, messages_per_rank=last.messages, cost_provenance={},
    )  # fmt: skip
    return with_rates(setting, metrics)
