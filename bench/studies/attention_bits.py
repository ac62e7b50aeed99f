"""What 8 bits cost attention: the error of each way to round, beside float64, over scores of several kinds.

    python -m bench.studies.attention_bits [--seeds 4]

One head: normal numbers, numbers that make rounding hard, and those of the shipped models in a rollout with a full
window. The error is |result - exact| / |exact| over all queries (Frobenius), its
mean over the draws and, after +-, the standard error of that mean. It prints the table of
hiar_kernels/attention_fp8/README.md; the row "as built" is ``attention_fp8`` itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import hiar_kernels as hk
from bench.lib import report
from hiar_kernels.common.float8 import E4M3, pack_values, quantize_frames, quantize_last
from hiar_model.models import cached_attention
from hiar_model.models.registry import load_video_model
from hiar_model.rollout import Rollout
from hiar_model.toy.prompt import split_prompts

SLOTS, TOKENS, WIDTH, QUERIES = 21, 128, 128, 256
BLOCK = 128


@dataclass(frozen=True)
class Variant:
    """How to round; the defaults are those of ``attention_fp8``.

    Args:
        p_scale: of probabilities before rounding; None: none is rounded. p_block: rounded relative to the block's own
            highest. sum_rounded: the sum of each row is of rounded probabilities.
        q_exact, k_exact: not rounded. int8: q and k as int8, with scales for the same numbers. mean_off: the mean of
            all keys is subtracted first. rotated: q and k are turned by a Hadamard matrix first.
    """

    p_scale: float | None = 256.0
    p_block: bool = False
    sum_rounded: bool = False
    q_exact: bool = False
    k_exact: bool = False
    int8: bool = False
    mean_off: bool = False
    rotated: bool = False


VARIANTS = {
    "products of 8 bits, as built": Variant(),
    "P times 1": Variant(p_scale=1.0),
    "P times 448": Variant(p_scale=448.0),
    "P relative to its block": Variant(p_block=True),
    "sum of rounded P": Variant(sum_rounded=True),
    "P not rounded": Variant(p_scale=None),
    "16-bit products over an 8-bit ring, as built": Variant(p_scale=None, q_exact=True),
    "only V in 8 bits": Variant(p_scale=None, q_exact=True, k_exact=True),
    "mean of K off": Variant(mean_off=True),
    "q and K rotated": Variant(rotated=True),
    "mean of K off, rotated": Variant(mean_off=True, rotated=True),
    "q and K as int8": Variant(int8=True),
    "q and K as int8, mean off": Variant(int8=True, mean_off=True),
}


def hadamard(width: int) -> Tensor:
    """Orthonormal [width, width], a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def attend(variant: Variant, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [Tq, D], k, v [S, P, D] -> [Tq, D]; every query sees every key."""
    k = k - k.mean((0, 1)) if variant.mean_off else k
    q, k = (x @ hadamard(x.shape[-1]) for x in (q, k)) if variant.rotated else (q, k)
    values, v_scale = quantize_frames(v[:, :, None])
    if variant.int8:
        q_scale, k_scale = q.abs().amax(1) / 127, k.abs().amax((1, 2)) / 127
        q8, k8 = (q / q_scale[:, None]).round(), (k / k_scale[:, None, None]).round()
    else:
        q8, q_scale = quantize_last(q)
        k8, k_scale = (x[..., 0] if x.dim() == 2 else x[:, :, 0] for x in quantize_frames(k[:, :, None]))
    if variant.q_exact:
        q8, q_scale = q, torch.ones(len(q))
    if variant.k_exact:
        k8, k_scale = k, torch.ones(len(k))
    scores = torch.einsum("qd,skd->qsk", q8.float(), k8.float())
    scores = scores * (q_scale * (q.shape[1] ** -0.5 * math.log2(math.e)))[:, None, None] * k_scale[:, None]
    blocks = scores.unflatten(2, (-1, min(BLOCK, k.shape[1]))).flatten(1, 2)
    m_i = blocks.amax(-1).cummax(1).values[..., None]
    p = torch.exp2(blocks - m_i)
    rounded = p
    if variant.p_block:
        own = p.amax(-1, keepdim=True).clamp_min(1e-30)
        rounded = (p / own * 448).to(E4M3).float() * own / 448
    elif variant.p_scale is not None:
        rounded = (p * variant.p_scale).to(E4M3).float() / variant.p_scale
    later = torch.exp2(m_i - m_i[:, -1:])
    l_i = ((rounded if variant.sum_rounded else p) * later).sum((1, 2))
    weights = (rounded * later).flatten(1).unflatten(1, k.shape[:2]) * v_scale
    return torch.einsum("qsk,skd->qd", weights, values[:, :, 0].float()) / l_i[:, None]


def as_built(q: Tensor, k: Tensor, v: Tensor, eight: bool = True) -> Tensor:
    """The same by ``attention_fp8``."""
    slots, tokens, _ = k.shape
    (k8, k_scales), (v8, v_scales) = (quantize_frames(x[None, :, :, None]) for x in (k, v))
    rings = k8.flatten(1, 2), pack_values(v8), k_scales, v_scales
    padded = torch.cat([q, q.new_zeros(-len(q) % tokens, q.shape[1])])[None, :, None]
    ids = {"q_frames": torch.full((1, padded.shape[1] // tokens), slots), "kv_frames": torch.arange(slots)[None]}
    options: dict = {"mask": hk.BlockCausal(tokens, 1), "impl": "reference", **ids}
    if eight:
        padded, scales = quantize_last(padded)
        options |= {"q_scales": scales, "out_dtype": torch.float32}
    return hk.attention_fp8(padded, *rings, **options)[0, : len(q), 0]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float64."""
    q, k, v = q.double(), k.double().flatten(0, 1), v.double().flatten(0, 1)
    return torch.softmax(q @ k.T * q.shape[1] ** -0.5, 1) @ v


MADE = (
    "normal", "peaked (q x 4)", "sharp (q x 12)", "each query near a key", "K with a mean", "K with outlier channels",
    "V with a mean",
)  # fmt: skip
SHIPPED = ("toy", "scenes")


def drawn(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one kind."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    q, k, v = normal(QUERIES, WIDTH), normal(SLOTS, TOKENS, WIDTH), normal(SLOTS, TOKENS, WIDTH)
    if kind == "peaked (q x 4)":
        q = 4 * q
    elif kind == "sharp (q x 12)":
        q = 12 * q
    elif kind == "each query near a key":
        q = q / 2 + 2 * k.flatten(0, 1)[torch.randint(0, SLOTS * TOKENS, (QUERIES,), generator=random)]
    elif kind == "K with a mean":
        k = k + 4 * normal(WIDTH)
    elif kind == "K with outlier channels":
        few = torch.randperm(WIDTH, generator=random)[:4]
        k[..., few] += 20 * normal(4).sign()
    elif kind == "V with a mean":
        v = v + 3 * normal(WIDTH)
    return q, k, v


@cache
def of_model(name: str, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of ``count`` layers and heads of a shipped model's tasks with a full window, evenly over a rollout."""
    model = load_video_model(name, "cpu")
    prompt = model.encode_text(split_prompts()[1][0].text())
    tensors, attention = [], cached_attention.attention

    def seen(q: Tensor, k: Tensor, v: Tensor, **options: Tensor) -> Tensor:
        if bool((options["kv_frames"] >= 0).all()):
            tensors.append((q[0].clone(), k[0].clone(), v[0].clone()))
        return attention(q, k, v, **options)  # type: ignore[arg-type]

    _, height, width = model.latent_size
    rollout = Rollout(
        model.transformer, prompt, model.rollout.with_order("step_first"), num_latent_frames=24,
        latent_size=(height, width),
    )  # fmt: skip
    cached_attention.attention = seen  # type: ignore[assignment]
    try:
        list(rollout)
    finally:
        cached_attention.attention = attention
    tokens = rollout.cache.frame_tokens
    heads = [
        (q[:, h], k[:, h].unflatten(0, (-1, tokens)), v[:, h].unflatten(0, (-1, tokens)))
        for q, k, v in tensors for h in range(q.shape[1])
    ]  # fmt: skip
    return heads[:: max(1, len(heads) // count)][:count]


def errors(kind: str, seeds: int) -> Iterator[dict[str, float]]:
    """Of each variant, for each draw."""
    draws = of_model(kind, 12 * seeds) if kind in SHIPPED else [drawn(kind, seed) for seed in range(seeds)]
    for q, k, v in draws:
        expected = exact(q, k, v)
        size = expected.norm()
        yield {name: float((attend(variant, q, k, v) - expected).norm() / size) for name, variant in VARIANTS.items()}


def table(seeds: int, kinds: tuple[str, ...] = (*MADE, *SHIPPED)) -> list[str]:
    """Lines of Markdown: a line for each variant, a column for each kind."""
    columns = []
    for kind in kinds:
        rows = list(errors(kind, seeds))
        by_name = {name: torch.tensor([row[name] for row in rows]) for name in VARIANTS}
        columns.append({name: f"{x.mean():.4f} ± {x.std() / len(x) ** 0.5:.4f}" for name, x in by_name.items()})
    cells = [[name, *(column[name] for column in columns)] for name in VARIANTS]
    return report.table(("relative error", *kinds), cells, text_columns=1)


def main() -> None:
    """Print the table and what was run."""
    parser = argparse.ArgumentParser(description="Error of attention by what is rounded to 8 bits, beside float64.")
    parser.add_argument("--seeds", type=int, default=4, help="draws of each kind; of a model 12 heads for each")
    a = parser.parse_args()
    if a.seeds < 2:
        raise SystemExit(f"seeds must be at least 2, for a spread, got {a.seeds}")
    print("\n".join(table(a.seeds)))
    sizes = f"{QUERIES} queries, {SLOTS} frames of {TOKENS} keys, head width {WIDTH}"
    print(f"\n{sizes}; of the models: a task of 48 queries over 192 keys; {a.seeds} draws, torch {torch.__version__}")


if __name__ == "__main__":
    main()
