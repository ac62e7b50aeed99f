"""A decoder that says it has a CUDA stream of its own."""

from __future__ import annotations

from hiar_model.models.vae import StreamingDecoder


class Beside:
    """Frames come one block late, as on CUDA."""

    stream = object()

    def __init__(self, decoder: StreamingDecoder) -> None:
        self.submit, self.state_dict = decoder.submit, decoder.state_dict
        self.load_state_dict = decoder.load_state_dict
