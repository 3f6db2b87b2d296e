"""ATHENA beside zennit 0.5.1 and Captum's LRP in float64: equal where they are right, and tests that show where not.

zennit's rules carry a stabiliser where ours have none. It is driven to `TINY` here; nothing else is changed.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50

import athena
from athena.rules import (
    AlphaBeta,
    Epsilon,
    EpsilonAlpha2Beta1,
    EpsilonGammaBox,
    EpsilonPlus,
    Flat,
    Gamma,
    Rule,
    RuleFor,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)

pytest.importorskip("zennit")
pytest.importorskip("captum")

from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule, PropagationRule
from zennit import composites, rules, types
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.core import Composite, Hook
from zennit.layer import Sum
from zennit.torchvision import ResNetCanonizer

TINY = 1e-30
TOLERANCE = 1e-6
EPSILON = 1e-2  # large enough to be seen

PAIRS: dict[str, tuple[Rule, Hook]] = {
    "zero": (Zero(), rules.Epsilon(TINY)),
    "epsilon": (Epsilon(EPSILON), rules.Epsilon(EPSILON)),
    "gamma": (Gamma(0.25), rules.Gamma(0.25, TINY)),
    "large gamma": (Gamma(4.0), rules.Gamma(4.0, TINY)),
    "alpha-beta": (AlphaBeta(2.0, 1.0), rules.AlphaBeta(2.0, 1.0, TINY)),
    "z-plus": (ZPlus(), rules.ZPlus(TINY)),
    "box": (ZBox(-4.0, 5.0), rules.ZBox(-4.0, 5.0, TINY)),
    "w-square": (WSquare(), rules.WSquare(TINY)),
    "flat": (Flat(), rules.Flat(TINY)),
}
ABSOLUTE = ("box", "w-square", "flat")
"""Rules that give relevance to neurons that are 0."""

every_rule = pytest.mark.parametrize("name", PAIRS)


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal to `TOLERANCE` of the largest value."""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 1e-8, "nothing to compare"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * theirs.abs().max().item())


def far(ours: Tensor, theirs: Tensor) -> None:
    """No rounding: different by more than a hundredth of the largest value."""
    assert (ours - theirs).abs().max() > 0.01 * ours.abs().max()


def images(*shape: int) -> Tensor:
    """Of both signs."""
    return torch.randn(*shape, dtype=torch.float64)


def predicted(output: Tensor) -> Tensor:
    """The logit of the predicted class, 0 elsewhere."""
    output = output.detach()
    best = output.argmax(1, keepdim=True)
    return torch.zeros_like(output).scatter(1, best, output.gather(1, best))


def by_rule(rule: Hook | Callable[[str], Hook], norm: Hook | None = None) -> Callable[[dict, str, nn.Module], Any]:
    """zennit's map from modules to hooks with one rule for all affine layers, or one chosen by path."""

    def hook(_context: dict, path: str, module: nn.Module) -> Hook | None:
        if isinstance(module, types.Linear):
            return rule if isinstance(rule, Hook) else rule(path)
        if isinstance(module, Sum | types.AvgPool):
            return norm or rules.Norm(TINY)
        if isinstance(module, types.Activation | types.BatchNorm):
            return rules.Pass()
        return None

    return hook


def explained_by_zennit(
    model: nn.Module,
    x: Tensor,
    composite: Composite,
    start: Callable[[Tensor], Tensor] = predicted,
) -> Tensor:
    x = x.clone().requires_grad_()
    with composite.context(model) as hooked:
        output = hooked(x)
        (relevance,) = torch.autograd.grad(output, x, start(output))
    return relevance.detach()


def small_vgg() -> nn.Sequential:
    """With every kind of layer that VGG has."""
    layers = OrderedDict(
        conv1=nn.Conv2d(3, 8, 3, padding=1),
        relu1=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(8, 8, 3, padding=1),
        relu2=nn.ReLU(inplace=True),
        pool1=nn.MaxPool2d(2),
        conv3=nn.Conv2d(8, 12, 3, padding=1),
        relu3=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=nn.Linear(12 * 16, 32),
        relu4=nn.ReLU(),
        dropout=nn.Dropout(),
        linear2=nn.Linear(32, 10),
    )
    return nn.Sequential(layers).double().eval()


