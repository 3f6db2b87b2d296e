"""Whether relevance adds up on networks of every kind.

    python benchmarks/architectures.py --out results/architectures.json

The networks have random weights, none of whose norms is the identity and none of whose biases is 0; those of
torchvision are as it has them, those of transformers (of the extra `frameworks`) have small sizes. What is explained is
the predicted class by LRP-epsilon with 1e-6, down to the image, or to the embedded tokens. A network that uses an
operation which LRP cannot pass is in the table with what it is refused for.

    start     the logit explained, summed over the batch
    reaches   the share of it that reaches the input; the rest stays with biases and the stabiliser, or more than all
    account   by how much start, input and what was kept fail to add up, as a share of the start
    size      the sum of the magnitudes of the map, over that of the start
"""

import argparse
import importlib.metadata
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import athena


class Case(NamedTuple):
    """A network and what it is given.

    Attributes:
        model: in eval mode.
        x: what `athena.lrp` takes.
        at: the module that embeds tokens, or None.
        target: as for `athena.lrp`.
        dtype: in which the account is taken; transformers' experts run in none but float32.
    """

    model: nn.Module
    x: Any
    at: str | None = None
    target: Any = None
    dtype: torch.dtype = torch.float64


def of_torchvision(name: str, *shape: int, **options: Any) -> Case:
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    return Case(model, torch.randn(2, 3, *shape))


class UNet(nn.Module):
    """Two levels, with skip connections and transposed convolutions (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([self.block(3, width), self.block(width, 2 * width)])
        self.bottom = self.block(2 * width, 4 * width)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, 2) for n in (2 * width, width))
        self.joined = nn.ModuleList(self.block(2 * n, n) for n in (2 * width, width))
        self.head = nn.Conv2d(width, 4, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Sequential:
        """Two convolutions, each with batch norm."""
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.Conv2d(outputs, outputs, 3, padding=1)
        norms = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        return nn.Sequential(convolution[0], norms[0], nn.ReLU(), convolution[1], norms[1], nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes, height, width)."""
        skipped = []
        for block in self.down:
            skipped.append(x := block(x))
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([skipped.pop(), up(x)], 1))
        return self.head(x)


def of_every_pixel(output: Tensor) -> Tensor:
    """The relevance of the class that each pixel is given, (batch, classes, height, width)."""
    logits, classes = output.max(1, keepdim=True)
    return torch.zeros_like(output).scatter(1, classes, logits)


class Reader(nn.Module):
    """A classifier of texts by an LSTM of two layers in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(128, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        return self.head(self.lstm(self.embed(tokens))[0].mean(1))


class Graph(nn.Module):
    """Two graph convolutions (Kipf and Welling 2017), messages added up as torch_geometric does."""

    def __init__(self, nodes: int = 300) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 4)
        loops = torch.arange(nodes)
        self.register_buffer("edges", torch.cat([torch.randint(nodes, (2, 5 * nodes)), loops.expand(2, -1)], 1))

    def convolved(self, x: Tensor) -> Tensor:
        """``D^-1/2 (A + 1) D^-1/2 x``."""
        source, to = self.edges
        degree = torch.bincount(to, minlength=len(x)).to(x.dtype).rsqrt()
        messages = (degree[source] * degree[to])[:, None] * x[source]
        return torch.zeros_like(x).scatter_add_(0, to[:, None].expand_as(messages), messages)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (nodes, classes)."""
        return self.convolved(self.second(self.convolved(self.first(x)).relu()))


def of_transformers(name: str, given: dict[str, Any], at: str | None = None, **sizes: Any) -> Case:
    """A network of transformers with a small configuration.

    Args:
        name: of its class.
        given: what it is called with.
        at: as for `athena.lrp`.
        sizes: of its configuration.
    """
    import transformers

    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes))
    for_tokens = "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name
    return Case(
        model,
        given,
        at,
        (-1, None) if for_tokens else None,
    )


def tokens(length: int = 24, batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 97, (batch, length))}


TEXT = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**TEXT, "intermediate_size": 128}
GROUPED = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {"head_dim": 16}
IMAGES = {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 32, "patch_size": 8, "num_labels": 4}

