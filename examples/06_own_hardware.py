"""Hardware of your own: a profile file, a cluster in a few words, and what a faster network would change."""

from pathlib import Path

from rtp_sim.experiment import Request, prepare, run
from rtp_sim.hardware.profiles import load_cluster

profile = Path(__file__).parent / "my-workstation.toml"
cluster = load_cluster(str(profile))
print(f"{cluster.name}: {cluster.description}, {cluster.world_size} GPUs")
for strategy in ("ddp", "rtp"):
    m = run(prepare(Request("gpt2", str(profile), strategy, micro_batch=8))).metrics
    print(f"  {strategy:<5} {m.step_time_s * 1e3:6.1f} ms, {m.peak_memory_bytes / 2**30:.1f} GiB")

print("Llama-2 7B with FSDP on 4 nodes of 8 H100s, by network:")
for nics, speed in ((1, "200Gb/s"), (4, "200Gb/s"), (8, "200Gb/s"), (8, "400Gb/s"), (8, "800Gb/s")):
    name = f"generic:h100-sxm,gpus=8,nics={nics},nic={speed}"
    m = run(prepare(Request("llama2-7b", name, "fsdp", nodes=4, seq_len=4096))).metrics
    print(f"  {nics} NICs of {speed}: {m.step_time_s * 1e3:6.0f} ms, MFU {m.mfu:.0%}")
