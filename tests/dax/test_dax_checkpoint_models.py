"""Saved 8-bit models of other people's making: tied weights, buffers that are not saved, metadata, diffusers' own."""

import hashlib
import json

import pytest
import torch
from dax_layers import FP8_TOKEN, INT8_TOKEN, both_types, no_grad, seed  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dax.quant.nn import dynamic
from dax.quant.quantization import (
    QConfig,
    load_quantized,
    lookup,
    quantize_dynamic,
    read_metadata,
    read_qconfig_dict,
    save_quantized,
)

# --- tied weights, modules used twice


class Language(nn.Module):
    """An embedding tied to the head, a layer under two names, and two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.once = nn.Linear(16, 16)
        self.layers = nn.ModuleList([self.once, nn.Linear(16, 16), nn.Linear(16, 16)])
        self.layers[2].weight = self.layers[1].weight
        self.norm = nn.LayerNorm(16)
        self.norm_again = self.norm
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.once(self.embedding(tokens)))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm_again(x))


def assert_tied(model: Language) -> None:
    assert model.head.weight is model.embedding.weight and model.once is model.layers[0]
    assert model.layers[1].qweight.data_ptr() == model.layers[2].qweight.data_ptr()
    assert model.layers[1].bias is not model.layers[2].bias and model.norm is model.norm_again


@both_types
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_tied_is_saved_once_and_tied_again(tmp_path, qconfig, device):
    model = quantize_dynamic(Language(), {"": qconfig, "head": None})
    tokens = torch.arange(11)
    expected = model(tokens)
    save_quantized(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("head.weight" in names) + ("embedding.weight" in names) == 1
    assert ("once.qweight" in names) + ("layers.0.qweight" in names) == 1
    assert ("layers.1.qweight" in names) + ("layers.2.qweight" in names) == 1
    with torch.device(device):
        fresh = Language()
    loaded = load_quantized(fresh, tmp_path)
    assert_tied(loaded)
    assert loaded(tokens).equal(expected)
    save_quantized(loaded, tmp_path)  # and again, from the tied one
    assert load_file(tmp_path / "model.safetensors").keys() == names


def test_the_file_ties_what_the_model_ties_only_later(tmp_path):
    save_quantized(quantize_dynamic(Language(), {"": FP8_TOKEN, "head": None}), tmp_path)
    loose = Language()
    loose.head.weight = nn.Parameter(torch.zeros(11, 16))
    loaded = load_quantized(loose, tmp_path)
    assert loaded.head.weight is loaded.embedding.weight


def test_a_model_that_ties_what_differs_in_the_file_is_refused(tmp_path):
    loose = quantize_dynamic(Language(), {"": FP8_TOKEN, "head": None})
    loose.head.weight = nn.Parameter(torch.randn(11, 16))
    save_quantized(loose, tmp_path)
    tied = Language()
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are tied"):
        load_quantized(tied, tmp_path)
    assert type(tied.once) is nn.Linear


def test_tensors_that_overlap_are_saved_apart(tmp_path):
    model = quantize_dynamic(nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)}), {"": INT8_TOKEN})
    both = torch.arange(6.0)
    model["a"].bias, model["b"].bias = nn.Parameter(both[:4]), nn.Parameter(both[2:])
    save_quantized(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["a.bias"].tolist() == [0, 1, 2, 3] and saved["b.bias"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "tied", ["[]", "nonsense", '{"x": "nowhere"}', '{"head.weight": 3}', '{"once.bias": "norm.bias"}']
)
def test_a_header_that_ties_nonsense_is_refused(tmp_path, tied):
    save_quantized(quantize_dynamic(Language(), {"": FP8_TOKEN, "head": None}), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, header | {"tied": tied})
    with pytest.raises(ValueError, match="save it again"):
        load_quantized(Language(), tmp_path)


@pytest.mark.parametrize("kind", ["meta", "no tensor"])
def test_what_cannot_be_saved_is_named(tmp_path, kind):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return 3

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": Counting(8, 8) if kind == "no tensor" else nn.LayerNorm(8)})
    if kind == "meta":
        model["b"].to("meta")
    quantize_dynamic(model, {"a": FP8_TOKEN})
    with pytest.raises(ValueError, match=r"b\.(weight is on the meta device|_extra_state is no tensor)"):
        save_quantized(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- buffers that a state dict leaves out


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(8.0) ** 2, persistent=False)
        self.register_buffer("unused", None, persistent=False)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.table)


def test_buffers_that_are_not_persistent_are_loaded_into_a_model_on_meta(tmp_path):
    model = quantize_dynamic(nn.Sequential(Positions()), {"": INT8_TOKEN})
    save_quantized(model, tmp_path)
    x = torch.randn(3, 8)
    with torch.device("meta"):
        fresh = nn.Sequential(Positions())
    loaded = load_quantized(fresh, tmp_path)
    assert loaded(x).equal(model(x)) and "0.table" not in loaded.state_dict()
    other = nn.Sequential(Positions())
    other[0].table *= 2
    assert load_quantized(other, tmp_path)[0].table.equal(2 * model[0].table)  # what the constructor made stays


def test_a_folder_without_them_is_refused_by_name_and_the_model_stays_as_it_was(tmp_path):
    save_quantized(quantize_dynamic(nn.Sequential(Positions()), {"": INT8_TOKEN}), tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    old = {name: tensor.clone() for name, tensor in load_file(path).items() if name != "0.table"}
    save_file(old, path, header)
    with torch.device("meta"):
        fresh = nn.Sequential(Positions())
    with pytest.raises(ValueError, match=r"lacks the buffers 0\.table"):
        load_quantized(fresh, tmp_path)
    assert type(fresh[0].linear) is nn.Linear
    x = torch.randn(3, 8)
    assert load_quantized(nn.Sequential(Positions()), tmp_path)(x).isfinite().all()


@both_types
def test_the_readmes_recipe_on_diffusers_wan_transformer(tmp_path, qconfig):
    from diffusers import WanTransformer3DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    model = WanTransformer3DModel(**sizes).eval()
    quantize_dynamic(model, {"": qconfig, "condition_embedder": None, "proj_out": None})
    arguments = {
        "hidden_states": torch.randn(1, 16, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "return_dict": False,
    }
    (expected,) = model(**arguments)
    save_quantized(model, tmp_path, metadata={"family": "wan"})

    with torch.device("meta"):
        fresh = WanTransformer3DModel(**sizes).eval()
    loaded = load_quantized(fresh, tmp_path)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert isinstance(loaded.blocks[1].attn1.to_q, dynamic.Linear)
    (result,) = loaded(**arguments)
    assert result.equal(expected)


# --- what a folder says of itself


def test_metadata_is_saved_and_read_and_covered_by_the_hash(tmp_path):
    metadata = {"family": "self_forcing", "checkpoint_sha256": "00ff", "größe": "1.3B"}
    model = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {"": FP8_TOKEN})
    save_quantized(model, tmp_path, metadata)
    assert read_metadata(tmp_path) == read_metadata(str(tmp_path)) == metadata
    content = json.loads((tmp_path / "qconfig.json").read_text())
    assert read_qconfig_dict(content) == {"": FP8_TOKEN}  # the file still is a qconfig_dict
    x = torch.randn(3, 8)
    assert load_quantized(nn.Sequential(nn.Linear(8, 8)), tmp_path)(x).equal(model(x))
    content["__metadata__"]["family"] = "causvid"
    (tmp_path / "qconfig.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        read_metadata(tmp_path)


def test_folders_without_metadata(tmp_path):
    model = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {"": FP8_TOKEN})
    save_quantized(model, tmp_path)
    assert read_metadata(tmp_path) == {}
    # what earlier versions wrote: the fields, and their hash in the header
    text = json.dumps({"": FP8_TOKEN.to_dict()}).encode()
    (tmp_path / "qconfig.json").write_bytes(text)
    header = {"qconfig_sha256": hashlib.sha256(text).hexdigest()}
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", header)
    assert read_metadata(tmp_path) == {}
    x = torch.randn(3, 8)
    assert load_quantized(nn.Sequential(nn.Linear(8, 8)), tmp_path)(x).equal(model(x))
    with pytest.raises(ValueError, match="is no saved 8-bit model"):
        read_metadata(tmp_path / "nowhere")


@pytest.mark.parametrize("metadata", [{"seed": 3}, {3: "seed"}, ["family"], "family"], ids=str)
def test_metadata_that_is_no_text_is_refused(tmp_path, metadata):
    model = quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {"": FP8_TOKEN})
    with pytest.raises(ValueError, match="text to text"):
        save_quantized(model, tmp_path / "new", metadata)
    assert not (tmp_path / "new").exists()


def test_the_saved_settings_are_read_by_the_one_rule_for_keys(tmp_path):
    """`net.0` names a layer of its own and the last part of another: a short description would say too much."""
    kinds = {"net.0": QConfig(), "blocks.0.net.0": QConfig(torch.int8), "blocks.1": None}
    model = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(8, 8)])})
    block = nn.ModuleDict({"net": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])})
    model["blocks"] = nn.ModuleList([block, nn.Linear(8, 8)])
    quantize_dynamic(model, {**kinds, "blocks.0": QConfig(torch.int8)})
    save_quantized(model, tmp_path)
    saved = read_qconfig_dict(json.loads((tmp_path / "qconfig.json").read_text()))
    for name, module in model.named_modules():
        if isinstance(module, dynamic.Linear | nn.Linear):
            assert lookup(name, saved) == getattr(module, "qconfig", None)


def test_a_layer_without_bias_keeps_the_float_type_of_its_model(tmp_path):
    model = nn.ModuleDict({"first": nn.LayerNorm(8), "second": nn.Linear(8, 8, dtype=torch.bfloat16)})
    save_quantized(quantize_dynamic(model, {"": FP8_TOKEN}), tmp_path)
    fresh = nn.ModuleDict({"first": nn.LayerNorm(8), "second": nn.Linear(8, 8)}).to("meta")
    assert load_quantized(fresh, tmp_path)["second"].dtype == torch.bfloat16
