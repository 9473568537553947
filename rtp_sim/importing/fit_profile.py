"""Samples into a draft: the node's links and latencies first, then NICs and the steps between nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import median

from rtp_sim.cost.communication import CommunicationCost
from rtp_sim.errors import InputError
from rtp_sim.executor.calibrate.residuals import Residual, predicted_ns
from rtp_sim.executor.calibrate.samples import SHIFT, quantile
from rtp_sim.hardware.spec import Cluster, Number
from rtp_sim.importing.draft import COUNTED, NIC, NVLINK, Draft
from rtp_sim.importing.fit_node import MESSAGE, RING, Move, NodeFit, fit_node
from rtp_sim.importing.samples import Imported

ZERO, ONE = Number(0, "assumed", "left out"), Number(1, "assumed", "left out")
BETWEEN_ROUNDS, BISECTIONS = 3, 14
MOST_BYTES_S, TOO_SLOW = 1e12, 0.05
TOO_QUICK = (
    "The runs on several nodes were quicker than the algorithms of the model can be on the fastest network (reduction "
    "in the switches across nodes is not modelled), so the NICs' rate could not be fitted."
)
SMALL_BYTES, TELLING_BYTES, LARGE_BYTES = 64 << 10, 16 << 20, 256 << 20
"""Up to the first, latency is all that counts; from the second on, an all-reduce shows whether the switch reduced; from
the third on, the rate is all that counts, also between nodes."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The draft with what was measured, and what is left between it and the measurements, by group of samples."""

    draft: Draft
    predicted_ns: tuple[float, ...]
    residuals: Mapping[str, Residual]


def fit(draft: Draft, samples: Sequence[Imported]) -> Fitted:
    """Fits everything that the samples speak of. InputError for several nodes without NICs."""
    inside = [s for s in samples if s.nodes == 1]
    between = [s for s in samples if s.nodes > 1]
    if between and not draft.tree.nics:
        raise InputError(
            f"{between[0].source}: ran on {between[0].nodes} nodes, but the topology lists no NICs; expected the "
            "output of nvidia-smi topo -m on one of those nodes"
        )
    if inside:
        draft = _with_node(draft, inside, _source(inside))
    if between:
        draft = _with_network(draft, between, _source(between))
    predicted = _predicted(draft, samples)
    left = _residuals(samples, predicted)
    # What is left is only known now; it belongs into the sources of the numbers.
    return Fitted(draft.with_sources(lambda text: _stated(text, left)), tuple(predicted), left)


def _source(samples: Sequence[Imported]) -> str:
    groups = ", ".join(f"<{group}>" for group in dict.fromkeys(s.group for s in samples))
    files = ", ".join(dict.fromkeys(s.source for s in samples))
    return f"fit of nccl-tests ({files}): {groups}"


def _stated(text: str, left: Mapping[str, Residual]) -> str:
    """The source with what is left beside every group that it names."""
    for group, residual in left.items():
        text = text.replace(f"<{group}>", f"{group} ({residual})")
    return text


def _predicted(draft: Draft, samples: Sequence[Imported]) -> list[float]:
    clusters: dict[tuple[int, int], tuple[Cluster, CommunicationCost]] = {}
    found = []
    for s in samples:
        key = s.nodes, s.sample.ranks
        if key not in clusters:
            cluster = draft.cluster(*key)
            clusters[key] = cluster, CommunicationCost(cluster)
        cluster, cost = clusters[key]
        if s.sample.kind == SHIFT:
            found.append(predicted_ns(cluster, s.sample))
        else:
            ranks = tuple(range(s.sample.ranks))
            found.append(cost.alone_ns(cost.collective(s.sample.kind, ranks, s.sample.size_bytes, "fp32")))
    return found


def _residuals(samples: Sequence[Imported], predicted: Sequence[float]) -> dict[str, Residual]:
    errors: dict[str, list[float]] = {}
    for s, ns in zip(samples, predicted, strict=True):
        errors.setdefault(s.group, []).append(abs(ns / s.time_ns - 1))
    return {group: Residual(len(e), median(e), quantile(e, 0.9)) for group, e in errors.items()}


# ---- inside a node


