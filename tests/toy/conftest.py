"""The plain toy world and its codec, which takes a second to fit."""

from __future__ import annotations

import pytest

from hiar_model.toy.codec import ToyCodec
from hiar_model.toy.world import ToyWorld


@pytest.fixture(scope="session")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.fixture(scope="session")
def codec() -> ToyCodec:
    return ToyCodec.fit()
