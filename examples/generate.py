"""A whole video from a prompt, written as mp4."""
