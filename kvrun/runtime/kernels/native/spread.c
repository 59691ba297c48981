/* Matrices of an adapter's file to where they belong. Twin: kernels/spread.py. */
#include "numbers.h"

#define INLINE static inline __attribute__((always_inline))
enum { BLOCK = 64, MANY = 1024 };

/* `rows` rows of `columns` values, `stride` values apart, from value `begin` on, times `scale`: to `target`,
   whose rows lie `apart` values from each other, or, `turned`, their transpose. */
struct move {
    int64_t begin, rows, columns, stride, apart;
    void *target;
    int turned;
    float scale;
};

INLINE float value(const void *x, int64_t i, int wide) {
    return wide ? ((const float *)x)[i] : narrow(((const uint16_t *)x)[i]);
}

/* `count` values from x[begin] on, times `scale`, to y. */
INLINE void scaled(const void *x, int64_t begin, void *y, int64_t count, float scale, int from, int to) {
    int64_t size = to ? 4 : 2;
    if (from == to && scale == 1.0f) {
        memcpy(y, (const char *)x + begin * size, count * size);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float v = value(x, begin + i, from) * scale;
        if (to) ((float *)y)[i] = v;
        else ((uint16_t *)y)[i] = rounded(v);
    }
}

/* Whether `count` values are finite. */
INLINE int all_finite(const void *x, int64_t count, int wide) {
    uint32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t y = wide ? ((const uint32_t *)x)[i] & 0x7fffffff : ((const uint16_t *)x)[i] & 0x7fff;
        most = y > most ? y : most;
    }
    return most < (wide ? 0x7f800000u : 0x7f80u);
}

/* Whether all values of a matrix are finite when they are scaled and rounded. */
INLINE int fits(const void *x, const struct move *m, int from, int to) {
    uint32_t y[MANY] = {0};
    int64_t last = m->begin + m->rows * m->columns;
    for (int64_t i = m->begin; i < last; i += MANY) {
        int64_t count = i + MANY < last ? MANY : last - i;
        scaled(x, i, y, count, m->scale, from, to);
        if (!all_finite(y, count, to)) return 0;
    }
    return 1;
}

INLINE void move(const void *x, const struct move *m, int from, int to) {
    int64_t size = to ? 4 : 2;
    if (!m->turned) {
        for (int64_t r = 0; r < m->rows; r++)
            scaled(x, m->begin + r * m->stride, (char *)m->target + r * m->apart * size, m->columns, m->scale,
                   from, to);
        return;
    }
    uint32_t y[BLOCK][BLOCK];
    for (int64_t row = 0; row < m->rows; row += BLOCK)
        for (int64_t column = 0; column < m->columns; column += BLOCK) {
            int64_t rows = m->rows - row < BLOCK ? m->rows - row : BLOCK;
            int64_t columns = m->columns - column < BLOCK ? m->columns - column : BLOCK;
            for (int64_t r = 0; r < rows; r++)
                scaled(x, m->begin + (row + r) * m->stride + column, y[r], columns, m->scale, from, to);
            for (int64_t c = 0; c < columns; c++) {
                void *there = (char *)m->target + ((column + c) * m->apart + row) * size;
                for (int64_t r = 0; r < rows; r++)
                    if (to) ((uint32_t *)there)[r] = y[r][c];
                    else ((uint16_t *)there)[r] = ((uint16_t *)y[r])[c];
            }
        }
}

INLINE int spread(const void *x, const struct move *whole, int64_t matrices, const struct move *moves,
                  int64_t count, int from, int to) {
    for (int64_t i = 0; i < matrices; i++)
        if (!fits(x, whole + i, from, to)) return 0;
    for (int64_t i = 0; i < count; i++) move(x, moves + i, from, to);
    return 1;
}

/* Whether all values of the matrices `whole` are finite; if so, `moves` are done. `from`, `to`: whether values
   are fp32, not bfloat16, in x and in targets. */
int kvrun_spread(const void *x, const struct move *whole, int64_t matrices, const struct move *moves,
                 int64_t count, int from, int to) {
    if (from && to) return spread(x, whole, matrices, moves, count, 1, 1);
    if (from) return spread(x, whole, matrices, moves, count, 1, 0);
    if (to) return spread(x, whole, matrices, moves, count, 0, 1);
    return spread(x, whole, matrices, moves, count, 0, 0);
}
