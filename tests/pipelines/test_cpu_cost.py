"""What a short video of the toy costs on a CPU: counted, not timed. And the threads that it runs in."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from made_runs import prepare
from small_toy import small_folder, small_model  # noqa: F401 (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

import hiar_model
from hiar_model.models import threads
from hiar_model.models.threads import cpu_threads, fitting_threads

pytestmark = pytest.mark.cpu

PROMPT = "a red circle moving right"
NOT_NEEDED = ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers", "diffusers", "rich")


@pytest.fixture(scope="module")
def toy():
    return hiar_model.load_video_model("toy", "cpu")


@pytest.fixture
def two_threads():
    """The caller's setting, which must be found again."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_command_loads_no_compiler(tmp_path):
    """Each of these takes longer to import than the video to make, and torch loads some of them at a hint."""
    program = (
        "import sys; from hiar_model.cli import main; "
        f"assert main(['generate', {PROMPT!r}, '-o', 'a.mp4', '--num-frames', '6', '--device', 'cpu']) == 0; "
        f"print([name for name in {NOT_NEEDED} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


class Calls(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self):
        super().__init__()
        self.by_name = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.by_name[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("order", "most"), [("step_first", 125), ("wavefront", 125)])
def test_calls_of_a_block(toy, order, most):
    """One transformer block in a task of a full window: 210 and 208 calls of torch at revision 6a287b2."""
    block, seen = toy.transformer.blocks[1], []

    def counted(*args):
        with Calls() as calls:
            found = type(block).forward(block, *args)
        seen.append(calls.by_name)
        return found

    block.forward = counted
    try:
        for _ in prepare(PROMPT, model=toy, num_frames=24, order=order):
            pass
    finally:
        del block.forward
    last = seen[-1]
    assert last.total() <= most, last.most_common()


def test_calls_of_a_video(toy):
    """All of a short video, from its text to its pixels, in the order that is chosen for it: 79,147 at 6a287b2, which
    chose step_first.
    """
    run = prepare(PROMPT, model=toy, num_frames=24)
    assert run.rollout.plan.order == "wavefront"
    with Calls() as calls:
        assert sum(map(len, run)) == 24
    assert calls.by_name.total() <= 19_000, calls.by_name.most_common(20)


# Threads


def test_a_small_model_takes_one_thread_and_gives_the_others_back(model, two_threads):
    inside = []
    video = hiar_model.generate(
        PROMPT, model=model, num_frames=6, on_progress=lambda *_: inside.append(torch.get_num_threads())
    )
    assert set(inside) == {1} and torch.get_num_threads() == 2
    assert video.metadata["threads"] == 1, "the record says what it was made with"


def test_threads_are_given_back_between_blocks(model, two_threads):
    inside = []
    blocks = hiar_model.stream(PROMPT, model=model, on_progress=lambda *_: inside.append(torch.get_num_threads()))
    for _ in range(3):
        next(blocks)
        assert torch.get_num_threads() == 2
    torch.set_num_threads(3)  # the caller changes its mind
    next(blocks)
    assert torch.get_num_threads() == 3 and set(inside) == {1}
    blocks.close()
    assert torch.get_num_threads() == 3


def test_threads_are_given_back_after_an_error(model, two_threads):
    def fail(*_):
        assert torch.get_num_threads() == 1
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        hiar_model.generate(PROMPT, model=model, num_frames=6, on_progress=fail)
    assert torch.get_num_threads() == 2


def test_threads_that_are_asked_for(model, two_threads):
    inside = []
    more = {"threads": 3, "on_progress": lambda *_: inside.append(torch.get_num_threads())}
    video = hiar_model.generate(PROMPT, model=model, num_frames=6, **more)
    assert set(inside) == {3} and torch.get_num_threads() == 2 and video.metadata["threads"] == 3
    with pytest.raises(ValueError, match="threads must be a whole number from 1 to"):
        hiar_model.generate(PROMPT, model=model, threads=0)


def test_a_large_model_keeps_the_setting(model, two_threads, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 2**10)  # of its matrices the largest has 2^11
    inside = []
    video = hiar_model.generate(
        PROMPT, model=model, num_frames=6, on_progress=lambda *_: inside.append(torch.get_num_threads())
    )
    assert set(inside) == {2} and video.metadata["threads"] == 2
    assert video.metadata["rollout"]["order"] == "step_first"


def test_which_networks_are_small():
    def network(name, device="cpu"):
        weight = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(
            config=hiar_model.WanConfig.from_name(name), patch_embedding=SimpleNamespace(weight=weight)
        )

    toy, wan = network("toy"), network("wan2.1-t2v-1.3b")
    assert fitting_threads(toy) == 1
    assert fitting_threads(toy, toy) == 1
    assert fitting_threads(wan) is None
    assert fitting_threads(toy, wan) is None
    assert fitting_threads(network("toy", "cuda")) is None
    assert fitting_threads(wan, requested=4) == 4


def test_nothing_is_touched_where_nothing_is_chosen(two_threads):
    with cpu_threads(None):
        torch.set_num_threads(3)
    assert torch.get_num_threads() == 3
