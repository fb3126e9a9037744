"""The command line of a run; the tests at the end start it in another process."""

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from verl.config import ConfigError, load_config
from verl.trainer import main_ppo


def test_arguments_are_split_into_hydra_options_and_overrides(monkeypatch, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "more").mkdir()
    monkeypatch.chdir(tmp_path)
    options, overrides, problems = main_ppo.split_arguments(
        ["a=1", "--config-path", "conf", "+b=2", "-cn", "mine", "--cfg=job", "~c", "--resolve", "-cd=more"]
    )
    config_path, config_dir = ["--config-path", str(tmp_path / "conf")], f"-cd={tmp_path / 'more'}"
    assert options == [*config_path, "-cn", "mine", "--cfg=job", "--resolve", config_dir]
    assert overrides == ["a=1", "+b=2", "~c"] and problems == {}


def test_a_config_path_is_also_looked_for_beside_main_ppo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options, *_ = main_ppo.split_arguments(["--config-path=./config"])
    assert options == [f"--config-path={Path(main_ppo.__file__).parent / 'config'}"]


def test_all_problems_are_reported_in_one_round(run_files):
    loaded = main_ppo.compose(
        [
            "--config-name=ppo_megatron_trainer",
            *run_files.overrides(),
            "trainer.total_epoch=3",
            "actor_rollout_ref.rollout.name=sglang",
            "trainer.resume_mode={a: 1}",
            "data.seed=[1",
            "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        main_ppo.checked_plan(loaded)
    heads = ("--config-name=", "unknown key 'trainer.total_epoch'", "actor_rollout_ref.rollout.name=sglang")
    heads += ("trainer.resume_mode=", "data.seed=[1", "actor_rollout_ref.actor.ppo_mini_batch_size=3")
    for head in heads:
        assert sum(problem.startswith(head) for problem in caught.value.problems) == 1, (head, caught.value.problems)


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_multirun_is_not_supported(option):
    with pytest.raises(ConfigError, match="one command for each"):
        main_ppo.split_arguments([option, "a=1,2"])


@pytest.fixture
def stand_in(monkeypatch):
    """A function that replaces the `run` of the trainer, which would start Ray."""

    def replace(run):
        module = types.ModuleType("verl.trainer.ppo.ray_trainer")
        module.run = run
        monkeypatch.setitem(sys.modules, "verl.trainer.ppo.ray_trainer", module)

    return replace


def fails(config, plan):
    raise RuntimeError("the engine died")


def interrupted(config, plan):
    raise KeyboardInterrupt


def terminated(config, plan):
    raise SystemExit(143)


@pytest.mark.parametrize(
    ("run", "status", "words"),
    [
        (lambda config, plan: None, 0, ""),
        (fails, 1, "verl: the run failed: RuntimeError: the engine died"),
        (interrupted, 130, "Ctrl-C"),
        (terminated, 143, ""),
    ],
)
def test_exit_status(run_files, stand_in, capsys, run, status, words):
    stand_in(run)
    with pytest.raises(SystemExit) as ended:
        main_ppo.main(run_files.overrides())
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert printed.out.startswith("plan\n") and words in printed.err


def test_run_gets_the_config_and_its_plan(run_files, stand_in, monkeypatch):
    got = []
    stand_in(lambda config, plan: got.append((config, plan)))
    monkeypatch.setattr(sys, "argv", ["main_ppo", *run_files.overrides(), "data.seed=9"])
    with pytest.raises(SystemExit):
        main_ppo.main()
    ((config, plan),) = got
    assert config.data.seed == 9 and plan.device == "cpu"


def test_a_program_with_its_own_command_line_runs_a_config(run_files, stand_in, capsys):
    """As user code for upstream verl does: a config that Hydra composed, or one that verl loaded."""
    started = []
    stand_in(lambda config, plan: started.append((config, plan)))
    loaded = load_config(run_files.overrides())
    main_ppo.run_ppo(OmegaConf.create(dataclasses.asdict(loaded)))
    main_ppo.run_ppo(loaded)
    assert [config for config, _ in started] == [loaded, loaded]
    assert all(plan.prompts_per_step == 8 for _, plan in started)
    assert capsys.readouterr().out.count("prompts per step     8") == 2


@pytest.mark.slow
def test_a_run_of_a_program_raises_its_errors(run_files, stand_in):
    stand_in(fails)
    with pytest.raises(ConfigError, match=r"data\.train_files"):
        main_ppo.run_ppo(load_config(run_files.overrides(data__train_files="/absent.parquet")))
    with pytest.raises(TypeError, match="task_runner_class is not supported"):
        main_ppo.run_ppo(load_config(run_files.overrides()), task_runner_class=object)
    with pytest.raises(RuntimeError, match="the engine died"):
        main_ppo.run_ppo(load_config(run_files.overrides()))


def test_compose_does_not_change_loggers():
    logger = logging.getLogger("verl.some.module")
    level, handlers = logging.root.level, list(logging.root.handlers)
    with contextlib.suppress(ConfigError):
        main_ppo.compose(["algorithm.adv_estimator=grpo"])
    assert not logger.disabled
    assert (logging.root.level, logging.root.handlers) == (level, handlers)


def run_command(tmp_path, *arguments):
    """Run the command line in another process, and check that it writes no files."""
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *map(str, arguments)],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    # By default Hydra writes log files into the working directory.
    assert list(here.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.total_epoch=1", ("trainer.total_epoch", "did you mean 'trainer.total_epochs'?")),
        ("trainer.total_epochs=abc", ("trainer.total_epochs=abc", "whole number")),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=3", ("ppo_mini_batch_size=3", "use 2 or 4")),
    ],
)
def test_invalid_config_exits_with_status_2_and_the_reason(tmp_path, run_files, override, words):
    done = run_command(tmp_path, *run_files.overrides(), override)
    assert done.returncode == 2
    assert done.stdout == "" and all(word in done.stderr for word in words), done.stderr


