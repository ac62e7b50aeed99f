"""Data of training: clips, prompts, trajectories."""
