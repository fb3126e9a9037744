"""Checks of `reward`: its keywords, and the file of the user's reward function.

The file is parsed and not imported, so that none of its code runs.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection

from verl.config.ppo import PPOConfig
from verl.config.reward import REWARD_MODEL_ARGUMENTS, SCORER_ARGUMENTS, CustomRewardFunctionConfig
from verl.config.reward_kwargs import BUFFER, KWARGS, kwargs_problems, overlong_buffer, scorer_kwargs
from verl.extension.paths import expand_user
from verl.extension.source import parse_python
from verl.extension.user_files import file_problem, top_level_names
from verl.preflight.findings import Findings

_FUNCTION = "reward.custom_reward_function"


def check_reward(config: PPOConfig, found: Findings) -> None:
    """Check the keywords, then look for the reward function in its file."""
    problems = kwargs_problems(config.reward)
    found.errors += problems
    if not problems:
        _check_max_resp_len(config, found)
        _note_no_penalty(config, found)
    given = [*scorer_kwargs(config.reward)]
    if config.reward.reward_model.enable:
        given += REWARD_MODEL_ARGUMENTS
    _check_function(config.reward.custom_reward_function, given, found)


def _check_max_resp_len(config: PPOConfig, found: Findings) -> None:
    buffer, longest = overlong_buffer(config.reward), config.data.max_response_length
    if buffer is not None and buffer.max_resp_len > longest:
        found.errors.append(
            f"{KWARGS}.max_resp_len={buffer.max_resp_len}: no response is longer than "
            f"data.max_response_length={longest}, so none would get the full penalty; use at most {longest}"
        )


def _note_no_penalty(config: PPOConfig, found: Findings) -> None:
    if config.reward.reward_manager.name != "dapo":
        return
    buffer = overlong_buffer(config.reward)
    if buffer is None or buffer.penalty_factor == 0:
        reason = f"without {BUFFER}.enable=True" if buffer is None else f"with {BUFFER}.penalty_factor=0"
        found.notes.append(
            f"reward.reward_manager.name=dapo {reason}: there is no penalty for long responses; the reward is the score"
        )


def _check_function(function: CustomRewardFunctionConfig, shared: Collection[str], found: Findings) -> None:
    if function.path is None:
        return
    path = expand_user(function.path)
    field = f"{_FUNCTION}.path={function.path}"
    problem = file_problem(path)
    if problem is not None:
        found.errors.append(f"{field}: {problem}; give a Python file")
        return
    try:
        tree = parse_python(path)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        found.errors.append(f"{field}: is not valid Python ({path.name}{line}: {reason}); correct it")
        return
    names, open_ended = top_level_names(tree)
    if function.name in names or open_ended:
        _check_keywords(tree, function, shared, found)
        return
    similar = difflib.get_close_matches(function.name, names, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(names) or 'no function'}"
    found.errors.append(f"{_FUNCTION}.name={function.name}: {path} does not define this name ({hint}); correct it")


def _check_keywords(
    tree: ast.Module, function: CustomRewardFunctionConfig, shared: Collection[str], found: Findings
) -> None:
    """Check the parameters of the function, if the source shows all of them.

    Args:
        shared: the scorer's keywords from both sections of keywords.
    """
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    definitions = [node for node in tree.body if isinstance(node, kinds) and node.name == function.name]
    if len(definitions) != 1 or definitions[0].decorator_list or definitions[0].args.kwarg:
        return
    arguments = definitions[0].args
    parameters = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
    given = {*SCORER_ARGUMENTS, *shared}
    missing = [name for name in SCORER_ARGUMENTS if name not in parameters]
    positional = [argument.arg for argument in arguments.posonlyargs]
    keyword_only = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = arguments.args[: len(arguments.args) - len(arguments.defaults)]
    required += [argument for argument, default in keyword_only if default is None]
    extra = positional + [argument.arg for argument in required if argument.arg not in given]
    served = all(name in shared for name in REWARD_MODEL_ARGUMENTS)
    if not served and (asked := [name for name in extra if name in REWARD_MODEL_ARGUMENTS]):
        found.errors.append(
            f"{_FUNCTION}.name={function.name}: {function.name} requires {', '.join(asked)}, which a reward model "
            "gives; set reward.reward_model.enable=True, or give the parameters a default"
        )
        return
    if served and (lost := [name for name in REWARD_MODEL_ARGUMENTS if name not in parameters]):
        found.errors.append(
            f"{_FUNCTION}.name={function.name}: {function.name} has no parameter {', '.join(lost)}, with which it is "
            "called if reward.reward_model.enable=True; add it, or **kwargs"
        )
        return
    if missing or extra:
        parts = [f"has no parameter {', '.join(missing)}"] if missing else []
        parts += [f"requires {', '.join(extra)}, which nothing sets"] if extra else []
        found.errors.append(
            f"{_FUNCTION}.name={function.name}: {function.name} {' and '.join(parts)}; it is called with keywords, so "
            f"write def {function.name}({', '.join(SCORER_ARGUMENTS)}, **kwargs)"
        )
        return
    for key in function.reward_kwargs or {}:
        if key not in parameters:
            similar = difflib.get_close_matches(key, parameters, n=1)
            hint = f"did you mean {similar[0]}?" if similar else f"it has {', '.join(parameters)}"
            found.errors.append(
                f"{_FUNCTION}.reward_kwargs.{key}: {function.name} has no such parameter ({hint}); correct it, or add "
                "it to the function"
            )
