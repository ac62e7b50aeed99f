"""Sessions of an earlier server that this one cannot go on with: they wait for a server that can.

A wrong path in a unit file must cost nobody a video. So their records and files stay as long as those of any session
whose viewer is away, and a viewer who comes back is told the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hmac import compare_digest

from .protocol import Refusal

RETRY_AFTER = 10
"""Seconds after which a viewer may ask again."""


@dataclass
class DormantSession:
    """A session that waits.

    reason    why it does not go on here, one line
    damaged   no server can go on with it
    keep      seconds that it waits
    seen      when its viewer asked for it last; at first, when this server started
    """

    id: str
    token_hash: str
    reason: str
    damaged: bool
    keep: float
    seen: float = field(default_factory=time.monotonic)


class Dormant:
    """All of them. The scheduler's lock guards it.

    Args:
        delete: called with the id of one that has expired.
    """

    def __init__(self, delete: Callable[[str], None] = lambda _: None) -> None:
        self.delete = delete
        self.sessions: dict[str, DormantSession] = {}

    def __len__(self) -> int:
        return len(self.sessions)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sessions)

    def add(self, session: DormantSession) -> None:
        """Another one."""
        self.sessions[session.id] = session

    def require_awake(self, token_hash: str) -> None:
        """Refusal if the session of this token waits. Its viewer is there, so it waits as long again."""
        for session in self.sessions.values():
            if compare_digest(session.token_hash, token_hash):
                session.seen = time.monotonic()
                line = f"the session does not go on after the server's restart: {session.reason}"
                if session.damaged:
                    raise Refusal("unknown_session", line, closes=True)
                raise Refusal("cannot_resume", line, closes=True, retry_after=RETRY_AFTER)

    def expire(self, now: float) -> None:
        """Delete those who have waited long enough."""
        for session in [session for session in self.sessions.values() if now - session.seen >= session.keep]:
            del self.sessions[session.id]
            self.delete(session.id)

    def next_expiry(self, now: float) -> float:
        """Seconds until one expires; infinity if there is none."""
        return min((session.seen + session.keep - now for session in self.sessions.values()), default=float("inf"))
