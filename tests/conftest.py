"""Fixtures of every test folder: `run_files`, `plan_of`, `problems_of` and `problem_of`."""

pytest_plugins = ["fixtures.run_files"]
