"""Live sessions outlive the server: records, states on disk, the way back; damage, a full disk, kill -9."""

from __future__ import annotations

import errno
import json
import signal
import sqlite3
import urllib.request

import numpy as np
import pytest
from live_sessions import OFTEN, blocks, counted, made, pictures, running, video
from serving import PROMPT, Viewer, ask, frames_of, serving, until

from hiar_model import VideoPipeline
from hiar_model.rollout import state_io
from hiar_model.serve.app import Settings
from hiar_model.serve.metrics import Metrics
from hiar_model.serve.protocol import Refusal, StartMessage
from hiar_model.serve.scheduler import Limits
from hiar_model.serve.session import WINDOW, ViewerSession
from hiar_model.serve.states import StateDisk, least_useful

pytestmark = pytest.mark.cpu

BLUE, GREEN = "a blue square moving up", "a green triangle moving left"


def metric(service, name):
    with urllib.request.urlopen(f"{service.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


# What follows for a client from what it has


def session(acked, *jumps):
    one = ViewerSession(StartMessage(1, PROMPT), None, "")
    one.acked, one.jumps, one.stored = acked, list(jumps), [(0, PROMPT)]
    return one


@pytest.mark.parametrize(
    ("acked", "jumps", "after", "block"),
    [
        (-1, [(0, 0)], None, 0),
        (5, [(0, 0)], None, 6),
        (5, [(0, 0)], 8, 9),
        (5, [(0, 0)], 3, 6),  # what was acknowledged is not sent again
        (5, [(0, 0), (9, 4)], None, 4),  # a jump that the client may not know of
        (5, [(0, 0), (9, 4)], 10, 6),
        (5, [(0, 0), (9, 7)], 6, 7),
        (5, [(0, 0), (9, 7)], 5, 6),  # a block before the jump is still to come
        (5, [(0, 0), (9, 7), (11, 2)], 9, 2),
        (-1, [(0, 0), (2, 1)], None, 0),
    ],
)
def test_the_next_block(acked, jumps, after, block):
    one = session(acked, *jumps)
    assert one.next_block(after) == block
    last = max(acked, jumps[-1][0] - 1) + WINDOW
    one.require_sent("after", last)
    with pytest.raises(Refusal, match=f"after must be at most {last}, the last chunk, got {last + 1}"):
        one.require_sent("after", last + 1)


def test_jumps_that_the_client_knows_of_are_forgotten():
    one = session(-1, (0, 0))
    one.seq, one.block = 6, 7
    one.jumped(4, 0.0)
    assert (one.block, one.jumps) == (4, [(0, 0), (7, 4)])
    one.jumped(2, 0.0)  # before a chunk was sent
    assert one.jumps == [(0, 0), (7, 2)]
    one.acknowledge(6, 0.0)
    assert one.jumps == [(0, 0), (7, 2)]
    one.acknowledge(7, 0.0)
    assert one.jumps == [(7, 2)]


# States on disk


@pytest.mark.parametrize("order", ["stream", "wavefront"])
def test_states_on_disk_shorten_the_way_back(model, disk, order):
    """With none in memory, as of a large model."""
    live = video(model, disk, order=order)
    first = blocks(live, 8, disk)
    assert not live.states and [file.block for file in live.disk.files] == [2, 4, 6, 8]
    numbers = counted(live)
    live.seek(5)
    again = blocks(live, 2)
    assert min(numbers) >= 4 if order == "stream" else min(numbers) > 0
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first[5:7], again, strict=True))
    live.fork(3, GREEN)
    assert all(file.started < 3 for file in live.disk.files)  # the others are of another video now
    forked = blocks(live, 3, disk)
    assert np.array_equal(np.stack([piece.frames[0] for piece in forked]), made(model, 6, (3, GREEN))[3:])


