/* MXFP8 (float8 e4m3 values, one E8M0 byte per 32 values) on a CPU: the loops that mxfp8.py calls through ctypes.
 *
 * Plain C without intrinsics or libraries, written so that a compiler turns the 32-wide loops into vector code on x86
 * and Arm alike. Quantizing is integer arithmetic on the bits of the input wherever a subnormal number could matter, so
 * that the result does not depend on the flush-to-zero mode of the calling thread. mxfp8.py states the arithmetic and its
 * sections of the OCP MX specification; tests compare every branch here with it bit for bit.
 */
#include "kernels.h"

enum { BLOCK = 32 };

/* binary16 to the bits of the binary32 of the same value. */
static inline uint32_t widen_f16(uint16_t h) {
    uint32_t a = (uint32_t)(h & 0x7fffu) << 13;
    uint32_t normal = a + (112u << 23);
    /* a subnormal is mantissa * 2^-24: add it to 2^-14, whose leading one is then subtracted again */
    uint32_t subnormal = as_bits(as_float(a + (113u << 23)) - as_float(113u << 23));
    uint32_t bits = a < (1u << 23) ? subnormal : normal;
    bits = a >= (0x7c00u << 13) ? (a | 0x7f800000u) : bits;
    return bits | ((uint32_t)(h & 0x8000u) << 16);
}
static inline uint32_t widen_bf16(uint16_t h) { return (uint32_t)h << 16; }
static inline uint32_t widen_f32(uint32_t w) { return w; }

/* Any block: short, tiny, or holding NaN or Inf. `u` holds binary32 bits; `up` is 0 (floor) or 1 (round up). */
static void quantize_any(const uint32_t *u, int n, uint8_t *q, uint8_t *scale, int up) {
    uint32_t top = 0;
    for (int i = 0; i < n; i++) { uint32_t a = u[i] & 0x7fffffffu; top = a > top ? a : top; }
    if (top >= 0x7f800000u) { *scale = 255; memset(q, 0x7f, (size_t)n); return; }
    int byte = (int)((top + (up ? 0x1fffffu : 0u)) >> 23) - 8;
    if (byte < 0) byte = 0;
    *scale = (uint8_t)byte;
    for (int i = 0; i < n; i++) {
        uint32_t a = u[i] & 0x7fffffffu, mantissa = a & 0x7fffffu, code = 0;
        int exponent = (int)(a >> 23);
        if (exponent) mantissa |= 0x800000u;
        else if (mantissa) for (exponent = 1; mantissa < 0x800000u; exponent--) mantissa <<= 1;
        int field = exponent - byte + 7; /* exponent field of the e4m3 number, if it is a normal one */
        int drop = field >= 1 ? 20 : 21 - field;
        if (mantissa && drop <= 25) {
            code = (mantissa + (1u << (drop - 1)) - 1u + ((mantissa >> drop) & 1u)) >> drop;
            if (field > 1) code += (uint32_t)(field - 1) << 3;
        }
        if (code > 0x7eu) code = 0x7eu;
        q[i] = (uint8_t)(code | ((u[i] >> 24) & 0x80u));
    }
}

/* Blocks are processed in runs: first the largest magnitude of every block, then the values, so that each loop keeps
 * its constants in registers and calls no function. quantize_any redoes a block that holds NaN or Inf or whose byte is
 * below TINY, because a subnormal input could then be more than half of the smallest e4m3 number. */
enum { RUN = 64, TINY = 12 };

static inline int run_bytes_32(const uint32_t *restrict x, int n, uint8_t *restrict scale, uint32_t carry) {
    uint32_t low = UINT32_MAX, high = 0;
    for (int j = 0; j < n; j++) {
        uint32_t top = 0;
        for (int i = 0; i < BLOCK; i++) { uint32_t a = x[j * BLOCK + i] & 0x7fffffffu; top = a > top ? a : top; }
        low = top < low ? top : low;
        high = top > high ? top : high;
        scale[j] = (uint8_t)(((top + carry) >> 23) - 8u);
    }
    return high >= 0x7f800000u || (low + carry) >> 23 < TINY + 8;
}
static inline int run_bytes_16(const uint16_t *restrict x, int n, uint8_t *restrict scale, uint32_t carry) {
    uint32_t low = UINT32_MAX, high = 0;
    for (int j = 0; j < n; j++) {
        uint16_t top = 0;
        for (int i = 0; i < BLOCK; i++) { uint16_t a = x[j * BLOCK + i] & 0x7fffu; top = a > top ? a : top; }
        low = top < low ? top : low;
        high = top > high ? top : high;
        scale[j] = (uint8_t)(((top + carry) >> 7) - 8u);
    }
    return high >= 0x7f80u || (low + carry) >> 7 < TINY + 8;
}

