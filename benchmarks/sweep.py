"""Measure reward and seconds per step of every advantage estimator and policy loss on the task of the quickstart.

    python benchmarks/sweep.py [--steps 10] [--only gspo rloo ...] [--write docs/algorithms.md]

Each row is a separate run with the keys of `examples/quickstart/run.sh` (rollout in MXFP8, 8 samples per prompt), its
own keys and a constant learning rate. Ten steps show that an algorithm learns, and the cost of its step. They are not a
ranking: the best learning rates differ, and there is only one seed. Takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from quickstart_runs import run, validation
from tables import write_section

ESTIMATOR, LOSS = "algorithm.adv_estimator", "actor_rollout_ref.actor.policy_loss.loss_mode"
CRITIC = {"critic.model.path": "outputs/quickstart/model", "critic.optim.lr": 1e-3, "algorithm.lam": 0.95}
# Row name to the keys that it adds to those of the quickstart, which has the estimator grpo and the loss vanilla.
ROWS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo, not divided (Dr. GRPO)": {
        "algorithm.norm_adv_by_std_in_grpo": False,
        "actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum-norm",
    },
    "grpo_passk": {ESTIMATOR: "grpo_passk"},
    "gae (PPO with a critic)": {ESTIMATOR: "gae", **CRITIC},
    "rloo": {ESTIMATOR: "rloo"},
    "reinforce_plus_plus": {ESTIMATOR: "reinforce_plus_plus"},
    "reinforce_plus_plus_baseline": {ESTIMATOR: "reinforce_plus_plus_baseline"},
    "remax": {ESTIMATOR: "remax"},
    "opo": {ESTIMATOR: "opo"},
    "gpg": {ESTIMATOR: "gpg", LOSS: "gpg"},
    "gdpo": {
        ESTIMATOR: "gdpo",
        "algorithm.gdpo_reward_keys": "[letters,length]",
        "reward.custom_reward_function.path": "benchmarks/two_rewards.py",
    },
    "optimal_token_baseline": {ESTIMATOR: "optimal_token_baseline"},
    "grpo + DAPO (filter_groups, clip-higher, token-mean)": {
        "algorithm.filter_groups.enable": True,
        "algorithm.filter_groups.metric": "seq_reward",
        "algorithm.filter_groups.max_num_gen_batches": 10,
    },
    "loss gspo": {
        LOSS: "gspo",
        "actor_rollout_ref.actor.clip_ratio_low": 3e-4,
        "actor_rollout_ref.actor.clip_ratio_high": 4e-4,
    },
    "loss sapo": {LOSS: "sapo"},
    "loss clip_cov": {LOSS: "clip_cov"},
    "loss kl_cov": {LOSS: "kl_cov"},
    "loss geo_mean": {LOSS: "geo_mean"},
    "loss cispo": {LOSS: "cispo"},
    "loss dppo_tv": {LOSS: "dppo_tv"},
    "loss dppo_kl": {LOSS: "dppo_kl"},
    "bypass, PPO clip": {"algorithm.rollout_correction.preset": "bypass_ppo_clip"},
    "bypass, REINFORCE with importance weights": {"algorithm.rollout_correction.preset": "bypass_pg_is"},
}


def measure(name: str, steps: int, directory: Path) -> tuple[float, float, float]:
    """Run a row; return reward before, reward after, and median seconds per step without validation."""
    keys = {
        "trainer.total_training_steps": steps,
        "trainer.test_freq": steps,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.actor.optim.lr": 3e-4,
        **ROWS[name],
    }
    recorded = run(directory / "".join(c if c.isalnum() else "_" for c in name), keys)
    rewards = validation(recorded)
    seconds = [data["timing_s/step"] - data.get("timing_s/testing", 0.0) for step, data in recorded.items() if step]
    return rewards[0][1], rewards[-1][1], statistics.median(seconds)


def table(results: dict[str, tuple[float, float, float]], steps: int) -> str:
    """Markdown table of the results, below a line that describes the machine."""
    described = machine.describe()
    lines = [
        f"`make sweep`, {steps} steps each; {described['date']}, {described['kind']}, {described['cores']}.",
        "",
        "| | reward before | after | seconds per step |",
        "|-|-|-|-|",
    ]
    lines += [
        f"| {name} | {before:.3f} | {after:.3f} | {pace:.2f} |" for name, (before, after, pace) in results.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--only", nargs="*", default=None, metavar="WORD", help="only rows with such a word in their name"
    )
    parser.add_argument("--write", type=Path, help="document to write the table into")
    options = parser.parse_args()
    print(machine.header(), flush=True)
    names = [name for name in ROWS if options.only is None or any(word in name for word in options.only)]
    if not names:
        sys.exit(f"--only {' '.join(options.only)}: no row has this word in its name; use one of: {', '.join(ROWS)}")
    results, failed = {}, []
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            try:
                results[name] = measure(name, options.steps, Path(directory))
            except RuntimeError as error:  # a failed row does not stop the others
                failed.append(name)
                print(f"{name}: {error}", flush=True)
                continue
            before, after, pace = results[name]
            print(f"{name:<60} {before:.3f} -> {after:.3f}   {pace:.2f} s per step", flush=True)
    text = table(results, options.steps)
    print(f"\n{text}")
    if options.write:
        write_section(options.write, "sweep", text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
