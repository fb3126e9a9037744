"""Fixtures of every test folder (`run_files`, `plan_of`, `problems_of`, `problem_of`), and the option `--end-at`."""

pytest_plugins = ["fixtures.run_files", "fixtures.time_limit"]
