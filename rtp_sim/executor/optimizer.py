"""Optimizer steps on flat tensors: Adam, AdamW and SGD with or without momentum, with master weights where the
precision has them.

Formulas: Adam (Kingma and Ba, arXiv 1412.6980), AdamW (Loshchilov and Hutter, arXiv 1711.05101). Gradients are taken as
they are: the schedule's reductions are sums, and the loss was scaled to the mean before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rtp_sim.executor.dtypes import torch_dtype
from rtp_sim.model.training import OPTIMIZER_STATES, TrainingSpec


@dataclass(frozen=True, slots=True)
class Hyper:
    """`lr` learning rate; `betas` and `eps` of Adam; `weight_decay` of AdamW alone; `momentum` of sgd-momentum."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    momentum: float = 0.9


DEFAULTS = Hyper()

FUSED = (torch.float32, torch.float64)
"""Dtypes whose Adam torch does in one pass, on every device."""


@dataclass(frozen=True, slots=True)
class State:
    """What the optimizer keeps of some parameters: master weights (None if the weights are their own) and as many
    numbers per parameter as the optimizer needs."""

    master: torch.Tensor | None
    moments: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all of it."""
        tensors = [*self.moments, *([self.master] if self.master is not None else [])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def part(self, start: int, stop: int) -> State:
        """Views of the parameters from `start` to `stop`."""
        master = None if self.master is None else self.master[start:stop]
        return State(master, tuple(m[start:stop] for m in self.moments))


def new_state(training: TrainingSpec, weights: torch.Tensor, float_dtype: torch.dtype | None) -> State:
    """Zero moments; the master weights start as `weights`, given in full precision."""
    policy = training.policy
    dtype = torch_dtype(policy.state_dtype, float_dtype)
    moments = tuple(
        torch.zeros(weights.numel(), dtype=dtype, device=weights.device)
        for _ in range(OPTIMIZER_STATES[training.optimizer])
    )
    if policy.master_dtype is None:
        return State(None, moments)
    return State(weights.to(torch_dtype(policy.master_dtype, float_dtype), copy=True), moments)


Update = tuple[torch.Tensor, torch.Tensor, State]
"""Flat weights, their gradients and the state that belongs to them."""


def update_all(kind: str, hyper: Hyper, step: int, updates: Iterable[Update]) -> None:
    """`update` of each. Where nothing needs another dtype, torch does them in one call at the end; gradients that must
    be converted are there one after another, never all at once."""
    together: dict[torch.dtype, list[Update]] = {}
    for weights, gradients, state in updates:
        w = weights if state.master is None else state.master
        if state.master is None and _fuses(kind, w, state) and gradients.dtype == w.dtype:
            together.setdefault(w.dtype, []).append((weights, gradients, state))
        else:
            update(kind, hyper, step, weights, gradients, state)
    for same in together.values():
        _fused_adam(kind, hyper, step, [(w, g, state.moments) for w, g, state in same])


def _fuses(kind: str, w: torch.Tensor, state: State) -> bool:
    return kind in ("adam", "adamw") and w.dtype in FUSED and state.moments[0].dtype == w.dtype


def update(kind: str, hyper: Hyper, step: int, weights: torch.Tensor, gradients: torch.Tensor, state: State) -> None:
    """Step number `step` (from 1) on flat weights, in place. `kind` is a word of TrainingSpec.optimizer."""
    w = weights if state.master is None else state.master
    work = state.moments[0].dtype if state.moments else w.dtype
    g = gradients.to(work)
    if _fuses(kind, w, state):
        _fused_adam(kind, hyper, step, [(w, g, state.moments)])
    elif kind in ("adam", "adamw"):
        if kind == "adamw":
            w.mul_(1 - hyper.lr * hyper.weight_decay)
        first, second = state.moments
        b1, b2 = hyper.betas
        first.mul_(b1).add_(g, alpha=1 - b1)
        second.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (second / (1 - b2**step)).sqrt_().add_(hyper.eps)
        w.sub_((first / root).mul_(hyper.lr / (1 - b1**step)).to(w.dtype))
    elif kind == "sgd-momentum":
        (velocity,) = state.moments
        velocity.mul_(hyper.momentum).add_(g)
        w.sub_((hyper.lr * velocity).to(w.dtype))
    else:
        w.sub_((hyper.lr * g).to(w.dtype))
    if state.master is not None:
        weights.copy_(state.master)


def _fused_adam(
    kind: str, hyper: Hyper, step: int, parts: Sequence[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]]
) -> None:
    """One pass over weights, gradients and moments of each part, as torch.optim does it with `fused=True`."""
    fused = torch._fused_adamw_ if kind == "adamw" else torch._fused_adam_
    weights, gradients = [w for w, _, _ in parts], [g for _, g, _ in parts]
    first, second = [m[0] for _, _, m in parts], [m[1] for _, _, m in parts]
    steps = [torch.tensor(float(step), device=weights[0].device)] * len(parts)
    fused(
        weights, gradients, first, second, [], steps, lr=hyper.lr, beta1=hyper.betas[0], beta2=hyper.betas[1],
        weight_decay=hyper.weight_decay if kind == "adamw" else 0.0, eps=hyper.eps, amsgrad=False, maximize=False,
    )  # fmt: skip