def with_random_norms(model: nn.Module) -> nn.Module:
    """Batch norm that does something, and whose epsilon is 0, for zennit applies it twice (tested below)."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.eps = 0.0
            nn.init.normal_(norm.running_mean, 0.0, 0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    return model.double().eval()


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}


# The same numbers as zennit


@every_rule
def test_every_rule_equals_zennit_in_all_layers_of_a_vgg(name: str) -> None:
    ours, theirs = PAIRS[name]
    model, x = small_vgg(), images(4, 3, 16, 16)
    expected = explained_by_zennit(model, x, Composite(by_rule(theirs)))
    close(athena.lrp(model, x, rule=ours).input, expected)


@every_rule
def test_every_rule_equals_zennit_in_the_first_layer_of_a_vgg(name: str) -> None:
    ours, theirs = PAIRS[name]
    model, x = small_vgg(), images(4, 3, 16, 16)
    x[:, :, :4] = 0.0  # where z-box, w-square and flat give relevance all the same
    above = rules.Epsilon(EPSILON)
    expected = explained_by_zennit(model, x, Composite(by_rule(lambda path: theirs if path == "conv1" else above)))
    actual = athena.lrp(model, x, rule=lambda path, _: ours if path == "conv1" else Epsilon(EPSILON))
    close(actual.input, expected)


@every_rule
def test_relevance_of_layers_equals_that_which_passes_through_zennit(name: str) -> None:
    ours, theirs = PAIRS[name]
    model, x = small_vgg(), images(2, 3, 16, 16)
    passed: dict[str, Tensor] = {}
    composite = Composite(by_rule(theirs))
    with composite.context(model) as hooked:
        handles = [
            module.register_forward_hook(lambda _module, _input, z, path=path: passed.setdefault(path, z).retain_grad())
            for path, module in hooked.named_modules()
            if isinstance(module, types.Linear)
        ]
        output = hooked(x.clone().requires_grad_())
        output.backward(predicted(output))
    for handle in handles:
        handle.remove()
    layers = athena.lrp(model, x, rule=ours).layers
    assert list(layers) == list(passed) == ["conv1", "conv2", "conv3", "linear1", "linear2"]
    for path, z in passed.items():
        assert z.grad is not None
        close(layers[path], z.grad)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear on a sequence": (lambda: nn.Linear(6, 4, bias=False), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=2, dilation=2), (2, 3, 9)),
    "conv2d, stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (2, 3, 8, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6)),
    "conv2d, same": (lambda: nn.Conv2d(3, 4, 4, padding="same", bias=False), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (2, 3, 5, 5)),
}


@every_rule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_every_rule_equals_zennit_on_every_kind_of_affine_layer(name: str, kind: str) -> None:
    ours, theirs = PAIRS[name]
    build, shape = KINDS[kind]
    model, x = nn.Sequential(build()).double(), images(*shape)
    relevance = torch.randn_like(model(x))
    expected = explained_by_zennit(model, x, Composite(by_rule(theirs)), start=lambda _: relevance)
    close(athena.lrp(model, x, target=lambda _: relevance, rule=ours).input, expected)


@every_rule
def test_batch_norm_after_a_layer_is_merged_into_it_as_by_zennit(name: str) -> None:
    ours, theirs = PAIRS[name]
    model = with_random_norms(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 5, 2, stride=2),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(5 * 36, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Linear(12, 4),
        )
    )
    x = images(3, 3, 8, 8)
    expected = explained_by_zennit(model, x, Composite(by_rule(theirs), [SequentialMergeBatchNorm()]))
    close(athena.lrp(model, x, rule=ours).input, expected)


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    torch.manual_seed(1)
    return with_random_norms(resnet18())


@pytest.fixture
def photographs() -> Tensor:
    return images(2, 3, 64, 64)


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["zero", "epsilon", *slow("gamma", "large gamma", "alpha-beta", "z-plus")])
def test_every_rule_equals_zennit_in_all_layers_of_resnet18(
    name: str, residual: nn.Module, photographs: Tensor
) -> None:
    ours, theirs = PAIRS[name]
    expected = explained_by_zennit(residual, photographs, Composite(by_rule(theirs), [ResNetCanonizer()]))
    close(athena.lrp(residual, photographs, rule=ours).input, expected)


@pytest.mark.parametrize("name", ABSOLUTE)
def test_first_layer_rules_equal_zennit_in_the_first_layer_of_resnet18(
    name: str, residual: nn.Module, photographs: Tensor
) -> None:
    ours, theirs = PAIRS[name]
    above = rules.Epsilon(EPSILON)
    hooks = by_rule(lambda path: theirs if path == "conv1" else above)
    expected = explained_by_zennit(residual, photographs, Composite(hooks, [ResNetCanonizer()]))
    actual = athena.lrp(residual, photographs, rule=lambda path, _: ours if path == "conv1" else Epsilon(EPSILON))
    close(actual.input, expected)


LOW, HIGH = torch.full((3, 1, 1), -5.0), torch.full((3, 1, 1), 5.5)
PRESETS: dict[str, tuple[RuleFor, Callable[..., Composite]]] = {
    "EpsilonPlus": (EpsilonPlus(EPSILON), composites.EpsilonPlus),
    "EpsilonAlpha2Beta1": (EpsilonAlpha2Beta1(EPSILON), composites.EpsilonAlpha2Beta1),
    "EpsilonGammaBox": (
        EpsilonGammaBox(LOW, HIGH, EPSILON),
        lambda **options: composites.EpsilonGammaBox(low=LOW[None], high=HIGH[None], **options),
    ),
}
every_preset = pytest.mark.parametrize("name", PRESETS)


@every_preset
@pytest.mark.parametrize("network", ["vgg", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_presets_equal_the_composites_of_zennit(
    name: str, network: str, residual: nn.Module, photographs: Tensor
) -> None:
    ours, theirs = PRESETS[name]
    if network == "vgg":
        model, x = small_vgg(), images(4, 3, 16, 16)
    else:
        model, x = residual if network == "resnet18" else with_random_norms(resnet50()), photographs
    composite = theirs(epsilon=EPSILON, stabilizer=TINY, canonizers=[ResNetCanonizer()])
    before = snapshot(model)
    expected = explained_by_zennit(model, x, composite)
    for parameter, (identity, value) in before.items():  # 0.5.1 leaves the weights alone, unlike 1.0
        assert id(model.get_parameter(parameter)) == identity
        assert torch.equal(model.get_parameter(parameter), value)
    close(athena.lrp(model, x, rule=ours).input, expected)


def equal_parts_of_nothing() -> Hook:
    """zennit's `Norm`, but a sum of zeros gives its relevance to its terms in equal parts."""
    norm = rules.Norm(TINY)
    norm.input_modifiers = [lambda terms: torch.where(terms == 0, 1e-20, terms)]
    return norm


