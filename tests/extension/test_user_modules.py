"""Modules of the user's files: importable by name in every process, with their neighbors."""

import multiprocessing
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from verl.extension.user_files import import_file
from verl.extension.user_modules import imported_files


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["mine.py", "my-file.v2.py", "no_suffix", "é.py"])
def test_a_function_is_found_by_another_process(tmp_path, name):
    neighbor = f"neighbor_{name.encode().hex()}"  # a process has one module of a name
    write(tmp_path, f"{neighbor}.py", "def double(x): return 2 * x\n")
    path = write(tmp_path, name, f"from {neighbor} import double\ndef work(x): return double(x) + 1\n")
    module = import_file(path)
    assert import_file(path) is module and module.__file__ == str(path)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(module.work, [1, 2])) == [3, 5]


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C, which a background process does not have, because its shell ignores Ctrl-C."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("name", ["KeyboardInterrupt", "GeneratorExit", "BaseException"])
def test_an_exception_that_would_end_the_process_becomes_an_import_error(tmp_path, name):
    path = write(tmp_path, "mine.py", f"x = 1\nraise {name}\n")
    with pytest.raises(ImportError, match=rf"the module raised {name} in .*mine.py, line 2"):
        import_file(path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_during_an_import_remains_an_interrupt(tmp_path):
    path = write(tmp_path, "mine.py", "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    with pytest.raises(KeyboardInterrupt):
        import_file(path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_module_is_importable_by_its_name_alone(tmp_path):
    module = import_file(write(tmp_path, "mine.py", "def work(): return 7\n"))
    code = f"import pickle; print(pickle.loads({pickle.dumps(module.work)!r})())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


def test_a_file_that_raises_is_imported_again(tmp_path):
    path = write(tmp_path, "mine.py", "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        import_file(path)
    path.write_text("value = 12345\n")
    assert import_file(path).value == 12345


def test_neighbors_with_the_same_name_in_two_folders_are_an_error(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder, "twin_neighbor.py", f"name = {folder!r}\n")
        write(tmp_path / folder, "mine.py", "import twin_neighbor\nname = twin_neighbor.name\n")
    assert import_file(tmp_path / "a/mine.py").name == "a"
    with pytest.raises(ImportError, match=r"b/mine\.py imports twin_neighbor, but .* imported from .*a/twin_neighbor"):
        import_file(tmp_path / "b/mine.py")


def test_a_neighbor_never_hides_an_installed_package(tmp_path):
    write(tmp_path, "json.py", "raise RuntimeError\n")
    assert import_file(write(tmp_path, "mine.py", "import json\nname = json.__name__\n")).name == "json"


def test_the_files_that_a_file_imports_are_found_without_importing_them(tmp_path):
    files = {
        "mine.py": "import alone\ndef work():\n    from folder.deep import x\nimport json, missing\n",
        "alone.py": "raise RuntimeError\nimport second\n",
        "second.py": "import mine",
        "json.py": "",
        "unused.py": "",
    }
    for name, text in files.items():
        write(tmp_path, name, text)
    write(tmp_path / "folder", "deep.py", "import third")
    write(tmp_path / "folder", "__init__.py", "not Python")
    write(tmp_path, "third.py", "")
    found = [str(path.relative_to(tmp_path)) for path in imported_files(tmp_path / "mine.py")]
    assert found[0] == "mine.py"
    expected = ["alone.py", "folder/__init__.py", "folder/deep.py", "mine.py", "second.py", "third.py"]
    assert sorted(found) == expected, "json is installed"