static inline void redo(const uint32_t *u, uint8_t *q, uint8_t *scale, int up) {
    uint32_t top = 0;
    for (int i = 0; i < BLOCK; i++) { uint32_t a = u[i] & 0x7fffffffu; top = a > top ? a : top; }
    if (top >= 0x7f800000u || (int)((top + (up ? 0x1fffffu : 0u)) >> 23) - 8 < TINY) quantize_any(u, BLOCK, q, scale, up);
}

static void run_f32(const uint32_t *restrict x, int n, uint8_t *restrict q, uint8_t *restrict scale, int up) {
    int special = run_bytes_32(x, n, scale, up ? 0x1fffffu : 0u);
    for (int j = 0; j < n; j++) {
        float reciprocal = as_float((254u - scale[j]) << 23);
        for (int i = j * BLOCK; i < j * BLOCK + BLOCK; i++) {
            float v = as_float(x[i] & 0x7fffffffu) * reciprocal;
            uint32_t w = as_bits(v);
            uint32_t normal = ((w + 0x7ffffu + ((w >> 20) & 1u)) >> 20) - (120u << 3);
            uint32_t subnormal = as_bits(v + 16384.0f) - 0x46800000u; /* the sum's last bit is 2^-9, ties to even */
            uint32_t code = w < (121u << 23) ? subnormal : normal;
            code = code > 0x7eu ? 0x7eu : code;
            q[i] = (uint8_t)(code | ((x[i] >> 24) & 0x80u));
        }
    }
    if (special) for (int j = 0; j < n; j++) redo(x + j * BLOCK, q + j * BLOCK, scale + j, up);
}

/* bfloat16 has few enough bits for 16-bit lanes, twice as many at a time. */
static void run_bf16(const uint16_t *restrict x, int n, uint8_t *restrict q, uint8_t *restrict scale, int up) {
    int special = run_bytes_16(x, n, scale, up ? 0x1fu : 0u);
    for (int j = 0; j < n; j++) {
        int16_t rebias = (int16_t)((7 - (int)scale[j]) * 128);
        for (int i = j * BLOCK; i < j * BLOCK + BLOCK; i++) {
            int16_t t = (int16_t)((int16_t)(x[i] & 0x7fffu) + rebias); /* e4m3's exponent field, then 7 mantissa bits */
            int16_t normal = (int16_t)((int16_t)(t + 7 + ((t >> 4) & 1)) >> 4);
            /* subnormal codes 1..8 begin where the value passes 0.5, 1.5, ... 7.5 times 2^-9; ties go to even codes */
            int16_t subnormal = (int16_t)((t > -384) + (t > -193) + (t > -96) + (t > -33) + (t > 16) + (t > 47)
                                          + (t > 80) + (t > 111));
            int16_t code = t < 128 ? subnormal : normal;
            code = code > 0x7e ? 0x7e : code;
            q[i] = (uint8_t)(code | ((x[i] >> 8) & 0x80));
        }
    }
    if (special) {
        for (int j = 0; j < n; j++) {
            uint32_t u[BLOCK];
            for (int i = 0; i < BLOCK; i++) u[i] = widen_bf16(x[j * BLOCK + i]);
            redo(u, q + j * BLOCK, scale + j, up);
        }
    }
}

static void run_f16(const uint16_t *restrict x, int n, uint8_t *restrict q, uint8_t *restrict scale, int up) {
    uint32_t u[RUN * BLOCK];
    for (int i = 0; i < n * BLOCK; i++) u[i] = widen_f16(x[i]);
    run_f32(u, n, q, scale, up);
}

/* Quantize a run of `n` elements, whose last block may be partial. */
#define QUANTIZE_RUN(NAME, T, WIDEN)                                                                                   \
    static void quantize_run_##NAME(const T *in, int64_t n, uint8_t *out, uint8_t *bytes, int up) {                    \
        int64_t whole = n / BLOCK, rest = n % BLOCK;                                                                   \
        run_##NAME(in, (int)whole, out, bytes, up);                                                                    \
        if (rest) {                                                                                                    \
            uint32_t u[BLOCK];                                                                                         \
            for (int64_t i = 0; i < rest; i++) u[i] = WIDEN(in[whole * BLOCK + i]);                                    \
            quantize_any(u, (int)rest, out + whole * BLOCK, bytes + whole, up);                                        \
        }                                                                                                              \
    }
