"""A rollout on disk: what goes on, or forks, gives the bits of a run that was never interrupted."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from ids import brief
from made_runs import make_rollout
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import MODEL, SHALLOW, SIZE, TEXT, TINY, make_model

from hiar_model.config import FlowSchedule
from hiar_model.rollout import Rollout, state_io
from hiar_model.rollout.session_io import FILE, load_session, save_session, session_tensors

pytestmark = pytest.mark.cpu

OTHER = torch.randn(1, 4, TINY.text_dim, generator=torch.Generator().manual_seed(7))
PREFIX = torch.randn(1, 4, TINY.in_channels, *SIZE.values(), generator=torch.Generator().manual_seed(2))
STEPS = 3


def start(text=TEXT, **options) -> Rollout:
    options = {"num_frames": 15, "window_frames": 7, "order": "stream", **options}
    model = options.pop("model", MODEL)
    return make_rollout(model, text, FlowSchedule.uniform(STEPS), **SIZE, **options)


def switched(block: int):
    return lambda n: TEXT if n < block else OTHER


def latents(blocks) -> torch.Tensor:
    return torch.cat([block.latents for block in blocks], 1)


@functools.cache
def uninterrupted() -> torch.Tensor:
    return latents(start())


class Carrying:
    """A decoder that carries something on: what it decodes is the sum of all so far."""

    def __init__(self) -> None:
        self.sum, self.count = torch.zeros(1), 0

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.sum, self.count = self.sum + latents.sum(), self.count + 1
        return self.sum.clone()

    def state_dict(self):
        return {"sum": self.sum, "count": self.count}

    def load_state_dict(self, state) -> None:
        self.sum, self.count = state["sum"], state["count"]


CASES = [
    {},
    {"order": "wavefront"},
    {"order": "wavefront", "batch": 2},
    {"order": "block_first"},
    {"order": "step_first"},
    {"pairs": True},
    {"order": "wavefront", "pairs": True},
    {"order": "step_first", "pairs": True},
    {"cache_source": "next_step"},
    {"order": "wavefront", "cache_source": "next_step"},
    {"window_frames": (3, 6, 7)},
    {"window_frames": None},
    {"window_frames": 8, "sink_frames": 2, "order": "wavefront"},
    {"prefix": PREFIX, "num_frames": 16},
    {"prefix": PREFIX, "num_frames": 16, "order": "wavefront", "window_frames": 5},
    {"prefix": PREFIX, "num_frames": 16, "order": "step_first", "window_frames": 5},
    {"executor": "recorded"},
    {"trajectory": "ode", "model": [make_model(s) for s in range(STEPS)]},
    {"on_new_text": "recache"},
    {"on_new_text": "recache", "order": "block_first"},
    {"on_new_text": "recache", "order": "wavefront", "prefix": PREFIX, "num_frames": 16},
    {"cache_dtype": torch.float8_e4m3fn, "order": "wavefront"},
]
# where a pair spans two blocks, or every block has begun, another text cannot show
FORKS = [case for case in CASES if not case.get("pairs") and case.get("order") != "step_first"]


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A session after the first block."""
    first = start()
    next(iter(first))
    return save_session(tmp_path_factory.mktemp("session") / "s.safetensors", first).read_bytes()


@pytest.fixture
def saved(content, tmp_path) -> Path:
    """It in a file."""
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("options", CASES, ids=brief)
def test_what_goes_on_is_what_was_never_interrupted(tmp_path, options):
    whole = latents(start(**options))
    for after in (1, 3):
        first, decoder = start(**options), Carrying()
        made = list(itertools.islice(first, after))
        for block in made:
            decoder.decode(block.latents)
        save_session(tmp_path / "s.safetensors", first, decoder)
        if after == 3:  # the file must not depend on what the rollout does next, nor that on the file
            assert torch.equal(latents([*made, *first]), whole)
        second, again = start(text=TEXT.clone(), **options), Carrying()
        found = load_session(tmp_path / "s.safetensors", second, again)
        assert found.blocks == made[-1].block + 1 == second.blocks_done
        assert again.count == after and torch.equal(again.sum, decoder.sum)
        assert torch.equal(latents([*made, *second]), whole)
        assert second.forwards_done == second.forwards_total and not second._executor.latents


@pytest.mark.parametrize("options", FORKS, ids=brief)
def test_a_fork_is_the_run_whose_text_changes_there(tmp_path, options):
    options = {"model": SHALLOW, **options}
    first = start(**options)
    made = list(itertools.islice(first, 2))
    save_session(tmp_path / "s.safetensors", first)
    fork = start(OTHER, **options)
    block = load_session(tmp_path / "s.safetensors", fork).fork_block
    assert made[-1].block < block < first.num_blocks
    expected = latents(start(switched(block), **options))
    assert torch.equal(latents([*made, *fork]), expected)
    assert not torch.equal(expected, latents(start(**options)))


