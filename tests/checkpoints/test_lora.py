"""LoRAs of every published layout give the weights and the video that they give in their own projects.

The golden files are described in tests/golden/README.md, "LoRA files" and "LongLive".
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import BASE, GOLDEN, SELF_FORCING
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferix import InputError, SelfForcingPipeline
from inferix.checkpoints.containers import load_checkpoint, read_transformer
from inferix.checkpoints.files import load_strict
from inferix.checkpoints.lora import merge_lora, read_lora
from inferix.config import load_config
from inferix.models.base_model import WanCheckpoint
from inferix.models.transformer import CausalWanTransformer

CONFIG = GOLDEN / "configs/causal_forcing_chunkwise.yaml"
LONGLIVE = GOLDEN / "LongLive/models"
ADAPTER = {"rank": 8, "alpha": 8}
SAME = ("peft", "peft_metadata", "diffusion_model", "kohya", "lightning")
LINEARS = [f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"] + ["ffn.0", "ffn.2"]


def lora_file(name: str) -> Path:
    return GOLDEN / f"LoRA/{name}.safetensors"


def load(path: Path = SELF_FORCING, use_ema: bool = True) -> CausalWanTransformer:
    model = WanCheckpoint(BASE, transformer_weights=False).transformer()
    load_strict(model, load_checkpoint(path, use_ema).state, path)
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected/lora.safetensors")


@pytest.fixture
def model() -> CausalWanTransformer:
    return load()


def state_of(model: CausalWanTransformer) -> dict[str, Tensor]:
    """What ``model`` holds, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_golden(state: dict[str, Tensor], golden: dict[str, Tensor], prefix: str) -> None:
    """``state`` holds, bit for bit, the first rows that begin with ``prefix``."""
    rows = {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}
    rows = {name: tensor for name, tensor in rows.items() if not name.startswith("lightx2v.")}
    assert len(rows) in (3, 8)
    for name, expected in read_transformer(rows).items():
        assert torch.equal(state[name][: len(expected)], expected), name


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("name", [*SAME, "lightx2v"])
def test_merged_weights_are_the_golden_ones(model, golden, name, strength):
    before = state_of(model)
    changed = merge_lora(model, lora_file(name), strength)
    after = state_of(model)
    assert_golden(after, golden, f"{strength}.")
    if name == "lightx2v":
        assert_golden(after, golden, f"{strength}.lightx2v.")
    assert len(changed) == (25 if name == "lightx2v" else 20)
    differing = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert sorted(differing) == changed


@pytest.mark.parametrize("name", SAME)
def test_latents_are_the_golden_ones(golden, name):
    pipeline = SelfForcingPipeline(CONFIG, wan_base_model_path=BASE, device="cpu", dtype=torch.float32)
    pipeline.load_checkpoint(SELF_FORCING, use_ema=True)
    assert pipeline.load_lora(lora_file(name)) == 20
    pipeline.setup_devices()
    generator = torch.Generator().manual_seed(144)
    noise = torch.randn(golden["noise"].shape, generator=generator)
    assert torch.equal(noise, golden["noise"])
    prompts = ["A red cat walks on the moon"]
    _, latents = pipeline.pipeline.inference(noise, prompts, generator=generator, return_latents=True)
    torch.testing.assert_close(latents, golden["latents"], rtol=0, atol=1e-3)


