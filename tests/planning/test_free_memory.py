"""A video that does not fit the memory that is free is refused before any weights are read, with options that fit."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import quantised_files
import torch
import wan_files

from hiar_model import generate, load_video_model
from hiar_model.cli import main
from hiar_model.io.packed import Scaled
from hiar_model.models import wan
from hiar_model.models.checkpoint import loading_bytes
from hiar_model.planning import free_memory
from hiar_model.planning.fit import fit_query, subject
from hiar_model.planning.free_memory import free_bytes, require_memory

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("here")]

CPU = torch.device("cpu")
SIZE = ["--height", "64", "--width", "64", "--num-frames", "33"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(wan_files.write_original(tmp_path_factory.mktemp("wan") / "original"))


@pytest.fixture
def little(monkeypatch):
    """A machine with so many bytes, where small models are looked at too, and nothing may be read."""

    def set_free(nbytes: int) -> None:
        monkeypatch.setattr(free_memory, "SMALL", 0)
        monkeypatch.setattr(free_memory, "free_bytes", lambda device: nbytes)
        for reader in ("load_transformer", "load_vae", "WanTextEncoder"):
            monkeypatch.setattr(wan, reader, lambda *_, **__: pytest.fail("weights are read"))

    return set_free


def need(folder: str, dtype: torch.dtype | None = None, **options: int) -> int:
    """Bytes that are predicted, from the refusal on a machine that has none."""
    return free_memory._need(free_memory.Path(folder), None, CPU, dtype, (), None, order=None, **options).total()


def test_refused_in_one_line_with_what_fits(folder, little, capsys):
    sizes = {"height": 64, "width": 64, "frames": 33}
    half, full = need(folder, torch.bfloat16, **sizes), need(folder, torch.float32, **sizes)
    assert half < full
    little((half + full) // 2)
    assert main(["generate", wan_files.PROMPT, "-o", "a.mp4", "--model", folder, *SIZE, "--dtype", "float32"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(
        r"needs about \d+\.\d GB in float32, \d+\.\d GB of memory are free", told
    )
    assert "these fit: " in told and "--dtype bfloat16 (" in told
    little(half * 3 // 4)
    with pytest.raises(ValueError, match=r"in bfloat16, .* GB of memory are free; .*--height"):
        generate(wan_files.PROMPT, model=folder, height=64, width=64, num_frames=33, device="cpu")


def test_several_orders_at_once_need_their_caches_too(folder, little, capsys, monkeypatch):
    limits = []  # of the options that are proposed, which is slow, and tested below
    monkeypatch.setattr(free_memory.Need, "options", lambda self, limit: limits.append(limit) or iter(()))
    about = free_memory.Path(folder), None, CPU, None, (), None
    one = free_memory._need(*about, order="stream", height=64, width=64, frames=33).total()
    little(one)  # enough for the larger of the two
    words = ["compare", wan_files.PROMPT, "-o", "a.mp4", "--model", folder, *SIZE, "--device", "cpu"]
    assert main(words) == 2
    assert "these videos need about" in capsys.readouterr().err
    assert len(limits) == 1 and 0 < limits[0] < one, "what the other orders take is not free for them"


def test_what_is_said_to_fit_is_accepted(folder, little):
    sizes = {"height": 64, "width": 64, "num_frames": 33}
    little(need(folder, height=64, width=64, frames=33) * 2 // 3)
    with pytest.raises(ValueError, match="these fit: ") as error:
        require_memory(folder, CPU, None, **sizes)
    words = re.findall(r"--([\w-]+) ([\w.]+)", re.split("these fit: |; ", str(error.value))[2])
    numbers = {"height", "width", "window-frames"}
    options = {name.replace("-", "_"): int(value) if name in numbers else value for name, value in words}
    for name, kinds in (("dtype", torch.bfloat16),):
        options.update({name: kinds} if name in options else {})
    require_memory(folder, CPU, options.pop("dtype", None), **{**sizes, **options})


def test_what_fits_what_is_small_and_what_is_no_wan_folder_pass(folder, little, monkeypatch):
    require_memory(folder, CPU, None)  # small
    little(10**13)
    require_memory(folder, CPU, None)
    little(0)
    require_memory("toy", CPU, None)
    require_memory(load_video_model("toy", "cpu"), CPU, None)
    monkeypatch.setattr(free_memory, "free_bytes", lambda device: None)  # a system that does not say
    require_memory(folder, CPU, None)


def test_free_memory_is_what_the_system_says(tmp_path, monkeypatch):
    meminfo, limit, used, stat = (tmp_path / name for name in ("meminfo", "limit", "used", "stat"))
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:  70 kB\nSwapFree:  5 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", str(meminfo))
    monkeypatch.setattr(free_memory, "CGROUPS", ((str(limit), str(used), str(stat)),))
    assert free_bytes(CPU) == 75 * 1024
    limit.write_text("max\n"), used.write_text("9000\n"), stat.write_text("inactive_file 700\nactive_file 300\n")
    assert free_bytes(CPU) == 75 * 1024
    limit.write_text("20000\n")
    assert free_bytes(CPU) == 20000 - 9000 + 1000
    used.write_text("21500\n")
    assert free_bytes(CPU) == 0, "above the limit, which was lowered since"
    monkeypatch.setattr(free_memory, "MEMINFO", str(tmp_path / "none"))
    assert free_bytes(CPU) is None


def test_reading_and_encoding_are_told(folder, capsys, monkeypatch):
    told: list[tuple[str, int]] = []
    model = load_video_model(folder, "cpu", on_stage=lambda text, nbytes: told.append((text, nbytes)))
    model.encode_text(wan_files.PROMPT)
    assert [text for text, _ in told] == [
        "reading the transformer", "reading the text encoder", "encoding the prompt: layer 1 of 2",
        "encoding the prompt: layer 2 of 2",
    ]  # fmt: skip
    assert all(nbytes > 0 for _, nbytes in told)
    from hiar_model.cli import machine

    clock = iter([0.0, 1.0, 2.0, 13.0, 14.0])
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    show = machine.stage_lines()
    for text, nbytes in (("reading", 2 * 10**9), *((f"encoding: layer {n} of 9", 10**10) for n in (1, 2, 3)), ("x", 1)):
        show(text, nbytes)
    assert capsys.readouterr().err.splitlines() == [
        "reading (2.00 GB)", "encoding: layer 1 of 9 (10.00 GB)", "encoding: layer 3 of 9 (10.00 GB)"
    ]  # fmt: skip


@pytest.mark.parametrize("write, size", [(wan_files.write_original, 2), (wan_files.write_diffusers, 4)])
def test_weights_in_the_dtype_of_the_file_are_mapped(tmp_path, write, size):
    """Published: the original text encoder is bfloat16, that of diffusers float32."""
    folder = write(tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float32):
        one = free_memory._need(folder, None, CPU, dtype, (), None, order=None, height=64, width=64, frames=9)
        numbers, found = one.text_encoder
        assert found == size and numbers > 0
        without = free_memory.replace(one, text_encoder=(0, 0)).total()
        assert one.total() - without == (0 if dtype.itemsize == size else numbers * dtype.itemsize)


def test_a_quantised_checkpoint_needs_what_it_becomes(folder, little, tmp_path):
    fp8 = str(quantised_files.write(tmp_path / "w.safetensors", quantised_files.comfy(quantised_files.native())))
    sizes = {"height": 64, "width": 64, "num_frames": 33}
    about = free_memory.Path(folder), fp8, CPU, None, (), None
    need = free_memory._need(*about, order=None, height=64, width=64, frames=33)
    memory = need.query.memory()
    assert memory.total == memory.reading
    little(need.total())
    require_memory(folder, CPU, None, checkpoint=fp8, **sizes)
    little(need.total() - 1)
    with pytest.raises(ValueError, match="this video needs about"):
        require_memory(folder, CPU, None, checkpoint=fp8, **sizes)


def test_merging_lora_takes_memory_where_it_is_merged(folder, little, capsys):
    """Of plain weights on the CPU, of quantised ones on the device."""
    about = subject(folder)
    loading = [
        fit_query(about, height=64, width=64, frames=33, device=device, lora=lora).memory().loading
        for device, lora in (("cpu", False), ("cpu", True), ("cuda", True))
    ]
    assert loading == [0, loading_bytes(wan_files.WAN, torch.bfloat16, lora=True), 0]
    little(need(folder, height=64, width=64, frames=33, lora=True) - 1)
    words = ["generate", wan_files.PROMPT, "-o", "a.mp4", "--model", folder, *SIZE, "--device", "cpu"]
    assert main([*words, "--lora", __file__]) == 2  # before the file is read
    assert "this video needs about" in capsys.readouterr().err


def test_what_does_not_fit_is_not_converted(little, tmp_path, capsys, monkeypatch):
    fp8 = str(quantised_files.write(tmp_path / "w.safetensors", quantised_files.comfy(quantised_files.native())))
    little(1000)
    monkeypatch.setattr(Scaled, "dequantise", lambda *_: pytest.fail("weights are read"))
    assert main(["convert", fp8, str(tmp_path / "out.safetensors"), "--to", "native"]) == 2
    told = capsys.readouterr().err
    assert told == f"hiar: {fp8}: dequantised to bfloat16 it takes 0.1 GB, 0.0 GB of memory are free\n"
    assert not (tmp_path / "out.safetensors").exists()
