/* Products of few rows with matrices of codes, with what comes before and after them; values of codes.
   Twin: kernels/w4a16.py. f16 is 16 floats: one register of 512 bits, or as many smaller ones.

   Rows of a matrix lie in tiles of 4, the last one filled up: a tile's columns in blocks of 64, a
   block's rows one after the other, 64 bytes each. Of 4 bits two rows share their bytes, the first in
   the lower halves. A group of columns is whole blocks. Scales are [tiles, groups, 4]: of 8 bits in
   fp32, the zero is 128; of 4 bits a word, bfloat16 above and the zero, 0 to 255, below.
   x is rounded to 8 bits, each block of it by its largest value, so that a block's sum is whole. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f16 __attribute__((vector_size(64)));
typedef uint32_t w4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

/* Rows that are worked on at once; columns of a block; tiles of a thread's share. */
enum { FEW = 4, BLOCK = 64, SHARE = 16 };
#ifndef AHEAD
#define AHEAD 8192 /* bytes */
#endif
enum { NONE, SILU, GELU, GELU_TANH, RELU };

struct matrix {
    const void *codes, *scales;
    const float *bias;
    int64_t n, k, group, bits;
};

static float get(const void *x, int64_t i, int wide) {
    return wide ? ((const float *)x)[i] : narrow(((const uint16_t *)x)[i]);
}

static void put(void *y, int64_t i, float value, int wide) {
    if (wide) ((float *)y)[i] = value;
    else ((uint16_t *)y)[i] = rounded(value);
}

static inline float total(f16 x) {
    union { f16 all; f8 half[2]; } a = {x};
    union { f8 all; f4 half[2]; } b = {a.half[0] + a.half[1]};
    f4 c = b.half[0] + b.half[1];
    return (c[0] + c[1]) + (c[2] + c[3]);
}

static inline float activated(float x, int act) {
    if (act == SILU) return x / (1.0f + exponential(-x));
    if (act == RELU) return x < 0 ? 0.0f : x;
    if (act == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    float inner = 1.5957691f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-inner));
}

static void gated(const float *from, float *y, int64_t k, int act) {
    if (act == SILU) for (int64_t i = 0; i < k; i++) y[i] = activated(from[i], SILU) * from[k + i];
    else for (int64_t i = 0; i < k; i++) y[i] = activated(from[i], act) * from[k + i];
}

/* What enters the product: a row in fp32, normed or gated, and as it is in x's dtype then. */
static void enter(const void *x, float *y, int64_t k, const float *norm, float eps, int act, int wide,
                  float *room) {
    float *from = act ? room : y;
    int64_t count = act ? 2 * k : k;
    widen(x, from, count, wide);
    if (norm) {
        float sum = 0;
        for (int64_t i = 0; i < k; i++) sum += y[i] * y[i];
        float by = 1.0f / sqrtf(sum / k + eps);
        for (int64_t i = 0; i < k; i++) y[i] *= by * norm[i];
    }
    if (act) gated(from, y, k, act);
    if (!wide && (norm || act)) for (int64_t i = 0; i < k; i++) y[i] = narrow(rounded(y[i]));
}

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