NETWORKS: dict[str, Callable[[], Case]] = {
    "ResNeXt-50": lambda: of_torchvision("resnext50_32x4d", 48, 48),
    "EfficientNetV2": lambda: of_torchvision("efficientnet_v2_s", 48, 48),
    "RegNet-Y": lambda: of_torchvision("regnet_y_400mf", 48, 48),
    "Swin V2": lambda: of_torchvision("swin_v2_t", 64, 64),
    "MaxViT": lambda: Case(
        torchvision.models.MaxVit(
            (64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, norm_layer=None, mlp_ratio=2, num_classes=10
        ),
        torch.randn(2, 3, 64, 64),
    ),
    "GoogLeNet": lambda: of_torchvision("googlenet", 64, 64, aux_logits=False, init_weights=False),
    "R3D-18": lambda: of_torchvision("r3d_18", 8, 32, 32),
    "U-Net": lambda: Case(UNet(), torch.randn(2, 3, 48, 48), None, of_every_pixel),
    "LSTM text classifier": lambda: Case(Reader(), torch.randint(50, (8, 30)), "embed"),
    "GCN": lambda: Case(Graph(), torch.randn(300, 64)),
    "BERT": lambda: of_transformers(
        "BertForSequenceClassification", tokens(), "bert.embeddings.word_embeddings", **SMALL
    ),
    "DeBERTa-v2": lambda: of_transformers(
        "DebertaV2ForSequenceClassification",
        tokens(),
        "deberta.embeddings.word_embeddings",
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "GPT-2": lambda: of_transformers(
        "GPT2LMHeadModel", tokens(), "transformer.wte", vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64
    ),
    "Llama": lambda: of_transformers("LlamaForCausalLM", tokens(), "model.embed_tokens", **GROUPED),
    "Qwen3": lambda: of_transformers("Qwen3ForCausalLM", tokens(), "model.embed_tokens", **GROUPED, **HEADS),
    "Gemma 3": lambda: of_transformers(
        "Gemma3ForCausalLM", tokens(), "model.embed_tokens", **GROUPED, **HEADS, query_pre_attn_scalar=16
    ),
    "T5": lambda: of_transformers(
        "T5ForConditionalGeneration",
        tokens() | {"decoder_input_ids": tokens(6)["input_ids"]},
        "encoder.embed_tokens",
        **{"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    ),
    "ViT": lambda: of_transformers("ViTForImageClassification", {"pixel_values": torch.randn(4, 3, 32, 32)}, **IMAGES),
    "SigLIP": lambda: siglip(),
    "Wav2Vec2": lambda: of_transformers(
        "Wav2Vec2ForSequenceClassification",
        {"input_values": torch.randn(2, 4000)},
        **{k: v for k, v in SMALL.items() if k != "vocab_size"},
        conv_dim=(32, 32, 32),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_labels=4,
    ),
    "Whisper": lambda: of_transformers(
        "WhisperForConditionalGeneration",
        {"input_features": torch.randn(2, 16, 100), "decoder_input_ids": tokens(6)["input_ids"]},
        vocab_size=100,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=16,
        max_source_positions=50,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "Mamba": lambda: of_transformers(
        "MambaForCausalLM", tokens(12), "backbone.embeddings", vocab_size=100, hidden_size=64, num_hidden_layers=2
    ),
    "Mixtral": lambda: of_transformers(
        "MixtralForCausalLM",
        tokens(),
        "model.embed_tokens",
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
    )._replace(dtype=torch.float32),
}


def siglip() -> Case:
    import transformers

    vision = {k: v for k, v in IMAGES.items() if k != "num_labels"}
    config = transformers.SiglipConfig(text_config=SMALL | {"max_position_embeddings": 64}, vision_config=vision)
    given = {"pixel_values": torch.randn(3, 3, 32, 32), **tokens(16, 4)}
    return Case(transformers.SiglipModel(config), given, None, similarity)


def similarity(output: Any) -> Any:
    """The relevance of each image's similarity to the text that fits it best, and None for all else."""
    logits, texts = output["logits_per_image"].max(1, keepdim=True)
    return {"logits_per_image": torch.zeros_like(output["logits_per_image"]).scatter(1, texts, logits)}


def built(name: str) -> Case:
    """A network, the same each time, with weights that a trained one might have."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    for parameter in case.model.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.data += 0.05 * torch.randn_like(parameter)
    case.model.eval()
    return case


def in_precision(case: Case, dtype: torch.dtype) -> Case:
    """The same network and input in another precision."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    x = {name: cast(value) for name, value in case.x.items()} if isinstance(case.x, dict) else cast(case.x)
    return case._replace(model=case.model.to(dtype), x=x)


def explained(case: Case) -> athena.Relevance:
    return athena.lrp(case.model, case.x, case.target, at=case.at)


def parts(relevance: Any) -> list[Tensor]:
    """The maps, of which there may be several."""
    return [relevance] if isinstance(relevance, Tensor) else list(getattr(relevance, "values", lambda: relevance)())


def accounted(name: str) -> dict[str, Any]:
    """Whether relevance adds up on a network, or what it is refused for."""
    case = built(name)
    case = in_precision(case, case.dtype)
    count = sum(parameter.numel() for parameter in case.model.parameters())
    try:
        found = explained(case)
    except athena.UnsupportedLayer as refusal:
        return {"network": name, "parameters": count, "refused": str(refusal)}
    table = found.conservation()
    start = float(sum(part.sum() for part in parts(found.output) if part is not None))
    came = float(sum(part.sum() for part in parts(found.input)))
    kept = float(table[["bias", "stabiliser"]].to_numpy().sum())
    sizes = [
        float(sum(part.abs().sum() for part in parts(its) if part is not None)) for its in (found.input, found.output)
    ]
    return {
        "network": name,
        "parameters": count,
        "precision": str(case.dtype).removeprefix("torch."),
        "start": start,
        "reaches": came / start,
        "account": abs(start - came - kept) / abs(start),
        "size": sizes[0] / sizes[1],
        "finite": all(bool(part.isfinite().all()) for part in parts(found.input)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=NETWORKS, action="append", help="one of the networks; all by default")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers, such as results/architectures.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for name in chosen.only or NETWORKS:
        rows.append(accounted(name))
        print(json.dumps(rows[-1]), flush=True)
        if chosen.out:
            packages = ("torch", "torchvision", "transformers")
            versions = {package: importlib.metadata.version(package) for package in packages}
            stored = {"versions": versions, "rows": rows}
            chosen.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
