"""The live server over a real WebSocket: what it sends, changes, refuses, keeps and lets go."""

from __future__ import annotations

import io
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from serving import PROMPT, Viewer, frames_of, pictures, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hiar_model import ExecutionConfig, PromptSchedule, VideoPipeline
from hiar_model.planning import memory
from hiar_model.serve.admission import Admission
from hiar_model.serve.app import Settings
from hiar_model.serve.protocol import FROM_SERVER, StartMessage, parse
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.session import WINDOW

pytestmark = pytest.mark.cpu

BLUE = "a blue square moving up"


def made(model, num_frames, *changes, **options):
    """The same video made at once; changes: (block, prompt)."""
    schedule = PromptSchedule.of([(0, PROMPT), *((3 * block / model.fps, prompt) for block, prompt in changes)])
    return VideoPipeline(model)(None, prompts=schedule, num_frames=num_frames, order="stream", **options).frames


def test_a_viewer_gets_the_video(service, model):
    with Viewer(service) as viewer:
        ready = viewer.start(seed=3)
        chunks = viewer.blocks(4)
    assert (ready["width"], ready["height"], ready["fps"], ready["frames_per_block"]) == (32, 32, 12.0, 3)
    assert ready["plan"][0] == [["denoise", 0, 0]] and ready["order"] == "stream" and ready["num_frames"] is None
    assert [(b["seq"], b["block"], b["first_frame"], b["frames"]) for b, _ in chunks] == [
        (n, n, 3 * n, 3) for n in range(4)
    ]
    assert np.array_equal(pictures(chunks), made(model, 12, seed=3))
    for message in viewer.messages:
        parse(json.dumps(message), FROM_SERVER)  # all as published
    stats = chunks[-1][0]["stats"]
    assert stats["first_chunk_s"] > 0 and stats["memory"] > 1e7 and stats["fps"] > 0 and stats["sessions"] >= 1
    assert {m["type"] for m in viewer.messages} >= {"ready", "progress", "block"}


def test_an_mp4_plays_from_its_init_segment(service, model):
    import base64

    with Viewer(service) as viewer:
        ready = viewer.start(format="mp4", num_frames=6)
        viewer.blocks(2)
        assert viewer.wait("ended") == {"type": "ended", "reason": "complete", "frames": 6, "resume": False}
    data = base64.b64decode(ready["init"]) + b"".join(payload for _, payload in viewer.chunks)
    with av.open(io.BytesIO(data)) as file:
        times = [float(frame.time) for frame in file.decode(video=0)]
    assert np.allclose(times, np.arange(6) / 12) and ready["mime"].startswith("video/mp4; codecs=")
    assert (ready["width"], ready["height"]) == (256, 256)


def test_the_prompt_changes_where_promised(service, model):
    with Viewer(service) as viewer:
        viewer.start()
        viewer.blocks(2)
        viewer.send("prompt", text=BLUE)
        at = viewer.wait("prompt_scheduled")
        viewer.blocks(at["block"] + 2 - len(viewer.chunks))
    assert at["prompt"] == BLUE and at["frame"] == 3 * at["block"] and at["prompt_index"] == 1
    shown = viewer.chunks[: at["block"] + 2]
    assert [b["prompt"] for b, _ in shown] == [PROMPT] * at["block"] + [BLUE] * 2
    assert np.array_equal(pictures(shown), made(model, 3 * len(shown), (at["block"], BLUE)))


