"""Whole videos as jobs: equal to `generate`, whatever stops the server; a full disk; the requests for them."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sqlite3
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import SafetensorError
from serving import PROMPT, Viewer, ask, frames_of, serving, until

from hiar_model import VideoPipeline
from hiar_model.cli.main import main
from hiar_model.config import ExecutionConfig
from hiar_model.rollout import state_io
from hiar_model.serve import jobs as jobs_module
from hiar_model.serve.jobs import JobRequest, Jobs, _without_session
from hiar_model.serve.protocol import Refusal
from hiar_model.serve.scheduler import Scheduler
from hiar_model.serve.store import Store

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("equal_mp4")]

BLUE = "a blue square moving up"


def finished(service, name):
    def done():
        about = json.loads(ask(service, f"/v1/videos/{name}")[2])
        assert about["status"] != "failed", about
        return about["status"] == "finished" and about

    return until(done, "the video", every=0.05)


def test_a_video_is_made_and_deleted(service, model):
    status, headers, body = ask(service, "/v1/videos", "POST", {"prompt": PROMPT, "num_frames": 12, "seed": 5})
    about = json.loads(body)
    assert status == 202 and headers["location"] == f"/v1/videos/{about['id']}"
    assert (about["status"], about["num_frames"], about["kind"]) == ("queued", 12, "job")
    assert "request" not in about  # a list of videos shows nobody's prompts
    done = finished(service, about["id"])
    assert (done["frames"], done["seconds"]) == (12, 1.0)
    status, headers, content = ask(service, done["url"])
    assert status == 200 and headers["content-type"] == "video/mp4" and headers["x-content-type-options"] == "nosniff"
    exact = VideoPipeline(model)(PROMPT, num_frames=12, seed=5).frames.repeat(8, 1).repeat(8, 2)
    assert np.abs(frames_of(content).astype(int) - exact).mean() < 12  # H.264, and enlarged smoothly
    assert ask(service, done["url"], range="bytes=4-7")[2] == content[4:8] == b"ftyp"
    record = json.loads(ask(service, f"/v1/videos/{about['id']}/record")[2])
    assert record["prompt"] == PROMPT and record["command"].startswith("hiar generate")
    folder = service.store.path(about["id"])
    assert sorted(path.name for path in folder.iterdir()) == ["video.mp4", "video.mp4.json"]
    assert about["id"] in [row["id"] for row in json.loads(ask(service, "/v1/videos")[2])["videos"]]
    (folder / "video.mp4").unlink()  # by somebody who made room
    status, _, body = ask(service, done["url"])
    assert (status, json.loads(body)["code"]) == (410, "gone")
    assert ask(service, f"/v1/videos/{about['id']}", "DELETE")[0] == 204
    assert ask(service, f"/v1/videos/{about['id']}")[0] == 404 and not folder.exists()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "JSON object"),
        (b"[1]", 400, "JSON object"),
        ({"prompt": 7}, 400, "must be a string"),
        ({"prompt": PROMPT, "colour": 1}, 400, "unknown field"),
        ({"prompt": PROMPT, "order": "step_first"}, 400, "stream"),
        ({}, 422, "one of the two"),
        ({"prompt": PROMPT, "prompts": [[0, PROMPT]]}, 422, "one of the two"),
        ({"prompts": [[0, PROMPT], ["a", "b"]]}, 422, "lists of seconds and prompt"),
        ({"prompts": [[0, PROMPT], [10**400, PROMPT]]}, 422, "entry 2: time must be"),
        ({"prompts": [[1, PROMPT]]}, 422, "first prompt must be at 0"),
        ({"prompts": [[0, PROMPT], [99, PROMPT]], "num_frames": 6}, 422, "too late"),
        ({"prompts": [[0, "seven kittens"]]}, 422, "entry 1: "),
        ({"prompt": PROMPT, "num_frames": 7}, 422, "nearest 6 or 9"),
        ({"prompt": PROMPT, "width": 64}, 422, "32x32"),
        ({"prompt": "seven kittens"}, 422, "seven"),
        ({"prompt": "x" * 70000}, 413, "65536"),
    ],
)
def test_wrong_requests(service, body, status, words):
    answer = ask(service, "/v1/videos", "POST", body)
    assert answer[0] == status and words in json.loads(answer[2])["message"]


@pytest.mark.parametrize("path", ["/v1/videos/x", "/v1/videos/..%2f..%2fetc", "/v1/videos/x/content", "/nothing"])
def test_what_is_not_there(service, path):
    assert ask(service, path)[0] == 404
    assert ask(service, "/v1/videos", "POST", b"{}", **{"content-type": "text/plain"})[0] == 415


def test_openapi_describes_what_is_served(service):
    described = json.loads(ask(service, "/v1/openapi.json")[2])
    routes = {r.path for r in service.app.app.routes}
    assert set(described["paths"]) < routes
    properties = described["components"]["schemas"]["JobRequest"]["properties"]
    assert set(properties) == set(JobRequest.__dataclass_fields__)
    assert json.loads(ask(service, "/v1/schema.json")[2])["$defs"]["StartMessage"]


def new_jobs(folder, model):
    """The jobs of a folder, without a server; their work is done here."""
    store = Store(folder)
    return Jobs(store, model, ExecutionConfig(), Scheduler(model, ExecutionConfig(), folder).admission, 2)


@pytest.mark.parametrize("blocks", [0, 1, 3, 4, 5])
def test_a_job_goes_on_from_its_checkpoint(model, tmp_path, blocks):
    """Stopped after some blocks of five (checkpoints are every two): the same files, byte for byte, as in one go."""
    request = JobRequest(prompts=[[0, PROMPT], [0.5, BLUE]], num_frames=15, seed=2)

    def whole(folder, stop_after):
        jobs = new_jobs(folder, model)
        name = jobs.add(request, jobs.check(request))
        for _ in range(stop_after):
            jobs.work()
        jobs.store.close()  # as kill -9 does: nothing is put away
        jobs = new_jobs(folder, model)
        count = 0
        while jobs.waiting():
            jobs.work()
            count += 1
        assert jobs.store.get(name)["status"] == "finished"
        jobs.store.close()
        folder = jobs.store.path(name)
        return [(folder / f"video.mp4{more}").read_bytes() for more in ("", ".json")], count

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    content, count = whole(tmp_path / "a", blocks)
    assert content == whole(tmp_path / "b", 0)[0]
    assert count == 6 - 2 * (min(blocks, 4) // 2)


def test_blocks_are_on_the_disk_before_the_state_behind_them(model, tmp_path, monkeypatch):
    """And the state before the list says how far the video is: after a power cut nothing is missing."""
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=15), 15)
    jobs.work()
    done, job = [], jobs.current
    for owner, call in ((job.spool, "sync"), (job.run, "save_session"), (jobs.store, "update")):
        real = getattr(owner, call)
        monkeypatch.setattr(owner, call, lambda *a, n=call, r=real, **o: (done.append(n), r(*a, **o)))
    jobs.work()
    about = jobs.store.get(name)
    assert done == ["sync", "save_session", "update"] and about["frames"] == 6
    stored = [about["request"][key] for key in ("num_frames", "height", "width")]
    assert stored == [15, 32, 32], "whatever the next server's defaults are"
    jobs.store.close()


def test_a_command_makes_the_whole_video():
    """Not what followed the last start of the server."""
    words = ["hiar", "generate", PROMPT, "--from-session", "session.safetensors", "--seed", "5"]
    assert _without_session(words) == ["hiar", "generate", PROMPT, "--seed", "5"]
    assert _without_session(words[:3]) == words[:3]


def test_the_file_of_a_job_is_that_of_generate(model, folder, tmp_path, monkeypatch):
    """Byte for byte, in a server that is stopped while it encodes the complete video; the record has the command."""
    monkeypatch.setattr(jobs_module, "FRAMES_AT_ONCE", 4)
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=15, seed=3), 15)
    for _ in range(7):
        jobs.work()
    assert jobs.current.transcoding.frames == 8
    jobs.close()
    jobs.store.close()
    (tmp_path / "videos" / name / ".0123456789ab.99.partial.mp4").touch()  # as kill -9 leaves
    jobs = new_jobs(tmp_path, model)
    while jobs.waiting():
        jobs.work()
    video_folder = tmp_path / "videos" / name
    assert sorted(path.name for path in video_folder.iterdir()) == ["video.mp4", "video.mp4.json"]
    jobs.store.close()
    command = shlex.split(json.loads((video_folder / "video.mp4.json").read_text())["command"])
    out = tmp_path / "again.mp4"
    assert main([*command[1 : command.index("--out")], "--out", str(out), "--device", "cpu"]) == 0
    assert out.read_bytes() == (video_folder / "video.mp4").read_bytes()
    records = (video_folder / "video.mp4.json", tmp_path / "again.mp4.json")
    about, other = (json.loads(record.read_text()) for record in records)
    assert about["frames"] == other["frames"] == 15


def test_a_full_disk_stops_a_job_and_not_the_server(model, tmp_path, monkeypatch):
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=15), 15)
    jobs.work()

    def full(self, fragment):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(jobs.current.spool), "append", full)
    jobs.work()
    about = jobs.store.get(name)
    assert about["status"] == "running" and "No space left" in about["error"]
    assert not jobs.waiting()  # for a while
    monkeypatch.undo()
    jobs.retry_at = 0.0
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(name)["status"] == "finished" and jobs.store.get(name)["frames"] == 15
    jobs.store.close()


def test_a_video_that_is_too_large_lets_the_others_go_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "LARGEST_SPOOL", 1 << 19)
    jobs = new_jobs(tmp_path, model)
    large, small = (jobs.add(JobRequest(PROMPT, num_frames=frames), frames) for frames in (60, 3))
    while jobs.waiting():
        jobs.work()
    row = jobs.store.get(large)
    assert row["status"] == "failed" and row["error"].startswith("cannot write blocks.spool: it would be larger than ")
    assert not list((tmp_path / "videos" / large).iterdir())
    assert jobs.store.get(small)["status"] == "finished"
    jobs.store.close()


def test_a_full_disk_under_a_checkpoint_stops_a_job_and_not_the_server(model, tmp_path, monkeypatch):
    """As safetensors calls it."""
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=15), 15)

    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_io, "save_tensors", full)
    for _ in range(2):
        jobs.work()
    about = jobs.store.get(name)
    assert about["status"] == "running" and "No space left" in about["error"] and not jobs.waiting()
    monkeypatch.undo()
    jobs.retry_at = 0.0
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(name)["status"] == "finished"
    jobs.store.close()


def test_a_full_disk_beneath_the_list_stops_a_job_and_not_the_server(model, tmp_path, monkeypatch):
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=6), 6)

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(jobs.store, "update", full)
    jobs.work()  # in the thread that makes everybody's blocks
    assert not jobs.waiting() and jobs.current is None
    monkeypatch.undo()
    monkeypatch.setattr(jobs.store, "database", type("Full", (), {"execute": full}))
    with pytest.raises(Refusal, match="disk is full"):
        jobs.add(JobRequest(PROMPT, num_frames=6), 6)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "videos").iterdir()] == [name]
    jobs.retry_at = 0.0
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(name)["status"] == "finished"
    jobs.store.close()


def test_a_job_that_cannot_be_made_here_waits_for_the_next_start(model, tmp_path, caplog):
    """A server with other weights, or of another model: nothing of a video is lost, and the others go on."""
    request = JobRequest(PROMPT, num_frames=15)
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(request, 15)
    for _ in range(3):
        jobs.work()
    jobs.close()
    strange = jobs.store.add("job", {"prompt": "seven kittens", "num_frames": 6}, 6)  # of a model with other words
    jobs.store.close()
    files = {path: path.read_bytes() for path in (tmp_path / "videos" / name).iterdir()}
    jobs = new_jobs(tmp_path, replace(model, weights_sha256="0" * 64))
    good = jobs.add(JobRequest(PROMPT, num_frames=6), 6)
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(good)["status"] == "finished"
    for one, word in ((name, "weights_sha256 was"), (strange, "seven")):
        row = jobs.store.get(one)
        assert row["status"] == "queued" and row["error"].startswith("this server cannot make it: "), row
        assert word in row["error"] and str(tmp_path) not in row["error"]
    assert "seven" not in caplog.text and f"video {strange} waits for the next start" in caplog.text
    assert {path: path.read_bytes() for path in (tmp_path / "videos" / name).iterdir()} == files
    jobs.store.close()
    jobs = new_jobs(tmp_path, model)
    jobs.remove(strange)
    count = 0
    while jobs.waiting():
        jobs.work()
        count += 1
    row = jobs.store.get(name)
    assert (row["status"], row["error"], count) == ("finished", None, 3)
    jobs.store.close()


@pytest.mark.parametrize("damaged", ["session.safetensors", "blocks.spool"])
def test_a_job_whose_checkpoint_is_damaged_begins_anew(model, tmp_path, damaged):
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=15), 15)
    for _ in range(3):
        jobs.work()
    jobs.close()
    jobs.store.close()
    path = tmp_path / "videos" / name / damaged
    path.write_bytes(path.read_bytes()[:-100])
    jobs = new_jobs(tmp_path, model)
    count = 0
    while jobs.waiting():
        jobs.work()
        count += 1
    assert (jobs.store.get(name)["status"], count) == ("finished", 6)
    jobs.store.close()


def test_a_job_waits_while_viewers_have_the_memory(model, tmp_path):
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=6), 6)
    jobs.store.update(name, status="running")  # by the server before this one
    jobs.admission.free = lambda device: 0
    jobs.work()
    about = jobs.store.get(name)
    assert about["status"] == "queued" and "are free for it" in about["error"] and not jobs.waiting()
    jobs.admission.free, jobs.retry_at = (lambda device: None), 0.0
    while jobs.waiting():
        jobs.work()
    assert (jobs.store.get(name)["status"], jobs.store.get(name)["error"]) == ("finished", None)
    jobs.store.close()


def test_a_job_that_is_too_large_lets_the_next_one_be_made(model, tmp_path):
    """No waiting makes it smaller. What was made of it is of use to nobody, and goes."""
    jobs = new_jobs(tmp_path, model)
    large, good = (jobs.add(JobRequest(PROMPT, num_frames=frames), frames) for frames in (15, 6))
    for _ in range(3):
        jobs.work()
    assert len(list(jobs.store.path(large).iterdir())) == 2
    jobs.current.spool.largest = jobs.current.spool.path.stat().st_size + 1
    jobs.work()
    about = jobs.store.get(large)
    assert about["status"] == "failed" and "it would be larger than" in about["error"]
    assert not list(jobs.store.path(large).iterdir())
    assert jobs.waiting()
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(good)["status"] == "finished"
    jobs.store.close()


def test_a_deleted_job_stops(model, tmp_path):
    jobs = new_jobs(tmp_path, model)
    first, second = (jobs.add(JobRequest(PROMPT, num_frames=6), 6) for _ in range(2))
    jobs.work()
    jobs.remove(first)
    while jobs.waiting():
        jobs.work()
    assert jobs.store.get(first) is None and not jobs.store.path(first).exists()
    assert jobs.store.get(second)["status"] == "finished"
    jobs.store.close()


def test_a_deleted_job_is_not_put_away(model, tmp_path, caplog):
    """By a server that ends just then."""
    jobs = new_jobs(tmp_path, model)
    name = jobs.add(JobRequest(PROMPT, num_frames=6), 6)
    jobs.work()
    jobs.remove(name)
    jobs.close()
    assert not caplog.records and jobs.current is None
    jobs.store.close()


def test_a_folder_has_one_server(tmp_path, model):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="another server uses it"):
        Store(tmp_path)
    half = store.add("saved", {}, None, status="running")  # by a session that is gone
    store.close()
    again = Store(tmp_path)
    assert again.get(half) is None and not again.path(half).exists()
    again.close()


def test_the_list_of_videos(tmp_path, monkeypatch):
    clock = iter(range(100, 200))
    monkeypatch.setattr("hiar_model.serve.store.time", SimpleNamespace(time=lambda: float(next(clock))))
    store = Store(tmp_path)
    names = [store.add("job", {"seed": seed}, 6) for seed in range(3)]
    store.update(names[1], status="running", frames=3)
    assert [row["id"] for row in store.newest(2)] == names[:0:-1]
    assert [row["id"] for row in store.having(status="queued")] == [names[0], names[2]]
    row = store.get(names[1])
    assert (row["created"], row["updated"], row["frames"], row["request"]) == (101.0, 103.0, 3, {"seed": 1})
    assert store.counts() == {"queued": 2, "running": 1, "finished": 0, "failed": 0}
    store.close()
    again = new_jobs(tmp_path, None)
    assert again.waiting_ids == [names[1], names[0], names[2]], "what was begun is first"
    again.store.close()


def test_jobs_get_on_while_viewers_watch(model, tmp_path):
    with serving(model, tmp_path) as service, Viewer(service) as viewer:
        viewer.start()
        name = json.loads(ask(service, "/v1/videos", "POST", {"prompt": PROMPT, "num_frames": 6})[2])["id"]
        stop = threading.Event()

        def watch():
            while not stop.is_set():
                viewer.blocks(1)

        thread = threading.Thread(target=watch)
        thread.start()
        finished(service, name)
        stop.set()
        thread.join()


# The command, whose job does not get beyond its 14th block, however late it is killed.
HELD = """
import time
from hiar_model.cli import main
from hiar_model.serve.spool import Spool
encode = Spool.encode
Spool.encode = lambda spool, *block: time.sleep(1000) if spool.blocks == 14 else encode(spool, *block)
raise SystemExit(main())
"""
EQUAL = """
from hiar_model.cli import main
from hiar_model.io import encoders
encoders.X264["mbtree"] = "0"
raise SystemExit(main())
"""


def test_kill_9_and_start_again(started, model, tmp_path):
    """Killed in the middle of a video, started again, and ended by SIGTERM."""
    frames = 3 * 20
    server = started(HELD)
    name = json.loads(ask(server, "/v1/videos", "POST", {"prompt": PROMPT, "num_frames": frames})[2])["id"]
    until(lambda: json.loads(ask(server, f"/v1/videos/{name}")[2])["frames"] >= 36, every=0.05)
    server.kill()
    assert server.wait() == -signal.SIGKILL
    assert (tmp_path / "data" / "videos" / name / "session.safetensors").exists()
    server = started(EQUAL)
    about = finished(server, name)
    content = ask(server, about["url"])[2]
    server.kill(signal.SIGTERM)
    ended = server.done()
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "stopped", ended
    (tmp_path / "again").mkdir()
    jobs = new_jobs(tmp_path / "again", model)
    other = jobs.add(JobRequest(PROMPT, num_frames=frames), frames)
    while jobs.waiting():
        jobs.work()
    assert np.array_equal(frames_of(content), frames_of((jobs.store.path(other) / "video.mp4").read_bytes()))
    jobs.store.close()
