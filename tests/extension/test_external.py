import sys

import pytest

from verl.extension.external import (
    ExternalLibError,
    absolute,
    environment_of,
    import_external,
    import_from_environment,
)
from verl.extension.user_class import load_class


def test_a_file_and_a_module_are_imported_once(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import counted_by_external\ncounted_by_external.times += 1\n")
    (tmp_path / "counted_by_external.py").write_text("times = 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        import_external(["counted_by_external", str(tmp_path / "mine.py")])
    import counted_by_external

    assert counted_by_external.times == 1


def test_two_files_with_the_same_name_are_two_modules(tmp_path, monkeypatch):
    (tmp_path / "seen_by_external.py").write_text("names = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"import seen_by_external\nseen_by_external.names += ['{folder}']\n")
    import_external([str(tmp_path / "a" / "mine.py"), str(tmp_path / "b" / "mine.py")])
    import seen_by_external

    assert seen_by_external.names == ["a", "b"]


def test_only_file_names_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute(["package.module", "mine.py", "below/mine"]) == [
        "package.module",
        str(tmp_path / "mine.py"),
        str(tmp_path / "below" / "mine"),
    ]


@pytest.mark.parametrize(
    ("lib", "words"),
    [
        ("nowhere.py", "external_lib=.*nowhere.py: no such file"),
        ("folder.py", "external_lib=.*folder.py: is a directory"),
        ("x" * 300 + ".py", "external_lib=.*xxx.py: no such file"),
        ("no_such_module_anywhere", "external_lib=no_such_module_anywhere does not import: ModuleNotFoundError"),
        ("broken.py", "external_lib=.*broken.py does not import: ZeroDivisionError"),
    ],
)
def test_a_failed_import_names_the_module(tmp_path, monkeypatch, lib, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "folder.py").mkdir()
    for _ in range(2):  # a module that failed half way is not taken for imported
        with pytest.raises(ExternalLibError, match=words):
            import_external([lib])


def test_a_library_file_with_a_class_is_imported_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text("class Mine: pass\nregistered = Mine\n")
    import_external(["both.py"])
    found = load_class("both.py:Mine", tmp_path, object)
    assert sys.modules[found.__module__].registered is found


def test_modules_are_imported_from_the_environment_by_the_plugin_of_vllm(tmp_path, monkeypatch):
    """vLLM calls the plugin in every process of an engine."""
    from verl.utils.vllm import plugin

    (tmp_path / "seen_by_engine.py").write_text("names = []\n")
    monkeypatch.syspath_prepend(tmp_path)
    libs = []
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(f"import seen_by_engine\nseen_by_engine.names += ['{name}']\n")
        libs.append(str(tmp_path / f"{name}.py"))
    for name, value in environment_of(libs).items():
        monkeypatch.setenv(name, value)
    plugin.register()
    import seen_by_engine

    assert seen_by_engine.names == ["first", "second"]
    monkeypatch.setenv("VERL_EXTERNAL_LIB", "no_such_module_anywhere")
    with pytest.raises(ExternalLibError, match="no_such_module_anywhere"):
        import_from_environment()


@pytest.mark.parametrize("ending", ["exit(3)", "raise KeyboardInterrupt", "raise GeneratorExit"])
def test_a_module_that_ends_the_process_is_an_error(tmp_path, monkeypatch, ending):
    name = f"ending_{ending.encode().hex()}"
    (tmp_path / f"{name}.py").write_text(f"{ending}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for lib in (name, str(tmp_path / f"{name}.py")):
        with pytest.raises(ExternalLibError, match=r"external_lib=.* does not import: .*; correct the module"):
            import_external([lib])