def test_rewind_and_fork(service, model):
    with Viewer(service) as viewer:
        viewer.start()
        first = viewer.blocks(5)
        viewer.send("seek", block=2)
        assert viewer.wait("moved") | {"type": 0} == {
            "type": 0, "block": 2, "frame": 6, "prompt_index": 0, "why": "seek", "prompt": PROMPT,
        }  # fmt: skip
        again = viewer.blocks(2)
        viewer.send("fork", block=1, prompt=BLUE)
        assert viewer.wait("moved")["why"] == "fork"
        forked = viewer.blocks(2)
        viewer.send("fork", block=99, prompt=BLUE)
        assert viewer.wait("refused")["code"] == "no_such_block"
        viewer.blocks(1)  # and it goes on
    assert [b["block"] for b, _ in again + forked] == [2, 3, 1, 2]
    seqs = [b["seq"] for b, _ in viewer.chunks]
    assert seqs == sorted(set(seqs))
    assert np.array_equal(pictures(again), pictures(first[2:4]))
    assert np.array_equal(pictures(forked), made(model, 9, (1, BLUE))[3:])


def test_pause_play_and_stop(service):
    with Viewer(service) as viewer:
        session = service.scheduler.sessions[viewer.start()["session"]]
        viewer.blocks(1)
        viewer.send("pause")
        assert viewer.wait("state") == {"type": "state", "playing": False}
        until(lambda: not session.pending)
        before = session.seq
        viewer.send("play")
        viewer.wait("state")
        until(lambda: session.seq > before)
        viewer.send("stop")
        assert viewer.wait("ended")["reason"] == "stopped"
        with pytest.raises(ConnectionClosed) as closed:
            viewer.receive()
    assert closed.value.rcvd.code == 1000
    assert session.id not in service.scheduler.sessions


def test_what_was_shown_is_saved(service, model):
    with Viewer(service) as viewer:
        viewer.start(format="mp4")
        viewer.blocks(3)
        viewer.send("fork", block=1, prompt=BLUE)
        viewer.wait("moved")
        viewer.blocks(2)
        viewer.send("pause")
        viewer.wait("state")
        viewer.send("save")
        saved = viewer.wait("saved")
    with urllib.request.urlopen(service.url + saved["url"]) as answer:
        content, kind = answer.read(), answer.headers["content-type"]
    shown = frames_of(content)
    assert kind == "video/mp4" and len(shown) == saved["frames"] >= 9
    expected = made(model, saved["frames"], (1, BLUE)).repeat(8, 1).repeat(8, 2)
    assert np.abs(shown.astype(int) - expected).mean() < 12  # H.264, and enlarged smoothly
    with urllib.request.urlopen(f"{service.url}{saved['url'].replace('content', 'record')}") as answer:
        record = json.load(answer)
    assert record["prompts"] == [[0.0, PROMPT], [0.25, BLUE]] and record["frames"] == saved["frames"]
    assert "command" not in record, "none makes this video"


def test_generation_waits_for_the_viewer(service):
    """A client that does not acknowledge gets a window of chunks; nothing grows."""
    with Viewer(service) as viewer:
        session = service.scheduler.sessions[viewer.start()["session"]]
        while len(viewer.chunks) < WINDOW:
            viewer.receive()
        with Viewer(service) as other:  # whose blocks take their turns meanwhile
            other.start()
            other.blocks(3)
        assert session.seq == WINDOW - 1 and not session.pending and not session.hungry
        viewer.send("ack", seq=0)
        assert viewer.wait("block")["seq"] == WINDOW


def test_a_lost_viewer_resumes_without_a_frame_lost_or_doubled(service, model):
    viewer = Viewer(service)
    ready = viewer.start()
    viewer.blocks(2)
    viewer.vanish()
    with Viewer(service) as other:
        again = other.start(resume=ready["token"], after=viewer.chunks[-1][0]["seq"])
        assert again["resumed"] and again["session"] == ready["session"]
        other.blocks(4)
        with Viewer(service) as third:  # takes over while the other still is there; knows of one chunk less
            third.start(resume=ready["token"], after=other.chunks[-1][0]["seq"])
            third.blocks(2)
    shown = viewer.chunks + other.chunks + third.chunks
    assert [b["seq"] for b, _ in shown] == list(range(8))
    assert np.array_equal(pictures(shown), made(model, 24))


