"""Claims about `athena.Guidance` in the training loops that people write."""

import copy
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F

import athena
from athena.rules import Epsilon, Gamma, Zero

Gradients = dict[str, Tensor]
X, Y = torch.randn(5, 12).double(), torch.tensor([0, 3, 1, 2, 2])


class Net(nn.Module):
    """A network of three layers whose middle part is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU())
        self.head = nn.Linear(9, 4)
        self.meanwhile: Callable[[], Any] = lambda: None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[:2](x)
        self.meanwhile()
        return self.head(self.body[2:](h))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def step(model: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    model.zero_grad()
    F.cross_entropy((model if forward is None else forward)(X), Y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def guided(model: nn.Module, **settings: Any) -> Gradients:
    with athena.Guidance(model, **settings):
        return step(model)


def equal(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def differ(actual: Gradients, expected: Gradients) -> None:
    assert any(not torch.allclose(actual[name], gradient) for name, gradient in expected.items())


# Whatever ends a forward pass, and whoever else runs one


def interrupted() -> None:
    signal.raise_signal(signal.SIGINT)


def leave() -> None:
    raise SystemExit


@pytest.mark.parametrize("end", [interrupted, leave])
def test_nothing_stays_behind_whatever_ends_a_forward_pass(end: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in what it runs aside
    model = Net()
    expected, plain = guided(model, factor=2.0), step(model)
    with athena.Guidance(model, 2.0):
        model.meanwhile = end
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            model(X)
        model.meanwhile = lambda: None
        assert torch._C._len_torch_function_stack() == 0
        equal(step(model), expected)
    equal(step(model), plain)


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_model_that_is_called_during_its_own_forward_pass_is_guided_once(in_thread: bool) -> None:
    model = Net()
    expected = guided(model, factor=2.0)
    looked: list[Tensor] = []

    def look() -> None:
        model.meanwhile = lambda: None
        with torch.no_grad():
            looked.append(model(X))

    def meanwhile() -> None:
        if in_thread:
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
        else:
            look()

    with athena.Guidance(model, 2.0):
        model.meanwhile = meanwhile
        equal(step(model), expected)
        assert torch._C._len_torch_function_stack() == 0
    torch.testing.assert_close(looked, [model(X).detach()])


# Never silently plain

PLAIN: dict[str, tuple[Callable[[Wrapper], Callable[[Tensor], Tensor]], str]] = {
    "eval mode": (lambda model: model.eval(), "eval mode.*model.train"),
    "a part called": (lambda model: model.net, "was not called in training.*self.net"),
}


@pytest.mark.parametrize("how", PLAIN)
def test_a_model_that_was_trained_and_never_guided_warns_with_the_likely_cause(how: str) -> None:
    forward, cause = PLAIN[how]
    model = Wrapper()
    guidance = athena.Guidance(model, 5.0)
    step(model, forward(model))
    with pytest.warns(UserWarning, match=f"never acted, and Wrapper was trained plainly.*{cause}") as caught:
        guidance.remove()
    assert caught[0].filename == __file__
    guidance.remove()
    model = Wrapper()
    with pytest.warns(UserWarning, match=cause), athena.Guidance(model, 5.0):
        step(model, forward(model))


def test_an_optimisers_step_tells_that_a_model_was_trained() -> None:
    model = Wrapper()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guidance = athena.Guidance(model, 5.0)
    step(model, model.net)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="never acted"):
        guidance.remove()


def test_no_warning_where_guidance_acted_or_nothing_was_trained_or_the_factor_was_0() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor in (5.0, 0.0):
            guided(Net(), factor=factor)
        with athena.Guidance(Net(), 5.0) as guidance:
            guidance.model.eval()(X)
        model = Net()
        with athena.Guidance(model, 0.0) as guidance:
            step(model)
            guidance.factor = 1.0
        model = Net().eval()
        with pytest.raises(IndexError), athena.Guidance(model, 1.0):
            F.cross_entropy(model(X), Y + 9).backward()


def test_model_forward_called_directly_is_guided() -> None:
    model = Net()
    expected = guided(model, factor=2.0)
    with athena.Guidance(model, 2.0):
        equal(step(model, model.forward), expected)


class Mixed(nn.Module):
    """With layers that can never be guided."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(7, 6), nn.LSTM(6, 5, batch_first=True)
        self.norm, self.hidden, self.head = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.norm(self.lstm(self.embed(x))[0][:, -1]))))


