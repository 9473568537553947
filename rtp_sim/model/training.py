"""How a model is trained: batch, sequence, precision, recomputation, optimizer, clipping. No ranks, no time.

Bytes per parameter follow the accounting of ZeRO (Rajbhandari et al., arXiv 1910.02054, section 3.1): with
Adam and mixed precision 2 (weights) + 2 (gradients) + 4 (fp32 master weights) + 4 + 4 (Adam's two moments) =
16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass

from rtp_sim.errors import InputError
from rtp_sim.model.spec import ModelSpec
from rtp_sim.schedule.ir import DTYPE_BYTES

RECOMPUTE = ("none", "selective", "full")
ATTENTIONS = ("flash", "materialised")
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sgd": 0, "sgd-momentum": 1}
"""Numbers per parameter that an optimizer keeps from step to step, master weights aside."""

LOSS_SCALE = 65536.0
"""Where a dynamic loss scale starts, as torch.amp.GradScaler's."""

STORAGE_DTYPES = ("fp32", "bf16", "fp16")
"""Dtypes that weights, gradients and optimizer states can be stored in."""


@dataclass(frozen=True, slots=True)
class PrecisionPolicy:
    """Which dtype each tensor role has.

    Weights and activations share `weight_dtype`; matrix units compute in `compute_dtype` (they differ for
    tf32, which is stored as fp32). `master_dtype` is None where the optimizer updates the weights themselves.
    """

    name: str
    weight_dtype: str
    gradient_dtype: str
    state_dtype: str
    master_dtype: str | None
    compute_dtype: str

    def kernel_dtype(self, kernel: str) -> str:
        """The dtype that a kernel runs in: fp8 is for the products of linear layers alone."""
        if self.compute_dtype == "fp8" and not kernel.startswith("linear"):
            return self.weight_dtype
        return self.compute_dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight (and of one activation)."""
        return DTYPE_BYTES[self.weight_dtype]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one stored gradient."""
        return DTYPE_BYTES[self.gradient_dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes of one number of the optimizer's state."""
        return DTYPE_BYTES[self.state_dtype]

    @property
    def master_bytes(self) -> int:
        """Bytes of one master weight; 0 without master weights."""
        return 0 if self.master_dtype is None else DTYPE_BYTES[self.master_dtype]


PRECISIONS = {
    policy.name: policy
    for policy in (
        # name, weights, gradients, optimizer states, master weights, compute
        PrecisionPolicy("fp32", "fp32", "fp32", "fp32", None, "fp32"),
        PrecisionPolicy("tf32", "fp32", "fp32", "fp32", None, "tf32"),
        PrecisionPolicy("fp16", "fp16", "fp16", "fp32", "fp32", "fp16"),
        PrecisionPolicy("bf16", "bf16", "bf16", "fp32", "fp32", "bf16"),
        PrecisionPolicy("bf16-grad32", "bf16", "fp32", "fp32", "fp32", "bf16"),
        PrecisionPolicy("fp8", "bf16", "bf16", "fp32", "fp32", "fp8"),
        PrecisionPolicy("fp16-pure", "fp16", "fp16", "fp16", None, "fp16"),
        PrecisionPolicy("bf16-pure", "bf16", "bf16", "bf16", None, "bf16"),
    )
}


@dataclass(frozen=True, slots=True)
class TrainingSpec:
    """One training step as one model replica sees it: `num_microbatches` of `micro_batch` sequences each.

    `precision` names one of PRECISIONS; `grad_dtype`, where given, replaces its gradient dtype. `recompute`
    "full" keeps each block's input only, "selective" drops the attention scores and recomputes them
    (Korthikanti et al., arXiv 2205.05198). `attention` says whether the scores are kept in fast memory
    ("flash") or written out. `clip_norm`, where given, is the largest norm that all gradients together may
    have. `loss_scale` multiplies the loss against underflow of small gradients (Micikevicius et al., arXiv
    1710.03740): "none", "dynamic" from 65536 on, "dynamic:1024" from another start, or a constant as in
    "static:1024". It is "none" for fp16 too: as with clipping, a step has what was asked for.

    Raises InputError naming the field, what was given and what was expected.
    """

    micro_batch: int
    seq_len: int
    num_microbatches: int = 1
    precision: str = "bf16"
    recompute: str = "none"
    optimizer: str = "adamw"
    attention: str = "flash"
    grad_dtype: str | None = None
    clip_norm: float | None = None
    loss_scale: str = "none"

    def __post_init__(self) -> None:
        """Checks every field."""
        for field in ("micro_batch", "seq_len", "num_microbatches"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise InputError(f"training: {field} is {value!r}; expected a whole number of at least 1")
        _require_one_of("precision", self.precision, PRECISIONS)
        _require_one_of("recompute", self.recompute, RECOMPUTE)
        _require_one_of("optimizer", self.optimizer, OPTIMIZER_STATES)
        _require_one_of("attention", self.attention, ATTENTIONS)
        if self.grad_dtype is not None:
            _require_one_of("grad_dtype", self.grad_dtype, STORAGE_DTYPES)
        if self.clip_norm is not None and not _is_positive(self.clip_norm):
            raise InputError(f"training: clip_norm is {self.clip_norm!r}; expected a number above 0, for example 1.0")
        if self.scales_loss and self.initial_loss_scale is None:
            raise InputError(
                f"training: loss_scale is {self.loss_scale!r}; expected none, dynamic or a number as in static:1024"
            )

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, so that a step with gradients that are not finite is left out."""
        return self.loss_scale != "none"

    @property
    def initial_loss_scale(self) -> float | None:
        """What the loss is multiplied by in the first step; None where `loss_scale` does not say."""
        kind, _, number = self.loss_scale.partition(":") if isinstance(self.loss_scale, str) else ("", "", "")
        try:
            scale = float(number) if number or kind != "dynamic" else LOSS_SCALE
        except ValueError:
            return None
        return scale if kind in ("dynamic", "static") and 0 < scale < math.inf else None

    @property
    def dynamic_loss_scale(self) -> bool:
        """Whether the scale changes from step to step."""
        return self.loss_scale.startswith("dynamic")

    @property
    def measures_gradients(self) -> bool:
        """Whether a step looks at all gradients together before it updates anything."""
        return self.clip_norm is not None or self.scales_loss

    @property
    def policy(self) -> PrecisionPolicy:
        """The precision policy, with `grad_dtype` applied."""
        policy = PRECISIONS[self.precision]
        if self.grad_dtype is None:
            return policy
        return dataclasses.replace(policy, gradient_dtype=self.grad_dtype)

    @property
    def tokens_per_microbatch(self) -> int:
        """Tokens (or, for an image model with seq_len 1, samples) of one micro-batch."""
        return self.micro_batch * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens one replica works through in a step."""
        return self.tokens_per_microbatch * self.num_microbatches

    def optimizer_bytes_per_parameter(self) -> int:
        """Bytes per parameter that only the optimizer needs: its states and the master weights."""
        policy = self.policy
        return OPTIMIZER_STATES[self.optimizer] * policy.state_bytes + policy.master_bytes

    def bytes_per_parameter(self) -> int:
        """Bytes per parameter of weights, gradients, optimizer states and master weights together."""
        policy = self.policy
        return policy.weight_bytes + policy.gradient_bytes + self.optimizer_bytes_per_parameter()


def check_training(model: ModelSpec, training: TrainingSpec) -> None:
    """Raises InputError if `model` cannot be trained so: a table of learned positions ends at
    `max_positions`."""
    if model.position == "learned" and training.seq_len > model.max_positions:
        raise InputError(
            f"training: seq_len is {training.seq_len}, but model {model.name!r} has learned positions for"
            f" {model.max_positions} tokens; expected seq_len <= {model.max_positions},"
            f" or a model with max_positions={training.seq_len}"
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _require_one_of(field: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InputError(f"training: {field} is {value!r}; expected one of {', '.join(choices)}")
