/* Products of few rows with matrices of codes, with what comes before and after them; values of codes.
   Twin: kernels/w4a16.py. f16 is 16 floats: one register of 512 bits, or as many smaller ones.

   Rows of a matrix lie in tiles of 16, the last one filled up: a tile's columns in blocks of 64, a
   block's columns in fours, of which each row has 4 bytes, so that every row has a lane of its own and
   x is the same for all. Of 4 bits two fours share their bytes, the first in the lower halves. A group
   of columns is whole blocks. Scales are [tiles, groups, 16]: of 8 bits in fp32, the zero is 128; of
   4 bits a word, bfloat16 above and the zero, 0 to 255, below.
   x is rounded to 8 bits, each block of it by its largest value, so that a block's sum is whole. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "enter.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t w16 __attribute__((vector_size(64)));

/* Rows of x that are worked on at once; rows of a tile; columns of a block. */
enum { FEW = 4, TILE = 16, BLOCK = 64 };
#ifndef AHEAD
#define AHEAD 8192 /* bytes */
#endif

struct matrix {
    const void *codes, *scales;
    const float *bias;
    int64_t n, k, group, bits;
};

/* A row in 8 bits: codes, and the scale of each block. */
static void enter8(const float *x, int8_t *codes, float *scales, int32_t *sums, int64_t k) {
    for (int64_t b = 0; b < k / BLOCK; b++) {
        const float *from = x + b * BLOCK;
        int8_t *to = codes + b * BLOCK;
        float most = 0;
        for (int i = 0; i < BLOCK; i++) {
            float size = fabsf(from[i]);
            most = size > most || size != size ? size : most;
        }
        float by = most > 0 ? 127.0f / most : 0;
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; i++) {
            float value = from[i] * by; /* infinity times 0 is no number */
            int32_t code = value == value ? (int32_t)rintf(value) : 0;
            to[i] = (int8_t)code;
            sum += code;
        }
        scales[b] = most / 127.0f; /* where it is not finite, no sum with this block is */
        sums[b] = sum;
    }
}

static inline w16 load(const void *from) {
    w16 x;
    memcpy(&x, from, 64);
    return x;
}

/* Of a tile's rows in a group. */
static inline void scales_of(const struct matrix *w, int bits, int64_t group, f16 *scale, f16 *zero) {
    w16 words = load((const uint32_t *)w->scales + TILE * group);
    *scale = (f16)(bits == 8 ? words : words & 0xffff0000);
    *zero = bits == 8 ? 128.0f - (f16){0} : __builtin_convertvector((i16)(words & 0xff), f16);
}

/* `sums`, and each row's four codes times four of x. */
static inline i16 plus(i16 sums, w16 codes, const int8_t *x) {
#if defined(__AVX512VNNI__)
    int32_t four;
    memcpy(&four, x, 4);
    return (i16)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVX2__)
    int32_t four;
    memcpy(&four, x, 4);
    __m256i both = _mm256_set1_epi32(four), odd = _mm256_srai_epi16(both, 8);
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8), part[2];
    memcpy(part, &codes, 64);
    for (int i = 0; i < 2; i++) {
        __m256i first = _mm256_and_si256(part[i], _mm256_set1_epi16(255));
        __m256i second = _mm256_srli_epi16(part[i], 8);
        part[i] = _mm256_add_epi32(_mm256_madd_epi16(first, even), _mm256_madd_epi16(second, odd));
    }
    i16 found;
    memcpy(&found, part, 64);
    return sums + found;
#else
    for (int i = 0; i < 4; i++) sums += (i16)(codes >> (8 * i) & 255) * x[i];
    return sums;
#endif
}

/* A tile of the matrix times a row. */
static inline __attribute__((always_inline)) f16 tile(
    const struct matrix *w, int bits, const int8_t *x, const float *shares, const int32_t *sums,
    int64_t at) {
    int64_t blocks = w->k / BLOCK, groups = w->k / w->group, each = w->group / BLOCK;
    int64_t size = TILE * BLOCK * bits / 8;
    const uint8_t *codes = (const uint8_t *)w->codes + at * blocks * size;
    f16 y = {0};
    for (int64_t g = 0, i = 0; g < groups; g++) {
        f16 part = {0}, scale, zero;
        float sum = 0;
        for (int64_t end = i + each; i < end; i++, codes += size) {
            i16 first = {0}, second = {0};
            for (int c = 0; c < BLOCK; c += 8) {
                const uint8_t *eight = codes + c * TILE * bits / 8;
                const int8_t *from = x + i * BLOCK + c;
                __builtin_prefetch(eight + AHEAD);
                if (bits == 8) {
                    __builtin_prefetch(eight + AHEAD + 64);
                    first = plus(first, load(eight), from);
                    second = plus(second, load(eight + 64), from + 4);
                } else { /* upper halves as they are, 16 times too large */
                    first = plus(first, load(eight) & 0x0f0f0f0f, from);
                    second = plus(second, load(eight) & 0xf0f0f0f0, from + 4);
                }
            }
            first += bits == 8 ? second : second >> 4;
            part += __builtin_convertvector(first, f16) * shares[i];
            sum += shares[i] * (float)sums[i];
        }
        scales_of(w, bits, at * groups + g, &scale, &zero);
        y += scale * (part - zero * sum);
    }
    return y;
}

