"""The text encoder: both layouts, the published cleaning and padding, offload, and embeddings kept on disk."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import wan_files
from refusals import refusal
from safetensors.torch import load_file, save_file
from wan_files import PROMPT, WAN

from hiar_model.models import text_encoder as module
from hiar_model.models.checkpoint import load_transformer
from hiar_model.models.text_encoder import WanTextEncoder, clean_prompt, find_text_encoder, load_umt5

pytestmark = pytest.mark.cpu

LAYOUTS = ("original", "diffusers")
DIRTY = "  a red circle\n\tmoving &amp;amp; turning   right â€” slowly "


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Model folders with nothing but the text encoder."""
    root = tmp_path_factory.mktemp("text")
    original = root / "Wan2.1-T2V-1.3B"
    wan_files.write_tokenizer(original / wan_files.TOKENIZER)
    torch.save(wan_files.original_text_encoder_state(), original / wan_files.TEXT_ENCODER)
    diffusers = root / "Wan2.1-T2V-1.3B-Diffusers"
    wan_files.write_tokenizer(diffusers / "tokenizer")
    wan_files.text_encoder().save_pretrained(diffusers / "text_encoder", max_shard_size=40_000)  # several shards
    return {"original": original, "diffusers": diffusers}


@pytest.fixture
def copy(folders, tmp_path):
    """A folder of one's own to damage."""
    return lambda layout: Path(shutil.copytree(folders[layout], tmp_path / layout, copy_function=os.link))


def replace(file: Path, content: object) -> None:
    """Write over a link without touching what it links to."""
    file.unlink()
    if isinstance(content, str):
        file.write_text(content)
    elif file.suffix == ".safetensors":
        save_file(content, file, {"format": "pt"})  # type: ignore[arg-type]
    else:
        torch.save(content, file)


