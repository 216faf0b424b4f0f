"""Our VAE decoder computes what diffusers' does, whole, in pieces, in any precision, for one clip after the other."""

import gc
import inspect
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from triton_targets import SHARED_MEMORY, compile_for, interpreted_module

from inferix.errors import InputError
from inferix.models import vae, vae_decoder
from inferix.models.clip_decoder import FeatCache
from inferix.models.vae import BASE_DIM, LATENTS_MEAN, LATENTS_STD, StreamingDecoder, WanVAE
from inferix.models.vae_decoder import VAEDecoder
from inferix.runtime.memory import num_parameters


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def library_model(base_dim: int = 8) -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith("gamma"):
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def decoder_of(model: AutoencoderKLWan) -> VAEDecoder:
    return VAEDecoder(model.state_dict())


def wan_vae(model: AutoencoderKLWan) -> WanVAE:
    return WanVAE(model.state_dict(), dict(model.config))


def library_decode(model: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents [B, F, 16, h, w], not normalised, to [B, T, 3, H, W] in [0, 1]."""
    return model.decode(latents.transpose(1, 2)).sample.transpose(1, 2).float() * 0.5 + 0.5


def in_pieces(decoder: VAEDecoder, latents: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    clip = FeatCache()
    return [decoder(piece, clip) for piece in latents.split(lengths, dim=1)]


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("base_dim", "batch", "lengths", "size"),
    [(8, 1, (3, 3, 1), (4, 6)), (8, 2, (1, 2, 3), (3, 5)), (8, 1, (4, 1, 1, 2), (4, 4)), (12, 1, (1, 1, 1), (2, 2))],
)
def test_like_the_library(base_dim, batch, lengths, size):
    model = library_model(base_dim)
    latents = torch.randn(batch, sum(lengths), 16, *size)
    wanted, decoder = library_decode(model, latents), decoder_of(model)
    assert wanted.std() > 0.05
    assert_same(decoder(latents, FeatCache()), wanted)
    pieces = in_pieces(decoder, latents, lengths)
    assert [piece.shape[1] for piece in pieces] == [4 * lengths[0] - 3] + [4 * length for length in lengths[1:]]
    assert_same(torch.cat(pieces, dim=1), wanted)


def test_in_bfloat16_no_further_off_than_the_library():
    model = library_model()
    latents = torch.randn(1, 4, 16, 4, 6)
    exact = library_decode(model, latents)
    model = model.to(torch.bfloat16)
    latents = latents.to(torch.bfloat16)
    ours = torch.cat(in_pieces(decoder_of(model), latents, (1, 3)), dim=1)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.1 * (library_decode(model, latents) - exact).norm()


def test_streams_do_not_disturb_each_other():
    model = library_model()
    latents = torch.randn(2, 1, 7, 16, 2, 4)
    vae = wan_vae(model)
    wanted = [vae.decode(clip) for clip in latents]
    streams = [StreamingDecoder(vae), StreamingDecoder(vae)]
    pieces = [[stream(clip[:, at : at + 3]) for stream, clip in zip(streams, latents)] for at in (0, 3, 6)]
    for actual, clip in zip(zip(*pieces), wanted):
        assert_same(torch.cat(actual, dim=1), clip)
    del streams, pieces, actual
    gc.collect()
    assert len(vae.pool) == 2
    assert_same(vae.decode(latents[0]), wanted[0])
    vae.decode(latents[0].repeat(2, 1, 1, 1, 1))
    assert [decoder.shape for decoder in vae.pool] == [(2, 2, 4)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_warm_up_leaves_nothing_in_the_next_clip(device):
    torch.manual_seed(0)
    latents, wanted = torch.randn(1, 7, 16, 2, 4), wan_vae(library_model())
    vae = wan_vae(library_model()).to(torch.device(device), torch.float32)
    vae.warm_up((1, 3, 16, 2, 4))
    assert len(vae.pool) == 1
    for _ in range(2):
        torch.testing.assert_close(
            vae.decode(latents).cpu(), wanted.decode(latents), rtol=0, atol=2e-5 if device == "cpu" else 5e-3
        )
    assert len(vae.pool) == 1


def test_with_little_memory_it_is_the_same():
    vae = wan_vae(library_model())
    latents = torch.randn(1, 7, 16, 2, 4)
    wanted = vae.decode(latents)
    vae.low_memory = True
    assert_same(vae.decode(latents), wanted)
    assert vae.pool[0].low_memory


def test_zeros_stay_finite():
    decoder = decoder_of(library_model())
    for weight in decoder.parameters():
        weight.zero_()
    assert_same(decoder(torch.zeros(1, 2, 16, 2, 2), FeatCache()), torch.full((1, 5, 3, 16, 16), 0.5))


def test_another_vae_is_refused():
    with pytest.raises(InputError, match="Wan 2.2"):
        wan_vae(AutoencoderKLWan(base_dim=8, is_residual=True))


def test_a_weight_is_missing():
    """Of the decoder at once, of the encoder when it is needed."""
    model = library_model()
    state, config = model.state_dict(), dict(model.config)
    with pytest.raises(InputError, match=r"the VAE lacks decoder\.conv_out"):
        WanVAE({name: tensor for name, tensor in state.items() if "decoder.conv_out" not in name}, config)
    incomplete = WanVAE({name: tensor for name, tensor in state.items() if name != "quant_conv.bias"}, config)
    with pytest.raises(InputError, match=r"lacks 1 tensors and has 0 unknown ones, such as quant_conv\.bias"):
        incomplete.load_encoder()


def test_a_weight_has_another_shape():
    """A longer side, one more, or none: of each of the decoder's weights."""
    model = library_model()
    state, config = model.state_dict(), dict(model.config)
    names = [name for name in state if name.startswith(("decoder.", "post_quant_conv."))]
    assert len(names) > 80
    for name in names:
        shape = state[name].shape
        longer = [(*shape[:dim], shape[dim] + 1, *shape[dim + 1 :]) for dim in range(len(shape))]
        for wrong in (*longer, (*shape, 1), ()):
            with pytest.raises(
                InputError, match=r"the VAE has \S+ \[.*\], which does not fit its neighbours: it is not"
            ):
                WanVAE(state | {name: torch.zeros(wrong)}, config)


def test_the_encoder_is_the_librarys():
    model = library_model()
    vae, pixels = wan_vae(model), torch.rand(1, 5, 3, 16, 32) * 2 - 1
    wanted = model.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean, std = (torch.tensor(model.config[name]).view(-1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert_same(vae.encode(pixels), (wanted - mean) / std)
    assert num_parameters(vae.model) == vae.num_encoder_parameters


def test_the_library_is_imported_where_it_encodes():
    """And nowhere else: that takes most of a second of every start."""
    importing = [
        path.name
        for path in Path(vae.__file__).parents[1].rglob("*.py")
        for line in path.read_text().splitlines()
        if re.match(r"(from|import) diffusers\b", line)
    ]
    assert importing == []


def test_what_a_config_may_lack_is_the_librarys():
    defaults = inspect.signature(AutoencoderKLWan).parameters
    assert list(LATENTS_MEAN) == defaults["latents_mean"].default
    assert list(LATENTS_STD) == defaults["latents_std"].default
    assert defaults["base_dim"].default == BASE_DIM


@pytest.fixture
def interpreted(monkeypatch):
    return interpreted_module("inferix.models.vae_kernels", monkeypatch)


@pytest.mark.parametrize(("batch", "time", "channels", "halo"), [(1, 3, 16, 0), (2, 4, 24, 1), (1, 1, 96, 0)])
def test_the_kernels_compute_what_plain_torch_does(interpreted, batch, time, channels, halo):
    """The output is a slice behind two other frames, and between other rows."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, batch, time, 4, 6, channels)
    bias, gamma = torch.randn(2, channels)
    outcomes = []
    for functions in (interpreted, vae_decoder):
        frames = torch.zeros(2, batch, 2 + time, 4 + 2 * halo, 6, channels)
        first, second = (out[:, 2:, halo : halo + 4] for out in frames)
        functions.norm_silu(x, bias, gamma, first, 1e-3)
        total = functions.add_norm_silu(residual, x, bias, gamma, second, 1e-3)
        pixels = functions.to_pixels(frames[0], bias[:3])
        groups = functions.unshuffle_add(x.flatten(0, 1).unflatten(-1, (2, 2, -1)), bias[: channels // 4])
        outcomes.append([frames, total, functions.add(residual, x, bias), groups, pixels])
    for one, other in zip(*outcomes):
        assert one.abs().sum() > 0
        assert_same(one, other)


@pytest.mark.parametrize("channels", [96, 384])
@pytest.mark.parametrize(
    ("capability", "dtype"), [*((capability, "*bf16") for capability in SHARED_MEMORY), (90, "*fp32")]
)
def test_the_kernels_fit_every_architecture(capability, dtype, channels, tmp_path, monkeypatch):
    import triton

    from inferix.models import vae_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = vae_kernels.tile_sizes(channels)
    config = triton.Config({}, num_warps=4, num_stages=3)
    for kernel, pointers, sizes, constants in (
        (
            vae_kernels.add_norm_silu_kernel,
            ("x_ptr", "residual_ptr", "bias_ptr", "gamma_ptr", "total_ptr", "out_ptr"),
            {"rows": "i32", "frames": "i32", "frame_rows": "i32"}
            | {"out_batch_stride": "i64", "out_frame_stride": "i32", "epsilon": "fp32"},
            tile | {"HAS_RESIDUAL": True, "HAS_NORM": True},
        ),
        (
            vae_kernels.unshuffle_add_kernel,
            ("groups_ptr", "bias_ptr", "out_ptr"),
            {"rows": "i32", "height": "i32", "width": "i32"},
            tile,
        ),
        (
            vae_kernels.to_pixels_kernel,
            ("taps_ptr", "bias_ptr", "out_ptr"),
            {"frames": "i32", "frame_rows": "i32"},
            {"TAPS": 16, "PIXELS": vae_kernels.PIXELS},
        ),
    ):
        signature = dict.fromkeys(pointers, dtype) | sizes
        signature["out_ptr"] = "*fp32" if kernel is vae_kernels.to_pixels_kernel else dtype
        assert compile_for(capability, kernel, signature, constants, config) <= SHARED_MEMORY[capability]
