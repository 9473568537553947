"""A ring over two nodes: flat or in two levels?

On a flat ring every hop waits for the one pair of GPUs at each node border, whose weights cross the network through a
single NIC: all 2 x 8 ranks go at its pace on all 15 hops. The two-level ring makes 7 hops inside the nodes, then one
hop to the same place in the next node, on which all 8 NICs work at once, then 7 inside again.
"""

from collections import Counter

from rtp_sim.experiment import Request, prepare, run
from rtp_sim.schedule.ir import Shift
from rtp_sim.schedule.options import Options

for ring in ("flat", "two-level"):
    request = Request(
        model="llama2-7b", cluster="dgx-a100-80g", nodes=2, strategy="rtp", inner=16, seq_len=4096,
        options=Options(rtp_ring=ring),
    )  # fmt: skip
    result = run(prepare(request))
    schedule, m = result.prepared.schedule, result.metrics
    group = schedule.groups["rtp"]
    crossing: Counter[bool] = Counter()
    durations_ms = {True: 0.0, False: 0.0}
    for span in result.timeline.spans(0):
        if isinstance(span.op.action, Shift) and span.op.name.startswith("m0.h0.mlp.up.F"):
            offset = span.op.action.hops[0].offset
            # Does any rank send to the other node on this hop?
            leaves = any(r // 8 != group.peer(r, offset) // 8 for r in range(16))
            crossing[leaves] += 1
            durations_ms[leaves] = max(durations_ms[leaves], (span.end_ns - span.start_ns) / 1e6)
    step_ms, exposed_ms = m.step_time_s * 1e3, m.exposed_communication_s * 1e3
    print(f"{ring} ring, shape {group.dims}: step {step_ms:.0f} ms, of it {exposed_ms:.0f} ms exposed communication")
    print(f"  {m.bytes_sent_per_rank / 2**30:.1f} GiB in {m.messages_per_rank:,} messages sent per rank")
    for leaves, count in sorted(crossing.items()):
        where = "with the network" if leaves else "inside the nodes"
        print(f"  first MLP, forward: {count:>2} hops {where}, the longest {durations_ms[leaves]:.2f} ms")
