"""What only a GPU can show: CUDA graphs, Inductor's settings, 8-bit attention, offload streams, FlashAttention-3."""

import pytest
import torch
from conftest import BASE
from transformers import UMT5Config, UMT5EncoderModel

from dax.quant.quantization import quantize_dynamic
from dax.quant.quantization.qconfig import get_dynamic_fp8_per_token_act_per_channel_weight_qconfig
from inferix.cli.figures import relative_error_and_gain as relative_error
from inferix.config import PipelineConfig
from inferix.models import attention_kernels as kernels
from inferix.models.attention import FP8, Part, attention_by_part, merge_partials, saturating_cast
from inferix.models.config import TransformerConfig
from inferix.models.text_encoder import TextEncoder
from inferix.models.tokenizer import PromptTokenizer
from inferix.models.transformer import CausalWanTransformer
from inferix.pipelines.causal_inference import CausalInferencePipeline
from inferix.runtime.memory import num_bytes
from inferix.runtime.staging import CHUNK_BYTES, move

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CONFIG = TransformerConfig(dim=256, ffn_dim=512, freq_dim=64, text_dim=32, text_len=32, num_heads=2, num_layers=17)
SAMPLER = PipelineConfig(
    (1000, 500), 5.0, local_attn_size=9, sink_size=3, global_sink=True, image_or_video_shape=(1, 9, 16, 16, 16)
)


class RandomBase:
    """The same random weights in every dtype."""

    def __init__(self, device: torch.device):
        self.device = device

    def transformer(self) -> CausalWanTransformer:
        torch.manual_seed(0)
        model = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            if name.endswith("scale_shift_table"):
                weight.normal_(std=0.2)
        return model.bfloat16().to(self.device)

    def text_encoder(self) -> None:
        return None

    vae = text_encoder


def build(device=CUDA, dtype=torch.bfloat16, offload=False, kv_cache_dtype="auto", config=SAMPLER):
    pipeline = CausalInferencePipeline(config, RandomBase(device), device, dtype, enable_kv_offload=offload)
    pipeline.to_device()
    pipeline.set_kv_cache_dtype(kv_cache_dtype)
    return pipeline


@torch.no_grad()
def latents(pipeline, num_frames: int = 18, switch_at: int | None = None) -> torch.Tensor:
    """Return a video's latents, on the CPU, of draws that are the same on every device."""
    generator = torch.Generator().manual_seed(0)
    pipeline.draw = lambda shape, _: torch.randn(tuple(shape), generator=generator).to(pipeline.device, pipeline.dtype)
    noise = pipeline.draw((1, 9, 16, 16, 16), None)
    first, second = (torch.randn(1, 32, 32, generator=generator).to(pipeline.device, pipeline.dtype) for _ in range(2))
    prompts = first
    if switch_at is not None:
        prompts = iter([first if start < switch_at else second for start in range(0, num_frames, 3)])
    blocks = pipeline.denoise(noise, prompts, num_frames=num_frames)
    return torch.cat([block.float().cpu() for block in blocks], dim=1)


@pytest.mark.parametrize("switch_at", [None, 6, 15])
def test_graphs_and_compiled_blocks_compute_what_the_cpu_does(switch_at):
    torch.compiler.reset()
    exact = latents(build(torch.device("cpu"), torch.float32), switch_at=switch_at)
    pipeline = build()
    actual = latents(pipeline, switch_at=switch_at)
    error, gain = relative_error(actual, exact)
    assert error < 0.03 and abs(gain - 1) < 0.01
    captured = []
    for _ in range(2):
        assert torch.equal(latents(pipeline, switch_at=switch_at), actual)
        captured.append(dict(pipeline.kv_cache.graphs.graphs))
    assert captured[0] == captured[1]  # the second prompt was captured: from then on nothing is


def test_new_weights_and_settings_drop_the_graphs():
    pipeline = build()
    before, cache = latents(pipeline, 9), pipeline.kv_cache
    for block in pipeline.generator.model.blocks:
        block.ffn.net[2] = torch.nn.Linear(512, 256).to(CUDA, torch.bfloat16).requires_grad_(False)
    assert not torch.equal(latents(pipeline, 9), before) and pipeline.kv_cache is not cache
    cache = pipeline.kv_cache
    pipeline.generator.model.blocks[0].attn1.qconfig = "changed"
    latents(pipeline, 9)
    assert pipeline.kv_cache is not cache


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_offloaded_cache_changes_not_a_bit(kv_cache_dtype):
    torch.compiler.reset()
    resident, offloaded = (latents(build(offload=offload, kv_cache_dtype=kv_cache_dtype)) for offload in (False, True))
    assert torch.equal(resident, offloaded)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_another_gpu_than_the_first_computes_the_same(kv_cache_dtype):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.compiler.reset()
    try:
        first, second = (latents(build(torch.device("cuda", n), kv_cache_dtype=kv_cache_dtype)) for n in (0, 1))
    finally:
        torch.cuda.set_device(0)
    assert torch.equal(first, second)


@pytest.mark.parametrize("switch_at", [None, 6, 15])
def test_eight_bit_cache_keeps_the_magnitude(switch_at):
    exact = latents(build(torch.device("cpu"), torch.float32), switch_at=switch_at)
    error, gain = relative_error(latents(build(kv_cache_dtype="fp8"), switch_at=switch_at), exact)
    assert error < 0.045 and abs(gain - 1) < 0.01