def test_a_fork_of_a_fork(tmp_path):
    """Texts of blocks in flight are handed on, whichever rollout they began in."""
    options = {"order": "wavefront", "num_frames": 21}
    run = start(**options)
    made = list(itertools.islice(run, 1))
    bounds = []
    for text in (OTHER, TEXT):
        save_session(tmp_path / "s.safetensors", run)
        run = start(text, **options)
        bounds.append(load_session(tmp_path / "s.safetensors", run).fork_block)
        made += list(itertools.islice(run, 1))
    assert bounds == [2, 3] and made[-1].block == 2
    expected = start(lambda n: OTHER if n == 2 else TEXT, **options)
    assert torch.equal(latents([*made, *run]), latents(expected))


@pytest.mark.parametrize("contiguous", [True, False])
def test_prompts_that_share_memory_go_on(tmp_path, contiguous):
    """Two of one shape, and one that lies inside another."""
    both = torch.cat([TEXT, -TEXT])
    both = both if contiguous else both.mT.contiguous().mT
    prompts = [both[:1], both[1:], both[1:, :2]]
    options = {"text": lambda block: prompts[block % 3], "order": "step_first"}
    first = start(**options)
    blocks = [next(iter(first))]
    path = save_session(tmp_path / "s.safetensors", first)
    second = start(**options)
    load_session(path, second)
    assert len([name for name in load_file(path) if name.startswith("text.")]) == 3
    assert torch.equal(latents([*blocks, *second]), latents(start(**options)))


def test_noise_of_a_fork_may_differ_too(tmp_path):
    first = start()
    made = list(itertools.islice(first, 2))
    save_session(tmp_path, first)
    fork = start(seed=1)
    load_session(tmp_path, fork)
    rest = latents(fork)
    assert (tmp_path / FILE).is_file()
    assert not torch.equal(rest, latents(list(start())[len(made) :]))


def test_the_file_keeps_no_more_than_it_must(tmp_path):
    """One text for many blocks is there once; tensors only, no pickle; nothing temporary stays."""
    first = start(order="wavefront", num_frames=30)
    next(iter(first))
    about = {"frames": 3, "size": (2, 4)}
    path = save_session(tmp_path / "s.safetensors", first, about=about)
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert [name for name in names if name.startswith("text.")] == ["text.0"]
    assert json.loads(metadata["about"]) == {"frames": 3, "size": [2, 4]} and metadata["format"] == "hiar-session"
    second = start(order="wavefront", num_frames=30)
    assert load_session(path, second, about=about).about == {"frames": 3, "size": [2, 4]}
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_write_that_fails_leaves_the_last_session(tmp_path, monkeypatch):
    first = start()
    next(iter(first))
    path = save_session(tmp_path / "s.safetensors", first)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hiar_model.rollout.state_io.save_tensors", full)
    with pytest.raises(ValueError, match="No space left on device"):
        save_session(path, first)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def damaged(path, changed=lambda tensors: None, **told):
    """Rewrite a session with other tensors and metadata."""
    with safe_open(path, "pt") as file:
        was = file.metadata()
    was.pop("sums", None)  # as older files are
    tensors = load_file(path)
    changed(tensors)
    save_file(tensors, path, metadata={k: v for k, v in {**was, **told}.items() if v is not None})


def in_flight(change):
    """A change of the first latents in flight."""

    def changed(tensors):
        name = min(name for name in tensors if name.startswith("latents."))
        if (other := change(tensors.pop(name))) is not None:
            tensors[name] = other

    return lambda path: damaged(path, changed, about="{}")


