import subprocess
from pathlib import Path

import pytest

from verl.cli.capture import CaptureError, capture, training_command
from verl.config.entry_points import ENTRY_POINTS, MAIN_PPO

TRAIN = "python3 -m verl.trainer.main_ppo"


@pytest.fixture
def capture_text(tmp_path):
    """Return a function that captures a script with this text, and checks that the directory does not change."""

    def run(text, *arguments, **options):
        script = tmp_path / "script.sh"
        script.write_text(text)
        before = sorted(tmp_path.rglob("*"))
        try:
            return capture(script, arguments, **options)
        finally:
            assert sorted(tmp_path.rglob("*")) == before

    return run


def words(captured):
    return [list(command.words) for command in captured.trainings]


def test_words_are_expanded_by_the_shell(capture_text):
    variables = 'set -euo pipefail\nname="a b"\nall=(x=1 "y=\'2 > 3\'")\n'
    text = f'{variables}{TRAIN} k="$name" "${{all[@]}}" l=[1,2] \\\n  m=$((2 * 3)) "$@"\n'
    assert words(capture_text(text, "n=1", "o=p q")) == [
        ["k=a b", "x=1", "y='2 > 3'", "l=[1,2]", "m=6", "n=1", "o=p q"]
    ]


@pytest.mark.parametrize(
    "line",
    [
        f"{TRAIN} k=1 > log.txt 2>&1",
        f"{TRAIN} k=1 2>&1 | tee log.txt",
        f"nohup {TRAIN} k=1 &> log.txt &\nwait",
        f"exec {TRAIN} k=1 >> log.txt",
        "/usr/bin/python3 -u -m verl.trainer.main_ppo k=1",
        'PYTHON=/usr/bin/python3\n"$PYTHON" -m verl.trainer.main_ppo k=1 > "log file.txt"',
        'run=(/usr/bin/env A=1 python3 -m verl.trainer.main_ppo)\n"${run[@]}" k=1',
        f"A=1 CUDA_VISIBLE_DEVICES=0,1 {TRAIN} k=1",
        f'f() {{ {TRAIN} "$@"; }}\nf k=1',
        "verl train k=1",
        f"if command -v python3 > /dev/null; then {TRAIN} k=1; fi",
        "$(which python3) -m verl.trainer.main_ppo k=1",
        f"exec > >(tee log.txt) 2>&1\n{TRAIN} k=1",
        f"python3 prepare.py --out data || exit 1\n{TRAIN} k=1",
        f"while ! ray status; do sleep 5; done\n{TRAIN} k=1",
        f"source /nowhere/set_env.sh\n. /nowhere/else.sh\n{TRAIN} k=1",
    ],
)
@pytest.mark.parametrize("strict", ["", "set -euo pipefail\n"])
def test_every_way_to_start_a_training_is_captured(capture_text, strict, line):
    assert words(capture_text(strict + line + "\n")) == [["k=1"]]


def test_no_program_is_run(capture_text, tmp_path):
    touched = [f"rm -f {tmp_path}/script.sh", f"/bin/rm {tmp_path}/script.sh", f"touch {tmp_path}/new"]
    text = "\n".join(
        [
            *touched,
            f"export PATH=/bin:/usr/bin\ntouch {tmp_path}/new",
            f"PATH=/bin touch {tmp_path}/new",
            f"x=$(/bin/touch {tmp_path}/new)",
            f"env PATH=/bin /usr/bin/touch {tmp_path}/new",
            f"command /bin/touch {tmp_path}/new",
            f"(/bin/touch {tmp_path}/new)",
            f"for tool in /bin/touch; do $tool {tmp_path}/new; done",
            f"echo text > {tmp_path}/new",
            f"cat <<< text >> {tmp_path}/new",
            f"trap '/bin/touch {tmp_path}/new' EXIT",
            f"shopt -u extdebug; trap - DEBUG\n/bin/touch {tmp_path}/new",
            f"bash -c 'touch {tmp_path}/new'",
            f"{TRAIN} k=1",
        ]
    )
    captured = capture_text(text)
    assert words(captured) == [["k=1"]]
    names = [command.words[0] for command in captured.others]
    assert names[:4] == ["rm", "/bin/rm", "touch", "touch"] and names.count("/bin/touch") >= 5


def test_kill_ends_no_process(capture_text):
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            capture_text(f"kill -9 {process.pid}\n{TRAIN} k=1\n")
            assert process.poll() is None
        finally:
            process.kill()


