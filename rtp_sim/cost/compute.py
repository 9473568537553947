"""Time of a kernel on a device: a roofline whose compute side rounds up to tiles and waves.

Matrix products and attention take the longer of their compute and their memory time, memory-bound kernels the
device's floor plus bytes / bandwidth, and nothing is faster than the floor. A kernel that the profile has measured by
itself follows its own straight line instead. The efficiencies and the floor come
from the device profile; the constants below belong to a class of kernels and hold for every device. What they give
on measured kernels is printed by `benchmarks/kernel_accuracy.py`.
"""

from __future__ import annotations

from functools import lru_cache

from rtp_sim.cost.products import ROW_BLOCK, Product, fused_rows, products
from rtp_sim.engine.costs import OpCost
from rtp_sim.errors import InputError
from rtp_sim.hardware.spec import Device, MeasuredKernel, Number
from rtp_sim.model.kernels import KERNELS, Kernel
from rtp_sim.schedule.ir import Dims

TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.85), (64, 64, 0.70), (64, 32, 0.50))
"""(rows, columns, fraction of the best rate): smaller tiles reuse less of what they load."""
SPLITS = (1, 2, 4, 8)
"""Ways to split k over tiles that are added up in memory afterwards."""
FILL = 96
"""Steps of k that a tile spends to fill and drain its pipeline."""
ACCUMULATOR_BYTES = 4

FORWARD_SHARE, BACKWARD_SHARE = 1.18, 0.943
"""Fused attention: rates of forward and backward over the device's efficiency, which is that of both together. The
backward runs at 0.8 of the forward's rate: 1/f + 2.5/(0.8 f) = 3.5 gives f = 1.18."""
HEAD_ALIGNMENT, HEAD_FILL, FULL_HEAD = 32, 32, 128
"""Heads are padded to multiples of 32; d lanes run at d / (d + 32) of the rate, up to that of 128 lanes."""
RAGGED_HEAD = 0.83
"""Rate of heads that need padding, over that of whole ones (on top of the padding)."""
ALIGNED_HEAD = 8
"""Numbers in 16 bytes of half precision."""
KEY_FILL = 128
"""Keys' worth of time that a block of query rows spends before and after its loop over the keys."""

REREADS = {"layernorm": 1.5, "rmsnorm": 1.5, "layernorm.bwd": 5 / 3, "rmsnorm.bwd": 5 / 3}
"""Memory traffic over that of touching each operand once: norms read their inputs twice (statistics, then values; in
the backward for the input's gradient, then for the weights')."""

_FALLBACK = {"tf32": "fp32", "bf16": "fp32", "fp16": "fp32", "fp8": "fp16", "int8": "fp8"}


def work(k: Kernel, sizes: dict[str, int]) -> float:
    """FLOPs that are really done: attention leaves out half the scores under a causal mask."""
    return k.flops(sizes) / (2 if k.kind == "attention" and sizes.get("causal") else 1)


def _line_ns(measured: MeasuredKernel, k: Kernel, sizes: dict[str, int], dtype: str) -> float:
    moved_ns = k.bytes_moved(sizes, dtype) * measured.ns_per_byte
    return measured.floor_ns + work(k, sizes) * measured.ns_per_flop + moved_ns


def _scalar(kernel: str, sizes: dict[str, int], dtype: str) -> bool:
    """Whether a product misses the matrix units: those of half precision load 16 bytes at a time, and rows of heads
    that are no multiple of 8 numbers start in between. It then runs on the scalar units, at the rate of fp32."""
    return dtype in ("fp16", "bf16") and kernel.startswith("attn.") and sizes["head_dim"] % ALIGNED_HEAD != 0


