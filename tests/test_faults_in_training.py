"""Claims about how layers are found and guided, what a pass costs, and what is said where it ends, in float64."""

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torchvision
from test_faults import half_each, unaccounted
from test_relevance import RULES, Apply, close, images
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Rule, Shares, Sums, Zero


def guided(model: nn.Module, x: Tensor, **settings: Any) -> dict[str, Tensor]:
    """The gradients of one step."""
    torch.manual_seed(7)
    labels = torch.arange(len(x)) % 3
    model.zero_grad()
    with athena.Guidance(model.train(), **settings):
        F.cross_entropy(model(x), labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Layers, however they are written

IN_PLACE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Tensor, Tensor], Any]]] = {
    "+=": (operator.add, operator.iadd),
    "add_": (torch.add, Tensor.add_),
    "sub_": (torch.sub, Tensor.sub_),
    "*=": (operator.mul, operator.imul),
    "mul_": (torch.mul, Tensor.mul_),
    "div_": (torch.div, Tensor.div_),
    "relu": (lambda h, p: F.relu(h), lambda h, p: F.relu(h, inplace=True)),
    "silu": (lambda h, p: F.silu(h), lambda h, p: F.silu(h, inplace=True)),
    "leaky relu": (lambda h, p: F.leaky_relu(h, 0.2), lambda h, p: F.leaky_relu(h, 0.2, inplace=True)),
    "clamp": (lambda h, p: h.clamp(-0.5, 0.5), lambda h, p: h.clamp_(-0.5, 0.5)),
    "dropout": (lambda h, p: F.dropout(h, 0.3), lambda h, p: F.dropout(h, 0.3, inplace=True)),
}


