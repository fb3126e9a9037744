"""Rollout: replicas of an inference engine, the client that routes requests to them, and the weight update."""