class ComputeCost:
    """Kernel times on one device. Basis: "interpolated" where an efficiency was measured, else "assumed"."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._units = int(device.compute_units.value)
        self._floor_ns = device.kernel_floor_ns.value
        # Launches that block: the host's time for a kernel stands between it and the one before.
        self._between_ns = device.blocking_issue_ns.value if device.blocking_issue_ns else 0.0
        self._bytes_per_ns = device.memory_bandwidth_bytes_per_s.value * device.memory_efficiency.value / 1e9
        self.cost = lru_cache(maxsize=None)(self._cost)

    def _cost(self, kernel: str, dtype: str, dims: Dims) -> OpCost:
        """The kernel's time alone on the device. InputError for a dtype the device has no rate for."""
        k, sizes = KERNELS[kernel], dict(dims)
        measured = self.device.kernels.get((kernel, dtype))
        if measured is not None:
            duration_ns = _line_ns(measured, k, sizes, dtype)
            basis = "interpolated" if measured.provenance.kind == "measured" else "assumed"
            return OpCost(max(1, round(duration_ns)), basis)
        between_ns = self._between_ns
        memory_ns = k.bytes_moved(sizes, dtype) * REREADS.get(kernel, 1.0) / self._bytes_per_ns
        if k.kind == "memory":
            efficiency = self.device.memory_efficiency
            duration_ns = self._floor_ns + memory_ns
        elif k.kind == "attention":
            efficiency = self._efficiency("attention", dtype)
            duration_ns = max(self._attention_ns(k, dtype, sizes), memory_ns, self._floor_ns)
        else:
            efficiency = self._efficiency("matmul", dtype)
            launches = products(kernel, sizes)
            rate = "fp32" if _scalar(kernel, sizes, dtype) else dtype
            compute_ns = sum(max(self._product_ns(p, rate), self._floor_ns) for p in launches)
            between_ns *= len(launches)
            duration_ns = max(compute_ns, memory_ns)
        basis = "interpolated" if efficiency.kind == "measured" else "assumed"
        return OpCost(max(1, round(duration_ns + between_ns)), basis)

    def _efficiency(self, kind: str, dtype: str) -> Number:
        """The fraction of the peak that large kernels of this kind reach in `dtype`."""
        own: Number | None = getattr(self.device, f"{kind}_efficiency_fp32") if dtype == "fp32" else None
        general: Number = getattr(self.device, f"{kind}_efficiency")
        return own or general

    def peak_flops_per_s(self, dtype: str) -> float:
        """The device's dense peak for `dtype`: what MFU is measured against. InputError if there is none."""
        return self.device.peak_flops[self.rate_dtype(dtype)].value

    def rate_dtype(self, dtype: str) -> str:
        """`dtype`, or the next wider one that the device has a rate for. InputError if there is none either."""
        peaks = self.device.peak_flops
        found = dtype
        while found not in peaks:
            if found not in _FALLBACK:
                raise InputError(
                    f"device {self.device.name} states no peak FLOP/s for {dtype}: expected one of {', '.join(peaks)}"
                )
            found = _FALLBACK[found]
        return found

    def _product_ns(self, p: Product, dtype: str) -> float:
        """The fastest way to cut the product's output into tiles, one per compute unit at a time: the last wave of
        tiles is paid in full. A single unit (a CPU core) has no other units to leave idle, and its tiles are small:
        64 x 64 x 64 in fp32 was measured at the rate of large products."""
        flops_per_ns = self.peak_flops_per_s(dtype) * self._efficiency("matmul", dtype).value / self._units / 1e9
        if self._units == 1:
            return self._floor_ns + 2 * p.m * p.k * p.n * p.copies / flops_per_ns
        add_up_ns = p.m * p.n * p.copies * ACCUMULATOR_BYTES / self._bytes_per_ns
        best_ns = float("inf")
        for rows, columns, quality in TILES:
            tiles = -(-p.m // rows) * -(-p.n // columns) * p.copies
            for split in SPLITS:
                waves = -(-tiles * split // self._units)
                depth = -(-p.k // split) + FILL
                tile_ns = 2 * rows * columns * depth / (flops_per_ns * quality)
                best_ns = min(best_ns, waves * tile_ns + (split - 1) * add_up_ns)
        return best_ns

    def _attention_ns(self, k: Kernel, dtype: str, sizes: dict[str, int]) -> float:
        """Blocks of rows loop over all keys (half of them under a causal mask), a wave of blocks at a time. A single
        unit works through the FLOPs."""
        width, keys = sizes["head_dim"], sizes["kv"]
        looped = keys / 2 if sizes.get("causal") else keys
        peak_flops_per_ns = self.peak_flops_per_s(dtype) * self._efficiency("attention", dtype).value / 1e9
        if self._units == 1:
            return self._floor_ns + k.flops(sizes) * looped / keys / peak_flops_per_ns
        padded = -(-width // HEAD_ALIGNMENT) * HEAD_ALIGNMENT
        lanes = min(padded, FULL_HEAD)
        rate = 1.0
        if dtype != "fp32":
            # fp32 runs on scalar units, which need no padding.
            rate = lanes / (lanes + HEAD_FILL) * (FULL_HEAD + HEAD_FILL) / FULL_HEAD
            rate *= width / padded * (1.0 if width == padded else RAGGED_HEAD)
        rate *= BACKWARD_SHARE if k.name.endswith(".bwd") else FORWARD_SHARE
        blocks = fused_rows(sizes)
        waves = -(-blocks // self._units) * self._units / blocks
        padding = blocks * ROW_BLOCK / (sizes["batch"] * sizes["heads"] * sizes["q"])
        return k.flops(sizes) * (looped + KEY_FILL) / keys * waves * padding / (peak_flops_per_ns * rate)
