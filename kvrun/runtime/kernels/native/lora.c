/* Low-rank changes of many adapters to one product. Twin: kernels/lora.py. f16 is 16 floats: one register
   of 512 bits, or as many smaller ones; values are worked on in 32s, of bfloat16 as they lie in pairs. */
#include "numbers.h"

typedef float f16 __attribute__((vector_size(64)));
typedef uint32_t w16 __attribute__((vector_size(64)));

/* Rows of a tile at most; rows of A and 32s of outputs at once; outputs of a thread's turn. */
enum { TALL = 4, RANKS = 4, WIDE = 2, TURN = 1024 };

struct change {
    const void *arena;
    const int64_t *table; /* a row for each adapter, `apart` values from each other */
    const int32_t *rows, *tiles;
    const int64_t *outs;
    float *low; /* [rows, width] */
    int64_t apart, count, features, parts, width, wide;
};

/* Of a tile: its rows in x or y, and what A makes of them. */
struct rows {
    void *at[TALL];
    float *low[TALL];
    int tall;
};

/* Of an adapter: B [rank, out] of a part, its first row of A, and its first output in y. */
struct part {
    int64_t start, begin, rank, out, at;
};

typedef struct {
    f16 first, second;
} f32;

static inline w16 sixteen(const void *from) {
    w16 x;
    memcpy(&x, from, 64);
    return x;
}

/* Values `at` to `at` + 32; of these `count`, and zeros then. */
static inline __attribute__((always_inline)) f32 take(const void *from, int64_t at, int64_t count, int wide) {
    const char *x = (const char *)from + at * (wide ? 4 : 2);
    char room[128];
    if (count < 32) {
        memset(room, 0, sizeof room);
        memcpy(room, x, count * (wide ? 4 : 2));
        x = room;
    }
    w16 y = sixteen(x);
    if (wide) return (f32){(f16)y, (f16)sixteen(x + 64)};
    return (f32){(f16)(y << 16), (f16)(y & 0xffff0000)};
}

/* These 32 will be taken; adapters seldom lie in a near cache. */
static inline __attribute__((always_inline)) void soon(const void *from, int64_t at, int wide) {
    __builtin_prefetch((const char *)from + at * (wide ? 4 : 2));
    if (wide) __builtin_prefetch((const char *)from + at * 4 + 64);
}

/* bfloat16 in the upper halves. */
static inline w16 rounded16(f16 x) {
    w16 bits = (w16)x, nan = (w16)(x != x);
    return (nan & 0x7fc00000) | (~nan & (bits + 0x7fff + (bits >> 16 & 1)));
}

static inline __attribute__((always_inline)) void give(f32 x, void *to, int64_t at, int64_t count, int wide) {
    char *y = (char *)to + at * (wide ? 4 : 2);
    w16 both[2] = {(w16)x.first, (w16)x.second};
    if (!wide) both[0] = rounded16(x.first) >> 16 | (rounded16(x.second) & 0xffff0000);
    if (count < 32) memcpy(y, both, count * (wide ? 4 : 2));
    else memcpy(y, both, wide ? 128 : 64);
}

static inline float total(f16 x) {
    float y[16], sum = 0;
    memcpy(y, &x, sizeof y);
    for (int i = 0; i < 16; i++) sum += y[i];
    return sum;
}

/* `ranks` rows of A, from value `start` of the arena on, times `tall` rows: values of `low` from r on. */
static inline __attribute__((always_inline)) void shrink(
    const struct change *c, const struct rows *t, int64_t start, int64_t r, int ranks, int tall, int wide) {
    f16 sums[TALL][RANKS] = {0};
    for (int64_t i = 0; i < c->features; i += 32) {
        int64_t left = c->features - i;
        f32 x[TALL];
        for (int j = 0; j < tall; j++) x[j] = take(t->at[j], i, left, wide);
        for (int k = 0; k < ranks; k++) {
            f32 a = take(c->arena, start + k * c->features + i, left, wide);
            soon(c->arena, start + (k + RANKS) * c->features + i, wide);
            for (int j = 0; j < tall; j++) sums[j][k] += a.first * x[j].first + a.second * x[j].second;
        }
    }
    for (int j = 0; j < tall; j++)
        for (int k = 0; k < ranks; k++) {
            float sum = total(sums[j][k]);
            t->low[j][r + k] = wide ? sum : narrow(rounded(sum));
        }
}