def test_a_video_is_restored_from_disk(model, disk):
    live = video(model, disk)
    blocks(live, 3, disk)
    at = live.change_prompt(BLUE).block
    first = blocks(live, 4, disk)
    fresh = video(model, StateDisk(disk.folder, 10**8, Metrics(), **OFTEN))
    numbers = counted(fresh)
    fresh.restore([(0, PROMPT), (at, BLUE)], 5)
    again = blocks(fresh, 2)
    assert [piece.block for piece in again] == [5, 6] and min(numbers) == 4
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(first[2:], again, strict=True))
    other = video(model, StateDisk(disk.folder, 10**8, Metrics(), **OFTEN))
    other.restore([(0, PROMPT), (2, GREEN)], 5)  # of a fork that left stale states when it was killed
    assert np.array_equal(blocks(other, 1)[0].frames[0], made(model, 6, (2, GREEN))[5])


def test_damaged_states(model, disk, caplog):
    """An older one serves; without one, the session is refused."""
    live = video(model, disk)
    first = blocks(live, 6, disk)
    last = live.disk.files[-1].path
    last.write_bytes(last.read_bytes()[:-100])
    fresh = video(model, again := StateDisk(disk.folder, 10**8, Metrics(), **OFTEN))
    fresh.restore([(0, PROMPT)], 6)
    (line,) = caplog.records
    assert str(last) in line.message and not last.exists()
    assert np.array_equal(first[5].frames, (fresh.seek(5), blocks(fresh, 1, again)[0])[1].frames)
    again.close()  # nothing is written behind the damage
    for file in disk.folder.rglob("*.safetensors"):
        file.write_bytes(b"nonsense")
    with pytest.raises(Refusal, match="state on the disk is damaged"):
        video(model, StateDisk(disk.folder, 10**8, Metrics(), **OFTEN)).restore([(0, PROMPT)], 6)


def test_states_stay_below_the_limit(model, disk):
    live = video(model, disk)
    blocks(live, 2, disk)
    (state,) = live.disk.files
    disk.limit = 4 * state.path.stat().st_size
    other = video(model, disk, "b")
    blocks(other, 2, disk)
    blocks(live, 20, disk)
    kept = [file.block for file in live.disk.files]
    assert disk.total <= disk.limit and len(kept) == 3 and kept[-1] == 22 and len(other.disk.files) == 1
    on_disk = sum(path.stat().st_size for path in disk.folder.rglob("*.safetensors"))
    assert on_disk <= disk.limit + 4 * 4096  # names and shapes
    assert disk.metrics.registry.get_sample_value("hiar_state_bytes") == disk.total
    disk.remove("a")
    until(lambda: not (disk.folder / "a").exists())
    assert list(disk.sessions) == ["b"]


def test_the_last_state_stays_until_the_next_is_written(model, disk, monkeypatch):
    live = video(model, disk)
    blocks(live, 2, disk)
    disk.limit = int(1.5 * disk.total)
    blocks(live, 2, disk)
    assert [file.block for file in live.disk.files] == [4]

    def full(path, tensors, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_io, "write", full)
    blocks(live, 2, disk)
    assert [file.path for file in live.disk.files] == list(live.disk.folder.iterdir())
    assert [file.block for file in live.disk.files] == [4]


def test_room_is_made_before_a_state_is_written(model, disk, monkeypatch):
    """While one is written, there are never more bytes than the limit on the disk."""
    live = video(model, disk)
    blocks(live, 2, disk)
    disk.limit = int(2.5 * disk.total)
    real, held = state_io.write, []

    def write(path, tensors, metadata):
        held.append([file.block for file in live.disk.files])  # with the new one
        real(path, tensors, metadata)

    monkeypatch.setattr(state_io, "write", write)
    blocks(live, 6, disk)
    assert [len(files) for files in held] == [2, 2, 2] and [files[-1] for files in held] == [4, 6, 8]


def test_a_state_above_the_limit_is_said_once(model, disk, caplog):
    disk.limit = 1000
    live = video(model, disk)
    blocks(live, 6, disk)
    assert not live.disk.files and len(caplog.records) == 1
    assert "--state-disk allows 1e-06" in caplog.text


