"""What a kernel is for, by its name: matmul, attention, communication, memory-bound or other.

Names are those of cuBLAS, CUTLASS, cuDNN, FlashAttention, Triton (as torch.compile names its kernels), ATen, NCCL and
RCCL, and of ATen's ops for traces without a device. The first class that fits counts: a fused attention kernel is full
of matrix products, and an all-reduce of additions.
"""

from __future__ import annotations

import re
from functools import cache

from rtp_sim.traces.kineto import COPY, Event

MATMUL, ATTENTION, COMMUNICATION, MEMORY, OTHER = CLASSES = (
    "matmul", "attention", "communication", "memory-bound", "other",
)  # fmt: skip

_PATTERNS = (
    (COMMUNICATION, r"nccl|rccl|^c10d::|^gloo:|_c10d_functional|nvshmem|mscclpp|cross_device_reduce|allreduce_fusion"),
    (ATTENTION, r"flash|fmha|attention|attn|sdpa|\bmha_"),
    (
        MATMUL,
        r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|matmul|addmm|baddbmm|aten::(mm|bmm|mv|linear|_?convolution)|conv(?!ert)"
        r"|winograd|Cijk_|splitk|dot_kernel|s\d{3,5}(bf16)?16?gemm",
    ),
    (
        MEMORY,
        r"elementwise|reduce|norm|softmax|copy|memcpy|memset|cat|fill|zero|dropout|embedding|index|gather|scatter"
        r"|transpose|permute|triton_|gelu|silu|relu|add|mul|div|sub|sqrt|adam|multi_tensor|cross_entropy|nll_loss"
        r"|cumsum|sort|where|clone|sum|mean|foreach|arange|rand|normal|bernoulli|tril|mask",
    ),
)
_COMPILED = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _PATTERNS)

_COLLECTIVES = (
    ("reduce_scatter", r"reduce_?scatter"), ("all_gather", r"all_?gather"), ("all_reduce", r"all_?reduce"),
    ("all_to_all", r"all_?to_?all"), ("broadcast", r"broadcast"), ("reduce", r"reduce"),
    ("send/recv", r"send_?recv|sendrecv|send|recv"), ("barrier", r"barrier"),
)  # fmt: skip


@cache
def class_of_name(name: str) -> str:
    """The class of a kernel or op with this name."""
    return next((found for found, pattern in _COMPILED if pattern.search(name)), OTHER)


def class_of(event: Event) -> str:
    """The class of what ran; copies and fills by the device's copy engines are memory-bound."""
    if event.collective:
        return COMMUNICATION
    return MEMORY if event.what == COPY else class_of_name(event.name)


def collective_of(event: Event) -> str:
    """Which collective a communication event was: what the profiler says of it, else by its name."""
    for text in (event.collective, event.name):
        for found, pattern in _COLLECTIVES:
            if text and re.search(pattern, text, re.IGNORECASE):
                return found
    return "other"