@pytest.mark.parametrize("name", ["flat", *slow("box", "w-square")])
def test_relevance_that_reaches_a_sum_of_zeros_is_lost_in_zennit_and_shared_here(
    name: str, residual: nn.Module, photographs: Tensor
) -> None:
    ours, theirs = PAIRS[name]
    lossy = explained_by_zennit(residual, photographs, Composite(by_rule(theirs), [ResNetCanonizer()]))
    hooks = by_rule(theirs, norm=equal_parts_of_nothing())
    shared = explained_by_zennit(residual, photographs, Composite(hooks, [ResNetCanonizer()]))
    actual = athena.lrp(residual, photographs, rule=ours)
    far(actual.input, lossy)
    close(actual.input, shared)


# The same numbers as Captum

Factory = Callable[[], PropagationRule]


def by_captum(rule: Factory) -> Factory:
    """A rule of Captum's without the stabiliser that it has not asked for."""

    def build() -> PropagationRule:
        built = rule()
        if not isinstance(built, EpsilonRule):
            built.STABILITY_FACTOR = TINY
        return built

    return build


CAPTUM: dict[str, tuple[Rule, Factory, bool]] = {
    "zero": (Zero(), lambda: EpsilonRule(TINY), True),
    "epsilon": (Epsilon(EPSILON), lambda: EpsilonRule(EPSILON), True),
    "gamma": (Gamma(0.25), by_captum(lambda: GammaRule(0.25)), False),  # its gamma leaves the bias as it is,
    "z-plus": (ZPlus(), by_captum(Alpha1_Beta0_Rule), False),  # and its z-plus keeps the negative one
}


