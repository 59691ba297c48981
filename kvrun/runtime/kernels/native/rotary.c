/* Norm and rotation of queries and keys, and a token's row of the cache. Twin: kernels/rotary.py. */
#include "numbers.h"

enum { WIDEST = 256 };

struct shape {
    int64_t heads, kv_heads, dim, width;
    int interleaved, wide;
    float eps;
};

static inline __attribute__((always_inline)) void turn(float *x, const float *cos, const float *sin,
                                                       int64_t half, int64_t step, int64_t apart) {
    for (int64_t i = 0; i < half; i++) {
        float a = x[i * step], b = x[i * step + apart];
        x[i * step] = a * cos[i] - b * sin[i];
        x[i * step + apart] = b * cos[i] + a * sin[i];
    }
}

static void narrowed(const float *x, uint16_t *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = rounded(x[i]);
}

/* A head `x` [dim], in place. `norm` and `cos` may be null. */
static void head(const struct shape *s, void *x, const float *norm, const float *cos, const float *sin) {
    float y[WIDEST];
    widen(x, y, s->dim, s->wide);
    if (norm) {
        float sum = 0;
        for (int64_t i = 0; i < s->dim; i++) sum += y[i] * y[i];
        float by = 1.0f / sqrtf(sum / s->dim + s->eps);
        for (int64_t i = 0; i < s->dim; i++) y[i] *= by * norm[i];
        if (!s->wide) for (int64_t i = 0; i < s->dim; i++) y[i] = narrow(rounded(y[i]));
    }
    int64_t half = s->width / 2;
    if (cos && s->interleaved) turn(y, cos, sin, half, 2, 1);
    else if (cos) turn(y, cos, sin, half, 1, half);
    if (s->wide) memcpy(x, y, 4 * s->dim);
    else narrowed(y, x, s->dim);
}

/* qkv [tokens, heads + 2 * kv_heads, dim] and cache [slots, 2 * kv_heads, dim], their rows `stride` and
   `apart` values from each other; cos, sin [tokens, width / 2]; slots [tokens]. */
void kvrun_rotate(const struct shape *s, void *qkv, int64_t stride, void *cache, int64_t apart,
                  const int64_t *slots, const float *cos, const float *sin, const float *q_norm,
                  const float *k_norm, int64_t tokens, int threads) {
    int64_t size = s->wide ? 4 : 2, kv = 2 * s->kv_heads * s->dim * size, half = s->width / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        char *row = (char *)qkv + t * stride * size;
        for (int64_t h = 0; h < s->heads + s->kv_heads; h++)
            head(s, row + h * s->dim * size, h < s->heads ? q_norm : k_norm, cos ? cos + t * half : 0,
                 cos ? sin + t * half : 0);
        if (slots[t] >= 0)
            memcpy((char *)cache + slots[t] * apart * size, row + s->heads * s->dim * size, kv);
    }
}
