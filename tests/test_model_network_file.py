"""Networks from JSON lists of layers: shapes followed by hand, blocks, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rtp_sim.errors import InputError
from rtp_sim.model.layers import Activation, Conv2d, CrossEntropy, Dropout, Linear, MaxPool2d, Norm
from rtp_sim.model.network import Input
from rtp_sim.model.network_file import read_network

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"
LOSS = {"kind": "cross_entropy"}
IMAGE = {"channels": 1, "height": 28, "width": 28}


def write(folder: Path, layers: list[Any], given: Any = IMAGE, **other: Any) -> Path:
    path = folder / "net.json"
    path.write_text(json.dumps({"name": "net", "input": given, "layers": layers, **other}))
    return path


def message(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_network(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_the_mnist_cnn_by_hand() -> None:
    network = read_network(EXAMPLES / "mnist-cnn.json")
    assert (network.name, network.seq) == ("mnist-cnn", 1)
    assert network.inputs == (Input("samples", 784, "fp32"), Input("targets", 1, "int64"))
    assert [layer.op for layer in network.layers()] == [
        Conv2d(1, 32, 3, 28, 28),
        Activation("relu", 32 * 26 * 26),
        Conv2d(32, 64, 3, 26, 26),
        Activation("relu", 64 * 24 * 24),
        MaxPool2d(64, 24, 24, 2),
        Linear(64 * 12 * 12, 128),
        Activation("relu", 128),
        Linear(128, 10),
        CrossEntropy(10),
    ]
    # 32 x 9 + 32, 64 x 32 x 9 + 64, 128 x 9216 + 128, 10 x 128 + 10
    assert network.parameter_count() == 320 + 18_496 + 1_179_776 + 1_290


def test_layers_read_each_other_and_blocks_begin_with_weights() -> None:
    network = read_network(EXAMPLES / "mnist-cnn.json")
    layers = list(network.layers())
    assert [layer.inputs[0] for layer in layers] == ["samples", *(layer.output for layer in layers[:-1])]
    assert layers[-1].inputs[1] == "targets"
    assert [(b.name, len(b.layers)) for b in network.blocks] == [
        ("conv2d_0", 2),
        ("conv2d_2", 3),
        ("linear_6", 2),
        ("linear_8", 2),
    ]


def test_layers_before_the_first_weights_join_its_block(tmp_path: Path) -> None:
    layers = [{"kind": "dropout"}, {"kind": "linear", "out_features": 4, "name": "fc"}, LOSS]
    network = read_network(write(tmp_path, layers, {"features": 9}))
    assert [[layer.name for layer in b.layers] for b in network.blocks] == [
        ["dropout_0", "fc", "cross_entropy_2"]
    ]


def test_dropout_states_its_probability(tmp_path: Path) -> None:
    layers = [{"kind": "linear", "out_features": 4}, {"kind": "dropout", "p": 0.25}, {"kind": "dropout", "p": 0}, LOSS]
    network = read_network(write(tmp_path, layers, {"features": 9}))
    assert [layer.op for layer in network.layers()][1:] == [Dropout(4, 0.25), CrossEntropy(4)]


def test_features_norms_strides_and_names(tmp_path: Path) -> None:
    layers = [
        {"kind": "conv2d", "out_channels": 4, "kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kind": "maxpool2d", "window": 3},
        {"kind": "flatten"},
        {"kind": "layernorm", "name": "norm"},
        {"kind": "dropout"},
        {"kind": "linear", "out_features": 2, "bias": False},
        LOSS,
    ]
    given = {"channels": 3, "height": 13, "width": 20}
    network = read_network(write(tmp_path, layers, given))
    # (13 + 2 - 3) // 2 + 1 = 7 by (20 + 2 - 3) // 2 + 1 = 10, pooled to 2 x 3: 4 x 2 x 3 = 24 numbers
    assert [layer.op for layer in network.layers()] == [
        Conv2d(3, 4, 3, 13, 20, 2, 1, False),
        MaxPool2d(4, 7, 10, 3),
        Norm("layernorm", 24),
        Dropout(24, 0.5),
        Linear(24, 2, False),
        CrossEntropy(2),
    ]
    assert "norm" in {layer.name for layer in network.layers()}


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ([], ["'layers' is []", "a list such as"]),
        ([{"kind": "conv3d"}, LOSS], ["'layers.0'", "conv3d", "'conv2d', 'maxpool2d', 'linear'"]),
        ([{"out_features": 3}, LOSS], ["'layers.0'", "'kind'"]),
        ([{"kind": "linear"}, LOSS], ["'layers.0.linear.out_features' is missing", "for example 128"]),
        ([{"kind": "linear", "out_features": 0}, LOSS], ["out_features' is 0", "for example 128"]),
        ([{"kind": "linear", "out_features": 9, "outputs": 3}, LOSS], ["outputs' is not known here"]),
        (
            [{"kind": "linear", "out_features": 9}, LOSS],
            ["layer 0 (linear)", "1 x 28 x 28 image", '"flatten"'],
        ),
        (
            [{"kind": "flatten"}, {"kind": "maxpool2d", "window": 2}, LOSS],
            ["layer 1 (maxpool2d)", "784 features"],
        ),
        ([{"kind": "dropout", "p": 1}, LOSS], ["dropout.p' is 1", "for example 0.1"]),
        ([{"kind": "maxpool2d", "window": 29}, LOSS], ["window 29 is larger than the 28 x 28"]),
        ([{"kind": "conv2d", "out_channels": 3, "kernel_size": 29}, LOSS], ["kernel_size 29 is larger"]),
        ([{"kind": "flatten"}, {"kind": "relu"}], ["layer 1 (relu)", "cross_entropy as the last layer"]),
        ([{"kind": "flatten"}, LOSS, LOSS], ["layer 1 (cross_entropy)", "only there"]),
        (
            [{"kind": "relu", "name": "a"}, {"kind": "flatten"}, {**LOSS, "name": "a"}],
            ["the name 'a' is taken"],
        ),
    ],
)
def test_wrong_layers(tmp_path: Path, layers: list[Any], parts: list[str]) -> None:
    said = message(write(tmp_path, layers))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"channels": 1, "height": 28}, "key 'input.image.width' is missing; expected the width"),
        ({"features": -1}, "key 'input.features.features' is -1; expected the numbers per sample"),
        (
            7,
            'key \'input\' is 7; expected {"channels": 1, "height": 28, "width": 28}, {"features": 784} or '
            '{"tokens": 128}',
        ),
        ({}, "key 'input.image.channels' is missing"),
    ],
)
def test_wrong_inputs(tmp_path: Path, given: Any, said: str) -> None:
    assert said in message(write(tmp_path, [{"kind": "flatten"}, LOSS], given))


def test_missing_and_unknown_keys_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text('{"name": "net", "layers": []}')
    assert "key 'input' is missing" in message(path)
    assert "key 'epochs' is not known here" in message(write(tmp_path, [{"kind": "flatten"}, LOSS], epochs=3))


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text('{"name": "net",\n "layers": [')
    assert "line 2, column 13: not valid JSON" in message(path)
