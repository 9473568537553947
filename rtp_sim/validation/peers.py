"""What peers say of published runs that are in our files too: their mean errors, each with the rows that it is about.

A figure is either claimed by the peer itself or was found by running it on the rows; which of the two is said. Where a
peer gives no predictions row by row, its figure is about its whole table, of which our file may hold a part.
"""

from __future__ import annotations

from dataclasses import dataclass

from rtp_sim.validation.measured import RowFile


@dataclass(frozen=True, slots=True)
class Claim:
    """`mape` of step times of `rows` by `peer`; `file` holds such rows of ours, with model parallelism alone where
    `model_parallel`."""

    rows: str
    peer: str
    mape: float
    file: str
    model_parallel: bool = False

    def covers(self, file: str, cells: RowFile | None) -> bool:
        """Whether a row of ours is one of those that the claim is about."""
        if cells is None or file != self.file:
            return False
        return not self.model_parallel or cells.tp * cells.pp > 1


CLAIMS = (
    Claim("Megatron SC'21, 16 model-parallel rows", "Calculon, run on them", 0.103, "megatron_sc21.csv", True),
    Claim("Korthikanti et al., table 5", "Calculon, claimed on 8 rows", 0.0365, "megatron_selective.csv"),
    Claim("vTrain, one node", "Calculon, run on 1,440 rows", 0.39, "vtrain.csv"),
    Claim("vTrain, one node", "vTrain with profiled kernels, claimed", 0.0837, "vtrain.csv"),
)
"""Calculon caa4b11 with its own A100 profile; vTrain: MICRO 2024 (arXiv 2312.12391)."""
