"""LRP on networks as other libraries write them: torch_geometric's layers, and transformers' Llama beside LXT.

`pip install -e ".[frameworks]"` brings the libraries; LXT, which asks for more than it needs here, comes by
`pip install --no-deps lxt`. Without a library its tests are skipped.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import athena
from athena.rules import Zero

EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 0]])


class OnGraph(nn.Module):
    """Two layers of torch_geometric on one graph of five nodes."""

    def __init__(self, layer: type[nn.Module], heads: int | None) -> None:
        super().__init__()
        first, second = ({}, {}) if heads is None else ({"heads": heads}, {"heads": 1})
        self.first, self.second = layer(6, 8, **first), layer(8 * (heads or 1), 3, **second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, EDGES).relu(), EDGES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layer, heads", [("GCNConv", None), ("SAGEConv", None), ("GATConv", 2), ("GATv2Conv", 2), ("TransformerConv", 2)]
)
def test_relevance_adds_up_on_layers_of_torch_geometric(layer: str, heads: int | None) -> None:
    library = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    model = OnGraph(getattr(library, layer), heads).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    explained = athena.lrp(model, x, rule=Zero())
    kept = explained.conservation()[["bias", "stabiliser"]].to_numpy().sum()
    assert explained.input.sum().item() + kept == pytest.approx(explained.output.sum().item(), abs=1e-9)
    if heads is None:  # no attention: the network is linear between its ReLUs
        x.requires_grad_()
        out = model(x)
        (gradient,) = torch.autograd.grad(out.max(1).values.sum(), x)
        torch.testing.assert_close(explained.input, (x * gradient).detach(), rtol=1e-10, atol=1e-12)


@pytest.fixture
def lxt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """LXT's rules for transformers; not its `monkey_patch`, which needs a transformers older than 5."""
    package = pytest.importorskip("lxt")
    pytest.importorskip("transformers")
    efficient = ModuleType("lxt.efficient")
    efficient.__path__ = [f"{package.__path__[0]}/efficient"]
    monkeypatch.setitem(sys.modules, "lxt.efficient", efficient)
    for name in ("lxt.efficient.rules", "lxt.efficient.patches"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert importlib.util.find_spec("lxt.efficient.patches") is not None
    return importlib.import_module("lxt.efficient.patches")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sizes", [{}, {"num_hidden_layers": 1}, {"hidden_act": "relu"}, {"num_key_value_heads": 4}])
def test_a_language_model_is_explained_as_lxt_does(
    sizes: dict[str, int | str], lxt: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from transformers.models.llama import modeling_llama

    torch.manual_seed(0)
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | heads | sizes)).double().eval()
    tokens = torch.randint(0, 64, (2, 7))
    with torch.no_grad():
        target = model(tokens).logits[:, -1].argmax(1)
    ours = athena.lrp(model, tokens, at="model.embed_tokens", target=(-1, target), rule=Zero()).input

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lxt.gated_mlp_forward)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lxt.rms_norm_forward)
    attention = lxt.wrap_attention_forward(modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[:, -1]
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), embedded)
    theirs = (embedded * gradient).detach()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
