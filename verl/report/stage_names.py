"""The stages of a step, in words."""

# Parts of timing_s/step, in the order in which they happen. Generation and scoring overlap: gen covers both.
STAGES = {
    "gen": "generation (and rewards)",
    "old_log_prob": "log-probabilities",
    "ref": "reference log-probabilities",
    "values": "values",
    "adv": "advantages",
    "update_critic": "critic update",
    "update_actor": "actor update",
    "update_weights": "weights into the engine",
    "step": "whole step",
    "testing": "validation (when it runs)",
    "save_checkpoint": "checkpoint (when written)",
}
