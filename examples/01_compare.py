"""Compare strategies from Python: which one is fastest, and what does it need?

The same as `rtp-sim compare --model gpt2-large --gpus 8 --micro-batch 8 --strategies ddp,zero1,fsdp,tp,rtp`.
"""

from rtp_sim.experiment import Request, prepare, run

SEQUENCES = 8 * 8

print(f"{'strategy':<10}{'step ms':>9}{'exposed ms':>12}{'peak GiB':>10}")
for strategy in ("ddp", "zero1", "fsdp", "tp", "rtp"):
    request = Request(
        model="gpt2-large", cluster="dgx-a100-80g", gpus=8, strategy=strategy, micro_batch=8, global_batch=SEQUENCES
    )
    m = run(prepare(request)).metrics
    exposed_ms, peak_gib = m.exposed_communication_s * 1e3, m.peak_memory_bytes / 2**30
    print(f"{strategy:<10}{m.step_time_s * 1e3:>9.1f}{exposed_ms:>12.1f}{peak_gib:>10.1f}")
