/* Differences between two arrays, byte for byte: the loops that verl/utils/tensor_diff.py calls through ctypes. */
#include "kernels.h"

/* Write the indices at which `now` differs from `kept` to `indices` [n], ascending, and copy those elements to `kept`.
 * Returns the number of indices. */
#define DIFF_AND_UPDATE(NAME, TO, FROM, DIFF)                                                                          \
    int64_t diff_and_update_##NAME(TO *restrict kept, const FROM *restrict now, int64_t n, int64_t *restrict indices,  \
                                   int threads) {                                                                      \
        int parts = parts_of(threads);                                                                                 \
        Share shares[MAX_THREADS];                                                                                     \
        _Pragma("omp parallel for num_threads(parts) schedule(static, 1) if (n > 32768 && parts > 1)")                 \
        for (int part = 0; part < parts; part++) {                                                                     \
            int64_t begin = n * part / parts, size = n * (part + 1) / parts - begin;                                   \
            shares[part] = (Share){begin, DIFF(kept + begin, now + begin, size, begin, indices + begin)};              \
        }                                                                                                              \
        return join_shares(indices, shares, parts);                                                                    \
    }
DIFF_AND_UPDATE(8, uint8_t, uint8_t, diff_range_8)
DIFF_AND_UPDATE(16, uint16_t, uint16_t, diff_range_16)
DIFF_AND_UPDATE(32, uint32_t, uint32_t, diff_range_32)
DIFF_AND_UPDATE(64, uint64_t, uint64_t, diff_range_64)

/* binary32 against bfloat16 values kept from it; a few kilobytes are rounded at a time. */
enum { ROUNDED = 2048 };
static int64_t diff_rounded(uint16_t *kept, const uint32_t *now, int64_t n, int64_t base, int64_t *out) {
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += ROUNDED) {
        uint16_t rounded[ROUNDED];
        int64_t size = n - first < ROUNDED ? n - first : ROUNDED;
        for (int64_t i = 0; i < size; i++) rounded[i] = round_bf16(now[first + i]);
        count += diff_range_16(kept + first, rounded, size, base + first, out + count);
    }
    return count;
}
DIFF_AND_UPDATE(f32_bf16, uint16_t, uint32_t, diff_rounded)
