"""Files: the atomic writer, checks, video, weights."""