def give_rules(model: nn.Module, rule: Factory) -> nn.Module:
    """Captum reads rules from the layers."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.rule = rule()
        elif isinstance(layer, nn.MaxPool2d):
            layer.rule = EpsilonRule(TINY)
    return model


def explained_by_captum(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    return LRP(model).attribute(x.clone().requires_grad_(), target=target).detach()


def chain(bias: bool, convolutional: bool) -> tuple[nn.Sequential, Tensor]:
    """A chain that Captum knows all layers of, and inputs of at least 0."""
    layers: list[nn.Module]
    if convolutional:
        layers = [nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(6, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 5, 4, bias=bias)]
        shape: tuple[int, ...] = (6, 3, 12, 12)
    else:
        layers = [nn.Linear(12, 9, bias=bias), nn.ReLU(), nn.Linear(9, 7, bias=bias), nn.ReLU()]
        layers += [nn.Linear(7, 5, bias=bias)]
        shape = (6, 12)
    return nn.Sequential(*layers).double().eval(), images(*shape).abs()


@pytest.mark.parametrize("convolutional", [False, True], ids=["mlp", "cnn"])
@pytest.mark.parametrize("name", CAPTUM)
def test_rules_equal_captum_on_chains_with_inputs_of_at_least_0(name: str, convolutional: bool) -> None:
    ours, theirs, bias = CAPTUM[name]
    model, x = chain(bias, convolutional)
    with torch.no_grad():
        best = int(model(x).flatten(1).amin(0).argmax())
        if name == "gamma":  # of outputs below 0, the generalised rule favours the other sign
            x = x[model(x).flatten(1)[:, best] > 0]
    assert len(x) >= 2
    expected = explained_by_captum(give_rules(model, theirs), x, (best, 0, 0) if convolutional else best)

    def start(output: Tensor) -> Tensor:
        relevance = torch.zeros_like(output)
        relevance[:, best] = output[:, best]
        return relevance

    close(athena.lrp(model, x, target=start, rule=ours).input, expected)


# What goes wrong in them: each of these is an answer without an error, or a model left changed


class Skip(nn.Module):
    """A residual connection, written as people write it. No biases, so that relevance must be conserved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.outer, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.stem(x))
        return self.head(x + self.outer(self.relu2(self.inner(x))))


class Reused(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.relu, self.head = nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.shared(self.relu(self.shared(x)))))


class Repeated(Reused):
    """The same function, of two layers with the same weights."""

    def __init__(self, reused: Reused) -> None:
        super().__init__()
        self.load_state_dict(reused.state_dict())
        self.again = copy.deepcopy(self.shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.again(self.relu(self.shared(x)))))


