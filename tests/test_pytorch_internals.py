"""What the package relies on in PyTorch beyond its documented interface: each claim says what breaks if it fails."""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from athena.propagation.layer import layer_of_kind
from athena.propagation.notes import keeps_graph, packs_what_it_saves, runs_under_a_selective_checkpoint


def test_a_graph_node_tells_the_shapes_of_its_outputs() -> None:
    """Else sums that were broadcast cannot be undone, and a split's outputs not be counted."""
    x = torch.ones(2, 3, requires_grad=True)
    first, _ = x.split(2, 1)
    assert [tuple(output.shape) for output in first.grad_fn._input_metadata] == [(2, 2), (2, 1)]


def test_a_graph_node_can_be_called_and_does_not_undo_broadcasting() -> None:
    """The first is how relevance goes as the gradient does; for the second `LRPLayer.broadcasts` makes up."""
    x, y = torch.ones(2, 3, requires_grad=True), torch.full((3,), 2.0, requires_grad=True)
    of_x, of_y = (x * y).grad_fn(torch.ones(2, 3))  # type: ignore[misc]
    assert torch.equal(of_x, torch.full((2, 3), 2.0))
    assert of_y.shape == (2, 3)


def test_affine_nodes_keep_their_factors_and_how_they_were_called() -> None:
    """Else the contributions of a layer with weights are not known."""
    linear, conv = nn.Linear(3, 2), nn.Conv2d(1, 2, 3, padding=1)
    node = linear(torch.ones(4, 3, requires_grad=True)).grad_fn
    assert node.name() == "AddmmBackward0"
    assert torch.equal(node._saved_mat2, linear.weight.T)
    assert torch.equal(node._saved_mat1, torch.ones(4, 3))
    assert node.next_functions[0][0].variable is linear.bias
    node = conv(torch.ones(1, 1, 5, 5, requires_grad=True)).grad_fn
    assert node.name() == "ConvolutionBackward0"
    assert list(node._saved_padding) == [1, 1]
    assert not node._saved_transposed
    assert node._saved_groups == 1


def test_nodes_are_called_what_their_lrp_layers_expect() -> None:
    """Else an operation is refused that has an LRP layer."""
    x = torch.rand(2, 4, 6, 6, requires_grad=True)
    for out in (
        x.relu(),
        F.gelu(x),
        F.silu(x),
        F.max_pool2d(x, 2),
        F.avg_pool2d(x, 2),
        x + 1,
        x * 2,
        x / 2,
        x.flatten(1),
    ):
        assert layer_of_kind(out.grad_fn.name()) is not None, out.grad_fn.name()


def test_it_is_known_whether_autograd_packs_what_it_saves() -> None:
    """Else a checkpointed region is computed again for each tensor that relevance looks at."""
    assert not packs_what_it_saves()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        assert packs_what_it_saves()


def test_a_selective_checkpoint_tells_that_it_is_one() -> None:
    """Else relevance uses up the one backward pass that it lets through, and the loss's own fails."""
    seen = []

    def part(x: Tensor) -> Tensor:
        seen.append(runs_under_a_selective_checkpoint())
        return x.exp()

    contexts = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.PREFER_SAVE)
    x = torch.ones(2, requires_grad=True)
    checkpoint(part, x, use_reentrant=False, context_fn=contexts)
    checkpoint(part, x, use_reentrant=False)
    assert seen == [True, False]


def test_a_backward_pass_tells_whether_it_keeps_the_graph() -> None:
    """Else relevance stays in memory after the backward pass, or is gone in a second one."""
    seen = []
    for keeps in (True, False):
        x = torch.ones(2, requires_grad=True)
        out = (x * 2).sum()
        out.grad_fn.register_prehook(lambda gradients: seen.append(keeps_graph()))
        out.backward(retain_graph=keeps)
    assert seen == [True, False]


def test_a_compiled_module_tells_that_it_is() -> None:
    """Else a compiled model is explained by what happens to be seen of it."""
    module = nn.Linear(2, 2)
    assert module._compiled_call_impl is None
    module.compile(backend="eager")
    assert module._compiled_call_impl is not None
    assert "_orig_mod" in torch.compile(nn.Linear(2, 2), backend="eager")._modules


def test_a_replica_of_data_parallel_tells_that_it_is_one() -> None:
    """Else guidance of it would run the original model in its place."""
    assert vars(nn.Linear(2, 2)._replicate_for_data_parallel())["_is_replica"]
