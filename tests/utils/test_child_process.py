"""Commands and endings of child processes."""

import subprocess
import sys

from verl.utils.child_process import ending, interpreter_command


def test_a_new_interpreter_has_the_same_path_and_gets_the_numbers(tmp_path, monkeypatch):
    (tmp_path / "own_child.py").write_text("import sys\ndef main(a, b):\n    sys.exit(a + b)\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert subprocess.run(interpreter_command("own_child", 2, 3), check=False).returncode == 5


def test_an_ending_is_a_signal_or_an_exit_code():
    assert (ending(-9), ending(3)) == ("signal SIGKILL", "exit code 3")