def _with_node(draft: Draft, samples: Sequence[Imported], source: str) -> Draft:
    reference, kinds = _reference(draft)
    clusters = {n: reference.cluster(1, n) for n in {s.sample.ranks for s in samples}}
    moves = [_move(clusters[s.sample.ranks], s) for s in samples]
    used = _kinds_used(clusters[max(clusters)], kinds)
    least = _reduced_in_switch(draft, samples, moves)
    switch_only = False
    if least is not None:
        moves = [
            replace(m, switch_raw_ns=_port_ns(draft, s))
            if s.sample.kind == "all_reduce" and s.sample.ranks >= least
            else m
            for m, s in zip(moves, samples, strict=True)
        ]
        switch_only = not any(m.way == RING and m.switch_raw_ns is None and m.raw_ns > 0.3 * m.time_ns for m in moves)
    found = fit_node(moves, switch_only)
    draft = _node_figures(draft, found, used, source)
    return _with_switch(draft, found, source, least) if least is not None else _without_switch(draft, samples)


def _reference(draft: Draft) -> tuple[Draft, Mapping[str, str]]:
    """The draft with links at their raw rate and without any latency, and the kind of each class of links."""
    for name in draft.links:
        if name != NIC:
            draft = draft.with_link(name, efficiency=ONE, latency=ZERO)
    plain = draft.with_communication(
        p2p_base_ns=ZERO, p2p_efficiency=ONE, collective_base_ns=ZERO, collective_step_intra_ns=ZERO,
        algorithms=("ring",), size_curve=(), size_curve_provenance=None,
    )  # fmt: skip
    return plain, {name: link.kind for name, link in draft.links.items() if name != NIC}


def _move(cluster: Cluster, s: Imported) -> Move:
    kind, ranks, size = s.sample.kind, s.sample.ranks, s.sample.size_bytes
    steps = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    return Move(MESSAGE if kind == SHIFT else RING, steps, size, predicted_ns(cluster, s.sample), s.time_ns)


def _kinds_used(cluster: Cluster, kinds: Mapping[str, str]) -> list[str]:
    """The classes of links that a ring of all ranks crosses."""
    ranks = tuple(range(cluster.world_size))
    (phase,) = CommunicationCost(cluster).collective("all_gather", ranks, 1 << 20, "fp32")
    crossed = {cluster.topology.links[link].kind for link in phase.usage}
    return [name for name, kind in kinds.items() if kind in crossed]


def _reduced_in_switch(draft: Draft, samples: Sequence[Imported], moves: Sequence[Move]) -> int | None:
    """The smallest group whose all-reduce was quicker than a ring can be on these links: the switch reduced (NVLink
    SHARP). None where none was."""
    if not draft.tree.switch_links:
        return None
    quick = [s.sample.ranks for s, m in zip(samples, moves, strict=True)
             if s.sample.kind == "all_reduce" and m.time_ns < m.raw_ns]  # fmt: skip
    return min(quick, default=None)


def _port_ns(draft: Draft, s: Imported) -> float:
    return s.sample.size_bytes / draft.links[NVLINK].bandwidth.value * 1e9


def _node_figures(draft: Draft, found: NodeFit, used: Sequence[str], source: str) -> Draft:
    for name in draft.links:
        if name != NIC:
            draft = draft.with_link(name, latency=COUNTED)
    if found.ring_factor is not None:
        for name in used:
            draft = _with_rate(draft, name, 1 / found.ring_factor, source)
    figures: dict[str, object] = {}
    if found.ring_factor is not None or found.switch_factor is not None:
        together = "" if found.told_apart else "; NCCL 2.28 tuning table (as quoted in public notes), ring LL"
        figures["collective_base_ns"] = Number(found.base_ns, "measured" if found.told_apart else "vendor",
                                               source if found.told_apart else together[2:])  # fmt: skip
        figures["collective_step_intra_ns"] = Number(
            found.step_ns,
            "measured",
            source + ("" if found.told_apart else "; all that small messages take beyond the base"),
        )
    if found.message_base_ns is not None:
        figures["p2p_base_ns"] = Number(found.message_base_ns, "measured", source)
        if found.ring_factor is not None and found.message_factor is not None:
            ratio = min(1.0, found.ring_factor / found.message_factor)
            figures["p2p_efficiency"] = Number(ratio, "measured", f"sendrecv over collectives, {source}")
        elif found.message_factor is not None:
            for name in used:
                draft = _with_rate(draft, name, 1 / found.message_factor, f"sendrecv alone, {source}")
            figures["p2p_efficiency"] = Number(1.0, "measured", f"the links state what sendrecv reaches; {source}")
    if found.curve:
        figures["size_curve"] = found.curve
        figures["size_curve_provenance"] = Number(len(found.curve), "measured", source)
    else:
        figures |= {"size_curve": (), "size_curve_provenance": None}
    return draft.with_communication(**figures)


