"""TAEHV against the reference's tensors, in pieces, in any precision, and what is refused."""

import shutil

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferix.errors import InputError
from inferix.models import tiny_vae
from inferix.models.clip_decoder import FeatCache
from inferix.models.tiny_vae import TAEHV, TinyDecoder, TinyVAE, as_base
from inferix.models.vae import LATENTS_MEAN, LATENTS_STD

FILE = GOLDEN / "TAEHV/taew2_1.pth"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def vae() -> TinyVAE:
    return TinyVAE.from_file(FILE).to(CPU, torch.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected/taehv.safetensors")


def random_model(*decoder_widths: int) -> TAEHV:
    torch.manual_seed(0)
    model = TAEHV(4, decoder_widths).requires_grad_(False)
    for weight in model.decoder.parameters():
        weight.mul_(1.5)  # PyTorch's own initialisation fades to gray from layer to layer
    return model


def in_pieces(vae: TinyVAE, latents: Tensor, lengths: int | tuple[int, ...]) -> list[Tensor]:
    decode = vae.streaming_decoder()
    return [decode(piece) for piece in latents.split(lengths, dim=1)]


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=0, atol=tolerance)


def test_whole_clip_and_frame_by_frame(vae, golden):
    assert_near(vae.decode(golden["latents"]), golden["video"], 5e-3)
    pieces = in_pieces(vae, golden["latents"], 1)
    assert [piece.shape[1] for piece in pieces] == golden["frames_per_latent"].tolist()
    assert_near(torch.cat(pieces, dim=1), golden["video_frame_by_frame"], 5e-3)


def test_lighttae_takes_latents_that_are_not_normalised(golden, tmp_path):
    """Its name says so: the diffusion model's latents are then multiplied by std, and mean is added."""
    light = TinyVAE.from_file(shutil.copy(FILE, tmp_path / "lighttaew2_1.pth")).to(CPU, torch.float32)
    mean, std = torch.tensor(LATENTS_MEAN), torch.tensor(LATENTS_STD)
    unnormalized = golden["latents"] * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    assert_near(unnormalized, golden["latents_lighttae"], 1e-3)
    assert_near(light.decode(golden["latents"])[:, :5], golden["video_lighttae"], 5e-3)
    encoded = light.encode(golden["encode_pixels"].float() * 2 - 1)
    assert_near(encoded * std.view(-1, 1, 1) + mean.view(-1, 1, 1), golden["encode_latents"], 1e-3)


def test_encode(vae, golden):
    pixels = golden["encode_pixels"].float() * 2 - 1
    assert_near(vae.encode(pixels), golden["encode_latents"], 1e-3)
    assert_near(vae.encode(pixels[:, :1]), vae.encode(pixels[:, :1].repeat(1, 4, 1, 1, 1)), 1e-5)


def test_safetensors_hold_the_same(vae, golden, tmp_path):
    save_file(torch.load(FILE, weights_only=True), tmp_path / "taew2_1.safetensors")
    other = TinyVAE.from_file(tmp_path / "taew2_1.safetensors").to(CPU, torch.float32)
    assert torch.equal(other.decode(golden["latents"]), vae.decode(golden["latents"]))


def test_batch_is_two_single_clips(vae):
    latents = torch.randn(2, 4, 16, 4, 6)
    singles = torch.cat([vae.decode(clip[None]) for clip in latents])
    assert_near(vae.decode(latents), singles, 1e-5)
    assert_near(torch.cat(in_pieces(vae, latents, 2), dim=1), singles, 1e-5)


@pytest.mark.parametrize(
    ("widths", "batch", "lengths", "size"),
    [((8, 7, 6, 4), 1, (3, 3, 3), (4, 6)), ((16, 8, 8, 8), 2, (1, 2, 4), (3, 5)), ((4, 4, 4, 4), 1, (2, 1, 1), (1, 2))],
)
@pytest.mark.parametrize("low_memory", (False, True))
def test_decoder_computes_what_the_network_does(widths, batch, lengths, size, low_memory):
    model = random_model(*widths)
    latents = torch.randn(batch, sum(lengths), 16, *size)
    wanted = model.decode(latents).clamp(0, 1)
    assert wanted.std() > 0.05
    vae = TinyVAE(model)
    vae.low_memory = low_memory
    for _ in range(2):  # the second time with the memory that the first clip has left
        pieces = in_pieces(vae, latents, lengths)
        assert [piece.shape[1] for piece in pieces] == [4 * lengths[0] - 3] + [4 * length for length in lengths[1:]]
        assert_near(torch.cat(pieces, dim=1), wanted, 1e-5)
    assert len(vae.pool) == 1


