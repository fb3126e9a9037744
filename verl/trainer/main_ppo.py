"""Command line of a run: compose the config, check it, print the plan, train.

    python3 -m verl.trainer.main_ppo key=value ...

Other modules start the same command line with another YAML file (`verl.config.entry_points`).
Hydra's options are available: `--config-path`, `--config-name`, `--cfg job`, `--help`. Exit status: 2 if the config has
errors, 1 if the run failed, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the other imports, which take seconds
    from verl.utils.process_exit import end_on_interrupt

    end_on_interrupt()

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise

import hydra
from omegaconf import DictConfig

from verl.config import ConfigError, PPOConfig, searchpath
from verl.config.config_files import checked_files
from verl.config.entry_points import MAIN_PPO, EntryPoint
from verl.config.hints import config_name_hint
from verl.config.load import Loaded, read_composed
from verl.config.overrides import Prepared, prepare
from verl.extension import external
from verl.extension.upstream_names import missing_names
from verl.preflight import Plan, check
from verl.preflight.findings import Findings
from verl.trainer.probes.process import Probes
from verl.utils.console import escape_unencodable
from verl.utils.process_exit import STOPPED, limit_exit, restore_interrupt

__getattr__ = missing_names(__name__)

# By default Hydra writes a log file and copies of the config to a new directory below the working directory.
# Its logging is "none" and not "disabled", because "disabled" would also disable all existing loggers, such as verl's.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
# Options of Hydra.
_NAMES = ("--config-name", "-cn")
_PATHS = ("--config-path", "-cp", "--config-dir", "-cd")
_WITH_VALUE = (*_NAMES, *_PATHS, "--cfg", "-c", "--package", "-p", "--experimental-rerun")
_MULTIRUN = ("--multirun", "-m")


def main(arguments: Sequence[str] | None = None, entry: EntryPoint = MAIN_PPO) -> None:
    """Run the command line and exit.

    Args:
        arguments: None for `sys.argv[1:]`.
        entry: the module that was started.
    """
    escape_unencodable()
    try:
        loaded = compose(list(sys.argv[1:] if arguments is None else arguments), entry)
        if loaded is None:
            return
        plan = checked_plan(loaded)
    except ConfigError as error:
        sys.stderr.write(f"verl: the config cannot work: {error}\n")
        raise SystemExit(2) from None
    show_plan(plan)
    try:
        status = execute(loaded.config, plan)
    except SystemExit as ended:  # after SIGTERM
        status = ended.code if isinstance(ended.code, int) else 1
    limit_exit(status)
    sys.exit(status)


def checked_plan(loaded: Loaded) -> Plan:
    """Check the config, call the user's code once, and return the plan.

    Raises:
        ConfigError: lists every problem.
    """
    config = loaded.config
    with Probes(config, starting=True) as probes:
        import_external_lib(config)
        plan = check(config, loaded.problems, loaded.notes)
        found = Findings(warnings=plan.warnings, notes=plan.notes)
        probes.check(config, found, device=plan.device)
    if found.errors:
        raise ConfigError(found.errors)
    return plan


def compose(arguments: list[str], entry: EntryPoint = MAIN_PPO) -> Loaded | None:
    """Return the config of a command line, with its problems; None if Hydra handled it alone (`--help`, `--cfg job`).

    Args:
        arguments: options of Hydra, and overrides.
        entry: the module that was started.

    Raises:
        ConfigError: a file has errors that prevent the composition.
        SystemExit: Hydra does not know an option and printed the reason; status 2.
    """
    options, overrides, problems = split_arguments(arguments)
    prepared = prepare(overrides)
    prepared.problems = problems | prepared.problems
    composed: list[DictConfig] = []

    @hydra.main(config_path="config", config_name=entry.config_name, version_base="1.3")
    def keep(values: DictConfig) -> None:
        composed.append(values)

    searchpath.register()
    with_argv = [sys.argv[0], *options, *_quiet(prepared), *entry.overrides(), *prepared.overrides]
    original, sys.argv = sys.argv, with_argv
    try:
        with checked_files(_config_name(options, entry.config_name), prepared.problems):
            keep()
    except SystemExit as error:
        raise SystemExit(2 if error.code else 0) from None
    finally:
        sys.argv = original
    if not composed:
        return None
    loaded = read_composed(composed[0], prepared)
    loaded.problems |= entry.problems(loaded.config)
    return loaded


def import_external_lib(config: PPOConfig) -> None:
    """Import the user's modules, so that the check of the config knows the names that they register.

    The config then contains absolute paths of these modules.

    Raises:
        ConfigError: a module does not import.
    """
    model = config.actor_rollout_ref.model
    libs = external.absolute(model.external_lib or ())
    model.external_lib = libs or None
    try:
        external.import_external(libs)
    except external.ExternalLibError as error:
        raise ConfigError([str(error)]) from error


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Return Hydra's options, with absolute directories of configs, the overrides, and problems by option.

    A problem is the name of an upstream config for another training engine, or no directory. The returned options then
    choose verl's own config, so that the overrides can be checked too.

    Raises:
        ConfigError: `--multirun`.
    """
    options: list[list[str]] = []
    overrides: list[str] = []
    problems: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        if name in _MULTIRUN:
            raise ConfigError(
                [f"{argument}: several runs in one command are not supported; start one command for each"]
            )
        if name in _WITH_VALUE and not equals:
            following = next(rest, None)
            options.append([name] if following is None else [name, _absolute(name, following)])
            value = following or ""
        else:
            options.append([f"{name}={_absolute(name, value)}" if equals else argument])
        problem = config_name_hint(value) if name in _NAMES else _directory_problem(name, value)
        if problem is not None:
            problems[name] = problem
    if problems:
        options = [words for words in options if words[0].partition("=")[0] not in (*_NAMES, *_PATHS)]
    return [word for words in options for word in words], overrides, problems


