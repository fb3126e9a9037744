"""What touches vLLM's internals: version differences, quantisation hooks, platform patches."""
