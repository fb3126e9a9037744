"""The vLLM rollout: the server actor that hosts the engine, and what runs inside its workers."""