/* Of a tile's four rows in a group. */
static inline void scales_of(const struct matrix *w, int bits, int64_t group, f4 *scale, f4 *zero) {
    if (bits == 8) {
        memcpy(scale, (const float *)w->scales + 4 * group, 16);
        *zero = 128.0f - (f4){0};
        return;
    }
    w4 words, above;
    memcpy(&words, (const uint32_t *)w->scales + 4 * group, 16);
    above = words & 0xffff0000;
    memcpy(scale, &above, 16);
    *zero = __builtin_convertvector((i4)(words & 0xff), f4);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
typedef __m512i bytes;
static inline bytes load(const void *from) { return _mm512_loadu_si512(from); }
static inline bytes lower(bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
static inline bytes upper(bytes x) { return lower(_mm512_srli_epi16(x, 4)); }
/* Sums of 64 codes times 64 of x, in 16 parts. */
static inline f16 sums_of(bytes codes, bytes x) {
    return (f16)_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, x));
}
#elif defined(__AVX2__)
typedef struct { __m256i half[2]; } bytes;
static inline bytes load(const void *from) {
    const __m256i *at = from;
    return (bytes){{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
static inline bytes lower(bytes x) {
    __m256i mask = _mm256_set1_epi8(15);
    return (bytes){{_mm256_and_si256(x.half[0], mask), _mm256_and_si256(x.half[1], mask)}};
}
static inline bytes upper(bytes x) {
    return lower((bytes){{_mm256_srli_epi16(x.half[0], 4), _mm256_srli_epi16(x.half[1], 4)}});
}
static inline __m256i wide(__m256i codes, __m256i x, int high) {
    __m128i a = high ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
    __m128i b = high ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x);
    return _mm256_madd_epi16(_mm256_cvtepu8_epi16(a), _mm256_cvtepi8_epi16(b));
}
static inline f16 sums_of(bytes codes, bytes x) {
    union { f16 all; __m256 half[2]; } found;
    for (int i = 0; i < 2; i++) {
        __m256i a = codes.half[i], b = x.half[i];
        found.half[i] = _mm256_cvtepi32_ps(_mm256_add_epi32(wide(a, b, 0), wide(a, b, 1)));
    }
    return found.all;
}
#else
typedef uint8_t bytes __attribute__((vector_size(64)));
static inline bytes load(const void *from) {
    bytes x;
    memcpy(&x, from, 64);
    return x;
}
static inline bytes lower(bytes x) { return x & 15; }
static inline bytes upper(bytes x) { return x >> 4; }
static inline f16 sums_of(bytes codes, bytes x) {
    int32_t sum = 0;
    for (int i = 0; i < 64; i++) sum += codes[i] * (int8_t)x[i];
    return (f16){(float)sum};
}
#endif

/* A tile of the matrix times a row: y [4]. */
static inline __attribute__((always_inline)) void tile(
    const struct matrix *w, int bits, const int8_t *x, const float *shares, const int32_t *sums,
    int64_t at, float *y) {
    int64_t blocks = w->k / BLOCK, groups = w->k / w->group, each = w->group / BLOCK;
    int64_t size = 32 * bits; /* of a block */
    const uint8_t *codes = (const uint8_t *)w->codes + at * blocks * size;
    f16 a = {0}, b = {0}, c = {0}, d = {0};
    f4 zeros = {0};
    for (int64_t g = 0, i = 0; g < groups; g++) {
        f16 p = {0}, q = {0}, r = {0}, s = {0};
        float sum = 0;
        for (int64_t end = i + each; i < end; i++, codes += size) {
            bytes row = load(x + i * BLOCK);
            f16 share = shares[i] - (f16){0};
            sum += shares[i] * (float)sums[i];
            for (int64_t line = 0; line < size; line += 64) __builtin_prefetch(codes + AHEAD + line);
            if (bits == 8) {
                p += sums_of(load(codes), row) * share;
                q += sums_of(load(codes + 64), row) * share;
                r += sums_of(load(codes + 128), row) * share;
                s += sums_of(load(codes + 192), row) * share;
            } else {
                bytes first = load(codes), second = load(codes + 64);
                p += sums_of(lower(first), row) * share;
                q += sums_of(upper(first), row) * share;
                r += sums_of(lower(second), row) * share;
                s += sums_of(upper(second), row) * share;
            }
        }
        f4 scale, zero;
        scales_of(w, bits, at * groups + g, &scale, &zero);
        zeros += scale * zero * sum;
        a += p * scale[0];
        b += q * scale[1];
        c += r * scale[2];
        d += s * scale[3];
    }
    y[0] = total(a) - zeros[0];
    y[1] = total(b) - zeros[1];
    y[2] = total(c) - zeros[2];
    y[3] = total(d) - zeros[3];
}

static __thread char *kept;
static __thread size_t kept_size;

static void *scratch(size_t size) {
    if (size > kept_size) {
        free(kept);
        kept = malloc(size);
        kept_size = kept ? size : 0;
    }
    return kept;
}

/* Tiles `first` to `last` of `rows` rows. */
static void part(const struct matrix *w, const int8_t *x, const float *shares, const int32_t *sums,
                 void *out, const void *add, int64_t rows, int64_t first, int64_t last, int wide) {
    int64_t k = w->k, blocks = k / BLOCK;
    float y[4];
    for (int64_t at = first; at < last; at++)
        for (int64_t r = 0; r < rows; r++) {
            const float *own = shares + r * blocks;
            if (w->bits == 8) tile(w, 8, x + r * k, own, sums + r * blocks, at, y);
            else tile(w, 4, x + r * k, own, sums + r * blocks, at, y);
            for (int64_t j = 0, n = 4 * at; j < 4 && n < w->n; j++, n++) {
                float value = y[j];
                if (w->bias) value += w->bias[n];
                if (add) value += get(add, r * w->n + n, wide);
                put(out, r * w->n + n, value, wide);
            }
        }
}

/* x [rows, k] (act: [rows, 2 k]) times the matrix, plus its bias and `add`, to out [rows, n], all in
   fp32 (`wide`) or bfloat16. 0 where there was no memory. */
int kvrun_product(const struct matrix *w, const void *x, void *out, const void *add,
                  const float *norm, float eps, int act, int64_t rows, int wide, int threads) {
    int64_t k = w->k, n = w->n, blocks = k / BLOCK, size = wide ? 4 : 2;
    int64_t tiles = (n + 3) / 4;
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
        for (int64_t at = 0; at < tiles; at += SHARE) {
            int64_t end = at + SHARE < tiles ? at + SHARE : tiles;
            part(w, codes, scales, sums, y, more, few, at, end, wide);
        }
    }
    return 1;
}

/* Rows `ids` of the matrix (null: `count` from `first` on) as values, out [count, k]. */
void kvrun_values(const struct matrix *w, const int64_t *ids, int64_t first, int64_t count, void *out,
                  int wide, int threads) {
    int64_t k = w->k, groups = k / w->group;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        int64_t row = ids ? ids[i] : first + i, at = row / 4, j = row % 4;
        for (int64_t c = 0; c < k; c += BLOCK) {
            const uint8_t *block = (const uint8_t *)w->codes + (at * k + c) * w->bits / 2;
            float values[BLOCK];
            f4 scale, zero;
            scales_of(w, (int)w->bits, at * groups + c / w->group, &scale, &zero);
            float by = scale[j], none = zero[j];
            int shift = w->bits == 8 ? 0 : (int)(4 * (j % 2)), mask = w->bits == 8 ? 255 : 15;
            block += BLOCK * (w->bits == 8 ? j : j / 2);
            for (int b = 0; b < BLOCK; b++) values[b] = by * ((float)(block[b] >> shift & mask) - none);
            if (wide) memcpy((float *)out + i * k + c, values, sizeof values);
            else for (int b = 0; b < BLOCK; b++) ((uint16_t *)out)[i * k + c + b] = rounded(values[b]);
        }
    }
}
