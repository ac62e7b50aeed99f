"""hiar bench: what its result holds, that it says truly what is included, and what a comparison refuses.

No test looks at how long anything took: where times matter, the clock is one of the test's own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import shlex
import types
from dataclasses import replace

import pytest
import torch
from jsonschema import Draft202012Validator
from small_toy import small_folder  # noqa: F401
from tiny_model import MODEL, SIZE, TEXT, difference, reference

from hiar_kernels import taken
from hiar_model.benchmark import plain, result, run, setting
from hiar_model.benchmark.parts import KINDS
from hiar_model.benchmark.run import bench
from hiar_model.benchmark.setting import Setting
from hiar_model.cli import build_parser, main
from hiar_model.config import FlowSchedule, RolloutConfig
from hiar_model.io import plot
from hiar_model.models.quantized_linear import linear_dtype_of
from hiar_model.models.registry import ToyDecoder, load_video_model
from hiar_model.models.video_model import VideoModel
from hiar_model.rollout import Rollout
from hiar_model.rollout.noise import keyed_noise
from hiar_model.schedule.plan import forwards

pytestmark = pytest.mark.cpu

SCHEMA = json.loads(result.SCHEMA.read_text(encoding="utf-8"))
VALID = Draft202012Validator(SCHEMA)
BLOCKS, REPEATS, PER_BLOCK, WINDOW = 2, 2, 3, 9


@pytest.fixture(scope="module", name="done")
def measured_once(folder, tmp_path_factory):
    """The result of a command, what it printed, and its picture."""
    where = tmp_path_factory.mktemp("bench")
    target, picture = where / "a.json", where / "a.png"
    words = ["bench", "--model", str(folder), "--device", "cpu", "--blocks", str(BLOCKS), "--repeats", str(REPEATS)]
    words.append("--overwrite")
    target.touch()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--parts", "true", "--json", str(target), "--plot", str(picture)]) == 0
    return types.SimpleNamespace(
        values=json.loads(target.read_text()), out=out.getvalue(), json=target, picture=picture
    )


def speeds(values: dict) -> dict:
    return {speed["decoder"]: speed for speed in values["speeds"]}


# The result


def test_it_is_as_the_schema_says(done):
    Draft202012Validator.check_schema(SCHEMA)
    VALID.validate(done.values)
    assert set(SCHEMA["required"]) | {"parts"} == set(SCHEMA["properties"]) == set(done.values)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("clocks"),
        lambda v: v["model"].pop("weights"),
        lambda v: v.update(version=2),
        lambda v: v.update(more=1),
        lambda v: v["speeds"][0].update(fps=0),
        lambda v: v["speeds"][0].pop("also_included"),
        lambda v: v["latents"].update(sha256="abc"),
        lambda v: v["rollout"].update(order="step_first"),
    ],
    ids=range(8),
)
def test_the_schema_sees_what_is_wrong(done, change):
    values = copy.deepcopy(done.values)
    change(values)
    assert not VALID.is_valid(values)


def test_its_command_repeats_it(done):
    program, command, *words = shlex.split(done.values["command"])
    again = vars(build_parser().parse_args([command, *words])[command])
    assert program == "hiar" and (again["blocks"], again["repeats"], again["device"]) == (BLOCKS, REPEATS, "cpu")
    assert again["model"] == done.values["model"]["name"] and again["parts"] is True
    assert again["window_frames"] == "model"


def test_everything_is_counted(done):
    v = done.values
    without, codec = speeds(v)["none"], speeds(v)["codec"]
    for speed in (without, codec):
        assert speed["frames"] == REPEATS * BLOCKS * PER_BLOCK
        assert speed["interval_ms"]["count"] == len(speed["intervals_ms"]) == REPEATS * BLOCKS
        assert speed["fps"] == pytest.approx(speed["frames"] / speed["seconds"])
        assert speed["device_peak_bytes"] is None
        p = speed["interval_ms"]
        assert min(speed["intervals_ms"]) <= p["p50"] <= p["p90"] <= p["p99"] <= p["max"] == max(speed["intervals_ms"])
    assert v["first_block_ms"]["count"] == REPEATS
    assert v["measured"] == {
        "blocks": BLOCKS, "repeats": REPEATS, "blocks_before": WINDOW // PER_BLOCK, "forwards_per_block": 4,
    }  # fmt: skip
    assert v["plain"]["interval_ms"]["count"] == BLOCKS
    assert v["plain"]["speedup"] == pytest.approx(without["fps"] / v["plain"]["fps"])
    assert [part["name"] for part in v["parts"]["parts"]] == [*KINDS, "idle"]
    assert v["machine"]["kind"] == "cpu" and v["machine"]["threads"] == 1 and v["machine"]["driver"] is None
    dtypes = dict.fromkeys(("weights", "kv", "attention", "linear"), "float32")
    assert v["precision"] == {**dtypes, "float32_matmul": "ieee"}
    assert speeds(v)["full"]["absent"].endswith("has no VAE: its codec decodes")


def test_latents_are_those_of_a_rollout(done, folder):
    """The sha256 is of what anybody gets from the same weights, prompt and seed."""
    model = load_video_model(folder, "cpu")
    config = model.rollout.with_order("stream")
    blocks = iter(
        Rollout(
            model.transformer, model.encode_text(done.values["model"]["prompt"]), config, num_latent_frames=None,
            latent_size=model.latent_size[1:],
        )
    )  # fmt: skip
    count = WINDOW // PER_BLOCK + BLOCKS
    latents = [block.latents for block in itertools.islice(blocks, count)]
    v = done.values["latents"]
    digest = hashlib.sha256(b"".join(block.numpy().tobytes() for block in latents)).hexdigest()
    assert (v["sha256"], v["blocks"]) == (digest, count) and v["same_in_all_repeats"] is True
    assert v["shape"] == list(latents[0].shape) and v["dtype"] == "float32"


def test_the_same_again_and_another_seed(done, folder):
    options = {"model": str(folder), "device": "cpu", "blocks": BLOCKS, "repeats": 1}
    again, other = (
        bench(Setting(**options, seed=seed), decode=False, plain=False)["latents"]["sha256"] for seed in (0, 1)
    )
    assert again == done.values["latents"]["sha256"] != other


@pytest.mark.parametrize("layers", [None, 1], ids=["weights of a folder", "random weights"])
def test_in_8_bits_only_the_baseline_has_full_weights(folder, layers):
    """What is measured has none; latents are those of a model whose full weights a rollout quantises."""
    one = Setting(
        "toy" if layers else str(folder), device="cpu", blocks=1, repeats=1, layers=layers,
        linear_dtype="float8_e4m3fn", rollout={"window_frames": 6},
    )  # fmt: skip
    subject, full = setting.load(one), setting.load(replace(one, linear_dtype=None))
    assert linear_dtype_of(subject.network) is not None and linear_dtype_of(full.network) is None
    full.execution = subject.execution
    ours, theirs = (next(iter(each.new_rollout())).latents for each in (subject, full))
    assert torch.equal(ours, theirs)
    v = bench(one, decode=False)
    assert v["precision"]["linear"] == "float8_e4m3fn"
    assert v["model"]["parameters"] == sum(x.numel() for x in full.network.parameters())
    assert 0 < v["plain"]["largest_difference"] < 5  # 8 bits against none: not the same weights


def test_repeats_that_differ_are_told(folder, monkeypatch):
    seeds = iter((0, 1))
    original = setting.BenchModel.new_rollout
    monkeypatch.setattr(setting.BenchModel, "new_rollout", lambda self, seed: original(self, next(seeds)))
    v = bench(Setting(str(folder), device="cpu", blocks=1, repeats=2), decode=False, plain=False)
    assert v["latents"]["same_in_all_repeats"] is False
    assert "NOT THE SAME IN ALL REPEATS" in dict(result.facts(v))["latents"]


def test_random_weights_and_what_is_left_out(here):
    options = {"window_frames": 6, "order": "block_first"}
    with taken() as ran:
        v = bench(
            Setting(layers=1, device="cpu", blocks=1, repeats=1, rollout=options, attention_impl="reference"),
            decode=False, plain=False,
        )  # fmt: skip
    VALID.validate(v)
    assert v["execution"]["attention_impl"] == "reference" and ("attention", "reference") in ran
    assert v["model"]["weights"] == "random, seed 0" and v["model"]["prompt"] is None and v["model"]["layers"] == 1
    assert v["measured"]["forwards_per_block"] == 5 and v["plain"] == {"absent": "left out"}
    assert [s.get("absent") for s in v["speeds"]] == [None, "left out", "left out"] and "parts" not in v


def test_progress_is_shown(folder):
    seen = []
    bench(
        Setting(str(folder), device="cpu", blocks=1, repeats=1), on_progress=lambda *step: seen.append(step)
    )  # fmt: skip
    numbers = [number for number, _, _ in seen]
    assert numbers == list(range(1, seen[0][1] + 1)) and len({total for _, total, _ in seen}) == 1
    assert [what for what, _ in itertools.groupby(text for _, _, text in seen)] == [
        "rollout 1 of 1, filling the window", "rollout 1 of 1, without decoding", "rollout 1 of 1, decoder: codec",
        "plain PyTorch",
    ]  # fmt: skip


# What is included


def test_included_is_told_truly(folder, monkeypatch):
    """A clock that only work moves: each kind of work by its own power of ten, so that a sum says what is in it."""
    clock = [0.0]

    def costs(seconds, original):
        def call(*args, **options):
            clock[0] += seconds(*args) if callable(seconds) else seconds
            return original(*args, **options)

        return call

    for module in (run, setting):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
        monkeypatch.setattr(module, "now", lambda device: clock[0])
    monkeypatch.setattr(Rollout, "_run", costs(lambda _, group: forwards([group]), Rollout._run))
    monkeypatch.setattr(ToyDecoder, "decode", costs(1e3, ToyDecoder.decode))
    monkeypatch.setattr(Rollout, "warm_up", costs(1e6, Rollout.warm_up))
    monkeypatch.setattr(VideoModel, "encode_text", costs(1e9, VideoModel.encode_text))
    monkeypatch.setattr(plain, "forward_block", costs(2**-10, plain.forward_block))
    v = bench(Setting(str(folder), device="cpu", blocks=2, repeats=2))
    tasks = 4.0  # two steps, each with a denoise and a cache task
    assert speeds(v)["none"]["intervals_ms"] == [1e3 * tasks] * 4 and speeds(v)["none"]["also_included"] == []
    assert speeds(v)["codec"]["intervals_ms"] == [1e3 * (tasks + 1e3)] * 4
    assert speeds(v)["codec"]["also_included"] == [run.DECODED]
    assert speeds(v)["none"]["fps"] == PER_BLOCK / tasks
    # the first block is there after its two denoise tasks
    assert v["first_block_ms"]["p50"] == v["first_block_ms"]["max"] == 1e3 * 2
    assert v["cold_start"]["warm_up_s"] == 1e6 and v["cold_start"]["load_s"] == 1e9
    assert v["plain"]["interval_ms"]["max"] == v["plain"]["first_block_ms"] == 1e3 * tasks * 2**-10
    said = " ".join(v["not_included"])
    assert all(word in said for word in ("reading weights", "encoding the prompt", "compiling kernels", "video file"))
    assert "every forward of the network" in v["included"][0]


def test_decoders_of_wan(tmp_path, here):
    """The full VAE of the folder, the small one with random weights: twelve pixel frames a block with each."""
    from wan_files import write_original

    folder = write_original(tmp_path / "wan")
    values = bench(
        Setting(
            str(folder), 32, 32, {"window_frames": 6, "steps": 1}, device="cpu", blocks=1, repeats=1, dtype="float32"
        ),
        plain=False,
    )
    VALID.validate(values)
    by_name = speeds(values)
    assert list(by_name) == ["none", "small", "full"] and all(s["frames"] == 12 for s in by_name.values())
    assert "random weights" in by_name["small"]["description"] and "Wan2.1_VAE.pth" in by_name["full"]["description"]
    assert values["model"]["latent"] == [16, 4, 4] and values["model"]["weights"].startswith("sha256 ")


def test_decoders_with_random_weights(monkeypatch):
    """Narrow ones: frames of the size of the latents, and the first latent frame is one pixel frame."""
    import diffusers

    narrow = functools.partial(diffusers.AutoencoderKLWan, base_dim=8)
    monkeypatch.setattr(diffusers, "AutoencoderKLWan", narrow)
    for name, (_, make) in setting._random_decoders(torch.device("cpu"), torch.float32).items():
        assert make().decode(torch.zeros(1, 2, 16, 2, 4)).shape == (5, 16, 32, 3), name


def test_without_diffusers_the_full_vae_is_absent(monkeypatch):
    monkeypatch.setattr(setting, "find_spec", lambda name: None)
    decoders = setting._random_decoders(torch.device("cpu"), torch.float32)
    assert decoders["full"] == "needs diffusers, which is not installed" and not isinstance(decoders["small"], str)


# Plain PyTorch


@pytest.mark.parametrize(
    "options",
    [
        {"window_frames": 6},
        {"window_frames": 7, "sink_frames": 1, "first_frame": 5},
        {"window_frames": (3, 6, 9, None)},
        {"window_frames": 6, "sampler": "ode"},
        {"window_frames": 6, "kv_source": "next_step", "order": "stream"},
        {"window_frames": 6, "order": "block_first", "context_noise": 30.0},
    ],
    ids=str,
)
def test_the_baseline_makes_the_same_video(options):
    """As the page that defines it, in float64."""
    config = RolloutConfig(FlowSchedule.uniform(4).steps, FlowSchedule.uniform(4).shift, **options)
    shape = (3, MODEL.config.in_channels, *SIZE.values())
    blocks = plain.plain_blocks(
        copy.deepcopy(MODEL).double(), TEXT, config, lambda step, block: keyed_noise(0, 0, step, block, shape)[None]
    )
    made = torch.cat(list(itertools.islice(blocks, 4)), 1)
    names = {"sampler": "trajectory", "kv_source": "cache_source"}
    options = {names.get(name, name): value for name, value in options.items() if name != "first_frame"}
    if "first_frame" in config.to_dict() and config.first_frame:
        moved = RolloutConfig.from_dict({**config.to_dict(), "order": "stream"})
        rollout = Rollout(
            copy.deepcopy(MODEL).double(), TEXT, moved, num_latent_frames=12, latent_size=tuple(SIZE.values())
        )
        expected = torch.cat([block.latents for block in rollout], 1)
    else:
        expected = reference(12, 4, **options)
    assert difference(made, expected) < 1e-10


def test_the_baseline_of_a_command_is_the_same_video(done):
    assert 0 <= done.values["plain"]["largest_difference"] < 1e-3


def test_a_baseline_that_is_not_finite_is_told(folder, monkeypatch):
    real = run.plain_blocks
    monkeypatch.setattr(run, "plain_blocks", lambda *args: (block * torch.nan for block in real(*args)))
    v = bench(Setting(str(folder), device="cpu", blocks=1, repeats=1), decode=False)
    assert v["plain"] == {"absent": "latents of block 0 are not finite"}
    VALID.validate(v)


def test_a_baseline_without_room_is_told(folder, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")
        yield

    monkeypatch.setattr(run, "plain_blocks", full)
    v = bench(Setting(str(folder), device="cpu", blocks=1, repeats=1), decode=False)
    assert v["plain"] == {"absent": "out of memory: CUDA out of memory."}
    VALID.validate(v)


def test_a_rollout_without_room_is_one_line(folder, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more lines")

    monkeypatch.setattr(Rollout, "warm_up", full)
    assert main(["bench", "--model", str(folder), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(f"hiar: {folder} does not fit: CUDA out of memory.\n")


# What is printed and drawn


def test_the_tables(done, folder):
    text = " ".join(done.out.split())
    for part in (
        str(done.json), str(done.picture), done.values["latents"]["sha256"], "same in all repeats", "forwards a block",
        "none: latents only", "codec: the model's own codec, on the CPU", "P99",
        "2 steps, 4 forwards a block; shift 2.0", "window frames 9",
        "times the fps of plain PyTorch", "not included", "attention", "TFLOP/s, copy", "decoder full: not measured",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, done.out.splitlines())) <= 120
    assert done.picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn(done, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plot, "save_plot", lambda panels, path: drawn.extend(panels))
    result.draw(done.values, tmp_path / "a.png")
    by_decoder, blocks, of_task = drawn
    assert [bar.label for bar in by_decoder.bars] == ["latents only", "codec", "plain PyTorch"]
    assert by_decoder.bars[0].value == speeds(done.values)["none"]["fps"]
    assert [list(line.y) for line in blocks.series] == [s["intervals_ms"] for s in done.values["speeds"][:2]]
    assert [bar.label for bar in of_task.bars] == [*KINDS, "idle"]


# Comparison


def changed(done, tmp_path, change, name: str = "b.json"):
    values = copy.deepcopy(done.values)
    change(values)
    (tmp_path / name).write_text(json.dumps(values))
    return str(tmp_path / name)


def test_two_results_are_compared(done, tmp_path, capsys):
    def faster(v):
        speeds(v)["none"]["fps"] *= 2
        v["machine"]["device"] = "another chip"

    other = changed(done, tmp_path, faster)
    assert main(["bench", "--compare", str(done.json), other]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "latents: fps" in line)
    assert line.split()[-1] == "2.000"
    (line,) = (line for line in out.splitlines() if "codec decoder: block P90" in line)
    assert line.split()[-1] == "1.000"
    assert f"different: device: {done.values['machine']['device']} | another chip" in out
    assert "the same latents, bit for bit" in out


def test_other_latents_are_told(done, tmp_path, capsys):
    other = changed(done, tmp_path, lambda v: v["latents"].update(sha256="0" * 64))
    assert main(["bench", "--compare", str(done.json), other]) == 0
    out = capsys.readouterr().out
    assert "NOT the same latents" in out and "0" * 12 in out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda v: v["model"].update(name="other"), "model: .*small | other"),
        (lambda v: v["model"].update(height=64, width=48), r"height: 32 \| 64; width: 32 \| 48"),
        (lambda v: v["rollout"].update(steps=[1000.0]), r"steps: \[1000.0, 500.0\] \| \[1000.0\]"),
        (lambda v: v["model"].update(weights="random, seed 0"), "weights: sha256 .* | random"),
        (lambda v: v["latents"].update(blocks=9), r"blocks: 5 \| 9"),
    ],
    ids=["model", "size", "steps", "weights", "blocks"],
)
def test_what_is_not_comparable_is_refused(done, tmp_path, capsys, change, line):
    assert main(["bench", "--compare", str(done.json), changed(done, tmp_path, change)]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.startswith("hiar: not comparable: ") and told.err.count("\n") == 1
    with pytest.raises(ValueError, match=line):
        result.compared(done.values, json.loads((tmp_path / "b.json").read_text()))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "is no JSON"),
        ("[]", "is no result of hiar bench"),
        ('{"format": "hiar-toy"}', "is no result of hiar bench"),
        ('{"format": "hiar-bench", "version": 7}', "is of version 7, this one reads 1"),
        ('{"format": "hiar-bench", "version": 1}', "is damaged: model is missing"),
    ],
)
def test_what_is_no_result_is_named(done, tmp_path, capsys, content, line):
    (tmp_path / "b.json").write_text(content)
    assert main(["bench", "--compare", str(done.json), str(tmp_path / "b.json")]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'b.json'} {line}" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(model=None), lambda v: v.update(latents={}), lambda v: v.update(speeds=[{"fps": 1}]),
        lambda v: v.update(rollout=3), lambda v: speeds(v)["none"].update(fps="fast"),
    ],
    ids=["model", "latents", "speeds", "rollout", "fps"],
)  # fmt: skip
def test_what_is_damaged_inside_is_named(done, tmp_path, capsys, change):
    assert main(["bench", "--compare", changed(done, tmp_path, change), str(done.json)]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'b.json'} is damaged: not as" in err and err.count("\n") == 1


# Input that is refused


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--order", "step_first"], "--order must have a steady state (stream, wavefront or block_first)"),
        (["--model", "wan"], "--model 'wan' is neither a name nor a folder; names: toy, scenes, wan"),
        (["--model", "toy", "--height", "32"], "--height must be left out: toy makes frames of one size only, got 32"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        (["--blocks", "0"], "--blocks must be a whole number of at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be a whole number of at least 1, got 0"),
        (["--window-frames", "2"], "--window-frames must be a whole number of at least 3 ("),
        (["--window-frames", "null"], "--window-frames must be a number for a measurement with a full window"),
        (["--kv-source", "next_step", "--order", "block_first"], "--kv-source='next_step' is impossible with order"),
        (["--plot", "a.jpg"], "cannot write a.jpg: a plot is a PNG"),
        (["--json", "no/a.json"], "cannot write no/a.json: no is no folder"),
        (["--json", "a.png", "--plot", "a.png"], "--plot and --json are one file"),
        (["--compare", "a.json", "b.json"], "--compare a.json: no such file"),
        (["--compare", __file__, __file__, "--blocks", "3"], "--blocks has no effect beside --compare"),
        (["--layers", "2", "--model", "."], "--layers needs random weights, so one of the models wan2.1-t2v-1.3b, "),
        (["--device", "gpu"], "--device must be one of auto, cpu, cuda"),
        (["--attention-impl", "sdp"], "--attention-impl must be one of auto, reference, "),
        (["--kv-dtype", "float8_e4m3fn", "--attention-impl", "sdpa"], "--attention-impl must be one of auto, "),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_is_loaded(here, capsys, monkeypatch, options, line):
    def no_work(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(setting, "load", no_work)
    monkeypatch.setattr(run, "load", no_work)
    assert main(["bench", *options]) == 2
    told = capsys.readouterr()
    assert line in told.err and told.err.count("\n") == 1 and not told.out
    assert not list(here.iterdir())


def test_a_graph_needs_a_gpu(folder):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        bench(Setting(str(folder), device="cpu", cuda_graph=True))
