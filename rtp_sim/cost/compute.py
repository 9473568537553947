"""Time of a kernel on a device: a roofline whose compute side rounds up to tiles and waves.

A matmul of (m x k) with (k x n) is cut into output tiles, one per compute unit at a time; the last wave of tiles is
paid in full, and each tile spends `_FILL` steps of k filling its pipeline. The library is taken to pick the best of a
few tile shapes and ways of splitting k. Memory-bound kernels take bytes / bandwidth. No kernel is faster than the
device's floor. What the constants give on measured kernels is printed by `benchmarks/kernel_accuracy.py`.
"""

from __future__ import annotations

from functools import lru_cache

from rtp_sim.engine.costs import OpCost
from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Device
from rtp_sim.model.kernels import KERNELS
from rtp_sim.schedule.ir import DTYPE_BYTES, Dims

# (rows, columns, fraction of the best rate): smaller tiles reuse less of what they load.
_TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.70))
_SPLITS = (1, 2, 4, 8)
_FILL = 96
_VECTOR_UNIT_FALLBACK = {"tf32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp8": "fp16", "int8": "fp8"}


class ComputeCost:
    """Kernel times on one device. Basis: "interpolated" where an efficiency was measured, else "assumed"."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._units = int(device.compute_units.value)
        self._floor_ns = device.kernel_floor_ns.value
        self._bytes_per_ns = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value / 1e9
        self.cost = lru_cache(maxsize=None)(self._cost)

    def _cost(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """The kernel's time alone on the device. InputError for a dtype the device has no rate for."""
        k, sizes = KERNELS[kernel], dict(dims)
        memory_ns = k.bytes_moved(sizes, dtype) / self._bytes_per_ns
        efficiency = self.device.memory_efficiency
        compute_ns = 0.0
        if k.kind == "matmul" and "m" in sizes:
            efficiency = self.device.matmul_efficiency
            compute_ns = self._matmul_ns(kernel, dtype, sizes)
        elif k.kind in ("matmul", "attention"):
            efficiency = self.device.attention_efficiency if k.kind == "attention" else self.device.matmul_efficiency
            causal = 0.5 if sizes.get("causal") and k.kind == "attention" else 1.0
            rate = self._peak(dtype) * efficiency.value / 1e9
            compute_ns = k.flops(sizes) * causal / rate
        duration = max(compute_ns, memory_ns, self._floor_ns)
        return OpCost(max(1, round(duration)), "interpolated" if efficiency.kind == "measured" else "assumed")

    def _peak(self, dtype: str) -> float:
        peaks = self.device.peak_flops
        found = dtype
        while found not in peaks:
            if found not in _VECTOR_UNIT_FALLBACK:
                raise InputError(
                    f"device {self.device.name} states no peak FLOP/s for {dtype}: expected one of {', '.join(peaks)}"
                )
            found = _VECTOR_UNIT_FALLBACK[found]
        return peaks[found].value

    def _matmul_ns(self, kernel: str, dtype: str, sizes: dict[str, int]) -> float:
        m, k, n, groups = sizes["m"], sizes["k"], sizes["n"], sizes.get("groups", 1)
        if kernel == "linear.dgrad":
            k, n = n, k
        elif kernel == "linear.wgrad":
            m, k, n = k, m, n
        if groups > 1:
            # Grouped experts: `groups` products, each with its share of the tokens.
            m, k = (m, -(-k // groups)) if kernel == "linear.wgrad" else (-(-m // groups), k)
        rate_per_unit = self._peak(dtype) * self.device.matmul_efficiency.value / self._units / 1e9
        accumulate_ns = m * n * groups * 4 / self._bytes_per_ns
        best = float("inf")
        for rows, columns, quality in _TILES:
            tiles = -(-m // rows) * -(-n // columns) * groups
            for split in _SPLITS:
                waves = -(-tiles * split // self._units)
                depth = -(-k // split) + _FILL
                tile_ns = 2 * rows * columns * depth / (rate_per_unit * quality)
                best = min(best, waves * tile_ns + (split - 1) * accumulate_ns)
        return best

    def peak_flops_per_s(self, dtype: str) -> float:
        """The device's dense peak for `dtype`: what MFU is measured against."""
        return self._peak(dtype)


def element_bytes(dtype: str) -> int:
    """Bytes per element."""
    return DTYPE_BYTES[dtype]
