"""Command line: `python3 -m verl.trainer.main_ppo key=value ...`: compose the config, check it, print the plan, run.

Hydra's own options work: `--config-path`, `--config-name`, `--cfg job`, `--help`. Exit status: 2 for a config that
cannot work, 1 for a run that failed, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from verl.config import ConfigError, PPOConfig, from_hydra, searchpath
from verl.config.hints import config_name_hint
from verl.config.overrides import Prepared, prepare
from verl.preflight import Plan, check
from verl.utils import external

# Hydra would make a directory with a log file and copies of the config for every run, wherever it is started.
# Its logging is "none", not "disabled", which would switch off every logger that exists by then, verl's own included.
_QUIET = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
_WITH_VALUE = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p")
_WITH_VALUE += ("--experimental-rerun",)
_NAMES = ("--config-name", "-cn")
_PATHS = ("--config-path", "-cp", "--config-dir", "-cd")
_MULTIRUN = ("--multirun", "-m")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `arguments` in the place of `sys.argv[1:]`."""
    try:
        config = compose(list(sys.argv[1:] if arguments is None else arguments))
        if config is None:
            return
        import_external_lib(config)
        plan = check(config)
    except ConfigError as error:
        sys.stderr.write(f"verl: the config cannot work: {error}\n")
        raise SystemExit(2) from None
    show_plan(plan)
    sys.exit(execute(config, plan))


def compose(arguments: list[str]) -> PPOConfig | None:
    """The config of a command line; None where Hydra answered it by itself (`--help`, `--cfg job`).

    Raises:
        ConfigError: an override or a file is wrong.
        SystemExit: Hydra could not compose, and said why; status 2.
    """
    options, overrides = split_arguments(arguments)
    prepared = prepare(overrides)
    composed: list[DictConfig] = []

    @hydra.main(config_path="config", config_name="ppo_trainer", version_base="1.3")
    def keep(values: DictConfig) -> None:
        composed.append(values)

    searchpath.register()
    with_argv = [sys.argv[0], *options, *_quiet(prepared), *prepared.overrides]
    original, sys.argv = sys.argv, with_argv
    try:
        keep()
    except SystemExit as error:
        raise SystemExit(2 if error.code else 0) from None
    finally:
        sys.argv = original
    return from_hydra(composed[0], prepared.given) if composed else None


def import_external_lib(config: PPOConfig) -> None:
    """Import the user's modules, so that the names they register are known when the config is checked.

    Raises:
        ConfigError: one does not import.
    """
    model = config.actor_rollout_ref.model
    libs = external.absolute(model.external_lib or ())
    model.external_lib = libs or None
    try:
        external.import_external(libs)
    except external.ExternalLibError as error:
        raise ConfigError([str(error)]) from error


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options, a relative directory of configs made absolute, and overrides.

    Raises:
        ConfigError: `--multirun`, or a config file of verl's for another training engine.
    """
    options: list[str] = []
    overrides: list[str] = []
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
            value = next(rest, None)
            options += [name] if value is None else [name, _from_here(name, value)]
        else:
            options.append(f"{name}={_from_here(name, value)}" if equals else argument)
        refused = config_name_hint(value or "") if name in _NAMES else None
        if refused is not None:
            raise ConfigError([refused])
    return options, overrides


def _from_here(option: str, value: str) -> str:
    """Hydra looks for a relative directory beside this file; users mean the working directory."""
    path = os.path.expanduser(value)
    return os.path.abspath(path) if option in _PATHS and os.path.isdir(path) else value


def _quiet(prepared: Prepared) -> list[str]:
    given = {text.partition("=")[0].lstrip("+~") for text in prepared.overrides}
    return [text for text in _QUIET if text.partition("=")[0] not in given]


def show_plan(plan: Plan) -> None:
    """Print the plan."""
    sys.stdout.write(plan.render() + "\n")
    sys.stdout.flush()


def execute(config: PPOConfig, plan: Plan) -> int:
    """Train; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    from verl.trainer.ppo.ray_trainer import run

    try:
        run(config, plan)
    except KeyboardInterrupt:
        sys.stderr.write("verl: stopped by Ctrl-C\n")
        return 130
    except Exception as error:  # noqa: BLE001  (the last one to see it: the error first, where it came from below)
        sys.stderr.write(f"verl: the run failed: {type(error).__name__}: {error}\n")
        traceback.print_exception(error)
        return 1
    return 0


if __name__ == "__main__":
    main()
