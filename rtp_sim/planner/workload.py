"""`Workload`: what is to be trained, apart from how: the part of a request that all candidates of a plan share."""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.experiment import DEFAULT_SEQ_LEN, Request, find_network
from rtp_sim.model.network import Network

TOKENS_PER_STEP = 1 << 22
"""Tokens of a step where only the tokens of the whole run are given."""


def default_batch(seq_len: int | None) -> int:
    """Sequences of a step of `TOKENS_PER_STEP`."""
    return max(1, TOKENS_PER_STEP // (seq_len or DEFAULT_SEQ_LEN))


@dataclass(frozen=True, slots=True)
class Workload:
    """Model, sequence length, sequences per step and precision, named as in `experiment.Request`."""

    model: str
    global_batch: int
    seq_len: int | None = None
    precision: str = "bf16"
    optimizer: str = "adamw"
    attention: str = "flash"
    clip_norm: float | None = None
    loss_scale: str = "none"
    dropout: float | None = None

    def network(self) -> Network:
        """The model as a network. InputError if there is none of that name."""
        return find_network(self.model, self.seq_len, self.attention, self.dropout)

    def request(self, cluster: str, strategy: str) -> Request:
        """A request for this workload, to be completed by a candidate (`Candidate.request`)."""
        return Request(
            model=self.model, cluster=cluster, strategy=strategy, seq_len=self.seq_len, precision=self.precision,
            optimizer=self.optimizer, attention=self.attention, clip_norm=self.clip_norm, loss_scale=self.loss_scale,
            dropout=self.dropout,
        )  # fmt: skip
