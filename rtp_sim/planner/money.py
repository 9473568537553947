"""What a step costs: devices x time x list price, and devices x time x rated power. No cooling, no idle nodes."""

from __future__ import annotations

from collections.abc import Mapping

from rtp_sim.errors import InputError
from rtp_sim.experiment import usable_memory_bytes
from rtp_sim.hardware.spec import Cluster
from rtp_sim.planner.plan import Machine, Price

SECONDS_PER_HOUR = 3600.0


def machine_of(cluster: Cluster, headroom: float, prices: Mapping[str, float]) -> Machine:
    """A cluster as a machine of the search. `prices` are given per GPU and hour, by cluster, "" for all of them; they
    stand above the profile's."""
    usable = usable_memory_bytes(cluster)
    given = prices.get(cluster.name, prices.get(""))
    listed, power = cluster.device.price_usd_per_hour, cluster.device.tdp_w
    price = given if given is not None else None if listed is None else listed.value
    source = "given" if given is not None else "" if listed is None else f"{listed.kind}: {listed.source}"
    return Machine(
        cluster.name, cluster.nodes, cluster.world_size, usable, int(usable * (1 - headroom)), price, source,
        None if power is None else power.value, "" if power is None else f"{power.kind}: {power.source}",
    )  # fmt: skip


def usd_per_second(machine: Machine) -> float | None:
    """All GPUs together; None without a price."""
    price = machine.price_usd_per_gpu_hour
    return None if price is None else machine.gpus * price / SECONDS_PER_HOUR


def kilowatts(machine: Machine) -> float | None:
    """Rated power of all GPUs together; None where the profile states none."""
    return None if machine.tdp_w is None else machine.gpus * machine.tdp_w / 1000


def price_of(machine: Machine, step_s: float, tokens: float) -> Price:
    """A step of `step_s` seconds that works through `tokens` tokens."""
    usd, kw = usd_per_second(machine), kilowatts(machine)
    step_usd = None if usd is None else usd * step_s
    step_kwh = None if kw is None else kw * step_s / SECONDS_PER_HOUR
    millions = tokens / 1e6
    return Price(
        step_usd, None if step_usd is None else step_usd / millions,
        step_kwh, None if step_kwh is None else step_kwh / millions,
    )  # fmt: skip


def require_price(machine: Machine) -> None:
    """InputError where there is no price."""
    if machine.price_usd_per_gpu_hour is None:
        raise InputError(
            f"{machine.cluster}: its device profile states no price_usd_per_hour; expected "
            f"--price-per-gpu-hour {machine.cluster}=USD, for example {machine.cluster}=2.5"
        )
