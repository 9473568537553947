"""A workstation without NVLink: transfers share the host bridges, and that decides.

The SimPy engine shares every wire among the transfers on it; the longest-path engine prices each transfer as if it were
alone. Their difference is what contention costs.
"""

from rtp_sim.experiment import Request, prepare, run
from rtp_sim.hardware.profiles import load_cluster

cluster = load_cluster("pcie-4x4090")
print(cluster.description)
print(f"{'strategy':<10}{'alone ms':>10}{'shared ms':>11}{'contention':>12}{'exposed':>9}{'peak GiB':>10}")
for strategy in ("ddp", "fsdp", "rtp"):
    request = Request("gpt2-medium", cluster.name, strategy, gpus=4, micro_batch=8)
    prepared = prepare(request, cluster=cluster)
    alone = run(prepared, engine="longest-path").metrics
    shared = run(prepared, engine="simpy").metrics
    print(
        f"{strategy:<10}{alone.step_time_s * 1e3:>10.0f}{shared.step_time_s * 1e3:>11.0f}"
        f"{shared.step_time_s / alone.step_time_s - 1:>12.0%}"
        f"{shared.exposed_communication_s / shared.step_time_s:>9.0%}{shared.peak_memory_bytes / 2**30:>10.1f}"
    )
