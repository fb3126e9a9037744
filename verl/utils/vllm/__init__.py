"""What touches vLLM's internals: version differences, quantization hooks, platform patches."""
