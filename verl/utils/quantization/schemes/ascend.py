"""`rollout.quantization=ascend`: MXFP8 or MXFP4 in vllm-ascend on an Ascend 950, or in its emulation on a CPU."""

from __future__ import annotations

import functools
from typing import Any

from verl.utils.quantization.ascend_description import (
    AscendDescription,
    resolve_description,
    validate_name_prefixes,
    validate_tensor_parallel,
)
from verl.utils.quantization.ascend_layers import Layer
from verl.utils.quantization.ascend_releases import (
    NEWEST_READ,
    NEWEST_TESTED,
    check_vllm_ascend,
    pads_shares,
    reads_exact_names,
    untested_release,
    validate_mxfp4,
    validate_paired_groups,
)
from verl.utils.quantization.formats import ASCEND_METHOD, ASCEND_SCHEMES, MXFP4_ERROR, W4A8_MXFP
from verl.utils.quantization.schemes.base import FIELD, ScaledFormat


class AscendFormat(ScaledFormat):
    """For each layer that the description marks: 1 byte per weight (W4A8_MXFP: half), plus 1 scale byte per 32."""

    name = "ascend"
    devices = ("cpu", "npu")
    alternative = "fp8"
    takes_scheme = True
    supports_qat = True
    has_self_test = True

    @functools.cached_property
    def description(self) -> AscendDescription:
        """The quantized and unquantized weights of the checkpoint."""
        return resolve_description(
            self.model_dir,
            self.settings.quantization_config_file,
            self.settings.tensor_model_parallel_size,
            scheme=self.settings.quantization_scheme,
            expert_parallel=self.settings.expert_parallel_size > 1,
            padded_shares=True,  # depends on device and release: `_validate_engine`
            index=self._read_index(),
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.description.layers

    def validate_settings(self, device: str) -> None:
        super().validate_settings(device)
        scheme, file = self.settings.quantization_scheme, self.settings.quantization_config_file
        if scheme is not None and scheme not in ASCEND_SCHEMES:
            raise ValueError(f"{FIELD}_scheme={scheme}: must be null or one of {', '.join(ASCEND_SCHEMES)}")
        if scheme is not None and file is not None:
            raise ValueError(
                f"{FIELD}_scheme={scheme}: {FIELD}_config_file={file} describes the layers one by one; remove one of "
                f"the two (`verl describe --scheme {scheme}` writes such a file)"
            )
        if device == "npu":
            self._validate_bfloat16(device)

    def _validate_engine(self, device: str, installed: bool) -> None:
        tp_size, padded_shares = self.settings.tensor_model_parallel_size, False
        expert_parallel = self.settings.expert_parallel_size > 1
        if device == "npu":
            release = check_vllm_ascend() if installed else NEWEST_READ
            if untested_release(release) is not None and not self.runs_self_test(device):
                raise ValueError(
                    f"{FIELD}_self_test=False: vllm-ascend {release} is newer than the newest release tested with "
                    f"verl, {NEWEST_TESTED}, and is used only after a self-test; use null, or install {NEWEST_TESTED}"
                )
            validate_paired_groups(self.layers, tp_size, release, expert_parallel=expert_parallel)
            validate_mxfp4(self.layers, tp_size, release, expert_parallel=expert_parallel)
            if not reads_exact_names(release):
                validate_name_prefixes(self.description.to_json_dict(), release)
            padded_shares = pads_shares(release)
        validate_tensor_parallel(self.layers, tp_size, expert_parallel=expert_parallel, padded_shares=padded_shares)
        super()._validate_engine(device, installed)

    def _engine_arguments(self) -> dict[str, Any]:
        return {
            "quantization": ASCEND_METHOD,
            "hf_overrides": {"quantization_config": self.description.to_json_dict()},
        }

    def summary(self) -> str:
        return f"{self.description.weight_formats}: {self.description.summary()}"

    @property
    def weight_error(self) -> float:
        return MXFP4_ERROR if W4A8_MXFP in self.description.schemes else super().weight_error

    def engine_bytes(self, itemsize: int) -> int:
        return self.description.engine_bytes(itemsize)

    @classmethod
    def estimated_bytes(cls, parameters: int, itemsize: int, scheme: str | None = None) -> int:
        return parameters * (17 if scheme == W4A8_MXFP else 33) // 32

    @classmethod
    def host_bytes(cls, parameters: int, scheme: str | None) -> int:
        return parameters // 2 if scheme == W4A8_MXFP else 0

    def quantizes(self, name: str) -> bool:
        return self.description.is_quantized(name)
