"""Tests below `inside/` run in a release's environment only (`build_env.py`); elsewhere they are not collected."""

import os

collect_ignore = [] if "CONTRACT_RELEASE" in os.environ else ["inside"]
