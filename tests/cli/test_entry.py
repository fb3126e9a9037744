import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from verl.cli import main
from verl.cli.entry import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_installs_the_script_verl():
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"verl": "verl.cli:main"}


def test_subcommands_exist():
    assert set(SUBCOMMANDS) >= {"train", "check", "doctor", "report", "describe"}


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "train"])
def test_the_help_of_each_subcommand_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "example" in shown and f"verl {name}" in shown


def test_the_help_lists_all_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown and command.example in shown for name, command in SUBCOMMANDS.items())


def test_help_imports_no_large_packages():
    code = "import sys; from verl.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.split())
    assert done.returncode == 0 and not loaded & {"torch", "ray", "vllm", "transformers", "hydra", "pyarrow", "numpy"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["data.nothing=1"]])
def test_train_equals_the_command_line_of_main_ppo(arguments):
    """Output and exit status are the same."""
    ours = [sys.executable, "-m", "verl.cli", "train", *arguments]
    theirs = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    done = [subprocess.run(command, capture_output=True, text=True, timeout=120) for command in (ours, theirs)]
    assert done[0].returncode == done[1].returncode
    assert (done[0].stdout, done[0].stderr) == (done[1].stdout, done[1].stderr)
    assert done[0].stdout or done[0].stderr


def complete(line):
    """Return the words that bash offers behind `line`, with the completion script of `verl completion`."""
    words = line.split(" ")
    script = subprocess.run([sys.executable, "-m", "verl.cli", "completion", "bash"], capture_output=True, text=True)
    listed = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; _shtab_verl verl "${{COMP_WORDS[COMP_CWORD]}}" x\n'
    text = f"{script.stdout}\n{ask}printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True, timeout=30)
    return done.stdout.split()


@pytest.mark.slow
def test_completion_in_bash():
    assert complete("verl de") == ["describe"]
    assert "--without-files" in complete("verl check --")
    assert "npu:ascend950dt" in complete("verl check --device npu")


def test_completion_for_zsh(capsys):
    assert main(["completion", "zsh"]) == 0
    assert "#compdef verl" in capsys.readouterr().out


def test_ctrl_c_ends_a_subcommand_with_one_line(monkeypatch, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("verl.cli.report.run", interrupt)
    assert main(["report", "run"]) == 130
    assert capsys.readouterr().err == "verl: stopped by Ctrl-C\n"
