"""A Wan model behind the server, on small random weights in the published layout: what viewers see is what `generate`
makes, whatever the VAE, its stream, the dtypes and the way there.
"""

from __future__ import annotations

import functools
import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import lora_files
import numpy as np
import pytest
import torch
import wan_files
from beside import Beside
from safetensors.torch import save_file
from serving import Viewer, pictures, serving, until
from taehv_weights import taehv_state

from hiar_model import ExecutionConfig, PromptSchedule, VideoPipeline, load_video_model
from hiar_model.config import WAN
from hiar_model.planning.fit import vae_config
from hiar_model.serve.admission import Admission
from hiar_model.serve.app import Settings
from hiar_model.serve.jobs import JobRequest
from hiar_model.serve.live import LiveVideo
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.protocol import Refusal, StartMessage
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.states import StateDisk

pytestmark = pytest.mark.cpu

PROMPT, NEXT = wan_files.PROMPT, "a blue square moving up"
SIZE = HEIGHT, WIDTH = 16, 32
FIRST, BLOCK = 9, 12  # pixel frames of the first block, and of each other one


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    return wan_files.write_original(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def model(wan):
    """With --height and --width: its sessions are small unless they ask for more."""
    return load_video_model(wan, "cpu").sized(*SIZE)


@pytest.fixture(scope="module")
def service(model, tmp_path_factory):
    settings = Settings(limits=Limits(4, keep=20))
    with serving(model, tmp_path_factory.mktemp("data"), settings) as running:
        yield running


def frame_of(block: int) -> int:
    return FIRST + BLOCK * (block - 1) if block else 0


@functools.cache
def made(model, blocks, *changes, execution=None, **options):
    """The same video made at once; changes: (block, prompt)."""
    schedule = PromptSchedule.of([(0, PROMPT), *((frame_of(block) / WAN.fps, prompt) for block, prompt in changes)])
    pipeline = VideoPipeline(model, execution)
    return pipeline(None, prompts=schedule, num_frames=frame_of(blocks), order="stream", **options).frames


def take(live, count):
    """The next blocks, those on the way to a place left out."""
    pieces = []
    while len(pieces) < count:
        pieces += filter(None, [live.make()])
    return pieces


def test_a_viewer_gets_what_generate_makes(service, model):
    """And a new prompt at the promised block; on the way back the same pixels."""
    with Viewer(service) as viewer:
        ready = viewer.start(prompt=PROMPT, seed=3)
        assert (ready["height"], ready["width"], ready["fps"], ready["frames_per_block"]) == (*SIZE, 16.0, BLOCK)
        viewer.blocks(1)
        viewer.send("prompt", text=NEXT)
        at = viewer.wait("prompt_scheduled")
        assert at["frame"] == frame_of(at["block"])
        blocks = at["block"] + 1
        viewer.blocks(max(0, blocks - len(viewer.chunks)))
        shown = viewer.chunks[:blocks]
        assert [(b["first_frame"], b["frames"]) for b, _ in shown] == [(0, FIRST)] + [
            (frame_of(n), BLOCK) for n in range(1, blocks)
        ]
        expected = made(model, blocks, (at["block"], NEXT), seed=3)
        assert np.array_equal(pictures(shown), expected)
        assert not np.array_equal(expected[-BLOCK:], made(model, blocks, seed=3)[-BLOCK:])
        viewer.send("seek", block=1)
        viewer.wait("moved")
        again = viewer.blocks(1)
        assert np.array_equal(pictures(again), expected[FIRST : FIRST + BLOCK])


def test_sizes_and_lengths(service, model):
    """What the page offers can be made, and a client may ask for any other size that the model takes."""
    with urllib.request.urlopen(f"{service.url}/v1/info") as answer:
        about = json.load(answer)
    assert about["sizes"] == [list(SIZE), [480, 832], [832, 480], [720, 1280], [1280, 720]]
    assert (about["size_step"], about["first_frames"], about["block_frames"]) == ([16, 16], FIRST, BLOCK)
    for height, width in about["sizes"]:
        model.sized(height, width)
    with Viewer(service) as viewer:
        ready = viewer.start(prompt=PROMPT, height=32, width=16, num_frames=FIRST)
        assert (ready["height"], ready["width"]) == (32, 16)
        assert np.array_equal(pictures(viewer.blocks(1)), made(model, 1, height=32, width=16))
        assert viewer.wait("ended")["frames"] == FIRST
    for wrong, words in (({"height": 40}, "multiple of 16 pixels, got 40"), ({"num_frames": 20}, "nearest 9 or 21")):
        with Viewer(service) as viewer:
            viewer.send("start", v=1, prompt=PROMPT, **wrong)
            refused = viewer.wait("refused")
            assert refused["code"] == "bad_video" and words in refused["message"]


def test_a_whole_video_is_that_of_generate(service, model):
    """Made as a job, whose size stays when the server is started again with another."""
    request = JobRequest(PROMPT, num_frames=FIRST, seed=1)
    frames = service.scheduler.call(lambda: service.jobs.check(request)).result()
    name = service.jobs.add(request, frames)
    assert service.store.get(name)["request"] | {"height": HEIGHT, "width": WIDTH} == service.store.get(name)["request"]
    about = until(lambda: (row := service.store.get(name))["status"] in ("finished", "failed") and row)
    assert about["status"] == "finished" and about["frames"] == FIRST, about
    record = json.loads((service.store.path(name) / "video.mp4.json").read_text())
    assert (record["height"], record["width"], record["prompt"]) == (*SIZE, PROMPT)


def test_a_prompt_is_encoded_once(model, tmp_path):
    asked = []
    counting = replace(model, text_encoder=lambda prompt: asked.append(prompt) or model.text_encoder(prompt))
    with serving(counting, tmp_path) as service:
        for _ in range(2):
            with Viewer(service) as viewer:
                viewer.start(prompt=PROMPT)
                viewer.send("prompt", text=NEXT)
                viewer.wait("prompt_scheduled")
    assert sorted(asked) == sorted({*asked}) and {PROMPT, NEXT} < {*asked}


@pytest.mark.parametrize("kept", ["in memory", "on disk", "nothing"])
def test_a_decoder_that_works_beside(model, tmp_path, kept):
    """Prompts, ways back and restarts while a block is on its way through the decoder."""
    beside = replace(model, new_decoder=lambda: Beside(model.decoder()))
    disk = StateDisk(tmp_path, 10**8, Metrics(), every=1, rate=1e12) if kept == "on disk" else None

    def video():
        states = None if disk is None else disk.of("a")
        memory = 10**8 if kept == "in memory" else 0
        return LiveVideo(beside, ExecutionConfig(), StartMessage(1, PROMPT), rewind_bytes=memory, disk=states)

    live = video()
    first = take(live, 2)
    assert live.run.rollout.blocks_done == 3
    at = live.change_prompt(NEXT)
    assert at.block == 3 and at.frame == frame_of(3)
    first += take(live, 2)
    expected = made(model, 4, (3, NEXT))
    assert np.array_equal(np.concatenate([piece.frames for piece in first]), expected)
    assert live.seek(2).block == 2
    (again,) = take(live, 1)
    assert np.array_equal(again.frames, first[2].frames)
    live.fork(1, NEXT)
    (forked,) = take(live, 1)
    assert forked.first_frame == FIRST
    assert np.array_equal(forked.frames, made(model, 2, (1, NEXT))[FIRST:])
    if disk is not None:
        live.save_state()
        disk.close()
        disk = StateDisk(tmp_path, 10**8, Metrics())
        fresh = video()
        fresh.restore([(0, PROMPT), (1, NEXT)], 2)
        assert fresh.block == 2
        assert np.array_equal(take(fresh, 1)[0].frames, take(live, 1)[0].frames)
        disk.close()


def test_beginning_anew_frees_the_caches_first(model, monkeypatch):
    """Of a large model there is no memory for two of them."""
    import weakref

    from hiar_model.serve import live as module

    live = LiveVideo(model, ExecutionConfig(), StartMessage(1, PROMPT), rewind_bytes=0)
    first = take(live, 1)[0].frames
    rings, alive, make = weakref.ref(live.run.rollout.cache), [], module.VideoRun
    monkeypatch.setattr(module, "VideoRun", lambda *a, **o: alive.append(rings()) or make(*a, **o))
    live.seek(0)
    assert alive == [None] and live.frame_of(1) == FIRST
    assert np.array_equal(take(live, 1)[0].frames, first)


def test_small_vae_lora_and_eight_bits(wan, model, tmp_path):
    """Options of `hiar generate` that `hiar serve` has too."""
    save_file(taehv_state(), tmp_path / "taew2_1.safetensors")
    lora = lora_files.write(tmp_path / "lora", "PEFT", wan_files.native_state())
    other = load_video_model(wan, "cpu", vae=tmp_path / "taew2_1.safetensors", lora=[f"{lora}:0.5"]).sized(*SIZE)
    execution = ExecutionConfig(kv_dtype="float8_e4m3fn", attention_dtype="float8_e4m3fn", linear_dtype="float8_e4m3fn")
    live = LiveVideo(other, execution, StartMessage(1, PROMPT))
    shown = np.concatenate([piece.frames for piece in take(live, 2)])
    assert np.array_equal(shown, made(other, 2, execution=execution))
    assert not np.array_equal(shown[:FIRST], made(model, 1))


def test_memory_is_predicted_for_the_vae_that_decodes(wan, model, tmp_path, monkeypatch):
    """Also where the folder has no transformer; what ended sessions leave in torch's cache counts as free."""
    save_file(taehv_state(), tmp_path / "taew2_1.safetensors")
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in (wan_files.TEXT_ENCODER, wan_files.VAE, "google"):
        (parts / name).symlink_to(wan / name)
    other = load_video_model(parts, "cpu", checkpoint=wan, vae=tmp_path / "taew2_1.safetensors").sized(*SIZE)
    assert vae_config(wan) == {"base_dim": 8}  # not the config.json of the transformer beside it
    start, execution = StartMessage(1, PROMPT), ExecutionConfig()
    full = Admission(model, execution, lambda _: None).predicted(start)
    small = Admission(other, execution, lambda _: None).predicted(start)
    assert small[0] < full[0] and small != full
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    tight = Admission(other, execution, lambda device: sum(small) - 1)
    with pytest.raises(Refusal, match="needs about"):
        tight.admit(start, 0, 0)
    assert not emptied
    monkeypatch.setattr(type(other), "device", torch.device("cuda"))
    monkeypatch.setattr(tight, "predicted", lambda _: small)
    monkeypatch.setattr(tight, "free", lambda device: sum(small) - (not emptied))
    tight.admit(start, 0, 0)