QUANTIZE_RUN(f32, uint32_t, widen_f32)
QUANTIZE_RUN(bf16, uint16_t, widen_bf16)
QUANTIZE_RUN(f16, uint16_t, widen_f16)

/* Execute the arguments for each run `r` of a matrix of `rows` rows: `n` elements of `row`, from `first` on. */
#define FOR_RUNS(...)                                                                                                  \
    int64_t per_row = (k + BLOCK - 1) / BLOCK, runs = (per_row + RUN - 1) / RUN, total = rows * runs;                  \
    _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 16) if (total > 16 && threads > 1)")              \
    for (int64_t r = 0; r < total; r++) {                                                                              \
        int64_t row = r / runs, first = (r % runs) * RUN * BLOCK, left = k - first;                                   \
        int64_t n = left < RUN * BLOCK ? left : RUN * BLOCK;                                                           \
        __VA_ARGS__                                                                                                    \
    }

/* x[rows, k] with `stride` elements from row to row -> q[rows, k], scale[rows, ceil(k / 32)], both contiguous. */
#define QUANTIZE(NAME, T)                                                                                              \
    void mx_quantize_##NAME(const T *x, int64_t stride, uint8_t *q, uint8_t *scale, int64_t rows, int64_t k, int up,   \
                            int threads) {                                                                             \
        FOR_RUNS(quantize_run_##NAME(x + row * stride + first, n, q + row * k + first,                                 \
                                     scale + row * per_row + first / BLOCK, up);)                                      \
    }
QUANTIZE(f32, uint32_t)
QUANTIZE(bf16, uint16_t)
QUANTIZE(f16, uint16_t)

static inline uint32_t decode(uint8_t q, float scale) {
    uint32_t a = q & 0x7fu;
    float normal = as_float((a << 20) + (120u << 23)), subnormal = (float)(int32_t)a * 0x1p-9f;
    float v = (a < 8u ? subnormal : normal) * scale;
    uint32_t bits = a == 0x7fu ? 0x7fc00000u : as_bits(v);
    return bits | ((uint32_t)(q & 0x80u) << 24);
}
static inline uint32_t to_f32(uint32_t bits) { return bits; }

/* q[rows, k], scale[rows, ceil(k / 32)] -> y[rows, k], all contiguous. */
#define DEQUANTIZE(NAME, T)                                                                                            \
    void mx_dequantize_##NAME(const uint8_t *q, const uint8_t *scale, T *y, int64_t rows, int64_t k, int threads) {    \
        int64_t per_row = (k + BLOCK - 1) / BLOCK, runs = (per_row + RUN - 1) / RUN, total = rows * runs;              \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 16) if (total > 16 && threads > 1)")          \
        for (int64_t r = 0; r < total; r++) {                                                                          \
            int64_t row = r / runs, first = (r % runs) * RUN, last = first + RUN < per_row ? first + RUN : per_row;    \
            for (int64_t b = first; b < last; b++) {                                                                   \
                const uint8_t *restrict in = q + row * k + b * BLOCK;                                                  \
                T *restrict out = y + row * k + b * BLOCK;                                                             \
                uint32_t byte = scale[row * per_row + b];                                                              \
                float factor = as_float(byte == 255u ? 0x7fc00000u : byte ? byte << 23 : 0x00400000u);                 \
                if (k - b * BLOCK >= BLOCK)                                                                            \
                    for (int i = 0; i < BLOCK; i++) out[i] = to_##NAME(decode(in[i], factor));                         \
                else                                                                                                   \
                    for (int i = 0; i < k - b * BLOCK; i++) out[i] = to_##NAME(decode(in[i], factor));                 \
            }                                                                                                          \
        }                                                                                                              \
    }
DEQUANTIZE(f32, uint32_t)
DEQUANTIZE(bf16, uint16_t)

/* The scale of `byte`, squared. */
static inline double squared_unit(int byte) {
    uint64_t bits = (uint64_t)(2 * byte - 254 + 1023) << 52;
    double unit2;
    memcpy(&unit2, &bits, 8);
    return unit2;
}
/* The scale of `byte` in units of the largest scale of its run; NaN for byte 255. */
static inline float below_largest(int largest, int byte) {
    int below = largest - byte;
    return as_float(below < 0 ? 0x7fc00000u : below > 126 ? 0u : (uint32_t)(127 - below) << 23);
}

