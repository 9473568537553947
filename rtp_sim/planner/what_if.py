"""What if a number were different: where two strategies break even, and what fits at most."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import exp, gcd, log

from rtp_sim.errors import InputError
from rtp_sim.experiment import find_network
from rtp_sim.hardware.profiles import load_cluster, profile_contents
from rtp_sim.model.presets import find_model
from rtp_sim.model.spec import ModelSpec
from rtp_sim.planner.evaluate import evaluate
from rtp_sim.planner.search import search
from rtp_sim.planner.searched import Found, Question, Searched

STEPS = 12
"""Bisections of a break-even point: each halves the ratio of its ends."""

FRACTIONS = ("efficiency",)


# ---- numbers of a profile


def scaled(value: object, factor: float, key: str) -> str | float:
    """A number of a profile times `factor`, in its own unit; a fraction stays at most 1, a slowdown at least 1."""
    if isinstance(value, int | float):
        product = value * factor
        if key.endswith(FRACTIONS):
            return min(1.0, product)
        return max(1.0, product) if key.endswith("slowdown") else product
    found = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*(\S.*)", str(value))
    if not found:
        raise InputError(f"{key}: given {value!r}, expected a number with a unit, for example 25 GB/s")
    return f"{float(found[1]) * factor:.10g} {found[2]}"


def number_at(contents: Mapping[str, object], key: str) -> object:
    """The value of a profile's number by its dotted key (hardware/changes.py). InputError if there is none."""
    head, *rest = key.split(".")
    table: object = contents["device"] if head == "device" else contents["cluster"]
    if head in ("link", "links"):
        table, rest = _links(contents), rest
    elif head != "device":
        rest = [head, *rest]
    for part in rest:
        table = table.get(part) if isinstance(table, dict) else None
    if not isinstance(table, dict) or "value" not in table:
        raise InputError(f"{key}: the profile has no such number; expected one such as device.memory_bandwidth")
    return table["value"]


def _links(contents: Mapping[str, object]) -> dict[str, object]:
    """Link classes by name and by kind (ib is nic)."""
    cluster = contents["cluster"]
    links = cluster.get("links", {}) if isinstance(cluster, dict) else {}
    by_kind = {link["kind"]: link for link in links.values()}
    return {**by_kind, **({"ib": by_kind["nic"]} if "nic" in by_kind else {}), **links}


def with_change(question: Question, key: str, value: object) -> Question:
    """The question on clusters with one number replaced."""
    changed = tuple(load_cluster(c.name, c.nodes, c.world_size, {key: value}) for c in question.clusters)
    return replace(question, clusters=changed)


# ---- break-even


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Where `below` stops and `above` starts to be the faster strategy as a number grows; `at` is None if one of them
    is faster over the whole range from `low` to `high`, and is then `below`."""

    key: str
    below: str
    above: str
    at: str | None
    low: str
    high: str


def break_even(question: Question, key: str, one: str, other: str, factor: float = 8.0) -> BreakEven:
    """The value of a profile's number at which the better of two strategies changes, from 1 / factor of the profile's
    to `factor` times it. Each strategy runs as its best plan at each value. InputError where one of them never fits."""
    contents = profile_contents(question.clusters[0].name)
    value = number_at(contents, key)

    def better(by: float) -> bool:
        """Whether `one` is at least as fast."""
        changed = with_change(question, key, scaled(value, by, key))
        times = [_best_s(changed, name) for name in (one, other)]
        return times[0] <= times[1]

    def text(by: float) -> str:
        return str(scaled(value, by, key))

    low, high = 1 / factor, factor
    first, last = better(low), better(high)
    below, above = (one, other) if first else (other, one)
    if first == last:
        return BreakEven(key, below, above, None, text(low), text(high))
    a, b = log(low), log(high)
    for _ in range(STEPS):
        middle = (a + b) / 2
        a, b = (middle, b) if better(exp(middle)) == first else (a, middle)
    return BreakEven(key, below, above, text(exp((a + b) / 2)), text(low), text(high))


def _best_s(question: Question, strategy: str) -> float:
    searched = search(replace(question, strategies=(strategy,), top=1, front=False, objective="time", simulate=False))
    if not searched.best:
        raise InputError(f"break-even: {strategy} has no plan that fits on {question.clusters[0].world_size} GPUs of "
                         f"{question.clusters[0].name}")  # fmt: skip
    return searched.best[0].metrics.step_time_s


# ---- what fits at most


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest value of `what` for which a plan fits; `next_value` no longer does (None: not looked for). `means`
    says in words what the value is, where that is more than a number."""

    what: str
    value: int
    plan: str
    memory_bytes: int
    next_value: int | None
    means: str = ""


