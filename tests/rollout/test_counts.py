"""Counts that do not fit, of texts, noises, prefixes, timesteps: refused at the call, before any layer runs."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from made_runs import make_rollout

from hiar_model import ExecutionConfig, FlowSchedule, HiARTransformer, Rollout, RolloutConfig, WanConfig, rollout
from hiar_model.models.transformer import Block
from hiar_model.rollout.infill import infill

pytestmark = pytest.mark.cpu

CONFIG = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=1, freq_dim=8, text_dim=6, text_len=5,
                   in_channels=2, out_channels=2)  # fmt: skip
SCHEDULE = FlowSchedule(steps=(1000, 500))
TEXT, NOISE, PREFIX = torch.ones(2, 4, 6), torch.zeros(2, 6, 2, 2, 4), torch.zeros(2, 3, 2, 2, 4)


@pytest.fixture
def model(monkeypatch) -> HiARTransformer:
    """One whose layers may not run."""

    def ran(*_):
        raise AssertionError("a layer ran")

    monkeypatch.setattr(Block, "forward", ran)
    return HiARTransformer(CONFIG).eval()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (torch.ones(3, 4, 6), "[1 or 2, at most 5, 6] (one prompt for all 2 videos or one for each), got [3, 4, 6]"),
        (torch.ones(4, 6), "[1 or 2, at most 5, 6] (one prompt for all 2 videos or one for each), got [4, 6]"),
        (torch.ones(2, 6, 6), "[1 or 2, at most 5, 6] (one prompt for all 2 videos or one for each), got [2, 6, 6]"),
        (torch.ones(2, 4, 7), "[1 or 2, at most 5, 6] (one prompt for all 2 videos or one for each), got [2, 4, 7]"),
        (TEXT.long(), "of a floating dtype, got torch.int64"),
        (TEXT.to(torch.complex64), "of a floating dtype, got torch.complex64"),
        ([TEXT[:1], TEXT[1:]], "a tensor [1 or 2, at most 5, 6], got list"),
        (None, "a tensor [1 or 2, at most 5, 6], got NoneType"),
    ],
)
@pytest.mark.parametrize("of_block", [False, True])
def test_texts(model, text, says, of_block):
    given = (lambda block: TEXT if block == 0 else text) if of_block else text
    name = "prompt_embeds of block 1" if of_block else "prompt_embeds"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name} must be {says}')}$"):
        run = make_rollout(model, given, SCHEDULE, num_frames=6, height=2, width=4, batch=2)
        run.prompt_embeds(0), run.prompt_embeds(1)


def test_a_text_of_a_block_is_refused_before_its_forward(model):
    message = r"^prompt_embeds of block 0 must be \[1, at most 5, 6\] \(the prompt of one video\)"
    with pytest.raises(ValueError, match=message):
        list(make_rollout(model, lambda block: TEXT, SCHEDULE, num_frames=6, height=2, width=4))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"noise": NOISE[:1]}, r"noise must be \[2, 6, 2, 2, 4\], got \[1, 6, 2, 2, 4\]"),
        ({"noise": NOISE[:, :3]}, r"noise must be \[2, 6, 2, 2, 4\], got \[2, 3, 2, 2, 4\]"),
        ({"noise": NOISE[0]}, r"noise must be \[2, 6, 2, 2, 4\], got \[6, 2, 2, 4\]"),
        ({"prefix": PREFIX[:1]}, r"prefix must be \[2, any, 2, 2, 4\], got \[1, 3, 2, 2, 4\]"),
        ({"prefix": PREFIX[0]}, r"prefix must be \[2, any, 2, 2, 4\], got \[3, 2, 2, 4\]"),
        ({"prefix": [PREFIX]}, r"prefix must be a tensor \[2, any, 2, 2, 4\], got list"),
        ({"noise": NOISE.int()}, r"noise must be of a floating dtype, got torch\.int32"),
        ({"prefix": PREFIX.bool()}, r"prefix must be of a floating dtype, got torch\.bool"),
        ({"video_ids": [0]}, r"video_ids must be \[2\], got \[1\]"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
    ],
)
def test_noises_and_prefixes(model, options, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        make_rollout(model, TEXT, SCHEDULE, **{"num_frames": 6, "height": 2, "width": 4, "batch": 2, **options})


@pytest.mark.parametrize("size", [(2,), (2, 4, 4), 4, None])
def test_sizes_of_a_latent(model, size):
    config, says = RolloutConfig((1000, 500)), r"latent_size must be \(height, width\) of a latent frame, got .+"
    with pytest.raises(ValueError, match=f"^{says}$"):
        Rollout(model, TEXT[:1], config, num_latent_frames=6, latent_size=size)


@pytest.mark.parametrize(("name", "given"), [("noise", NOISE[0]), ("prefix", PREFIX[0])])
def test_the_function(model, name, given):
    options = {"noise": NOISE, name: given}
    with pytest.raises(
        ValueError, match=rf"^{name} must be \[any, any, any, any, any\], got \[.., 2, 2, 4\]".replace("..", ".")
    ):
        rollout(model, options.pop("noise"), TEXT, SCHEDULE, **options)


def test_renoise():
    model = HiARTransformer(CONFIG).eval()
    size = {"num_frames": 6, "height": 2, "width": 4, "batch": 2}
    run = make_rollout(model, TEXT, SCHEDULE, **size, renoise=lambda s, n: NOISE[:1, :3])
    with pytest.raises(
        ValueError, match=r"^noise\(step 0, block 0\) must be \[2, 3, 2, 2, 4\], got \[1, 3, 2, 2, 4\]$"
    ):
        next(iter(run))


@pytest.mark.parametrize(
    ("latents", "timesteps", "text", "says"),
    [
        (NOISE, torch.ones(1, 6), TEXT, r"timesteps must be \[2, 6\] or \[2\], got \[1, 6\]"),
        (NOISE, torch.ones(2, 3), TEXT, r"timesteps must be \[2, 6\] or \[2\], got \[2, 3\]"),
        (NOISE, torch.ones(3), TEXT, r"timesteps must be \[2, 6\] or \[2\], got \[3\]"),
        (NOISE, torch.ones(2, 6), torch.ones(3, 4, 6), r"prompt_embeds must be \[1 or 2, L, 6\], got \[3, 4, 6\]"),
        (NOISE, torch.ones(2, 6), torch.ones(4, 6), r"prompt_embeds must be \[1 or 2, L, 6\], got \[4, 6\]"),
        (NOISE[0], torch.ones(2, 6), TEXT, r"latents must be \[B, F, 2, H, W\], got \[6, 2, 2, 4\]"),
        (NOISE, 500, TEXT, "timesteps must be a tensor, got int"),
        (NOISE.numpy(), torch.ones(2, 6), TEXT, "latents must be a tensor, got ndarray"),
        (NOISE, torch.ones(2, 6), None, "prompt_embeds must be a tensor, got NoneType"),
        (NOISE[:, :0], torch.ones(2, 0), TEXT, r"latents must hold at least one video of one frame, got \[2, 0, .*\]"),
        (NOISE[:0], torch.ones(0, 6), TEXT, r"latents must hold at least one video of one frame, got \[0, 6, .*\]"),
    ],
)
@pytest.mark.parametrize("call", ["__call__", "kv"])
def test_one_forward(model, latents, timesteps, text, says, call):
    with pytest.raises(ValueError, match=f"^{says}$"):
        getattr(model, call)(latents, timesteps, text)


@pytest.mark.parametrize(("context", "got"), [([], "0"), ("x", "'x'"), ([None] * 3, "3")])
def test_a_context_for_each_layer(model, context, got):
    with pytest.raises(ValueError, match=f"^context must hold a KVContext for each of 1 layers, got {got}$"):
        model(NOISE, torch.ones(2, 6), TEXT, context=context)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"model": "toy"},
            "model must be a HiARTransformer, or one for each of the 4 steps, got str; .*load_transformer",
        ),
        ({"model": None}, "model must be a HiARTransformer, or one for each of the 4 steps, got NoneType; "),
        ({"config": {"order": "stream"}}, r"config must be a hiar_model\.RolloutConfig, got dict$"),
        ({"config": None}, r"config must be a hiar_model\.RolloutConfig, got NoneType$"),
        ({"execution": {}}, r"execution must be a hiar_model\.ExecutionConfig, got dict$"),
        ({"latent_size": 8}, r"latent_size must be \(height, width\) of a latent frame, got 8$"),
        ({"latent_size": (8,)}, r"latent_size must be \(height, width\) of a latent frame, got \(8,\)$"),
        ({"latent_size": "88"}, r"latent_size must be \(height, width\) of a latent frame, got '88'$"),
        ({"latent_size": (8.0, 8)}, "latent_size must be a whole number of at least 1, got 8.0$"),
    ],
)
def test_objects_of_another_kind(model, wrong, says):
    """Tracebacks from inside, or of the name of a model that it is 3 networks."""
    right = {"model": model, "config": RolloutConfig(), "execution": None, "latent_size": (2, 4)}
    with pytest.raises(ValueError, match=f"^{says}"):
        Rollout(prompt_embeds=TEXT[:1], num_latent_frames=6, **{**right, **wrong})


def test_one_rollout_in_two_threads():
    """Both took the next tasks, of blocks that the other had begun: a KeyError, or a wrong video."""
    run = Rollout(HiARTransformer(CONFIG).eval(), TEXT[:1], RolloutConfig(), num_latent_frames=6, latent_size=(2, 4))
    with run._runs, pytest.raises(RuntimeError, match="^this Rollout is in use by another thread"):
        run.step()
    assert len(list(run)) == 2
    with run._runs, pytest.raises(TypeError, match=r"^a Rollout cannot be copied or pickled: load its state_dict\(\)"):
        copy.deepcopy(run)
    for state in ({}, None, {"cache": {}}):
        with pytest.raises(ValueError, match=r"^a state is a mapping that state_dict\(\) made, got "):
            run.load_state_dict(state)


def test_a_mesh_is_one():
    with pytest.raises(ValueError, match="^mesh must be None or a torch DeviceMesh, got 'step=2'$"):
        ExecutionConfig(mesh="step=2")


@pytest.mark.parametrize("known", [None, 0, "0"])
def test_known_blocks_are_numbers(model, known):
    with pytest.raises(ValueError, match=r"^known must be numbers of blocks in 0..1, or bool \[B, F\], got "):
        infill(model, NOISE, known, TEXT, SCHEDULE)


def test_infill(model):
    with pytest.raises(ValueError, match=r"^schedule must be a hiar_model\.FlowSchedule, got list$"):
        infill(model, NOISE, [0], TEXT, [1000, 500])
    with pytest.raises(ValueError, match=r"^prompt_embeds must be \[1 or 2, at most 5, 6\] .*, got \[3, 4, 6\]$"):
        infill(model, NOISE, [0], torch.ones(3, 4, 6), SCHEDULE)
