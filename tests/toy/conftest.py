"""The plain toy world and its codec."""

from __future__ import annotations

import pytest
from toy_codec import fit_once

from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.world import WORLDS, ToyWorld


@pytest.fixture(scope="session")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="session")
def codec() -> ToyCodec:
    return fit_once()


@pytest.fixture(scope="session")
def large_codec(codec: ToyCodec) -> ToyCodec:
    return codec.for_size(WORLDS["scenes_64"])
