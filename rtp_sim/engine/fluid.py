"""Max-min fair sharing of links among the activities that use them at the same time, in integer arithmetic.

Progressive filling: the rates of all activities grow together until a link is full or an activity reaches its
own cap; what is limited keeps its rate, the rest grows on (Bertsekas & Gallager, Data Networks, section
6.5.2). A link of capacity C that carries total weight W offers each activity C // W. All links and caps that
bind at the same level freeze together, so the answer does not depend on the order in which activities came,
nor on whether symmetric ones are folded into one with a larger weight.

Only the activities connected by shared links to one that started or ended are solved anew, once per
nanosecond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

NS_PER_S = 1_000_000_000
UNBOUNDED = 1 << 100
"""Rate of an activity that nothing limits."""

_WAITING, _ACTIVE, _DONE = range(3)
_MEMO_LIMIT = 50_000


class Timed(Protocol):
    """Something a calendar wakes."""

    def fire(self, now_ns: int) -> None:
        """Called at a time that was asked for; it may no longer matter by then."""


class Clock(Protocol):
    """What the network needs of the event loop."""

    @property
    def now_ns(self) -> int:
        """The present."""

    def at(self, time_ns: int, item: Timed) -> None:
        """Fire `item` at `time_ns`."""

    def when_settled(self, action: Callable[[], None]) -> None:
        """Call `action` at the present nanosecond, after everything else that is due in it so far."""


class Profile:
    """What activities of one shape use: (link, weight) pairs and a cap. Interned: equal profiles are one
    object."""

    __slots__ = ("cap", "index", "network", "solo_rate", "usage", "users")

    def __init__(self, network: Network, index: int, usage: tuple[tuple[int, int], ...], cap: int) -> None:
        self.network = network
        self.index = index
        self.usage = usage
        self.cap = cap
        self.users = tuple(network.users[link] for link, _ in usage)
        self.solo_rate = max(1, min((network.capacity[k] // w for k, w in usage), default=cap))
        self.solo_rate = min(self.solo_rate, cap)


class Activity:
    """Work that flows at a rate the network decides. Subclasses say in `finished` what its end means."""

    __slots__ = ("finish_ns", "join_ns", "profile", "rate", "remaining", "since_ns", "state")

    def __init__(self) -> None:
        self.state = _DONE

    def begin(self, profile: Profile, work: int, join_ns: int) -> None:
        """Let `work` units (bytes) flow from `join_ns`, which is not in the past."""
        self.profile = profile
        self.remaining = work * NS_PER_S
        self.rate = 0
        self.finish_ns = -1
        self.join_ns = join_ns
        self.state = _WAITING
        profile.network.clock.at(join_ns, self)

    def fire(self, now_ns: int) -> None:
        """Join or end, if that is still due now; a time left over from an earlier rate is ignored."""
        if self.state == _ACTIVE:
            if self.finish_ns == now_ns:
                self.state = _DONE
                self.profile.network.leave(self)
                self.finished(now_ns)
        elif self.state == _WAITING and self.join_ns == now_ns:
            if self.remaining and self.profile.solo_rate < UNBOUNDED:
                self.state = _ACTIVE
                self.since_ns = now_ns
                self.profile.network.join(self)
            else:
                self.state = _DONE
                self.finished(now_ns)

    def finished(self, now_ns: int) -> None:
        """Called once when the last byte has passed."""
        raise NotImplementedError


class Network:
    """All links of a run and the activities now on them. `capacity[k]` is link k's bytes/s."""

    def __init__(self, clock: Clock, capacity: Sequence[int]) -> None:
        self.clock = clock
        self.capacity = tuple(capacity)
        self.users: tuple[dict[Activity, None], ...] = tuple({} for _ in capacity)
        self._profiles: dict[tuple[tuple[tuple[int, int], ...], int], Profile] = {}
        self._touched: dict[Activity, None] = {}
        self._solved: dict[tuple[int, ...], dict[int, int]] = {}

    def profile(self, usage: tuple[tuple[int, int], ...], cap_bytes_per_s: int | None) -> Profile:
        """The profile for `usage`, (link, weight) pairs with positive weights, and a cap (None: no cap)."""
        key = (usage, UNBOUNDED if cap_bytes_per_s is None else cap_bytes_per_s)
        found = self._profiles.get(key)
        if found is None:
            found = self._profiles[key] = Profile(self, len(self._profiles), *key)
        return found

    def join(self, activity: Activity) -> None:
        """The activity takes its place on its links; rates follow when the nanosecond has settled."""
        if not self._touched:
            self.clock.when_settled(self._resolve)
        self._touched[activity] = None
        for users in activity.profile.users:
            users[activity] = None

    def leave(self, activity: Activity) -> None:
        """The activity frees its links; those it shared them with are solved anew."""
        touched = self._touched
        touched.pop(activity, None)
        for users in activity.profile.users:
            del users[activity]
            if users:
                if not touched:
                    self.clock.when_settled(self._resolve)
                touched[next(iter(users))] = None

    def _resolve(self) -> None:
        now_ns = self.clock.now_ns
        touched, self._touched = self._touched, {}
        seen: set[Activity] = set()
        for activity in touched:
            if activity in seen or activity.state != _ACTIVE:
                continue
            profile = activity.profile
            for users in profile.users:
                if len(users) > 1:
                    break
            else:
                self._set_rate(activity, profile.solo_rate, now_ns)
                continue
            component = self._component(activity, seen)
            rates = self._rates(component)
            for member in component:
                self._set_rate(member, rates[member.profile.index], now_ns)

    def _component(self, activity: Activity, seen: set[Activity]) -> list[Activity]:
        """Everything connected to `activity` through shared links; added to `seen`."""
        seen.add(activity)
        component = [activity]
        links: set[int] = set()
        for member in component:
            for (link, _), users in zip(member.profile.usage, member.profile.users, strict=True):
                if link not in links:
                    links.add(link)
                    if len(users) > 1:
                        new = [user for user in users if user not in seen]
                        seen.update(new)
                        component += new
        return component

    def _rates(self, component: list[Activity]) -> dict[int, int]:
        """Rate by profile index. Solutions are kept: a training step repeats few combinations many times."""
        key = tuple(sorted([member.profile.index for member in component]))
        rates = self._solved.get(key)
        if rates is None:
            if len(self._solved) >= _MEMO_LIMIT:
                self._solved.clear()
            profiles = {member.profile.index: member.profile for member in component}
            counts: dict[int, int] = {}
            for index in key:
                counts[index] = counts.get(index, 0) + 1
            shapes = {index: (p.usage, p.cap) for index, p in profiles.items()}
            rates = self._solved[key] = fair_rates(shapes, counts, self.capacity)
        return rates

    def _set_rate(self, activity: Activity, rate: int, now_ns: int) -> None:
        if rate != activity.rate:
            activity.remaining -= activity.rate * (now_ns - activity.since_ns)
            activity.since_ns = now_ns
            activity.rate = rate
            activity.finish_ns = now_ns + max(0, -(-activity.remaining // rate))
            self.clock.at(activity.finish_ns, activity)


def fair_rates(
    shapes: Mapping[int, tuple[tuple[tuple[int, int], ...], int]],
    counts: Mapping[int, int],
    capacity: Sequence[int],
) -> dict[int, int]:
    """Max-min fair rate (work units/s, at least 1) of each shape, of which counts[shape] activities run
    together.

    A shape is ((link, weight), ...) and a cap. Rates are rounded down level by level, so the load of a link
    never exceeds its capacity, unless that is below the total weight on it (less than one byte/s each).
    """
    left: dict[int, int] = {}
    load: dict[int, int] = {}
    for index, (usage, _) in shapes.items():
        for link, weight in usage:
            left[link] = capacity[link]
            load[link] = load.get(link, 0) + weight * counts[index]
    rates: dict[int, int] = {}
    growing = dict(shapes)
    while growing:
        share = {link: max(1, left[link] // weight) for link, weight in load.items() if weight}
        level = min(min(share.values(), default=UNBOUNDED), min(cap for _, cap in growing.values()))
        full = {link for link, s in share.items() if s == level}
        frozen = [
            index for index, (usage, cap) in growing.items() if cap <= level or any(link in full for link, _ in usage)
        ]
        for index in frozen:
            usage, _ = growing.pop(index)
            rates[index] = level
            for link, weight in usage:
                load[link] -= weight * counts[index]
                left[link] = max(0, left[link] - weight * counts[index] * level)
    return rates