/* `some` 32s of a part's outputs from o on: B [rank, out] times `low`, added to y. */
static inline __attribute__((always_inline)) void expand(
    const struct change *c, const struct rows *t, const struct part *p, int64_t o, int some, int tall, int wide) {
    f32 sums[TALL][WIDE] = {0};
    int64_t left = some == WIDE ? 32 * WIDE : p->out - o; /* known where it can be */
    for (int64_t r = 0; r < p->rank; r++)
        for (int k = 0; k < some; k++) {
            int64_t at = p->start + r * p->out + o + 32 * k;
            f32 b = take(c->arena, at, left - 32 * k, wide);
            soon(c->arena, at + 32 * WIDE, wide);
            for (int j = 0; j < tall; j++) {
                sums[j][k].first += t->low[j][p->begin + r] * b.first;
                sums[j][k].second += t->low[j][p->begin + r] * b.second;
            }
        }
    for (int j = 0; j < tall; j++)
        for (int k = 0; k < some; k++) {
            int64_t at = p->at + o + 32 * k;
            f32 y = take(t->at[j], at, left - 32 * k, wide);
            y.first += sums[j][k].first;
            y.second += sums[j][k].second;
            give(y, t->at[j], at, left - 32 * k, wide);
        }
}

/* What loops of a known length compute stays in registers. */
static inline __attribute__((always_inline)) void shrink_by(
    const struct change *c, const struct rows *t, int64_t start, int64_t r, int ranks, int wide) {
    switch (t->tall) {
    case 1: shrink(c, t, start, r, ranks, 1, wide); break;
    case 2: shrink(c, t, start, r, ranks, 2, wide); break;
    case 3: shrink(c, t, start, r, ranks, 3, wide); break;
    default: shrink(c, t, start, r, ranks, TALL, wide);
    }
}

static inline __attribute__((always_inline)) void expand_by(
    const struct change *c, const struct rows *t, const struct part *p, int64_t o, int some, int wide) {
    switch (t->tall) {
    case 1: expand(c, t, p, o, some, 1, wide); break;
    case 2: expand(c, t, p, o, some, 2, wide); break;
    case 3: expand(c, t, p, o, some, 3, wide); break;
    default: expand(c, t, p, o, some, TALL, wide);
    }
}

/* The rows of a tile in x or y, whose rows lie `stride` values from each other; where its adapter lies, or
   null. */
static const int64_t *found(const struct change *c, int64_t tile, const void *x, int64_t stride,
                            struct rows *t) {
    const int32_t *of = c->tiles + 3 * tile;
    t->tall = of[2];
    for (int j = 0; j < of[2]; j++) {
        t->at[j] = (char *)x + c->rows[of[1] + j] * stride * (c->wide ? 4 : 2);
        t->low[j] = c->low + (of[1] + j) * c->width;
    }
    return of[0] ? c->table + of[0] * c->apart : 0;
}

/* RANKS values of `low` from r on, or those that are left. */
static void shrink_tile(const struct change *c, int64_t tile, const void *x, int64_t stride, int64_t r) {
    struct rows t;
    const int64_t *where = found(c, tile, x, stride, &t);
    if (!where) return;
    int64_t last = where[1] < r + RANKS ? where[1] : r + RANKS, some = last - r == RANKS ? RANKS : 1;
    for (; r < last; r += some) {
        int64_t start = where[0] + r * c->features;
        if (some > 1 && c->wide) shrink_by(c, &t, start, r, RANKS, 1);
        else if (some > 1) shrink_by(c, &t, start, r, RANKS, 0);
        else shrink_by(c, &t, start, r, 1, c->wide);
    }
}

/* TURN outputs of a part from o on, or those that are left; its first output is value `at` of y's rows. */
static void expand_tile(const struct change *c, int64_t tile, void *y, int64_t stride, int64_t part,
                        int64_t at, int64_t o) {
    struct rows t;
    const int64_t *where = found(c, tile, y, stride, &t);
    if (!where) return;
    where += 2 + 3 * part;
    struct part p = {where[0], where[1], where[2], c->outs[part], at};
    int64_t end = o + TURN < p.out ? o + TURN : p.out;
    for (; p.rank && o < end; o += 32 * WIDE) {
        int whole = end - o >= 32 * WIDE;
        if (whole && c->wide) expand_by(c, &t, &p, o, WIDE, 1);
        else if (whole) expand_by(c, &t, &p, o, WIDE, 0);
        else for (int64_t i = o; i < end; i += 32) expand_by(c, &t, &p, i, 1, c->wide);
    }
}

/* x [tokens, features] and y [tokens, sum of outs], their rows `stride` and `apart` values from each other. */
void kvrun_change(const struct change *c, const void *x, int64_t stride, void *y, int64_t apart, int threads) {
    int64_t widest = 0;
    for (int64_t part = 0; part < c->parts; part++) widest = c->outs[part] > widest ? c->outs[part] : widest;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t tile = 0; tile < c->count; tile++)
            for (int64_t r = 0; r < c->width; r += RANKS) shrink_tile(c, tile, x, stride, r);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t tile = 0; tile < c->count; tile++)
            for (int64_t o = 0; o < widest; o += TURN)
                for (int64_t part = 0, at = 0; part < c->parts; at += c->outs[part], part++)
                    expand_tile(c, tile, y, apart, part, at, o);
    }
}
