"""The compatibility table of `verl doctor` compared with the requirements of the releases' wheels."""

import pytest
from contract.vllm_ascend.build_env import RELEASES, build
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from verl.cli.doctor_releases import stack_of

pytestmark = pytest.mark.contract


@pytest.mark.parametrize("release", RELEASES)
def test_table_equals_the_requirements_of_the_wheel(release):
    root, stack = build(release).root, stack_of(release)
    lines = next((root / "ascend-entry-points").glob("*/METADATA")).read_text().splitlines()
    needs = [Requirement(line.partition(": ")[2]) for line in lines if line.startswith("Requires-Dist: ")]
    by_name = {need.name.lower(): need.specifier for need in needs}
    assert by_name["torch"] == SpecifierSet(stack.torch)
    # The upper bound comes from vLLM.
    assert set(by_name["transformers"]) <= set(SpecifierSet(stack.transformers))
    # The table may name a later build of the same version.
    (pinned,) = by_name["torch-npu"]
    assert SpecifierSet(stack.torch_npu).contains(pinned.version)
    assert stack.too_old_for_verl == (stack.transformers.endswith("<5"))
