"""LoRA files: every spelling means the same numbers, which are added to the right rows; what is not read says so."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import lora_files
import numpy as np
import pytest
import refusals
import torch
from library_lora import merged_by_library
from safetensors.torch import save_file
from tiny_model import make_model

from hiar_model.cli import main
from hiar_model.common import lora_file
from hiar_model.common.lora_file import LoraFile
from hiar_model.models.checkpoint import load_transformer, read_checkpoint, save_transformer
from hiar_model.models.lora import merged, read_lora

pytestmark = pytest.mark.cpu

SCALE = 0.75
Q = "blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_transformer(make_model(), path)
    return path


STATE = {key: value.clone() for key, value in make_model().state_dict().items()}


def equals(state, want, atol: float = 2e-7) -> None:
    assert state.keys() == want.keys()
    for key, value in state.items():
        np.testing.assert_allclose(value.double().numpy(), want[key], rtol=2e-7, atol=atol, err_msg=key)


@pytest.mark.parametrize("spelling", lora_files.SPELLINGS)
def test_every_spelling_is_the_same_merge(base, tmp_path, spelling):
    file = lora_files.write(tmp_path / "l", spelling, STATE)
    notes = []
    model = load_transformer(base, lora=(file, SCALE), on_lora=lambda lora, note: notes.append((lora, note)))
    equals(model.state_dict(), lora_files.expected(STATE, SCALE))
    (lora, note) = notes[0]
    assert lora.scale == SCALE and len(lora.sha256) == 64 and len(notes) == 1
    kind = "PEFT" if spelling == "training" else spelling
    assert f"{kind} keys: 10 layers of ranks 1 to 4; merged at scale 0.75" in note


@pytest.mark.parametrize("spelling", lora_files.OF_LIBRARIES)
def test_diffusers_and_peft_merge_the_same(tmp_path, spelling):
    modules = lora_files.OF_LIBRARIES[spelling]
    state = dict(STATE)
    for module in modules:
        key = f"{module}.weight"
        state[key] = torch.from_numpy(lora_files.formula(f"{module} base", *STATE[key].shape))
    lora = read_lora(lora_files.write(tmp_path, spelling, state, modules), state)
    got = merged(state, [(lora, SCALE)])
    for module, want in merged_by_library(tmp_path / "library", spelling, modules, SCALE).items():
        torch.testing.assert_close(got[f"{module}.weight"], want, rtol=1e-6, atol=1e-6)


def test_q_alone_reaches_its_rows_of_the_fused_weight(base, tmp_path):
    file = lora_files.write(tmp_path, "native", STATE, {Q: (2, 2.0)})
    fused = load_transformer(base, lora=file).blocks[0].self_attn.qkv.weight
    before = load_transformer(base).blocks[0].self_attn.qkv.weight
    changed = (fused != before).any(1)
    assert changed[: len(fused) // 3].all() and not changed[len(fused) // 3 :].any()


def test_several_files_add_up_and_are_rounded_once(base, tmp_path):
    first = lora_files.write(tmp_path, "kohya", STATE, name="first")
    second = lora_files.write(tmp_path, "ComfyUI", STATE, {Q: (3, 6.0)}, name="second")
    want = lora_files.expected(STATE, 0.5)
    want[f"{Q}.weight"] += lora_files.expected(STATE, -2.0, {Q: (3, 6.0)})[f"{Q}.weight"] - STATE[f"{Q}.weight"].numpy()
    model = load_transformer(base, lora=[f"{first}:0.5", (second, -2.0)])
    equals(model.state_dict(), want)
    half = load_transformer(base, lora=[f"{first}:0.5", (second, -2.0)], dtype=torch.bfloat16)
    assert torch.equal(half.state_dict()[f"{Q}.weight"], torch.from_numpy(want[f"{Q}.weight"]).to(torch.bfloat16))
    narrow = {key: value.bfloat16() for key, value in STATE.items()}
    got = merged(narrow, [(read_lora(first, STATE), 0.5), (read_lora(second, STATE), -2.0)])[f"{Q}.weight"]
    added = want[f"{Q}.weight"] - STATE[f"{Q}.weight"].double().numpy()
    assert torch.equal(got, (narrow[f"{Q}.weight"].double() + torch.from_numpy(added)).to(torch.bfloat16))


def test_plain_differences_and_biases(base, tmp_path):
    more = {
        f"diffusion_model.{Q}.diff_b": torch.full((16,), 0.25),
        "diffusion_model.blocks.0.norm3.diff": torch.full((16,), 0.5),
        "diffusion_model.blocks.1.modulation.diff": torch.full((1, 6, 16), 2.0),
        "diffusion_model.blocks.0.ffn.2.diff": torch.ones(16, 32),
    }
    want = lora_files.expected(STATE, SCALE)
    want[f"{Q}.bias"] += 0.25 * SCALE
    want["blocks.0.norm3.weight"] += 0.5 * SCALE
    want["blocks.1.modulation"] += 2.0 * SCALE
    want["blocks.0.ffn.2.weight"] += SCALE
    file = lora_files.write(tmp_path, "ComfyUI", STATE, more=more)
    equals(load_transformer(base, lora=(file, SCALE)).state_dict(), want, atol=4e-7)


def test_a_bias_of_peft_counts_with_alpha(base, tmp_path):
    key = "base_model.model.blocks.0.attn1.to_q.lora_B.bias"
    file = lora_files.write(tmp_path, "PEFT", STATE, {Q: (2, 4.0)}, {key: torch.full((16,), 0.25)})
    want = lora_files.expected(STATE, SCALE, {Q: (2, 4.0)})
    want[f"{Q}.bias"] += 0.25 * SCALE * 4 / 2
    equals(load_transformer(base, lora=(file, SCALE)).state_dict(), want)
    lora = read_lora(file, STATE)
    for _ in range(2):  # the adapter itself stays as it is
        equals(merged(STATE, [(lora, SCALE)]), want)


def test_rank_stabilised(base, tmp_path):
    file = lora_files.write(tmp_path, "PEFT", STATE, {Q: (4, 4.0)})
    config = json.loads((file / "adapter_config.json").read_text())
    (file / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    want = lora_files.expected(STATE, 1.0, {Q: (4, 4.0 * 2)})  # / sqrt(4) in place of / 4
    equals(load_transformer(base, lora=file).state_dict(), want)


def test_a_configuration_beside_another_file_is_not_of_it(base, tmp_path):
    folder = lora_files.write(tmp_path, "PEFT", STATE, {Q: (4, 4.0)})
    file = lora_files.write(folder, "native", STATE, {Q: (2, 6.0)})
    equals(load_transformer(base, lora=file).state_dict(), lora_files.expected(STATE, 1.0, {Q: (2, 6.0)}))


def test_of_several_patterns_the_first_counts(base, tmp_path):
    """As PEFT has it."""
    file = lora_files.write(tmp_path, "PEFT", STATE, {Q: (4, 4.0)})
    config = json.loads((file / "adapter_config.json").read_text())
    patterns = {"attn1.to_k": 1.0, "to_q": 8.0, "blocks.0.attn1.to_q": 2.0}
    (file / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": patterns}))
    equals(load_transformer(base, lora=file).state_dict(), lora_files.expected(STATE, 1.0, {Q: (4, 8.0)}))


def test_the_patch_embedding(base, tmp_path):
    weight = STATE["patch_embedding.weight"]
    down, up = lora_files.factors("patch", 2, weight)
    tensors = {
        "patch_embedding.lora_A.weight": torch.from_numpy(down).view(2, *weight.shape[1:]),
        "patch_embedding.lora_B.weight": torch.from_numpy(up).view(len(up), 2, 1, 1, 1),
    }
    save_file(tensors, tmp_path / "patch.safetensors")
    got = load_transformer(base, lora=tmp_path / "patch.safetensors").state_dict()["patch_embedding.weight"]
    want = weight.double().numpy() + (up.astype(np.float64) @ down).reshape(weight.shape)
    np.testing.assert_allclose(got.double().numpy(), want, rtol=2e-7, atol=2e-7)


def test_keys_of_a_text_encoder_are_named_and_left_out(base, tmp_path):
    more = {"lora_te_layers_0_q.lora_down.weight": torch.ones(2, 4), "text_encoder.a.lora_B.weight": torch.ones(4, 2)}
    file = lora_files.write(tmp_path, "kohya", STATE, more=more)
    notes = []
    model = load_transformer(base, lora=file, on_lora=lambda _, note: notes.append(note))
    equals(model.state_dict(), lora_files.expected(STATE, 1.0))
    assert "left out: 2 keys of a text encoder (lora_te_layers_0_q.lora_down.weight, text_encoder.a" in notes[0]
    save_file(more, tmp_path / "te.safetensors")
    assert "no adapter found: only keys of a text encoder" in refusal(tmp_path / "te.safetensors")


refusal = partial(refusals.refusal, lambda path, state=STATE: read_lora(path, state))
A, B = torch.ones(2, 16), torch.ones(16, 2)
PATCH = "patch_embedding"
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**PAIR, f"{Q}.dora_scale": B}, f"{Q}.dora_scale makes it a DoRA adapter, which is not read; legal: LoRA"),
        ({**PAIR, f"{Q}.lora_magnitude_vector.weight": B}, "makes it a DoRA adapter"),
        ({f"{Q}.lokr_w1": A}, "makes it a LoKr adapter"),
        ({f"{Q}.hada_w1_a": A}, "makes it a LoHa adapter"),
        ({f"{Q}.oft_blocks": A}, "makes it an OFT adapter"),
        ({**PAIR, f"{Q}.lora_mid.weight": A}, "in Tucker form"),
        ({f"{Q}.set_weight": A}, "whole layers"),
        ({**PAIR, "blocks.0.cross_attn.k_img.lora_A.weight": A}, "a LoRA of an image-to-video model"),
        ({f"{Q}.lora_A.weight": A}, f"{Q} has down (lora_A) but no up (lora_B)"),
        ({f"{Q}.alpha": torch.tensor(2.0)}, f"{Q} has alpha alone"),
        ({**PAIR, f"{Q}.lora_A.weight": torch.ones(3, 16)}, "down is [3, 16] and up [16, 2], of different rank"),
        ({**PAIR, f"{Q}.lora_A.weight": torch.ones(2, 5)}, f"its {Q}.weight is [16, 5], that of this trans"),
        ({**PAIR, "blocks.7.ffn.0.lora_A.weight": A}, "1 keys are of no layer of this transformer: blocks.7"),
        ({**PAIR, f"{Q}.lora_A.weight": A * torch.nan}, f"{Q}, down: numbers that are not finite"),
        ({**PAIR, f"{Q}.lora_B.weight": B / torch.tensor([0.0, 1.0])}, f"{Q}, up: numbers that are not finite"),
        (
            {f"{PATCH}.lora_A.weight": torch.ones(2, 2, 1, 2, 2), f"{PATCH}.lora_B.weight": torch.ones(16, 2, 1, 2, 2)},
            f"{PATCH}.weight: up is [16, 2, 1, 2, 2], expected [out, rank] and sizes of 1",
        ),
        ({**PAIR, f"{Q}.alpha": torch.tensor(torch.inf)}, f"alpha of {Q} must be a finite number, got inf"),
        ({**PAIR, "blocks.0.attn1.to_q.lora_A.weight": A}, f"is there twice (as {Q}, down)"),
        ({**PAIR, "transformer_2.blocks.0.attn1.to_k.lora_A.weight": A}, "adapters of two experts"),
        ({"blocks.0.norm3.diff": torch.ones(3)}, "blocks.0.norm3.weight is [3], that of this transformer [16]"),
        ({f"{Q}.lora_A.weight": A.to(torch.int8), f"{Q}.lora_B.weight": B}, "torch.int8"),
    ],
)  # fmt: skip
def test_what_is_not_read(tmp_path, tensors, message):
    file = tmp_path / "x.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, file)
    line = refusal(file)
    assert line.startswith(f"{file}: ") and message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora makes it a DoRA adapter"),
        ({"peft_type": "LOHA"}, "describes an adapter of kind LOHA, expected LORA"),
        ({"init_lora_weights": "PiSSA"}, "init_lora_weights 'PiSSA' changes the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base weights"),
        ({"alpha_pattern": {"attn1.to_q": "x"}}, "alpha of blocks.0.attn1.to_q must be a finite number, got 'x'"),
    ],
)
def test_what_the_configuration_of_peft_refuses(tmp_path, change, message):
    folder = lora_files.write(tmp_path, "PEFT", STATE, {Q: (2, 4.0)})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    assert message in refusal(folder)


def test_other_files(base, tmp_path):
    torch.save({"critic_lora": PAIR}, tmp_path / "c.pt")
    assert "holds critic_lora, expected generator_lora or lora" in refusal(tmp_path / "c.pt")
    assert "keys are of no layer" in refusal(base)
    assert refusal(tmp_path / "none.pt") == f"{tmp_path / 'none.pt'}: no such file or folder"
    (tmp_path / "c.pt").unlink()
    for name in "ab":
        save_file(PAIR, tmp_path / f"{name}.safetensors")
    assert "two files for the LoRA in" in refusal(tmp_path)
    line = refusals.refusal(load_transformer, base, lora=(tmp_path / "a.safetensors", 1e38), dtype=torch.float16)
    assert line.startswith(
        f"{Q}.weight is not finite in torch.float16 with {tmp_path / 'a.safetensors'} at scale 1e+38"
    )


@pytest.mark.parametrize(
    ("given", "path", "scale"),
    [("a.pt", "a.pt", 1.0), ("a.pt:0.5", "a.pt", 0.5), ("a.pt:-1e-3", "a.pt", -0.001), (("a:2", 3), "a:2", 3.0),
     (r"C:\x\a.pt", r"C:\x\a.pt", 1.0), ("there:2", "there:2", 1.0)],
)  # fmt: skip
def test_file_and_scale(tmp_path, monkeypatch, given, path, scale):
    monkeypatch.chdir(tmp_path)
    Path("there:2").touch()
    assert LoraFile.of(given) == LoraFile(path, scale)
    assert LoraFile.of(str(LoraFile(path, scale))) == LoraFile(path, scale)
    assert lora_file.lora_files((path, np.float32(2))) == lora_file.lora_files((path, 2))


@pytest.mark.parametrize(
    ("given", "message"),
    [("there:x", "lora there:x: the scale must be a number, got"), ("a:inf", "lora scale must be a finite number, got"),
     ("a:1e39", "lora scale must be a number from -3e+38 to 3e+38, got 1e+39"),
     ("", "lora must be the path of a file or folder, got ''"), (3, "lora must be the path"), (("a", "b"), "finite")],
)  # fmt: skip
def test_a_wrong_scale(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    assert message in refusals.refusal(LoraFile.of, given)


@pytest.mark.parametrize("given", [{"a.safetensors": 0.5}, 5, b"a.safetensors"])
def test_what_is_neither_a_file_nor_a_list_of_them(given):
    assert "lora must be a file, (file, number), or a list" in refusals.refusal(lora_file.lora_files, given)


@pytest.mark.parametrize("to", ["native", "pt"])
def test_convert_bakes_it_in(base, tmp_path, capsys, to):
    file = lora_files.write(tmp_path / "l", "diffusers", STATE)
    target = tmp_path / {"native": "n.safetensors", "pt": "p.pt"}[to]
    assert main(["convert", str(base), str(target), "--to", to, "--lora", f"{file}:{SCALE}"]) == 0
    assert f"LoRA {file}, diffusers keys: 10 layers of ranks 1 to 4; merged at scale 0.75" in capsys.readouterr().out
    equals(read_checkpoint(target)[0], lora_files.expected(STATE, SCALE))


def test_convert_of_an_illegal_one_writes_nothing(base, tmp_path, capsys):
    save_file({f"{Q}.lokr_w1": A}, tmp_path / "k.safetensors")
    words = ["convert", str(base), str(tmp_path / "o.safetensors"), "--to", "native", "--lora"]
    assert main([*words, str(tmp_path / "k.safetensors")]) == 2
    assert "LoKr" in capsys.readouterr().err and not (tmp_path / "o.safetensors").exists()
    assert main([*words, "missing.safetensors:2"]) == 2
    assert capsys.readouterr().err == "hiar: --lora missing.safetensors: no such file; expected FILE or FILE:SCALE\n"
