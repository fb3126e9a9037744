/* What mx_kernels.c and changes.c share: the bits of floats, and noting what differs between two arrays. */
#ifndef VERL_KERNELS_H
#define VERL_KERNELS_H
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "the lowest bits of a word are taken for its first element"
#endif

static inline float as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline uint16_t to_bf16(uint32_t bits) { /* round to nearest even; of NaNs only 0x7fc0 is sure to stay one */
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
/* binary32 to bfloat16, to nearest even; any NaN is a NaN. */
static inline uint16_t round_bf16(uint32_t u) { return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : to_bf16(u); }

/* Elements of `now` that differ from `kept`, ascending, as places from `base` on into `out` [n]; afterwards both are equal.
 * How many. One pass over memory finds, notes and takes over. */
enum { LINE = 64 };
#define NOTE_CHANGES(bits)                                                                                             \
    static inline int64_t note_changes_##bits(uint##bits##_t *restrict kept, const uint##bits##_t *restrict now,       \
                                              int64_t n, int64_t base, int64_t *restrict out) {                        \
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
                    int e = __builtin_ctzll(x) / bits;                                                                  \
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
NOTE_CHANGES(8)
NOTE_CHANGES(16)
NOTE_CHANGES(32)
NOTE_CHANGES(64)

/* Each of several threads writes places from `begin` on, where no other writes; they are then moved together. */
enum { MOST_THREADS = 64 };
typedef struct { int64_t begin, count; } Share;
static inline int parts_of(int threads) { return threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads; }
static inline int64_t join_shares(int64_t *places, const Share *shares, int parts) {
    int64_t total = 0;
    for (int part = 0; part < parts; part++) {
        if (shares[part].count)
            memmove(places + total, places + shares[part].begin, (size_t)shares[part].count * sizeof(*places));
        total += shares[part].count;
    }
    return total;
}
#endif