def test_longlive(golden):
    model = load(LONGLIVE / "longlive_base.pt")
    assert len(merge_lora(model, LONGLIVE / "lora.pt", adapter=ADAPTER)) == 20
    expected = read_transformer(load_file(GOLDEN / "expected/longlive_merged.safetensors"))
    assert len(expected) == 4
    for name, tensor in expected.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_a_pipelines_config_says_rank_and_alpha(tmp_path):
    config = tmp_path / "longlive.yaml"
    config.write_text((GOLDEN / "configs/longlive.yaml").read_text().replace("alpha: 8", "alpha: 16"))
    pipeline = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu")
    pipeline.load_checkpoint(LONGLIVE / "longlive_base.pt")
    assert pipeline.load_lora(LONGLIVE / "lora.pt") == 20
    expected = load(LONGLIVE / "longlive_base.pt")
    merge_lora(expected, LONGLIVE / "lora.pt", strength=2.0, adapter=ADAPTER)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(pipeline.pipeline.generator.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("adapter", ["lora", "[1, 2]", "{alpha: many}", "{rank: -8, alpha: 8}"])
def test_an_adapter_that_is_none(tmp_path, adapter):
    config = tmp_path / "odd.yaml"
    config.write_text(f"{CONFIG.read_text()}\nadapter: {adapter}\n")
    with pytest.raises(InputError, match="odd.yaml has a wrong value"):
        load_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole_file", [True, False])
def test_longlives_lora_with_and_without_a_key_around_it(tmp_path, dtype, whole_file):
    pairs = torch.load(LONGLIVE / "lora.pt", weights_only=True)["generator_lora"]
    pairs = {name: tensor.to(dtype) for name, tensor in pairs.items()}
    torch.save({"generator_lora": pairs, "step": "3000"} if whole_file else pairs, tmp_path / "lora.pt")
    model, expected = (load(LONGLIVE / "longlive_base.pt") for _ in range(2))
    merge_lora(model, tmp_path / "lora.pt", adapter=ADAPTER)
    merge_lora(expected, LONGLIVE / "lora.pt", adapter=ADAPTER)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("adapter", "factor"),
    [
        (None, 1.0),
        ({"rank": 2, "alpha": 6}, 3.0),
        ({"alpha": 6}, 3.0),
        ({"rank": 2}, 1.0),
        ({"rank": 256, "alpha": 512}, 1.0),  # of another LoRA
    ],
)
def test_a_file_without_alpha_takes_the_configs(model, adapter, factor):
    before = state_of(model)
    merge_lora(model, lora_file("diffusion_model"), adapter=adapter)
    pair = load_file(lora_file("diffusion_model"))
    a, b = (pair[f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight"].float() for half in "AB")
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(model.state_dict()[name], before[name] + factor * (b @ a), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["peft_metadata", "kohya", "lightning"])
def test_a_file_with_alpha_does_not(model, golden, name):
    merge_lora(model, lora_file(name), adapter={"rank": 2, "alpha": 6})
    assert_golden(state_of(model), golden, "1.0.")


def pairs() -> dict[str, Tensor]:
    """A LoRA's tensors by Wan's module names and "A" or "B"."""
    file = load_file(lora_file("diffusion_model"))
    return {
        name.removeprefix("diffusion_model.").replace(".lora_", " ")[: -len(".weight")]: t for name, t in file.items()
    }


@pytest.mark.parametrize(
    "layout",
    [
        "{}.lora_{}.weight",
        "model.{}.lora_{}.weight",
        "unet.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.model.{}.lora_{}.weight",
        "diffusion_model.{}.lora_{}.default.weight",
        "{}_lora.{}.weight",
        "diffusion_model.{}.lora.{}.weight",
    ],
)
def test_layouts_without_a_golden_file(model, golden, tmp_path, layout):
    halves = {"A": "down", "B": "up"} if "lora." in layout else {"A": "A", "B": "B"}
    tensors = {layout.format(*[(m, halves[half]) for m, half in [key.split()]][0]): t for key, t in pairs().items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert len(merge_lora(model, tmp_path / "lora.safetensors")) == 20
    assert_golden(state_of(model), golden, "1.0.")


def test_kohyas_names_of_modules_that_have_underscores(model, tmp_path):
    """Among them some in which no underscore is a dot."""
    names = {
        "time_projection_1": "condition_embedder.time_proj",
        "text_embedding_0": "condition_embedder.text_embedder.linear_1",
        "head_head": "proj_out",
        "blocks_1_cross_attn_o": "blocks.1.attn2.to_out.0",
        "blocks_0_attn1_to_q": "blocks.0.attn1.to_q",  # diffusers' names
    }
    for wan, module in names.items():
        rows, columns = model.get_submodule(module).weight.shape
        tensors = {"lora_down.weight": torch.ones(1, columns), "lora_up.weight": torch.ones(rows, 1)}
        save_file({f"lora_unet_{wan}.{end}": t for end, t in tensors.items()}, tmp_path / "lora.safetensors")
        before = model.get_submodule(module).weight.clone()
        assert merge_lora(model, tmp_path / "lora.safetensors") == [module]
        assert torch.equal(model.get_submodule(module).weight, before + 1)


def test_the_patch_convolution(model, tmp_path):
    shape = model.patch_embedding.weight.shape
    tensors = {"lora_A.weight": torch.ones(2, *shape[1:]), "lora_B.weight": torch.ones(shape[0], 2, 1, 1, 1)}
    save_file({f"patch_embedding.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    before = model.patch_embedding.weight.clone()
    merge_lora(model, tmp_path / "x.safetensors")
    assert torch.equal(model.patch_embedding.weight, before + 2)


def with_metadata(folder: Path, settings: dict) -> Path:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_file(load_file(lora_file("peft")), folder / "lora.safetensors", metadata)
    return folder / "lora.safetensors"


@pytest.mark.parametrize(
    ("settings", "scale", "others"),
    [
        ({"r": 2, "lora_alpha": 4}, 2.0, 2.0),
        ({"r": 8, "lora_alpha": 4, "rank_pattern": {"blocks.0.attn1.to_q": 2}}, 2.0, 2.0),  # the file's rank is 2
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"blocks.0.attn1.to_q": 1}}, 0.5, 2.0),
        ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"^blocks\\.0\\.attn1\\.to_q$": 1}}, 0.5, 2.0),
        ({"r": 2, "alpha_pattern": {"0.attn1.to_q": 1}}, 0.5, None),
        ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 4 / 2**0.5, 4 / 2**0.5),
    ],
)
def test_settings_in_the_metadata(tmp_path, settings, scale, others):
    scales = {update.parameter: update.scale for update in read_lora(with_metadata(tmp_path, settings))}
    assert scales.pop("blocks.0.attn1.to_q.weight") == scale
    assert set(scales.values()) == {others}


