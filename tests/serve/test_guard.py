"""What must not get through: foreign pages and names, wrong tokens, too much of anything; what answers carry."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.parse
from contextlib import closing
from types import SimpleNamespace

import pytest
from serving import PROMPT, Viewer, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from hiar_model.serve import connection, guard
from hiar_model.serve.app import Settings
from hiar_model.serve.guard import Bucket, Guard, read_tokens
from hiar_model.serve.scheduler import Limits

pytestmark = pytest.mark.cpu

TOKEN, OTHER = "a-token-of-more-than-16-characters", "another-token-of-this-server"


@pytest.fixture(scope="module")
def guarded(model, tmp_path_factory):
    tokens, limits = (TOKEN.encode(), OTHER.encode()), Limits(64, keep=20)  # tests leave sessions behind
    settings = Settings(tokens=tokens, hosts=("films.example",), proxies=("127.0.0.1",), limits=limits)
    with serving(model, tmp_path_factory.mktemp("data"), settings) as running:
        yield running


def get(service, path, method="GET", body=None, **headers):
    """(status, headers, body); a header named host replaces the usual one."""
    place = urllib.parse.urlsplit(service.url)
    with closing(http.client.HTTPConnection(place.hostname, place.port, timeout=60)) as client:
        client.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in {"host": place.netloc, **headers}.items():
            client.putheader(name.replace("_", "-"), value)
        client.endheaders(body)
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("10.1.2.3", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("", 403), ("localhost:x", 403), ("a b", 403),
        ("films.example", 403), ("127.0.0.1@evil.example", 403),
    ],
)  # fmt: skip
def test_names_of_the_server(service, host, status):
    answer = get(service, "/healthz", host=host)
    assert answer[0] in (status, 400 if status == 403 else status), answer  # 400: no HTTP at all


def test_a_name_that_is_allowed(guarded):
    assert get(guarded, "/healthz", host="films.example:80")[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "file://", ""])
def test_pages_of_others(service, origin):
    status, _, body = get(service, "/healthz", origin=origin)
    assert status == 403 and json.loads(body)["code"] == "wrong_origin"
    with pytest.raises(InvalidStatus) as refused:
        Viewer(service, additional_headers={"Origin": origin})
    assert refused.value.response.status_code == 403


def test_the_own_page(service):
    assert get(service, "/healthz", origin=service.url)[0] == 200
    with Viewer(service, additional_headers={"Origin": service.url}) as viewer:
        viewer.start()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({}, 401), ({"authorization": "Bearer " + TOKEN}, 200), ({"authorization": "bearer " + OTHER}, 200),
        ({"authorization": "Bearer " + TOKEN[:-1]}, 401), ({"authorization": "Bearer "}, 401),
        ({"authorization": "Basic " + TOKEN}, 401), ({"authorization": "Bearer \u00e9"}, 401),
    ],
)  # fmt: skip
def test_tokens(guarded, sent, status):
    answer = get(guarded, "/v1/videos", **sent)
    assert answer[0] == status
    assert status == 200 or answer[1]["www-authenticate"] == "Bearer"


def test_tokens_of_sockets(guarded):
    for address in ("", "?token=", "?token=wrong", f"?token={TOKEN}x"):
        with pytest.raises(InvalidStatus) as refused:
            Viewer(guarded, path=address)
        assert refused.value.response.status_code == 401
    for options in ({"path": f"?token={TOKEN}"}, {"additional_headers": {"Authorization": f"Bearer {OTHER}"}}):
        with Viewer(guarded, **options) as viewer:
            viewer.start()
    assert get(guarded, "/healthz")[0] == 200  # needs none
    assert get(guarded, f"/v1/videos?token={TOKEN}")[0] == 200
    assert get(guarded, "/metrics")[0] == 401


def test_headers_of_every_answer(service):
    for path in ("/healthz", "/v1/videos", "/v1/schema.json", "/nothing", "/"):
        headers = get(service, path)[1]
        assert headers["x-content-type-options"] == "nosniff", path
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in str(headers)
        assert headers["x-frame-options"] == "DENY" and headers["server"] is None


def test_too_much(service, monkeypatch):
    body = b" " * 70000
    assert get(service, "/v1/videos", "POST", body, content_length="70000", content_type="application/json")[0] == 413
    chunked = b"11170\r\n" + body + b"\r\n0\r\n\r\n"  # without a length in front
    status, _, answer = get(
        service, "/v1/videos", "POST", chunked, transfer_encoding="chunked", content_type="application/json"
    )
    assert status == 413 and json.loads(answer)["code"] == "too_large"
    service.app.buckets.clear()
    monkeypatch.setattr(guard, "BURST", 3.0)
    monkeypatch.setattr(guard, "RATE", 0.001)
    statuses = [get(service, "/healthz")[0] for _ in range(5)]
    service.app.buckets.clear()
    assert statuses == [200, 200, 200, 429, 429]


def test_clients_behind_a_proxy(service, guarded):
    """Each has limits of its own, where the proxy is one that --proxy names; anybody can send such a header."""
    assert get(guarded, "/healthz", x_forwarded_for="203.0.113.7")[0] == 200 and "203.0.113.7" in guarded.app.buckets
    headers = {"X-Forwarded-For": "203.0.113.8", "Authorization": f"Bearer {TOKEN}"}
    with Viewer(guarded, additional_headers=headers) as viewer:
        viewer.start()
        assert "203.0.113.8" in {session.client for session in guarded.scheduler.sessions.values()}
        assert "203.0.113.8" in guarded.clients
    assert get(service, "/healthz", x_forwarded_for="203.0.113.9")[0] == 200
    assert "203.0.113.9" not in service.app.buckets


def test_what_is_no_path_or_method_is_told_as_json(service):
    status, headers, body = get(service, "/v1/videos", "PUT")
    assert (status, json.loads(body)["code"]) == (405, "not_allowed") and "POST" in headers["allow"]
    status, headers, body = get(service, "/v1/realtime/video")
    assert (status, headers["upgrade"]) == (426, "websocket") and "proxy" in json.loads(body)["message"]
    status, _, body = get(service, "/v1/nothing/here")
    assert (status, json.loads(body)["code"]) == (404, "not_found")


def test_a_bucket_fills_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bucket = Bucket(2.0, 2.0, at=0.0)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now[0] = 0.5
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 100.0
    assert [bucket.take() for _ in range(3)] == [True, True, False], "no more than the burst, however long it waited"


def test_addresses_of_those_who_came_once_are_not_kept_for_ever():
    app = Guard(None)
    for number in range(10_003):
        app._bucket({"client": (str(number), 1)})
    assert len(app.buckets) < 10


def test_a_header_of_the_app_stays_and_names_of_hosts_have_no_case():
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Cache-Control", b"max-age=9")]})

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"LocalHost:80"), (b"origin", b"http://localhost:80")]
    scope = {"type": "http", "headers": headers, "path": "/", "query_string": b""}
    asyncio.run(Guard(app)(scope, None, send))
    names = [name.lower() for name, _ in sent[0]["headers"]]
    assert sent[0]["status"] == 200 and names.count(b"cache-control") == 1 and b"x-frame-options" in names


def test_malformed_messages_leave_the_session_alone(service):
    from test_protocol import MALFORMED

    with Viewer(service) as viewer:
        viewer.start()
        for n, (text, code, _) in enumerate(MALFORMED):
            viewer.socket.send(text)
            assert viewer.wait("refused")["code"] == code
            viewer.blocks(n % 8 == 0)
        viewer.blocks(1)
        viewer.send("start", v=1, prompt=PROMPT)
        assert viewer.wait("refused")["code"] == "already_started"
        viewer.send("ack", seq=10**6)
        assert viewer.wait("refused")["code"] == "bad_value"
        assert [b["seq"] for b, _ in viewer.chunks] == list(range(len(viewer.chunks)))


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([{"type": "pause"}], "not_started"),
        ([{"type": "start", "v": 1}], "bad_prompt"),
        ([{"type": "start", "v": 1, "prompt": "seven kittens"}], "bad_prompt"),
        ([{"type": "start", "v": 1, "prompt": PROMPT, "height": 64}], "bad_video"),
        ([{"type": "start", "v": 1, "prompt": PROMPT, "num_frames": 7}], "bad_video"),
        ([{"type": "start", "v": 9, "prompt": PROMPT}], "wrong_version"),
        ([{"type": "start", "v": 1, "resume": "nobody's"}], "unknown_session"),
        ([{"type": "start", "v": 1, "prompt": PROMPT}, {"type": "save"}], "nothing_yet"),
    ],
)
def test_refused_starts(service, messages, code):
    with Viewer(service) as viewer:
        for message in messages:
            viewer.socket.send(json.dumps(message))
        seen = until(lambda: (m := viewer.receive())["type"] in ("refused", "block") and m)
        assert seen["type"] == "block" or seen["code"] == code


def test_who_sends_too_much_or_nothing_is_sent_away(service, monkeypatch):
    with Viewer(service) as viewer:
        for _ in range(connection.MOST_REFUSED + 1):
            viewer.socket.send("nonsense")
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                viewer.receive()
    assert closed.value.rcvd.code == 1008
    assert viewer.messages[-1]["closes"] and viewer.messages[-1]["code"] in ("too_many", "bad_message")
    monkeypatch.setattr(connection, "START_WITHIN", 0.05)
    with Viewer(service) as viewer:
        assert viewer.receive()["code"] == "too_slow"
        with pytest.raises(ConnectionClosed):
            viewer.receive()
    monkeypatch.undo()
    with Viewer(service) as viewer, pytest.raises(ConnectionClosed) as closed:
        viewer.socket.send("x" * (2 << 20))
        viewer.receive()
    reply = closed.value.rcvd  # None where the system's reset, for bytes that nobody read, overtakes it
    assert reply is None or reply.code == 1009
    until(lambda: not service.clients)


def test_acks_of_new_chunks_do_not_count_as_messages(service, monkeypatch):
    monkeypatch.setattr(connection, "RATE", 0.001)
    monkeypatch.setattr(connection, "BURST", 4.0)
    with Viewer(service) as viewer:
        viewer.start()
        last = viewer.blocks(12)[-1][0]["seq"]
        for _ in range(4):  # of a chunk that was acknowledged
            viewer.send("ack", seq=last)
        assert viewer.wait("refused")["code"] == "too_many"


def test_a_client_has_so_many_connections(service, monkeypatch):
    from hiar_model.serve import app

    until(lambda: not service.clients)
    monkeypatch.setattr(app, "MOST_CONNECTIONS", 2)
    with Viewer(service), Viewer(service), pytest.raises(InvalidStatus) as refused:
        Viewer(service)
    assert refused.value.response.status_code == 429


def test_a_client_that_does_not_read_is_sent_away(service, monkeypatch):
    monkeypatch.setattr(connection, "MOST_UNREAD", 20)
    monkeypatch.setattr(connection, "RATE", 1e6)
    monkeypatch.setattr(connection, "BURST", 1e6)
    with Viewer(service) as viewer:
        session = service.scheduler.sessions[viewer.start()["session"]]
        realtime = session.connection.deliver.__self__  # in one turn of the loop, so that none is written meanwhile
        realtime.loop.call_soon_threadsafe(lambda: [realtime._queue('{"type": "state"}') for _ in range(50)])
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                viewer.receive()
        assert closed.value.rcvd.reason == "too_slow"


@pytest.mark.parametrize(("text", "words"), [("# none\n\n", "no token"), ("short\n", "16 characters")])
def test_token_files(tmp_path, text, words):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_tokens(file)
    with pytest.raises(ValueError, match="No such file"):
        read_tokens(tmp_path / "missing")
    file.write_text(f"# ours\n{TOKEN}\n\n  {OTHER}  \n")
    assert read_tokens(file) == (TOKEN.encode(), OTHER.encode())


def test_others_need_a_token():
    with pytest.raises(ValueError, match=r"--host 0.0.0.0 .*--token-file"):
        Settings(host="0.0.0.0")
    assert Settings(host="0.0.0.0", tokens=(b"x",)) and Settings(host="::1") and Settings(host="localhost")


def test_prompts_are_not_logged_unless_asked(model, tmp_path, caplog):
    for asked in (False, True):
        caplog.clear()
        settings = Settings(log_prompts=asked)
        with caplog.at_level("INFO"), serving(model, tmp_path / str(asked), settings) as running:
            with Viewer(running) as viewer:
                viewer.start()
                viewer.send("prompt", text="a blue square moving up")
                viewer.wait("prompt_scheduled")
        assert ("blue" in caplog.text) is ("circle" in caplog.text) is asked
        assert "session" in caplog.text
