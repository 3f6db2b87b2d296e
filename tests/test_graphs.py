"""Claims about networks on graphs and mixtures of experts, against formulas in float64."""

import pytest
import torch
from test_relevance import close, images
from torch import Tensor, nn
from torch.nn import functional as F

import athena
from athena.rules import Zero

EDGES = torch.tensor([[0, 1, 2, 3, 1, 4, 0, 2, 2], [1, 0, 1, 2, 4, 1, 3, 0, 4]])
NODES = 5


def scatter(messages: Tensor, to: Tensor, reduce: str = "sum") -> Tensor:
    """As torch_geometric adds up messages."""
    index = to.view(-1, *[1] * (messages.dim() - 1)).expand_as(messages)
    zeros = messages.new_zeros(NODES, *messages.shape[1:])
    if reduce == "sum":
        return zeros.scatter_add_(0, index, messages)
    return zeros.scatter_reduce_(0, index, messages, "amax", include_self=False)


class GCN(nn.Module):
    """A graph convolution as torch_geometric writes it, or by a sparse product.

    Args:
        inputs, outputs: features.
        way: how messages are added up.
    """

    def __init__(self, inputs: int, outputs: int, way: str) -> None:
        super().__init__()
        self.lin, self.way = nn.Linear(inputs, outputs, bias=False), way
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = normalised().to(x.dtype)
        loops = torch.arange(NODES)
        row, col = torch.cat([EDGES, torch.stack([loops, loops])], 1)
        x = self.lin(x)
        if self.way == "sparse":
            return torch.sparse.mm(weight.to_sparse(), x) + self.bias
        messages = weight[col, row].view(-1, 1) * x.index_select(0, row)
        if self.way == "index_add":
            return torch.zeros_like(x).index_add_(0, col, messages) + self.bias
        return scatter(messages, col) + self.bias


def normalised() -> Tensor:
    """``D^-1/2 (A + 1) D^-1/2``, by target and source."""
    adjacency = torch.eye(NODES, dtype=torch.float64)
    adjacency[EDGES[1], EDGES[0]] = 1
    root = adjacency.sum(1).rsqrt()
    return root[:, None] * adjacency * root


@pytest.mark.parametrize("way", ["scatter", "index_add", "sparse"])
def test_a_graph_convolution_passes_relevance_along_its_edges(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(GCN(4, 6, way), nn.ReLU(), GCN(6, 3, way)).double()
    x, weight = images(NODES, 4), normalised()
    first, _, second = model
    h = (weight @ x @ first.lin.weight.T + first.bias).relu()
    out = weight @ h @ second.lin.weight.T + second.bias
    chosen = torch.zeros_like(out).scatter_(1, out.argmax(1, keepdim=True), 1.0)
    d = weight.T @ chosen @ second.lin.weight
    expected = x * (weight.T @ (d * (h > 0)) @ first.lin.weight)
    explained = athena.lrp(model, x, rule=Zero())
    close(explained.input, expected)
    closes(explained)


def closes(explained: athena.Relevance) -> None:
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    whole = explained.output.sum().item()
    assert kept + explained.input.sum().item() == pytest.approx(whole, abs=1e-6 * abs(whole))


def over_groups(scores: Tensor, to: Tensor, detached: bool = True) -> Tensor:
    """Softmax over the edges that come to each node, as torch_geometric writes it."""
    highest = scatter(scores.detach() if detached else scores, to, "amax")
    e = (scores - highest.index_select(0, to)).exp()
    return e / (scatter(e, to) + 1e-16).index_select(0, to)


class GAT(nn.Module):
    """Attention over the edges of a graph as torch_geometric writes it, with one head or several."""

    def __init__(self, inputs: int, outputs: int, heads: int, detached: bool = True) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, heads * outputs, bias=False)
        self.source = nn.Parameter(torch.randn(1, heads, outputs))
        self.target = nn.Parameter(torch.randn(1, heads, outputs))
        self.bias = nn.Parameter(torch.randn(heads * outputs))
        self.shape, self.detached = (heads, outputs), detached

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x).view(-1, *self.shape)
        source, target = (x * self.source).sum(-1), (x * self.target).sum(-1)
        scores = source.index_select(0, EDGES[0]) + target.index_select(0, EDGES[1])
        weights = over_groups(F.leaky_relu(scores, 0.2), EDGES[1], self.detached)
        messages = weights.unsqueeze(-1) * x.index_select(0, EDGES[0])
        return scatter(messages, EDGES[1]).flatten(1) + self.bias