def longest_sequence(question: Question, step: int = 256) -> Largest | None:
    """The longest sequence, in multiples of `step`, for which a plan fits; None if not even the first does."""

    def fits(value: int) -> Found | None:
        return _fitting(replace(question, workload=replace(question.workload, seq_len=value)))

    return _largest("seq-len", fits, step)


def largest_model(question: Question, what: str) -> Largest | None:
    """The largest model like that of the workload for which a plan fits. As "layers" it grows in blocks alone; as
    "model" in heads, with hidden size, MLP and blocks in proportion (the shape of a head and the share of key/value
    heads stay). The value is the number of blocks or of heads. None if not even the smallest fits; InputError for a
    list of layers."""
    workload = question.workload
    spec = find_model(workload.model)
    unit = gcd(spec.num_heads, spec.num_kv_heads)
    step = 1 if what == "layers" else spec.num_heads // unit

    def sized(value: int) -> ModelSpec:
        return replace(spec, num_layers=value) if what == "layers" else _in_proportion(spec, value)

    def fits(value: int) -> Found | None:
        network = find_network(sized(value), workload.seq_len, workload.attention, workload.dropout)
        return _fitting(replace(question, network=network))

    found = _largest(what, fits, step)
    if found is None:
        return None
    model = sized(found.value)
    return replace(found, means=f"{model.num_layers} blocks, hidden size {model.hidden_size}, {model.num_heads} heads, "
                   f"{model.parameter_count() / 1e9:.2f}B parameters")  # fmt: skip


def _in_proportion(spec: ModelSpec, heads: int) -> ModelSpec:
    """The model with so many heads."""

    def share(number: int) -> int:
        return max(1, round(number * heads / spec.num_heads))

    return replace(
        spec, num_heads=heads, num_kv_heads=share(spec.num_kv_heads), hidden_size=share(spec.hidden_size),
        ffn_hidden_size=share(spec.ffn_hidden_size), num_layers=share(spec.num_layers),
    )  # fmt: skip


def _fitting(question: Question) -> Found | None:
    """The plan with the least memory, if it fits."""
    try:
        searched = search(replace(question, top=1, front=False, objective="memory", simulate=False))
    except InputError:
        return None
    return searched.best[0] if searched.best else None


def _largest(what: str, fits: Callable[[int], Found | None], step: int) -> Largest | None:
    best, size = fits(step), 1
    if best is None:
        return None
    found: tuple[int, Found] = (1, best)
    while size < 1 << 14:
        more = fits(2 * size * step)
        if more is None:
            break
        size, found = 2 * size, (2 * size, more)
    low, high = size, 2 * size
    while high - low > 1:
        middle = (low + high) // 2
        more = fits(middle * step)
        low, high = (middle, high) if more is not None else (low, middle)
        found = (middle, more) if more is not None else found
    metrics = found[1].metrics
    plan = f"{metrics.strategy} {metrics.layout}"
    return Largest(what, found[0] * step, plan, metrics.peak_memory_bytes, high * step)


def largest_micro_batch(searched: Searched) -> Largest | None:
    """The largest micro-batch of any candidate of a search that fits, on its first machine."""
    site = searched.sites[0]
    places = sorted(range(len(site.space)), key=lambda p: (-int(site.space.micro_batch[p]), float(site.lower_s[p]), p))
    for place in places:
        if not site.fits[place]:
            continue
        candidate = site.space.candidate(place)
        metrics, _ = evaluate(searched.question.workload, candidate, site.cluster, searched.network, site.model)
        if metrics.peak_memory_bytes <= site.machine.allowed_bytes:
            return Largest("micro-batch", candidate.micro_batch, str(candidate), metrics.peak_memory_bytes, None)
    return None
