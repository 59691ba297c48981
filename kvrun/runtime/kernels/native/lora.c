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

struct rows {
    const void *at[TALL]; /* of x or y */
    float *low[TALL];
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
            for (int j = 0; j < tall; j++) sums[j][k] += a.first * x[j].first + a.second * x[j].second;
        }
    }
    for (int j = 0; j < tall; j++)
        for (int k = 0; k < ranks; k++) {
            float sum = total(sums[j][k]);
            t->low[j][r + k] = wide ? sum : narrow(rounded(sum));
        }
}

/* Outputs from `o` on of one part, `some` 32s, of which `count` values are there: B [rank, out], from value
   `start` of the arena on, times `low` from `begin` on, added to y from `at` on. */
static inline __attribute__((always_inline)) void expand(
    const struct change *c, const struct rows *t, int64_t start, int64_t begin, int64_t rank, int64_t out,
    int64_t at, int64_t count, int some, int tall, int wide) {
    f32 y[TALL][WIDE];
    for (int j = 0; j < tall; j++)
        for (int k = 0; k < some; k++) y[j][k] = (f32){{0}, {0}};
    for (int64_t r = 0; r < rank; r++)
        for (int k = 0; k < some; k++) {
            f32 b = take(c->arena, start + r * out + 32 * k, count - 32 * k, wide);
            for (int j = 0; j < tall; j++) {
                y[j][k].first += t->low[j][begin + r] * b.first;
                y[j][k].second += t->low[j][begin + r] * b.second;
            }
        }
    for (int j = 0; j < tall; j++)
        for (int k = 0; k < some; k++) {
            f32 old = take(t->at[j], at + 32 * k, count - 32 * k, wide);
            f32 sum = {old.first + y[j][k].first, old.second + y[j][k].second};
            give(sum, (void *)t->at[j], at + 32 * k, count - 32 * k, wide);
        }
}

/* Loops of a known length stay in registers. */
#define BY_SIZE(run, tall, wide) \
    do { \
        if (tall == 1 && wide) run(1, 1); \
        else if (tall == 1) run(1, 0); \
        else if (tall == 2 && wide) run(2, 1); \
        else if (tall == 2) run(2, 0); \
        else if (tall == 3 && wide) run(3, 1); \
        else if (tall == 3) run(3, 0); \
        else if (wide) run(4, 1); \
        else run(4, 0); \
    } while (0)

/* The rows of a tile in x or y, whose rows lie `stride` values from each other, and where its adapter lies:
   null where there is no work. */
static const int64_t *found(const struct change *c, int64_t tile, const void *x, int64_t stride,
                            struct rows *t, int *tall) {
    const int32_t *of = c->tiles + 3 * tile;
    *tall = of[2];
    for (int j = 0; j < of[2]; j++) {
        t->at[j] = (const char *)x + c->rows[of[1] + j] * stride * (c->wide ? 4 : 2);
        t->low[j] = c->low + (of[1] + j) * c->width;
    }
    return of[0] ? c->table + of[0] * c->apart : 0;
}

static void shrink_tile(const struct change *c, int64_t tile, const void *x, int64_t stride, int64_t r) {
    struct rows t;
    int tall;
    const int64_t *where = found(c, tile, x, stride, &t, &tall);
    if (!where) return;
    int64_t left = where[1] - r, start = where[0] + r * c->features;
#define RUN(tall, wide) shrink(c, &t, start, r, RANKS, tall, wide)
    if (left >= RANKS) BY_SIZE(RUN, tall, c->wide);
#undef RUN
#define RUN(tall, wide) \
    for (int64_t k = 0; k < left; k++) shrink(c, &t, start + k * c->features, r + k, 1, tall, wide)
    else BY_SIZE(RUN, tall, c->wide);
#undef RUN
}

/* Outputs `from` to `from` + TURN of a part, whose first one is value `at` of y. */
static void expand_tile(const struct change *c, int64_t tile, void *y, int64_t stride, int64_t part,
                        int64_t at, int64_t from) {
    struct rows t;
    int tall;
    const int64_t *where = found(c, tile, y, stride, &t, &tall);
    if (!where || !where[4 + 3 * part]) return;
    int64_t start = where[2 + 3 * part], begin = where[3 + 3 * part], rank = where[4 + 3 * part];
    int64_t out = c->outs[part], end = from + TURN < out ? from + TURN : out;
    for (int64_t o = from; o < end; o += 32 * WIDE) {
#define RUN(tall, wide) expand(c, &t, start + o, begin, rank, out, at + o, 32 * WIDE, WIDE, tall, wide)
        if (end - o >= 32 * WIDE) BY_SIZE(RUN, tall, c->wide);
#undef RUN
#define RUN(tall, wide) \
    for (int64_t i = o; i < end; i += 32) \
        expand(c, &t, start + i, begin, rank, out, at + i, end - i, 1, tall, wide)
        else BY_SIZE(RUN, tall, c->wide);
#undef RUN
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
            for (int64_t from = 0; from < widest; from += TURN)
                for (int64_t part = 0, at = 0; part < c->parts; at += c->outs[part], part++)
                    if (from < c->outs[part]) expand_tile(c, tile, y, apart, part, at, from);
    }
}