def test_a_page_that_was_loaded_anew_gets_again_what_it_had_acked(service, model):
    """It acks chunks before they are shown, so that a slow model need not wait."""
    viewer = Viewer(service)
    ready = viewer.start()
    assert ready["scheduled"] == [[0, 0, 0, PROMPT]]
    viewer.blocks(WINDOW + 2)
    viewer.send("prompt", text=BLUE)
    at = viewer.wait("prompt_scheduled")
    viewer.send("pause")
    viewer.wait("state")
    last, session = viewer.chunks[-1][0], service.scheduler.sessions[ready["session"]]
    until(lambda: session.acked == last["seq"])
    viewer.socket.socket.close()
    with Viewer(service) as other:
        again = other.start(resume=ready["token"], after=last["seq"] - 2)
        assert again["scheduled"] == [[0, 0, 0, PROMPT], [at["block"], at["frame"], 1, BLUE]]
        other.wait("block"), other.wait("block")
    with Viewer(service) as third:
        third.start(resume=ready["token"], after=-1)  # as far back as the server can
        first = third.wait("block")
    assert [b["seq"] for b, _ in other.chunks[:2]] == [last["seq"] - 1, last["seq"]]
    assert other.chunks[1][1] == viewer.chunks[-1][1] and 0 < first["seq"] <= last["seq"] - WINDOW + 1
    with Viewer(service) as fourth:
        fourth.start(resume=ready["token"])
        for kind, fields in (
            ("seek", {"block": 99}),
            ("seek", {"block": -1}),
            ("fork", {"block": 0, "prompt": "pink"}),
        ):
            fourth.send(kind, **fields)
            assert fourth.wait("refused")["about"] == kind


def test_who_comes_back_to_a_finished_video_hears_its_end(service):
    viewer = Viewer(service)
    token = viewer.start(num_frames=6)["token"]
    viewer.blocks(2)
    viewer.wait("ended")
    viewer.vanish()
    with Viewer(service) as other:
        other.start(resume=token, after=1)
        assert other.wait("ended") == {"type": "ended", "reason": "complete", "frames": 6, "resume": False}


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_lost_viewer_leaves_nothing(model, tmp_path, keep):
    import gc
    import weakref

    with serving(model, tmp_path, Settings(limits=Limits(keep=keep))) as service:
        viewer = Viewer(service)
        ready = viewer.start()
        viewer.blocks(1)
        session = weakref.ref(next(iter(service.scheduler.sessions.values())))
        rings = weakref.ref(session().video.run.rollout.cache)
        spool = session().spool.path
        assert spool.exists()
        viewer.vanish()
        until(lambda: not service.scheduler.sessions)
        until(lambda: not spool.exists() and rings() is None)
        gc.collect()
        assert until(lambda: session() is None)
        with Viewer(service) as late:
            late.send("start", v=1, resume=ready["token"])
            assert late.wait("refused")["code"] == "unknown_session"