@pytest.mark.parametrize(("path", "kind"), [("norm", "BatchNorm1d"), ("embed", "Embedding")])
def test_a_layer_that_can_never_be_guided_is_refused_by_its_kind(path: str, kind: str) -> None:
    for settings in ({"scope": ["hidden", path]}, {"factor": {"hidden": 1.0, path: 1.0}}):
        with pytest.raises(ValueError, match=rf"'{path}' \({kind}\) can never be guided.*\['head', 'hidden', 'lstm"):
            athena.Guidance(Mixed(), **settings)


def test_a_weight_that_an_embedding_shares_with_a_linear_layer_can_be_guided() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 6), "hidden": nn.Linear(6, 6), "out": nn.Linear(6, 7, bias=False)})
    model["out"].weight = model["embed"].weight
    athena.Guidance(model, 1.0, scope=["hidden", "embed"])


# A part, and the whole


def test_a_part_of_a_guided_model_is_not_guided_again_in_either_order() -> None:
    model = Wrapper()
    whole = athena.Guidance(model)
    with pytest.raises(RuntimeError, match=r"Wrapper, of which this is the part 'net\.body', is guided already"):
        athena.Guidance(model.net.body)
    whole.remove()
    part = athena.Guidance(model.net.body)
    with pytest.raises(RuntimeError, match=r"part 'net\.body' of this model is guided already"):
        athena.Guidance(model)
    part.remove()
    other = copy.deepcopy(model)
    athena.Guidance(model)
    athena.Guidance(other.net)


# Phases in which nothing guided is trained


def test_a_frozen_body_trains_plainly_and_is_guided_once_it_is_trained() -> None:
    model = Net()
    plain, expected = step(model), guided(model, factor=2.0)
    with athena.Guidance(model, 2.0) as guidance:
        model.body.requires_grad_(False)
        equal(step(model), {name: gradient for name, gradient in plain.items() if name.startswith("head")})
        assert guidance.step == 0
        model.body.requires_grad_(True)
        equal(step(model), expected)
        assert guidance.step == 1


def test_a_generator_is_guided_in_its_own_steps_alone() -> None:
    generator, critic = Net(), nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 1)).double()

    def gradients(model: nn.Module, frozen: nn.Module) -> Gradients:
        frozen.requires_grad_(False)
        model.zero_grad()
        F.softplus(critic(generator(X))).mean().backward()
        frozen.requires_grad_(True)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(critic, frozen=generator), gradients(generator, frozen=critic)
    with athena.Guidance(generator, 2.0):
        equal(gradients(critic, frozen=generator), plain[0])
        differ(gradients(generator, frozen=critic), plain[1])


def test_what_stayed_frozen_to_the_end_is_said() -> None:
    model = Net()
    model.body.requires_grad_(False)
    with pytest.warns(UserWarning, match="all layers that scope='linear' guides were frozen"):
        guided(model, factor=2.0)


# Hooks


def test_full_backward_hooks_of_layers_change_nothing() -> None:
    model = Net()
    expected = guided(model, factor=2.0)
    seen: list[Any] = []
    for layer in (model.body[2], model.body[1]):
        layer.register_full_backward_hook(lambda module, below, above: seen.append(above))
    equal(guided(model, factor=2.0), expected)
    assert len(seen) == 2