OF_3E7E919 = {
    "about": '{"weights_sha256": "117b16bf08f7201ed3dd4634408d9437c2d86b78e3a6d347f30560727964f6c0", "seed": 0, '
    '"frames": 12}',
    "key": "\"Plan(steps=4, order='stream', frames_per_block=3, prefix_frames=0, window_frames=(12, 12, 12, 12), "
    "sink_frames=0, cache_source='own', pairs=False), None blocks, batch 1, latents [16, 8, 8], torch.float32, "
    'noise levels 1, 0.75, 0.5, 0.25, 0, sde, context at 0, heads 0 to 1"',
    "noise": '"philox-128"', "groups_done": "19", "step": "0", "format": "hiar-session", "blocks": "4",
    "texts": '{"2": 0, "3": 0}', "decoder": "null", "version": "1",
}  # fmt: skip
"""The header that `hiar generate --order stream --num-frames 12 --session` of revision 3e7e919 wrote."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "cannot read .*s.safetensors"),
        (lambda path: path.write_bytes(b"x" * 40), "cannot read .*s.safetensors"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot read .*s.safetensors"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "is no session: format must be 'hiar-session', got None"),
        (lambda path: damaged(path, about="{}", texts=None), "not a rollout state .*: texts is missing"),
        (lambda path: damaged(path, about="{}", noise=None), "state: its noise is 'torch-32', this version draws"),
        (lambda path: damaged(path, about="{}", noise='"new"'), "state: its noise is 'new', this version draws"),
        (lambda path: damaged(path, version="2"), "is a session of version 2, this is version 1"),
        (lambda path: damaged(path, **OF_3E7E919), "s.safetensors: a state of an older version, which this one cannot"),
        *[
            (lambda path, name=name: damaged(path, **{"about": "{}", name: None}), f"{name} is missing")
            for name in ("key", "groups_done", "step", "blocks", "decoder", "texts")
        ],
        *[
            (lambda path, name=name: damaged(path, **{"about": "{}", name: "[]"}), rf"damaged: {name} must be .*'\[\]'")
            for name in ("key", "groups_done", "step", "blocks", "decoder", "texts", "about", "noise")
        ],
        (lambda path: damaged(path, version=None), "is a session of version None"),
        (lambda path: damaged(path, about=None), "about is missing"),
        (lambda path: damaged(path, about="{}", groups_done="null"), "groups_done must be a whole .*, got 'null'"),
        (lambda path: damaged(path, about="{}", groups_done="-1"), "groups_done must be a whole number of at least 0"),
        (lambda path: damaged(path, texts='{"x": 0}', about="{}"), "texts names prompt 0 for block 'x'"),
        (lambda path: damaged(path, lambda t: t.pop("text.0"), about="{}"), "texts names prompt 0 for block '0'"),
        (lambda path: damaged(path, lambda t: t.pop("cache.k.0"), about="{}"), "k.0 must be .*, got nothing"),
        (in_flight(lambda x: None), r"damaged: latents \d/\d are missing"),
        (in_flight(lambda x: x[..., :-1].contiguous()), r"damaged: latents \d/\d are torch.float32 \[1, .*expected"),
        (in_flight(lambda x: x.to(torch.int32)), r"latents \d/\d are torch.int32 .*, expected \[1"),
        (lambda path: (path.unlink(), path.mkdir(), (path / FILE).mkdir()), "session.safetensors: it is a folder"),
        (lambda path: damaged(path, about='{"weights": "abc"}'), "weights was 'abc', now it is 'def'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(saved, change, message):
    change(saved)
    fresh = start()
    with refused(message):
        load_session(saved, fresh, about={"weights": "def"})
    assert torch.equal(latents(fresh), uninterrupted()), "the rollout must be untouched"


def test_a_byte_that_has_changed_is_noticed(saved, content):
    """Wherever it lies, among the tensors or in the header: the file cannot be read, or it says the same."""
    tensors, metadata = state_io.read(saved)
    of_tensors = len(content) - sum(x.nbytes for x in tensors.values())
    chosen, changed = random.Random(0), set()
    for place in (*chosen.sample(range(of_tensors), 60), *chosen.sample(range(of_tensors, len(content)), 60)):
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :])
        try:
            again, now = state_io.read(saved)
        except ValueError as error:
            assert isinstance(error, state_io.DamagedFile) and str(error).startswith(f"cannot read {saved}: ")
            changed |= set(re.findall("it is damaged: (.+) is not what was written", str(error)))
            continue
        assert place < of_tensors and metadata.items() <= now.items() and again.keys() == tensors.keys()
        assert all(torch.equal(x, again[name]) for name, x in tensors.items())
    assert "its metadata" in changed and tensors.keys() & changed


@pytest.mark.parametrize("nbytes", [1, 8, 19])
def test_every_bit_counts_in_a_checksum(nbytes):
    """Also those behind the last eight bytes, and of a slice that begins anywhere."""
    data = torch.arange(1, 33, dtype=torch.uint8)
    before = state_io.checksum(data[3 : 3 + nbytes])
    assert before == state_io.checksum(data[3 : 3 + nbytes].clone())
    for bit in range(8 * nbytes):
        data[3 + bit // 8] ^= 1 << bit % 8
        assert state_io.checksum(data[3 : 3 + nbytes]) != before, bit
        data[3 + bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 18}, "state of a different rollout: it has 5 blocks, this one 6 blocks$"),
        ({"num_frames": None}, r"it has 5 blocks, this one no last block \(num_latent_frames=None, open_end=True\)$"),
        ({"window_frames": 6}, "state of a different rollout"),
        ({"order": "block_first"}, "state of a different rollout"),
        ({"trajectory": "ode"}, "state of a different rollout: it has sde, this one ode$"),
        ({"context_noise": 10.0}, "context at 10"),
        ({"on_new_text": "recache"}, "recache"),
        ({"cache_dtype": torch.float8_e4m3fn}, "rollout: this one has kv_dtype=float8_e4m3fn, it has not$"),
        ({"linear_dtype": "float8_e4m3fn"}, "rollout: this one has linear_dtype=float8_e4m3fn, it has not$"),
        (
            {"cache_dtype": torch.float8_e4m3fn, "attention_dtype": "float8_e4m3fn"},
            "this one has kv_dtype=float8_e4m3fn, attention_dtype=float8_e4m3fn, it has not$",
        ),
        ({"model": make_model().double()}, "float64"),
    ],
    ids=brief,
)
def test_another_rollout_is_refused(saved, options, message):
    with pytest.raises(ValueError, match=message):
        load_session(saved, start(**options))


def test_another_schedule_is_refused(saved):
    options = {"num_frames": 15, "window_frames": 7, "order": "stream", **SIZE}
    with pytest.raises(ValueError, match="noise levels 1, 0.9"):
        load_session(saved, make_rollout(MODEL, TEXT, FlowSchedule((1000, 600, 300)), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "step_first"}, r"all 5 blocks have started with theirs \(order step_first\)"),
        ({"pairs": True}, "fuse_cache_denoise=True"),
    ],
)
def test_a_fork_that_could_not_show_is_refused(tmp_path, options, message):
    first = start(**options)
    next(iter(first))
    path = save_session(tmp_path / "s.safetensors", first)
    with pytest.raises(ValueError, match=f"no fork to another prompt .*{message}"):
        load_session(path, start(OTHER, **options))


@pytest.mark.parametrize(("before", "after"), [(Carrying(), None), (None, Carrying())])
def test_a_decoder_of_another_kind_is_refused(tmp_path, before, after):
    first = start()
    next(iter(first))
    path = save_session(tmp_path / "s.safetensors", first, before)
    with pytest.raises(ValueError, match="decoder state, this decoder takes"):
        load_session(path, start(), after)


def test_a_refusal_of_either_leaves_rollout_and_decoder_as_they_were(tmp_path):
    first, decoder = start(), Carrying()
    decoder.decode(next(iter(first)).latents)
    path = save_session(tmp_path / "s.safetensors", first, decoder)

    class Refusing(Carrying):
        def load_state_dict(self, state) -> None:
            if state["count"]:
                raise ValueError("sum is of another decoder")

    fresh = start()
    with pytest.raises(ValueError, match=r"s\.safetensors: sum is of another decoder"):
        load_session(path, fresh, Refusing())
    assert torch.equal(latents(fresh), latents(start()))
    other = Carrying()
    with pytest.raises(ValueError, match="state of a different rollout"):
        load_session(path, start(num_frames=18), other)
    assert other.count == 0 and float(other.sum) == 0


def test_what_another_thread_writes_is_a_copy():
    """On the device where both are already: the rollout and the decoder go on meanwhile."""
    first, decoder = start(on_new_text="recache"), Carrying()
    decoder.decode(next(iter(first)).latents)
    tensors, _ = session_tensors(first, decoder, device=torch.device("cpu"))
    before = {name: state_io.checksum(x) for name, x in tensors.items()}
    decoder.sum.zero_()
    next(iter(first))
    assert before.keys() >= {"decoder.sum", "cache.k.0"} and any(name.startswith("history.") for name in before)
    assert before == {name: state_io.checksum(x) for name, x in tensors.items()}


def test_a_pipeline_of_several_is_no_session(tmp_path):
    first = start(executor="pipeline")
    first.pipeline.group = object()
    with refused("a session is one file of one process, this rollout is a pipeline of several: use RunFolder"):
        save_session(tmp_path, first)
    assert not list(tmp_path.iterdir())


def test_a_pipeline_alone_is_one_process(tmp_path):
    options = {"executor": "pipeline"}
    first = start(**options)
    made = list(itertools.islice(first, 2))
    path = save_session(tmp_path / "s.safetensors", first)
    second = start(**options)
    load_session(path, second)
    assert torch.equal(latents([*made, *second]), latents(start()))