/* Distance of q and scale from x. For every run of RUN blocks three doubles: sum of squared errors, sum of squares of
 * x, and the largest over its blocks of (max |error| / max |x|) squared. Each block is measured in units of its own
 * scale, so that squares neither overflow nor vanish; NaN in x, q or scale results in NaN. */
static inline void block_error(const uint32_t *restrict u, const uint8_t *restrict q, uint32_t byte, double *sums) {
    float error2[BLOCK], norm2[BLOCK];
    uint32_t far = 0, top = 0;
    float reciprocal = as_float(byte == 255u ? 0x7fc00000u : byte == 254u ? 0x00400000u : (254u - byte) << 23);
    for (int i = 0; i < BLOCK; i++) {
        float v = as_float(u[i]) * reciprocal, d = v - as_float(decode(q[i], 1.0f));
        error2[i] = d * d;
        norm2[i] = v * v;
    }
    for (int i = 0; i < BLOCK; i++) { /* squares are ordered like their bits, with NaN above all */
        uint32_t e = as_bits(error2[i]) & 0x7fffffffu, n = as_bits(norm2[i]) & 0x7fffffffu;
        far = e > far ? e : far;
        top = n > top ? n : top;
    }
    /* pairwise and explicit: a compiler may not reorder a sum of floats by itself */
    for (int i = 0; i < 16; i++) { error2[i] += error2[i + 16]; norm2[i] += norm2[i + 16]; }
    for (int i = 0; i < 8; i++) { error2[i] += error2[i + 8]; norm2[i] += norm2[i + 8]; }
    for (int i = 0; i < 4; i++) { error2[i] += error2[i + 4]; norm2[i] += norm2[i + 4]; }
    for (int i = 1; i < 4; i++) { error2[0] += error2[i]; norm2[0] += norm2[i]; }
    double unit = squared_unit((int)byte);
    double ratio = top ? (double)as_float(far) / (double)as_float(top) : (double)as_float(far);
    sums[0] += unit * (double)error2[0];
    sums[1] += unit * (double)norm2[0];
    if (!(ratio <= sums[2])) sums[2] = ratio; /* a NaN stays: nothing compares below it */
}

#define ERROR(NAME, T, WIDEN)                                                                                          \
    void mx_error_##NAME(const T *x, int64_t stride, const uint8_t *q, const uint8_t *scale, double *result,           \
                         int64_t rows, int64_t k, int threads) {                                                       \
        int64_t per_row = (k + BLOCK - 1) / BLOCK, runs = (per_row + RUN - 1) / RUN, total = rows * runs;              \
        _Pragma("omp parallel for num_threads(threads) schedule(dynamic, 16) if (total > 16 && threads > 1)")          \
        for (int64_t r = 0; r < total; r++) {                                                                          \
            int64_t row = r / runs, first = (r % runs) * RUN, last = first + RUN < per_row ? first + RUN : per_row;    \
            double sums[3] = {0.0, 0.0, 0.0};                                                                          \
            for (int64_t b = first; b < last; b++) {                                                                   \
                const T *in = x + row * stride + b * BLOCK;                                                            \
                const uint8_t *codes = q + row * k + b * BLOCK;                                                        \
                uint32_t u[BLOCK] = {0};                                                                               \
                uint8_t padded[BLOCK] = {0};                                                                           \
                if (k - b * BLOCK >= BLOCK) for (int i = 0; i < BLOCK; i++) u[i] = WIDEN(in[i]);                       \
                else {                                                                                                 \
                    for (int i = 0; i < k - b * BLOCK; i++) u[i] = WIDEN(in[i]), padded[i] = codes[i];                 \
                    codes = padded;                                                                                    \
                }                                                                                                      \
                block_error(u, codes, scale[row * per_row + b], sums);                                                 \
            }                                                                                                          \
            memcpy(result + 3 * r, sums, sizeof sums);                                                                 \
        }                                                                                                              \
    }
ERROR(f32, uint32_t, widen_f32)
ERROR(bf16, uint16_t, widen_bf16)
ERROR(f16, uint16_t, widen_f16)

/* Only the sums of squared errors and of squares, over a run: both in units of the largest scale of the run, so that
 * lanes can be summed across blocks. Values that underflow there are too small to matter. */
static inline void add_squares(const uint32_t *restrict u, const uint8_t *restrict q, float unit, float factor,
                               float *restrict error2, float *restrict norm2) {
    for (int i = 0; i < BLOCK; i++) {
        float w = as_float(u[i]) * unit, d = w - as_float(decode(q[i], factor));
        error2[i] += d * d;
        norm2[i] += w * w;
    }
}

