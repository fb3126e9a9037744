/* What differs between two arrays, byte for byte: the loops that changes.py calls through ctypes. */
#include "kernels.h"

/* Elements j of `now` that differ from `kept`, ascending, into `places` [n]; afterwards both are equal. How many. */
#define TAKE_CHANGES(NAME, TO, FROM, NOTE)                                                                             \
    int64_t diff_and_update_##NAME(TO *restrict kept, const FROM *restrict now, int64_t n, int64_t *restrict places,      \
                                int threads) {                                                                         \
        int parts = parts_of(threads);                                                                                 \
        Share shares[MOST_THREADS];                                                                                    \
        _Pragma("omp parallel for num_threads(parts) schedule(static, 1) if (n > 32768 && parts > 1)")                 \
        for (int part = 0; part < parts; part++) {                                                                     \
            int64_t begin = n * part / parts, size = n * (part + 1) / parts - begin;                                   \
            shares[part] = (Share){begin, NOTE(kept + begin, now + begin, size, begin, places + begin)};               \
        }                                                                                                              \
        return join_shares(places, shares, parts);                                                                     \
    }
TAKE_CHANGES(8, uint8_t, uint8_t, note_changes_8)
TAKE_CHANGES(16, uint16_t, uint16_t, note_changes_16)
TAKE_CHANGES(32, uint32_t, uint32_t, note_changes_32)
TAKE_CHANGES(64, uint64_t, uint64_t, note_changes_64)

/* binary32 against what was kept of it in bfloat16, a few kilobytes rounded at a time. */
enum { ROUNDED = 2048 };
static int64_t note_rounded(uint16_t *kept, const uint32_t *now, int64_t n, int64_t base, int64_t *out) {
    int64_t count = 0;
    for (int64_t first = 0; first < n; first += ROUNDED) {
        uint16_t rounded[ROUNDED];
        int64_t size = n - first < ROUNDED ? n - first : ROUNDED;
        for (int64_t i = 0; i < size; i++) rounded[i] = round_bf16(now[first + i]);
        count += note_changes_16(kept + first, rounded, size, base + first, out + count);
    }
    return count;
}
TAKE_CHANGES(f32_bf16, uint16_t, uint32_t, note_rounded)
