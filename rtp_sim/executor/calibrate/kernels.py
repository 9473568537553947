"""Times of the executor's kernels on one device: products, kernels bound by memory, attention. Data is cold, code warm.

In a training step a kernel finds its operands in memory, not in the caches, because everything else of the step went
by in between; but its code has run before. So each size gets several sets of operands, what is left of them in caches
is swept out between rounds, and one launch per round is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rtp_sim.executor.calibrate.samples import FLOOR_NUMEL, KernelSample
from rtp_sim.executor.kernels import KERNELS as EXECUTED
from rtp_sim.executor.launch import Columns, Launch, Result
from rtp_sim.model.kernels import BACKWARD, KERNELS
from rtp_sim.model.layers import (
    WHOLE,
    Activation,
    Add,
    Attention,
    Call,
    CrossEntropy,
    Extent,
    LayerOp,
    Linear,
    Lowered,
    Norm,
)
from rtp_sim.schedule.ir import Dims

Run = Callable[[], object]
MOST_COPIES = 12
FEWEST_TIMES, MOST_TIMES = 5, 200
SLOWEST_NS = 400_000_000
"""Sizes of a dtype are given up where the one before took so long (fp16 products on CPUs without fp16 units)."""
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One kernel at one size; `make` allocates operands and returns what launches the kernel on them."""

    kernel: str
    dtype: str
    dims: Dims
    make: Callable[[torch.device], Run]

    @property
    def footprint_bytes(self) -> int:
        """Bytes of all operands."""
        return KERNELS[self.kernel].bytes_moved(dict(self.dims), self.dtype)


def measure(
    cases: Sequence[Case], device: torch.device, budget_s: float, wait: Callable[[], None], say: Callable[[str], None]
) -> list[KernelSample]:
    """Times of each case, about `budget_s` each. `wait` is called before each, so that all ranks do the same at once.

    A case whose kernel the device does not have, or that takes too long, gives no sample.
    """
    cache = Cache(device)
    samples: list[KernelSample] = []
    slow: set[tuple[str, str]] = set()
    for case in cases:
        wait()
        if (case.kernel, case.dtype) in slow:
            continue
        try:
            times = _times(case, device, cache, budget_s)
        except RuntimeError as error:
            say(f"{case.kernel} {case.dtype}: not measured ({str(error).splitlines()[0]})")
            slow.add((case.kernel, case.dtype))
            continue
        if min(times) > SLOWEST_NS // 8:
            slow.add((case.kernel, case.dtype))
        samples.append(KernelSample(case.kernel, case.dtype, case.dims, tuple(times)))
        sizes = " ".join(f"{key}={value}" for key, value in case.dims)
        say(f"{case.kernel} {case.dtype} {sizes}: {sorted(times)[len(times) // 2] / 1e3:,.1f} us")
    return samples


