"""bench/studies/eight_bits_*.py: runs that are made once, differences of pairs, errors of random weights."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from refusals import refused
from small_toy import PROMPT, TRAIN_FRAMES, small_folder, small_model  # noqa: F401 (fixtures)

from bench.studies import eight_bits_drift, eight_bits_errors
from bench.studies.eight_bits_drift import DriftRun, inner_in_8_bits, make
from bench.studies.eight_bits_table import by_eighth, main, read, rows, shape_rows
from hiar_model import ExecutionConfig, WanConfig
from hiar_model.models.quantized_linear import QuantizedLinear
from hiar_model.toy.prompt import parse

pytestmark = pytest.mark.cpu


# The table


PROMPTS = ("a red circle moving up", "a blue circle moving up", "a red plus moving up")


def write(folder, variant: str, seed: int, videos: list[list[int]], order: str = "stream", **changes) -> None:
    """A run with these valid frames in stretches of 10; other measures follow from them."""
    run = {
        "model": "scenes", "order": order, "variant": variant, "seed": seed, "weights_sha256": "a", "prompts": 2,
        "num_frames": 320, "stretch_frames": 10,
        "videos": [
            {"prompt": PROMPTS[i], "valid": valid, "overlap": [v / 10 for v in valid],
             "background_change": [0.5 - v / 100 for v in valid], "speed": valid[0] / 10}
            for i, valid in enumerate(videos)
        ],
        **changes,
    }  # fmt: skip
    (folder / f"scenes-{order}-{variant}-seed{seed}.json").write_text(json.dumps(run))


def test_differences_are_of_pairs_and_their_spread_over_prompts(tmp_path):
    good, falling = [10] * 32, [10] * 28 + [0] * 4
    write(tmp_path, "bfloat16", 0, [good, falling])
    write(tmp_path, "bfloat16", 1, [[8] * 32, [8] * 32])
    write(tmp_path, "linear", 0, [falling, falling])  # 12.5 points worse, and the same
    write(tmp_path, "linear", 1, [[7] * 32, [7] * 32])  # 10 points worse, each
    write(tmp_path, "linear", 2, [good, good])  # has no partner
    base, linear, long_base, long_linear = rows(tmp_path)
    assert [row[2] for row in (base, linear, long_base, long_linear)] == ["80", "80", "320", "320"]
    assert long_base[3:8] == ["bfloat16", "4", "86.9", "", "-25.0"]
    assert long_linear[4:7] == ["4", "78.8", "**-8.1 ± 3.1**"], "of -11.25 and -5: half of what they are apart"
    assert long_linear[7] == "-25.0 ± 25.0", "one video of four falls by 100 points more"
    assert linear[5:8] == ["85.0", "**-5.0 ± 0.0**", "+0.0 ± 0.0"], "what falls later does not count"
    assert linear[-1] == "" and long_linear[-1] == "**-0.050 ± 0.000**", "speed is of the whole video"
    assert by_eighth("scenes", "stream", "linear", tmp_path)[:2] == [[100] * 7 + [0], [70] * 8]


def test_what_was_not_measured_is_left_out(tmp_path):
    for variant in ("bfloat16", "keys"):
        write(tmp_path, variant, 0, [[10] * 32] * 3)
    path = tmp_path / "scenes-stream-keys-seed0.json"
    run = json.loads(path.read_text())
    for video, change in zip(run["videos"], (None, 0.6, 0.8), strict=True):
        video["background_change"][28:] = [change] * 4
    path.write_text(json.dumps(run))
    short, long = (row for row in rows(tmp_path) if row[3] == "keys")
    assert short[9] == "+0.0000 ± 0.0000" and long[9] == "**+0.3000 ± 0.1000**", "two pairs are left"


def test_shapes_by_themselves(tmp_path):
    write(tmp_path, "bfloat16", 0, [[10] * 32] * 3)
    write(tmp_path, "keys", 0, [[9] * 32, [7] * 32, [5] * 32])
    base, keys = shape_rows(tmp_path)
    assert base[3:] == ["100.00", "", "100.00"]
    assert keys[3:] == ["-20.00 ± 10.00", "", ""], "one prompt has no spread"


def test_other_weights_and_other_files_are_refused(tmp_path, monkeypatch):
    with refused("holds no run"):
        read(tmp_path)
    write(tmp_path, "bfloat16", 0, [[10] * 32])
    write(tmp_path, "keys", 0, [[10] * 32], weights_sha256="b")
    with refused("seed 0: weights_sha256 of keys and bfloat16 differ: b and a"):
        list(rows(tmp_path))
    (tmp_path / "other.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["eight_bits_table", str(tmp_path)])
    with pytest.raises(SystemExit, match="other.json is not a run"):
        main()


# Runs


def test_a_run_reads_every_stretch_of_every_video(model):
    prompts = [parse(PROMPT), parse("a green square moving up")]
    run = make(DriftRun("small", "stream", "keys_linear", 3), model, prompts, 4 * TRAIN_FRAMES)
    assert run["execution"] == {"kv_dtype": "float8_e4m3fn", "linear_dtype": "float8_e4m3fn"}
    assert (run["dtype"], run["stretch_frames"], run["rollout"]["order"]) == ("bfloat16", TRAIN_FRAMES, "stream")
    assert [len(video["valid"]) for video in run["videos"]] == [4, 4]
    assert (
        make(DriftRun("small", "block_first", "keys_linear", 3), model, prompts, 4 * TRAIN_FRAMES)["videos"]
        != run["videos"]
    )
    assert make(DriftRun("small", "stream", "bfloat16", 3), model, prompts, 4 * TRAIN_FRAMES)["videos"] != run["videos"]


def test_the_first_and_the_last_block_can_stay_as_they_are():
    model = eight_bits_errors.random_model(SMALL)
    layers = [name for name, module in inner_in_8_bits(model).named_modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 4 and {name.split(".")[1] for name in layers} == {"1"}


def test_orders_of_the_matched_graph_give_one_video(model):
    prompts = [parse(PROMPT)]
    one, *others = (
        make(DriftRun("small", order, "keys_linear", 0), model, prompts, 2 * TRAIN_FRAMES)["videos"][0]["overlap"]
        for order in ("stream", "step_first", "wavefront")
    )
    for other in others:
        assert other == pytest.approx(one, abs=0.01)


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    made: list[tuple[str, int]] = []
    videos = [
        {"prompt": PROMPTS[0], "valid": [1] * 32, "overlap": [1.0] * 32, "background_change": [0.0] * 32, "speed": 1.0}
    ]

    def make_some(run, model, prompts, frames):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((run.variant, run.seed))
        return {**eight_bits_drift.about(run, model, len(prompts), frames), "videos": videos, "cpu_seconds": 1.0}

    def load(name):
        return SimpleNamespace(name=name, weights_sha256="a", train_frames=12)

    for name, value in {"PLAN": (("small", "stream", ("bfloat16", "keys")),), "make": make_some,
                        "load_video_model": load}.items():  # fmt: skip
        monkeypatch.setattr(eight_bits_drift, name, value)
    monkeypatch.setattr(sys, "argv", ["eight_bits_drift", "--results", str(tmp_path / "runs")])
    with pytest.raises(KeyboardInterrupt):
        eight_bits_drift.main()
    assert made == [("bfloat16", 0), ("keys", 0), ("bfloat16", 1)]
    assert len(list((tmp_path / "runs").iterdir())) == 3, "what was done is stored"
    made.clear()
    for _ in range(2):
        eight_bits_drift.main()
    assert made == [("keys", 1), ("bfloat16", 2), ("keys", 2)]
    assert "| small | stream | 384 | keys | 3 |" in capsys.readouterr().out


# Errors


SMALL = WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=3, freq_dim=16, text_dim=8, text_len=4)


def test_errors_are_those_of_the_formats(monkeypatch):
    monkeypatch.setattr(eight_bits_errors, "NEW", 3)
    few = ("bfloat16", "keys", "linear", "linear_inner")
    monkeypatch.setattr(eight_bits_errors, "VARIANTS", {v: eight_bits_errors.VARIANTS[v] for v in few})
    table = {
        (weights, variant): list(map(float, errors)) for weights, variant, *errors in eight_bits_errors.rows(SMALL)
    }
    assert len(table) == 4 * len(few)
    for weights in eight_bits_errors.OUTLIERS:
        velocity, keys, latents = zip(*(table[weights, v] for v in ("bfloat16", "keys", "linear")), strict=True)
        assert keys[1] > 2 * keys[0] and velocity[2] > 2 * velocity[0] and latents[2] > latents[0]
    assert 2 < table["plain", "keys"][1] < 4, "half a step of e4m3 is 1 of 16 to 1 of 32; uniformly 2.6% of the number"


def test_no_error_against_itself():
    model = eight_bits_errors.random_model(SMALL)
    one = eight_bits_errors.outputs(model, ExecutionConfig())
    assert one.errors(one) == [0, 0, 0] and not model.head._forward_hooks
    assert one.keys.shape == (1, 9 * 16, 2, 32) and one.latents.shape == (1, 12, 16, 8, 8)


def test_rounded_layers_are_those_that_run_in_8_bits(monkeypatch):
    monkeypatch.setattr(eight_bits_errors, "NEW", 3)
    model = eight_bits_errors.random_model(SMALL)
    (name, *roundings), *others = eight_bits_errors.ROUNDED
    exact, run = (
        eight_bits_errors.outputs(model, ExecutionConfig(linear_dtype=dtype)) for dtype in (None, "float8_e4m3fn")
    )
    both = eight_bits_errors.outputs(eight_bits_errors.rounded(model, *roundings), ExecutionConfig())
    assert name == "weights and activations" and both.errors(run)[0] < 0.1 * run.errors(exact)[0]
    for part, *roundings in others:
        if part not in ("weights", "only block 0"):
            continue
        made = eight_bits_errors.outputs(eight_bits_errors.rounded(model, *roundings), ExecutionConfig())
        assert 0 < made.errors(exact)[0] < both.errors(exact)[0]