def test_a_forward_hook_of_the_model_that_changes_its_output_is_part_of_the_model() -> None:
    """Relevance starts from what the caller gets: here, from the other end of the classes."""

    class Turned(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            return -2 * self.net(x)

    expected = guided(Turned(), factor=2.0)
    model, hooks = Wrapper(), []
    with athena.Guidance(model, 2.0) as guidance:
        handle = model.register_forward_hook(lambda module, args, output: -2 * output)
        equal(step(model), expected)
        assert guidance.step == 1
        model.register_forward_hook(lambda module, args, output: hooks.append(output))
        equal(step(model), expected)
        handle.remove()
        differ(step(model), expected)
    assert len(hooks) == 2
    assert len(model._forward_hooks) == 1


def test_a_forward_hook_that_fails_leaves_the_next_pass_in_order() -> None:
    model = Net()
    expected = guided(model, factor=2.0)

    def fail(*_: Any) -> None:
        raise KeyError

    with athena.Guidance(model, 2.0):
        handle = model.register_forward_hook(fail)
        with pytest.raises(KeyError):
            model(X)
        handle.remove()
        equal(step(model), expected)
    assert not model._forward_hooks


def test_guidance_ends_with_remove_where_something_else_has_taken_over_the_forward_pass_since() -> None:
    """As libraries do that move a model between devices."""
    model = Net()
    plain = step(model)
    guidance = athena.Guidance(model, 2.0)
    inner = model.forward
    model.forward = lambda x: inner(x)  # type: ignore[method-assign]
    differ(step(model), plain)
    guidance.remove()
    equal(step(model), plain)


# Compilation and transforms


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_guided_model_that_is_compiled_is_guided_as_it_is() -> None:
    """Its guided passes run as without compilation, those in eval mode compiled."""
    torch._dynamo.reset()
    model = Net()
    expected = guided(model, factor=2.0)
    with athena.Guidance(model, 2.0):
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            equal(step(model, compiled), expected)
        model.eval()
        torch.testing.assert_close(compiled(X), model(X))


def test_a_compiled_model_is_refused_in_one_sentence() -> None:
    with pytest.raises(athena.UnsupportedLayer, match=r"is compiled.*give the model before compilation"):
        athena.Guidance(torch.compile(Net(), backend="eager"))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_gradients_of_each_sample_by_vmap_are_refused_in_one_sentence() -> None:
    model = Net()
    athena.Guidance(model, 1.0)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    with pytest.raises(athena.UnsupportedLayer, match=r"torch\.func\.vmap cannot be guided.*one sample at a time"):
        vmap(grad(loss), (None, 0, 0))(parameters, X, Y)
    with pytest.raises(athena.UnsupportedLayer, match=r"torch\.func\.jvp cannot be guided"):
        jvp(model, (X,), (X,))
    losses = F.cross_entropy(model(X), Y, reduction="none")
    with pytest.raises(athena.UnsupportedLayer, match="several backward passes at once"):
        torch.autograd.grad(losses, list(model.parameters()), torch.eye(5).double(), is_grads_batched=True)


# A schedule


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 3.0),
        ("factor", {"body.0": 1.0}),
        ("scope", ["body.2"]),
        ("rule", Epsilon(10.0)),
        ("rule", Gamma(0.3)),
        ("rule", lambda path, module: Zero()),
        ("target", "softmax"),
        ("normalise", "max"),
        ("granularity", "neuron"),
        ("granularity", "filter"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_every_setting_may_be_set_between_steps(name: str, value: Any) -> None:
    model = Net()
    start, expected = guided(model, factor=2.0), guided(model, **{"factor": 2.0, name: value})
    with athena.Guidance(model, 2.0) as guidance:
        equal(step(model), start)
        setattr(guidance, name, value)
        assert getattr(guidance, name) == value
        equal(step(model), expected)


def test_every_may_be_set_between_steps() -> None:
    model = Net()
    start, plain = guided(model, factor=2.0), step(model)
    with athena.Guidance(model, 2.0, every=np.int64(2)) as guidance:
        for expected in (start, plain, start):
            equal(step(model), expected)
        guidance.every = 1
        equal(step(model), start)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", float("nan")),
        ("factor", {"body.9": 1.0}),
        ("factor", torch.ones(2)),
        ("scope", "lines"),
        ("rule", "epsilon"),
        ("target", "probability"),
        ("normalise", "l2"),
        ("granularity", "pixel"),
        ("every", 1.5),
        ("every", 0),
        ("on_divergence", "ignore"),
    ],
    ids=str,
)
def test_a_setting_is_checked_whenever_it_is_set(name: str, value: Any) -> None:
    model = Net()
    expected = guided(model, factor=2.0)
    with athena.Guidance(model, 2.0) as guidance:
        before = getattr(guidance, name)
        with pytest.raises((TypeError, ValueError)):
            setattr(guidance, name, value)
        assert getattr(guidance, name) == before
        equal(step(model), expected)


@pytest.mark.parametrize("factor", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)])
def test_a_number_of_numpy_or_torch_is_a_factor(factor: Any) -> None:
    expected = guided(Net(), factor=0.5)
    equal(guided(Net(), factor=factor), expected)
    equal(guided(Net(), factor=np.int64(1)), guided(Net(), factor=1))


# Targets as outputs are


class Map(nn.Module):
    """Gives a class at each place: (batch, classes, height, width), or in the logits of a dict as asked."""

    def __init__(self, form: str = "map") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.below, self.above, self.form = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 1), form
        self.double()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        z = self.above(F.relu(self.below(x)))
        if self.form == "tokens":
            z = z.flatten(2).mT
        return z if self.form == "map" else {"loss": None, "logits": z, "hidden": x}


IMAGES = torch.randn(3, 2, 6, 5).double()
PLACES = torch.arange(3 * 4 * 3).reshape(3, 4, 3) % 4


