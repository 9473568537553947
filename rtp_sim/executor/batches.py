"""Random batches of a network's inputs, the same for the same seed.

A sample depends on its number in the step's global batch, not on who works on it: layouts that share the same global
batch among other replicas and micro-batches train on the same data.
"""

from __future__ import annotations

import zlib

import torch

from rtp_sim.errors import InputError
from rtp_sim.model.layers import CrossEntropy, Embedding
from rtp_sim.model.network import Input, Network


def random_batch(
    network: Network, micro_batch: int, micros: int, replica: int = 0, step: int = 0, seed: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Inputs of `micros` micro-batches of `micro_batch` samples: ids within the vocabulary that reads them, numbers
    from the normal distribution. InputError if no embedding or loss reads an id tensor."""
    found = []
    for micro in range(micros):
        first = (replica * micros + micro) * micro_batch
        samples = [_sample(network, (seed, step, number)) for number in range(first, first + micro_batch)]
        found.append({i.name: torch.cat([s[i.name] for s in samples]) for i in network.inputs})
    return found


def _sample(network: Network, which: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(which).encode()))
    return {i.name: _random(network, i, generator) for i in network.inputs}


def _random(network: Network, tensor: Input, generator: torch.Generator) -> torch.Tensor:
    numel = tensor.numel_per_sample
    if tensor.dtype != "int64":
        return torch.randn(numel, generator=generator, dtype=torch.float64)
    return torch.randint(0, _vocabulary(network, tensor.name), (numel,), generator=generator)


def _vocabulary(network: Network, name: str) -> int:
    for layer in network.layers():
        if name in layer.inputs and isinstance(layer.op, Embedding | CrossEntropy):
            return layer.op.vocab
    raise InputError(f"network {network.name}: nothing reads the ids {name!r}; expected an embedding or a loss")
