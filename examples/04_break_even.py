"""From how many tokens per rank on does out-of-place RTP hide its weight hops?

While a rank multiplies T tokens with its shard of a linear layer (2 T P/N FLOPs) the next shard (b P/N bytes) arrives.
The hop is hidden if 2 T P/N / F >= b P/N / BW, that is from T = b F / (2 BW) on: neither the layer's size nor the
number of ranks matters. F and BW are read off the simulated timeline's first kernel and first hop. Beyond that many
tokens the hops no longer show: what stays exposed is the moment before the first kernel, as its hop is issued first.
"""

import json
import tempfile
from pathlib import Path

from rtp_sim.experiment import Request, find_network, prepare, run
from rtp_sim.schedule.ir import Shift
from rtp_sim.schedule.options import Options

RANKS, WIDTH, BYTES = 8, 8192, 2
SHARD_BYTES = BYTES * WIDTH * (WIDTH + 1) // RANKS


LINEAR = {"kind": "linear", "out_features": WIDTH}
LAYERS = {"name": "linears", "input": {"features": WIDTH}, "layers": [LINEAR] * 4 + [{"kind": "cross_entropy"}]}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "linears.json"
    path.write_text(json.dumps(LAYERS))
    network = find_network(str(path), seq_len=1, attention="flash")

print(f"{'tokens':>7}{'kernel us':>11}{'hop us':>8}{'b F / (2 BW)':>14}{'exposed us':>12}")
for tokens in (256, 512, 768, 1024, 1280, 1536, 2048, 4096):
    forward = Options(eval_passes=1)
    request = Request("linears", "dgx-a100-80g", "rtp", gpus=RANKS, micro_batch=tokens, options=forward)
    spans = (result := run(prepare(request, network=network))).timeline.spans(0)
    hop = next(s for s in spans if isinstance(s.op.action, Shift))
    kernel = next(s for s in spans if not isinstance(s.op.action, Shift))
    hop_ns, kernel_ns = hop.end_ns - hop.start_ns, kernel.end_ns - kernel.start_ns
    flops_per_ns, bytes_per_ns = 2 * tokens * SHARD_BYTES / BYTES / kernel_ns, SHARD_BYTES / hop_ns
    break_even = BYTES * flops_per_ns / (2 * bytes_per_ns)
    exposed_us = result.metrics.exposed_communication_s * 1e6
    print(f"{tokens:>7}{kernel_ns / 1e3:>11.1f}{hop_ns / 1e3:>8.1f}{break_even:>14.0f}{exposed_us:>12.0f}")
