"""What 8 bits do to a video: the toy model's latents and oracle figures by kv_dtype and linear_dtype, on one noise.

    python -m bench.studies.eight_bits [--model toy] [--prompts 64] [--num-frames 48]

Differences are to the latents with keys and layers in the dtype of the work; those of bfloat16 throughout, to float32
throughout.
It prints the table of docs/howto/run_in_8_bits.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.lib import report
from bench.lib.script import script
from hiar_model import ExecutionConfig
from hiar_model.common.checks import dtype_name
from hiar_model.models.registry import VideoModel, load_video_model
from hiar_model.rollout import Rollout
from hiar_model.toy.oracle import ToyOracle
from hiar_model.toy.prompt import ToyPrompt, split_prompts
from hiar_model.toy.reading import Summary

BATCH = 16  # videos at once; each has noise of its own
E4M3 = "float8_e4m3fn"
ROWS: tuple[tuple[torch.dtype, str | None, str | None], ...] = (
    (torch.float32, None, None),
    (torch.float32, "bfloat16", None),
    (torch.float32, E4M3, None),
    (torch.float32, None, E4M3),
    (torch.float32, E4M3, E4M3),
    (torch.bfloat16, None, None),
    (torch.bfloat16, E4M3, None),
    (torch.bfloat16, None, E4M3),
    (torch.bfloat16, E4M3, E4M3),
)
"""(dtype of the work, kv_dtype, linear_dtype; None: the same)"""
HEADINGS = ("work in", "keys in", "layers in", "max difference", "mean", "latents' rms")
HEADINGS += ("colour %", "valid %", "direction %", "speed/truth")


def latents(
    model: VideoModel, prompts: Sequence[ToyPrompt], frames: int, seed: int, execution: ExecutionConfig
) -> Tensor:
    """[prompts, F, C, h, w] by the model's own rollout, video i from the noise of video i."""
    _, height, width = model.latent_size
    videos_done = []
    for first in range(0, len(prompts), BATCH):
        videos = range(first, min(first + BATCH, len(prompts)))
        rollout = Rollout(
            model.transformer, torch.cat([model.encode_text(prompts[i].text()) for i in videos]),
            model.rollout, execution,
            num_latent_frames=model.latent_frames(frames), latent_size=(height, width), seed=seed, video_ids=videos,
        )  # fmt: skip
        videos_done.append(torch.cat([block.latents for block in rollout], 1))
    return torch.cat(videos_done).float()


def read(model: VideoModel, prompts: Sequence[ToyPrompt], latents: Tensor) -> Summary:
    """What the oracle sees in the pixels."""
    assert model.world is not None
    oracle = ToyOracle(model.world)
    clips = (torch.from_numpy(model.decoder().decode(video[None])) for video in latents)
    return Summary.of([oracle.evaluate(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])


def table(model: VideoModel, prompts: Sequence[ToyPrompt], frames: int, seed: int) -> list[str]:
    """Lines of Markdown."""
    cells = []
    own: dict[torch.dtype, Tensor] = {}
    model = replace(model, rollout=model.rollout.with_order("step_first"))
    for dtype, kv_dtype, linear_dtype in ROWS:
        working = replace(model, transformer=model.transformer.to(dtype))
        execution = ExecutionConfig(kv_dtype=kv_dtype, linear_dtype=linear_dtype)
        result = latents(working, prompts, frames, seed, execution)
        first = not own
        expected = own.get(dtype, next(iter(own.values()), result))
        own.setdefault(dtype, result)
        off = (result - expected).abs()
        s = read(model, prompts, result)
        names = [dtype_name(x) for x in (dtype, kv_dtype or dtype, linear_dtype or dtype)]
        differences = [f"{off.max():.3f}", f"{off.mean():.4f}"] if not first else ["", ""]
        shares = [f"{100 * share:.1f}" for share in (s.colour, s.valid, s.direction)]
        cells.append([*names, *differences, f"{result.square().mean().sqrt():.3f}", *shares, f"{s.speed_ratio:.3f}"])
    return report.table(HEADINGS, cells, text_columns=3)


def main() -> None:
    """Print the table and what was run."""
    parser = argparse.ArgumentParser(
        description="Latents and oracle figures of a toy model by kv_dtype and linear_dtype."
    )
    parser.add_argument("--model", default="toy", help="name of a shipped model, or a folder")
    parser.add_argument("--prompts", type=int, default=64, help="how many of the held-out ones")
    parser.add_argument("--num-frames", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="of all noise")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    model = load_video_model(a.model, a.device)
    _, prompts = split_prompts()
    if not 1 <= a.prompts <= len(prompts):
        raise SystemExit(f"prompts must be in 1..{len(prompts)}, the number of held-out prompts, got {a.prompts}")
    print("\n".join(table(model, prompts[: a.prompts], a.num_frames, a.seed)))
    about = f"{a.prompts} held-out prompts, {a.num_frames} frames, {len(model.rollout.steps)} steps, seed {a.seed}"
    print(f"\n{model.name} ({model.weights_sha256[:12]}), {about}, {model.device}, torch {torch.__version__}")


if __name__ == "__main__":
    script(main)
