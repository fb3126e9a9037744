"""Tests below `inside/` run only in the environment of a release (`build_env.py`) and are not collected elsewhere."""

import os

collect_ignore = [] if "CONTRACT_RELEASE" in os.environ else ["inside"]
