"""What each command of the command line does: make requests, run them, print and write the results."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import cpu_count
from pathlib import Path

from rtp_sim.engine.memory import MemoryProfile
from rtp_sim.errors import InputError
from rtp_sim.experiment import Request, Result, Setting, prepare, run, settle, usable_memory_bytes
from rtp_sim.hardware.profiles import list_clusters, list_devices, load_cluster, load_device
from rtp_sim.hardware.spec import Cluster
from rtp_sim.jitter import Spread, jittered, read_noise, spread_json
from rtp_sim.metrics import StepMetrics, peak_memory_rank
from rtp_sim.model.presets import find_model, list_models
from rtp_sim.report.inputs import Row, cluster_rows, device_rows, input_rows
from rtp_sim.report.spread_tables import spread_cells
from rtp_sim.report.tables import (
    compare_json,
    comparison_table,
    print_table,
    simulate_json,
    summary_table,
    write_csv,
    write_json,
)
from rtp_sim.schedule.layout import INNER_AXIS
from rtp_sim.schedule.options import MIB, Options
from rtp_sim.schedule.pipeline_order import PIPELINES
from rtp_sim.schedule.strategies import STRATEGIES
from rtp_sim.text import nearest
from rtp_sim.timeline import Timeline


def compare(a: Namespace) -> int:
    """`rtp-sim compare`: several strategies side by side. Exit code 1 if none fits into memory."""
    strategies = [s.strip() for s in a.strategies.split(",") if s.strip()]
    known_strategies(strategies)
    _check_outputs(a)
    a.cluster = a.cluster or a.default_cluster
    cluster = load_cluster(a.cluster, a.nodes or 1, a.gpus)
    batch = a.global_batch or a.micro_batch * cluster.world_size
    requests = [replace(request_of(a, s), global_batch=batch) for s in strategies]
    jobs = min(a.jobs or cpu_count() or 1, len(requests))
    errors: list[InputError] = []
    outcomes = list(_all_outcomes(requests, a, jobs, errors))
    if not outcomes:
        raise errors[0]
    rows = [o.metrics for o in outcomes]
    if a.format == "json":
        write_json(compare_json(rows, _inputs(a, batch)))
    elif a.format == "csv":
        write_csv(rows)
    else:
        print_table(comparison_table(rows, usable_memory_bytes(cluster)))
        _print_notes(outcomes)
    _write_files(a, requests[0], outcomes, cluster)
    if errors:
        # What could be computed has been shown; what could not is still bad input.
        raise InputError("; ".join(str(e) for e in errors))
    return 0 if any(m.fits for m in rows) else 1


def simulate(a: Namespace) -> int:
    """`rtp-sim simulate`: one strategy. Exit code 1 if it does not fit into memory."""
    known_strategies([a.strategy])
    _check_degrees(a)
    _check_outputs(a)
    _check_jitter(a)
    a.cluster = a.cluster or a.default_cluster
    if a.engine == "estimate":
        return _estimate(a)
    _progress(a, f"building {a.strategy}")
    prepared = prepare(request_of(a, a.strategy))
    _progress(a, f"simulating {prepared.schedule.name} on {prepared.schedule.world_size} GPUs")
    result = run(prepared, a.engine, fold=not a.no_fold)
    found = _jittered(a, result)
    outcome = _outcome(result, True)
    if a.format == "table":
        table = summary_table(result.metrics, usable_memory_bytes(prepared.cluster))
        for cells in spread_cells(found) if found else ():
            table.add_row(*cells)
        print_table(table)
        _print_notes([outcome])
    elif a.format == "json":
        inputs = _inputs(a, int(prepared.schedule.meta["global_batch"] or 0))
        write_json(simulate_json(result.metrics, inputs, spread_json(found) if found else None))
    else:
        write_csv([result.metrics])
    if a.trace:
        from rtp_sim.report.trace import write_chrome_trace

        ranks = _traced_ranks(result.timeline)
        memory = {rank: result.memory[result.timeline.representative_of[rank]] for rank in ranks}
        write_chrome_trace(result.timeline, a.trace, ranks=ranks, memory=memory)
        _progress(a, f"wrote {a.trace}")
    _write_files(a, prepared.request, [outcome], prepared.cluster)
    return 0 if result.metrics.fits else 1


def _jittered(a: Namespace, result: Result) -> Spread | None:
    """The spread of the step time; None without --jitter."""
    if a.jitter is None:
        return None
    _progress(a, f"playing the step {a.samples} times with noise")
    return jittered(result, read_noise(a.jitter), a.samples, a.seed)


def _estimate(a: Namespace) -> int:
    """One strategy without a timeline. Exit code 1 if it does not fit into memory."""
    setting = settle(request_of(a, a.strategy))
    outcome = _estimated(setting)
    if a.format == "table":
        print_table(summary_table(outcome.metrics, usable_memory_bytes(setting.cluster)))
        _print_notes([outcome])
    elif a.format == "json":
        write_json(simulate_json(outcome.metrics, _inputs(a, int(str(outcome.meta["global_batch"])))))
    else:
        write_csv([outcome.metrics])
    return 0 if outcome.metrics.fits else 1


def _estimated(setting: Setting) -> _Outcome:
    # Imported here: only estimates need it.
    from rtp_sim.compose.estimate import estimate
    from rtp_sim.schedule.build import step_meta

    found, options = estimate(setting), setting.request.options
    meta = step_meta(setting.request.strategy, setting.network, setting.training, setting.layout, options)
    notes = [note for note in str(meta["notes"] or "").split("; ") if note]
    return _Outcome(found.metrics, meta, (*notes, f"{setting.request.strategy} was {found.how}"), None, None)


def schedule(a: Namespace) -> int:
    """`rtp-sim schedule`: the program of a rank, or the whole schedule as text or JSON."""
    known_strategies([a.strategy])
    _check_degrees(a)
    if a.cluster is None and a.gpus is None and a.nodes is None and (a.rtp or a.tp or a.fsdp or a.dp or a.pp):
        # A schedule needs ranks, not a machine: the degrees alone say how many.
        a.cluster = f"generic:a100-sxm-80gb,gpus={_degrees(a)},nics=1,nic=200Gb/s"
    a.cluster = a.cluster or a.default_cluster
    built = prepare(request_of(a, a.strategy)).schedule
    if not 0 <= a.rank < built.world_size:
        raise InputError(f"--rank {a.rank}: expected a rank from 0 to {built.world_size - 1}")
    if a.format == "json":
        from rtp_sim.schedule.serialize import to_json

        print(to_json(built))
    elif a.format == "text":
        from rtp_sim.schedule.text import to_text

        print(to_text(built), end="")
    else:
        from rtp_sim.schedule.pretty import program_listing

        print(program_listing(built, a.rank, limit=a.limit), end="")
    return 0


def run_schedule(a: Namespace) -> int:
    """`rtp-sim run`: the schedule on real processes. Exit code 1 if the run fails or does not hold its check."""
    # Imported here: nothing else needs the executor.
    from rtp_sim.commands_run import execute

    known_strategies([a.strategy])
    _check_degrees(a)
    ranks = a.nproc_per_node or _degrees(a)
    if ranks % a.as_nodes:
        raise InputError(
            f"--as-nodes {a.as_nodes} does not divide {ranks} processes; expected a divisor, for example 1"
        )
    # A schedule needs ranks, not a machine: how many there are and how they lie on nodes.
    a.cluster = f"generic:a100-sxm-80gb,gpus={ranks // a.as_nodes},nics=1,nic=200Gb/s"
    a.gpus, a.nodes = None, a.as_nodes
    return execute(a, prepare(request_of(a, a.strategy)))


def export(a: Namespace) -> int:
    """`rtp-sim export`: the plan as settings of frameworks. Exit code 1 if none of them can do it."""
    # Imported here: nothing else needs the exporters.
    from rtp_sim.commands_export import export_plan

    known_strategies([a.strategy])
    _check_degrees(a)
    a.cluster = a.cluster or a.default_cluster
    return export_plan(a, settle(request_of(a, a.strategy)))


def hardware_list(a: Namespace) -> int:
    """`rtp-sim hardware list`."""
    _print_names(a, {"clusters": list_clusters(), "devices": list_devices()})
    return 0


def hardware_show(a: Namespace) -> int:
    """`rtp-sim hardware show NAME`: every number with its source."""
    is_cluster = a.name in list_clusters() or a.name.startswith("generic:")
    if is_cluster or (a.name.endswith(".toml") and a.name not in list_devices()):
        rows = cluster_rows(load_cluster(a.name))
    elif a.name in list_devices():
        rows = device_rows(load_device(a.name))
    else:
        raise InputError(f"unknown hardware {a.name!r}: {nearest(a.name, [*list_clusters(), *list_devices()])}")
    _print_rows_of_numbers(a, rows)
    return 0


def models_list(a: Namespace) -> int:
    """`rtp-sim models list`."""
    _print_names(a, {"models": list(list_models())})
    return 0


def models_show(a: Namespace) -> int:
    """`rtp-sim models show NAME`: architecture and parameter counts."""
    model = find_model(a.name)
    rows: list[Row] = [("Architecture", k, str(v), "", "") for k, v in asdict(model).items()]
    rows += [("Parameters", k, f"{v:,}", "", "") for k, v in model.parameter_breakdown().items() if v]
    rows.append(("Parameters", "total", f"{model.parameter_count():,}", "", ""))
    _print_rows_of_numbers(a, rows)
    return 0


TRACED_RANKS = 8


def _traced_ranks(timeline: Timeline) -> list[int]:
    """The represented ranks, and partners of the first of them up to eight in all, so that messages have two ends."""
    ranks = dict.fromkeys(sorted(timeline.ranks))
    for group in timeline.schedule.groups.values():
        for rank in group.instances[group.place[min(ranks)][0]] if min(ranks) in group.place else ():
            if len(ranks) < TRACED_RANKS:
                ranks[rank] = None
    return sorted(ranks)


def known_strategies(names: Sequence[str]) -> None:
    """InputError for no name at all, or for one that is no strategy."""
    if not names:
        raise InputError(f"--strategies names none; expected some of {', '.join(STRATEGIES)}")
    for name in names:
        if name not in STRATEGIES:
            raise InputError(f"unknown strategy {name!r}: {nearest(name, STRATEGIES)}")


def _check_degrees(a: Namespace) -> None:
    """InputError for a degree of an axis that the strategy does not have."""
    axis = INNER_AXIS.get(a.strategy, "")
    for other in ("rtp", "tp", "fsdp"):
        if other != axis and getattr(a, other) is not None:
            raise InputError(f"strategy {a.strategy} has no --{other} axis: leave --{other} {getattr(a, other)} out")
    if a.strategy not in PIPELINES and a.pp is not None:
        raise InputError(f"strategy {a.strategy} has no --pp axis: leave --pp {a.pp} out")


def _degrees(a: Namespace) -> int:
    """How many ranks the degrees that were given make."""
    return int((a.rtp or a.tp or a.fsdp or 1) * (a.dp or 1) * (a.pp or 1))


def _check_jitter(a: Namespace) -> None:
    """InputError for noise that cannot be understood, or has nothing to act on."""
    if a.jitter is None:
        return
    read_noise(a.jitter)
    if a.engine == "estimate":
        raise InputError("--engine estimate has no timeline for --jitter: leave one of the two out")
    if a.format == "csv":
        raise InputError("--jitter has no columns in --format csv: expected table or json")


def _check_outputs(a: Namespace) -> None:
    """InputError for files that cannot be written, before any work is done for them."""
    for flag in ("report", "trace"):
        if a.engine == "estimate" and getattr(a, flag, None):
            raise InputError(f"--engine estimate has no timeline for --{flag}: leave one of the two out")
    for flag in ("report", "plot", "trace"):
        given = getattr(a, flag, None)
        if given and not Path(given).parent.is_dir():
            raise InputError(f"--{flag} {given}: there is no directory {Path(given).parent}")
        if given and Path(given).is_dir():
            raise InputError(f"--{flag} {given} is a directory; expected a file name")
    if getattr(a, "plot", None):
        from rtp_sim.report.plots import require_plots

        require_plots(a.plot)


def request_of(a: Namespace, strategy: str) -> Request:
    """What the arguments ask for, of one strategy."""
    axis = INNER_AXIS.get(strategy, "")
    inner = {"rtp": a.rtp, "tp": a.tp, "fsdp": a.fsdp}.get(axis)
    return Request(
        model=a.model, cluster=a.cluster, strategy=strategy, gpus=a.gpus, nodes=a.nodes, inner=inner,
        dp=a.dp if axis or a.run != "compare" else None, pp=a.pp if strategy in PIPELINES else None,
        order=a.rank_order, micro_batch=a.micro_batch, seq_len=a.seq_len, global_batch=a.global_batch,
        micro_batches=getattr(a, "micro_batches", None), precision=a.precision, recompute=a.recompute,
        optimizer=a.optimizer, attention=a.attention, clip_norm=a.clip_norm,
        loss_scale=a.loss_scale, dropout=a.dropout, slow_gpus=tuple(getattr(a, "slow_gpu", None) or ()),
        degraded_links=tuple(getattr(a, "degrade_link", None) or ()), options=_strategy_options(a),
    )  # fmt: skip


def _strategy_options(a: Namespace) -> Options:
    return Options(
        ddp_bucket_bytes=a.ddp_bucket_mib * MIB, fsdp_unit=a.fsdp_unit, fsdp_prefetch=not a.no_fsdp_prefetch,
        rtp_fuse_mlp=a.rtp_fuse_mlp, rtp_hide_gradient_hop=a.rtp_hide_gradient_hop, rtp_prefetch=a.rtp_prefetch,
        rtp_chunk_bytes=a.rtp_chunk_mib * MIB, rtp_ring=a.rtp_ring, dp_sync=a.dp_sync, eval_passes=a.eval_passes or 0,
        dp_overlap=not a.no_dp_overlap, sequence_parallel=a.sequence_parallel, vpp=a.vpp, pp_layers=a.pp_layers,
        pp_balance=a.pp_balance, pp_overlap=not a.no_pp_overlap, pp_scatter_gather=a.pp_scatter_gather,
        zero1_size=a.zero1_size or 0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Outcome:
    """What the output needs of a result: light enough to come back from a worker process."""

    metrics: StepMetrics
    meta: Mapping[str, object]
    notes: tuple[str, ...]
    timeline: Timeline | None
    peak_memory: MemoryProfile | None


def _outcome(result: Result, details: bool) -> _Outcome:
    """With `details`, also the timeline and the memory of the rank with the highest peak, for reports."""
    peak = result.memory[peak_memory_rank(result.memory)]
    meta = result.prepared.schedule.meta
    return _Outcome(result.metrics, meta, result.notes, result.timeline if details else None, peak if details else None)


def _one(request: Request, engine: str, fold: bool, details: bool) -> _Outcome:
    if engine == "estimate":
        return _estimated(settle(request))
    return _outcome(run(prepare(request), engine, fold), details)


def _all_outcomes(requests: Sequence[Request], a: Namespace, jobs: int, errors: list[InputError]) -> Iterator[_Outcome]:
    """The outcomes in order, computed on `jobs` processes; requests that make no sense go to `errors` instead."""
    work = [(request, a.engine, not a.no_fold, a.report is not None) for request in requests]
    # Imported here: starting processes is not needed for one strategy.
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(_one, *item) for item in work] if jobs > 1 else []
        for i, item in enumerate(work):
            _progress(a, f"{item[0].strategy} ({i + 1} of {len(work)})")
            try:
                yield futures[i].result() if futures else _one(*item)
            except InputError as error:
                errors.append(error)


def _progress(a: Namespace, message: str) -> None:
    if not a.quiet:
        print(f"rtp-sim: {message}", file=sys.stderr)


def _inputs(a: Namespace, global_batch: int) -> dict[str, object]:
    """What was asked for, as the JSON output repeats it."""
    skip = {"run", "format", "report", "plot", "quiet", "jobs", "trace", "default_cluster"}
    return {k: v for k, v in vars(a).items() if k not in skip} | {"global_batch": global_batch}


def _print_notes(outcomes: Iterable[_Outcome]) -> None:
    """Each note once."""
    for note in dict.fromkeys(note for o in outcomes for note in o.notes):
        print(f"note: {note}")


def _write_files(a: Namespace, request: Request, outcomes: Sequence[_Outcome], cluster: Cluster) -> None:
    rows, usable = [o.metrics for o in outcomes], usable_memory_bytes(cluster)
    if a.report:
        from rtp_sim.report.format import format_shares
        from rtp_sim.report.html import write_report

        write_report(
            a.report, title=f"{outcomes[0].meta['model']} on {cluster.world_size} GPUs of {cluster.name}", rows=rows,
            timelines={o.metrics.strategy: o.timeline for o in outcomes if o.timeline},
            memory={o.metrics.strategy: o.peak_memory for o in outcomes if o.peak_memory},
            inputs=input_rows(request, outcomes[0].meta, cluster),
            provenance={m.strategy: format_shares(m.cost_provenance) for m in rows}, device_memory_bytes=usable,
        )  # fmt: skip
        _progress(a, f"wrote {a.report}")
    if a.plot:
        from rtp_sim.report.plots import plot_comparison

        plot_comparison(rows, a.plot, usable)
        _progress(a, f"wrote {a.plot}")


def _print_names(a: Namespace, names: dict[str, list[str]]) -> None:
    if a.format == "json":
        print(json.dumps(names, indent=2))
        return
    for title, group in names.items():
        print(f"{title}:")
        for name in group:
            print(f"  {name}")


def _print_rows_of_numbers(a: Namespace, rows: Sequence[Row]) -> None:
    if a.format == "json":
        keys = ("section", "name", "value", "kind", "source")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("section", "name", "value", "kind", "source"):
        table.add_column(title, overflow="fold")
    last = ""
    for section, *rest in rows:
        table.add_row(section if section != last else "", *rest)
        last = section
    print_table(table)
