"""`ModelSpec`: parameter counts worked out by hand, sizes that follow from others, ways to be wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.spec import ModelSpec, with_overrides


def tiny(**other: Any) -> ModelSpec:
    sizes = {
        "num_layers": 2, "hidden_size": 12, "num_heads": 3, "vocab_size": 20, "max_positions": 16,
    }  # fmt: skip
    return ModelSpec("tiny", **(sizes | other))


def test_sizes_left_out_follow_from_the_others() -> None:
    spec = tiny()
    assert (spec.num_kv_heads, spec.head_dim, spec.ffn_hidden_size) == (3, 4, 48)
    assert (spec.attention_size, spec.kv_size, spec.is_moe) == (12, 12, False)


def test_breakdown_of_a_gpt_by_hand() -> None:
    breakdown = tiny().parameter_breakdown()
    assert breakdown == {
        "token_embedding": 240,  # 20 x 12
        "position_embedding": 192,  # 16 x 12
        "token_type_embedding": 0,
        "embedding_norm": 0,
        "attention": 1248,  # 2 x (12 x 36 + 36 + 12 x 12 + 12)
        "router": 0,
        "mlp": 2424,  # 2 x (12 x 48 + 48 + 48 x 12 + 12)
        "block_norms": 96,  # 2 x 2 x (12 + 12)
        "final_norm": 24,
        "pooler": 0,
        "head": 0,  # shares the embedding
    }
    assert tiny().parameter_count() == 4224


def test_grouped_queries_wide_heads_and_gated_mlp_by_hand() -> None:
    spec = tiny(
        num_kv_heads=1, head_dim=6, ffn_hidden_size=10, gated_mlp=True, position="rotary", norm="rmsnorm",
        tied_embeddings=False, qkv_bias=False, out_bias=False, mlp_bias=False,
    )  # fmt: skip
    breakdown = spec.parameter_breakdown()
    assert breakdown["attention"] == 2 * (12 * (18 + 6 + 6) + 18 * 12)
    assert breakdown["mlp"] == 2 * (12 * 20 + 10 * 12)
    assert breakdown["block_norms"] == 48
    assert breakdown["position_embedding"] == 0
    assert breakdown["head"] == 240


def test_experts_by_hand() -> None:
    spec = tiny(num_experts=4, experts_per_token=1, ffn_hidden_size=10, mlp_bias=False)
    breakdown = spec.parameter_breakdown()
    assert breakdown["router"] == 2 * 4 * 12
    assert breakdown["mlp"] == 2 * 4 * (120 + 120)
    assert spec.parameter_count() - spec.active_parameter_count() == 2 * 3 * 240


def test_a_dense_model_is_all_active() -> None:
    assert tiny().active_parameter_count() == tiny().parameter_count()


def test_position_rows_and_token_types() -> None:
    breakdown = tiny(position_offset=2, token_types=2, embedding_norm=True).parameter_breakdown()
    assert breakdown["position_embedding"] == 18 * 12
    assert breakdown["token_type_embedding"] == 24
    assert breakdown["embedding_norm"] == 24


@pytest.mark.parametrize(
    ("changes", "head"),
    [
        ({}, 0),
        ({"tied_embeddings": False}, 240),
        ({"lm_head_bias": True}, 20),
        ({"head_transform": True}, 12 * 12 + 12 + 24),
        ({"tied_embeddings": False, "has_head": False}, 0),
    ],
)
def test_head(changes: dict[str, Any], head: int) -> None:
    assert tiny(**changes).parameter_breakdown()["head"] == head


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"num_layers": 0}, ["num_layers is 0", "at least 1"]),
        ({"hidden_size": 12.0}, ["hidden_size is 12.0", "whole number"]),
        ({"num_heads": True}, ["num_heads is True", "whole number"]),
        ({"num_heads": 5}, ["num_heads is 5", "divisor of hidden_size = 12"]),
        ({"num_kv_heads": 2}, ["num_kv_heads is 2", "divisor of num_heads = 3"]),
        ({"num_kv_heads": -1}, ["num_kv_heads is -1"]),
        ({"vocab_size": "20"}, ["vocab_size is '20'"]),
        ({"head_dim": 3, "position": "rotary"}, ["head_dim is 3", "even"]),
        ({"activation": "tanh"}, ["activation is 'tanh'", "gelu, relu, silu"]),
        ({"position": "alibi"}, ["position is 'alibi'", "learned, rotary"]),
        ({"norm": "batchnorm"}, ["norm is 'batchnorm'", "rmsnorm"]),
        ({"norm_placement": "both"}, ["norm_placement is 'both'", "pre, post"]),
        ({"num_experts": 1, "mlp_bias": False}, ["num_experts is 1"]),
        ({"num_experts": 4, "mlp_bias": False}, ["experts_per_token is 0", "1 to num_experts = 4"]),
        ({"num_experts": 4, "experts_per_token": 5, "mlp_bias": False}, ["experts_per_token is 5"]),
        ({"num_experts": 4, "experts_per_token": 2}, ["mlp_bias is True", "no biases"]),
        ({"experts_per_token": 2}, ["experts_per_token is 2", "num_experts is 0"]),
        ({"position": "none", "position_offset": 2}, ["position_offset is 2", "'none'"]),
        ({"has_head": False, "lm_head_bias": True}, ["lm_head_bias is True", "has_head is False"]),
        ({"has_head": False, "head_transform": True}, ["head_transform is True"]),
        ({"dropout": 1.0}, ["dropout is 1.0", "below 1"]),
        ({"dropout": True}, ["dropout is True"]),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as error:
        tiny(**changes)
    assert all(part in str(error.value) for part in ["'tiny'", "expected", *parts]), str(error.value)


def test_overriding_one_size_takes_the_others_along() -> None:
    spec = with_overrides(tiny(), {"hidden_size": 24})
    assert (spec.num_kv_heads, spec.head_dim, spec.ffn_hidden_size) == (3, 8, 96)
    assert with_overrides(tiny(), {"num_heads": 6}).num_kv_heads == 6


def test_overriding_keeps_sizes_that_stand_alone() -> None:
    spec = with_overrides(tiny(num_kv_heads=1, head_dim=6, ffn_hidden_size=10), {"hidden_size": 24})
    assert (spec.num_kv_heads, spec.head_dim, spec.ffn_hidden_size) == (1, 6, 10)
    odd = tiny(hidden_size=10, head_dim=4)  # 3 heads do not divide 10
    assert with_overrides(odd, {"num_layers": 5}) == dataclasses.replace(odd, num_layers=5)


def test_overriding_a_field_there_is_not() -> None:
    with pytest.raises(InputError, match=r"no field 'layers'; its fields are name, num_layers"):
        with_overrides(tiny(), {"layers": 5})