/* What leaves the product: `count` values of a tile, the first of which is value n of a row. */
static inline __attribute__((always_inline)) void leave(
    const struct matrix *w, f16 found, void *out, const void *add, int64_t n, int count, int wide) {
    float y[TILE];
    memcpy(y, &found, sizeof y);
    if (w->bias) for (int i = 0; i < count; i++) y[i] += w->bias[n % w->n + i];
    if (add) for (int i = 0; i < count; i++) y[i] += get(add, n + i, wide);
    for (int i = 0; i < count; i++) put(out, n + i, y[i], wide);
}

/* Tile `at` of the matrix times `rows` rows. */
static void product(const struct matrix *w, const int8_t *x, const float *shares, const int32_t *sums,
                    void *out, const void *add, int64_t rows, int64_t at, int wide) {
    int64_t k = w->k, blocks = k / BLOCK, left = w->n - at * TILE;
    for (int64_t r = 0; r < rows; r++, x += k, shares += blocks, sums += blocks) {
        f16 y = w->bits == 8 ? tile(w, 8, x, shares, sums, at) : tile(w, 4, x, shares, sums, at);
        int64_t n = r * w->n + at * TILE;
        if (left >= TILE && wide) leave(w, y, out, add, n, TILE, 1);
        else if (left >= TILE) leave(w, y, out, add, n, TILE, 0);
        else leave(w, y, out, add, n, (int)left, wide);
    }
}

/* x [rows, k] (act: [rows, 2 k]) times the matrix, plus its bias and `add`, to out [rows, n], all in
   fp32 (`wide`) or bfloat16. 0 where there was no memory. */
int kvrun_product(const struct matrix *w, const void *x, void *out, const void *add,
                  const float *norm, float eps, int act, int64_t rows, int wide, int threads) {
    int64_t k = w->k, n = w->n, blocks = k / BLOCK, size = wide ? 4 : 2;
    int64_t tiles = (n + TILE - 1) / TILE;
    size_t floats = 4 * (size_t)(FEW * k + FEW * 2 * blocks + 2 * k);
    float *row = scratch(floats + (size_t)(FEW * k) + 64);
    if (!row) return 0;
    float *scales = row + FEW * k, *room = scales + FEW * 2 * blocks;
    int32_t *sums = (int32_t *)(scales + FEW * blocks);
    int8_t *codes = (int8_t *)(room + 2 * k);
    for (int64_t from = 0; from < rows; from += FEW) {
        int few = rows - from < FEW ? (int)(rows - from) : FEW;
        for (int r = 0; r < few; r++) {
            const char *start = (const char *)x + (from + r) * k * size * (act ? 2 : 1);
            enter(start, row + r * k, k, norm, eps, act, wide, room);
            enter8(row + r * k, codes + r * k, scales + r * blocks, sums + r * blocks, k);
        }
        void *y = (char *)out + from * n * size;
        const void *more = add ? (const char *)add + from * n * size : 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t at = 0; at < tiles; at++)
            product(w, codes, scales, sums, y, more, few, at, wide);
    }
    return 1;
}

/* Row j of a tile's block of codes. */
static inline __attribute__((always_inline)) void row_of(const uint32_t *block, int bits, int64_t j,
                                                         uint32_t *four) {
    for (int c = 0; c < BLOCK / 4; c++) {
        uint32_t found = block[TILE * (bits == 8 ? c : c / 2) + j];
        four[c] = bits == 8 ? found : found >> 4 * (c % 2) & 0x0f0f0f0f;
    }
}

/* Rows `ids` of the matrix (null: `count` from `first` on) as values, out [count, k]. */
void kvrun_values(const struct matrix *w, const int64_t *ids, int64_t first, int64_t count, void *out,
                  int wide, int threads) {
    int64_t k = w->k, groups = k / w->group;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = ids ? ids[i] : first + i, at = row / TILE, j = row % TILE;
        for (int64_t c = 0; c < k; c += BLOCK) {
            const void *block = (const uint8_t *)w->codes + (at * k + c) * TILE * w->bits / 8;
            uint32_t four[BLOCK / 4];
            float values[BLOCK];
            uint8_t codes[BLOCK];
            f16 scale, zero;
            scales_of(w, (int)w->bits, at * groups + c / w->group, &scale, &zero);
            float by = scale[j], none = zero[j];
            if (w->bits == 8) row_of(block, 8, j, four);
            else row_of(block, 4, j, four);
            memcpy(codes, four, BLOCK);
            for (int b = 0; b < BLOCK; b++) values[b] = by * ((float)codes[b] - none);
            if (wide) memcpy((float *)out + i * k + c, values, sizeof values);
            else for (int b = 0; b < BLOCK; b++) ((uint16_t *)out)[i * k + c + b] = rounded(values[b]);
        }
    }
}
