"""The models whose training steps a calibration runs on CPUs: small GPTs and Llamas, the smallest bound by launches,
the largest by compute. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rtp_sim.model.network import Network, transformer_network
from rtp_sim.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a probe. Odd ones, so that nothing is calibrated on what people then predict."""

    family: str
    hidden: int
    heads: int
    vocab: int
    seq: int
    micro_batch: int

    def network(self) -> Network:
        """Two blocks of the family."""
        llama: dict[str, Any] = {
            "gated_mlp": True, "activation": "silu", "position": "rotary", "norm": "rmsnorm", "tied_embeddings": False,
            "qkv_bias": False, "out_bias": False, "mlp_bias": False,
        }  # fmt: skip
        spec = ModelSpec(
            f"probe-{self.hidden}", 2, self.hidden, self.heads, vocab_size=self.vocab, max_positions=self.seq,
            **(llama if self.family == "llama" else {}),
        )  # fmt: skip
        return transformer_network(spec, self.seq, "flash")


SHAPES = (
    Shape("gpt", 64, 4, 160, 40, 2), Shape("gpt", 96, 4, 300, 48, 12), Shape("gpt", 96, 2, 400, 160, 24),
    Shape("gpt", 192, 6, 700, 96, 4), Shape("gpt", 320, 5, 1100, 72, 10), Shape("gpt", 320, 5, 1100, 200, 2),
    Shape("gpt", 512, 8, 1500, 96, 3), Shape("gpt", 704, 11, 2200, 112, 6),
    Shape("llama", 96, 4, 300, 48, 6), Shape("llama", 320, 10, 1100, 80, 5), Shape("llama", 576, 8, 1600, 72, 4),
)  # fmt: skip
ISSUE_SHAPE = Shape("gpt", 224, 4, 800, 88, 2)
QUICK_SHAPES = (
    Shape("gpt", 64, 4, 160, 40, 2), Shape("gpt", 96, 4, 300, 48, 6), Shape("gpt", 192, 6, 700, 64, 3),
    Shape("gpt", 256, 4, 900, 72, 3),
)  # fmt: skip