def test_in_bfloat16_no_further_off_than_the_network():
    model, latents = random_model(16, 16, 8, 8), torch.randn(1, 4, 16, 6, 8)
    exact = model.decode(latents).clamp(0, 1)
    ours = TinyDecoder(model).to(dtype=torch.bfloat16)(latents, FeatCache())
    assert ours.dtype == torch.float32
    theirs = model.to(torch.bfloat16).decode(latents.bfloat16()).float().clamp(0, 1)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_compiled_functions_give_the_same(monkeypatch, golden, vae):
    """What a GPU runs compiled, traced as for a GPU, in a clip that goes on; later clips find it all compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for name in ("bias_relu", "add_bias_relu", "copy", "copy_relu", "to_pixels"):
        function = torch.compile(getattr(tiny_vae, name).__wrapped__, dynamic=True, backend=backend)
        monkeypatch.setattr(tiny_vae, name, lambda *tensors, run=function: run(*map(as_base, tensors)))
    latents = golden["latents"].repeat(1, 2, 1, 1, 1)
    compiled, count = torch.cat(in_pieces(vae, latents, 3), dim=1), len(graphs)
    assert count <= 12
    in_pieces(vae, latents, 3)
    assert len(graphs) == count
    monkeypatch.undo()
    assert_near(compiled, vae.decode(latents), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-3), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_the_same_from_cuda_graphs(dtype, tolerance):
    model, latents = random_model(16, 16, 8, 8), torch.randn(1, 9, 16, 6, 8)
    wanted = model.decode(latents).clamp(0, 1)
    vae = TinyVAE(model).to(torch.device("cuda"), dtype)
    for _ in range(2):  # the first clip captures, the second replays
        assert_near(torch.cat(in_pieces(vae, latents.cuda(), 3), dim=1).cpu(), wanted, tolerance)
    assert vae.pool[0].graphs.keys() == {(3, True), (3, False)}


def truncated(path, folder):
    target = folder / path.name
    target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return target


def damaged_safetensors(folder):
    save_file(torch.load(FILE, weights_only=True), folder / "whole.safetensors")
    return truncated(folder / "whole.safetensors", folder)


def misshapen(folder):
    state = torch.load(FILE, weights_only=True)
    state["decoder.13.conv.weight"] = state["decoder.13.conv.weight"][:7]  # one frame of one, where two are made
    torch.save(state, folder / "taew2_1.pth")
    return folder / "taew2_1.pth"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (lambda folder: folder / "taew2_1.pth", "not found"),
        (lambda folder: GOLDEN / "Wan2.1-T2V-tiny/Wan2.1_VAE.pth", "holds no TAEHV"),
        (lambda folder: GOLDEN / "self_forcing/checkpoints/self_forcing_dmd.pt", "holds no TAEHV"),
        (lambda folder: truncated(FILE, folder), "truncated"),
        (damaged_safetensors, "truncated"),
        (misshapen, "decoder.13.conv.weight"),
        (lambda folder: folder, "cannot be read"),
    ],
    ids=["missing", "the full VAE", "a transformer", "truncated", "truncated safetensors", "misshapen", "a folder"],
)
def test_what_is_no_tiny_vae_is_refused_in_one_line(file, message, tmp_path):
    with pytest.raises(InputError, match=message) as refusal:
        TinyVAE.from_file(file(tmp_path))
    assert "\n" not in str(refusal.value)


def test_every_golden_tensor_is_compared(golden):
    compared = {"latents", "video", "video_frame_by_frame", "frames_per_latent", "latents_lighttae", "video_lighttae"}
    assert golden.keys() == compared | {"encode_pixels", "encode_latents"}
