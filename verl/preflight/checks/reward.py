"""Rewards: the keywords hold together, and the user's file compiles and has the function.

Nothing of that file is imported, so nothing of it runs here.
"""

from __future__ import annotations

import ast
import difflib
from pathlib import Path

from verl.config.ppo import PPOConfig
from verl.config.reward_kwargs import BUFFER, KWARGS, kwargs_problems, overlong_buffer
from verl.preflight.findings import Findings
from verl.utils.user_files import file_problem, top_level_names

_PATH = "reward.custom_reward_function.path"
_NAME = "reward.custom_reward_function.name"


def check_reward(config: PPOConfig, found: Findings) -> None:
    """Check the keywords, then look for the function in the source."""
    problems = kwargs_problems(config.reward)
    found.errors += problems
    if not problems:
        _check_length(config, found)
        _note_no_penalty(config, found)
    _check_function(config, found)


def _check_length(config: PPOConfig, found: Findings) -> None:
    buffer, longest = overlong_buffer(config.reward), config.data.max_response_length
    if buffer is not None and buffer.max_resp_len > longest:
        found.errors.append(
            f"{KWARGS}.max_resp_len={buffer.max_resp_len}: no response is longer than "
            f"data.max_response_length={longest}, so that the whole penalty is never due; give at most {longest}"
        )


def _note_no_penalty(config: PPOConfig, found: Findings) -> None:
    if config.reward.reward_manager.name != "dapo":
        return
    buffer = overlong_buffer(config.reward)
    if buffer is None or buffer.penalty_factor == 0:
        key = f"{BUFFER}.enable=True" if buffer is None else f"{BUFFER}.penalty_factor=0"
        found.notes.append(
            f"reward.reward_manager.name=dapo {'without' if buffer is None else 'with'} {key}: no response is punished "
            "for its length, the reward is the score"
        )


def _check_function(config: PPOConfig, found: Findings) -> None:
    function = config.reward.custom_reward_function
    if function.path is None:
        return
    path = Path(function.path).expanduser()
    problem = file_problem(path)
    if problem is not None:
        found.errors.append(f"{_PATH}={function.path}: {problem}; give a Python file")
        return
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        found.errors.append(f"{_PATH}={function.path}: is not valid Python ({path.name}{line}: {reason}); mend it")
        return
    names, open_ended = top_level_names(tree)
    if function.name in names or open_ended:
        _check_keywords(tree, config, found)
        return
    near = difflib.get_close_matches(function.name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'no function'}"
    found.errors.append(f"{_NAME}={function.name}: {path} does not define it ({hint}); set {_NAME}")


def _check_keywords(tree: ast.Module, config: PPOConfig, found: Findings) -> None:
    """Further keywords of the function, where its parameters are to be seen in the source."""
    function = config.reward.custom_reward_function
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    written = [node for node in tree.body if isinstance(node, kinds) and node.name == function.name]
    if len(written) != 1 or written[0].decorator_list or written[0].args.kwarg:
        return
    own = [argument.arg for argument in (*written[0].args.args, *written[0].args.kwonlyargs)]
    for key in function.reward_kwargs or {}:
        if key not in own:
            near = difflib.get_close_matches(key, own, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(own)}"
            found.errors.append(
                f"reward.custom_reward_function.reward_kwargs.{key}: {function.name} has no such parameter ({hint}); "
                "correct it, or add it to the function"
            )
