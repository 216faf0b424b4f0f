"""A LoRA that does not fit is refused with a line that names what is wrong, and the model stays as it was."""

import json

import pytest
import torch
from conftest import BASE, GOLDEN, SELF_FORCING
from safetensors.torch import load_file, save_file

from dax.quant.quantization import quantize_dynamic
from dax.quant.quantization.qconfig import get_default_dynamic_int8_qconfig
from inferix import InputError
from inferix.checkpoints.containers import load_checkpoint
from inferix.checkpoints.files import load_strict
from inferix.checkpoints.lora import merge_lora
from inferix.models.base_model import WanCheckpoint
from inferix.models.transformer import CausalWanTransformer

KOHYA = GOLDEN / "LoRA/kohya.safetensors"
Q = "lora_unet_blocks_0_self_attn_q"
DOWN, UP, ALPHA = f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", f"{Q}.alpha"


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer:
    model = WanCheckpoint(BASE, transformer_weights=False).transformer()
    load_strict(model, load_checkpoint(SELF_FORCING, use_ema=True).state, SELF_FORCING)
    return model


@pytest.fixture
def refused(model):
    """Gives the line that merging a file is refused with."""

    def refusal(path, **options) -> str:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(InputError) as error:
            merge_lora(model, path, **options)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        message = str(error.value)
        assert "\n" not in message and str(path) in message
        return message

    return refusal


@pytest.mark.parametrize(
    ("removed", "added", "complaint"),
    [
        ([], {"lora_unet_blocks_7_ffn_0.lora_down.weight": (2, 96), "lora_unet_blocks_7_ffn_0.lora_up.weight": (192, 2)},
         "1 of 21 parts match nothing in this model, such as lora_unet_blocks_7_ffn_0"),
        ([UP], {}, f"{Q} has the 'down' half of its pair and not 'up'"),
        ([DOWN], {}, f"{Q} has the 'up' half of its pair and not 'down'"),
        ([DOWN, UP], {}, f"{Q}.alpha is not the alpha of a pair"),
        ([], {DOWN: (2, 5120)}, f"{Q} does not fit ([2, 5120] and [96, 2] for a parameter of [96, 96])"),
        ([], {DOWN: (4, 96)}, f"{Q} does not fit"),
        ([], {UP: (5120, 2)}, f"{Q} does not fit"),
        ([], {UP: (96,)}, f"the pair of {Q} is not two matrices"),
        ([], {DOWN: (0, 96), UP: (96, 0)}, f"the pair of {Q} is not two matrices"),
        ([], {ALPHA: (2,)}, f"{Q}.alpha is not the alpha"),
        ([], {"diffusion_model.head.diff_m": (1, 6, 96)}, "diffusion_model.head does not fit ([1, 6, 96]"),
        ([], {"diffusion_model.blocks.0.self_attn.q.diff": (96,)}, "self_attn.q does not fit ([96]"),
        ([], {"diffusion_model.blocks.0.norm1.diff": (96,)}, "such as diffusion_model.blocks.0.norm1"),
        ([], {"diffusion_model.blocks.0.norm2.diff": (96,)}, "such as diffusion_model.blocks.0.norm2"),
        ([], {f"{Q}.dora_scale": (96, 1)}, f"no plain LoRA ({Q}.dora_scale)"),
        ([], {f"{Q}.hada_w1_a": (96, 2)}, "no plain LoRA"),
        ([], {f"{Q}.lora_C.weight": (96, 2)}, f"what {Q}.lora_C.weight stands for is not known"),
        ([], {f"{Q}.lora_A.weight": (2, 96)}, f"the 'down' of {Q} twice"),
        ([], {"lora_te_text_model.lora_down.weight": (2, 8), "lora_te_text_model.lora_up.weight": (8, 2)},
         "such as lora_te_text_model"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(refused, tmp_path, removed, added, complaint):
    tensors = {name: tensor for name, tensor in load_file(KOHYA).items() if name not in removed}
    tensors |= {name: torch.ones(shape) for name, shape in added.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert complaint in refused(tmp_path / "lora.safetensors")


def test_numbers_that_are_none(refused, tmp_path):
    save_file(load_file(KOHYA) | {DOWN: torch.full((2, 96), torch.nan)}, tmp_path / "nan.safetensors")
    assert f"{DOWN} holds a NaN" in refused(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "lora_adapter_metadata"),
        ("[1]", "lora_adapter_metadata"),
        (json.dumps({"transformer.use_dora": True}), "use_dora"),
        (json.dumps({"transformer.lora_alpha": "one"}), "is no number"),
        (json.dumps({"transformer.alpha_pattern": [1]}), "alpha_pattern"),
        (json.dumps({"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"blocks.*": 2}}), "'blocks.*'"),
    ],
)
def test_metadata_that_cannot_be_followed(refused, tmp_path, text, complaint):
    path = tmp_path / "lora.safetensors"
    save_file(load_file(GOLDEN / "LoRA/peft.safetensors"), path, {"lora_adapter_metadata": text})
    assert complaint in refused(path)


def test_files_that_are_no_lora(refused, tmp_path):
    assert "not found" in refused(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert "empty" in refused(tmp_path / "empty.safetensors")
    (tmp_path / "half.safetensors").write_bytes(KOHYA.read_bytes()[:-1000])
    assert "truncated" in refused(tmp_path / "half.safetensors")
    assert "does not hold the tensors of a LoRA" in refused(SELF_FORCING)
    assert "is no LoRA" in refused(BASE / "diffusion_pytorch_model.safetensors")
    torch.save({"generator_lora": {}}, tmp_path / "nothing.pt")
    assert "does not hold the tensors of a LoRA" in refused(tmp_path / "nothing.pt")
    assert "adapter_model.safetensors not found" in refused(tmp_path)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number(refused, strength):
    assert "strength" in refused(KOHYA, strength=strength)


def test_a_model_that_is_quantized_or_empty():
    with torch.device("meta"):
        empty = WanCheckpoint(BASE, transformer_weights=False).transformer()
    with pytest.raises(InputError, match="load a checkpoint first"):
        merge_lora(empty, KOHYA)
    quantized = quantize_dynamic(WanCheckpoint(BASE).transformer(), {"blocks": get_default_dynamic_int8_qconfig()})
    with pytest.raises(InputError, match="comes before quantization"):
        merge_lora(quantized, KOHYA)
