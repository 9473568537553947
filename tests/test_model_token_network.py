"""Layer lists over tokens (embedding, attention, mlp, moe): parameters by hand, wiring, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.network_file import read_network

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "tiny-moe.json"


def written(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "net.json"
    path.write_text(json.dumps(json.loads(EXAMPLE.read_text()) | changes))
    return path


def test_parameters_by_hand() -> None:
    network = read_network(EXAMPLE)
    embedding = 128 * 64
    attention = (8 + 2 * 4) * 8 * 64 + (8 + 2 * 4) * 8 + 64 * 64 + 64  # qkv with bias, output with bias
    moe = 8 * 64 + 8 * (2 * 96 * 64 + 64 * 96)
    mlp = 256 * 64 + 256 + 64 * 256 + 64
    assert network.parameter_count() == embedding + attention + 64 + moe + mlp + 128 * 64 + 128
    assert network.seq == 32


def test_residual_and_routing_are_wired() -> None:
    layers = {layer.name: layer for layer in read_network(EXAMPLE).layers()}
    assert layers["attention_1.attention"].inputs == ("embedding_0.y",)
    assert layers["attention_1.add"].inputs == ("embedding_0.y", "attention_1.attention.y")
    assert layers["moe_3.experts"].inputs == ("rmsnorm_2.y", "moe_3.router.y")
    assert layers["moe_3.add"].inputs == ("rmsnorm_2.y", "moe_3.experts.y")
    assert layers["cross_entropy_6"].inputs == ("linear_5.y", "targets")


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ({"kind": "linear", "out_features": 4}, "needs numbers, but its input is token ids"),
        ({"kind": "conv2d", "out_channels": 4, "kernel_size": 3}, "needs numbers, but its input is token ids"),
    ],
)
def test_ids_need_an_embedding(tmp_path: Path, layer: dict[str, object], told: str) -> None:
    path = written(tmp_path, layers=[layer, {"kind": "cross_entropy"}])
    with pytest.raises(InputError, match=told):
        read_network(path)


def test_heads_must_divide(tmp_path: Path) -> None:
    layers = [
        {"kind": "embedding", "vocab_size": 16, "features": 64},
        {"kind": "attention", "heads": 5},
        {"kind": "cross_entropy"},
    ]
    with pytest.raises(InputError, match=r"layer 1 \(attention\): 64 features, 5 heads"):
        read_network(written(tmp_path, layers=layers))


def test_more_choices_than_experts(tmp_path: Path) -> None:
    layers = [
        {"kind": "embedding", "vocab_size": 16, "features": 64},
        {"kind": "moe", "experts": 2, "top_k": 3, "ffn_features": 8},
        {"kind": "cross_entropy"},
    ]
    with pytest.raises(InputError, match="top_k 3 is more than the 2 experts"):
        read_network(written(tmp_path, layers=layers))
