"""The parts of the command line that need no process of their own."""

import contextlib
import logging
import sys
import types

import pytest

from verl.config import ConfigError
from verl.trainer import main_ppo


def test_hydra_s_options_are_told_from_overrides(monkeypatch, tmp_path):
    (tmp_path / "conf").mkdir()
    monkeypatch.chdir(tmp_path)
    options, overrides = main_ppo.split_arguments(
        ["a=1", "--config-path", "conf", "+b=2", "-cn", "mine", "--cfg=job", "~c", "--resolve", "-cd=nowhere"]
    )
    assert options == ["--config-path", str(tmp_path / "conf"), "-cn", "mine", "--cfg=job", "--resolve", "-cd=nowhere"]
    assert overrides == ["a=1", "+b=2", "~c"]


@pytest.mark.parametrize("option", ["-m", "--multirun"])
def test_several_runs_in_one_command_are_refused(option):
    with pytest.raises(ConfigError, match="one command for each"):
        main_ppo.split_arguments([option, "a=1,2"])


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a `run` in the place of the trainer's, which would start Ray."""

    def place(run):
        module = types.ModuleType("verl.trainer.ppo.ray_trainer")
        module.run = run
        monkeypatch.setitem(sys.modules, "verl.trainer.ppo.ray_trainer", module)

    return place


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


def test_the_run_gets_the_config_and_its_plan(run_files, stand_in, monkeypatch):
    got = []
    stand_in(lambda config, plan: got.append((config, plan)))
    monkeypatch.setattr(sys, "argv", ["main_ppo", *run_files.overrides(), "data.seed=9"])
    with pytest.raises(SystemExit):
        main_ppo.main()
    ((config, plan),) = got
    assert config.data.seed == 9 and plan.device == "cpu"


def test_composing_leaves_loggers_alone():
    logger = logging.getLogger("verl.some.module")
    level, handlers = logging.root.level, list(logging.root.handlers)
    with contextlib.suppress(ConfigError):
        main_ppo.compose(["algorithm.adv_estimator=grpo"])
    assert not logger.disabled
    assert (logging.root.level, logging.root.handlers) == (level, handlers)