def _times(case: Case, device: torch.device, cache: Cache, budget_s: float) -> list[int]:
    copies = max(1, min(MOST_COPIES, cache.size_bytes // max(1, case.footprint_bytes)))
    launches = [case.make(device) for _ in range(1 + copies)]
    warm, cold = launches[0], launches[1:]
    for _ in range(3):
        warm()
    fits = case.footprint_bytes * (1 + copies) < cache.size_bytes
    times: list[int] = []
    until = time.perf_counter() + budget_s
    while len(times) < FEWEST_TIMES or (time.perf_counter() < until and len(times) < MOST_TIMES):
        if fits:
            cache.sweep()
        times += timed(device, warm, cold)
        if times[-1] > SLOWEST_NS:
            break
    return times


def timed(device: torch.device, warm: Run, launches: Sequence[Run]) -> list[int]:
    """Nanoseconds of each launch, one after another, after one that is not timed. On CUDA between events."""
    warm()
    if device.type != "cuda":
        times = []
        for launch in launches:
            start = time.perf_counter_ns()
            launch()
            times.append(time.perf_counter_ns() - start)
        return times
    finished = [between_events(launch) for launch in launches]
    torch.cuda.synchronize(device)
    return [elapsed_ns() for elapsed_ns in finished]


def between_events(launch: Run) -> Callable[[], int]:
    """Runes on a CUDA device; what it returns tells the nanoseconds it took, once the device is done."""
    # torch leaves the constructor untyped.
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    launch()
    after.record()
    return lambda: max(1, round(before.elapsed_time(after) * 1e6))


class Cache:
    """The device's last cache: twice its size, and a way to fill it with something else."""

    def __init__(self, device: torch.device) -> None:
        self.size_bytes = 2 * max(last_cache_bytes(device), 1 << 20)
        # On an accelerator the sweep is also what the launches after it queue up behind: it has to last a while.
        times = 4 if device.type == "cuda" else 1
        self._filler = torch.zeros(times * self.size_bytes // 4, device=device)

    def sweep(self) -> None:
        """Read and write something else than the operands."""
        self._filler.add_(1.0)


def last_cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache; 32 MiB where a CPU does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 32 << 20))
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    # Of the big shared caches of servers a rank gets a part at best, and sweeping them takes long.
    return min(max(sizes), 64 << 20)


# ---- cases


def cpu_cases(quick: bool) -> list[Case]:
    """What is measured on a CPU core."""
    if quick:
        return [
            *(_linear("fp32", n, n, n) for n in (128, 256, 512)),
            *(_linear(dtype, 256, 256, 256) for dtype in ("fp64", "bf16")),
            _linear("fp16", 64, 64, 64),
            *_memory_cases("fp32", (1 << 12, 1 << 16, 1 << 20)),
            *_attention_cases("fp32", ((1, 4, 128, 64), (1, 4, 256, 64))),
        ]
    shapes = ((128, 128, 128), (256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (256, 768, 3072), (1024, 256, 256))
    return [
        *(_linear("fp32", *shape) for shape in shapes),
        *(_linear(f"fp32.{part}", 512, 512, 512) for part in ("dgrad", "wgrad")),
        *(_linear(dtype, *shape) for dtype in ("fp64", "bf16") for shape in shapes[1:5]),
        *(_linear("fp16", *shape) for shape in shapes[:2]),
        *_memory_cases("fp32", (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22)),
        *_attention_cases("fp32", ((1, 4, 128, 64), (1, 8, 256, 64), (1, 8, 512, 64))),
    ]


def cuda_cases(quick: bool) -> list[Case]:
    """What is measured on an NVIDIA or AMD device."""
    if quick:
        return [
            *(_linear(dtype, n, n, n) for dtype in ("bf16", "fp32") for n in (1024, 4096)),
            *_memory_cases("bf16", (1 << 16, 1 << 26)),
            *_attention_cases("bf16", ((1, 16, 1024, 128),)),
        ]
    shapes = ((512, 512, 512), (1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (4096, 1600, 6400))
    return [
        *(_linear(dtype, *shape) for dtype in ("bf16", "fp16") for shape in shapes),
        *(_linear("fp32", *shape) for shape in shapes[:3]),
        *(_linear("fp64", *shape) for shape in shapes[:3]),
        *_memory_cases("bf16", (1 << 10, 1 << 16, 1 << 22, 1 << 25, 1 << 27)),
        *_memory_cases("fp32", (1 << 24,)),
        *_attention_cases("bf16", ((1, 16, 512, 64), (4, 16, 1024, 64), (1, 16, 2048, 128), (2, 32, 4096, 128))),
    ]


def tiny_case() -> Case:
    """The smallest kernel there is: its time is the floor."""
    return layer_case("add", "fp32", Add(FLOOR_NUMEL), Extent(1, 1))


def _linear(what: str, m: int, k: int, n: int) -> Case:
    """A linear layer without bias on m tokens; "fp32.dgrad" and "fp32.wgrad" are its backward products."""
    dtype, _, part = what.partition(".")
    return layer_case(f"linear.{part}" if part else "linear", dtype, Linear(k, n, bias=False), Extent(1, m))


def _memory_cases(dtype: str, numels: Sequence[int]) -> list[Case]:
    """Kernels bound by memory over so many elements: copies, elementwise ones, and norms and loss over rows of 1024."""
    cases = [_copy(dtype, numel) for numel in numels]
    for numel in numels:
        width = min(1024, numel)
        rows = Extent(1, numel // width)
        layers: tuple[LayerOp, ...] = (Add(width), Activation("gelu", width), Norm("layernorm", width))
        for op in layers:
            kernel = op.lower(rows).calls[0].kernel
            rules = BACKWARD.get(kernel, ())
            cases += [layer_case(name, dtype, op, rows) for name in (kernel, *(rule.kernel for rule in rules))]
        cases += [layer_case(name, dtype, CrossEntropy(width), rows) for name in ("cross_entropy", "cross_entropy.bwd")]
    return cases


def _attention_cases(dtype: str, shapes: Sequence[tuple[int, int, int, int]]) -> list[Case]:
    """Causal fused attention, forward and backward, of (batch, heads, tokens, head width)."""
    return [
        layer_case(kernel, dtype, Attention(heads * width, heads, heads, width), Extent(batch, tokens))
        for kernel in ("sdpa", "sdpa.bwd")
        for batch, heads, tokens, width in shapes
    ]


def _copy(dtype: str, numel: int) -> Case:
    def make(device: torch.device) -> Run:
        a, b = (_filled(numel, DTYPES[dtype], device) for _ in range(2))
        return lambda: b.copy_(a)

    return Case("copy", dtype, (("numel", numel),), make)


def layer_case(kernel: str, dtype: str, op: LayerOp, extent: Extent) -> Case:
    """A kernel of a layer as the executor runs it, or of its backward, with operands of its own."""
    lowered = op.lower(extent)
    call = next(c for c in lowered.calls if kernel in (c.kernel, *(rule.kernel for rule in BACKWARD.get(c.kernel, ()))))

    def make(device: torch.device) -> Run:
        tensor_dtype = DTYPES[dtype]
        x = {i: _input(name, op, call, lowered, tensor_dtype, device) for i, name in enumerate(call.inputs)}
        w = {p.name: _filled(p.numel, tensor_dtype, device).view(p.shape) for p in op.params()}
        launch = Launch(op, call, WHOLE, dict(call.dims), extent, x, {}, w, wanted=tuple(x))
        if kernel == call.kernel:
            return lambda: EXECUTED[kernel](launch)
        y = {i: _flat(made) for i, made in enumerate(EXECUTED[call.kernel](launch).outputs)}
        back = replace(
            launch, y=y, dy=None if isinstance(op, CrossEntropy) else _filled(y[0].numel(), y[0].dtype, device)
        )
        return lambda: EXECUTED[kernel](back)

    return Case(kernel, dtype, call.dims, make)


def _input(
    name: str, op: LayerOp, call: Call, lowered: Lowered, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An input of a call: a tensor inside the layer, the layer's own input, or the target classes of a loss."""
    dims = dict(call.dims)
    if isinstance(op, CrossEntropy) and name == "x1":
        return torch.arange(dims["rows"], device=device) % op.vocab
    if name in lowered.tensors:
        return _filled(lowered.tensors[name].numel, dtype, device)
    if isinstance(op, Linear):
        return _filled(dims["m"] * dims["k"], dtype, device)
    return _filled(dims["numel"] if "numel" in dims else dims["rows"] * dims["width"], dtype, device)


def _flat(made: Result) -> torch.Tensor:
    return (made.values if isinstance(made, Columns) else made).reshape(-1)


def _filled(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every page touched; values that stay finite through products and need no subnormal arithmetic."""
    return torch.rand(numel, device=device).sub_(0.5).to(dtype)
