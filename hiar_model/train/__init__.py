"""Training: matched-noise teacher forcing of the toy model."""