def test_states_of_one_session_are_spaced_in_time(model, disk):
    """By their bytes, so that all sessions together write no more than the rate."""
    disk.rate = 1.0
    live = video(model, disk)
    blocks(live, 8, disk)
    assert [file.block for file in live.disk.files] == [2]


def test_a_full_disk_is_said_once_and_counted(model, disk, caplog, monkeypatch):
    live = video(model, disk)
    first = blocks(live, 2, disk)
    real = state_io.write

    def full(path, tensors, metadata):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_io, "write", full)
    first += blocks(live, 4, disk)
    assert [record.message for record in caplog.records] == [
        "session a: a state is not on the disk, the video goes on: the disk is full"
    ]
    assert disk.metrics.registry.get_sample_value("hiar_state_errors_total") >= 2
    assert np.array_equal(np.stack([piece.frames[0] for piece in first]), made(model, 6))
    monkeypatch.setattr(state_io, "write", real)
    blocks(live, 2, disk)
    assert live.disk.files[0].block == 2 and len(live.disk.files) == 2


def test_the_state_that_is_missed_least():
    assert least_useful([7]) == 0
    assert least_useful([10, 20, 30, 40]) == 0
    assert least_useful([40, 50, 51, 52, 53]) in (1, 2, 3)


# The server is started again


def test_sessions_go_on_after_a_restart(model, tmp_path):
    """One that changed its prompt and jumped; one that tells the last chunk that it has; one that is paused, and does
    not tell.
    """
    with running(model, tmp_path) as service:
        first, second, third = (Viewer(service) for _ in range(3))
        tokens = [viewer.start(seed=seed)["token"] for seed, viewer in enumerate((first, second, third))]
        first.blocks(4)
        first.send("fork", block=2, prompt=BLUE)
        assert first.wait("moved")["block"] == 2
        first.blocks(4)
        second.blocks(5)
        third.blocks(2)
        third.send("pause")
        third.wait("state")
        last = third.chunks[-1][0]["seq"]
        until(
            lambda: any(session.acked == last for session in service.scheduler.sessions.values() if not session.playing)
        )
    ended = first.wait("ended")
    assert (ended["reason"], ended["resume"]) == ("drained", True)
    assert not any(token.encode() in path.read_bytes() for token in tokens for path in tmp_path.rglob("*.sqlite*"))
    with running(model, tmp_path) as service:
        assert len(service.scheduler.sessions) == metric(service, "hiar_sessions") == 3
        back = [Viewer(service) for _ in range(3)]
        after = [first.chunks[-1][0]["seq"], second.chunks[-1][0]["seq"], None]
        ready = [viewer.start(resume=token, after=a) for viewer, token, a in zip(back, tokens, after, strict=True)]
        assert [r["resumed"] for r in ready] == [True] * 3 and [r["playing"] for r in ready] == [True, True, False]
        assert [r["token"] for r in ready] == tokens
        back[0].blocks(3)
        back[1].blocks(3)
        back[2].send("play")
        back[2].blocks(3)
        shown = first.chunks + back[0].chunks
        seqs = [block["seq"] for block, _ in shown]
        assert seqs == list(range(len(shown)))
        at = next(n for n, (block, _) in enumerate(shown) if n and block["block"] == 2 and block["prompt"] == BLUE)
        whole = shown[:2] + shown[at:]
        assert [block["block"] for block, _ in whole] == list(range(len(whole)))
        assert np.array_equal(pictures(whole), made(model, len(whole), (2, BLUE)))
        for seed, before, viewer in ((1, second, back[1]), (2, third, back[2])):
            shown = before.chunks + viewer.chunks
            assert [block["block"] for block, _ in shown] == list(range(len(shown)))
            assert np.array_equal(pictures(shown), made(model, len(shown), seed=seed))
        back[1].send("save")  # also what was shown before
        with urllib.request.urlopen(service.url + back[1].wait("saved")["url"].replace("content", "record")) as answer:
            assert json.load(answer)["frames"] >= 3 * 8
        back[0].send("seek", block=1)
        assert back[0].wait("moved")["block"] == 1
        assert np.array_equal(pictures(back[0].blocks(2)), made(model, 3, (2, BLUE))[1:])
        for viewer in back:
            viewer.send("stop")
            viewer.wait("ended")
        until(lambda: not list((tmp_path / "sessions").iterdir()), "the files to go")
    with running(model, tmp_path) as service:
        assert not service.scheduler.sessions
    for path in tmp_path.rglob("*.sqlite*"):
        assert PROMPT.encode() not in path.read_bytes()


