/* Shared by mx_kernels.c and tensor_diff.c: bits of floats, and the indices at which two arrays differ. */
#ifndef VERL_KERNELS_H
#define VERL_KERNELS_H
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "not supported on a big-endian processor: the lowest bits of a word must be its first element"
#endif

static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline uint16_t to_bf16(uint32_t bits) { /* to nearest even; 0x7fc0 is the only NaN that surely stays one */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
/* binary32 to bfloat16, to nearest even; a NaN stays a NaN. */
static inline uint16_t round_bf16(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : to_bf16(u); }

/* Write the indices at which `now` differs from `kept` to `out` [n], ascending and offset by `base`, and copy those
 * elements to `kept`. Returns the number of indices. One pass over memory does all of it. */
enum { LINE = 64 };
#define DIFF_RANGE(bits)                                                                                               \
    static inline int64_t diff_range_##bits(uint##bits##_t *restrict kept, const uint##bits##_t *restrict now,         \
                                            int64_t n, int64_t base, int64_t *restrict out) {                          \
        enum { PER_WORD = 64 / bits, PER_LINE = 8 * LINE / bits, WORDS = LINE / 8 };                                   \
        const uint64_t one = UINT64_MAX >> (64 - bits);                                                                \
        int64_t i = 0, count = 0;                                                                                      \
        for (; i + PER_LINE <= n; i += PER_LINE) {                                                                     \
            uint64_t old[WORDS], new[WORDS], differ = 0;                                                               \
            memcpy(old, kept + i, LINE);                                                                               \
            memcpy(new, now + i, LINE);                                                                                \
            for (int w = 0; w < WORDS; w++) differ |= old[w] ^= new[w];                                                \
            if (!differ) continue;                                                                                     \
            for (int w = 0; w < WORDS; w++)                                                                            \
                for (uint64_t x = old[w]; x;) {                                                                        \
                    int e = __builtin_ctzll(x) / bits;                                                                 \
                    out[count++] = base + i + w * PER_WORD + e;                                                        \
                    x &= ~(one << (e * bits));                                                                         \
                }                                                                                                      \
            memcpy(kept + i, new, LINE);                                                                               \
        }                                                                                                              \
        for (; i < n; i++) {                                                                                           \
            if (kept[i] == now[i]) continue;                                                                           \
            out[count++] = base + i;                                                                                   \
            kept[i] = now[i];                                                                                          \
        }                                                                                                              \
        return count;                                                                                                  \
    }
DIFF_RANGE(8)
DIFF_RANGE(16)
DIFF_RANGE(32)
DIFF_RANGE(64)

/* Each of several threads writes its indices from `begin` on, which is in no other thread's range. join_shares then
 * moves them together. */
enum { MAX_THREADS = 64 };
typedef struct { int64_t begin, count; } Share;
static inline int parts_of(int threads) { return threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads; }
static inline int64_t join_shares(int64_t *indices, const Share *shares, int parts) {
    int64_t total = 0;
    for (int part = 0; part < parts; part++) {
        if (shares[part].count)
            memmove(indices + total, indices + shares[part].begin, (size_t)shares[part].count * sizeof(*indices));
        total += shares[part].count;
    }
    return total;
}
#endif