@pytest.mark.parametrize("mean", [0.5, 2.0])
@pytest.mark.parametrize("heads", [6, 12, 40])
@pytest.mark.parametrize("kernel", ["cudnn", "FlashAttention-3"])
def test_eight_bit_attention(kernel, heads, mean):
    cudnn = kernels.cudnn_fp8_attention if kernels._is_installed("cudnn") else None
    attend = cudnn if kernel == "cudnn" else kernels.flash_attention_3(CUDA, FP8)
    if torch.cuda.get_device_capability() != (9, 0) or attend is None:
        pytest.skip(f"needs a Hopper GPU and {kernel}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4680 * n, heads, 128, device=CUDA) for n in (1, 7, 7))
    v += mean * torch.randn(heads, 128, device=CUDA).sign()
    exact = kernels.aten_efficient_attention(q, k, v)[0].flatten(2)
    parts = [Part(4680 * i, 4680) for i in range(7)]
    means = torch.stack([v[:, p.start : p.start + p.length].mean(1) for p in parts])
    centred = v - means.transpose(0, 1).repeat_interleave(4680, 1)
    partials = attention_by_part(attend, *(saturating_cast(x, FP8) for x in (q, k, centred)), parts, means)
    error, gain = relative_error(merge_partials(partials, torch.bfloat16), exact)
    assert error <= 0.005 and abs(gain - 1) <= 0.005


def test_low_memory_quantizes_before_the_weights_are_on_the_gpu():
    pipeline = CausalInferencePipeline(SAMPLER, RandomBase(torch.device("cpu")), CUDA, torch.bfloat16)
    pipeline.to_device(low_memory=True)
    model, size = pipeline.generator.model, num_bytes(pipeline.generator.model)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantize_dynamic(model, {"": get_dynamic_fp8_per_token_act_per_channel_weight_qconfig()}, device=CUDA)
    assert torch.cuda.max_memory_allocated() - before < 0.75 * size
    assert all(tensor.is_cuda for tensor in model.state_dict().values())
    assert latents(pipeline, 9).isfinite().all()


def test_what_only_has_flash_attentions_name_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("def flash_attn_func(q, k, v, num_splits=1): return q, q[..., 0]")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels, "FLASH_ATTENTION_3", ("flash_attn_interface",))
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    kernels.flash_attention_3.cache_clear()
    with pytest.warns(UserWarning, match="flash_attn_interface is not used"):
        assert kernels.flash_attention_3(CUDA, torch.bfloat16) is None
    kernels.flash_attention_3.cache_clear()


def test_norm_and_quantization_are_one_kernel():
    """A row of 1536 values is read once: what ``inferix.runtime.inductor`` changes in Inductor."""
    from torch._inductor import metrics

    from inferix.runtime.inductor import backend

    def norm_quantize(x):
        y = torch.nn.functional.layer_norm(x.float(), (1536,))
        scale = y.abs().amax(-1, keepdim=True) / 448
        return (y / scale).to(torch.float8_e4m3fn), scale

    x = torch.randn(1560, 1536, device=CUDA, dtype=torch.bfloat16)
    counts = []
    for chosen in (backend(), "inductor"):
        torch.compiler.reset()
        metrics.reset()
        torch.compile(norm_quantize, backend=chosen, dynamic=False)(x)
        counts.append(metrics.generated_kernel_count)
    assert counts[0] == 1 <= counts[1]


def test_text_embeddings_are_those_of_the_cpu():
    """From CUDA graphs, one for single prompts of up to 64 tokens; changed weights are captured anew."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    encoders = [TextEncoder(UMT5EncoderModel(config), PromptTokenizer(BASE / "google/umt5-xxl", 128)) for _ in range(2)]
    encoders[1].model.load_state_dict(encoders[0].model.state_dict())
    encoders[0].to(CUDA, torch.float32)
    batches = [["A red cat"], ["a blue dog that runs, " * 20], ["A red dog"], ["A cat", "another cat in the rain"]]

    def compare():
        for prompts in batches:
            embeds, wanted = (encoder(prompts) for encoder in encoders)
            assert embeds.shape == wanted.shape == (len(prompts), 128, 64)
            torch.testing.assert_close(embeds.cpu(), wanted, rtol=1e-4, atol=1e-4)

    compare()
    compare()
    assert len(encoders[0].graphs.graphs) == 2
    for encoder in encoders:
        for block in encoder.blocks():
            block.layer[0].SelfAttention.q.weight.mul_(1.5)
    compare()


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_weights_are_moved_as_by_to(source):
    """Larger than both buffers together, transposed, tiny, whole numbers, and one that two names share."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.large = torch.nn.Parameter(torch.randn(3 * CHUNK_BYTES // 4 + 5, dtype=source), requires_grad=False)
    model.turned = torch.nn.Parameter(torch.randn(1024, 2048, dtype=source).t(), requires_grad=False)
    model.tiny, model.shared = torch.nn.Linear(3, 2, dtype=source).requires_grad_(False), model.large
    model.register_buffer("numbers", torch.randint(0, 99, (CHUNK_BYTES,)))
    wanted = {name: tensor.to(CUDA, torch.bfloat16) for name, tensor in model.named_parameters()}
    numbers = model.numbers.clone()
    move(model, CUDA, torch.bfloat16)
    assert model.shared is model.large and torch.equal(model.numbers.cpu(), numbers)
    for name, tensor in model.named_parameters():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted[name]), name
