"""The networks of a rollout: one for all steps, or experts."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.transformer import HiARTransformer


def networks_of(
    model: HiARTransformer | Sequence[HiARTransformer | None], steps: int
) -> tuple[list[HiARTransformer | None], HiARTransformer]:
    """The network of each step, and one that is not None."""
    if isinstance(model, str) or not isinstance(model, HiARTransformer | Sequence):
        legal = f"a HiARTransformer, or one for each of the {steps} steps"
        raise ValueError(f"model must be {legal}, got {type(model).__name__}; hiar_model.load_transformer reads one")
    models: list[HiARTransformer | None] = [model] * steps if isinstance(model, HiARTransformer) else list(model)
    network = next(filter(None, models), None)
    if len(models) != steps or network is None:
        raise ValueError(f"model must be one network, or one for each of the {steps} steps, got {len(models)}")
    for step, one in enumerate(models):
        if one is not None and one.config != network.config:
            raise ValueError(f"model: step {step} has {one.config}, others have {network.config}, expected one for all")
    return models, network


def models_of(steps: range, models: Sequence[HiARTransformer | None]) -> list[HiARTransformer]:
    """A model for each step; steps of other ranks get one of this rank's models, which is never run."""
    own = [models[step] for step in steps]
    missing = [step for step, model in zip(steps, own, strict=True) if model is None]
    if missing:
        raise ValueError(f"model: step {missing[0]} is None, expected weights of all steps of this rank, {list(steps)}")
    return [(models[step] if step in steps else own[0]) or own[0] for step in range(len(models))]  # type: ignore[misc]