def test_no_place_is_said_before_and_after_the_upgrade(model, tmp_path, caplog):
    with serving(model, tmp_path, Settings(limits=Limits(1, keep=30))) as service:
        with Viewer(service) as viewer:
            ready = viewer.start()
            with pytest.raises(InvalidStatus) as refused:
                Viewer(service)
            assert refused.value.response.status_code == 503
            assert int(refused.value.response.headers["retry-after"]) >= 1
        until(lambda: next(iter(service.scheduler.sessions.values())).detached)
        with Viewer(service) as late:  # a kept session may come back, so the upgrade is allowed
            late.send("start", v=1, prompt=PROMPT)
            message = late.wait("refused")
            assert message["code"] == "busy" and message["closes"] and 1 <= message["retry_after"] <= 30
        with Viewer(service) as back:
            assert back.start(resume=ready["token"])["resumed"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_memory_that_is_not_free_is_refused(model, tmp_path):
    free = [10**9]
    with serving(model, tmp_path, free=lambda _: free[0]) as service, Viewer(service) as viewer:
        viewer.start()
        need = next(iter(service.scheduler.sessions.values())).reserved
        free[0] = need  # what the first one may still take is not free for another
        with Viewer(service) as other:
            other.send("start", v=1, prompt=PROMPT)
            message = other.wait("refused")
        assert message["code"] == "busy" and "MB" in message["message"] and message["retry_after"] > 0
        viewer.blocks(1)


def test_a_new_length_needs_no_new_prediction(model):
    """Which takes a second of the thread that makes everybody's blocks."""
    admission = Admission(model, ExecutionConfig(), lambda _: None)
    endless, short = (admission.predicted(StartMessage(1, PROMPT, num_frames=n)) for n in (None, 6))
    before = memory._counted.cache_info().misses
    assert admission.predicted(StartMessage(1, PROMPT, num_frames=300)) == endless
    assert admission.predicted(StartMessage(1, PROMPT, num_frames=303)) == endless > short
    assert memory._counted.cache_info().misses == before


def test_the_neediest_viewer_is_next(model, tmp_path):
    """Two viewers at once: neither waits for the other's whole video."""
    with serving(model, tmp_path) as service, Viewer(service) as a, Viewer(service) as b:
        a.start()
        b.start()
        for viewer in (a, b):
            viewer.blocks(5)
        sessions = service.scheduler.sessions.values()
        assert all(session.seq >= 4 for session in sessions)
        assert len(pictures(a.chunks)) == 15 and np.array_equal(pictures(a.chunks), pictures(b.chunks))


def test_metrics_and_health(service):
    with urllib.request.urlopen(f"{service.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
    assert values["hiar_blocks_total"] > 0 and values["hiar_first_chunk_seconds_count"] > 0
    with urllib.request.urlopen(f"{service.url}/healthz") as answer:
        assert json.load(answer)["status"] == "ok"


def test_connects_and_drops_leave_nothing(model, tmp_path):
    import os

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    limits = Limits(4, keep=0)
    with serving(model, tmp_path, Settings(limits=limits)) as service:
        with Viewer(service) as viewer:
            viewer.start()
        until(lambda: not service.scheduler.sessions)
        threads, files = threading.active_count(), descriptors()
        for turn in range(32):  # 200: python -m bench.serve --drops 200
            try:
                viewer = Viewer(service)
            except InvalidStatus:  # those before are not yet gone
                continue
            if turn % 4 == 0:
                viewer.send("start", v=1, prompt=PROMPT, format="webp")
            elif turn % 4 == 1:
                viewer.send("nonsense")
            viewer.vanish()
        until(lambda: not service.scheduler.sessions and not service.clients, "sessions to go")
        until(lambda: threading.active_count() <= threads + 1, "threads to go")
        until(lambda: descriptors() <= files + 2, "files to be closed")
        until(lambda: not list((tmp_path / "sessions").iterdir()), "spools to be deleted")
        with Viewer(service) as viewer:
            viewer.start()
            viewer.blocks(1)


def test_the_server_ends_in_good_order(model, tmp_path):
    with serving(model, tmp_path) as service:
        viewer = Viewer(service)
        viewer.start()
        viewer.blocks(1)
    assert viewer.wait("ended")["reason"] == "drained"
    with pytest.raises(ConnectionClosed) as closed:
        viewer.receive()
    assert closed.value.rcvd.code == 1012
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{service.url}/healthz")


def test_the_client_of_the_documents(service, model, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs/howto/serve.md").read_text(encoding="utf-8")
    code = text.partition("```python\n# needs a running server\n")[2].partition("```")[0]
    address = service.url.removeprefix("http://")
    assert code.count("127.0.0.1:8000") == 1 and len(code.splitlines()) <= 36
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("127.0.0.1:8000", address), "serve.md", "exec"), {})
    frame = int(capsys.readouterr().out.split()[-2])
    shown = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(tmp_path.glob("*.webp"))])
    assert np.array_equal(shown, made(model, 36, (frame // 3, BLUE), seed=7)) and 0 < frame < 36
