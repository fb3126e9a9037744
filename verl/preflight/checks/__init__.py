"""Checks of a config against model, data and machine, by config section.

- `data`: data.py; data_rows.py for the content of rows and `max_prompt_length`
- `actor_rollout_ref.model`: model.py; lora.py for `lora_*`, `target_modules` and `exclude_modules`
- `actor_rollout_ref.actor`, `actor_rollout_ref.ref`: actor.py
- `actor_rollout_ref.rollout`: rollout.py; agent.py for `agent` and `multi_turn`; quantization.py for `quantization*`;
  memory.py for `gpu_memory_utilization`
- `critic`: critic.py
- `algorithm`: algorithm.py; rollout_correction.py
- `reward`: reward.py
- `trainer`: trainer.py

`verl.config.values` checks types, choices and bounds of single values. unused_keys.py reports keys without effect in
all sections. `verl.preflight.check` calls all of these.
"""
