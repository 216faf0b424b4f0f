"""Settings of a pipeline: what is cached follows what is changed, in any order of the calls."""

import signal
import sys

import pytest
import torch
from conftest import BASE, SELF_FORCING, load_runner, small_config
from torch import nn

from dax.quant.nn import dynamic
from dax.quant.quantization import QConfig, quantize_dynamic, set_process_group
from dax.quant.quantization.qconfig import get_default_dynamic_int8_qconfig
from inferix import InputError, SelfForcingPipeline
from inferix.config import load_config
from inferix.models import attention_kernels as kernels
from inferix.models.attention import FP8
from inferix.models.transformer import CausalWanTransformer
from inferix.runtime.cuda_graphs import signature
from quantization import quantize_text_encoder


@pytest.fixture
def pipeline(tmp_path) -> SelfForcingPipeline:
    """The golden model, not set up yet."""
    config = small_config("self_forcing/configs/self_forcing_dmd", tmp_path)
    built = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu")
    built.load_checkpoint(SELF_FORCING, use_ema=True)
    return built


def test_embeddings_follow_the_prompts_and_the_encoder(pipeline):
    pipeline.setup_devices()
    prompts = ["A red cat"]
    first = pipeline.encode_prompts(prompts)
    assert pipeline.encode_prompts(["A red cat"]) is first
    prompts[0] = "A blue dog"
    assert not torch.equal(pipeline.encode_prompts(prompts), first)
    before = pipeline.encode_prompts(["A red cat"])
    quantize_text_encoder(pipeline.pipeline.text_encoder, "int8")
    after = pipeline.encode_prompts(["A red cat"])
    assert torch.equal(before, first) and not torch.equal(after, before)


def test_low_memory_can_be_turned_off_again(pipeline):
    clips = []
    for low_memory in (False, True, False):
        pipeline.setup_devices(low_memory)
        parts = pipeline.pipeline
        assert parts.enable_kv_offload == parts.vae.low_memory == low_memory
        assert parts.kv_cache_dtype == (FP8 if low_memory else torch.float32)
        clips.append(pipeline.generate(["A red cat"], 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(clips[0], clips[2]) and not torch.equal(clips[0], clips[1])


def test_an_error_while_moving_is_raised(pipeline, monkeypatch):
    def fail(*args, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(pipeline.pipeline.text_encoder, "to", fail)
    interval = sys.getswitchinterval()
    with pytest.raises(MemoryError, match="no room"):
        pipeline.setup_devices()
    assert sys.getswitchinterval() == interval


def test_offloading_the_text_encoder_twice_hooks_it_once(pipeline):
    for low_memory in (True, True, False):
        pipeline.setup_devices(low_memory)
        for block in pipeline.pipeline.text_encoder.model.encoder.block:
            assert len(block._forward_hooks) == len(block._forward_pre_hooks) == low_memory


def test_the_caches_dtype_may_be_set_before_the_devices(pipeline):
    pipeline.pipeline.set_kv_cache_dtype("fp8")
    pipeline.setup_devices()
    assert pipeline.pipeline.kv_cache_dtype == FP8
    pipeline.pipeline.set_kv_cache_dtype("auto")
    assert pipeline.pipeline.kv_cache_dtype == torch.float32
    with pytest.raises(InputError, match="auto or fp8, not 'int4'"):
        pipeline.pipeline.set_kv_cache_dtype("int4")


def test_compiling_twice_compiles_once(pipeline):
    model = pipeline.transformer
    assert CausalWanTransformer.compile is nn.Module.compile
    outcomes = []
    for _ in range(2):
        model.compile_repeated_blocks()
        outcomes.append([(block.project_qkv, block.finish) for block in model.blocks])
    assert outcomes[0] == outcomes[1]
    assert all("project_qkv" in vars(block) and "finish" in vars(block) for block in model.blocks)


def test_a_captured_graph_is_of_the_settings_that_it_was_captured_with():
    model = quantize_dynamic(nn.Sequential(nn.Linear(16, 16)), {"": get_default_dynamic_int8_qconfig()})
    captured = signature(model)
    assert signature(model) == captured
    set_process_group(model, "a group")
    shared = signature(model)
    assert shared != captured
    model[0] = dynamic.Linear(16, 16, qconfig=QConfig(torch.int8))
    assert signature(model) != shared


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_kernels_are_those_verified_on_the_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(kernels, "_is_installed", lambda module: module == "cudnn")
    chosen = [kernels.select.__wrapped__(torch.device("cuda"), dtype) for dtype in (torch.bfloat16, FP8)]
    hopper = [kernels.cudnn_attention, kernels.cudnn_fp8_attention]
    assert chosen == (hopper if capability == (9, 0) else [kernels.aten_flash_attention, None])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_sink", '"false"'),
        ("num_frame_per_block", "3.7"),
        ("context_noise", "true"),
        ("denoising_step_list", "[1000, 500.5]"),
    ],
)
def test_values_of_another_type_are_errors(tmp_path, key, value):
    path = small_config("self_forcing/configs/self_forcing_dmd", tmp_path, **{key: value})
    with pytest.raises(InputError, match=key):
        load_config(path)


@pytest.mark.parametrize("name", ["self_forcing", "causvid"])
def test_importing_a_runner_leaves_the_signals_alone(name):
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    load_runner(name)
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
