"""How training frameworks do what a schedule leaves open: one line of physical habits per framework, with its source.

A habit says what the software does (which kernels it fuses, when it reduces gradients, what it keeps in memory, what a
launch costs its host thread), never how fast a model, a machine or a row is. Each framework has one `Habits` for all
of its rows; what is not read from its code or its logs says "assumed".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIB = 1 << 20
CONTEXT_BYTES = 1229 * MIB
"""What a process holds on a device outside of the allocator where nothing else is known: CUDA context and NCCL's
buffers, as the device profiles assume (1.2 GiB)."""

MEGATRON_LOSS = (7, 1)
"""Reads and writes of fp32 logits by Megatron's loss (mpu/cross_entropy.py): maximum 1, shift 2, exponential 2,
sum 1, division 2, of which the fused kernel's price (two halves) is 1; the backward multiplies in place, 2, of which
its price is 1."""


@dataclass(frozen=True, slots=True)
class Habits:
    """`architecture`: "gpt" (layer norm, GELU, biases), "mpt" (the same without biases), "fairscale" (post-norm, ReLU,
    sinusoidal positions, head with bias) or "llama" (RMS norm, gated SiLU, rotary positions, no biases).

    `mixed` is the precision that "mixed", "bf16" and "fp16" mean; `pure_half` says that fp16 is fp16 throughout.
    `dp_overlap`: gradients are reduced beside the backward pass; `dp_bucket_bytes` at a time; `dp_copy`: into buckets
    of
    their own; `gradient_buffer`: gradients are kept in one buffer from step to step. `fsdp_unit`: "block" or "model".
    `stacked_kv`, `dropout_kept`, `fused_matrices`: see `model.layers.Attention`; `upcast_loss`, `loss_passes`:
    `CrossEntropy`.
    `norm_passes`, `rotary_passes`: what norms and rotations move beyond one fused kernel, unless a row is compiled.
    `fsdp_gather_again`, `tp_overlap`: see `Options`. `rings`: a collective is spread over so many rings at most, each
    over one of a node's adapters (0: over all). `dropout`: as the framework does unless asked.
    `torch_attention`: torch.nn.MultiheadAttention, which copies layouts and uses whatever kernel
    scaled_dot_product_attention picks, with a mask (no causal skipping). `torch_loss`: torch.nn.CrossEntropyLoss.
    `optimizer_scratch`: bytes per parameter that the optimizer step allocates for itself. `recompute_works`: whether
    the run's recompute option saved memory. `selective_blocks`: "selective" recompute repeats every n-th block.
    `zero1_after`: under ZeRO-1 gradients are all-reduced, in one piece after the backward pass.
    `checks_stages`: what `refusals.refusal` tells is refused.
    `pp_balance`, `pp_overlap`, `pp_scatter_gather`, `pp_synchronised`: how stages are cut, whether they compute on
    while they send, whether tensor-parallel ranks send shares, whether the host waits for each pass (`Options`).
    `memory_stages`, `memory_reserved`, `outside_bytes`: what the framework's own number for memory counts
    (`reading.Reading`). `gathers_again`: gathered inputs are not kept in pipelines, nor where they would not fit.
    `op_ns`, `hop_ns`, `collective_ns`: host time to issue a kernel, a hop of rotation, another communication op.
    `vocab_size`, `ffn_ratio`: taken where a row leaves them blank; `vocab_unsplit` instead where nothing splits it.
    `facts`: (habit, source or "assumed").
    """

    name: str
    architecture: str
    mixed: str = "bf16"
    pure_half: bool = False
    dp_overlap: bool = True
    dp_bucket_bytes: int = 25 * MIB
    dp_copy: bool = True
    zero1_after: bool = False
    gradient_buffer: bool = False
    rotation_keeps_gradients: bool = False
    fsdp_split_gradients: bool = False
    fsdp_unit: str = "block"
    fsdp_prefetch: bool = True
    fsdp_gather_again: bool = False
    rings: int = 0
    torch_attention: bool = False
    torch_loss: bool = False
    upcast_loss: bool = False
    loss_passes: tuple[int, int] = (0, 0)
    norm_passes: tuple[int, int] = (0, 0)
    rotary_passes: tuple[int, int] = (0, 0)
    separate_gate: bool = False
    stacked_kv: bool = False
    fused_matrices: int = 0
    gradient_local: bool = False
    tp_overlap: bool = True
    tp_keep_gathered: bool = False
    optimizer_scratch: int = 0
    recompute_works: bool = True
    selective_blocks: int = 0
    dropout: float = 0.0
    checks_stages: bool = False
    dropout_kept: bool = False
    pp_balance: str = "layers"
    pp_overlap: bool = True
    pp_scatter_gather: bool = False
    pp_synchronised: bool = False
    memory_stages: str = "all"
    memory_reserved: bool = False
    gathers_again: bool = False
    outside_bytes: int = CONTEXT_BYTES
    op_ns: int | None = None
    hop_ns: int | None = None
    collective_ns: int | None = None
    vocab_size: int | None = None
    vocab_unsplit: int | None = None
    ffn_hidden_size: Mapping[int, int] | None = None
    facts: tuple[tuple[str, str], ...] = ()


FRAMEWORKS: Mapping[str, Habits] = {
    h.name: h
    for h in (
        Habits(
            "rtp-repo", "fairscale", pure_half=True, fsdp_unit="model", fsdp_prefetch=False,
            fsdp_split_gradients=True, rotation_keeps_gradients=True,
            torch_attention=True, torch_loss=True,
            optimizer_scratch=1, recompute_works=False, hop_ns=350_000,
        ),
        Habits("composer-fsdp", "mpt", mixed="bf16"),
        Habits(
            "megatron-lm", "gpt", mixed="fp16", dropout=0.1, upcast_loss=True, loss_passes=MEGATRON_LOSS,
            gradient_buffer=True, dp_overlap=False, dp_copy=False, pp_overlap=False, pp_scatter_gather=True,
            pp_synchronised=True,
        ),
        Habits(
            "megatron-lm-2021", "gpt", mixed="fp16", dropout=0.1, upcast_loss=True, loss_passes=MEGATRON_LOSS,
            gradient_buffer=True, dp_overlap=False, dp_copy=False, tp_overlap=False, pp_overlap=False,
            pp_scatter_gather=True, pp_synchronised=True,
        ),
        Habits(
            "deepspeed-zero3", "gpt", mixed="fp16", dropout=0.1, upcast_loss=True, loss_passes=MEGATRON_LOSS,
            fsdp_gather_again=True, rings=1,
        ),
        Habits(
            "megatron-deepspeed", "gpt", mixed="fp16", dropout=0.1, upcast_loss=True, loss_passes=MEGATRON_LOSS,
            dp_overlap=False, dp_copy=False, vocab_size=51200, vocab_unsplit=50257, gradient_local=True,
            fused_matrices=4, outside_bytes=10_300_000_000, tp_overlap=False, pp_overlap=False, pp_scatter_gather=True,
            pp_synchronised=True,
        ),
        Habits(
            "megatron-zero-bubble", "gpt", mixed="fp16", dropout_kept=True, gradient_buffer=True, dp_overlap=False,
            dp_copy=False, pp_overlap=False, pp_scatter_gather=True,
        ),
        Habits(
            "nanotron", "llama", mixed="bf16-grad32", gradient_buffer=True, dp_copy=False, upcast_loss=True,
            separate_gate=True, stacked_kv=True, gradient_local=True, tp_keep_gathered=True,
            pp_balance="cost", pp_overlap=False, checks_stages=True, zero1_after=True, dp_bucket_bytes=50 * MIB,
            memory_stages="first", memory_reserved=True, gathers_again=True,
        ),
        Habits(
            "internevo", "llama", mixed="bf16", vocab_size=103168, ffn_hidden_size={4096: 11008},
        ),
        Habits(
            "fms-fsdp", "llama", mixed="bf16", selective_blocks=2, separate_gate=True, norm_passes=(7, 14),
            rotary_passes=(8, 8),
        ),
    )
}  # fmt: skip

EDITIONS = (
    ("megatron-lm", "ZeRO-3", "deepspeed-zero3"),
    ("megatron-lm", "SC'21", "megatron-lm-2021"),
    ("megatron-lm", "Qi et al.", "megatron-zero-bubble"),
)
"""(framework as rows name it, words of the source, habits): what ran where a source tells more than the name. The first
is for rows without model parallelism, as such sources compare with it."""


def habits_of(framework: str, source: str, splits_model: bool) -> Habits | None:
    """The habits of what a row ran; None where its framework is not known."""
    for name, words, edition in EDITIONS:
        if name == framework and words in source and not (edition == "deepspeed-zero3" and splits_model):
            return FRAMEWORKS[edition]
    return FRAMEWORKS.get(framework)
