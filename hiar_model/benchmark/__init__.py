"""`hiar bench`: how fast a rollout is, and all that this depends on."""
