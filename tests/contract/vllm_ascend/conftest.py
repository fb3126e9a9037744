"""Collects tests below `inside/` only in the environment of a release (`build_env.py`), and records features.

`make contract` writes the outcomes of the tests with `pytest.mark.feature` to build/contract (`features.py`). With
CONTRACT_RESULTS, a run inside a release does so too: it is a run of all tests there.
"""

import os

import pytest
from contract.vllm_ascend.features import Outcomes

INSIDE = os.environ.get("CONTRACT_RELEASE")
collect_ignore = [] if INSIDE else ["inside"]
OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_configure(config):
    config.stash[OUTCOMES] = Outcomes()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    marker = item.get_closest_marker("feature")
    if marker is not None and (report.when == "call" or not report.passed):
        release = INSIDE or item.callspec.params["release"]
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
        item.config.stash[OUTCOMES].add(release, marker.args[0], report.outcome, reason)
    return report


def pytest_sessionfinish(session):
    if not INSIDE or "CONTRACT_RESULTS" in os.environ:
        session.config.stash[OUTCOMES].write("inside" if INSIDE else "outside")
