"""Prompt to video: models from disk, the video pipeline, its conditioning and metadata."""