def test_a_finished_video_is_finished_after_a_restart(model, tmp_path):
    with running(model, tmp_path) as service:
        viewer = Viewer(service)
        token = viewer.start(num_frames=9)["token"]
        viewer.blocks(3)
        viewer.wait("ended")
    with running(model, tmp_path) as service, Viewer(service) as back:
        back.start(resume=token, after=2)
        assert back.wait("ended") == {"type": "ended", "reason": "complete", "frames": 9, "resume": False}
        back.send("seek", block=1)
        assert np.array_equal(pictures(back.blocks(2)), made(model, 3)[1:])


def test_what_expires_is_deleted(model, tmp_path):
    with running(model, tmp_path, keep=0.2) as service:
        viewer = Viewer(service)
        token = viewer.start(format="mp4")["token"]
        viewer.blocks(3)
    left = sorted(path.name for path in (tmp_path / "sessions").iterdir())
    assert len(left) == 2 and left[1] == f"{left[0]}.spool"
    with running(model, tmp_path, keep=0.2) as service:
        until(lambda: not service.scheduler.sessions and not list((tmp_path / "sessions").iterdir()))
        with Viewer(service) as late:
            late.send("start", v=1, resume=token)
            assert late.wait("refused")["code"] == "unknown_session"


@pytest.mark.parametrize("settings", [Settings(limits=Limits(keep=0), state_bytes=10**8), Settings()])
def test_nothing_of_a_session_stays_where_none_is_kept(model, tmp_path, settings):
    """--keep 0, and no --data."""
    with serving(model, tmp_path, settings, states=OFTEN) as service:
        viewer = Viewer(service)
        viewer.start()
        viewer.blocks(3)
    assert viewer.wait("ended")["resume"] is False
    with serving(model, tmp_path, settings) as service:
        assert not service.scheduler.sessions and not list((tmp_path / "sessions").iterdir())
    for path in tmp_path.rglob("*.sqlite*"):
        assert PROMPT.encode() not in path.read_bytes()


def test_damage_ends_one_session_and_not_the_others(model, tmp_path, caplog):
    with running(model, tmp_path) as service:
        viewers = [Viewer(service) for _ in range(4)]
        ready = [viewer.start(seed=seed) for seed, viewer in enumerate(viewers)]
        for viewer in viewers:
            viewer.blocks(3)
        sessions = list(service.scheduler.sessions.values())
        until(lambda: all(session.acked == 2 for session in sessions))  # one without would go on from its start
    for state in (tmp_path / "sessions" / ready[0]["session"]).iterdir():
        state.write_bytes(b"\xff" * 100)
    with sqlite3.connect(tmp_path / "videos.sqlite") as database:
        database.execute("UPDATE sessions SET jumps = 'x' WHERE id = ?", (ready[1]["session"],))
        database.execute("UPDATE sessions SET made_by = '{}' WHERE id = ?", (ready[2]["session"],))
    database.close()
    caplog.clear()
    with running(model, tmp_path) as service:
        said = [record.message for record in caplog.records]
        assert len(said) == 2 and ready[1]["session"] in said[0] and "of another version" in said[1], said
        for number, code in enumerate(("failed", "unknown_session", "cannot_resume")):
            with Viewer(service) as viewer:
                viewer.send("start", v=1, resume=ready[number]["token"])
                assert viewer.wait("refused")["code"] == code
        with Viewer(service) as viewer:
            viewer.start(resume=ready[3]["token"], after=2)
            assert np.array_equal(pictures(viewer.blocks(2)), made(model, 5, seed=3)[3:])
        left = [name for one in ready[1:] for name in (one["session"], f"{one['session']}.spool")]
        assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == sorted(left)


