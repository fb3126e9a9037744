"""The jobs in .github/workflows: every command exists and accepts its arguments."""

import importlib.util
import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from contract.vllm_ascend.build_env import RELEASES

from verl.cli.entry import SUBCOMMANDS
from verl.config import load_config

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
PYTHONS = ("python", "python3", ".venv/bin/python")


def load(name):
    return yaml.safe_load(WORKFLOWS[name].read_text())


def combinations(matrix):
    """Yield the jobs that GitHub creates from a matrix: the product of its lists, plus every matching `include`."""
    axes = {key: values for key, values in matrix.items() if key != "include"}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        for extra in matrix.get("include", ()):
            if all(chosen[key] == value for key, value in extra.items() if key in axes):
                chosen |= extra
        yield chosen


def filled(text, chosen):
    return re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda found: chosen[found[1]], text)


def commands():
    """Yield (workflow, words of a command) for every command, with the values of its matrix."""
    for name in WORKFLOWS:
        for job in load(name)["jobs"].values():
            for chosen in combinations(job.get("strategy", {}).get("matrix", {})):
                for step in job["steps"]:
                    for line in filled(step.get("run", ""), chosen).splitlines():
                        yield name, tuple(shlex.split(line))


COMMANDS = sorted(set(commands()))


def make_targets():
    return set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def markers(pytestconfig):
    return {line.partition(":")[0] for line in pytestconfig.getini("markers")}


def check_make(words, pytestconfig):
    targets = [word for word in words if "=" not in word]
    assert targets and set(targets) <= make_targets()
    assert all(word.startswith("ARGS=") for word in words if "=" in word)


def check_pytest(words, pytestconfig):
    rest = iter(words)
    for word in rest:
        if word == "-m":
            assert set(re.findall(r"\w+", next(rest))) <= markers(pytestconfig)
        elif not word.startswith("-"):
            path, _, test = word.partition("::")
            assert (ROOT / path).exists(), word
            assert not test or f"def {test.partition('[')[0]}(" in (ROOT / path).read_text()


def check_python(words, pytestconfig):
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        if words[0] == ".github/check_run.py":
            import_check_run().load_bounds(ROOT / ".github/bounds.yaml", words[2])
        return
    assert importlib.util.find_spec(words[1]) is not None, words[1]
    if words[1] == "pytest":
        check_pytest(words[2:], pytestconfig)


def check_script(path, words):
    assert os.access(ROOT / path, os.X_OK), f"{path} is not an executable file"
    # `load_config` raises for an unknown key.
    assert load_config(list(words)).trainer.total_training_steps == 20


def import_check_run():
    spec = importlib.util.spec_from_file_location("check_run", ROOT / ".github/check_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("workflow", "words"), COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_the_command_exists(workflow, words, pytestconfig):
    head, rest = words[0], words[1:]
    assert not any("${{" in word for word in words), "this test does not replace this expression"
    if head == "make":
        check_make(rest, pytestconfig)
    elif head in PYTHONS:
        check_python(rest, pytestconfig)
    elif head in ("verl", ".venv/bin/verl"):
        assert rest[0] in SUBCOMMANDS
    elif head.endswith(".sh"):
        check_script(head, rest)
    else:
        assert words[:2] == ("echo", "$PWD/.venv/bin"), f"this test does not check such a command: {words}"


def test_required_workflows_exist_and_are_named_after_their_files():
    assert set(WORKFLOWS) >= {"cpu_unit", "cpu_e2e_rollout", "contract_vllm_ascend", "npu_e2e_rollout"}
    for name in WORKFLOWS:
        assert load(name)["name"] == name
        # YAML reads the key `on` as true.
        assert load(name)[True]


def test_a_workflow_builds_the_docs_if_make_can():
    has_target = "docs" in make_targets()
    assert ("docs" in WORKFLOWS) == has_target, (
        ".github/workflows/docs.yml needs the target `make docs`, and vice versa"
    )


def test_both_algorithms_run_with_and_without_a_quantized_rollout():
    ran = {words for name, words in COMMANDS if name == "cpu_e2e_rollout" and words[0].endswith(".sh")}
    pairs = {(words[0], words[1].partition("=")[2]) for words in ran}
    assert {quantization for _, quantization in pairs} == {"null", "ascend"}
    assert len({script for script, _ in pairs}) == 2 and len(pairs) == 4


def test_there_is_a_contract_job_for_each_release():
    assert load("contract_vllm_ascend")["jobs"]["release"]["strategy"]["matrix"]["release"] == list(RELEASES)


def test_npu_jobs_run_on_own_machines_and_not_for_pull_requests():
    workflow = load("npu_e2e_rollout")
    assert all("self-hosted" in job["runs-on"] for job in workflow["jobs"].values())
    assert "pull_request" not in workflow[True]
    assert any("npu" in words for name, words in COMMANDS if name == "npu_e2e_rollout")


def test_paths_of_triggers_exist():
    for name in WORKFLOWS:
        for event in load(name)[True].values():
            for pattern in (event or {}).get("paths", ()) if isinstance(event, dict) else ():
                assert (ROOT / pattern.removesuffix("/**")).exists(), pattern


def test_files_hashed_for_a_cache_key_exist():
    for path in WORKFLOWS.values():
        for files in re.findall(r"hashFiles\(([^)]*)\)", path.read_text()):
            assert all((ROOT / file).is_file() for file in re.findall(r"'([^']+)'", files))


def test_no_file_names_a_package_index():
    for path in [*WORKFLOWS.values(), ROOT / ".pre-commit-config.yaml"]:
        assert not re.search(r"https?://|--index|--extra-index|find-links", path.read_text())


def test_pre_commit_hooks_equal_make_lint_and_make_types():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    lint = "".join(makefile.partition(f"\n{target}:")[2].partition("\n\n")[0] for target in ("lint", "types"))
    for hook in hooks:
        program, *arguments = hook["entry"].split()
        assert os.access(ROOT / program, os.X_OK)
        name = " ".join([Path(program).name, *(word for word in arguments if not word.startswith("--"))])
        assert name in lint
    assert len(hooks) == lint.count("\n\t")


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml")), ids=lambda path: path.stem)
def test_issue_forms_ask_for_the_doctor(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    doctor = form["body"][ids.index("doctor")]
    assert "verl doctor" in doctor["attributes"]["label"]
    if path.stem == "bug_report":
        assert doctor["validations"]["required"] is True


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit(name):
    """A tag can be moved to other code; the comment names the release that the commit had."""
    used = [line for line in WORKFLOWS[name].read_text().splitlines() if "uses:" in line]
    assert all(re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line) for line in used), used


@pytest.mark.parametrize("name", WORKFLOWS)
def test_code_of_forks_never_runs_on_our_own_machines(name):
    workflow = load(name)
    triggers = set(workflow[True])  # YAML reads the key `on` as true
    if any("self-hosted" in job["runs-on"] for job in workflow["jobs"].values()):
        assert triggers <= {"push", "workflow_dispatch", "schedule"}
    # It runs with the secrets of the repository on code of a fork.
    assert "pull_request_target" not in triggers