def test_a_folder_of_peft(tmp_path):
    save_file(load_file(lora_file("peft")), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "use_dora": False}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert {update.scale for update in read_lora(path)} == {2.0}


def test_several_are_added_one_after_the_other(model, golden):
    for name in ("peft", "kohya"):
        merge_lora(model, lora_file(name), 0.5)
    for name, expected in read_transformer({k[4:]: v for k, v in golden.items() if k[:9] == "1.0.block"}).items():
        torch.testing.assert_close(model.state_dict()[name][: len(expected)], expected, rtol=0, atol=1e-6)


def test_sums_are_in_float32_and_rounded_once(golden):
    model = load().to(torch.bfloat16)
    before = state_of(model)
    merge_lora(model, lora_file("lightx2v"), 0.75)
    pair = load_file(lora_file("lightx2v"))
    a, b = (pair[f"diffusion_model.blocks.1.ffn.0.lora_{half}.weight"].float() for half in ("down", "up"))
    name = "blocks.1.ffn.net.0.proj.weight"
    merged = model.state_dict()[name]
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, (before[name].float() + 0.75 * (b @ a)).bfloat16())


def test_the_checkpoints_file_stays_as_it_is(tmp_path):
    """Weights are mapped from it. Those that the LoRA does not change still are."""
    path = tmp_path / "x.safetensors"
    save_file(load_file(BASE / "diffusion_pytorch_model.safetensors"), path)
    content = path.read_bytes()
    model = load(path)
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    changed = merge_lora(model, lora_file("lightx2v"))
    moved = {name for name, tensor in model.state_dict().items() if tensor.data_ptr() != places[name]}
    assert len(moved) == 28 and {name.rpartition(".")[0] for name in moved} == set(changed)
    assert path.read_bytes() == content


def test_weights_that_a_lora_changed_are_no_longer_those_of_an_8_bit_file(tmp_path):
    pipeline = SelfForcingPipeline(CONFIG, wan_base_model_path=BASE, device="cpu", dtype=torch.float32)
    pipeline.load_checkpoint(GOLDEN / "containers/lightx2v_fp8.safetensors")
    one = {name: t for name, t in load_file(lora_file("peft")).items() if ".0.attn1.to_q." in name}
    save_file(one, tmp_path / "one.safetensors")
    assert pipeline.load_lora(tmp_path / "one.safetensors") == 1
    assert len(pipeline.quantized_weights) == 19 and "blocks.0.attn1.to_q" not in pipeline.quantized_weights


def test_unmatched_golden_file(model):
    with pytest.raises(InputError, match="blocks.7.self_attn.q"):
        merge_lora(model, lora_file("unmatched"))
