"""`hiar doctor --model`: what it tells, what it proposes, what it refuses."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from dataclasses import replace

import pytest
import quantised_files
import torch
import wan_files
from made_runs import changed

from hiar_model import config
from hiar_model.cli import main
from hiar_model.io import packed
from hiar_model.io.packed import Scaled
from hiar_model.models.checkpoint import loading_bytes
from hiar_model.planning import fit
from hiar_model.planning.fit import fit_query, options_that_fit, parse_size, subject
from hiar_model.planning.memory import ComponentMemory, vae_memory

pytestmark = pytest.mark.cpu

SMALL = {"height": 64, "width": 96, "vae_dtype": "none"}
WAN = "wan2.1-t2v-1.3b"


def said(*words: str) -> str:
    """What the command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["doctor", *words]) == 0
    return told.getvalue().strip()


def refused(capsys, *words: str) -> str:
    assert main(["doctor", *words]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and not told.out
    return told.err.strip()


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24", 24e9), ("24 gb", 24e9), ("24GiB", 24 * 2**30), ("0.5tb", 5e11), ("512MiB", 2**29)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "0", "24GBs", "1e3", "24,5GB"])
def test_no_sizes(text):
    with pytest.raises(ValueError, match=r"size such as 24GB .* 24GiB .* or 80"):
        parse_size(text)


def test_ways_to_fit_change_as_little_as_they_can():
    query = fit_query(WAN, order="stream", sink_frames=3, **SMALL)
    whole = query.memory().total
    assert options_that_fit(query, whole, shown=1)[0][0].options == ()
    ways = options_that_fit(query, whole - 1)
    assert [str(change) for change, _ in ways] == [
        "--offload text",
        "--order step_first",
        "--kv-dtype float8_e4m3fn",
    ]
    for change, memory in ways:
        assert memory == change.apply(query).memory() and memory.total < whole
    # while the prompt is read both are there: only afterwards is there room for caches
    models = query.memory().encoding  # weights, and what torch gives cuBLAS
    (first, memory), *others = options_that_fit(query, models)
    assert str(first) == "--offload text" and memory.total == models and memory.when == "encoding the prompt"
    smaller = options_that_fit(query, models - 1)
    assert smaller and all("--linear-dtype" in str(change) for change, _ in (*others, *smaller))  # smaller weights


def test_what_is_no_change_is_not_proposed():
    def proposed(**options) -> str:
        return " ".join(str(c) for group in fit.changes(fit_query(WAN, **{**SMALL, **options})) for c in group)

    assert "step_first" in proposed(order="wavefront") and "step_first" not in proposed()
    assert "step_first" not in proposed(order="block_first"), "another video"
    shared = fit_query(WAN, **SMALL, order="stream")
    shared = replace(shared, request=changed(shared.request, kv_source="next_step"))
    assert not [change for group in fit.changes(shared) for change in group if "step_first" in str(change)]
    keys, layers = "--kv-dtype float8", "--linear-dtype int8"
    assert keys in proposed() and keys not in proposed(kv_dtype="bfloat16")
    assert layers in proposed() and layers not in proposed(linear_dtype="float8_e4m3fn")
    assert "text" in proposed() and "text" not in proposed(offload=("text",))
    assert "vae" in proposed(vae_dtype=None) and "vae" not in proposed()
    assert "--window-frames 12" in proposed() and "--window-frames 12" not in proposed(window_frames=12)
    assert "--window-frames 6" not in proposed(sink_frames=4)
    assert "--window-frames" not in proposed(window_frames=(21, 12, 9, 9))


def test_a_table_adds_up():
    words = ["--model", WAN, "--height", "64", "--width", "96", "--order", "stream", "--kv-dtype", "float8_e4m3fn"]
    told = said(*words, "--vae-dtype", "none", "--gpu-memory", "24GB,1GB")
    parts = {m[1]: float(m[2]) for m in re.finditer(r"^\| (\S.*?) \| ([\d.]+) \|", told, re.MULTILINE)}
    peak = float(re.search(r"\*\*peak\*\* \| \*\*([\d.]+)\*\*", told)[1])
    assert peak == pytest.approx(sum(parts.values()), abs=0.06)
    assert parts["transformer"] == 2.84 and parts["text encoder"] == 11.36
    assert "24.00 GB: fits" in told and "1.00 GB: does not fit" in told
    assert "No option makes it fit" in told and "keys of one layer" not in told
    eight = said(*words, "--vae-dtype", "none", "--attention-dtype", "float8_e4m3fn", "--linear-dtype", "float8_e4m3fn")
    assert "keys in float8_e4m3fn, products of attention in float8_e4m3fn, linear layers in float8_e4m3fn" in eight
    # 30 layers of 4 x 1536 x 1536 and 2 x 1536 x 8960 numbers: 1.11 GB in place of 2.22
    assert "| transformer | 1.73 | weights, those of large linear layers in float8_e4m3fn |" in eight


def test_the_toy():
    told = said("--model", "toy", "--gpu-memory", "1")
    assert "latents 48 x 8x8" in told and "1.00 GB: fits" in told and "VAE" not in told


@pytest.mark.parametrize("write", [wan_files.write_original, wan_files.write_diffusers])
def test_a_folder(write, tmp_path):
    folder = write(tmp_path / "model")
    about = subject(str(folder))
    assert about.config == wan_files.WAN and about.missing == ()
    assert about.text_encoder > 0 and about.vae["base_dim"] == 8
    small = ["--height", "32", "--width", "32", "--frames", "9"]
    told = said("--model", str(folder), *small)
    assert "latents 3 x 4x4" in told and "| VAE |" in told
    alone = subject(str(write(tmp_path / "alone", parts=False)))
    assert alone.missing == ("text encoder", "VAE") and alone.vae is None
    told = said("--model", str(tmp_path / "alone"), *small)
    assert "Not counted because missing: text encoder, VAE." in told


def test_a_training_file(tmp_path):
    about = subject(str(wan_files.write_training(tmp_path / "hiar.pt")))
    assert about.config == wan_files.WAN and "network generator_ema" in about.name


def test_a_vae():
    """Of its parts, weights by diffusers' own count; what is kept grows with the picture, not with the block."""
    wanted = sum(p.numel() for p in wan_files.vae().parameters())
    numbers = 4 * 2 * 16  # float32 means and deviations of the latents
    small = vae_memory({"base_dim": 8}, 4, 4, 3, torch.float32)
    assert small.weights == 4 * wanted and small.resident > numbers and small.peak > 0
    wide = vae_memory({"base_dim": 8}, 4, 8, 3, torch.float32)
    long = vae_memory({"base_dim": 8}, 4, 4, 6, torch.float32)
    assert wide.resident - numbers == 2 * (small.resident - numbers) and long.resident == small.resident
    assert wide.peak > small.peak and long.peak > small.peak
    one = vae_memory({"base_dim": 8}, 4, 4, 1, torch.float32)
    assert one.peak < small.peak < 2 * one.peak, "a later latent frame is four frames, only the first is one"
    half = vae_memory({"base_dim": 8}, 4, 4, 3, torch.bfloat16)
    assert half.resident - numbers == (small.resident - numbers) // 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-memory", "24GB"], "--gpu-memory needs --model"),
        (["--frames", "9"], "--frames needs --model"),
        (["--model", "wan9"], "model 'wan9' is no name, file or folder; names: toy, .*wan2.1-t2v-1.3b"),
        (["--model", WAN, "--gpu-memory", "much"], "size such as 24GB"),
        (["--model", WAN, "--height", "470"], "height must be a multiple of 16 and width of 16 pixels, got 470x832"),
        (["--model", WAN, "--frames", "80"], "whole blocks of 3 latent frames: got 80, nearest 69 or 81"),
        (["--model", WAN, "--frames", "10"], "whole blocks of 3 latent frames: got 10, nearest 9 or 21"),
        (["--model", WAN, "--frames", "0"], "--frames must be a whole number of at least 1, got 0"),
        (["--model", WAN, "--dtype", "int8"], "dtype must be one of float32, .*, got 'int8'"),
        (["--model", WAN, "--kv-dtype", "fp8"], "kv-dtype must be one of .*float8_e4m3fn, got 'fp8'"),
        (
            ["--model", WAN, "--attention-dtype", "float8_e4m3fn"],
            "--attention-dtype float8_e4m3fn needs --kv-dtype float8_e4m3fn: it is not set",
        ),
        (["--model", WAN, "--linear-dtype", "int4"], "--linear-dtype must be one of float8_e4m3fn, int8, got 'int4'"),
        (["--model", WAN, "--vae-dtype", "none", "--offload", "all"], "--offload must be one of text, vae, got 'all'"),
        (["--model", WAN, "--order", "sideways"], "order"),
        (["--model", WAN, "--window-frames", "2"], "--window-frames must be .* 3 .*got 2"),
        (["--model", "toy", "--height", "64"], "--height must be left out: toy makes frames of one size only, got 64"),
        (["--model", "."], "no weights found"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_refusals(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refused(capsys, *words))


def test_an_offloaded_part_is_not_on_the_gpu():
    query = fit_query(WAN, **{**SMALL, "vae_dtype": None}, offload=("vae",))
    assert query.memory().vae == ComponentMemory()
    both = replace(query, offload=("text", "vae"))
    assert query.memory().resident - both.memory().resident == 2 * config.WAN.text_encoder_parameters


# Quantised checkpoints


def test_a_quantised_file_is_named_and_its_loading_counted(tmp_path, monkeypatch):
    path = quantised_files.write(tmp_path / "w.safetensors", quantised_files.comfy(quantised_files.native()))
    monkeypatch.setattr(Scaled, "dequantise", lambda *_: pytest.fail("weights are read"))
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    told = said("--model", str(path), *small)
    assert "quantised, scale_weight as ComfyUI writes it: 20 tensors of float8_e4m3fn" in told.splitlines()[0]
    assert "| transformer | 0.00 | weights, dequantised |" in told
    assert "| loading it | 0.05 | temporary" in told and "| **peak** | **0.05** | loading the transformer |" in told
    memory = fit_query(str(path), **SMALL).memory()
    assert memory.loading == loading_bytes(wan_files.WAN, torch.bfloat16)
    assert memory.reading == memory.transformer + memory.loading == memory.total
    monkeypatch.setattr(packed, "CHUNK", 1 << 14)  # dequantised at a time: less than is merged
    merging = fit_query(str(path), **SMALL, lora=True).memory().loading
    assert merging == loading_bytes(wan_files.WAN, torch.bfloat16, lora=True) > 3 * 4 * 6 * wan_files.WAN.dim**2
    assert replace(memory, loading=0).total < memory.total
    stays = "weights, those of large linear layers in float8_e4m3fn: 12 of 12 matrices as they are in the file"
    assert stays in said("--model", str(path), "--linear-dtype=float8_e4m3fn", *small)


def test_a_gguf_file_that_is_not_read(tmp_path, capsys, monkeypatch):
    path = tmp_path / "w.gguf"
    quantised_files.write_gguf(path, quantised_files.native(), ("Q8_0",), architecture="flux")
    assert refused(capsys, "--model", str(path)).endswith("a GGUF file of a flux model, expected wan")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "GGUF files need gguf: pip install 'hiar-kernels[gguf]'" in refused(capsys, "--model", str(path))
