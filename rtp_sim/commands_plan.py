"""`rtp-sim plan`: which layout, how many partitions, on which of the machines."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.planner.answer import make_plan
from rtp_sim.planner.capacity import CAPACITY_SCHEMA, Need, offer_json, offers
from rtp_sim.planner.constraints import Limit, parse_limit
from rtp_sim.planner.nearest_miss import Miss, nearest_miss
from rtp_sim.planner.plan import Plan, plan_json
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question, Searched
from rtp_sim.planner.sensitivity import Swing, swings
from rtp_sim.planner.space import DEFAULT_STRATEGIES, EVERY_STRATEGY
from rtp_sim.planner.what_if import break_even, largest_micro_batch, largest_model, longest_sequence
from rtp_sim.planner.workload import Workload, default_batch
from rtp_sim.report.diff_tables import print_grid
from rtp_sim.report.plan_tables import memory_table, offers_table, others_table, plans_table, stages_table
from rtp_sim.report.sensitivity_tables import sensitivity_grid, sensitivity_json
from rtp_sim.report.tables import print_table, write_json
from rtp_sim.text import nearest


def plan(a: Namespace) -> int:
    """The best plans for a workload. Exit code 1 if none fits."""
    _check_outputs(a)
    question = question_of(a)
    if a.tokens is not None:
        return _capacity(a, question)
    searched = search(question, lambda message: _progress(a, message))
    found = make_plan(searched)
    if not found.shown:
        miss = nearest_miss(searched)
        _write_files(a, replace(found, notes=(*found.notes, *_miss_words(miss))))
        _print_miss(a, found, miss)
        return 1
    hangs = list(swings(searched, lambda message: _progress(a, message))) if a.sensitivity else []
    more = _what_if(a, question, searched)
    _write_files(a, found, hangs, _what_if_words(more))
    if a.format == "json":
        write_json(plan_json(found) | more | ({"sensitivity": sensitivity_json(hangs)} if a.sensitivity else {}))
    else:
        _print_plan(found)
        for sentence in _what_if_words(more):
            print(f"\n{sentence}")
        if a.sensitivity:
            print_grid(sensitivity_grid(found, hangs))
    return 0


def _what_if(a: Namespace, question: Question, searched: Searched) -> dict[str, Any]:
    """The answers to what else was asked, as JSON types."""
    found: dict[str, Any] = {}
    if a.break_even:
        key, *names = a.break_even.split(":")
        pair = names[0].split(",") if len(names) == 1 else []
        if len(pair) != 2:
            raise InputError(f"--break-even {a.break_even}: expected NUMBER:A,B, as in link.ib.bandwidth:rtp,fsdp")
        _progress(a, f"break-even of {' and '.join(_strategies(names[0]))}")
        found["break_even"] = asdict(break_even(question, key, *pair))
    if a.largest:
        _progress(a, f"largest {a.largest}")
        if a.largest in ("model", "layers"):
            largest = largest_model(question, a.largest)
        else:
            largest = longest_sequence(question) if a.largest == "seq-len" else largest_micro_batch(searched)
        found["largest"] = None if largest is None else asdict(largest)
    return found


def _what_if_words(found: Mapping[str, Any]) -> list[str]:
    """The same in sentences."""
    said = []
    if "break_even" in found:
        b = found["break_even"]
        if b["at"] is None:
            said.append(f"break-even: {b['below']} is the faster of the two from {b['low']} to {b['high']} of "
                        f"{b['key']}")  # fmt: skip
        else:
            said.append(f"break-even: above {b['at']} of {b['key']} {b['above']} beats {b['below']} here")
    if "largest" in found:
        g = found["largest"]
        said.append("largest: nothing fits" if g is None else (
            f"largest {g['what']} that fits: {g['means'] or g['value']} ({g['plan']}, "
            f"{g['memory_bytes'] / (1 << 30):.1f} GiB)"
        ))  # fmt: skip
    return said


def _capacity(a: Namespace, question: Question) -> int:
    """Which machine, how many, how long, for how much. Exit code 1 if no cluster can."""
    need = Need(a.tokens, a.deadline, a.budget)
    names = [c.name for c in question.clusters]
    found = offers(question, list(dict.fromkeys(names)), need, a.max_nodes)
    if a.report:
        from rtp_sim.report.capacity_html import write_capacity_report

        write_capacity_report(a.report, question.workload, need, found)
        _progress(a, f"wrote {a.report}")
    if a.format == "json":
        write_json({
            "schema": CAPACITY_SCHEMA, "workload": asdict(question.workload), "need": asdict(need),
            "offers": [offer_json(offer) for offer in found],
        })  # fmt: skip
    else:
        print_table(offers_table(found))
        print(f"note: {need.tokens:g} tokens in steps of {question.workload.global_batch} sequences; no restarts, no "
              f"evaluation, all GPUs busy all the time")  # fmt: skip
    return 0 if any(not offer.why for offer in found) else 1


def question_of(a: Namespace) -> Question:
    """What the flags ask. InputError for what makes no sense."""
    batch = a.global_batch
    if batch is None:
        if a.tokens is None:
            raise InputError("--global-batch is missing: expected the sequences of a step, for example 512")
        batch = default_batch(a.seq_len)
    workload = Workload(
        model=a.model, global_batch=batch, seq_len=a.seq_len, precision=a.precision, optimizer=a.optimizer,
        attention=a.attention, clip_norm=a.clip_norm, loss_scale=a.loss_scale, dropout=a.dropout,
    )  # fmt: skip
    return Question(
        workload, tuple(_clusters(a)), objective=a.objective, top=a.top, strategies=_strategies(a.strategies),
        limits=tuple(_limits(a)), headroom=a.memory_headroom, min_tokens_per_s=a.min_tokens_per_s,
        prices=tuple(_prices(a.price_per_gpu_hour).items()), processes=a.jobs,
        variants=a.variants,
    )  # fmt: skip


def _clusters(a: Namespace) -> Iterator[Cluster]:
    """Every cluster with every number of nodes (or GPUs) that was given."""
    names = [n.strip() for n in (a.clusters or a.cluster or a.default_cluster).split(",") if n.strip()]
    if a.cluster and a.clusters:
        raise InputError("--cluster and --clusters are both given; expected one of them")
    if a.nodes and a.gpus:
        raise InputError("--nodes and --gpus are both given; expected one of them")
    for name in names:
        for nodes in a.nodes or ([None] if a.gpus else [1]):
            for gpus in a.gpus or [None]:
                yield load_cluster(name, nodes or 1, gpus)


def _strategies(text: str | None) -> tuple[str, ...]:
    if text is None:
        return DEFAULT_STRATEGIES
    names = tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    for name in names:
        if name not in EVERY_STRATEGY:
            raise InputError(f"unknown strategy {name!r}: {nearest(name, EVERY_STRATEGY)}")
    return names or DEFAULT_STRATEGIES


def _limits(a: Namespace) -> Iterator[Limit]:
    """The limits that flags of their own state, then those of --where."""
    for axis in ("tp", "rtp", "fsdp", "dp", "pp", "vpp", "micro-batch"):
        name = axis.replace("-", "_")
        if getattr(a, name):
            yield parse_limit(f"{axis}={','.join(map(str, getattr(a, name)))}")
        if getattr(a, f"max_{name}", None):
            yield parse_limit(f"{axis}<={getattr(a, f'max_{name}')}")
    for axis, given in (("recompute", a.recompute), ("order", a.rank_order), ("dp-sync", a.dp_sync)):
        if given:
            yield parse_limit(f"{axis}={given}")
    for text in a.where:
        yield parse_limit(text)


def _prices(given: list[str]) -> Mapping[str, float]:
    """ "2.5" for every cluster, "dgx-h100=3.9" for one."""
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if not 0 < found[name] < float("inf"):
            raise InputError(f"--price-per-gpu-hour {text!r}: expected USD, or CLUSTER=USD, for example 2.5")
    return found


def _print_plan(plan: Plan) -> None:
    print_table(plans_table(plan, plan.shown))
    print()
    print_table(memory_table(plan.shown))
    extra = [row for row in plan.front if row.rank is None]
    if extra:
        print("\nalso on the Pareto front of time, memory and cost:")
        print_table(plans_table(plan, extra))
    if plan.others:
        print()
        print_table(others_table(plan.others))
    print()
    print_table(stages_table(plan.stages))
    for machine in plan.machines:
        if machine.price_usd_per_gpu_hour is not None:
            print(f"note: {machine.cluster} at {machine.price_usd_per_gpu_hour:g} USD per GPU and hour "
                  f"({machine.price_source})")  # fmt: skip
        if machine.tdp_w is not None:
            print(f"note: energy of {machine.cluster} is {machine.tdp_w:g} W per GPU ({machine.tdp_source}) x time")
    for note in plan.notes:
        print(f"note: {note}")


def _print_miss(a: Namespace, plan: Plan, miss: Miss) -> None:
    if a.format == "json":
        label = None if miss.candidate is None else str(miss.candidate)
        write_json(plan_json(plan) | {
            "nearest_miss": {"label": label, "reason": miss.reason, "remedies": list(miss.remedies)}
        })  # fmt: skip
        return
    print("no plan fits")
    for line in _miss_words(miss):
        print(line)
    print()
    print_table(stages_table(plan.stages))


def _miss_words(miss: Miss) -> Iterator[str]:
    """What came nearest, and what would make it fit."""
    yield f"nearest miss: {miss.candidate}: {miss.reason}" if miss.candidate else f"nearest miss: {miss.reason}"
    yield from (f"would fit {remedy}" for remedy in miss.remedies)
    if not miss.remedies:
        yield "neither a limit lifted nor eight times the nodes makes one fit"


def _check_outputs(a: Namespace) -> None:
    """InputError for files that cannot be written, before any work is done for them."""
    if a.report and not Path(a.report).parent.is_dir():
        raise InputError(f"--report {a.report}: there is no directory {Path(a.report).parent}")
    if a.report and Path(a.report).is_dir():
        raise InputError(f"--report {a.report} is a directory; expected a file name")
    if a.export and Path(a.export).exists() and not Path(a.export).is_dir():
        raise InputError(f"--export {a.export} is a file; expected a directory")


def _write_files(a: Namespace, plan: Plan, hangs: Sequence[Swing] = (), answers: Sequence[str] = ()) -> None:
    """The page and the settings that were asked for."""
    # Imported here: most searches want neither.
    if a.report:
        from rtp_sim.report.plan_html import write_plan_report

        write_plan_report(a.report, plan, sensitivity_grid(plan, hangs) if hangs else None, answers)
        _progress(a, f"wrote {a.report}")
    if a.export:
        from rtp_sim.commands_export import export_plans

        for folder in export_plans(Path(a.export), plan):
            _progress(a, f"wrote {folder}")


def _progress(a: Namespace, message: str) -> None:
    if not a.quiet:
        print(f"rtp-sim: {message}", file=sys.stderr)


