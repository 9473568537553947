"""A schedule of your own in tens of lines: a pipeline of two stages, checked, simulated and drawn.

Every op says which buffers it reads and writes; the builder derives what it must wait for. All forwards (F) run, then
all backwards, each as two ops: the input gradient (I) is sent on before the weight gradient (W) is computed. So of
3 m + 2 kernel times for m micro-batches the first stage idles for 2, while the last one makes its first F's way there
and back. The rest of its idle time is what sending costs.
"""

from rtp_sim.cost.model import ClusterCost
from rtp_sim.engine.simulate import simulate
from rtp_sim.hardware.profiles import load_cluster
from rtp_sim.metrics import time_split
from rtp_sim.schedule.builder import Builder
from rtp_sim.schedule.checks import check
from rtp_sim.schedule.ir import Compute, Group, Program, Recv, Schedule, Send
from rtp_sim.timeline import Timeline

TOKENS, WIDTH, STAGES = 4096, 8192, 2
ACTIVATION_BYTES = 2 * TOKENS * WIDTH


def stage(s: int, micro_batches: int) -> Program:
    """The program of pipeline stage `s`: one square linear layer, forward and backward."""
    b = Builder(f"stage{s}")
    dims = (("m", TOKENS), ("k", WIDTH), ("n", WIDTH))
    weight = b.buffer("w", "weights", "bf16", WIDTH * WIDTH, persistent=True)
    gradient = b.buffer("dw", "gradients", "bf16", WIDTH * WIDTH, live_out=True)

    def tensor(name: str, *, given: bool = False) -> str:
        return b.buffer(name, "activations", "bf16", TOKENS * WIDTH, live_in=given)

    for m in range(micro_batches):
        x, y = tensor(f"x{m}", given=s == 0), tensor(f"y{m}")
        if s > 0:
            b.op(f"recvF{m}", "forward", Recv("pp", (-1,), ACTIVATION_BYTES, f"F{m}"), (), (x,))
        b.op(f"F{m}", "compute", Compute("linear", "bf16", dims), (x, weight), (y,))
        if s < STAGES - 1:
            b.op(f"sendF{m}", "forward", Send("pp", (1,), ACTIVATION_BYTES, f"F{m}"), (y,))
    for m in range(micro_batches):
        dy, dx = tensor(f"dy{m}" if s < STAGES - 1 else f"y{m}"), tensor(f"dx{m}")
        if s < STAGES - 1:
            b.op(f"recvB{m}", "backward", Recv("pp", (1,), ACTIVATION_BYTES, f"B{m}"), (), (dy,))
        b.op(f"I{m}", "compute", Compute("linear.dgrad", "bf16", dims), (dy, weight), (dx,))
        if s > 0:
            b.op(f"sendB{m}", "backward", Send("pp", (-1,), ACTIVATION_BYTES, f"B{m}"), (dx,))
        so_far = () if b.fresh(gradient) else (gradient,)
        b.op(f"W{m}", "compute", Compute("linear.wgrad", "bf16", dims), (f"x{m}", dy, *so_far), (gradient,))
    return b.program()


def pipeline(micro_batches: int) -> Schedule:
    """Both stages as one schedule."""
    group = Group("pp", (STAGES,), (tuple(range(STAGES)),))
    programs = tuple(stage(s, micro_batches) for s in range(STAGES))
    return Schedule("gpipe", STAGES, {"pp": group}, programs, tuple(range(STAGES)))


def draw(timeline: Timeline, width: int = 90) -> None:
    """One line per stage: which op computes when."""
    for rank in range(STAGES):
        line = [" "] * width
        for span in timeline.spans(rank):
            if span.op.stream == "compute":
                first, last = (t * width // timeline.step_time_ns for t in (span.start_ns, span.end_ns))
                line[first:last] = span.op.name.center(last - first, "-")
        print(f"stage {rank} |{''.join(line)}|")


cost = ClusterCost(load_cluster("dgx-a100-80g", gpus=STAGES))
for micro_batches in (1, 2, 4, 8):
    schedule = pipeline(micro_batches)
    check(schedule)
    timeline = simulate(schedule, cost)
    idle = 1 - time_split(timeline, 0).compute_ns / timeline.step_time_ns
    free = 2 / (3 * micro_batches + 2)
    step_ms = timeline.step_time_ns / 1e6
    print(f"{micro_batches} micro-batches: {step_ms:5.2f} ms, stage 0 idle {idle:.1%}, with free sends {free:.1%}")
    if micro_batches == 4:
        draw(timeline)
