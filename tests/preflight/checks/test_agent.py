import pytest

LOOP = "actor_rollout_ref__rollout__agent__default_agent_loop"
LOOPS = "actor_rollout_ref__rollout__agent__agent_loop_config_path"
ENABLE = "actor_rollout_ref__rollout__multi_turn__enable"
TOOLS = "actor_rollout_ref__rollout__multi_turn__tool_config_path"
TOOL_FILE = """
tools:
  - class_name: mine.py:Mine
    tool_schema: {type: function, function: {name: mine, description: d}}
"""


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine: pass\nraise SystemExit('a check imports nothing')\n")
    path = tmp_path / "tools.yaml"
    path.write_text(TOOL_FILE)
    return path


def test_a_tool_agent_with_tools_has_no_warning(plan_of, tools):
    plan = plan_of(**{LOOP: "tool_agent", ENABLE: True, TOOLS: tools})
    assert not any("tool" in line for line in plan.warnings + plan.notes)


def test_an_unknown_agent_loop_is_an_error(problem_of):
    problem = problem_of(**{LOOP: "tool_agnet"})
    assert problem.startswith("actor_rollout_ref.rollout.agent.default_agent_loop=tool_agnet: tool_agnet is unknown")
    assert "single_turn_agent, tool_agent" in problem


def test_agent_loops_of_a_user_file_are_known(plan_of, problem_of, tmp_path):
    (tmp_path / "own.py").write_text("class Own: pass\nraise SystemExit('a check imports nothing')\n")
    path = tmp_path / "loops.yaml"
    path.write_text("- {name: own, _target_: own.py:Own, depth: 3}")
    plan_of(**{LOOP: "own", LOOPS: path})
    assert "own" in problem_of(**{LOOP: "other", LOOPS: path})


def test_agent_loops_that_a_user_module_registered_are_known(plan_of, problem_of, tmp_path):
    from verl.extension.external import import_external

    lib = tmp_path / "lib.py"
    lib.write_text(
        "from verl.agent_loop import AgentLoopBase, register\n"
        "@register('registered_for_this_test')\n"
        "class Own(AgentLoopBase):\n    async def run(self, params, **row): ...\n"
    )
    import_external([str(lib)])
    changes = {"actor_rollout_ref__model__external_lib": f"[{lib}]"}
    plan_of(**{LOOP: "registered_for_this_test"}, **changes)
    assert "did you mean registered_for_this_test?" in problem_of(**{LOOP: "registred_for_this_test"}, **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("{", "is not YAML"),
        ("{}", "must contain a list"),
        ("[]", "must contain a list"),
        ("[3]", "[0]: an entry needs name and _target_"),
        ("- {name: a, _target_: nobody.py:A}", "[0]._target_=nobody.py:A: no such file"),
        ("- {name: a, _target_: torch.A}\n- {name: a, _target_: torch.B}", "duplicate name a"),
    ],
)
def test_an_invalid_file_of_agent_loops_is_an_error(problem_of, tmp_path, text, words):
    path = tmp_path / "loops.yaml"
    if text is not None:
        path.write_text(text)
    problem = problem_of(**{LOOPS: path})
    assert problem.startswith(f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}") and words in problem


def test_a_directory_instead_of_a_file_is_an_error(problem_of, tmp_path):
    for key in (LOOPS, TOOLS):
        problem = problem_of(**{LOOP: "tool_agent", ENABLE: True, key: tmp_path})
        assert f"={tmp_path}: is a directory (looked for {tmp_path}); give a YAML file" in problem


def test_an_invalid_file_of_tools_is_an_error(problem_of, tools):
    tools.write_text(TOOL_FILE.replace("Mine", "Yours"))
    assert "mine.py has no class Yours" in problem_of(**{LOOP: "tool_agent", ENABLE: True, TOOLS: tools})


def test_multi_turn_without_a_loop_that_uses_it_is_an_error(problem_of, plan_of, run_files, tools):
    changes = {ENABLE: True, TOOLS: tools}
    problem = problem_of(**changes)
    assert problem.startswith("actor_rollout_ref.rollout.multi_turn.enable=True") and "=tool_agent" in problem
    run_files.write_prompts(run_files.train, 40, agent_name="tool_agent")
    plan_of(**changes)


def test_a_tool_agent_with_multi_turn_off_is_a_note(plan_of, tools):
    plan = plan_of(**{LOOP: "tool_agent", TOOLS: tools})
    assert any("multi_turn.enable=False" in note for note in plan.notes)


def test_a_tool_agent_without_tools_is_a_warning(plan_of):
    assert any("has no tools" in warning for warning in plan_of(**{LOOP: "tool_agent", ENABLE: True}).warnings)


def test_keys_of_multi_turn_are_unused_without_the_tool_agent(plan_of, tools):
    changes = {TOOLS: tools, "actor_rollout_ref__rollout__multi_turn__max_user_turns": 3}
    (note,) = [note for note in plan_of(**changes).notes if "multi_turn" in note]
    assert "tool_config_path" in note and "max_user_turns" in note and note.startswith("no effect")
