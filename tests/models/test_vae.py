"""Wan's VAE in pieces against diffusers' own of the whole clip, from both layouts; its state; its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import wan_files
from processes import torchrun
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hiar_kernels
from hiar_model.models.vae import StreamingDecoder, StreamingEncoder, decode_behind, load_vae, to_pixels
from hiar_model.models.vae_weights import library

pytestmark = pytest.mark.cpu

LATENTS = torch.randn(1, 7, 16, 2, 4, generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(1, 13, 3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
TOLERANCE = {"rtol": 0, "atol": 1e-5}
SPLITS = [(1, 3, 3), (3, 3, 1), (7,), (1, 1, 1, 1, 1, 1, 1), (2, 5), (4, 1, 2)]


@pytest.fixture(scope="module")
def own():
    """diffusers' class, as it is."""
    return wan_files.vae()


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory) -> Path:
    """Both layouts: Wan2.1_VAE.pth, and vae/ of a pipeline folder."""
    folder = tmp_path_factory.mktemp("vae")
    torch.save(wan_files.original_vae_state(), folder / wan_files.VAE)
    own.save_pretrained(folder / "pipeline" / "vae")
    return folder


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(folder)


@pytest.fixture(scope="module")
def plain(folder):
    """Not fused."""
    return load_vae(folder / "pipeline", fused=False)


def scales(own, latents: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, 1, latents.shape[2], 1, 1)
    return tuple(torch.tensor(own.config[name]).view(shape) for name in ("latents_mean", "latents_std"))


@torch.no_grad()
def whole_decode(own, latents: Tensor) -> Tensor:
    mean, std = scales(own, latents)
    return own.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)


