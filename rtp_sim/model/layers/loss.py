"""The loss that a network ends in."""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.model.layers.base import WHOLE, Call, Extent, LayerOp, Lowered, Split, Tensor, dims_of, more_passes


@dataclass(frozen=True, slots=True)
class CrossEntropy(LayerOp):
    """Mean cross-entropy of logits (x0) and targets (x1); keeps the log-probabilities. Split "vocab" by columns, and
    then maximum, sum and target logit of each token (`statistics`, fp32) are to be reduced over the shards.

    `unfused`: as torch.nn.CrossEntropyLoss in a loop that holds on to the logits: the backward has logits,
    log-probabilities, their gradient and that of the logits at the same time. `upcast`: the logits are first copied to
    the dtype of the loss; the log-probabilities are made in another copy of them, beside the first. `passes`: maximum,
    shift, exponentials, sum and division are torch ops of their own, as in Megatron's vocabulary-parallel loss (see
    `more_passes`)."""

    vocab: int
    unfused: bool = False
    upcast: bool = False
    passes: tuple[int, int] = (0, 0)

    def lower(self, extent: Extent, split: Split = WHOLE) -> Lowered:
        """One row-wise kernel, or log-softmax and look-up."""
        rows = split.share(extent.tokens, "rows")
        width = split.share(self.vocab, "vocab")
        if self.unfused and split.kind != "vocab":
            dims, loss = dims_of(rows=rows, width=width), Tensor(rows * width, "loss")
            calls = (
                Call("log_softmax", dims, ("x0",), ("log_probs",)),
                Call("nll", dims, ("log_probs", "x1"), ("y",)),
            )
            return Lowered(calls, {"y": Tensor(1, "fp32"), "log_probs": loss})
        outputs = ("y", "log_probs", "statistics")[: 3 if split.kind == "vocab" else 2]
        tensors = {
            "y": Tensor(1, "fp32"),
            "log_probs": Tensor(rows * width, "loss"),
            "statistics": Tensor(3 * rows, "fp32"),
        }
        dims = dims_of(rows=rows, width=width)
        if self.upcast:
            cast = Call("upcast", dims_of(numel=rows * width), ("x0",), ("wide",))
            call = Call("cross_entropy", dims, ("wide", "x1"), ("y", "log_probs", "statistics"))
            chain = (cast, *more_passes(self.passes, rows * width, "wide"), call)
            return Lowered(chain, tensors | {"wide": Tensor(rows * width, "loss")})
        return Lowered((Call("cross_entropy", dims, ("x0", "x1"), outputs),), tensors)