@pytest.mark.parametrize("rule", ["epsilon", "large epsilon", "z-plus"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_what_writes_over_a_layer_on_tokens_is_explained_and_guided_as_what_does_not(name: str, rule: str) -> None:
    """There, the output of a linear layer is a view of its product."""

    class Net(nn.Module):
        def __init__(self, change: Callable[[Tensor, Tensor], Any]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.below, self.above, self.change = nn.Linear(6, 8), nn.Linear(8, 3), change
            self.register_buffer("p", torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.below(x)
            changed = self.change(h, self.p)
            return self.above(h if changed is None else changed).mean(1)

    x, maps, gradients = images(3, 5, 6), [], []
    for change in IN_PLACE[name]:
        model = Net(change).double()
        if name != "dropout":
            explained = athena.lrp(model, x, rule=RULES[rule][0])
            assert list(explained.layers) == ["below", "above"]
            assert unaccounted(explained) < 1e-9
            maps.append(explained.input)
        gradients.append(guided(model, x, factor=2.0, scope=["below"], rule=RULES[rule][0]))
    for out_of_place, in_place in [maps] if maps else []:
        close(in_place, out_of_place)
    for parameter, expected in gradients[0].items():
        close(gradients[1][parameter], expected)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w.T),
    "@": lambda x, w: x @ w,
    "scaled": lambda x, w: x @ (w * 1),
    "linear of a scaled weight": lambda x, w: F.linear(x, (w * 1).T),
    "weight in three dimensions": lambda x, w: (x[None] @ w[None])[0],
    "weight first": lambda x, w: (w.T @ x.T).T,
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("io,bi->bo", w, x),
    "bmm": lambda x, w: torch.bmm(x[None], w[None])[0],
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "convolution": lambda x, w: F.conv1d(x[:, :, None], w.T[:, :, None])[:, :, 0],
    "row by row": lambda x, w: torch.stack([row @ w for row in x]),
}


class ByProducts(nn.Module):
    """A network of which two layers are products with parameters of its own."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.w, self.v = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 8))
        self.head, self.product = nn.Linear(8, 3), product

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.product(F.relu(self.product(x, self.w)), self.v)))


@pytest.mark.parametrize("rule", ["zero", "large epsilon", "gamma", "alpha-beta", "z-plus", "w-square", "flat"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_parameter_is_a_linear_layer_however_it_is_written(name: str, rule: str) -> None:
    x, chosen = images(4, 6), RULES[rule][0]
    model, linear = (ByProducts(PRODUCTS[form]).double() for form in (name, "linear"))
    for frozen in (False, True):
        found, expected = (athena.lrp(net.requires_grad_(not frozen), x, rule=chosen) for net in (model, linear))
        close(found.input, expected.input)
        assert max(map(unaccounted, (found, expected))) < 1e-9


# Attention


class Block(nn.Module):
    """A residual block of attention on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        nn.init.normal_(self.attention.in_proj_bias)
        nn.init.normal_(self.attention.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))

    def written_out(self, x: Tensor, product: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the output of each layer below the head by the path of its weight."""
        mha = self.attention
        h = self.embed(x)
        mixed = F.linear(h, mha.in_proj_weight, mha.in_proj_bias)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in mixed.chunk(3, 2))
        scores = product(torch.matmul, q, k.mT) / 2
        summed = product(torch.matmul, scores.softmax(-1), v).transpose(1, 2).flatten(2)
        out = F.linear(summed, mha.out_proj.weight, mha.out_proj.bias)
        layers = {"embed": h, "attention.in_proj_weight": mixed, "attention.out_proj": out}
        return self.head((h + out).mean(1)), layers


def test_attention_is_guided_as_worked_out_by_hand() -> None:
    """Its projections too, of the tokens that a layer below has made."""
    torch.manual_seed(2)
    model, x, factor = Block().double(), images(4, 6, 5), 3.0
    output, layers = model.written_out(x, half_each)
    torch.testing.assert_close(output, model(x))
    slopes = torch.autograd.grad(output.max(1).values.sum(), list(layers.values()))
    relevance = {path: (z * d).detach() for (path, z), d in zip(layers.items(), slopes, strict=True)}
    output, layers = model.written_out(x, lambda product, a, b: product(a, b))
    for path, z in layers.items():
        z.register_hook(lambda gradient, path=path: gradient * (1 + factor * relevance[path]))
    F.cross_entropy(output, torch.arange(4) % 3).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    found = guided(model, x, factor=factor, rule=Zero())
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"attention.in_proj_bias"}:
        close(found[name], expected[name])


def test_the_first_attention_block_of_a_vision_transformer_is_guided() -> None:
    """The bias of a layer guided alone has the sum of its scaled gradients for a gradient."""
    torch.manual_seed(3)
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3).double()
    nn.init.normal_(model.heads.head.weight)
    x = images(4, 3, 16, 16)
    block = "encoder.layers.encoder_layer_0.self_attention"
    attention = model.get_submodule(block)
    relevance = athena.lrp(model, x, rule=Epsilon(0.1)).layers[f"{block}.out_proj"]
    got: list[Tensor] = []
    handle = attention.register_forward_hook(lambda module, args, out: out[0].register_hook(got.append) and None)
    plain = guided(model, x, factor=0.0)
    handle.remove()
    one = guided(model, x, factor={f"{block}.out_proj": 5.0}, rule=Epsilon(0.1))
    batch, tokens, features = got[0].shape  # within attention, tokens come first
    scaled = got[0] * (1 + 5.0 * relevance.reshape(tokens, batch, features).transpose(0, 1))
    close(one[f"{block}.out_proj.bias"], scaled.sum((0, 1)))
    of_scope = guided(model, x, factor=5.0, scope="linear", rule=Epsilon(0.1))
    first = guided(model, x, factor={f"{block}.in_proj_weight": 5.0}, rule=Epsilon(0.1))
    name = f"{block}.in_proj_weight"
    for gradients in (one, first, of_scope):
        assert not torch.allclose(gradients[name], plain[name], rtol=1e-6)


# Rules


def test_a_layer_read_by_a_relu_and_by_another_is_divided_by_its_own_output() -> None:
    """Not by that of the ReLU, which serves where nothing else reads the layer."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(5, 6), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.below(x)
            return self.above(torch.cat([F.relu(z), z], 1))

    model, x = Net().double(), images(4, 5)
    z, out, w, v = model.below(x), model(x), model.below.weight, model.above.weight
    d = (out / (out + 0.5 * out.sign())) @ v
    d = (z > 0) * d[:, :6] + d[:, 6:]
    expected = x * ((z * d / (z + 0.5 * z.sign())) @ w)
    explained = athena.lrp(model, x, target="logits", rule=Epsilon(0.5))
    close(explained.input, expected.detach())
    assert unaccounted(explained) < 1e-9


def test_a_rule_of_ones_own_may_have_sums_over_magnitudes() -> None:
    """Contributions ``|a_j w_jk|``: inputs below 0 get relevance with the sign of what came."""

    class Magnitudes(Rule):
        def sums(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> Sums:
            return Sums([a.abs()], [[weight.abs()]], [None])

        def share(self, relevance: Tensor, z: Tensor, sums: Any) -> Shares:
            return Shares(None, [relevance / sums[0]])

    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double(), images(4, 5)
    hidden, relevance = model[:2](x).detach(), model(x).detach()
    for a, layer in ((hidden, model[2]), (x, model[0])):
        parts = a.abs()[:, None] * layer.weight.detach().abs()
        relevance = (parts * (relevance / parts.sum(2))[..., None]).sum(1)
    explained = athena.lrp(model, x, target="logits", rule=Magnitudes())
    close(explained.input, relevance)
    close(explained.input.sum(1), explained.output.sum(1))


# What training costs, and how it ends

STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "u + 0.9 h": lambda u, h: u + 0.9 * h,
    "0.9 h + u": lambda u, h: 0.9 * h + u,
}


class Recurrent(nn.Module):
    """A chain of as many sums as it is told."""

    def __init__(self, steps: int, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inward, self.head, self.steps, self.step = nn.Linear(3, 4), nn.Linear(4, 3), steps, step

    def forward(self, x: Tensor) -> Tensor:
        u = self.inward(x)
        h = u
        for _ in range(self.steps):
            h = torch.tanh(self.step(u, h))
        return self.head(h)


def calls(function: Callable[[], Any]) -> int:
    """How many functions Python calls meanwhile, those written in C among them."""
    count = 0

    def counted(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("form", STEPS)
@pytest.mark.parametrize("what", ["lrp", "layers", "guidance"])
def test_cost_grows_with_depth_and_not_with_its_square(what: str, form: str) -> None:
    counts = []
    for steps in (100, 400):
        model, x = Recurrent(steps, STEPS[form]).double(), images(2, 3)
        run: dict[str, Callable[[], Any]] = {
            "lrp": lambda model=model, x=x: athena.lrp(model, x),
            "layers": lambda model=model, x=x: athena.lrp(model, x).layers,
            "guidance": lambda model=model, x=x: guided(model, x, factor=0.1),
        }
        run[what]()  # so that what is kept from then on counts for neither
        counts.append(calls(run[what]))
    assert counts[1] < 6 * counts[0]


@pytest.mark.parametrize("layer", ["left", "right"])
def test_of_parallel_branches_the_one_that_diverges_is_named(layer: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.stem(x))
            return self.head(F.relu(self.left(h)) + F.relu(self.right(h)))

    factors = {"stem": 0.1, "left": 0.1, "right": 0.1} | {layer: 1e300}
    model = Net().double()
    with torch.no_grad():
        model.head.weight.mul_(1e10)
    with pytest.raises(athena.DivergedError, match=f"'{layer}'") as diverged:
        guided(model, images(4, 6), factor=factors)
    assert (diverged.value.layer, diverged.value.step) == (layer, 1)


# Messages


class Doubled(torch.autograd.Function):
    """A function of which LRP knows nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def overwritten(x: Tensor) -> Tensor:
    h = x.clone()
    h[:, 0].exp_()
    return h


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "custom": (Doubled.apply, "custom autograd function"),
    "part of a tensor": (overwritten, "exp"),
    "order": (lambda x: x.cumprod(1), "cumprod"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_module_that_did_it_and_what_it_did(name: str) -> None:
    function, what = REFUSED[name]
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(Apply(function)), nn.Linear(8, 3)).double()
    x = images(3, 6)
    with pytest.raises(athena.UnsupportedLayer, match=rf"'1\.0' uses .*({what})"):
        athena.lrp(model, x)
    with pytest.raises(athena.UnsupportedLayer, match=rf"'1\.0' uses .*({what})"):
        guided(model, x, factor=0.1)


def test_a_change_of_a_part_in_the_models_own_code_is_refused_by_the_name_of_the_model() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.above(overwritten(self.below(x)))

    with pytest.raises(athena.UnsupportedLayer, match=r"'Whole' uses .*exp"):
        athena.lrp(Whole().double(), images(3, 6))


def test_a_module_that_compiles_itself_is_refused_as_one_that_was_compiled() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].compile(backend="eager")
    with pytest.raises(athena.UnsupportedLayer, match="'0' is compiled"):
        athena.lrp(model, torch.randn(2, 6))


def test_a_target_of_another_form_than_the_output_is_told_both() -> None:
    @dataclass
    class Both:
        logits: Tensor
        hidden: Tensor

    model = Apply(lambda x: Both(x * 2, x))
    with pytest.raises(ValueError, match=r"target\(output\) gave .*\(Both\); it must have .*\(Both\)"):
        athena.lrp(model, images(2, 3), target=lambda out: Both(out.logits, None))
    with pytest.raises(ValueError, match=r"gave a torch.float64 tensor of shape \(2, 3\).* a dict of 'scores'"):
        athena.lrp(Apply(lambda x: {"scores": x * 2}), images(2, 3), target=lambda out: out["scores"])
