"""RolloutConfig: what a rollout computes. The one definition of these options and of their validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from ..common.checks import as_whole, number_at_least_0, one_of, plain, true_or_false, whole
from .flow_schedule import FlowSchedule

ORDERS = ("step_first", "stream", "wavefront", "block_first")
BLOCKWISE = ("stream", "wavefront")
"""Orders with one cache for each step."""
KV_SOURCES = ("own", "next_step")
SAMPLERS = ("sde", "ode")
ON_PROMPT_CHANGE = ("keep", "recache")
Windows = int | None | tuple[int | None, ...]
"""Latent frames that a block sees, its own included: one number for all steps or one for each; None: all."""


def several_orders(name: str, orders: str | Sequence[str]) -> tuple[str, ...]:
    """The orders as a tuple; ValueError unless there are two or more different legal ones."""
    listed = (orders,) if isinstance(orders, str) else tuple(orders)
    for order in listed:
        one_of(name, order, ORDERS)
    if len(listed) < 2 or len(set(listed)) < len(listed):
        raise ValueError(f"{name} must be two or more different ones of {', '.join(ORDERS)}, got {', '.join(listed)}")
    return listed


@dataclass(frozen=True)
class RolloutConfig:
    """What a rollout computes (arXiv 2603.08703, section 3): equal config, weights and noise give an equal video.

    Immutable, hashable, to and from JSON (:meth:`to_dict`, :meth:`from_dict`); part of all metadata, sessions,
    checkpoints and recipes.

    Args:
        steps: unshifted timesteps of the S denoising steps, falling, in (0, 1000].
        shift: a of the shifted schedule sigma' = a sigma / (1 + (a - 1) sigma), above 0.
        order: of the tasks. "step_first", "stream" and "wavefront" give the same latents: a block sees earlier ones at
            its own noise level. "block_first" is the Self-Forcing baseline: a block sees finished, clean blocks.
        frames_per_block: latent frames generated at once, at least 1.
        window_frames: latent frames that a block sees, its own included: one number, or one for each step; None: all.
            At least ``sink_frames + frames_per_block``.
        sink_frames: first latent frames of the video that stay visible; they count towards the window. At least 0.
        kv_source: "own": cache tasks fill every cache. "next_step": the cache of a step takes the keys and values of
            the next step's denoise task (shared KV), which saves S - 1 of 2 S forwards per block and changes the
            result. Needs the order stream or wavefront.
        fuse_cache_denoise: run cache(s, n - 1) and denoise(s, n) as one forward; equal up to rounding.
        sampler: "sde" adds fresh noise to the predicted x0 at each step, "ode" follows the velocity.
        context_noise: timestep, 0 to 1000, at which finished blocks are cached.
        on_prompt_change: "keep" leaves the context as it is when the prompt changes; "recache" recomputes the keys and
            values of the visible blocks with the new prompt.
        first_frame: position of the video's first latent frame in the rotary embedding, at least 0.

    Raises:
        ValueError: names the illegal value or combination, and the legal values.

    Example:
        >>> config = RolloutConfig(order="stream", window_frames=12)
        >>> config.schedule.sigmas[0], config.windows
        (1.0, (12, 12, 12, 12))
        >>> RolloutConfig.from_dict(config.to_dict()) == config
        True
    """

    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    shift: float = 5.0
    order: str = "step_first"
    frames_per_block: int = 3
    window_frames: Windows = None
    sink_frames: int = 0
    kv_source: str = "own"
    fuse_cache_denoise: bool = False
    sampler: str = "sde"
    context_noise: float = 0.0
    on_prompt_change: str = "keep"
    first_frame: int = 0

    def __post_init__(self) -> None:
        schedule = FlowSchedule(self.steps, self.shift)
        normalized: dict[str, Any] = {"steps": tuple(map(float, schedule.steps)), "shift": float(schedule.shift)}
        normalized["frames_per_block"] = whole("frames_per_block", self.frames_per_block, 1)
        normalized["sink_frames"] = whole("sink_frames", self.sink_frames, 0)
        normalized["first_frame"] = whole("first_frame", self.first_frame, 0)
        for name, legal in (("order", ORDERS), ("kv_source", KV_SOURCES), ("sampler", SAMPLERS),
                            ("on_prompt_change", ON_PROMPT_CHANGE)):  # fmt: skip
            one_of(name, getattr(self, name), legal)
        normalized["window_frames"] = _window(self.window_frames, len(schedule))
        normalized["fuse_cache_denoise"] = true_or_false("fuse_cache_denoise", self.fuse_cache_denoise)
        normalized["context_noise"] = number_at_least_0("context_noise", self.context_noise)
        for name, value in normalized.items():
            object.__setattr__(self, name, value)
        require_windows(self.windows, self.sink_frames, self.frames_per_block)
        require_order(self.order, self.kv_source, self.fuse_cache_denoise)
        if self.on_prompt_change == "recache" and (self.fuse_cache_denoise or self.kv_source != "own"):
            other = "fuse_cache_denoise=True" if self.fuse_cache_denoise else f"kv_source={self.kv_source!r}"
            raise ValueError(f"on_prompt_change='recache' is impossible with {other}: give on_prompt_change='keep'")

    @property
    def schedule(self) -> FlowSchedule:
        """Noise levels of the steps."""
        return FlowSchedule(self.steps, self.shift)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Window of each step [S], in latent frames; None: all."""
        return windows_per_step(self.window_frames, len(self.steps))

    @property
    def least_window(self) -> int:
        """The narrowest window with room for the sink and a block."""
        return self.sink_frames + self.frames_per_block

    def require_endless(self, video: str = "an endless video") -> None:
        """ValueError unless these options allow an endless video: not step_first, and a window at every step."""
        if self.order == "step_first":
            others = ", ".join(order for order in ORDERS if order != "step_first")
            raise ValueError(f"order must be one of {others} for {video}, got step_first")
        if None in self.windows:
            raise ValueError(f"window_frames must be a number for {video}, got {plain(self.window_frames)}")

    def with_order(self, order: str) -> RolloutConfig:
        """A copy with another order."""
        return replace(self, order=order)

    def with_options(self, **options: Any) -> RolloutConfig:
        """A copy with some fields as a user gives them: ``steps`` may be a number of equally spaced ones; None (and
        "model" for ``window_frames``, where None means all frames) leaves a field as it is.
        """
        values = {name: value for name, value in options.items() if value is not None or name == "window_frames"}
        if isinstance(window := values.get("window_frames"), str):
            if window != "model":
                raise ValueError(f'window_frames must be a number, one per step, None (all) or "model", got {window!r}')
            del values["window_frames"]
        if "steps" in values:
            steps = values["steps"]
            if as_whole(steps) is not None or not isinstance(steps, Iterable):
                steps = FlowSchedule.uniform(whole("steps", steps, 1), self.shift).steps
            values["steps"] = tuple(steps)
        return replace(self, **values)

    def block_causal(self, step: int = 0) -> dict[str, Any]:
        """The block-causal mask of a step, as :class:`hiar_model.HiARTransformer` takes it."""
        window = self.windows[step]
        return {
            "frames_per_block": self.frames_per_block, "window_frames": window, "sink_frames": self.sink_frames,
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON, the inverse of :meth:`from_dict`."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RolloutConfig:
        """From a plain mapping; missing keys get their defaults, unknown ones raise ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"RolloutConfig: options must be a mapping, got {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ValueError(f"RolloutConfig: unknown {', '.join(unknown)}; known: {', '.join(known)}")
        plain_values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**plain_values)


class TrainedWindow(NamedTuple):
    """What the config.json of a causal model says, in latent frames; None: nothing."""

    window: int | None = None
    sink: int | None = None

    def apply(self, rollout: RolloutConfig) -> RolloutConfig:
        """The rollout with this window and sink where they are known."""
        return rollout.with_options(window_frames=self.window or "model", sink_frames=self.sink)


UNKNOWN_WINDOW = TrainedWindow()


def windows_per_step(window_frames: Any, steps: int) -> tuple[int | None, ...]:
    """One window for each step, from one for all steps (a number of frames; None: no limit) or one per step."""
    window = _window(window_frames, steps)
    return window if isinstance(window, tuple) else (window,) * steps


def _window(window_frames: Any, steps: int) -> Windows:
    one = as_whole(window_frames)
    if window_frames is None or one is not None:
        return one
    listed = isinstance(window_frames, Sequence) and not isinstance(window_frames, str)
    windows = tuple(window_frames) if listed or hasattr(window_frames, "tolist") else ()
    if len(windows) != steps:
        raise ValueError(
            f"window_frames must be None, one number of frames, or one per step ({steps}), got {window_frames!r}"
        )
    return tuple(plain(each) if as_whole(each) is None else as_whole(each) for each in windows)


def require_windows(windows: Sequence[int | None], sink_frames: int, frames_per_block: int) -> None:
    """ValueError unless every window has room for the sink and a block, which must see all of itself."""
    for window in windows:
        if window is not None:
            least = sink_frames + frames_per_block
            whole("window_frames", window, least, " (sink_frames + frames_per_block), or None")


def require_order(order: str, kv_source: str, fuse_cache_denoise: bool) -> None:
    """ValueError unless the order allows this KV source and fusion."""
    if kv_source == "next_step" and order not in BLOCKWISE:
        raise ValueError(f"kv_source='next_step' is impossible with order={order!r}: use {' or '.join(BLOCKWISE)}")
    if fuse_cache_denoise and order == "block_first":
        legal = "step_first, stream or wavefront"
        raise ValueError(f"fuse_cache_denoise=True is impossible with order='block_first': use {legal}")
    if fuse_cache_denoise and kv_source == "next_step":
        raise ValueError("fuse_cache_denoise=True is impossible with kv_source='next_step': use kv_source='own'")