def step_of_map(form: str, labels: Any = None, by_name: bool = False, **settings: Any) -> Gradients:
    model = Map(form)
    with athena.Guidance(model, 2.0, scope="all", **settings) as guidance:
        if labels is not None and not by_name:
            guidance.labels = labels
        output = model(IMAGES, labels=labels) if by_name else model(IMAGES)
        z = output if form == "map" else output["logits"]
        F.cross_entropy(z.mT.unflatten(2, (4, 3)) if form == "tokens" else z, PLACES).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def of_places(z: Tensor, chosen: Tensor) -> Tensor:
    return z * F.one_hot(chosen, 4).movedim(-1, 1)


@pytest.mark.parametrize("form", ["map", "dict", "tokens"])
def test_relevance_starts_from_the_class_at_each_place(form: str) -> None:
    predicted = step_of_map("map", target=lambda z: of_places(z, z.argmax(1)))
    equal(step_of_map(form), predicted)
    equal(step_of_map(form, target="softmax"), step_of_map("map", target=lambda z: z.softmax(1)))
    true = step_of_map("map", target=lambda z: of_places(z, PLACES))
    differ(true, predicted)
    labels = PLACES.flatten(1) if form == "tokens" else PLACES
    equal(step_of_map(form, labels, target="label"), true)
    equal(step_of_map(form, labels, by_name=True, target="label"), true)
    equal(step_of_map(form, lambda x: labels, target="label"), true)
    some = step_of_map("map", target=lambda z: of_places(z, PLACES) * (PLACES != 1)[:, None])
    equal(step_of_map(form, labels.masked_fill(labels == 1, -100), target="label"), some)


@pytest.mark.parametrize(("labels", "what"), [(PLACES[:, 0], r"\(3, 3\).*\(3, 4, 3\)"), (PLACES + 1, "classes 1 to 4")])
def test_labels_that_do_not_fit_a_map_are_refused(labels: Tensor, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        step_of_map("map", labels, target="label")


def test_a_target_may_leave_out_what_nothing_starts_from() -> None:
    expected = step_of_map("dict")
    equal(
        step_of_map("dict", target=lambda out: {"logits": of_places(out["logits"], out["logits"].argmax(1))}), expected
    )
    equal(step_of_map("dict", target=lambda out: of_places(out["logits"], out["logits"].argmax(1))), expected)
    with pytest.raises(ValueError, match="structure of what the model returned"):
        step_of_map("dict", target=lambda out: {"logit": out["logits"]})
    with pytest.raises(ValueError, match="structure of what the model returned"):
        step_of_map("dict", target=lambda out: out["logits"][:1])


# Gates


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate: Callable[[Tensor], Tensor], opens: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.below, self.squeeze, self.head = nn.Conv2d(2, 5, 3), nn.Linear(5, 5), nn.Linear(5, 4)
        self.gate, self.opens = gate, opens
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.below(x))
        gate = self.gate(self.squeeze(h.mean((2, 3))))[:, :, None, None]
        return self.head((h * (gate.detach() if self.opens else gate)).mean((2, 3)))


@pytest.mark.parametrize("gate", [torch.sigmoid, F.hardsigmoid], ids=["sigmoid", "hard sigmoid"])
def test_what_is_gated_takes_all_relevance_where_asked(gate: Callable[[Tensor], Tensor]) -> None:
    """As if the gate were a constant; its own layers then train plainly."""

    def gradients(model: nn.Module, **settings: Any) -> Tensor:
        with athena.Guidance(model, {"below": 2.0}, **settings):
            F.cross_entropy(model(IMAGES), torch.arange(3)).backward()
        return model.get_parameter("below.bias").grad

    def relevance(model: Gated, **settings: Any) -> Tensor:
        seen: list[Tensor] = []

        def record(relevance: Tensor, gradient: Tensor, output: Tensor) -> Tensor:
            seen.append(relevance)
            return relevance

        gradients(model, signal=record, **settings)
        return seen[0]

    alone = relevance(Gated(gate, opens=True))
    torch.testing.assert_close(relevance(Gated(gate), gates="signal"), alone)
    assert not torch.allclose(relevance(Gated(gate)), alone)
    with pytest.raises(ValueError, match=r"gates='all'.*'half', 'signal'"):
        athena.Guidance(Gated(gate), gates="all")


def test_of_a_gated_linear_unit_what_is_gated_takes_all_too() -> None:
    class Unit(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.below, self.head, self.written_out = nn.Linear(12, 8), nn.Linear(4, 4), written_out
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.below(x)
            return self.head(h[:, :4] * torch.sigmoid(h[:, 4:]) if self.written_out else F.glu(h))

    equal(guided(Unit(False), gates="signal", factor=2.0), guided(Unit(True), gates="signal", factor=2.0))
    differ(guided(Unit(False), gates="signal", factor=2.0), guided(Unit(False), factor=2.0))
