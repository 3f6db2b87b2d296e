"""One relevance pass over any model: `lrp`, and the `Relevance` it returns.

An explanation is one forward pass of the model and one walk down its graph (`athena.propagation`). What the layers
between held is found by explaining once more, with an account, where it is asked for. Not here: training with
relevance (`athena.guidance`).
"""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from athena._imports import needed
from athena.propagation.account import Account, Row
from athena.propagation.inputs import Inputs, module_at, outside_inference_mode
from athena.propagation.layer import UnsupportedLayer, nonzero, total
from athena.propagation.notes import Notes, tensors_in
from athena.propagation.operations import recording
from athena.propagation.outputs import ModuleOutputs
from athena.propagation.parameters import ParameterRelevance, asking_for_gradients
from athena.propagation.paths import Paths
from athena.propagation.target import Target, starts_down
from athena.propagation.through import Channels, Through
from athena.propagation.trace import Trace
from athena.propagation.walk import NotesNeeded, Refusal, Walk, within_backward
from athena.rules import Epsilon, RuleChoice, RuleFor

if TYPE_CHECKING:
    import pandas

__all__ = ["Relevance", "lrp"]


class Relevance:
    """What `lrp` returns.

    Beside the model and `x` themselves it holds no more than input and output. `layers` and `conservation` explain once
    more, when one of them is first asked for, and are kept from then on; so does `parameters`. Until then the model and
    `x` have to stay as they were.

    Attributes:
        input: relevance of the input, in its shape and dtype; a tuple or a dict where there were several.
        output: the relevance the pass started from, (batch, classes), or as `target` gave it.
    """

    def __init__(
        self, found: "_Explanation", again: Callable[..., "_Explanation"], arranged: Callable[..., Any]
    ) -> None:
        self.input = arranged(found.inputs)
        self.output = found.output
        self._sizes, self._again = _sizes(found.inputs), again

    @cached_property
    def _account(self) -> "_Explanation":
        return self._explained_again()

    def _explained_again(self, **asked: bool) -> "_Explanation":
        found = self._again(**asked)
        for part, before, now in zip(found.inputs, self._sizes, _sizes(found.inputs), strict=True):
            if not torch.allclose(now, before, rtol=torch.finfo(part.dtype).eps ** 0.5, atol=0.0, equal_nan=True):
                raise RuntimeError(
                    "the model explains this input differently by now, so what its layers held can no longer be told: "
                    "ask for layers, parameters or conservation() before it is trained on or changed, or explain it "
                    "anew"
                )
        return found

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The relevance of the output of each affine layer, by module path, in forward order, in that output's shape.

        Weights used again in the same pass are listed as ``path#2``, ``path#3``. Where batch norm is merged into a
        layer, it is the output of both. Where `lrp` was given `layers`, it is these modules that are listed, a tuple
        for one that returns several tensors.

        Raises:
            RuntimeError: the model, or the input, has changed since the explanation.
        """
        return self._account.layers

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """The relevance of each parameter by its name in ``named_parameters()``, in its shape and order.

        A weight of an affine layer has what passed through it, ``w a^T s``, or what its rule says instead; its bias
        has what it absorbed. With what the stabiliser absorbed they sum to the relevance of the layer's output. All is
        summed over the batch and over every use of the parameter. Other operations with parameters are held alike: the
        weight and bias of a norm, an embedding of positions that is added, a class token. Weights that are computed, as
        by weight norm, give each parameter itself times its gradient.

        Where batch norm in eval mode is merged into the layer below it, as under any rule but LRP-0, the layer's weight
        has what passed through both, the bias of the batch norm what all constants of both absorbed (the layer's own
        bias where the norm has none), and the weight of the norm, a factor of the layer's, is not listed.
        Parameters that no relevance came to are not listed either. Frozen ones are listed; they ask for gradients while
        the model is explained once more, for which the first use of this attribute pays.

        Raises:
            RuntimeError: the model, or the input, has changed since the explanation.
        """
        return self._explained_again(parameters=True).parameters

    def conservation(self) -> "pandas.DataFrame":
        """Where the relevance went, summed over the batch in float64, from the output down.

        Returns:
            One row for each layer and operation that can absorb relevance, then ``input``. Columns: ``layer``;
            ``relevance``, the sum over the layer's output; ``bias`` and ``stabiliser``, what these absorbed of it, in
            the same unit; ``absorbed``, their share of what the pass started from. On a chain, relevance minus bias
            minus stabiliser is the relevance of the next row; on any network the start is the relevance of the input
            and all that was absorbed (thesis 3.6.1). ``bias`` holds whatever is added to a sum regardless of the
            input: biases, constants, the shift of a norm, what an activation is at 0, and what softmax has beyond the
            first order of its Taylor series. Where relevance started at outputs of 0, which can have none, a first row
            ``output`` holds what was lost there.

        Raises:
            RuntimeError: the model, or the input, has changed since the explanation.
            ImportError: pandas is not installed.
        """
        pd = needed("pandas", "experiments", "conservation()")
        found = self._account
        whole = sum(total(part) for part in tensors_in(found.output))
        rows = [*found.rows, Row("input", sum(map(total, found.inputs)), 0.0, 0.0)]
        table = [(*row, (row.bias + row.stabiliser) / whole if whole else 0.0) for row in rows]
        frame: pandas.DataFrame = pd.DataFrame(table, columns=["layer", "relevance", "bias", "stabiliser", "absorbed"])
        return frame


def lrp(
    model: nn.Module,
    x: Tensor | tuple[Any, ...] | dict[str, Any],
    target: Target = None,
    rule: RuleFor = Epsilon(1e-6),  # noqa: B008
    *,
    at: str | None = None,
    layers: Sequence[str] | None = None,
    through: Mapping[str, Channels] | None = None,
    unknown: str = "refuse",
    differentiable: bool = False,
) -> Relevance:
    """Explains the output of `model` for `x` by layer-wise relevance propagation (thesis 3.6).

    The model is explained in eval mode (dropout off, running statistics untouched) and comes back as it was. Autocast
    is off meanwhile: bfloat16 rounding flips ReLU signs and max-pool winners, and the map of LRP-0 on the CNN of table
    6.1 then correlates with that of float32 by no more than 0.97. On a GPU convolutions multiply in TF32, which flips
    fewer, unless the program says ``torch.backends.cudnn.conv.fp32_precision = "ieee"``.

    A layer is a linear function of PyTorch's or a product of matrices, by ``einsum`` too. One written out as a product
    of elements that is summed afterwards, ``(x[:, :, None] * w).sum(1)``, is none: its factors of parameters are
    constants, which relevance passes as by LRP-0 whatever the rule, and it is not guided. Neither is `F.grouped_mm`, by
    which transformers computes experts.

    Args:
        model: any module that maps a floating point tensor to (batch, classes).
        x: (batch, ...), or a tuple of such tensors, which the model is called with one by one, or a dict, which it is
            called with by keyword and of which the floating point tensors are explained.
        target: what relevance to share out. None: the logit of the class predicted. An int, or integers (batch,): the
            logit of that class. ``"softmax"``: every output neuron with its probability. ``"logits"``: every output
            neuron with its logit. Or a function from the output to the relevance of each of its neurons; where the
            model returns a tuple, a list or a dict of tensors, it is given that and returns the like, with None where
            nothing is to start. For an output (batch, tokens, classes), as of a language model, a pair (token, target):
            the index of the token to explain, an int or integers (batch,), -1 for the last, and one of the above for
            its classes. Of an output that is a dict with ``"logits"``, these are taken, and a tensor that a function
            returns is theirs.
        rule: the rule of all affine layers, a preset of `athena.rules`, or a function from a layer's path and module
            to its rule.
        at: the path of a module whose output is explained in the place of `x`, which may then hold anything, such as
            the numbers of tokens: ``at="model.embed_tokens"``. Several outputs, or calls, give a tuple.
        layers: the paths of modules, of any kind; the `Relevance` then has these under `layers`.
        through: lets relevance pass only some channels of a module's output, by its path, such as
            ``{"features.10": [3, 17]}``: there it is set to 0 on all others (concept-conditional relevance, Achtibat
            et al. 2023, doi 10.1038/s42256-023-00711-8). Channels are numbers or a mask (channels,) of bool along
            dimension 1 of the output; a mask of as many dimensions as the output, which broadcasts to it, chooses
            anything else: (1, 1, width) neurons of tokens, (batch, channels, 1, 1) other channels for each sample. What
            goes around the module is not cut. `Relevance.conservation` has a row ``features.10 (through)``, whose
            ``bias`` is what was cut away.
        unknown: what becomes of relevance at an operation that no rule fits: ``"refuse"``, or ``"gradient"`` to pass it
            as the gradient does. `Relevance.conservation` then has what was lost there, as ``bias``. An operation that
            is homogeneous of degree k in what carries relevance needs no rule: it passes the gradient over k.
        differentiable: whether the relevance of input and output keeps its graph to the parameters and to `x`, so that
            it can stand in a loss: ``athena.lrp(model, x, y, differentiable=True).input.square().mean().backward()``.
            The model is in eval mode here too. Attention is computed step by step, as its fused operations have no
            second derivative. Forward and backward cost 1 to 1.2 times a gradient penalty by LRP-0 and LRP-epsilon, 2
            to 3.5 times by rules with sums of their own (networks of table 6.1 on a CPU). No checkpointed parts.

    Raises:
        UnsupportedLayer: relevance reached an operation that LRP has no rule for, or could not reach the input.
        TypeError, ValueError: an argument, or the model's output, is not of the form above.
    """
    if unknown not in ("refuse", "gradient"):
        raise ValueError(f"unknown={unknown!r}: it must be 'refuse' or 'gradient'")
    given = Inputs(model, x, at, _full, differentiable)
    asked = None if layers is None else {path: module_at(model, path, "layers") for path in layers}
    choice, device = RuleChoice(rule), given.device
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    explain = functools.partial(_explain, model, given, target, choice, asked, through, unknown)
    again = functools.partial(_again, explain, device, drawn, traced=True)
    missed: NotesNeeded | None = None
    try:
        try:
            found = explain(differentiable or choice.absolute is not False, differentiable=differentiable)
        except NotesNeeded as needed_notes:
            missed = needed_notes.with_traceback(None)
        if missed is not None:
            found = _again(explain, device, drawn, missed=missed, differentiable=differentiable)
    except Refusal as refusal:
        raise UnsupportedLayer(_sentence(again, refusal)) from None
    return Relevance(found, again, given.arranged)


def _again(
    explain: Callable[..., "_Explanation"],
    device: torch.device,
    drawn: tuple[Tensor, Tensor | None],
    traced: bool = False,
    missed: NotesNeeded | None = None,
    **asked: bool,
) -> "_Explanation":
    """Explains with the random numbers from before, and notes down what the graph does not tell."""
    zeros, operations = (False, False) if missed is None else (missed.zeros, missed.operations)
    again: NotesNeeded | None = None
    try:
        with _random_numbers(device, *drawn):
            return explain(True, traced, zeros or None, operations, **asked)
    except NotesNeeded as more:
        again = NotesNeeded(zeros or more.zeros, operations or more.operations)
        if (again.zeros, again.operations) == (zeros, operations):
            raise
    return _again(explain, device, drawn, traced, again, **asked)


class _Explanation(NamedTuple):
    """What one relevance pass found.

    Attributes:
        inputs: the relevance of each input.
        output: that of the output.
        layers, rows, parameters: of the account, where there is one.
    """

    inputs: tuple[Tensor, ...]
    output: Any
    layers: dict[str, Any]
    rows: list[Row]
    parameters: dict[str, Tensor]


def _explain(
    model: nn.Module,
    given: Inputs,
    target: Target,
    rules: RuleChoice,
    asked: dict[str, nn.Module] | None,
    through: Mapping[str, Channels] | None,
    unknown: str,
    noted: bool = False,
    traced: bool = False,
    zeros: bool | None = None,
    operations: bool = False,
    parameters: bool = False,
    differentiable: bool = False,
) -> _Explanation:
    """One forward pass of the model and one walk down to what it was given.

    Args:
        model, given, target, rules, through, unknown: as for `lrp`.
        asked: the modules whose output is asked for, or None.
        noted: whether to note down, during the forward pass, what its graph does not tell.
        traced: whether to keep an account.
        zeros: whether neurons that are 0 may have relevance; None where the rules will tell.
        operations: whether to record what may have to be tried.
        parameters: whether the account is to hold the relevance of parameters, too.
        differentiable: whether relevance is to keep its graph.
    """
    paths, device = Paths(model), given.device.type
    weights = ParameterRelevance(model) if parameters else None
    asking = asking_for_gradients(model) if parameters else nullcontext()
    with (
        outside_inference_mode(),
        torch.enable_grad(),
        _eval_mode(paths.modules.values()),
        _full_precision(device),
        asking,
        sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext(),
    ):
        sources = given.sources
        settings = traced or rules.looks_at_layers, bool(rules.absolute if zeros is None else zeros), sources
        notes = Trace(paths.modules, *settings) if traced else Notes(*settings)
        notes.differentiable = differentiable
        outputs = None if asked is None else ModuleOutputs(asked, notes.zeros)
        passage = None if through is None else Through(model, through, traced)
        lets_through = nullcontext() if passage is None else passage.watching()
        if isinstance(notes, Trace):
            asks = nullcontext() if outputs is None else outputs.watching()
            with notes.watching(), asks, lets_through, recording(notes, copies=True), notes:
                output = given.call(model, differentiable)
        elif noted := noted or paths.has_frozen_parameters:
            with lets_through, recording(notes) if operations else nullcontext(), notes:
                output = given.call(model, differentiable)
        else:
            with lets_through:
                output = given.call(model, differentiable)
        account = Account(notes, weights, outputs) if isinstance(notes, Trace) else None
        walk = Walk(notes, paths, rules, account=account, is_complete=noted or traced, unknown=unknown, through=passage)
        places = [source.view_as(source).grad_fn.next_functions[0][0] for source in sources]  # type: ignore[union-attr]
        if differentiable and notes.packs:
            raise ValueError("differentiable=True: a part of the model is checkpointed; call it without the checkpoint")
        with torch.set_grad_enabled(differentiable):
            relevance, starts = starts_down(output, target, walk.zeros)
            if account is not None:
                account.start(relevance, starts, walk.zeros)
            walk.explore([out for out, _ in starts], places)
            if walk.gives_to_zeros and not walk.zeros:
                raise NotesNeeded(zeros=True)
            del output
            found = within_backward(walk, starts) if notes.packs else walk.run(starts)
            inputs = tuple(
                torch.zeros_like(tensor)
                if (d := found.get(place)) is None
                else (nonzero(tensor) if walk.reaches_zeros else tensor) * d
                for tensor, place in zip(sources, places, strict=True)
            )
    if not found:
        where = "the input" if given.at is None else f"the output of {given.at!r}"
        raise UnsupportedLayer(
            f"no relevance reached {where} of {type(model).__name__}: its output does not depend on it through "
            "operations that autograd records (a part that detaches, or is compiled or scripted?)"
        )
    if passage is not None:
        passage.require_all_reached()
    if outputs is not None:
        for place, d in found.items():
            outputs.take(place, [d])
    sources.clear()
    booked = (account.layers, account.rows) if account is not None else ({}, [])
    return _Explanation(inputs, relevance, *booked, {} if weights is None else weights.found)


def _sentence(again: Callable[..., _Explanation], refusal: Refusal) -> str:
    """The message of a refusal, found by explaining once more and tracing who called what."""
    try:
        again()
    except Refusal as named:
        return named.sentence
    return str(refusal)


@contextmanager
def _random_numbers(device: torch.device, state: Tensor, state_there: Tensor | None) -> Iterator[None]:
    """A model that draws random numbers draws them from these states of generators."""
    with torch.random.fork_rng([device] if state_there is not None else []):
        torch.set_rng_state(state)
        if state_there is not None:
            torch.cuda.set_rng_state(state_there, device)
        yield


def _sizes(inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What tells the same explanation from another: the sum of the magnitudes, for each input."""
    parts = [part.detach() for part in inputs]
    return [(part if part.element_size() > 2 else part.float()).abs().sum() for part in parts]


def _full(tensor: Tensor) -> Tensor:
    """What autocast may have cast, in the precision of parameters."""
    cast = tensor.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(tensor.device.type)
    return tensor.float() if cast else tensor


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """Autocast off, if it is on: to say so takes time."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


_MODES = threading.RLock()


@contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`modules` in eval mode. Threads take turns where one is in training mode, since a mode is a module's own."""
    with _MODES:
        training = [vars(module) for module in modules if module.training]
        if training:
            for attributes in training:  # past `nn.Module.__setattr__`, which takes long
                attributes["training"] = False
            try:
                yield
            finally:
                for attributes in training:
                    attributes["training"] = True
            return
    yield