def test_a_reward_function_that_does_not_fit_exits_with_status_2(tmp_path, run_files):
    run_files.reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return extra_info['level']\n"
    )
    done = run_command(tmp_path, *run_files.overrides())
    assert done.returncode == 2 and done.stdout == ""
    assert "reads extra_info['level'], which the row does not have" in done.stderr, done.stderr


def test_warnings_about_user_code_are_part_of_the_plan(run_files):
    run_files.reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    raise OSError('down')\n"
    )
    plan = main_ppo.checked_plan(main_ppo.compose(run_files.overrides()))
    assert any("OSError: down" in text for text in plan.warnings) and "OSError: down" in plan.render()


@pytest.mark.slow
def test_config_path_is_relative_to_the_working_directory(tmp_path, run_files):
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {train_batch_size: 6}\n")
    options = ("--config-path", "../conf", "--config-name=mine")
    done = run_command(tmp_path, *options, *run_files.overrides(data__train_batch_size=None))
    assert done.returncode == 2 and "must divide data.train_batch_size=6" in done.stderr
    done = run_command(tmp_path, *options, "--cfg", "job", "data.seed=4", "+reward.reward_kwargs.a=1")
    assert done.returncode == 0
    assert "train_batch_size: 6" in done.stdout and "seed: 4" in done.stdout and "a: 1" in done.stdout


def test_missing_config_file(tmp_path):
    done = run_command(tmp_path, "--config-name", "nothing")
    assert done.returncode == 2 and "nothing" in done.stderr


def test_import_and_check_need_no_torch_ray_or_vllm(run_files):
    code = (
        "import sys; from verl.config import load_config; from verl.preflight import check; "
        "check(load_config(sys.argv[1:])); "
        "import verl.utils.devices, verl.trainer.main_ppo; "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *run_files.overrides()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() in ("[]", "['numpy']")  # pyarrow imports NumPy where it is installed