def _directory_problem(option: str, value: str) -> str | None:
    """Return why Hydra cannot read configs from the directory of an option; None if it can."""
    if option not in _PATHS or value.startswith("pkg://") or os.path.isdir(_absolute(option, value)):
        return None
    path = os.path.abspath(os.path.expanduser(value))
    if os.path.isfile(path):
        folder, name = os.path.split(value)
        return f"{option}={value}: is a file; use {option}={folder or '.'} --config-name={name.removesuffix('.yaml')}"
    return f"{option}={value}: no such directory (looked for {path}); give the directory of your YAML file"


def _absolute(option: str, value: str) -> str:
    """Return a relative directory as an absolute path: in the working directory, or as in Hydra beside this file."""
    if option not in _PATHS:
        return value
    path = os.path.expanduser(value)
    beside = os.path.join(os.path.dirname(__file__), path)
    return next((os.path.abspath(folder) for folder in (path, beside) if os.path.isdir(folder)), value)


def _config_name(options: Sequence[str], default: str) -> str:
    """Return the value of `--config-name` among Hydra's options."""
    words = [word for option in options for word in option.split("=", 1)]
    return next((value for name, value in reversed(list(pairwise(words))) if name in _NAMES), default)


def _quiet(prepared: Prepared) -> list[str]:
    """Return the settings that keep Hydra from writing files, without those that the user overrides."""
    given = {text.partition("=")[0].lstrip("+~") for text in prepared.overrides}
    return [text for text in _QUIET if text.partition("=")[0] not in given]


def show_plan(plan: Plan) -> None:
    """Print the plan."""
    sys.stdout.write(plan.render() + "\n")
    sys.stdout.flush()


def run_ppo(config: DictConfig | PPOConfig, task_runner_class: object = None) -> None:
    """Check a config, print the plan and train, for a program with its own command line.

    Args:
        config: as `hydra.main` composed it, or from `verl.config.load_config`.
        task_runner_class: must be None; the training loop cannot be replaced.

    Raises:
        ConfigError: lists every problem of the config.
        TypeError: `task_runner_class` is given.
        Exception: the run failed.
    """
    if task_runner_class is not None:
        raise TypeError(
            "run_ppo: task_runner_class is not supported, because the training loop cannot be replaced; extend it with "
            "registered functions and classes (docs/extending.md)"
        )
    loaded = Loaded(config) if isinstance(config, PPOConfig) else read_composed(config, Prepared())
    plan = checked_plan(loaded)
    show_plan(plan)
    _train(loaded.config, plan)


def _train(config: PPOConfig, plan: Plan) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    from verl.trainer.ppo.ray_trainer import run

    restore_interrupt()
    run(config, plan)


def execute(config: PPOConfig, plan: Plan) -> int:
    """Train, and return the exit status."""
    try:
        _train(config, plan)
    except KeyboardInterrupt:
        sys.stderr.write(STOPPED)
        return 130
    except Exception as error:  # noqa: BLE001  (the top level prints every error, first its message and then its traceback)
        sys.stderr.write(f"verl: the run failed: {type(error).__name__}: {error}\n")
        traceback.print_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    main()
