"""Whose blocks are made in one turn, and how: several sessions of one geometry share the forwards of their networks.

The session that runs dry first has the turn. Another one joins it, the one that runs dry next first, if both hold:

- It pays: on a CPU, for small networks with few tokens. On a GPU nobody has measured it, so there each session has its
  own turn. With ``--batch-sessions N`` up to N join wherever their forwards match.
- Nobody waits who cannot: the turn with it still ends before the first session runs dry, or it would itself run dry if
  it waited for this turn and then had its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..common.settings import own_settings
from ..models.threads import cpu_threads
from ..rollout import Rollout
from ..rollout.together import batches_with, step_together
from .live import LiveVideo, Piece
from .session import ViewerSession

WIDEST = 256
"""Width of the networks that `python -m bench.studies.together` measures, which the next two come from."""
MOST_TOKENS = 768
"""Of the sessions of a turn (:func:`block_tokens`); with more a turn gains nothing further, or loses."""
FEWEST_SESSIONS = 4
"""As many must have room in :data:`MOST_TOKENS`: of sessions with more tokens, not even two gain in every case."""
SMOOTHING = 0.3
"""Weight of the last turn in the expected seconds."""

Outcome = Piece | Exception | None
"""What :meth:`.live.LiveVideo.make` gave."""


class Turns:
    """The turns of one server; its methods are called in the generating thread.

    Args:
        most: sessions of a turn; None: as many as pay.

    Attributes:
        seconds: of a turn, by how many sessions it had.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most, self.seconds = most, dict[int, float]()

    def choose(self, hungry: Sequence[ViewerSession], now: float) -> list[ViewerSession]:
        """The sessions of the next turn, the most urgent first."""
        first, *others = sorted(hungry, key=lambda session: (session.clock.due(), session.possible))
        chosen = [first]
        for other in others:
            end, alone = now + self.expected(len(chosen) + 1), now + self.expected(len(chosen)) + self.expected(1)
            in_time = end <= first.clock.due() or other.clock.due() < alone
            if in_time and self._fits([*chosen, other]):
                chosen.append(other)
        return chosen

    def expected(self, sessions: int) -> float:
        """Seconds of a turn with so many, in proportion to the turn of the nearest number that was measured."""
        known = min(self.seconds, key=lambda count: abs(count - sessions), default=None)
        return 0.0 if known is None else self.seconds[known] * sessions / known

    def _fits(self, sessions: Sequence[ViewerSession]) -> bool:
        videos = [_video(session) for session in sessions]
        first, *others = [video.run.rollout for video in videos]
        if not all(batches_with(first, other) for other in others):
            return False
        if self.most is not None:
            return len(videos) <= self.most
        tokens = [block_tokens(video.run.rollout) for video in videos]
        few = sum(tokens) <= MOST_TOKENS and FEWEST_SESSIONS * max(tokens) <= MOST_TOKENS
        return few and first.device.type == "cpu" and videos[0].run.model.transformer.config.dim <= WIDEST

    def make(self, sessions: Sequence[ViewerSession]) -> Iterator[tuple[ViewerSession, Outcome]]:
        """A block of each, as soon as it is there; of one that goes meanwhile, none."""
        begun, waiting = time.monotonic(), list(sessions)
        while len(waiting) > 1:
            videos = [_video(session) for session in waiting]
            with own_settings(), cpu_threads(videos[0].run.threads):
                outcomes = step_together([video.run.rollout for video in videos])
            stepped, waiting = waiting, []
            for session, video, outcome in zip(stepped, videos, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    yield session, outcome
                elif outcome == []:
                    waiting += [] if session.gone else [session]
                else:
                    video.run.rollout.ready += outcome or []
                    yield session, _make_block(video)
        for session in waiting:
            yield session, _make_block(_video(session))
        last, count = time.monotonic() - begun, len(sessions)
        self.seconds[count] = last + (1 - SMOOTHING) * (self.seconds.get(count, last) - last)


def block_tokens(rollout: Rollout) -> int:
    """Tokens of a forward that denoises: of one block, or with the wavefront of a block for each step."""
    blocks = len(rollout.config.steps) if rollout.config.order == "wavefront" else 1
    return rollout.cache.frame_tokens * rollout.config.frames_per_block * blocks


def _make_block(video: LiveVideo) -> Outcome:
    try:
        return video.make()
    except Exception as error:
        return error


def _video(session: ViewerSession) -> LiveVideo:
    assert session.video is not None, "only the generating thread takes it away, between turns"
    return session.video
