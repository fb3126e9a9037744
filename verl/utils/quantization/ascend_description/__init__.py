"""The per-layer description that vllm-ascend needs before an engine starts in MXFP8 or MXFP4.

For each linear layer that vllm-ascend builds, it looks up `<checkpoint module>.weight` and expects `W8A8_MXFP8`,
`W4A8_MXFP` or `FLOAT`; a layer without an entry is a KeyError inside the engine. A checkpoint that ModelSlim quantized
has these entries in `quant_model_description.json`. For a BF16 checkpoint this package derives them from config.json
and from the names, shapes and dtypes of the tensors. It rejects by name everything that the engine would only fail on
later.

    verl describe MODEL_DIR --tp 2 --ignore 're:.*\\.o_proj' -o description.json
"""

from verl.utils.quantization.ascend_description.build import build_description
from verl.utils.quantization.ascend_description.description import DESCRIPTION_FILE, AscendDescription
from verl.utils.quantization.ascend_description.load import load_description, resolve_description
from verl.utils.quantization.ascend_description.validation import validate_name_prefixes, validate_tensor_parallel

__all__ = [
    "DESCRIPTION_FILE",
    "AscendDescription",
    "build_description",
    "load_description",
    "resolve_description",
    "validate_name_prefixes",
    "validate_tensor_parallel",
]
