"""How many devices, how long and how much money a training run takes: the smallest number of nodes of each cluster that
holds the deadline and the budget.

Numbers of nodes are doubled until a plan is fast enough, then the gap below is halved a few times. The step is the same
everywhere (the global batch), so time is tokens over tokens per second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rtp_sim.errors import InputError
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.hardware.spec import Cluster
from rtp_sim.planner.answer import row_of
from rtp_sim.planner.money import SECONDS_PER_HOUR, kilowatts, usd_per_second
from rtp_sim.planner.plan import Row, row_json
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Question

HALVINGS = 3
"""How often the gap between too few and enough nodes is halved."""

CAPACITY_SCHEMA = "rtp-sim/capacity/1"


@dataclass(frozen=True, slots=True)
class Need:
    """What the run must do: tokens, seconds at most, USD at most (None: no such limit)."""

    tokens: float
    deadline_s: float | None
    budget_usd: float | None

    @property
    def tokens_per_s(self) -> float | None:
        """What the deadline asks for."""
        return None if self.deadline_s is None else self.tokens / self.deadline_s


@dataclass(frozen=True, slots=True)
class Offer:
    """What one cluster can do: the plan on the number of nodes that was chosen, and what the whole run takes. `why`
    says what it misses, "" if nothing."""

    cluster: str
    nodes: int
    gpus: int
    row: Row | None
    seconds: float | None
    usd: float | None
    kwh: float | None
    why: str


def offers(question: Question, names: Sequence[str], need: Need, most_nodes: int) -> list[Offer]:
    """One offer per cluster, those that hold everything first, the cheapest (then fastest) of these first."""
    found = [_offer(question, name, need, most_nodes) for name in names]
    return sorted(found, key=_merit)


def _merit(offer: Offer) -> tuple[bool, bool, float, float]:
    return bool(offer.why), offer.usd is None, offer.usd or 0.0, offer.seconds or float("inf")


def _offer(question: Question, name: str, need: Need, most_nodes: int) -> Offer:
    """The fewest nodes that are fast enough; without a deadline, that fit."""
    tried: dict[int, Offer] = {}
    few = 0
    for nodes in _doubled(most_nodes):
        try:
            tried[nodes] = _on(question, load_cluster(name, nodes), need)
        except InputError as error:
            return _best_try(tried, Offer(name, nodes, 0, None, None, None, None, str(error)))
        if tried[nodes].row is not None:
            break
        few = nodes
    enough = max(tried)
    if tried[enough].row is None:
        return tried[enough]
    for _ in range(HALVINGS):
        middle = (few + enough) // 2
        if middle in (few, enough) or middle == 0:
            break
        tried[middle] = _on(question, load_cluster(name, middle), need)
        few, enough = (middle, enough) if tried[middle].row is None else (few, middle)
    return tried[enough]


def _best_try(tried: dict[int, Offer], last: Offer) -> Offer:
    """What is said of a cluster that cannot have more nodes."""
    return tried[max(tried)] if tried else last


def _doubled(most: int) -> Iterator[int]:
    nodes = 1
    while nodes < most:
        yield nodes
        nodes *= 2
    yield most


def _on(question: Question, cluster: Cluster, need: Need) -> Offer:
    """The best plan on this many nodes that holds the deadline, and its cost."""
    asked = replace(question, clusters=(cluster,), top=1, front=False, min_tokens_per_s=need.tokens_per_s)
    searched = search(asked)
    site = searched.sites[0]
    size = cluster.name, cluster.nodes, cluster.world_size
    if not searched.best:
        return Offer(*size, None, None, None, None, _why_not(need, bool(site.fits.any())))
    row = row_of(searched, searched.lines[0], rank=1)
    # The step is the global batch, so it takes a known number of steps.
    steps = need.tokens / (question.workload.global_batch * searched.network.seq)
    seconds = steps * searched.lines[0].metrics.step_time_s
    rate, power = usd_per_second(site.machine), kilowatts(site.machine)
    usd = None if rate is None else rate * seconds
    kwh = None if power is None else power * seconds / SECONDS_PER_HOUR
    why = ""
    if need.budget_usd is not None and usd is not None and usd > need.budget_usd:
        why = f"costs {usd:,.0f} USD of {need.budget_usd:,.0f}"
    if need.budget_usd is not None and usd is None:
        why = f"no price is known: give --price-per-gpu-hour {cluster.name}=USD"
    return Offer(*size, row, seconds, usd, kwh, why)


def _why_not(need: Need, fits: bool) -> str:
    if not fits:
        return "does not fit into memory"
    return f"no plan reaches the {need.tokens_per_s:,.0f} tokens/s of the deadline"


def offer_json(offer: Offer) -> dict[str, Any]:
    """An offer as plain JSON types."""
    return asdict(replace(offer, row=None)) | {"row": None if offer.row is None else row_json(offer.row)}
