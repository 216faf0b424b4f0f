"""The guide's Python snippet, as a reader pastes it, and what the runners make of the same wish."""

import re

import pytest
import torch
from conftest import BASE, CAUSVID, ROOT
from torch import nn

from dax.quant.nn.dynamic import Linear as QuantizedLinear
from inferix import CausVidPipeline
from inferix.cli.report import common_prefixes, float_linear_names, full_precision_bytes, linear_names
from quantization import quantize_transformer

SNIPPET = """
from dax.quant.quantization.qconfig import get_dynamic_fp8_per_token_act_per_channel_weight_qconfig
from dax.quant.quantization import quantize_dynamic

def quantize_transformer(transformer):
    qconfig_dict = {
        "": get_dynamic_fp8_per_token_act_per_channel_weight_qconfig(),
        "condition_embedder": None,
        "proj_out": None,
    }
    quantize_dynamic(transformer, qconfig_dict)
"""


def readme_snippet() -> str:
    """The same out of the README beside the runners."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "example/quantization/README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "def quantize_transformer" in block)


def pipeline() -> CausVidPipeline:
    made = CausVidPipeline(
        config_path=ROOT / "example/causvid/configs/causvid.yaml",
        default_config_path=None,
        wan_base_model_path=BASE,
        enable_kv_offload=True,
        parallel_config=None,
        device="cpu",
    )
    made.load_checkpoint(CAUSVID)
    return made


def assert_quantized_but_for_the_ends(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Exactly ``condition_embedder`` and ``proj_out`` are ``nn.Linear``; all others hold ``dtype``."""
    plain = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    embedders = ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")
    embedders += ("text_embedder.linear_1", "text_embedder.linear_2")
    assert plain == {"proj_out"} | {f"condition_embedder.{name}" for name in embedders}
    quantized = [module for module in transformer.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 2 * (4 + 4 + 2)  # two blocks: self-attention, cross-attention, feed-forward
    assert all(module.qweight.dtype == dtype and module.qweight.element_size() == 1 for module in quantized)


@pytest.mark.parametrize("snippet", [SNIPPET, readme_snippet()], ids=["guide", "readme"])
def test_snippet(snippet):
    names = {}
    exec(snippet, names)
    made = pipeline()
    names["quantize_transformer"](made.pipeline.generator.model)
    assert_quantized_but_for_the_ends(made.pipeline.generator.model, torch.float8_e4m3fn)


def test_quantizing_before_or_after_moving_to_the_device_is_the_same():
    names = {}
    exec(SNIPPET, names)
    videos = []
    for first in (True, False):
        made = pipeline()
        if first:
            names["quantize_transformer"](made.pipeline.generator.model)
        made.setup_devices()
        if not first:
            names["quantize_transformer"](made.pipeline.generator.model)
        noise = torch.randn(1, 3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
        videos.append(made.pipeline.inference(noise, ["A cat"], generator=torch.Generator().manual_seed(0)))
        assert_quantized_but_for_the_ends(made.pipeline.generator.model, torch.float8_e4m3fn)
    assert torch.equal(*videos)


@pytest.mark.parametrize("quant_type", ["fp8", "int8"])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_runners_quantize_what_they_are_asked_to(quant_type, granularity):
    transformer = pipeline().pipeline.generator.model
    names, size = float_linear_names(transformer), full_precision_bytes(transformer, 4)
    quantize_transformer(transformer, quant_type, granularity)
    assert_quantized_but_for_the_ends(transformer, torch.int8 if quant_type == "int8" else torch.float8_e4m3fn)
    scales = transformer.blocks[0].ffn.net[2].weight_scale.numel()
    assert scales == (96 if granularity == "per_token" else 1)
    assert (linear_names(transformer), full_precision_bytes(transformer, 4)) == (names, size)
    assert common_prefixes(float_linear_names(transformer), names) == ["condition_embedder", "proj_out"]


def test_what_stays_in_high_precision_is_named_as_briefly_as_it_can_be():
    among = ["a.x", "a.y", "b.0.q", "b.0.k", "b.1.q", "b.1.k", "b.10.q", "c"]
    assert common_prefixes(["a.x", "a.y", "b.1.q", "b.1.k", "c"], among) == ["a", "b.1", "c"]
    assert common_prefixes(["b.0.q", "b.10.q"], among) == ["b.0.q", "b.10"]
