"""`TrainingSpec`: bytes per parameter as the literature counts them, and every way to be wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.presets import find_model
from rtp_sim.model.training import PRECISIONS, TrainingSpec, check_training


@pytest.mark.parametrize(
    ("precision", "optimizer", "optimizer_bytes", "all_bytes"),
    [
        ("fp32", "adam", 8, 16),
        ("fp32", "sgd", 0, 8),
        ("fp32", "sgd-momentum", 4, 12),
        ("tf32", "adamw", 8, 16),
        ("fp16", "adam", 12, 16),  # ZeRO, arXiv 1910.02054, section 3.1
        ("bf16", "adamw", 12, 16),
        ("bf16", "sgd", 4, 8),
        ("bf16", "sgd-momentum", 8, 12),
        ("bf16-grad32", "adamw", 12, 18),
        ("fp16-pure", "adam", 4, 8),
        ("bf16-pure", "adamw", 4, 8),
        ("bf16-pure", "sgd", 0, 4),
    ],
)
def test_bytes_per_parameter(precision: str, optimizer: str, optimizer_bytes: int, all_bytes: int) -> None:
    training = TrainingSpec(1, 8, precision=precision, optimizer=optimizer)
    assert training.optimizer_bytes_per_parameter() == optimizer_bytes
    assert training.bytes_per_parameter() == all_bytes


def test_gradient_dtype_replaces_the_policys() -> None:
    training = TrainingSpec(1, 8, precision="bf16", grad_dtype="fp32")
    assert dataclasses.replace(training.policy, name="bf16-grad32") == PRECISIONS["bf16-grad32"]
    assert TrainingSpec(1, 8, precision="bf16").policy is PRECISIONS["bf16"]


def test_tf32_is_stored_as_fp32() -> None:
    policy = PRECISIONS["tf32"]
    assert (policy.weight_bytes, policy.compute_dtype, policy.master_bytes) == (4, "tf32", 0)


def test_tokens() -> None:
    training = TrainingSpec(3, 128, num_microbatches=4)
    assert (training.tokens_per_microbatch, training.tokens_per_step) == (384, 1536)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batch": 0}, "micro_batch is 0; expected a whole number of at least 1"),
        ({"seq_len": 2.5}, "seq_len is 2.5"),
        ({"num_microbatches": True}, "num_microbatches is True"),
        ({"precision": "fp4"}, "precision is 'fp4'; expected one of fp32, tf32, fp16, bf16"),
        ({"recompute": "some"}, "recompute is 'some'; expected one of none, selective, full"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; expected one of adam, adamw, sgd, sgd-momentum"),
        ({"attention": "paged"}, "attention is 'paged'; expected one of flash, materialised"),
        ({"grad_dtype": "int8"}, "grad_dtype is 'int8'; expected one of fp32, bf16, fp16"),
        ({"clip_norm": 0}, "clip_norm is 0; expected a number above 0"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"loss_scale": "often"}, "loss_scale is 'often'; expected none, dynamic or a number as in static:1024"),
        ({"loss_scale": "static"}, "loss_scale is 'static'"),
        ({"loss_scale": "static:-1"}, "loss_scale is 'static:-1'"),
        ({"loss_scale": "dynamic:inf"}, "loss_scale is 'dynamic:inf'"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as error:
        TrainingSpec(**({"micro_batch": 1, "seq_len": 8} | changes))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("loss_scale", "start", "dynamic"),
    [("none", None, False), ("dynamic", 65536, True), ("dynamic:2", 2, True), ("static:1024", 1024, False)],
)
def test_loss_scales(loss_scale: str, start: float | None, dynamic: bool) -> None:
    training = TrainingSpec(1, 8, loss_scale=loss_scale)
    assert (training.initial_loss_scale, training.dynamic_loss_scale) == (start, dynamic)
    assert training.scales_loss == training.measures_gradients == (start is not None)
    assert TrainingSpec(1, 8, clip_norm=1).measures_gradients


def test_learned_positions_end() -> None:
    check_training(find_model("gpt2"), TrainingSpec(1, 1024))
    with pytest.raises(InputError, match=r"seq_len is 1025.*1024 tokens"):
        check_training(find_model("gpt2"), TrainingSpec(1, 1025))


def test_rotary_positions_go_on() -> None:
    check_training(find_model("llama2-7b"), TrainingSpec(1, 8192))
