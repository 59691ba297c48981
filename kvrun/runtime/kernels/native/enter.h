/* What a product does with its rows before it multiplies, and with its sums. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "numbers.h"

enum { NONE, SILU, GELU, GELU_TANH, RELU };

static inline float get(const void *x, int64_t i, int wide) {
    return wide ? ((const float *)x)[i] : narrow(((const uint16_t *)x)[i]);
}

static inline void put(void *y, int64_t i, float value, int wide) {
    if (wide) ((float *)y)[i] = value;
    else ((uint16_t *)y)[i] = rounded(value);
}

static inline float activated(float x, int act) {
    if (act == SILU) return x / (1.0f + exponential(-x));
    if (act == RELU) return x < 0 ? 0.0f : x;
    if (act == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    float inner = 1.5957691f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exponential(-inner));
}

static inline void gated(const float *from, float *y, int64_t k, int act) {
    if (act == SILU) for (int64_t i = 0; i < k; i++) y[i] = activated(from[i], SILU) * from[k + i];
    else for (int64_t i = 0; i < k; i++) y[i] = activated(from[i], act) * from[k + i];
}

/* What enters the product: a row in fp32, normed or gated, and as it is in x's dtype then. */
static inline void enter(const void *x, float *y, int64_t k, const float *norm, float eps, int act,
                         int wide, float *room) {
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

/* Memory of this thread, until it asks for more; null where there is none. */
static __thread char *kept;
static __thread size_t kept_size;

static inline void *scratch(size_t size) {
    if (size > kept_size) {
        free(kept);
        kept = malloc(size);
        kept_size = kept ? size : 0;
    }
    return kept;
}
