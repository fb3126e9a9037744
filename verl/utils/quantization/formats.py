"""Constants of the number formats that an engine can hold weights in. Imports nothing."""

# MXFP8 and MXFP4 (OCP MX 1.0, section 5.2): elements along the last dimension that share one E8M0 scale byte.
MX_BLOCK_SIZE = 32
# Float8 e4m3 in square blocks: rows and columns that share one float32 scale.
FP8_BLOCK_SIZE = 128

# Relative root mean square errors of rounding weights with a bell-shaped distribution. e4m3 has 3 bits of mantissa:
# 2^-4 / sqrt(3) times the mean of a mantissa relative to its upper bound, about 3/4. e2m1 with a scale for 32 values:
# measured with random normal values.
E4M3_ERROR, MXFP4_ERROR = 0.027, 0.115

# Vocabulary of vllm-ascend: its quantization method, and the values of an entry in a per-layer description: weights in
# MXFP8, weights in MXFP4 (activations in MXFP8 for both), unquantized.
ASCEND_METHOD = "ascend"
W8A8_MXFP8, W4A8_MXFP, FLOAT = "W8A8_MXFP8", "W4A8_MXFP", "FLOAT"
ASCEND_SCHEMES = (W8A8_MXFP8, W4A8_MXFP)
# The number format of a scheme's weights.
WEIGHT_FORMATS = {W8A8_MXFP8: "MXFP8", W4A8_MXFP: "MXFP4"}
# The entries of a per-layer description that are not about a layer.
MXFP8_DESCRIPTION = {"quant_method": ASCEND_METHOD, "model_quant_type": W8A8_MXFP8, "group_size": MX_BLOCK_SIZE}
