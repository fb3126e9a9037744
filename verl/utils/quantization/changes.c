/* What differs between two arrays of bytes: the loop that weight_sync/changes.py calls through ctypes.
 *
 * One pass over memory finds, notes and takes over. Each thread writes its places at the beginning of its own share of
 * `places`, which has room for all n; they are then moved together.
 */
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "the lowest bits of a word are taken for its first element"
#endif

enum { LINE = 64, MOST_THREADS = 64 };

/* Elements j of `now` that differ from `kept`, ascending, into `places` [n]; afterwards both are equal. How many. */
#define CHANGES(bits)                                                                                                  \
    int64_t take_changes_##bits(uint##bits##_t *restrict kept, const uint##bits##_t *restrict now, int64_t n,          \
                                int64_t *restrict places, int threads) {                                               \
        enum { PER_WORD = 64 / bits, PER_LINE = 8 * LINE / bits, WORDS = LINE / 8 };                                   \
        const uint64_t one = UINT64_MAX >> (64 - bits);                                                                \
        int64_t counts[MOST_THREADS], total = 0;                                                                       \
        int parts = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;                                 \
        _Pragma("omp parallel for num_threads(parts) schedule(static, 1)")                                             \
        for (int part = 0; part < parts; part++) {                                                                     \
            int64_t i = n * part / parts, end = n * (part + 1) / parts;                                                \
            int64_t *out = places + i, count = 0;                                                                      \
            for (; i + PER_LINE <= end; i += PER_LINE) {                                                               \
                uint64_t old[WORDS], new[WORDS], differ = 0;                                                           \
                memcpy(old, kept + i, LINE);                                                                           \
                memcpy(new, now + i, LINE);                                                                            \
                for (int w = 0; w < WORDS; w++) differ |= old[w] ^= new[w];                                            \
                if (!differ) continue;                                                                                 \
                for (int w = 0; w < WORDS; w++)                                                                        \
                    for (uint64_t x = old[w]; x;) {                                                                    \
                        int e = __builtin_ctzll(x) / bits;                                                              \
                        out[count++] = i + w * PER_WORD + e;                                                           \
                        x &= ~(one << (e * bits));                                                                     \
                    }                                                                                                  \
                memcpy(kept + i, new, LINE);                                                                           \
            }                                                                                                          \
            for (; i < end; i++) {                                                                                     \
                out[count] = i;                                                                                        \
                count += kept[i] != now[i];                                                                            \
                kept[i] = now[i];                                                                                      \
            }                                                                                                          \
            counts[part] = count;                                                                                      \
        }                                                                                                              \
        for (int part = 0; part < parts; part++) {                                                                     \
            memmove(places + total, places + n * part / parts, (size_t)counts[part] * sizeof(*places));                \
            total += counts[part];                                                                                     \
        }                                                                                                              \
        return total;                                                                                                  \
    }
CHANGES(8)
CHANGES(16)
CHANGES(32)
CHANGES(64)