#define SQUARES_RUN(NAME, T, WIDEN)                                                                                    \
    static void squares_run_##NAME(const T *in, int64_t n, const uint8_t *q, const uint8_t *bytes, double *result) {   \
        int64_t blocks = (n + BLOCK - 1) / BLOCK;                                                                      \
        float error2[BLOCK] = {0}, norm2[BLOCK] = {0};                                                                 \
        double sums[2] = {0.0, 0.0};                                                                                   \
        int largest = 0;                                                                                               \
        for (int64_t b = 0; b < blocks; b++) largest = bytes[b] > largest && bytes[b] < 255 ? bytes[b] : largest;      \
        float unit = as_float(largest == 254 ? 0x00400000u : (uint32_t)(254 - largest) << 23);                         \
        for (int64_t b = 0; b < blocks; b++) {                                                                         \
            float factor = below_largest(largest, bytes[b]);                                                           \
            const uint8_t *codes = q + b * BLOCK;                                                                      \
            uint32_t u[BLOCK];                                                                                         \
            uint8_t padded[BLOCK] = {0};                                                                               \
            if (n - b * BLOCK >= BLOCK) for (int i = 0; i < BLOCK; i++) u[i] = WIDEN(in[b * BLOCK + i]);               \
            else {                                                                                                     \
                memset(u, 0, sizeof u);                                                                                \
                for (int i = 0; i < n - b * BLOCK; i++) u[i] = WIDEN(in[b * BLOCK + i]), padded[i] = codes[i];         \
                codes = padded;                                                                                        \
            }                                                                                                          \
            add_squares(u, codes, unit, factor, error2, norm2);                                                        \
        }                                                                                                              \
        for (int i = 0; i < BLOCK; i++) sums[0] += (double)error2[i], sums[1] += (double)norm2[i];                     \
        result[0] = squared_unit(largest) * sums[0];                                                                   \
        result[1] = squared_unit(largest) * sums[1];                                                                   \
    }
SQUARES_RUN(f32, uint32_t, widen_f32)
SQUARES_RUN(bf16, uint16_t, widen_bf16)
SQUARES_RUN(f16, uint16_t, widen_f16)

#define SQUARES(NAME, T)                                                                                               \
    void mx_squares_##NAME(const T *x, int64_t stride, const uint8_t *q, const uint8_t *scale, double *result,         \
                           int64_t rows, int64_t k, int threads) {                                                     \
        FOR_RUNS(squares_run_##NAME(x + row * stride + first, n, q + row * k + first,                                  \
                                    scale + row * per_row + first / BLOCK, result + 2 * r);)                           \
    }
SQUARES(f32, uint32_t)
SQUARES(bf16, uint16_t)
SQUARES(f16, uint16_t)

/* Quantize a block of x that is rounded already, and measure the error in units of the largest scale of the run. The
 * decoded values are a by-product of rounding, which is cheaper than decoding them. */
static inline void encode_block(const uint32_t *restrict u, uint8_t *restrict q, float reciprocal, float factor,
                                float *restrict error2, float *restrict norm2) {
    for (int i = 0; i < BLOCK; i++) {
        float v = as_float(u[i] & 0x7fffffffu) * reciprocal, shifted = v + 16384.0f;
        uint32_t w = as_bits(v), rounded = w + 0x7ffffu + ((w >> 20) & 1u);
        int tiny = w < (121u << 23);
        uint32_t code = tiny ? as_bits(shifted) - 0x46800000u : (rounded >> 20) - (120u << 3);
        float back = tiny ? shifted - 16384.0f : as_float(rounded & 0xfff00000u);
        code = code > 0x7eu ? 0x7eu : code;
        back = back > 448.0f ? 448.0f : back;
        q[i] = (uint8_t)(code | ((u[i] >> 24) & 0x80u));
        float s = v * factor, d = (v - back) * factor;
        error2[i] += d * d;
        norm2[i] += s * s;
    }
}

/* Round a run of binary32 to bfloat16, quantize it and measure the error, all in the cache: the same results as
 * mx_quantize_bf16 and mx_squares_bf16 on the rounded x. */
