"""The two networks are those of thesis table 6.1, and the small one is that of Ross et al. 2017."""

import itertools

import torch
from torch import nn

from athena.models import cnn, mlp, small


def sizes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(path, tuple(p.shape)) for path, p in model.named_parameters() if path.endswith("weight")]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_mlp_has_the_layers_of_table_6_1() -> None:
    model = mlp()
    assert sizes(model) == [
        ("linear1.weight", (1024, 1024)),
        ("linear2.weight", (512, 1024)),
        ("linear3.weight", (10, 512)),
    ]
    assert parameters(model) == 1024 * 1025 + 512 * 1025 + 10 * 513 == 1_579_530
    assert [path for path, _ in model.named_children()] == [
        "flatten",
        "linear1",
        "relu1",
        "linear2",
        "relu2",
        "linear3",
    ]
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_the_cnn_has_the_layers_of_table_6_1() -> None:
    model = cnn()
    assert sizes(model) == [
        ("conv1.weight", (64, 3, 3, 3)),
        ("conv2.weight", (64, 64, 3, 3)),
        ("conv3.weight", (128, 64, 3, 3)),
        ("conv4.weight", (128, 128, 3, 3)),
        ("conv5.weight", (256, 128, 3, 3)),
        ("linear1.weight", (1024, 4096)),
        ("linear2.weight", (512, 1024)),
        ("linear3.weight", (10, 512)),
    ]
    convolutions = 64 * 28 + 64 * 577 + 128 * 577 + 128 * 1153 + 256 * 1153
    assert parameters(model) == convolutions + 1024 * 4097 + 512 * 1025 + 10 * 513
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    features, x = model[: list(dict(model.named_children())).index("flatten")], torch.zeros(2, 3, 32, 32)
    halvings = [path for path, module in features.named_children() if isinstance(module, nn.MaxPool2d)]
    assert halvings == ["pool1", "pool2", "pool3"]
    assert features(x).shape == (2, 256, 4, 4)


def test_the_small_network_has_the_layers_of_ross_et_al() -> None:
    assert sizes(small()) == [
        ("linear1.weight", (50, 1024)),
        ("linear2.weight", (30, 50)),
        ("linear3.weight", (10, 30)),
    ]
    assert small(3)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_every_hidden_layer_is_followed_by_a_relu_and_the_output_is_not() -> None:
    for model in (mlp(), cnn(), small()):
        layers = list(model)
        for layer, above in itertools.pairwise(layers):
            if isinstance(layer, nn.Linear | nn.Conv2d):
                assert isinstance(above, nn.ReLU)
        assert isinstance(layers[-1], nn.Linear)


def test_channels_and_classes_can_be_chosen() -> None:
    assert mlp(channels=3, classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert cnn(channels=1, classes=7)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert mlp(channels=3).linear1.in_features == 3 * 1024
