"""Claims about explaining what a module inside makes of its input, as of tokens, and about any module's output."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from test_relevance import close, images, narrow_cnn
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Gamma, WSquare, Zero


class Output(OrderedDict[str, Any]):
    """What transformers' models return: a dict with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        normed, tokens = self.norm1(x), x.shape[1]
        mask = torch.full((tokens, tokens), -torch.inf, dtype=x.dtype).triu(1)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class LanguageModel(nn.Module):
    """A small decoder, whose output layer shares the embedding's weight."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.randn(6, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed_tokens.weight

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x + self.positions[: x.shape[1]]))

    def forward(self, input_ids: Tensor, scale: float = 1.0) -> Output:
        x = self.embed_tokens(input_ids)
        x *= scale  # in place, as some models do
        return Output(logits=self.body(x), hidden=x)


class Above(nn.Module):
    """The part of the model above its embedding."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.body(x)[:, -1]


def language_model() -> tuple[LanguageModel, Tensor]:
    return LanguageModel().double().eval(), torch.randint(0, 11, (3, 5))


@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.1), Gamma(0.25), WSquare()])
def test_relevance_of_embedded_tokens_is_that_of_the_part_of_the_model_above(rule: athena.rules.Rule) -> None:
    model, tokens = language_model()
    r = athena.lrp(model, tokens, target=(-1, None), rule=rule, at="embed_tokens")
    above = athena.lrp(Above(model), model.embed_tokens(tokens).detach(), rule=rule)
    close(r.input, above.input)
    close(r.output[:, -1], above.output)
    assert not r.output[:, :-1].any()


def test_tokens_may_be_given_by_keyword() -> None:
    model, tokens = language_model()
    expected = athena.lrp(model, tokens, target=(-1, 3), at="embed_tokens").input
    given = {"input_ids": tokens, "scale": 1.0}
    close(athena.lrp(model, given, target=(-1, 3), at="embed_tokens").input, expected, 0)


@pytest.mark.parametrize("target", [None, 4, torch.tensor([1, 2, 3]), "softmax", "logits"])
def test_a_token_and_a_target_start_as_the_target_does_for_the_logits_of_that_token(target: Any) -> None:
    model, tokens = language_model()
    r = athena.lrp(model, tokens, target=(torch.tensor([1, -1, 0]), target), at="embed_tokens")

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)["logits"][torch.arange(3), torch.tensor([1, 4, 0])]

    close(r.input, athena.lrp(Chosen(), tokens, target, at="model.embed_tokens").input)


def test_a_token_has_no_relevance_for_what_comes_before_it() -> None:
    model, tokens = language_model()
    r = athena.lrp(model, tokens, target=(2, None), at="embed_tokens")
    assert r.input[:, :3].ne(0).any()
    assert not r.input[:, 3:].any()


def test_lrp0_from_an_inner_module_on_equals_gradient_times_its_output() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    r = athena.lrp(model, x, target=1, rule=Zero(), at="features.relu1")
    hidden = model.features[:2](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(model.features[2:](hidden))[:, 1].sum(), hidden)
    close(r.input, hidden.detach() * gradient)


def test_layers_and_the_account_below_the_module_explained_are_left_out() -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    r = athena.lrp(model, x, at="features.relu1")
    assert list(r.layers) == ["features.conv2", "head.1", "head.3"]
    table = r.conservation()
    start, kept = r.output.sum().item(), table[["bias", "stabiliser"]].to_numpy()[:-1].sum()
    assert table["relevance"].iloc[-1] + kept == pytest.approx(start, rel=1e-9)


def test_a_module_that_runs_twice_gives_a_tuple() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, question: Tensor, answer: Tensor) -> Tensor:
            return self.head(F.relu(self.embed(question).mean(1) - self.embed(answer).mean(1)))

    model, tokens = Pair().double(), torch.randint(0, 7, (2, 5))
    first, second = athena.lrp(model, (tokens, tokens[:, :3]), target=0, at="embed").input
    assert first.shape == (2, 5, 4)
    assert second.shape == (2, 3, 4)


