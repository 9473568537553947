"""The fluid network: rates worked out by hand, against an exact reference, and finish times of flows that
overlap."""

from collections.abc import Callable
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_sim.engine.fluid import NS_PER_S, UNBOUNDED, Activity, Network, Timed, fair_rates

GB = 1_000_000_000


class StepClock:
    """An event loop in ten lines: a dictionary of times."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.due: dict[int, list[Timed]] = {}
        self.settled: list[Callable[[], None]] = []

    def at(self, time_ns: int, item: Timed) -> None:
        assert time_ns >= self.now_ns
        self.due.setdefault(time_ns, []).append(item)

    def when_settled(self, action: Callable[[], None]) -> None:
        self.settled.append(action)

    def run(self) -> None:
        while self.due:
            self.now_ns = min(self.due)
            while self.now_ns in self.due or self.settled:
                for item in self.due.pop(self.now_ns, []):
                    item.fire(self.now_ns)
                if self.now_ns not in self.due:
                    actions, self.settled = self.settled, []
                    for action in actions:
                        action()


class Noted(Activity):
    def __init__(self) -> None:
        super().__init__()
        self.ended_ns = -1

    def finished(self, now_ns: int) -> None:
        self.ended_ns = now_ns


def ends(capacity: list[int], flows: list[tuple[dict[int, int], int, int, int | None]]) -> list[int]:
    """Finish times of flows given as (usage, bytes, start, cap)."""
    clock = StepClock()
    network = Network(clock, capacity)
    noted = []
    for usage, size_bytes, start_ns, cap in flows:
        flow = Noted()
        flow.begin(network.profile(tuple(usage.items()), cap), size_bytes, start_ns)
        noted.append(flow)
    clock.run()
    assert all(not users for users in network.users)
    return [flow.ended_ns for flow in noted]


def rates(
    capacity: list[int], usages: list[dict[int, int]], caps: list[int | None] | None = None
) -> list[int]:
    caps = caps or [None] * len(usages)
    shapes = {
        n: (tuple(u.items()), UNBOUNDED if cap is None else cap)
        for n, (u, cap) in enumerate(zip(usages, caps, strict=True))
    }
    found = fair_rates(shapes, dict.fromkeys(shapes, 1), capacity)
    return [found[n] for n in range(len(usages))]


def exact_rates(capacity: list[int], usages: list[dict[int, int]], caps: list[int | None]) -> list[Fraction]:
    """Water filling with fractions, one activity frozen at a time: raise all together until something
    binds."""
    level = [Fraction(0)] * len(usages)
    growing = set(range(len(usages)))
    while growing:
        room = []
        for link, c in enumerate(capacity):
            weight = sum(usages[i].get(link, 0) for i in growing)
            if weight:
                used = sum(usages[i].get(link, 0) * level[i] for i in range(len(usages)))
                room.append((c - used) / weight)
        room += [cap - level[i] for i in growing if (cap := caps[i]) is not None]
        step = min(room)
        for i in growing:
            level[i] += step
        for i in list(growing):
            full = any(
                sum(usages[j].get(link, 0) * level[j] for j in range(len(usages))) == capacity[link]
                for link in usages[i]
            )
            if full or level[i] == caps[i]:
                growing.discard(i)
    return level


def test_the_textbook_case() -> None:
    """A holds 10, B 6. Flows over A, over B, over both: B gives 3 each, the first takes the 7 left on A."""
    assert rates([10, 6], [{0: 1}, {1: 1}, {0: 1, 1: 1}]) == [7, 3, 3]


def test_two_long_and_short_flows_on_a_line() -> None:
    """Links 120, 90, 200; one flow over all three, two over link 0, one over 1, one over 2.
    Link 0: 120 / 3 = 40 binds first; then link 1 leaves 50, link 2 leaves 160."""
    flows = [{0: 1, 1: 1, 2: 1}, {0: 1}, {0: 1}, {1: 1}, {2: 1}]
    assert rates([120, 90, 200], flows) == [40, 40, 40, 50, 160]


def test_a_weight_counts_as_often_as_it_crosses() -> None:
    """Capacity 12, one flow that crosses twice and one that crosses once: 12 / 3 = 4 each, loads 8 + 4."""
    assert rates([12], [{0: 2}, {0: 1}]) == [4, 4]


def test_a_cap_below_the_fair_share_leaves_the_rest_to_others() -> None:
    assert rates([10], [{0: 1}, {0: 1}, {0: 1}], [2, None, None]) == [2, 4, 4]


def test_a_link_smaller_than_its_flows_still_moves() -> None:
    assert rates([1], [{0: 1}, {0: 1}]) == [1, 1]


@st.composite
def flow_sets(draw: st.DrawFn) -> tuple[list[int], list[dict[int, int]], list[int | None]]:
    capacity = draw(st.lists(st.integers(10**6, 10**12), min_size=1, max_size=5))
    usage = st.dictionaries(
        st.integers(0, len(capacity) - 1), st.integers(1, 4), min_size=1, max_size=len(capacity)
    )
    usages = draw(st.lists(usage, min_size=1, max_size=8))
    caps = [draw(st.one_of(st.none(), st.integers(10**5, 10**12))) for _ in usages]
    return capacity, usages, caps


@settings(max_examples=150, deadline=None)
@given(flow_sets())
def test_rates_are_max_min_up_to_rounding(
    case: tuple[list[int], list[dict[int, int]], list[int | None]],
) -> None:
    """Rounding down loses under 1 byte/s a level; what one level loses, later ones may get or amplify by the
    weights (at most 8 flows x weight 4 = 32 per level, 8 levels). 10,000 bytes/s is a generous bound, and 1 %
    of the least capacity here."""
    capacity, usages, caps = case
    found = rates(capacity, usages, caps)
    for rate, exact in zip(found, exact_rates(capacity, usages, caps), strict=True):
        assert abs(rate - exact) <= 10_000
    for link, c in enumerate(capacity):
        assert sum(u.get(link, 0) * rate for u, rate in zip(usages, found, strict=True)) <= c


@settings(max_examples=60, deadline=None)
@given(flow_sets(), st.integers(2, 5))
def test_equal_flows_can_be_given_as_one_with_a_larger_weight(
    case: tuple[list[int], list[dict[int, int]], list[int | None]], times: int
) -> None:
    capacity, usages, caps = case
    each = rates(capacity, usages * times, caps * times)
    together = rates(capacity, [{k: times * w for k, w in u.items()} for u in usages], caps)
    assert each == together * times


def test_two_flows_over_one_host_bridge_take_twice_the_time() -> None:
    """1 MB each over a 1 GB/s bridge: 1 ms alone, 2 ms together, whatever their own faster PCIe links."""
    alone = ends([GB, 4 * GB], [({0: 1, 1: 1}, 10**6, 0, None)])
    both = ends([GB, 4 * GB, 4 * GB], [({0: 1, 1: 1}, 10**6, 0, None), ({0: 1, 2: 1}, 10**6, 0, None)])
    assert (alone, both) == ([10**6], [2 * 10**6, 2 * 10**6])


def test_a_late_flow_shares_what_is_left() -> None:
    """1 byte/ns. A: 1,000 bytes from 0. B: 300 bytes from 400. Both at half from 400: B ends at 1,000, having
    passed 300; A has 1000 - 400 - 300 = 300 left and ends at 1,300."""
    assert ends([GB], [({0: 1}, 1000, 0, None), ({0: 1}, 300, 400, None)]) == [1300, 1000]


def test_a_change_far_away_travels_through_shared_links() -> None:
    """A on link 0, B on links 0 and 1, C on link 1, all 1 byte/ns and 1,000 bytes; C starts at 500. A and B
    share from 0: 250 passed each at 500. C joins: still 1/2 everywhere. A and B end at 2,000, C has passed
    750 by then and ends at 2,250."""
    flows = [({0: 1}, 1000, 0, None), ({0: 1, 1: 1}, 1000, 0, None), ({1: 1}, 1000, 500, None)]
    assert ends([GB, GB], flows) == [2000, 2000, 2250]


def test_nothing_to_send_takes_no_time_and_no_share() -> None:
    assert ends([GB], [({0: 1}, 0, 70, None), ({0: 1}, 100, 0, None)]) == [70, 100]


def test_no_link_and_no_cap_is_instant_and_a_cap_alone_is_kept() -> None:
    assert ends([], [({}, 10**9, 5, None), ({}, 1000, 5, GB // 2)]) == [5, 2005]


def test_a_part_of_a_nanosecond_counts_as_one() -> None:
    """10 bytes at 3 GB/s: 3.33 ns."""
    assert ends([3 * GB], [({0: 1}, 10, 0, None)]) == [4]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 2), min_size=1), st.integers(0, 5000), st.integers(0, 2000)),
        min_size=1,
        max_size=7,
    )
)
def test_no_flow_beats_its_narrowest_link_and_no_link_its_capacity(
    flows: list[tuple[set[int], int, int]],
) -> None:
    capacity = [GB, 2 * GB, 3 * GB]
    found = ends(capacity, [(dict.fromkeys(links, 1), size, start, None) for links, size, start in flows])
    for (links, size, start), end in zip(flows, found, strict=True):
        assert (end - start) * min(capacity[k] for k in links) >= size * NS_PER_S
    for link, c in enumerate(capacity):
        users = [
            (size, start, end)
            for (links, size, start), end in zip(flows, found, strict=True)
            if link in links
        ]
        if users:
            span_ns = max(end for *_, end in users) - min(start for _, start, _ in users)
            assert span_ns * c >= sum(size for size, *_ in users) * NS_PER_S
