"""A short part of the fault campaign; `make campaign` is the whole one."""

import pytest

from campaign.faults import results
from campaign.faults.schedule import run_number

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(2))
def test_a_run_with_faults_is_at_its_end_as_if_undisturbed(number, tmp_path):
    record = run_number(number, seed=2026, folder=tmp_path, lives=2, faults=4)
    assert not results.violated([record]), results.summary([record])
    assert results.count([record]) >= 8