def test_a_session_that_has_no_memory_to_go_on_waits(model, tmp_path):
    with running(model, tmp_path) as service:
        viewer = Viewer(service)
        token = viewer.start()["token"]
        viewer.blocks(2)
    free = [0]
    with running(model, tmp_path, free=lambda _: free[0]) as service:
        with Viewer(service) as early:
            early.send("start", v=1, resume=token)
            refused = early.wait("refused")
            assert refused["code"] == "busy" and refused["retry_after"] > 0
        free[0] = 10**12
        with Viewer(service) as back:
            assert back.start(resume=token, after=1)["resumed"]
            assert back.blocks(1)[0][0]["block"] == 2


def test_a_record_that_cannot_be_written_is_said_once(model, tmp_path, caplog):
    with running(model, tmp_path) as service, Viewer(service) as viewer:
        keeper = service.scheduler.keeper

        class FullDatabase:
            def execute(self, *_):
                raise sqlite3.OperationalError("disk is full")

        database, keeper.database = keeper.database, FullDatabase()
        ready = viewer.start()
        viewer.blocks(3)
        keeper.database = database
        (said,) = [record.message for record in caplog.records if "record" in record.message]
        assert said == f"session {ready['session']} would not outlive the server now: its record: disk is full"
        assert metric(service, "hiar_state_errors_total") >= 1
        viewer.blocks(1)  # the record is whole again
        until(lambda: not keeper.unwritten)
    with running(model, tmp_path) as service, Viewer(service) as back:
        back.start(resume=ready["token"], after=viewer.chunks[-1][0]["seq"])
        assert np.array_equal(pictures(viewer.chunks + back.blocks(1)), made(model, len(viewer.chunks) + 1))


def test_kill_9_with_two_sessions_and_a_job(started, model, tmp_path):
    """Killed while all three are made, started again: the same pixels as without that."""

    server = started()
    job = json.loads(ask(server, "/v1/videos", "POST", {"prompt": PROMPT, "num_frames": 60, "seed": 5})[2])["id"]
    viewers = [Viewer(server) for _ in range(2)]
    tokens = [viewer.start(seed=seed)["token"] for seed, viewer in enumerate(viewers)]
    for viewer in viewers:
        viewer.blocks(12)
    viewers[0].send("prompt", text=BLUE)
    at = viewers[0].wait("prompt_scheduled")["block"]
    for viewer in viewers:
        viewer.blocks(2)
    server.kill()
    assert server.wait() == -signal.SIGKILL
    folders = [path for path in (tmp_path / "data" / "sessions").iterdir() if path.is_dir()]
    assert len(folders) == 2 and all(list(path.glob("*.safetensors")) for path in folders)

    server = started()
    back = [Viewer(server) for _ in range(2)]
    for viewer, before, token in zip(back, viewers, tokens, strict=True):
        viewer.start(resume=token, after=before.chunks[-1][0]["seq"])
    for viewer in back:
        viewer.blocks(4)
    for seed, changes in enumerate(([(at, BLUE)], [])):
        shown = viewers[seed].chunks + back[seed].chunks
        assert [block["block"] for block, _ in shown] == list(range(len(shown)))
        assert np.array_equal(pictures(shown), made(model, len(shown), *changes, seed=seed))
    for viewer in back:
        viewer.send("stop")
    until(lambda: json.loads(ask(server, f"/v1/videos/{job}")[2])["status"] == "finished", every=0.05)
    frames = frames_of(ask(server, f"/v1/videos/{job}/content")[2])
    exact = VideoPipeline(model)(PROMPT, num_frames=60, seed=5).frames.repeat(8, 1).repeat(8, 2)
    assert len(frames) == 60 and np.abs(frames.astype(int) - exact).mean() < 12  # H.264, and enlarged smoothly
    server.kill(signal.SIGTERM)
    assert server.done().returncode == 0
