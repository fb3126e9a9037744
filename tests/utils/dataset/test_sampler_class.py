"""The class that `data.sampler` names, without an import."""

from types import SimpleNamespace

import pytest

from verl.utils.dataset.sampler_class import sampler_problem, sampler_spec


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("a.py", "a.py:S"),
        ("/x/y/a.py", "/x/y/a.py:S"),
        ("file://x/a.py", "x/a.py:S"),
        ("pkg://x.a", "x.a.S"),
        ("pkg://x/a", "x.a.S"),
        ("x.a", "x.a.S"),
    ],
)
def test_the_forms_of_upstream_verl_are_read(path, spec):
    assert sampler_spec(path, "S") == spec


def test_a_file_is_checked_without_an_import(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise RuntimeError('imported')\nclass Mine: pass\n")
    assert sampler_problem(SimpleNamespace(class_path=str(path), class_name="Mine")) is None
    problem = sampler_problem(SimpleNamespace(class_path=str(path), class_name="Other"))
    assert problem.startswith(f"data.sampler.class_path={path}: ") and "has no class Other; it has Mine" in problem
    assert sampler_problem(SimpleNamespace(class_path=None, class_name="Other")) is None