def _with_rate(draft: Draft, name: str, efficiency: float, source: str) -> Draft:
    """The class of links with what was reached; more than its rate by the book means that the book was wrong."""
    if efficiency <= 1:
        return draft.with_link(name, efficiency=Number(efficiency, "measured", source))
    raw = draft.links[name].bandwidth
    return draft.with_link(
        name, bandwidth=Number(raw.value * efficiency, "measured", f"more than the {raw.source} say; {source}"),
        efficiency=Number(1.0, "measured", "the bandwidth itself is the measured one"),
    )  # fmt: skip


def _without_switch(draft: Draft, samples: Sequence[Imported]) -> Draft:
    """No reduction in the switch where large all-reduces of groups that should have used it were measured, and did
    not."""
    p = draft.communication
    lent = p.in_switch_reduction_min_ranks
    if lent is None or not any(
        s.sample.kind == "all_reduce" and s.sample.ranks >= lent.value and s.sample.size_bytes >= TELLING_BYTES
        for s in samples
    ):
        return draft
    return draft.with_communication(
        algorithms=tuple(a for a in p.algorithms if a != "in-switch"), in_switch_reduction_min_ranks=None,
        in_switch_base_ns=None, in_switch_efficiency=None,
    )  # fmt: skip


def _with_switch(draft: Draft, found: NodeFit, source: str, least: int) -> Draft:
    """Reduction in the switch as measured."""
    p = draft.communication
    if found.switch_factor is None:
        return draft
    return draft.with_communication(
        algorithms=tuple(dict.fromkeys((*p.algorithms, "in-switch"))),
        in_switch_reduction_min_ranks=Number(least, "measured", f"all_reduce above the links' rate; {source}"),
        in_switch_base_ns=Number(found.start_ns, "measured", source),
        in_switch_efficiency=Number(
            min(1.0, 1 / found.switch_factor), "measured", f"S / time over the port's rate; {source}"
        ),
    )  # fmt: skip


# ---- between nodes


def _with_network(draft: Draft, samples: Sequence[Imported], source: str) -> Draft:
    """NICs' rate and the step between nodes: each in turn so that the median of what it governs is met."""
    collectives = [s for s in samples if s.sample.kind != SHIFT]
    small = [s for s in collectives if s.sample.size_bytes <= SMALL_BYTES]
    of_rate = collectives or list(samples)
    largest = max(s.sample.size_bytes for s in of_rate)
    large = [s for s in of_rate if s.sample.size_bytes >= min(LARGE_BYTES, largest)]
    given = draft.links[NIC].bandwidth.value

    def trial(rate: float, step_ns: float) -> Draft:
        made = draft.with_link(
            NIC, bandwidth=Number(rate, "measured", f"{source}; median of the large messages"),
            efficiency=Number(1.0, "measured", "the bandwidth itself is the measured one"),
        )  # fmt: skip
        if small:
            made = made.with_communication(
                collective_step_inter_ns=Number(step_ns, "measured", f"{source}; median of the small messages")
            )
        return made

    def ratio(made: Draft, of: Sequence[Imported]) -> float:
        return median(p / s.time_ns for p, s in zip(_predicted(made, of), of, strict=True))

    def step_at(rate: float) -> float:
        return _bisect(lambda ns: ratio(trial(rate, ns), small), 10, 1e6, rising=True) if small else 0.0

    def rate_at(step_ns: float) -> float:
        return _bisect(lambda x: ratio(trial(x, step_ns), large), 1e8, MOST_BYTES_S, rising=False)

    step, rate = step_at(given), given
    if ratio(trial(MOST_BYTES_S, step), large) > 1 + TOO_SLOW:
        # A rate that no NIC has would be no measurement of NICs.
        made, links = trial(rate, step), draft.links[NIC]
        made = made.with_link(NIC, bandwidth=links.bandwidth, efficiency=links.efficiency)
        return replace(made, notes=(*made.notes, TOO_QUICK))
    for _ in range(BETWEEN_ROUNDS):
        rate = rate_at(step)
        step = step_at(rate)
    return trial(rate, step)


def _bisect(ratio: Callable[[float], float], low: float, high: float, rising: bool) -> float:
    """Where the ratio is 1, or the end that comes nearest. Halves the range of magnitudes."""
    for _ in range(BISECTIONS):
        middle = sqrt(low * high)
        if (ratio(middle) < 1) == rising:
            low = middle
        else:
            high = middle
    return sqrt(low * high)
