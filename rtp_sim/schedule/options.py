"""`Options`: the choices within a strategy that users can name, with the frameworks' defaults."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """`ddp_bucket_bytes` and `ddp_first_bucket_bytes`: torch DDP's 25 MiB and 1 MiB. `fsdp_unit`: "block" gathers each
    block alone, "model" the whole model as one unit. `fsdp_prefetch`: gather the next unit while this one computes.
    `fsdp_gather_again`: weights that were gathered to recompute a block are dropped and gathered once more for its
    backward (DeepSpeed's ZeRO-3 of 2021).
    `fsdp_split_gradients`: gradients are computed per layer and copied into the flat one (torch's FSDP 1).
    `rtp_fuse_mlp`: rotate an MLP as one unit instead of two. `rtp_hide_gradient_hop`: add the travelling gradient
    after the next sub-step instead of waiting for it first. `rtp_prefetch`: start a unit's first hop during the
    previous unit. `rtp_chunk_bytes`: the bounce buffer of the in-place form. `rtp_ring`: "flat", "two-level", or
    "auto", which is two-level where a ring covers several whole nodes.
    `dp_sync`: what the data-parallel axis beside rotation or tensor parallelism does: "ddp", "zero1" or "zero2".
    `zero1_size`: under zero1, so many neighbouring replicas share the optimizer's state instead of all of them;
    gradients are then all-reduced over all (InternEvo's ZeRO-1 groups). 0 is all.
    `zero1_all_reduce`: under zero1 gradients are all-reduced although each rank needs its slice only (nanotron).
    `dp_overlap`: reduce gradients while the backward goes on; without it all at once, after it.
    `sequence_parallel`: tensor parallelism inside pipeline stages splits activations between layers by tokens.
    `vpp`: chunks per stage of the interleaved pipeline. `pp_layers`: transformer blocks per piece (stages.py); without
    them `pp_balance`, "layers" or "cost". `pp_overlap`: a stage computes on while it sends; without it the next
    computation waits for the sends, and in 1F1B and GPipe the host for what it receives, as in Megatron's
    plain 1F1B (`torch.cuda.synchronize` behind each exchange) and in nanotron (its host reads shapes that it receives).
    `pp_synchronised`: the host waits for the end of every forward and every backward of a micro-batch, as Megatron's
    timers do (in 1F1B and GPipe).
    `pp_scatter_gather`: tensor-parallel ranks each send a share of an activation that all of them have, and gather it
    behind (arXiv 2104.04473, section 4.1).
    `dp_copy`: reduce gradients in buckets of their own, as torch DDP does (tensor parallelism and rotation reduce in
    place). `gradient_buffer`: gradients stay allocated from step to step. `gradient_local`: each layer's gradient is
    computed in the weights' dtype into storage of its own and then added to the kept one (fp32 accumulation by hooks).
    `tp_overlap`: tensor parallelism reduces the gradient of a layer's input while the layer's weight gradients are
    computed; without it behind them, as Megatron did before December 2021.
    `tp_keep_gathered`: sequence parallelism keeps gathered inputs for the backward pass instead of gathering again.
    `optimizer_scratch`: numbers of the optimizer's dtype per parameter that its step allocates for itself (torch's
    foreach Adam: 1).
    `eval_passes`: forward-only passes instead of a training step (rotation alternates direction)."""

    ddp_bucket_bytes: int = 25 * MIB
    ddp_first_bucket_bytes: int = MIB
    fsdp_unit: str = "block"
    fsdp_prefetch: bool = True
    fsdp_gather_again: bool = False
    fsdp_split_gradients: bool = False
    rtp_fuse_mlp: bool = False
    rtp_hide_gradient_hop: bool = False
    rtp_prefetch: bool = False
    rtp_chunk_bytes: int = 4 * MIB
    rtp_ring: str = "auto"
    dp_sync: str = "ddp"
    zero1_size: int = 0
    zero1_all_reduce: bool = False
    dp_overlap: bool = True
    sequence_parallel: bool = False
    vpp: int = 1
    pp_layers: tuple[int, ...] = ()
    pp_balance: str = "layers"
    pp_overlap: bool = True
    pp_synchronised: bool = False
    pp_scatter_gather: bool = False
    dp_copy: bool = True
    gradient_buffer: bool = False
    gradient_local: bool = False
    tp_overlap: bool = True
    tp_keep_gathered: bool = False
    optimizer_scratch: int = 0
    eval_passes: int = 0
