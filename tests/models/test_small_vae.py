"""The small autoencoder against the public implementation's results, in pieces, captured; its files and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recorder import Recorder
from refusals import refusal
from safetensors.torch import load_file, save_file
from taehv_weights import taehv_state
from torch import Tensor

from hiar_model.models.small_stream import SmallDecoder, SmallEncoder
from hiar_model.models.small_vae import SmallVAE, load_small_vae, vae_kind
from hiar_model.models.vae import decode_behind
from hiar_model.planning.memory import vae_memory

pytestmark = pytest.mark.cpu

PUBLISHED = {"rtol": 0, "atol": 1e-4}
PIECES = {"rtol": 0, "atol": 1e-5}
LATENTS = torch.randn(1, 5, 16, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    """By the public implementation: see tests/data/README.md."""
    return load_file(Path(__file__).parents[1] / "data" / "taehv.safetensors")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("taew") / "taew2_1.pth"
    torch.save(taehv_state(), file)
    return file


@pytest.fixture(scope="module")
def vae(file) -> SmallVAE:
    return load_small_vae(file)


@pytest.fixture(scope="module")
def pixels(vae) -> Tensor:
    """Of all latents in one call of the network."""
    return SmallDecoder(vae, frames_at_once=5).decode_float(LATENTS)


def test_the_published_layout(vae):
    shapes = {key: tuple(x.shape) for key, x in vae.state_dict().items()}
    assert len(shapes) == 128 and sum(x.numel() for x in vae.state_dict().values()) == 11_315_539
    assert shapes["encoder.0.weight"] == (64, 3, 3, 3) and shapes["encoder.2.conv.weight"] == (64, 128, 1, 1)
    assert shapes["decoder.17.conv.4.bias"] == (64,) and shapes["decoder.22.weight"] == (3, 64, 3, 3)


def test_decoding_is_that_of_the_public_implementation(vae, expected):
    """Frame by frame, which the other tests compare with the whole."""
    decoder = SmallDecoder(vae)
    frames = torch.cat([decoder.decode_float(piece) for piece in expected["latents"].split(1, 1)], 1)
    assert 0.2 < (expected["frames"] > 0).float().mean() < 0.8, "nothing to compare"
    torch.testing.assert_close((frames + 1) / 2, expected["frames"], **PUBLISHED)


def test_encoding_is_that_of_the_public_implementation(vae, expected):
    torch.testing.assert_close(SmallEncoder(vae).encode(expected["video"] * 2 - 1), expected["encoded"], **PUBLISHED)


@pytest.mark.parametrize(("split", "together"), [((1, 1, 1, 1, 1), 1), ((3, 2), 1), ((3, 2), 3), ((1, 4), 2)], ids=str)
def test_decoding_in_pieces_is_decoding_the_whole(vae, pixels, split, together):
    decoder = SmallDecoder(vae, frames_at_once=together, own_stream=True)  # without CUDA the stream is none
    pieces = [decoder.decode_float(piece) for piece in LATENTS.split(split, 1)]
    assert [piece.shape[1] for piece in pieces] == [4 * split[0] - 3, *(4 * n for n in split[1:])]
    torch.testing.assert_close(torch.cat(pieces, 1), pixels, **PIECES)


def test_frames_are_bytes_of_rgb(vae, pixels):
    frames = np.concatenate(list(decode_behind(SmallDecoder(vae), LATENTS.double().split((3, 2), 1))))
    near = ((pixels[0] + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert frames.dtype == np.uint8 and frames.shape == (17, 16, 24, 3)
    assert np.abs(frames - near).max() <= 0.51


@pytest.mark.parametrize("together", [1, 2])
def test_captured_and_eager_are_the_same_bits(vae, together):
    """Of two clips, the second behind a reset; by the stand-in for CUDA graphs."""
    captures = []

    def capture(run):
        captures.append(Recorder.capture(run))
        return captures[-1]

    eager = SmallDecoder(vae, frames_at_once=together)
    captured = SmallDecoder(vae, frames_at_once=together, capture=capture)
    for latents in (LATENTS, -LATENTS):
        for piece in latents.split((3, 2), 1):
            assert torch.equal(captured.decode_float(piece), eager.decode_float(piece))
        captured.reset(), eager.reset()
    assert len(captures) == together, "one for each number of frames"
    smaller = LATENTS[..., :1, :]  # another size is another capture
    assert torch.equal(captured.decode_float(smaller), eager.decode_float(smaller))


@pytest.mark.parametrize("capture", [None, Recorder.capture])
def test_a_state_goes_on_bit_for_bit(vae, capture, tmp_path):
    first = SmallDecoder(vae, capture=capture)
    first.decode_float(LATENTS[:, :2])
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = SmallDecoder(vae, capture=capture)
    second.decode_float(-LATENTS[:, :3])  # what it held is replaced
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(second.decode_float(LATENTS[:, 2:]), first.decode_float(LATENTS[:, 2:]))
    state = {**second.state_dict(), "features.0": torch.zeros(1, 2)}
    assert refusal(lambda: second.load_state_dict(state)).startswith(
        "VAE state: features.0 is [1, 2] torch.float32, expected [B, 256, h, w] torch.float32"
    )
    second.reset()
    assert second.state_dict().keys() == {"frames_done"}


def test_an_image_is_repeated_and_a_clip_may_come_in_pieces(vae, expected):
    video = expected["video"][..., :16, :16] * 2 - 1
    whole, encoder = SmallEncoder(vae).encode(video), SmallEncoder(vae)
    for _ in range(2):  # a clip begins anew behind the end of one
        pieces = [encoder.encode(piece, more=i < 2) for i, piece in enumerate(video.split((1, 6, 2), 1))]
        assert [piece.shape[1] for piece in pieces] == [0, 1, 2]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **PIECES)
    image = encoder.encode(video[:, :1])
    torch.testing.assert_close(image, encoder.encode(video[:, :1].expand(-1, 4, -1, -1, -1)), **PIECES)
    assert image.shape == (1, 1, 16, 2, 2) and image.dtype == torch.float32


def naive_super(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Raw frames [F, 3, H, W] of latents [f, 16, h, w], from the published description, a layer over all frames."""
    x, i = F.conv2d(latents, state["decoder.0.weight"]), 1
    for grow in (1, 2, 2):
        for _ in range(3):
            w = [state.get(f"decoder.{i}.conv.{name}") for name in ("0.weight", "1.weight", "1.bias", "3.weight")]
            both = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], 1)
            both = F.conv2d(both, w[0], padding=3, groups=both.shape[1])
            x, i = x + F.conv2d(F.conv2d(both, w[1], w[2]).relu(), w[3]), i + 1
        x = F.conv2d(x, state[f"decoder.{i}.weight"], state[f"decoder.{i}.bias"], padding=1).relu()
        x = F.conv2d(F.pixel_shuffle(x, 2), state[f"decoder.{i + 3}.conv.weight"])
        x, i = x.unflatten(1, (grow, -1)).flatten(0, 1), i + 4
    return F.conv2d(x, state[f"decoder.{i}.weight"], state[f"decoder.{i}.bias"], padding=1)


