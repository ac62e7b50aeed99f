"""Files: written whole or not at all, video, weights."""
