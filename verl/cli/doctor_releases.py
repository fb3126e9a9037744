"""Compatibility table of `verl doctor`: the versions of vLLM, torch, torch-npu and CANN for releases of vllm-ascend.

verl's own requirements are read from the metadata of its package (`pyproject.toml`).

Sources: the release compatibility matrix and the installation pages of vllm-ascend's documentation
(docs.vllm.ai/projects/ascend, `community/versioning_policy` of 0.23.0 and 0.30.0rc2, and `installation` of 0.18.0,
0.26.0rc1 and 0.28.0rc1), and for transformers the metadata of the releases' archives. Matrix and
installation page of 0.18.0 differ; the table accepts both.
"""

from __future__ import annotations

from dataclasses import dataclass

MATRIX = "docs.vllm.ai/projects/ascend, Versioning Policy"


@dataclass(frozen=True)
class Stack:
    """A release of vllm-ascend and the versions that it needs.

    Attributes:
        vllm, torch, torch_npu, python: version specifiers, as pip reads them.
        cann: versions of the CANN toolkit.
        transformers: the specifier in the release's metadata. verl needs a newer version, with which verl's tests run
            the release's code.
        too_old_for_verl: the release's code does not run with the version of transformers that verl needs.
    """

    vllm_ascend: str
    vllm: str
    torch: str
    torch_npu: str
    cann: tuple[str, ...]
    python: str
    transformers: str
    too_old_for_verl: bool = False


# The releases that `make contract` runs.
STACKS = (
    Stack(
        "0.18.0",
        vllm="==0.18.0",
        torch="==2.9.0",
        torch_npu="==2.9.0.*",
        cann=("8.5.1", "9.0.0"),
        python=">=3.10,<3.12",
        transformers=">=4.57.4,<5",
        too_old_for_verl=True,
    ),
    Stack(
        "0.23.0",
        vllm="==0.23.0",
        torch="==2.10.0",
        torch_npu="==2.10.0.post4",
        cann=("9.1.0",),
        python=">=3.10,<3.13",
        transformers="==5.5.4",
    ),
    Stack(
        "0.26.0rc1",
        vllm="==0.26.0",
        torch="==2.10.0",
        torch_npu="==2.10.0.post4",
        cann=("9.1.0",),
        python=">=3.10,<3.13",
        transformers="==5.14.1",
    ),
    Stack(
        "0.28.0rc1",
        vllm="==0.28.0",
        torch="==2.10.0",
        torch_npu="==2.10.0.post4",
        cann=("9.1.0",),
        python=">=3.10,<3.13",
        transformers="==5.14.1",
    ),
    Stack(
        "0.30.0rc2",
        vllm="==0.30.0",
        torch="==2.10.0",
        torch_npu="==2.10.0.post4",
        cann=("9.2.0",),
        python=">=3.10,<3.13",
        transformers="==5.14.1",
    ),
)


def stack_of(vllm_ascend: str) -> Stack | None:
    """Return the row of a release; None if the table has no such row."""
    return next((stack for stack in STACKS if stack.vllm_ascend == vllm_ascend), None)