static void encode_run(const uint32_t *in, int64_t n, uint8_t *q, uint8_t *bytes, int up, double *result) {
    uint32_t u[RUN * BLOCK], low = UINT32_MAX, high = 0, carry = up ? 0x1fffffu : 0u;
    int64_t blocks = n / BLOCK;
    for (int64_t j = 0; j < blocks; j++) {
        uint32_t top = 0, unrounded = 0;
        for (int i = 0; i < BLOCK; i++) {
            uint32_t x = in[j * BLOCK + i], r = (x + 0x7fffu + ((x >> 16) & 1u)) & 0xffff0000u;
            uint32_t a = r & 0x7fffffffu, b = x & 0x7fffffffu;
            u[j * BLOCK + i] = r;
            top = a > top ? a : top;
            unrounded = b > unrounded ? b : unrounded;
        }
        low = top < low ? top : low;
        high = top > high ? top : high;
        high = unrounded > high ? unrounded : high; /* rounding may carry the bits of a NaN to zero */
        bytes[j] = (uint8_t)(((top + carry) >> 23) - 8u);
    }
    if (n % BLOCK || high >= 0x7f800000u || (low + carry) >> 23 < TINY + 8) {
        uint16_t h[RUN * BLOCK];
        for (int64_t i = 0; i < n; i++) h[i] = round_bf16(in[i]);
        quantize_run_bf16(h, n, q, bytes, up);
        squares_run_bf16(h, n, q, bytes, result);
        return;
    }
    float error2[BLOCK] = {0}, norm2[BLOCK] = {0};
    double sums[2] = {0.0, 0.0};
    int largest = 0;
    for (int64_t j = 0; j < blocks; j++) largest = bytes[j] > largest ? bytes[j] : largest;
    for (int64_t j = 0; j < blocks; j++)
        encode_block(u + j * BLOCK, q + j * BLOCK, as_float((254u - bytes[j]) << 23), below_largest(largest, bytes[j]),
                     error2, norm2);
    for (int i = 0; i < BLOCK; i++) sums[0] += (double)error2[i], sums[1] += (double)norm2[i];
    result[0] = squared_unit(largest) * sums[0];
    result[1] = squared_unit(largest) * sums[1];
}

void mx_encode_f32_bf16(const uint32_t *x, int64_t stride, uint8_t *q, uint8_t *scale, double *result, int64_t rows,
                        int64_t k, int up, int threads) {
    FOR_RUNS(encode_run(x + row * stride + first, n, q + row * k + first, scale + row * per_row + first / BLOCK, up,
                        result + 2 * r);)
}

/* Update q and scale to those of mx_encode_f32_bf16, and write the indices of the elements that change, ascending:
 * `q_indices` [rows * k] and `scale_indices` [rows * ceil(k / 32)], their numbers to `counts` [2]. */
void mx_encode_diff_f32_bf16(const uint32_t *x, int64_t stride, uint8_t *q, uint8_t *scale, double *result,
                             int64_t rows, int64_t k, int up, int threads, int64_t *q_indices, int64_t *scale_indices,
                             int64_t *counts) {
    int64_t per_row = (k + BLOCK - 1) / BLOCK, runs = (per_row + RUN - 1) / RUN, total = rows * runs;
    int parts = parts_of(threads);
    Share of_q[MAX_THREADS], of_scale[MAX_THREADS];
    _Pragma("omp parallel for num_threads(parts) schedule(static, 1) if (total > 16 && parts > 1)")
    for (int part = 0; part < parts; part++) {
        Share q_share = {-1, 0}, scale_share = {-1, 0};
        for (int64_t r = total * part / parts; r < total * (part + 1) / parts; r++) {
            int64_t row = r / runs, first = (r % runs) * RUN * BLOCK, left = k - first;
            int64_t n = left < RUN * BLOCK ? left : RUN * BLOCK, blocks = (n + BLOCK - 1) / BLOCK;
            int64_t q_at = row * k + first, scale_at = row * per_row + first / BLOCK;
            uint8_t codes[RUN * BLOCK], bytes[RUN];
            encode_run(x + row * stride + first, n, codes, bytes, up, result + 2 * r);
            if (q_share.begin < 0) q_share.begin = q_at, scale_share.begin = scale_at;
            q_share.count += diff_range_8(q + q_at, codes, n, q_at, q_indices + q_share.begin + q_share.count);
            scale_share.count += diff_range_8(scale + scale_at, bytes, blocks, scale_at,
                                              scale_indices + scale_share.begin + scale_share.count);
        }
        of_q[part] = q_share;
        of_scale[part] = scale_share;
    }
    counts[0] = join_shares(q_indices, of_q, parts);
    counts[1] = join_shares(scale_indices, of_scale, parts);
}
