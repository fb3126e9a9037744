"""Display names of the stages of a step."""

# Parts of timing_s/step, in their order of execution. Generation and scoring overlap: gen covers both.
STAGES = {
    "gen": "generation (and rewards)",
    "old_log_prob": "log-probabilities",
    "ref": "reference log-probabilities",
    "values": "values",
    "adv": "advantages",
    "update_critic": "critic update",
    "update_actor": "actor update",
    "update_weights": "weight update",
    "step": "whole step",
    "testing": "validation (when it runs)",
    "save_checkpoint": "checkpoint (when written)",
}
