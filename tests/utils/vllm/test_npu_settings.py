"""The settings that an engine on an NPU needs."""

import subprocess
import sys

import pytest

from verl.utils.vllm.npu_settings import (
    check_npu_environment,
    npu_environment,
    npu_environment_problems,
)


def test_settings_need_no_torch_and_no_vllm():
    code = "import sys; import verl.utils.vllm.npu_settings; print({'torch', 'vllm', 'ray'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_all_problems_of_an_environment_are_reported():
    environment = {"VLLM_ASCEND_ENABLE_NZ": "1", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    assert [text.partition("=")[0] for text in npu_environment_problems(environment, sleep_mode=True)] == [*environment]
    assert npu_environment_problems(npu_environment({}), sleep_mode=True) == []


@pytest.mark.parametrize("value", ["1", "2", None])
def test_nz_must_be_off(value):
    environment = {} if value is None else {"VLLM_ASCEND_ENABLE_NZ": value}
    with pytest.raises(ValueError, match="set VLLM_ASCEND_ENABLE_NZ=0"):
        check_npu_environment(environment, sleep_mode=False)


@pytest.mark.parametrize("value", ["expandable_segments:True", "page_size:1g, expandable_segments:true"])
def test_expandable_segments_and_sleep_exclude_each_other(value):
    environment = {"VLLM_ASCEND_ENABLE_NZ": "0", "PYTORCH_NPU_ALLOC_CONF": value}
    with pytest.raises(ValueError, match=r"PYTORCH_NPU_ALLOC_CONF=.*expandable_segments.*free_cache_engine"):
        check_npu_environment(environment, sleep_mode=True)
    check_npu_environment(environment, sleep_mode=False)
    check_npu_environment(environment | {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}, sleep_mode=True)


def test_nz_must_also_be_off_in_the_engine_arguments():
    def check(config):
        check_npu_environment({"VLLM_ASCEND_ENABLE_NZ": "0"}, sleep_mode=True, engine_kwargs=config)

    for fits in (None, {}, {"additional_config": None}, {"additional_config": {"weight_nz_mode": 0, "x": 1}}):
        check(fits)
    with pytest.raises(ValueError, match=r"additional_config\.weight_nz_mode=2: .*use 0"):
        check({"additional_config": {"weight_nz_mode": 2}})


def test_npu_environment_of_a_replica():
    ports = {"HCCL_HOST_SOCKET_PORT_RANGE": "auto", "HCCL_NPU_SOCKET_PORT_RANGE": "auto"}
    assert npu_environment({}) == {"VLLM_ASCEND_ENABLE_NZ": "0", **ports}
    own = {"VLLM_ASCEND_ENABLE_NZ": "1", **dict.fromkeys(ports, "61000-61050")}
    assert npu_environment(own) == own
    assert npu_environment({"VLLM_ASCEND_TASK_QUEUE_ENABLE": "2"})["TASK_QUEUE_ENABLE"] == "2"
