"""The toy's codec, fitted once for all tests that train: a third of a second, and always the same."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from hiar_model.toy.codec import ToyCodec

fit_once = functools.cache(ToyCodec.fit)


@pytest.fixture(scope="module", autouse=True)
def codec_once() -> Iterator[None]:
    """In modules that import this fixture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCodec, "fit", fit_once)
        yield
