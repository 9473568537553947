"""The built-in models against their published parameter counts, and finding a model by name or path."""

from __future__ import annotations

from pathlib import Path

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.network import transformer_network
from rtp_sim.model.presets import find_model, list_models

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
    "opt-6.7b": 6_658_473_984,
    "bert-large": 335_141_888,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}
"""Sizes of the released checkpoints."""


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_counts(name: str, parameters: int) -> None:
    assert find_model(name).parameter_count() == parameters


@pytest.mark.parametrize("name", ["gpt3-175b", "opt-175b"])
def test_rounded_published_counts(name: str) -> None:
    assert find_model(name).parameter_count() == pytest.approx(175e9, rel=0.005)


def test_mixtral_active_parameters_are_the_published_13_billion() -> None:
    assert find_model("mixtral-8x7b").active_parameter_count() == pytest.approx(12.9e9, rel=0.005)


def test_bert_with_its_language_model_head() -> None:
    head = {"has_head": True, "pooler": False, "head_transform": True, "lm_head_bias": True}
    # Less the pooler, plus dense layer, norm and output bias; the output weights are the embedding.
    assert find_model("bert-large", **head).parameter_count() == (
        335_141_888 - (1024 * 1024 + 1024) + (1024 * 1024 + 1024) + 2 * 1024 + 30522
    )


def test_the_tiny_model_by_hand() -> None:
    block = (64 * 192 + 192) + (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 4 * 64
    assert find_model("gpt2-tiny").parameter_count() == 256 * 64 + 64 * 64 + 2 * block + 2 * 64


@pytest.mark.parametrize("name", list_models())
def test_layers_hold_as_many_parameters_as_the_closed_form(name: str) -> None:
    spec = find_model(name)
    # Training a language model does not run the pooler, so the network leaves it out.
    expected = spec.parameter_count() - spec.parameter_breakdown()["pooler"]
    assert transformer_network(spec, 64).parameter_count() == expected


def test_every_preset_is_listed_and_tested() -> None:
    assert {*list_models()} == {*PUBLISHED, "gpt2-tiny", "gpt3-175b", "opt-175b"}


def test_overrides() -> None:
    spec = find_model("gpt2", num_layers=24, hidden_size=1024, num_heads=16)
    assert spec.parameter_count() == PUBLISHED["gpt2-medium"]


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "mixtral-8x7b"])
def test_example_configs_are_the_presets(name: str) -> None:
    assert find_model(EXAMPLES / f"{name}.json") == find_model(name)


def test_a_directory_with_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "my-gpt"
    folder.mkdir()
    (folder / "config.json").write_text((EXAMPLES / "gpt2.json").read_text())
    spec = find_model(str(folder))
    assert (spec.name, spec.parameter_count()) == ("my-gpt", PUBLISHED["gpt2"])


def test_names_come_before_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("gpt2").num_layers == 12


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt2-xxl", "did you mean gpt2-xl"),
        ("LLAMA3-8B", "did you mean llama3-8b"),
        ("zzz", "the models are gpt2-tiny, gpt2"),
        ("models/none.json", "no model file at models/none.json"),
    ],
)
def test_unknown_names(name: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        find_model(name)
    assert said in str(error.value)


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json.* or a name like gpt2"):
        find_model(tmp_path)