def test_an_existing_file_keeps_its_content(capture_text, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for line in (f"echo x > {kept}", f"echo x >> {kept}", f"{{ echo x; }} > {kept} || true", f"{TRAIN} k=0 >| {kept}"):
        assert words(capture_text(f"{line}\n{TRAIN} k=1\n"))[-1] == ["k=1"]
        assert kept.read_text() == "as it was"


def test_a_called_script_runs_in_its_own_directory(capture_text, tmp_path):
    other = tmp_path / "inner" / "other.sh"
    other.parent.mkdir()
    other.write_text(f'#!/usr/bin/env bash\ncd "$(dirname "$0")"\n/bin/touch {tmp_path}/new\n{TRAIN} inner=1 "$@"\n')
    other.chmod(0o755)
    for line in (f"exec {other} k=1", f"{other} k=1", f"bash {other} k=1"):
        (command,) = capture_text(f"set -euo pipefail\n{line}\n").trainings
        assert list(command.words) == ["inner=1", "k=1"] and command.folder == other.parent.resolve()


def test_environment_variables_of_a_command_are_recorded(capture_text, monkeypatch):
    monkeypatch.delenv("VLLM_ASCEND_ENABLE_NZ", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (command,) = capture_text(f"export PYTORCH_NPU_ALLOC_CONF='a b'\n{TRAIN} k=1\n").trainings
    assert dict(command.environment) == {"PYTORCH_NPU_ALLOC_CONF": "a b", "RAY_ADDRESS": "auto"}


@pytest.mark.parametrize("npu", [False, True])
def test_a_script_that_tests_for_an_npu_gets_the_given_answer(capture_text, npu):
    # The test is the one in scripts of upstream verl.
    ask = "set -xeuo pipefail\nDEVICE=${DEVICE:-$(python3 -c 'import torch_npu' 2>/dev/null && echo npu || echo gpu)}\n"
    captured = capture_text(f"{ask}{TRAIN} k=$DEVICE 2>&1 | tee log\n", npu=npu)
    assert words(captured) == [["k=npu" if npu else "k=gpu"]]


def test_all_training_commands_of_a_script_are_captured(capture_text):
    assert words(capture_text(f"for i in 1 2; do {TRAIN} k=$i; done\n")) == [["k=1"], ["k=2"]]


@pytest.mark.parametrize("trace", ["", "set -x\n"])
def test_an_error_without_training_command_gives_status_and_last_output(capture_text, trace):
    with pytest.raises(CaptureError, match=r"ended with status 3 .* no data here.*not run \(prepare\)"):
        capture_text(f"{trace}prepare --all\necho no data here >&2\nexit 3\n")


def test_a_script_is_ended_at_the_time_limit(capture_text):
    with pytest.raises(CaptureError, match=r"still running after 0\.5 s"):
        capture_text("while :; do :; done\n", seconds=0.5)
    assert words(capture_text(f"{TRAIN} k=1\nwhile :; do :; done\n", seconds=0.5)) == [["k=1"]]


def test_training_command_ignores_other_commands():
    assert training_command(["python3", "-m", "verl.trainer.main_eval", "a=1"]) is None
    assert training_command(["git", "train", "x"]) is None
    assert training_command([str(Path("bin") / "verl"), "train", "x=1"]) == (MAIN_PPO, ["x=1"])
    assert training_command(["-m", "verl.trainer.main_ppo"]) == (MAIN_PPO, [])


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_every_entry_point_is_captured_with_its_module(capture_text, module):
    (command,) = capture_text(f"python3 -m {module} k=1 2>&1 | tee log.txt\n").trainings
    assert command.entry.module == module and command.words == ("k=1",)


def test_reports_of_processes_that_write_at_the_same_time_are_kept_apart(capture_text):
    """A report is longer than the 4096 bytes that a pipe keeps together, and `tee` reports at the same time."""
    arguments = " ".join(f"key_{i}={'x' * 90}" for i in range(60))
    line = f"{TRAIN} {arguments} long={'y' * 9000} | tee log.txt {'z' * 5000}"
    captured = capture_text("\n".join([line] * 8), seconds=60)
    assert len(captured.trainings) == 8
    for command in captured.trainings:
        assert command.words[:60] == tuple(f"key_{i}={'x' * 90}" for i in range(60))
        assert command.words[60] == "long=" + "y" * 9000
    assert [command.words[:2] for command in captured.others] == [("tee", "log.txt")] * 8


def test_words_of_several_lines_and_other_alphabets_are_kept(capture_text):
    long = "äß漢" * 1500
    (command,) = capture_text(f"{TRAIN} a='1\n2' b={long} c=\n").trainings
    assert command.words == ("a=1\n2", f"b={long}", "c=")


def test_limits_of_this_machine_do_not_end_a_script(capture_text):
    assert words(capture_text(f"set -e\nulimit -n 99999999\n{TRAIN} k=1\n")) == [["k=1"]]


@pytest.mark.parametrize(("npu", "device"), [(True, "npu"), (False, "cuda")])
def test_a_program_that_prints_the_device_is_answered(capture_text, npu, device):
    text = (
        "device=$(python3 - <<'EOF'\nfrom verl.utils.device import get_device_name\nprint(get_device_name())\nEOF\n)\n"
        f"{TRAIN} trainer.device=$device\n"
    )
    assert words(capture_text(text, npu=npu)) == [[f"trainer.device={device}"]]


@pytest.mark.parametrize(
    ("command", "use"),
    [
        ("torchrun --nproc_per_node=2 -m verl.trainer.sft_trainer a=1", "supervised fine-tuning is not supported"),
        ("python3 -m verl.trainer.main_generation_server a=1", "trainer.val_only=True"),
        ("python3 -m verl.trainer.other a=1", f"use one of {MAIN_PPO.module}"),
    ],
)
def test_another_program_of_upstream_is_named(capture_text, command, use):
    module = command.split("-m ")[1].split()[0]
    with pytest.raises(
        CaptureError, match=f"starts python3 -m {module}, which is not a part of this package"
    ) as caught:
        capture_text(f"python3 prepare.py\n{command}\n")
    assert use in str(caught.value)


@pytest.mark.parametrize("text", ["set -u\necho $MODEL_DIR\n", "echo ${MODEL_DIR:?give a directory}\n"])
def test_a_variable_that_the_user_must_set_is_named(capture_text, text):
    with pytest.raises(CaptureError, match="needs the environment variable MODEL_DIR"):
        capture_text(f"{text}{TRAIN} k=1\n")
