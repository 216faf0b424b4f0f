"""The UMT5 prompt encoder of transformers, loaded from Wan's original file and tokenizer folder."""

import html
import re
from collections.abc import Iterator
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from inferix.checkpoints.files import StateDict, load_pickle, load_sharded_safetensors, load_strict
from inferix.checkpoints.json_files import load_json
from inferix.checkpoints.keys import substitute
from inferix.errors import InputError
from inferix.models.tokenizer import PromptTokenizer
from inferix.runtime.cuda_graphs import CUDAGraphs
from inferix.runtime.on_demand import OnDemandOffload
from inferix.runtime.staging import move

LENGTH_STEP = 64
"""Prompts are computed in a multiple of so many tokens: few CUDA graphs serve all lengths."""
RENAMES = {
    r"^token_embedding\.": "shared.",
    r"^norm\.": "encoder.final_layer_norm.",
    r"^blocks\.(\d+)\.norm1\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"^blocks\.(\d+)\.norm2\.": r"encoder.block.\1.layer.1.layer_norm.",
    r"^blocks\.(\d+)\.attn\.": r"encoder.block.\1.layer.0.SelfAttention.",
    r"^blocks\.(\d+)\.pos_embedding\.embedding\.": r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    r"^blocks\.(\d+)\.ffn\.gate\.0\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.",
    r"^blocks\.(\d+)\.ffn\.fc1\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.",
    r"^blocks\.(\d+)\.ffn\.fc2\.": r"encoder.block.\1.layer.1.DenseReluDense.wo.",
}
"""From Wan's key names to those of ``transformers.UMT5EncoderModel``."""


def convert_umt5_to_transformers(state: StateDict) -> StateDict:
    """Rename Wan's UMT5 encoder weights; keys that match nothing stay as they are."""
    return {substitute(key, RENAMES): tensor for key, tensor in state.items()}


def umt5_config(state: StateDict) -> UMT5Config:
    """Return the config inferred from the tensors (original names); the file has none."""
    try:
        vocab_size, d_model = state["token_embedding.weight"].shape
        num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        return UMT5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=state["blocks.0.attn.q.weight"].shape[0] // num_heads,
            d_ff=state["blocks.0.ffn.fc1.weight"].shape[0],
            num_layers=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            num_heads=num_heads,
            relative_attention_num_buckets=num_buckets,
            feed_forward_proj="gated-gelu",
        )
    except (KeyError, AttributeError, ValueError, ZeroDivisionError):
        raise InputError("the text encoder file does not hold a UMT5 encoder; download it again") from None


def clean(prompt: str) -> str:
    """Fix broken Unicode and HTML entities and collapse white space, as Wan does before tokenizing."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


def build_umt5(config: UMT5Config, state: StateDict, source: Path) -> UMT5EncoderModel:
    """Return an encoder with the tensors of ``state`` (transformers' names). Raises InputError where they do not fit."""
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    if "shared.weight" in state:  # what files store once has two names in the model
        state = state | {"encoder.embed_tokens.weight": state["shared.weight"]}
    load_strict(model, state, source)
    model.tie_weights()
    return model


class TextEncoder:
    """Encodes prompts to ``text_len`` embeddings each, zero where the prompt is padded."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: PromptTokenizer):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.text_len = tokenizer, tokenizer.text_len
        self.device = torch.device("cpu")
        self.offloads: list[OnDemandOffload] = []
        self.graphs: CUDAGraphs | None = None
        self.version = 0
        """Increased whenever the weights may have changed: embeddings cached under another version are out of date."""

    @classmethod
    def from_files(cls, weights: Path, tokenizer: Path, text_len: int) -> "TextEncoder":
        """Load ``models_t5_umt5-xxl-enc-bf16.pth``, of any size, and a tokenizer folder."""
        prompt_tokenizer = PromptTokenizer(tokenizer, text_len)  # first: its process works beside the rest
        state = load_pickle(weights)
        model = build_umt5(umt5_config(state), convert_umt5_to_transformers(state), weights)
        return cls(model, prompt_tokenizer)

    @classmethod
    def from_diffusers(cls, folder: Path, text_len: int) -> "TextEncoder":
        """Load the folders ``text_encoder`` and ``tokenizer`` in ``folder``."""
        prompt_tokenizer = PromptTokenizer(folder / "tokenizer", text_len)
        source = folder / "text_encoder"
        config = UMT5Config.from_dict(load_json(source / "config.json"))
        model = build_umt5(config, load_sharded_safetensors(source, "model"), source)
        return cls(model, prompt_tokenizer)

    def to(self, device: torch.device, dtype: torch.dtype, on_demand: bool = False) -> "TextEncoder":
        """Run on ``device``; with ``on_demand`` weights stay in host memory and are copied block by block when used.

        Raises InputError where the tokenizer's file is damaged.
        """
        self.device = device
        self.version += 1
        for offload in self.offloads:
            offload.remove()
        move(self.model, torch.device("cpu") if on_demand else device, dtype)
        if on_demand:
            self.model.encoder.final_layer_norm.to(device)
        self.offloads = [OnDemandOffload(block, device) for block in self.model.encoder.block] if on_demand else []
        self.graphs = None
        if device.type == "cuda" and not on_demand:
            self.graphs = CUDAGraphs()
            self.warm_up()
        self.tokenizer.wait()
        return self

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compute something, so that the GPU's kernels are loaded: half a second, for most of which other threads can run."""
        mask = (torch.arange(LENGTH_STEP, device=self.device) < LENGTH_STEP // 2).long()[None]
        self._encode(self.model.shared.weight.new_zeros(1, LENGTH_STEP, self.model.config.d_model), mask)

    def blocks(self) -> Iterator[nn.Module]:
        """Yield every block, moved to the device, to be modified; it is moved back when the next one is requested."""
        self.version += 1
        if self.graphs is not None:
            self.graphs = CUDAGraphs()
        for block in self.model.encoder.block:
            home = next(block.parameters()).device
            yield block.to(self.device)
            block.to(home)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of ``prompt`` that the tokenizer has no token for."""
        unknown = self.tokenizer.token_to_id("<unk>")
        words = re.findall(r"\w+", clean(prompt))
        return [word for word in words if unknown in self.tokenizer.encode(word)]

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return token ids, zero where there are none, and attention mask, each [B, text_len]."""
        ids, mask = torch.zeros(2, len(prompts), self.text_len, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor(self.tokenizer.encode(clean(prompt)))
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Return embeddings [B, text_len, text_dim].

        On a GPU a single prompt is computed by a CUDA graph; one of more prompts would keep more memory.
        """
        ids, mask = self.tokenize(prompts)
        length = -(-int(mask.sum(1).max()) // LENGTH_STEP) * LENGTH_STEP  # the rest is padding, which nothing sees
        ids, mask = ids[:, :length], mask[:, :length]
        table = self.model.shared.weight
        words = F.embedding(ids.to(table.device), table).to(self.device)
        inputs = words, mask.to(self.device)
        if self.graphs is None or len(prompts) > 1:
            embeds = self._encode(*inputs)
        else:
            embeds = self.graphs(length, length, self._encode, *inputs)
        return F.pad(embeds, (0, 0, 0, self.text_len - embeds.shape[1]))

    def _encode(self, words: Tensor, mask: Tensor) -> Tensor:
        embeds = self.model(inputs_embeds=words, attention_mask=mask).last_hidden_state
        return embeds * mask[..., None].to(embeds.dtype)