class Functional(nn.Module):
    """A layer called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(x, self.below.weight)))


def conserves(relevance: Tensor, output: Tensor) -> bool:
    return torch.allclose(relevance.flatten(1).sum(1), predicted(output).sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("build", [Skip, Functional])
def test_zennit_alone_does_not_conserve_what_is_no_module_of_its_own_and_says_nothing(
    build: Callable[[], nn.Module],
) -> None:
    model, x = build().double(), images(4, 6)
    assert not conserves(explained_by_zennit(model, x, Composite(by_rule(rules.Epsilon(TINY)))), model(x))
    assert conserves(athena.lrp(model, x, rule=Zero()).input, model(x))


def test_zennit_explains_both_uses_of_a_layer_by_the_input_of_the_last_and_says_nothing() -> None:
    model, x = Reused().double(), images(4, 6)
    zero = Composite(by_rule(rules.Epsilon(TINY)))
    actual = athena.lrp(model, x, rule=Zero()).input
    far(actual, explained_by_zennit(model, x, zero))
    close(actual, explained_by_zennit(Repeated(model).double(), x, zero))


def test_captum_does_not_conserve_over_a_residual_connection_and_says_nothing() -> None:
    model, x = Skip().double(), images(4, 6)
    ours = athena.lrp(model, x, target=0, rule=Zero()).input
    theirs = explained_by_captum(give_rules(model, lambda: EpsilonRule(TINY)), x, 0)
    far(model(x)[:, 0], theirs.sum(1))
    torch.testing.assert_close(ours.sum(1), model(x)[:, 0].detach())


def test_captum_gives_resnet18_relevance_a_million_times_its_output(photographs: Tensor) -> None:
    model = with_random_norms(resnet18())
    output = model(photographs)[:, 0].detach().abs().max()
    assert explained_by_captum(model, photographs, 0).flatten(1).sum(1).abs().max() > 1e6 * output
    ours = athena.lrp(model, photographs, target=0, rule=Epsilon(EPSILON))
    absorbed = ours.conservation()["absorbed"].sum()
    assert ours.input.sum().item() == pytest.approx((1 - absorbed) * ours.output.sum().item(), rel=1e-6)


def test_captum_forgets_the_rules_of_a_model_after_its_first_call() -> None:
    model, x = chain(bias=False, convolutional=False)
    give_rules(model, lambda: GammaRule(4.0))
    explainer = LRP(model)
    first, second = (explainer.attribute(x.clone().requires_grad_(), target=0).detach() for _ in range(2))
    far(first, second)
    close(second, athena.lrp(model, x, target=0, rule=Epsilon(1e-9)).input)


def test_captum_leaves_activations_on_the_layers() -> None:
    model, x = chain(bias=False, convolutional=True)
    explained_by_captum(model, x, (0, 0, 0))
    (left,) = model[3].activations.values()
    assert [tuple(tensor.shape) for tensor in left] == [(6, 6, 6, 6)]


def test_captum_moves_weights_to_other_memory() -> None:
    model, x = chain(bias=False, convolutional=False)
    shared = model[0].weight.detach()
    explained_by_captum(give_rules(model, lambda: GammaRule(0.25)), x, 0)
    assert torch.equal(model[0].weight, shared)
    assert model[0].weight.data_ptr() != shared.data_ptr()
    shared = model[0].weight.detach()
    athena.lrp(model, x, rule=Gamma(0.25))
    assert model[0].weight.data_ptr() == shared.data_ptr()


def test_captum_has_no_rule_for_flatten_and_leaves_its_own_behind_when_it_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    x = images(2, 3, 8, 8)
    with pytest.raises(TypeError, match="Flatten"):
        LRP(model).attribute(x, target=0)
    assert isinstance(model[0].rule, EpsilonRule)
    assert athena.lrp(model, x).input.shape == x.shape


def test_captum_gives_negative_relevance_by_its_positive_rule_where_inputs_are_negative() -> None:
    model, x = nn.Sequential(nn.Linear(12, 5, bias=False)).double(), images(6, 12)
    relevance = athena.lrp(model, x, target=lambda output: torch.ones_like(output), rule=ZPlus()).input
    assert (relevance >= 0).all()
    torch.testing.assert_close(relevance.sum(1), torch.full((6,), 5.0, dtype=torch.float64))
    target = model(x).amin(0).argmax()
    x = x[model(x)[:, target] > 0]
    give_rules(model, Alpha1_Beta0_Rule)
    assert (explained_by_captum(model, x, int(target)) < 0).any()


class NormAfterActivation(nn.Module):
    """Batch norm that stands beside the convolution where it is defined, and not where it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(F.relu(self.conv(x))).mean((2, 3)))


class NormWithEpsilon(NormAfterActivation):
    """Its epsilon is the one that torchvision's MobileNetV3 and EfficientNet have."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "epsilon", "error"), [(NormAfterActivation, 0.0, 0.1), (NormWithEpsilon, 1e-3, 1e-4)]
)
def test_zennit_explains_another_network_than_was_given_where_it_merges_batch_norm(
    build: Callable[[], nn.Module], epsilon: float, error: float
) -> None:
    model, x = with_random_norms(build()), images(2, 3, 8, 8)
    model.norm.eps = epsilon
    output = model(x).detach()
    with Composite(by_rule(rules.Epsilon(TINY)), [SequentialMergeBatchNorm()]).context(model) as changed:
        assert (changed(x) - output).abs().max() > error * output.abs().max()
    relevance = athena.lrp(model, x, target="logits", rule=Gamma(0.25)).output
    torch.testing.assert_close(relevance, output)


class Counted(TorchDispatchMode):
    """Counts convolutions on the way up and on the way down, whoever runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def convolutions(self) -> tuple[int, int]:
        return self.calls["convolution"], self.calls["convolution_backward"]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [("zero", (1, 1), (2, 2)), ("epsilon", (1, 1), (2, 2)), ("gamma", (2, 1), (6, 6))]
)
def test_zennit_runs_each_layer_again_for_its_rule(name: str, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 6)).double(), images(2, 3, 8, 8).abs()
    with Counted() as counted:
        explained_by_zennit(model, x, Composite(by_rule(PAIRS[name][1])), start=torch.Tensor.detach)
    assert counted.convolutions == (2 * theirs[0], 2 * theirs[1])
    with Counted() as counted:
        athena.lrp(model, x, target=lambda output: output.clamp(min=0), rule=PAIRS[name][0])
    assert counted.convolutions == (2 * ours[0], 2 * ours[1])