@torch.no_grad()
def whole_encode(own, pixels: Tensor) -> Tensor:
    latents = own.encode(pixels.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean, std = scales(own, latents)
    return (latents - mean) / std


@pytest.fixture(scope="module")
def pixels(own) -> Tensor:
    actual = whole_decode(own, LATENTS)
    assert actual.shape == (1, 25, 3, 16, 32) and actual.std() > 0.05 and actual.abs().mean() < 0.9, (
        "nothing to compare"
    )
    return actual


# Decoding


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("kind", ["vae", "plain"])
def test_decoding_in_pieces_is_decoding_the_whole(kind, split, pixels, request):
    decoder = StreamingDecoder(request.getfixturevalue(kind))
    actual = [decoder.decode_float(piece) for piece in LATENTS.split(split, 1)]
    assert [f.shape[1] for f in actual] == [4 * split[0] - 3, *(4 * n for n in split[1:])]
    torch.testing.assert_close(torch.cat(actual, 1), pixels, **TOLERANCE)
    assert decoder.frames_done == 7


@pytest.mark.parametrize("together", [2, 3, 100])
def test_frames_that_go_through_together(vae, together, pixels):
    decoder = StreamingDecoder(vae, frames_at_once=together)
    actual = [decoder.decode_float(piece) for piece in LATENTS.split((3, 4), 1)]
    torch.testing.assert_close(torch.cat(actual, 1), pixels, **TOLERANCE)


def test_frames_are_bytes_of_rgb(vae, pixels):
    decoder = StreamingDecoder(vae, own_stream=True)  # without CUDA the stream is none
    actual = np.concatenate([decoder.decode(piece.double()) for piece in LATENTS.split((3, 4), 1)])
    expected = ((pixels[0] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert actual.dtype == np.uint8 and actual.shape == (25, 16, 32, 3)
    assert np.array_equal(actual, expected)
    there_and_back = (to_pixels(actual)[0].movedim(1, -1) + 1) * 127.5
    assert np.array_equal(there_and_back.round().numpy(), actual)


def test_one_behind(vae):
    decoder, blocks, result = StreamingDecoder(vae), LATENTS.split((3, 2, 2), 1), []

    def finished():
        for i, block in enumerate(blocks):
            result.append(i)
            yield block

    seen = [(list(result), frames) for frames in decode_behind(decoder, finished())]
    assert [known for known, _ in seen] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    whole = StreamingDecoder(vae).decode(LATENTS)
    assert np.array_equal(np.concatenate([frames for _, frames in seen]), whole)


def test_another_clip_after_a_reset(vae, pixels):
    decoder = StreamingDecoder(vae)
    decoder.decode_float(LATENTS[:, :2] + 1)
    decoder.reset()
    torch.testing.assert_close(decoder.decode_float(LATENTS[:, :3]), pixels[:, :9], **TOLERANCE)


def test_latents_may_change_while_they_are_decoded(vae):
    latents = LATENTS[:, :2].clone()
    decoder = StreamingDecoder(vae)
    assert decoder._features(latents).data_ptr() != latents.data_ptr()


def test_what_is_kept_does_not_grow(vae):
    decoder, sizes = StreamingDecoder(vae), []
    for piece in LATENTS.split(1, 1):
        decoder.decode_float(piece)
        sizes.append(sum(value.numel() for value in decoder.state_dict().values()))
    assert len(set(sizes[1:])) == 1


# The modules


def test_fusing_keeps_the_keys_and_diffusers_own_methods(vae, own, pixels):
    assert vae.state_dict().keys() == own.state_dict().keys()
    assert not [m for m in vae.modules() if type(m).__name__ == "WanResidualBlock"]
    torch.testing.assert_close(whole_decode(vae, LATENTS), pixels, **TOLERANCE)
    torch.testing.assert_close(whole_encode(vae, PIXELS), whole_encode(own, PIXELS), **TOLERANCE)
    with torch.no_grad():  # without a cache, as diffusers has it for a clip of one frame
        for half, x in (("decoder", LATENTS), ("encoder", PIXELS)):
            x = x[:, :1].transpose(1, 2)
            torch.testing.assert_close(getattr(vae, half)(x), getattr(own, half)(x), **TOLERANCE)


def test_the_fused_op_is_what_runs(vae, monkeypatch):
    """Before every convolution over three frames but a coder's first and those of its resampling."""
    calls = []

    def counted(x, weight, cache=None):
        calls.append((x.shape[1], None if cache is None else cache.shape[2]))
        return hiar_kernels.rms_silu_pad(x, weight, cache)

    monkeypatch.setattr("hiar_model.models.vae_fused.rms_silu_pad", counted)
    StreamingDecoder(vae).decode(LATENTS[:, :2])
    convs = [m for m in vae.decoder.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    assert len(calls) == 2 * (len(convs) - 1)
    assert [known for _, known in calls] == [None] * (len(convs) - 1) + [2] * (len(convs) - 1)


def test_channels_last(folder, pixels):
    vae = load_vae(folder, channels_last=True)
    assert vae.decoder.conv_out.weight.stride(1) == 1
    actual = torch.cat([StreamingDecoder(vae).decode_float(LATENTS)], 1)
    torch.testing.assert_close(actual, pixels, **TOLERANCE)


def test_bfloat16(folder, pixels):
    vae = load_vae(folder, dtype=torch.bfloat16)
    actual = StreamingDecoder(vae).decode_float(LATENTS)
    assert actual.dtype == torch.bfloat16 and (actual.float() - pixels).abs().mean() < 0.02
    latents = StreamingEncoder(vae).encode(PIXELS)
    assert latents.dtype == torch.float32
    assert StreamingDecoder(vae).decode(latents[:, :1]).dtype == np.uint8


def test_the_vae_of_wan_2_2(tmp_path):
    """Shortcuts around its blocks, patches of 2 x 2 pixels: streamed likewise, from diffusers' folder."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    own = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=4, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 1.5],
        temperal_downsample=[False, True, True],
    ).eval()  # fmt: skip
    own.save_pretrained(tmp_path / "vae")
    vae = load_vae(tmp_path)
    latents = torch.randn(1, 4, 4, 2, 2)
    decoder = StreamingDecoder(vae)
    actual = torch.cat([decoder.decode_float(piece) for piece in latents.split((1, 3), 1)], 1)
    assert actual.shape == (1, 13, 3, 32, 32)
    torch.testing.assert_close(actual, whole_decode(own, latents), **TOLERANCE)
    pixels = torch.rand(1, 9, 3, 32, 32) * 2 - 1
    encoder = StreamingEncoder(vae)
    actual = torch.cat([encoder.encode(piece) for piece in pixels.split((1, 8), 1)], 1)
    torch.testing.assert_close(actual, whole_encode(own, pixels), **TOLERANCE)


# Encoding


@pytest.mark.parametrize("split", [(13,), (1, 4, 8), (1, 12), (5, 4, 4), (9, 4)], ids=str)
@pytest.mark.parametrize("kind", ["vae", "plain"])
def test_encoding_in_pieces_is_encoding_the_whole(kind, split, own, request):
    encoder = StreamingEncoder(request.getfixturevalue(kind))
    actual = torch.cat([encoder.encode(piece) for piece in PIXELS.split(split, 1)], 1)
    assert actual.shape == (1, 4, 16, 2, 4) and encoder.frames_done == 13
    torch.testing.assert_close(actual, whole_encode(own, PIXELS), **TOLERANCE)


def test_an_image_and_a_batch(vae, own):
    image = to_pixels(np.arange(16 * 32 * 3, dtype=np.uint8).reshape(1, 16, 32, 3))
    actual = StreamingEncoder(vae).encode(image)
    assert actual.shape == (1, 1, 16, 2, 4)
    torch.testing.assert_close(actual, whole_encode(own, image), **TOLERANCE)
    two = torch.cat([PIXELS, -PIXELS])[:, :5]
    torch.testing.assert_close(StreamingEncoder(vae).encode(two), whole_encode(own, two), **TOLERANCE)


# State


@pytest.mark.parametrize("begun", [0, 1, 2, 4])
def test_a_state_on_disk_goes_on_bit_for_bit(vae, begun, tmp_path):
    """After one frame temporal upsampling has seen nothing yet, which diffusers marks by a word, not by a tensor."""
    first = StreamingDecoder(vae)
    if begun:
        first.decode(LATENTS[:, :begun])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = StreamingDecoder(vae)
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert second.frames_done == begun
    assert ("Rep" in [saved for saved in first._cache if isinstance(saved, str)]) == (begun == 1)
    forked = second.state_dict()
    expected = [
        first.decode_float(LATENTS[:, begun : begun + 1]),
        first.decode_float(LATENTS[:, begun + 1 : begun + 3]),
    ]
    actual = [
        second.decode_float(LATENTS[:, begun : begun + 1]),
        second.decode_float(LATENTS[:, begun + 1 : begun + 3]),
    ]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    second.load_state_dict(forked)  # which is a copy: going on has not changed it
    assert torch.equal(second.decode_float(LATENTS[:, begun : begun + 1]), expected[0])


def test_states_pass_between_fused_and_plain(vae, plain, pixels):
    for one, other in ((vae, plain), (plain, vae)):
        for begun in (1, 3):
            first, second = StreamingDecoder(one), StreamingDecoder(other)
            first.decode(LATENTS[:, :begun])
            second.load_state_dict(first.state_dict())
            actual = second.decode_float(LATENTS[:, begun:])
            torch.testing.assert_close(actual, pixels[:, 4 * begun - 3 :], **TOLERANCE)


def test_a_state_of_an_encoder(vae, own):
    first, second = StreamingEncoder(vae), StreamingEncoder(vae)
    first.encode(PIXELS[:, :5])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.encode(PIXELS[:, 5:]), whole_encode(own, PIXELS)[:, 2:], **TOLERANCE)


# Files


def test_both_layouts_are_the_same_tensors(folder, own):
    expected = own.state_dict()
    save_file(wan_files.original_vae_state(), folder / "renamed.safetensors")
    places = (".", wan_files.VAE, "renamed.safetensors", "pipeline", "pipeline/vae")
    for path in (*places, "pipeline/vae/diffusion_pytorch_model.safetensors"):
        actual = load_vae(folder / path).state_dict()
        assert actual.keys() == expected.keys(), path
        assert all(torch.equal(actual[key], value) for key, value in expected.items()), path


def test_an_original_folder_holds_a_transformer_too(tmp_path, own):
    """Under the very file name that the VAE has in diffusers' layout."""
    save_file({"patch_embedding.weight": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save(wan_files.original_vae_state(), tmp_path / wan_files.VAE)
    assert load_vae(tmp_path).state_dict().keys() == own.state_dict().keys()


def test_a_rank_that_only_decodes(folder, vae):
    """Two processes: the first makes the blocks, the last one, without steps, turns them into pixels.

    With diffusers' files: for the others the process would import all of its loaders.
    """
    from vae_job import video

    place = folder / "pipeline"
    done = torchrun(2, Path(__file__).parents[1] / "helpers" / "vae_job.py", place)
    assert (place / "split.json").exists(), done.stderr[-3000:]
    assert json.loads((place / "split.json").read_text()) == [1, 2, 0]
    blocks = [block.latents for block in video("eager")]
    expected = np.concatenate(list(decode_behind(StreamingDecoder(vae), blocks)))
    assert expected.shape == (21, 16, 32, 3) and expected.std() > 5
    assert np.array_equal(np.load(place / "frames.npy"), expected)


# Refusals


def began(vae, frames: int = 1) -> StreamingDecoder:
    decoder = StreamingDecoder(vae)
    decoder.decode(LATENTS[:, :frames])
    return decoder


CALLS = {
    "latents of two videos": (
        lambda v: StreamingDecoder(v).decode(torch.cat([LATENTS, LATENTS])),
        "latents must be [1, f, 16, h, w], got [2, 7, 16, 2, 4]",
    ),
    "latents of other channels": (
        lambda v: StreamingDecoder(v).decode(LATENTS[:, :, :4]),
        "latents must be [B, f >= 1, 16, h, w], got [1, 7, 4, 2, 4]",
    ),
    "no latents": (
        lambda v: StreamingDecoder(v).decode(LATENTS[:, :0]),
        "latents must be [B, f >= 1, 16, h, w], got [1, 0, 16, 2, 4]",
    ),
    "latents of another size": (
        lambda v: began(v).decode(LATENTS[..., :2]),
        "latents of a clip that began with batch, height, width [1, 2, 4] have [1, 2, 2]: reset() it",
    ),
    "half a frame at once": (
        lambda v: StreamingDecoder(v, frames_at_once=0.5),
        "frames_at_once must be a whole number of at least 1, got 0.5",
    ),
    "pixels in four dimensions": (
        lambda v: StreamingEncoder(v).encode(PIXELS[0]), "pixels must be [B, F >= 1, 3, H, W], got [13, 3, 16, 32]"
    ),
    "pixels that fill no latent": (
        lambda v: StreamingEncoder(v).encode(PIXELS[..., :30]),
        "height and width must be multiples of 8 pixels, got 16x30",
    ),
    "a clip of four frames": (
        lambda v: StreamingEncoder(v).encode(PIXELS[:, :4]),
        "a clip must have 1 + 4n frames, later pieces 4n: got 4, nearest 1 or 5",
    ),
    "frames as floats": (
        lambda v: to_pixels(np.zeros((1, 8, 8, 3))), "frames must be uint8 [F, H, W, 3], got float64 [1, 8, 8, 3]"
    ),
    "a state that lacks a tensor": (
        lambda v: StreamingDecoder(v).load_state_dict({"frames_done": torch.tensor(1)}),
        "features.0 is missing; legal: frames_done and, once that is above 0, features.0 to features.31",
    ),
    "a state without a count": (
        lambda v: StreamingDecoder(v).load_state_dict({}), "VAE state: frames_done is missing"
    ),
    "a state of something else": (
        lambda v: StreamingDecoder(v).load_state_dict({**began(v).state_dict(), "k.0": torch.zeros(1)}),
        "VAE state: k.0 is unexpected",
    ),
    "a state of an encoder": (
        lambda v: StreamingEncoder(v).load_state_dict(began(v).state_dict()), "VAE state: features."
    ),
    "a state in another dtype": (
        lambda v: StreamingDecoder(v).load_state_dict(
            {k: t.half() if k != "frames_done" else t for k, t in began(v).state_dict().items()}
        ),
        "VAE state: features.0 is [1, 16, 1, 2, 4] torch.float16, expected [B, 16, f, h, w] torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CALLS)
def test_bad_input_is_one_line(what, vae):
    call, message = CALLS[what]
    assert message in refusal(lambda: call(vae))


def test_later_pieces_have_no_frame_alone(vae):
    encoder = StreamingEncoder(vae)
    encoder.encode(PIXELS[:, :1])
    assert "got 5, nearest 4 or 8" in refusal(lambda: encoder.encode(PIXELS[:, 1:6]))


def test_tiling_is_diffusers_own(folder):
    vae = load_vae(folder)
    vae.enable_tiling()
    assert "vae.disable_tiling()" in refusal(lambda: StreamingDecoder(vae))


# tensor of the original layout -> what stands in its place, None: nothing
FILES = {
    "a missing tensor": (
        {"decoder.head.2.bias": None}, "1 missing key (decoder.conv_out.bias)"
    ),
    "a tensor too many": ({"critic": torch.ones(1)}, "1 unexpected key (critic)"),
    "a tensor of another shape": (
        {"decoder.head.2.bias": torch.ones(4)}, "decoder.conv_out.bias is [4], expected [3]"
    ),
    "no first convolution": (
        {"encoder.conv1.weight": None}, "the tensor encoder.conv_in.weight (in diffusers' names) is missing"
    ),
    "other latents": (
        {"conv2.weight": torch.ones(48, 48, 1, 1, 1)},
        "48 latent channels, but latents_mean has 16: give diffusers' folder",
    ),
    "no VAE": (
        {"decoder.middle.0.residual.0.gamma": None},
        "no VAE of Wan 2.1: its keys have neither decoder.middle.0.residual.0.gamma nor decoder.mid_block.",
    ),
    "no state dict": ({"generator": {"a": torch.ones(1)}}, "generator is a dict, expected a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_wrong_files_are_named(what, tmp_path):
    changes, message = FILES[what]
    state = {k: v for k, v in {**wan_files.original_vae_state(), **changes}.items() if v is not None}
    torch.save(state, tmp_path / wan_files.VAE)
    line = refusal(lambda: load_vae(tmp_path))
    assert line.startswith(f"{tmp_path / wan_files.VAE}: ") and message in line


def test_wrong_folders_are_named(folder, tmp_path):
    expected = "expected vae/diffusion_pytorch_model.safetensors (diffusers) or Wan2.1_VAE.pth (original)"
    (other := tmp_path / "config.json").write_text("{}")
    assert (
        refusal(lambda: load_vae(other)) == f"{other}: expected .safetensors, .pth, .pt, .bin or a folder, got '.json'"
    )
    for absent in (tmp_path, tmp_path / "nothing"):
        assert refusal(lambda absent=absent: load_vae(absent)) == f"{absent}: no VAE there; {expected}"
    (tmp_path / wan_files.VAE).write_bytes(b"no pickle")
    assert refusal(lambda: load_vae(tmp_path)).startswith(
        f"{tmp_path / wan_files.VAE}: corrupt, or not a plain PyTorch state dict"
    )
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"no tensors")
    two = f"two files for the VAE of {tmp_path}: {weights} and {tmp_path / wan_files.VAE}; keep one"
    assert refusal(lambda: load_vae(tmp_path)).startswith(two)
    (tmp_path / wan_files.VAE).unlink()
    for path in (tmp_path, tmp_path / "vae"):
        corrupt = f"{weights}: corrupt, or not safetensors: SafetensorError: "
        assert refusal(lambda path=path: load_vae(path)).startswith(corrupt)
    weights.write_bytes((folder / "pipeline" / "vae" / weights.name).read_bytes())
    config, good = weights.parent / "config.json", (folder / "pipeline" / "vae" / "config.json").read_text()
    for text, message in (
        ("{", "corrupt, or not JSON: "),
        ("[1]", "expected a JSON object, got a list"),
        (json.dumps({"_class_name": "AutoencoderKL"}), "describes AutoencoderKL, expected AutoencoderKLWan"),
        (json.dumps({**json.loads(good), "dim_mult": 3}), "no configuration of AutoencoderKLWan: "),
        (json.dumps({**json.loads(good), "latents_std": [1.0]}), "16 latent channels, but latents_std has 1"),
    ):
        config.write_text(text)
        assert refusal(lambda: load_vae(tmp_path)).startswith(f"{config}: {message}")
    config.write_text(json.dumps({**json.loads(good), "base_dim": 16}))
    assert f"{weights}: wrong shape: encoder.conv_in.weight is [8, 3, 3, 3, 3], expected [16, " in refusal(
        lambda: load_vae(tmp_path)
    )


def test_another_activation_is_not_fused(folder, own):
    from hiar_model.models.vae_fused import fuse

    vae = load_vae(folder, fused=False)
    vae.decoder.nonlinearity = nn.GELU()
    assert refusal(lambda: fuse(vae)) == "the fused VAE needs SiLU, this VAE has GELU: pass fused=False"


def test_without_diffusers(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    message = "Wan's VAE needs diffusers: pip install 'hiar-kernels[wan]'"
    assert refusal(lambda: library("models")).startswith(message)
    assert refusal(lambda: load_vae(folder / "pipeline")).startswith(message)
