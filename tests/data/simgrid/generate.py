"""Writes flows.json: random sets of flows and when SimGrid, an independent simulator, says that each flow ends.

The tests need only the data. To work it out again, with SimGrid's Python module (Debian: python3-simgrid):

    /usr/bin/python3 tests/data/simgrid/generate.py

The options leave nothing but max-min sharing: no latency, no TCP window, no protocol overhead, no interference by
acknowledgements. SimGrid's sharing tolerance is relative to a link's capacity and set near a double's precision, as is
its clock's, in seconds.
"""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import simgrid

SEED = 20231101
OPTIONS = (
    "network/model:CM02",
    "network/solver:maxmin",
    "network/optim:Lazy",
    "network/crosstraffic:0",
    "network/bandwidth-factor:1",
    "network/latency-factor:1",
    "network/weight-S:0",
    "network/TCP-gamma:0",
    "maxmin/precision:1e-12",
    "surf/precision:1e-12",
)
KINDS = ("plain", "late", "capped", "late, capped", "crosses again")
CASES_PER_KIND = 12


def draw(rng: random.Random, kind: str) -> dict:
    """A case of one kind: bytes/s from 1e9 to 1e11 spread evenly over the powers of ten, 1e9 to 2e10 bytes a flow, so
    that the fastest takes 10 ms and one nanosecond is little."""
    weighted = kind == "crosses again"
    late, capped = weighted or "late" in kind, weighted or "capped" in kind
    capacity = [round(10 ** rng.uniform(9, 11)) for _ in range(rng.randint(2, 12))]
    flows = []
    for _ in range(rng.randint(1, 14)):
        route = rng.sample(range(len(capacity)), rng.randint(1, min(4, len(capacity))))
        if weighted:
            route += rng.choices(route, k=rng.randint(0, 2))
        flows.append(
            {
                "route": route,
                "size_bytes": rng.randint(10**9, 2 * 10**10),
                "start_ns": rng.randint(1, 2 * 10**9) if late and rng.random() < 0.7 else 0,
                "cap_bytes_per_s": round(10 ** rng.uniform(8, 10)) if capped and rng.random() < 0.5 else None,
            }
        )
    return {"kind": kind, "capacity_bytes_per_s": capacity, "flows": flows}


def finish_s(case: dict) -> list[float]:
    """SimGrid's finish times in seconds. It has one engine per process: call it once in each."""
    engine = simgrid.Engine(["flows", "--log=root.thres:error", *(f"--cfg={option}" for option in OPTIONS)])
    zone = simgrid.NetZone.create_full_zone("zone")
    links = []
    for number, capacity in enumerate(case["capacity_bytes_per_s"]):
        links.append(zone.create_link(f"link{number}", capacity).set_latency(0).seal())
    ends = [0.0] * len(case["flows"])

    def send(number: int, flow: dict) -> None:
        simgrid.this_actor.sleep_until(flow["start_ns"] / 1e9)
        message = simgrid.Mailbox.by_name(str(number)).put_init(number, flow["size_bytes"])
        if flow["cap_bytes_per_s"] is not None:
            message.set_rate(flow["cap_bytes_per_s"])
        message.wait()
        ends[number] = engine.clock

    def receive(number: int) -> None:
        simgrid.Mailbox.by_name(str(number)).get()

    for number, flow in enumerate(case["flows"]):
        source, target = (zone.create_host(f"{side}{number}", 1e9).seal() for side in ("source", "target"))
        route = [simgrid.LinkInRoute(links[k]) for k in flow["route"]]
        zone.add_route(source.netpoint, target.netpoint, None, None, route, False)
        simgrid.Actor.create(f"send{number}", source, send, number, flow)
        simgrid.Actor.create(f"receive{number}", target, receive, number)
    zone.seal()
    engine.run()
    return ends


def main() -> None:
    rng = random.Random(SEED)
    cases = [draw(rng, kind) for kind in KINDS for _ in range(CASES_PER_KIND)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), max_tasks_per_child=1) as workers:
        for case, ends in zip(cases, workers.map(finish_s, cases), strict=True):
            for flow, end in zip(case["flows"], ends, strict=True):
                flow["finish_s"] = end
    header = {"tool": "SimGrid", "version": simgrid.simgrid_version, "options": OPTIONS, "seed": SEED}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
    lines.append('"cases": [\n' + ",\n".join(json.dumps(case) for case in cases) + "\n]")
    Path(__file__).with_name("flows.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
