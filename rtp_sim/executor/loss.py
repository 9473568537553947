"""Cross-entropy kernels: whole, and of logits that are split by vocabulary over ranks.

Split, the kernel leaves each token's maximum, sum of exponentials and target logit over its own columns; all-reduces of
these `statistics` follow, and only then the loss is known. The mean is over all tokens of the micro-batch, also where a
rank sees only its rows of them: its loss is then its part of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rtp_sim.executor.dtypes import accurate
from rtp_sim.executor.launch import Launch, Made, matrix
from rtp_sim.model.layers import CrossEntropy


def _targets(k: Launch) -> torch.Tensor:
    """Target ids of the rank's rows, counted from its first column."""
    assert isinstance(k.op, CrossEntropy)
    first = k.start(k.extent.tokens, "rows")
    return k.x[1][first : first + k.dims["rows"]] - k.start(k.op.vocab, "vocab")


def cross_entropy(k: Launch) -> Made:
    """Mean loss and log-probabilities; split by vocabulary, the logits themselves and their statistics."""
    logits, targets = accurate(matrix(k.x[0], k.dims["rows"])), _targets(k)
    if k.split.kind == "vocab":
        return Made((logits.new_zeros(1), logits.clone(), statistics(logits, targets)))
    log_probs = torch.log_softmax(logits, 1)
    loss = -log_probs.gather(1, targets[:, None]).sum() / k.extent.tokens
    return Made((loss.reshape(1), log_probs))


def cross_entropy_bwd(k: Launch) -> Made:
    """(probabilities - one at the target) / tokens, times what the loss counts in the step."""
    saved, targets = matrix(k.y[1], k.dims["rows"]), _targets(k)
    share = k.gradient_scale / k.extent.tokens
    if k.split.kind != "vocab":
        start = torch.zeros_like(saved).scatter_(1, targets[:, None], -share)
        return Made(dx={0: torch.ops.aten._log_softmax_backward_data(start, saved, 1, saved.dtype)})
    maximum, total, _ = k.y[2].view(3, -1)
    probs = (saved - maximum[:, None]).exp() / total[:, None]
    found = ((targets >= 0) & (targets < probs.shape[1])).to(probs.dtype)
    targets = targets.clamp(0, max(0, probs.shape[1] - 1))
    if probs.shape[1]:
        probs.scatter_add_(1, targets[:, None], -found[:, None])
    return Made(dx={0: probs.mul_(share)})


# ---- statistics of split logits


def statistics(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Rows of maxima, sums of exp(logit - maximum) and target logits (0 where the target lies elsewhere)."""
    maximum = logits.amax(1) if logits.shape[1] else logits.new_full((logits.shape[0],), float("-inf"))
    total = (logits - maximum[:, None]).exp().sum(1)
    found = (targets >= 0) & (targets < logits.shape[1])
    target = torch.zeros_like(maximum)
    target[found] = logits[found, targets[found]]
    return torch.stack([maximum, total, target])


def rebased(rows: torch.Tensor, logits: torch.Tensor) -> None:
    """Puts the sums of exponentials on the common maximum, which is now known, before they are added up."""
    rows[1] = (logits.view(rows.shape[1], -1) - rows[0][:, None]).exp().sum(1)


def mean_loss(rows: torch.Tensor) -> torch.Tensor:
    """The loss from reduced statistics: mean of log(sum) + maximum - target."""
    return (rows[1].log() + rows[0] - rows[2]).mean()


KERNELS: Mapping[str, Callable[[Launch], Made]] = {
    "cross_entropy": cross_entropy, "cross_entropy.bwd": cross_entropy_bwd,
}  # fmt: skip