@pytest.mark.parametrize("detached", [True, False])
def test_attention_over_edges_halves_between_weights_and_messages(detached: bool) -> None:
    """By gradients whose product is replaced: half of it to the weights, which softmax passes as the gradient."""
    torch.manual_seed(0)
    model, x = GAT(4, 3, 2, detached).double(), images(NODES, 4).requires_grad_()
    explained = athena.lrp(model, x.detach(), rule=Zero())
    h = model.lin(x).view(-1, 2, 3)
    source, target = (h * model.source).sum(-1), (h * model.target).sum(-1)
    scores = F.leaky_relu(source[EDGES[0]] + target[EDGES[1]], 0.2)
    weights = torch.stack([torch.zeros_like(score) for score in scores])
    for node in range(NODES):
        weights = weights.index_put((EDGES[1] == node,), scores[EDGES[1] == node].softmax(0))
    messages = h[EDGES[0]]
    halved = 0.5 * (weights.detach().unsqueeze(-1) * messages + weights.unsqueeze(-1) * messages.detach())
    out = torch.zeros(NODES, 2, 3, dtype=torch.float64).index_add(0, EDGES[1], halved).flatten(1)
    chosen = (explained.output != 0).to(out.dtype)
    close(explained.input, (x * torch.autograd.grad((out * chosen).sum(), x)[0]).detach())
    closes(explained)


def test_softmax_that_is_written_out_is_explained_as_softmax() -> None:
    class Of(nn.Module):
        def __init__(self, written_out: bool) -> None:
            super().__init__()
            self.lin, self.written_out = nn.Linear(4, 4).double(), written_out

        def forward(self, x: Tensor) -> Tensor:
            scores = self.lin(x)
            if not self.written_out:
                return scores.softmax(1)
            e = (scores - scores.amax(1, keepdim=True)).exp()
            return e / e.sum(1, keepdim=True)

    torch.manual_seed(0)
    model, x = Of(True), images(3, 4)
    explained = athena.lrp(model, x)
    closes(explained)
    model.written_out = False
    close(explained.input, athena.lrp(model, x).input)


def test_an_exponential_that_goes_elsewhere_too_is_refused() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            e = F.linear(x, torch.eye(4, dtype=x.dtype)).exp()
            return e / e.sum(1, keepdim=True) + e

    with pytest.raises(athena.UnsupportedLayer, match="exp"):
        athena.lrp(Both(), images(3, 4))


class Experts(nn.Module):
    """A mixture of experts with routing to the best two, as transformers writes it."""

    def __init__(self, width: int = 6, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])
        weights, chosen = torch.topk(F.softmax(self.gate(tokens), 1), 2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for expert, mask in zip(self.experts, F.one_hot(chosen, len(self.experts)).permute(2, 1, 0), strict=True):
            place, token = torch.where(mask)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return out.view(x.shape).mean(1)


def test_experts_and_their_router_get_half_of_the_relevance_each() -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), images(2, 5, 6).requires_grad_()
    explained = athena.lrp(model, x.detach(), rule=Zero())
    tokens = x.view(-1, 6)
    weights, chosen = F.softmax(model.gate(tokens), 1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True).detach()  # a divisor
    every = torch.stack([expert(tokens) for expert in model.experts], 1)
    theirs = every.gather(1, chosen[..., None].expand(-1, -1, 6))
    halved = 0.5 * (theirs.detach() * weights[..., None] + theirs * weights[..., None].detach())
    out = halved.sum(1).view(2, 5, 6).mean(1)
    d = (explained.output != 0).to(out.dtype)
    close(explained.input, (x * torch.autograd.grad((out * d).sum(), x)[0]).detach())
    closes(explained)


def test_a_product_with_a_matrix_for_each_group_is_explained_as_its_parts() -> None:
    """As transformers computes its experts where it can; in float32, as PyTorch has it in no more."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(2, 4, 8)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.tensor([2, 6], dtype=torch.int32)
            return self.head(F.grouped_mm(x, self.weight, offs=ends).relu())

    torch.manual_seed(0)
    model, x = Grouped(), torch.randn(6, 4)
    explained = athena.lrp(model, x, rule=Zero())
    leaf = x.clone().requires_grad_()
    h = torch.cat([leaf[:2] @ model.weight[0], leaf[2:] @ model.weight[1]]).relu()
    (gradient,) = torch.autograd.grad(model.head(h).max(1).values.sum(), leaf)
    torch.testing.assert_close(explained.input, x * gradient, rtol=1e-4, atol=1e-5)
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    assert kept + explained.input.sum().item() == pytest.approx(explained.output.sum().item(), rel=1e-4)


def test_experts_are_guided() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Experts(), nn.Linear(6, 3)).double(), images(2, 5, 6)
    with athena.Guidance(model, factor=0.5, scope="all"):
        for _ in range(2):
            model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
