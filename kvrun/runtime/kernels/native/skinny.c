/* Products of few rows with a small matrix, with what comes before and after them.
   Twin: kernels/skinny.py. f16 is 16 floats: one register of 512 bits, or as many smaller ones. */
#include "enter.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float f16 __attribute__((vector_size(64)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f4 __attribute__((vector_size(16)));
typedef uint32_t w16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

/* Rows of x, and of the matrix, that are worked on at once. */
enum { FEW = 2, OUTS = 8 };

struct matrix {
    const void *weight, *bias; /* [n, k], [n] or null: fp32 (`wide`) or bfloat16, as x and all else */
    int64_t n, k;
    int32_t wide;
};

static inline __attribute__((always_inline)) f16 sixteen(const void *from, int64_t i, int wide) {
    f16 y;
    if (wide) {
        memcpy(&y, (const float *)from + i, sizeof y);
        return y;
    }
#ifdef __AVX512F__ /* which compilers do not find by themselves */
    return (f16)(w16)_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)((const uint16_t *)from + i))), 16);
#else
    h16 half;
    memcpy(&half, (const uint16_t *)from + i, sizeof half);
    return (f16)(__builtin_convertvector(half, w16) << 16);
#endif
}

static inline __attribute__((always_inline)) float total(f16 x) {
    f8 low, high;
    f4 a, b;
    memcpy(&low, &x, sizeof low);
    memcpy(&high, (char *)&x + sizeof low, sizeof high);
    low += high;
    memcpy(&a, &low, sizeof a);
    memcpy(&b, (char *)&low + sizeof a, sizeof b);
    a += b;
    return (a[0] + a[2]) + (a[1] + a[3]);
}

/* y[r][o] = rows o of the matrix times rows r of x. */
static inline __attribute__((always_inline)) void multiply(const void *const *weight, const float *x, int64_t k,
                                                           int rows, int wide, float y[FEW][OUTS]) {
    f16 sums[FEW][OUTS] = {{{0}}};
    int64_t whole = k / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16) {
        f16 part[FEW];
        for (int r = 0; r < rows; r++) part[r] = sixteen(x + r * k, i, 1);
        for (int o = 0; o < OUTS; o++) {
            f16 w = sixteen(weight[o], i, wide);
            for (int r = 0; r < rows; r++) sums[r][o] += w * part[r];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTS; o++) {
            float sum = total(sums[r][o]);
            for (int64_t i = whole; i < k; i++) sum += get(weight[o], i, wide) * x[r * k + i];
            y[r][o] = sum;
        }
}

/* OUTS outputs from n on (`act`: half as many gates and their ups) of all rows, x in fp32 [rows, k]. */
static void outputs(const struct matrix *w, const float *x, void *out, const void *add, int64_t rows,
                    int64_t n, int act) {
    int64_t k = w->k, size = w->wide ? 4 : 2, width = act ? w->n / 2 : w->n;
    int64_t count = act ? OUTS / 2 : OUTS;
    const void *weight[OUTS];
    for (int o = 0; o < OUTS; o++) {
        int64_t row = n + o % count;
        row = (row < width ? row : width - 1) + o / count * width; /* the last one again */
        weight[o] = (const char *)w->weight + row * k * size;
    }
    if (count > width - n) count = width - n;
    for (int64_t r = 0; r < rows; r += FEW) {
        float y[FEW][OUTS];
        int few = rows - r < FEW ? 1 : FEW;
        if (few == 1 && w->wide) multiply(weight, x + r * k, k, 1, 1, y);
        else if (few == 1) multiply(weight, x + r * k, k, 1, 0, y);
        else if (w->wide) multiply(weight, x + r * k, k, FEW, 1, y);
        else multiply(weight, x + r * k, k, FEW, 0, y);
        for (int i = 0; i < few; i++)
            for (int64_t o = 0; o < count; o++) {
                int64_t at = (r + i) * width + n + o;
                float value = y[i][o];
                if (act) value = activated(value, act) * y[i][OUTS / 2 + o];
                if (w->bias) value += get(w->bias, n + o, w->wide);
                if (add) value += get(add, at, w->wide);
                put(out, at, value, w->wide);
            }
    }
}

/* x [rows, k] (act: [rows, 2 k]) times the matrix, plus its bias and `add`, to out [rows, n] (behind:
   an act of [gate | up], [rows, n / 2]). 0 where there was no memory. */
int kvrun_rows(const struct matrix *w, const void *x, void *out, const void *add, const float *norm,
               float eps, int act, int behind, int64_t rows, int threads) {
    int64_t k = w->k, width = behind ? w->n / 2 : w->n, step = behind ? OUTS / 2 : OUTS;
    float *entered = scratch(4 * (size_t)((rows + 2) * k));
    if (!entered) return 0;
    for (int64_t r = 0; r < rows; r++) {
        const char *row = (const char *)x + r * k * (w->wide ? 4 : 2) * (act ? 2 : 1);
        enter(row, entered + r * k, k, norm, eps, act, w->wide, entered + rows * k);
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t n = 0; n < width; n += step) outputs(w, entered, out, add, rows, n, behind);
    return 1;
}