# What it gives


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_are_transformers_own_network(folders, layout):
    """Equal to transformers' encoder called as the published pipeline does: 512 tokens, a mask, zeros behind."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["diffusers"] / "tokenizer")
    for prompt in (PROMPT, DIRTY, "", "x" * 600):
        cut = pytest.warns(UserWarning, match="longer than 512 tokens") if len(prompt) > 512 else nullcontext()
        with cut:
            ours = WanTextEncoder(folders[layout])(prompt)
        padded = {"padding": "max_length", "max_length": 512, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer([prompt_clean(prompt)], **padded)
        with torch.no_grad():
            theirs = wan_files.text_encoder()(tokens.input_ids, tokens.attention_mask).last_hidden_state
        theirs = theirs * tokens.attention_mask[..., None]
        length = int(tokens.attention_mask.sum())
        assert ours.shape == (1, length, WAN.text_dim) and ours.dtype == torch.float32
        assert torch.allclose(F.pad(ours, (0, 0, 0, 512 - length)), theirs, rtol=0, atol=1e-5)
        assert float(ours.std()) > 0.5  # no network of zeros


def test_the_layouts_agree_bit_for_bit(folders):
    one, other = (WanTextEncoder(folders[layout])(DIRTY) for layout in LAYOUTS)
    assert torch.equal(one, other)
    a, b = (load_umt5(find_text_encoder(folders[layout])).state_dict() for layout in LAYOUTS)
    assert a.keys() == b.keys() == wan_files.text_encoder().state_dict().keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_library_reads_the_transformers_layout_alike(folders):
    from transformers import UMT5EncoderModel

    theirs = UMT5EncoderModel.from_pretrained(folders["diffusers"] / "text_encoder").state_dict()
    ours = load_umt5(find_text_encoder(folders["diffusers"])).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_embedding_is_one_tensor_in_memory(folders):
    model = load_umt5(find_text_encoder(folders["diffusers"]), torch.bfloat16)
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert not model.training and not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_transformer_takes_what_it_gives(folders, tmp_path):
    """Trimmed or padded to 512 by hand: the same velocity."""
    model = load_transformer(wan_files.write_original(tmp_path / "w", parts=False))
    ours = WanTextEncoder(folders["original"])(PROMPT)
    x, t = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([625.0])
    with torch.no_grad():
        padded = F.pad(ours, (0, 0, 0, 512 - ours.shape[1]))
        assert torch.allclose(model(x, t, ours), model(x, t, padded), rtol=0, atol=2e-5)


def test_cleaning_is_the_published_one():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(DIRTY) == "a red circle moving & turning right — slowly"
    for prompt in (DIRTY, "", " \n", "ï¬\x81re &lt;b&gt;", "a\u3000b\u00a0c", "< &amp;lt;", "日本 の 犬", "don’t"):
        assert clean_prompt(prompt) == prompt_clean(prompt), prompt


def test_dtype(folders):
    narrow = WanTextEncoder(folders["original"], dtype=torch.bfloat16)
    assert narrow(PROMPT).dtype == torch.bfloat16
    wide = WanTextEncoder(folders["original"])(PROMPT)
    assert 1e-4 < float((narrow(PROMPT).float() - wide).abs().max()) < 0.2


# Offload


@pytest.mark.parametrize(("offload", "left"), [(None, "cpu"), ("cpu", "cpu"), ("free", None)])
def test_offload(folders, offload, left):
    encoder = WanTextEncoder(folders["original"], offload=offload)
    assert encoder.loaded_on() is None  # nothing is read before it is needed
    first = encoder(PROMPT)
    assert encoder.loaded_on() == (None if left is None else torch.device(left))
    assert torch.equal(encoder(PROMPT), first)


def test_offload_moves_there_and_back(folders, monkeypatch):
    """No second device is here: what matters is that it is moved to each in turn."""
    encoder, moves = WanTextEncoder(folders["original"], offload="cpu"), []
    encoder(PROMPT)
    monkeypatch.setattr(encoder._model, "to", lambda device: moves.append(str(device)))
    encoder.device = torch.device("cpu", 0)
    encoder(PROMPT)
    assert moves == ["cpu:0", "cpu"]


# Embeddings on disk


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the network was asked")

    return lambda: monkeypatch.setattr(module, "load_umt5", fail)


def test_a_known_prompt_reads_no_weights(folders, tmp_path, no_network):
    first = WanTextEncoder(folders["original"], cache=tmp_path / "a" / "b")(DIRTY)
    (entry,) = (tmp_path / "a" / "b").iterdir()
    assert torch.equal(load_file(entry)["embedding"], first)
    no_network()
    again = WanTextEncoder(folders["original"], cache=tmp_path / "a" / "b")
    assert torch.equal(again(DIRTY), first) and torch.equal(again(clean_prompt(DIRTY)), first)
    assert again.loaded_on() is None and again._tokenizer is None


def test_entries_are_of_a_prompt_a_dtype_and_files(copy, tmp_path):
    cache, folder = tmp_path / "cache", copy("original")

    def entries(prompt: str = PROMPT, **options) -> int:
        WanTextEncoder(folder, cache=cache, **options)(prompt)
        return len(list(cache.iterdir()))

    assert [entries(), entries(), entries("other"), entries(dtype=torch.bfloat16)] == [1, 1, 2, 3]
    state = wan_files.original_text_encoder_state()
    replace(folder / wan_files.TEXT_ENCODER, {key: value + 1 for key, value in state.items()})  # of the same size
    assert entries() == 4
    changed = WanTextEncoder(folder, cache=cache)(PROMPT)
    assert not torch.equal(changed, WanTextEncoder(copy("diffusers"))(PROMPT))


@pytest.mark.parametrize("damage", ["torn", "foreign", "nan", "shape", "dtype"])
def test_a_damaged_entry_is_made_again(folders, tmp_path, damage):
    encoder = WanTextEncoder(folders["original"], cache=tmp_path, dtype=torch.float32)
    first = encoder(PROMPT)
    (entry,) = tmp_path.iterdir()
    if damage == "torn":
        entry.write_bytes(entry.read_bytes()[:-5])
    else:
        content = {
            "foreign": {"other": first}, "nan": {"embedding": first * float("nan")}, "shape": {"embedding": first[0]},
            "dtype": {"embedding": first.double()},
        }[damage]  # fmt: skip
        save_file(content, entry)
    again, saved = encoder(PROMPT), load_file(entry)["embedding"]
    assert again.dtype == saved.dtype == torch.float32 and torch.equal(again, first) and torch.equal(saved, first)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_a_warning(folders, tmp_path, monkeypatch):
    def full(_, path: Path, *rest: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_tensors", full)
    encoder = WanTextEncoder(folders["original"], cache=tmp_path)
    with pytest.warns(UserWarning, match="embedding is not cached: .*No space left on device"):
        actual = encoder(PROMPT)
    assert torch.equal(actual, WanTextEncoder(folders["original"])(PROMPT)) and not list(tmp_path.iterdir())


# What is refused


def test_bad_options(folders, tmp_path):
    folder = folders["original"]
    line = "unknown offload 'disk' of the text encoder; legal: None, 'cpu', 'free'"
    assert refusal(WanTextEncoder, folder, offload="disk") == line
    line = refusal(WanTextEncoder, folder, dtype=torch.float16)
    assert line == "the text encoder cannot run in torch.float16; legal: torch.bfloat16, torch.float32, torch.float64"
    (tmp_path / "file").write_text("")
    assert refusal(WanTextEncoder, folder, cache=tmp_path / "file").startswith(
        f"{tmp_path / 'file'}: no folder for prompt"
    )
    assert refusal(WanTextEncoder(folder), 3) == "a prompt is a string, got int"


def test_folders_that_lack_something(copy, tmp_path):
    assert refusal(find_text_encoder, tmp_path / "no") == f"{tmp_path / 'no'}: no such folder"
    both = "expected models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/, or text_encoder/ and tokenizer/"
    assert refusal(find_text_encoder, tmp_path) == f"{tmp_path}: no text encoder; {both}"
    folder = copy("original")
    (folder / wan_files.TOKENIZER / "tokenizer.json").unlink()
    line = f"{folder / wan_files.TOKENIZER}: no tokenizer; expected tokenizer.json or spiece.model there"
    assert refusal(find_text_encoder, folder) == line
    folder = copy("diffusers")
    (folder / "text_encoder" / "config.json").unlink()
    assert refusal(find_text_encoder, folder).startswith(f"{folder / 'text_encoder' / 'config.json'}: no such file")
    shard = next((folder / "text_encoder").glob("*-00002-of-*"))
    shard.unlink()
    assert f"names the shard {shard.name}, which is not beside it" in refusal(find_text_encoder, folder)


def test_wrong_keys_are_told_in_the_files_own_names(copy):
    folder = copy("original")
    file, state = folder / wan_files.TEXT_ENCODER, wan_files.original_text_encoder_state()
    key = "blocks.1.ffn.gate.0.weight"
    for change, message in (
        ({key: None}, f"1 missing key ({key})"),
        ({"decoder.norm.weight": torch.zeros(2)}, "1 unexpected key (decoder.norm.weight)"),
        ({key: torch.zeros(2, 3)}, f"wrong shape: {key} is [2, 3], expected [48, 32]"),
        ({key: torch.zeros(2, dtype=torch.int8)}, f"{key} is torch.int8, expected one of torch.float16"),
        ({"token_embedding.weight": None}, "no UMT5 encoder: no matrix token_embedding.weight; its keys: "),
        ({"blocks.0.attn.q.weight": torch.zeros(2)}, "no UMT5 encoder: no matrix blocks.0.attn.q.weight; its keys: "),
    ):
        replace(file, {name: value for name, value in {**state, **change}.items() if value is not None})
        assert refusal(WanTextEncoder(folder), PROMPT).startswith(f"{file}: {message}")
    replace(file, [1, 2])
    assert refusal(WanTextEncoder(folder), PROMPT) == f"{file}: holds a list, expected a state dict"
    file.write_bytes(b"torn")
    assert refusal(WanTextEncoder(folder), PROMPT).startswith(f"{file}: corrupt, or not a plain PyTorch state dict")


def test_bad_configs_and_tokenizers(copy):
    folder = copy("diffusers")
    config = folder / "text_encoder" / "config.json"
    sizes = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "t5"}, "model_type is 't5', expected 'umt5'"),
        ({"num_layers": "two"}, "no sizes of a UMT5 encoder: "),
    ):
        replace(config, json.dumps({**sizes, **change}))
        assert refusal(WanTextEncoder(folder), PROMPT).startswith(f"{config}: {message}")
    replace(config, json.dumps({**sizes, "num_layers": 3}))
    assert refusal(WanTextEncoder(folder), PROMPT).startswith(
        f"{folder / 'text_encoder'}: 10 missing keys (encoder.block.2."
    )
    replace(folder / "tokenizer" / "tokenizer.json", "{")
    assert refusal(WanTextEncoder(folder), PROMPT).startswith(f"{folder / 'tokenizer'}: no readable tokenizer: ")


def test_weights_that_are_not_finite(copy):
    folder = copy("original")
    file, state = folder / wan_files.TEXT_ENCODER, wan_files.original_text_encoder_state()
    replace(file, {**state, "norm.weight": state["norm.weight"] * float("inf")})
    line = f"{file}: the embedding of '{PROMPT}' is not finite; is it damaged?"
    assert refusal(WanTextEncoder(folder), PROMPT) == line


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_a_package_that_is_not_installed(folders, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refusal(WanTextEncoder(folders["original"]), PROMPT)
    assert line.startswith(f"the text encoder needs {package} (") and line.endswith(
        "): pip install 'hiar-kernels[wan]'"
    )
