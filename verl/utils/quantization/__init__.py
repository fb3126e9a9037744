"""Number formats of the rollout. Nothing here imports vLLM."""