def test_a_dict_of_floating_point_tensors_is_explained_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, image: Tensor, flip: bool, which: Tensor) -> Tensor:
            return self.head(image.flip(1) if flip else image)[:, which]

    model, x = Named().double(), images(2, 4)
    r = athena.lrp(model, {"image": x, "flip": True, "which": torch.tensor([0, 2])}, target=1)
    assert set(r.input) == {"image"}
    close(r.input["image"], athena.lrp(model.head, x.flip(1), target=2).input.flip(1))


@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.1), Gamma(0.25)])
def test_any_module_s_output_has_the_relevance_that_starting_there_gives(rule: athena.rules.Rule) -> None:
    model, x = narrow_cnn(), images(3, 2, 6, 6)
    paths = ["features.relu1", "features.relu2", "features.pool", "features", "head.0", "head.2", "features.conv2"]
    r = athena.lrp(model, x, rule=rule, layers=paths)
    usual = athena.lrp(model, x, rule=rule)
    assert sorted(r.layers) == sorted(paths)
    close(r.layers["features.conv2"], usual.layers["features.conv2"])
    for path in paths[:-1]:
        close(r.layers[path], athena.lrp(model, x, rule=rule, at=path).input)
    close(r.input, usual.input, 0)


def test_outputs_of_modules_are_told_apart_from_what_is_written_over_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Identity(), nn.Flatten(), nn.Linear(64, 3)
    )
    model, x = model.double().eval(), images(2, 2, 6, 6)
    layers = athena.lrp(model, x, layers=["2", "1", "3", "0"]).layers
    assert list(layers) == ["0", "1", "2", "3"]
    close(layers["1"], layers["2"], 1e-5)
    close(layers["3"], layers["2"], 0)
    close(layers["0"], layers["1"], 1e-5)


def test_a_module_that_no_relevance_came_to_and_one_that_is_used_twice() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.inner, self.head, self.aside = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.relu(self.inner(self.relu(x)))
            return self.head(hidden), self.aside(hidden)

    model, x = Two().double(), images(3, 4)
    layers = athena.lrp(model, x, target=lambda out: (out[0], None), layers=["relu", "aside", ""]).layers
    assert list(layers) == ["relu", "relu#2", "aside", ""]
    assert not layers["aside"].any()
    close(layers["relu"], athena.lrp(model, x, target=lambda out: (out[0], None)).input)
    assert len(layers[""]) == 2


def test_what_cannot_be_meant_is_said() -> None:
    model, tokens = language_model()
    with pytest.raises(ValueError, match=r"at: LanguageModel has no module 'embed_token'; see 'embed_tokens'"):
        athena.lrp(model, tokens, at="embed_token")
    with pytest.raises(ValueError, match="layers: LanguageModel has no module 'relu'"):
        athena.lrp(model, tokens, at="embed_tokens", layers=["relu"])
    with pytest.raises(TypeError, match="at='path'"):
        athena.lrp(model, tokens)
    with pytest.raises(TypeError, match="at='path'"):
        athena.lrp(model, {"input_ids": tokens})
    with pytest.raises(ValueError, match="did not call that module"):
        athena.lrp(model, tokens, target=(-1, None), at="blocks.0.attention.out_proj")
    with pytest.raises(ValueError, match=r"as a pair \(token, class\)"):
        athena.lrp(model, tokens, at="embed_tokens")
    with pytest.raises(ValueError, match="has 5 tokens"):
        athena.lrp(model, tokens, target=(5, None), at="embed_tokens")
    with pytest.raises(TypeError, match="the token of target"):
        athena.lrp(model, tokens, target=(0.5, None), at="embed_tokens")
    with pytest.raises(ValueError, match="is for an output"):
        athena.lrp(narrow_cnn(), images(3, 2, 6, 6), target=(-1, None))
    assert not any(module._forward_hooks for module in model.modules())
