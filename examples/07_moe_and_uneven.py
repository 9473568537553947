"""Experts that rotate, and shards that are not all the same size.

A rotated mixture of experts needs no all-to-all: the experts come to the tokens. Where a size does not divide by the
ranks some shards are larger, the hops take as long as the largest, and a note says so.
"""

from rtp_sim.experiment import Request, prepare, run
from rtp_sim.metrics import communication_totals

print("Mixtral 8x7B on 2 nodes of 8 H200s, experts rotating in rings of 8:")
for strategy, inner in (("rtp", 8), ("fsdp", None)):
    request = Request("mixtral-8x7b", "dgx-h200", strategy, nodes=2, inner=inner, seq_len=2048)
    result = run(prepare(request))
    m = result.metrics
    kinds = sorted(communication_totals(result.prepared.schedule, 0)[2])
    step_ms, peak_gib = m.step_time_s * 1e3, m.peak_memory_bytes / 2**30
    print(f"  {strategy:<5} {step_ms:4.0f} ms, {peak_gib:.1f} GiB; sends {', '.join(kinds)}")

print("GPT-2 large (20 heads) on 4 to 8 GPUs of one node:")
for gpus in (4, 5, 6, 7, 8):
    result = run(prepare(Request("gpt2-large", "dgx-a100-80g", "rtp", gpus=gpus, micro_batch=8)))
    m = result.metrics
    print(f"  {gpus} GPUs: {m.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, {m.peak_memory_bytes / 2**30:.1f} GiB")
    for note in str(result.prepared.schedule.meta["notes"]).split("; "):
        print(f"    {note}")