def test_the_super_decoder(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = SmallVAE(large=True).state_dict()
    state["decoder.22.weight"].mul_(10)
    state["decoder.22.bias"].add_(0.4)  # most pixels within [0, 1]
    save_file(state, tmp_path / "mine.safetensors")
    vae = load_small_vae(tmp_path / "mine.safetensors")
    decoder = SmallDecoder(vae)
    actual = torch.cat([decoder.decode_float(piece) for piece in LATENTS[:, :3].split(1, 1)], 1)
    expected = naive_super(state, LATENTS[0, :3])[3:].clamp(0, 1)
    assert expected.std() > 0.01, "nothing to compare"
    torch.testing.assert_close((actual[0] + 1) / 2, expected, **PIECES)


def test_predicted_memory():
    """With a captured call, whose features stay."""
    predicted = vae_memory({"_class_name": "SmallVAE", "large": False}, 60, 104, 3, torch.float16, "cuda")
    memory = 2 * 60 * 104 * 3 * (256 + 4 * 128 + 16 * 64)
    assert predicted.weights == 2 * 11_315_539
    frame = 2 * 480 * 832 * 64  # of features, of which four of a latent frame are there at once, and what follows them
    assert 4 * frame < predicted.peak < 16 * frame and memory + 4 * frame < predicted.resident < memory + 16 * frame


def wrong(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**taehv_state(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {key: value for key, value in state.items() if value is not None}


# name of the file, its tensors, what the line says
FILES = {
    "of Wan 2.2": (
        "taew2_2.pth", lambda: wrong(encoder__17__weight=torch.ones(48, 64, 3, 3)),
        "a small VAE of 48 latent channels (taew2_2, of Wan 2.2 5B); expected taew2_1, of 16",
    ),
    "of Hunyuan": (
        "taehv.pth", taehv_state, "by its name the small VAE of Hunyuan Video, whose latents differ; expected taew2_1"
    ),
    "a missing tensor": ("taew2_1.pth", lambda: wrong(decoder__22__bias=None), "1 missing key (decoder.22.bias)"),
    "another shape": (
        "taew2_1.pth", lambda: wrong(decoder__22__bias=torch.ones(12)),
        "wrong shape: decoder.22.bias is [12], expected [3]",
    ),
    "a transformer": (
        "wan.pth", lambda: {"blocks.0.self_attn.q.weight": torch.ones(1)},
        "holds the weights of a transformer, expected the small VAE of Wan 2.1: taew2_1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_wrong_files_are_named(what, tmp_path):
    name, state, message = FILES[what]
    torch.save(state(), tmp_path / name)
    assert refusal(lambda: load_small_vae(tmp_path / name)) == f"{tmp_path / name}: {message}"


def test_which_vae_a_file_is(file, tmp_path):
    assert vae_kind(file) == (file, "small")
    for name, state, what in (
        ("a.safetensors", {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)}, "a LoRA"),
        ("b.pth", {"token_embedding.weight": torch.ones(1)}, "the weights of a text encoder"),
        ("c.pth", {"x": torch.ones(1), "y": torch.ones(1)}, "the keys x, y"),
        ("d.pth", {}, "no tensors"),
    ):
        save_file(state, tmp_path / name) if name.endswith("rs") else torch.save(state, tmp_path / name)
        expected = "expected a VAE of Wan 2.1: taew2_1 (.pth or .safetensors), Wan2.1_VAE.pth, or diffusers' vae folder"
        assert refusal(lambda path=tmp_path / name: vae_kind(path)) == f"{tmp_path / name}: holds {what}, {expected}"
    (tmp_path / "e.pth").write_bytes(b"no pickle")
    assert "corrupt, or not a plain PyTorch state dict" in refusal(lambda: vae_kind(tmp_path / "e.pth"))


def test_bad_input_is_one_line(vae):
    decoder, encoder = SmallDecoder(vae), SmallEncoder(vae)
    assert refusal(lambda: decoder.decode(LATENTS[:, :, :4])) == (
        "latents must be [B, f >= 1, 16, h, w], got [1, 5, 4, 2, 3]"
    )
    decoder.decode_float(LATENTS[:, :1])
    assert "began with batch, height, width [1, 2, 3] have [1, 2, 2]: reset() it" in refusal(
        lambda: decoder.decode_float(LATENTS[..., :2])
    )
    assert "cuda_graph=True needs a CUDA device" in refusal(lambda: SmallDecoder(vae, cuda_graph=True))
    assert "must be multiples of 8 pixels, got 12x8" in refusal(lambda: encoder.encode(torch.zeros(1, 1, 3, 12, 8)))
    encoder.encode(torch.zeros(1, 1, 3, 16, 8), more=True)
    assert "[1, 16, 8] have [1, 8, 8]: reset() it" in refusal(lambda: encoder.encode(torch.zeros(1, 1, 3, 8, 8)))
