"""What a rollout will take, before it runs: memory, time, what fits."""
