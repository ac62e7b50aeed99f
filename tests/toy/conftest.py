"""The plain toy world and its codec, which takes a second to fit."""

from __future__ import annotations

import pytest

from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.world import WORLDS, ToyWorld


@pytest.fixture(scope="session")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="session")
def codec() -> ToyCodec:
    return ToyCodec.fit()


@pytest.fixture(scope="session")
def large_codec(codec: ToyCodec) -> ToyCodec:
    return codec.for_size(WORLDS["scenes_64"])
