/* Attention of one query over keys and values that lie row by row. Twin: kernels/paged_attention.py. */
#include "numbers.h"

enum { WIDEST = 256, SHARE = 64, KEYS = 32 };

/* What the heads `q` [share, dim] that have one head of keys see of it: out [share, dim], fp32. */
static inline __attribute__((always_inline)) void attend(
    const float *q, const char *keys, const char *values, int64_t stride, int64_t count, int64_t share,
    int64_t dim, int wide, float *out) {
    float most[SHARE], sum[SHARE], scores[SHARE][KEYS], row[WIDEST];
    int64_t size = wide ? 4 : 2;
    for (int64_t s = 0; s < share; s++) most[s] = -INFINITY, sum[s] = 0;
    memset(out, 0, 4 * share * dim);
    for (int64_t at = 0; at < count; at += KEYS) {
        int64_t some = count - at < KEYS ? count - at : KEYS;
        for (int64_t t = 0; t < some; t++) {
            widen(keys + (at + t) * stride * size, row, dim, wide);
            for (int64_t s = 0; s < share; s++) {
                float score = 0;
                for (int64_t i = 0; i < dim; i++) score += q[s * dim + i] * row[i];
                scores[s][t] = score;
            }
        }
        for (int64_t s = 0; s < share; s++) {
            float top = most[s];
            for (int64_t t = 0; t < some; t++) top = scores[s][t] <= top ? top : scores[s][t];
            float less = exponential(most[s] - top), more = 0;
            for (int64_t t = 0; t < some; t++) {
                scores[s][t] = exponential(scores[s][t] - top);
                more += scores[s][t];
            }
            sum[s] = sum[s] * less + more;
            most[s] = top;
            for (int64_t i = 0; i < dim; i++) out[s * dim + i] *= less;
        }
        for (int64_t t = 0; t < some; t++) {
            widen(values + (at + t) * stride * size, row, dim, wide);
            for (int64_t s = 0; s < share; s++)
                for (int64_t i = 0; i < dim; i++) out[s * dim + i] += scores[s][t] * row[i];
        }
    }
    for (int64_t s = 0; s < share; s++)
        for (int64_t i = 0; i < dim; i++) out[s * dim + i] /= sum[s];
}

/* q [heads, dim]; rows [count, 2, kv_heads, dim]; out [heads, dim], all in fp32 or bfloat16. */
void kvrun_attend(const void *q, const void *rows, void *out, int64_t count, int64_t heads,
                  int64_t kv_heads, int64_t dim, float scale, int wide, int threads) {
    int64_t share = heads / kv_heads, size = wide ? 4 : 2, part = share * dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t h = 0; h < kv_heads; h++) {
        float own[SHARE * WIDEST], found[SHARE * WIDEST];
        const char *keys = (const char *)rows + h * dim * size;
        widen((const char *)q + h * part * size, own, part, wide);
        for (int64_t i = 0; i < part; i++) own[i] *= scale;
        const char *values = keys + kv_heads * dim * size;
        /* Loops of a known length need no ends of their own. */
        if (dim == 64) attend(own, keys, values, 2 * kv_heads * dim, count, share, 64, wide, found);
        else if (dim == 128) attend(own, keys, values, 2 * kv_heads * dim, count, share, 128, wide, found);
        else attend(own, keys, values, 2 * kv_heads * dim, count, share, dim, wide, found);
        if (wide) memcpy((float *)out + h * part, found, 4 * part);
        else for (int64_t i = 0; i < part; i++) ((uint16_t *)out)[h * part + i] = rounded(found[i]);
    }
}
