#include "cq_kernels.h"

#include <string.h>

/* Dimensions of a tensor, at most; the exporter merges those that lie one after the other. */
#define MOST_DIMENSIONS 16

/* Rounding ------------------------------------------------------------------------------------ */

/* Rounds down for negative numbers too, which C leaves to the implementation. */
static int64_t shift_right(int64_t x, int32_t bits)
{
    return x < 0 ? ~(~x >> bits) : x >> bits;
}

static int64_t clamp(int64_t x, int64_t low, int64_t high)
{
    return x < low ? low : x > high ? high : x;
}

/* The low 32 bits, as a 32-bit accumulator that overflows keeps them. */
static int64_t wrap_int32(int64_t x)
{
    return (int64_t)(((uint64_t)x + 0x80000000u) & 0xFFFFFFFFu) - (int64_t)0x80000000;
}

static int32_t two_roundings(int64_t x, int32_t multiplier, int32_t shift)
{
    int64_t value = wrap_int32(x);
    if (shift > 0) {
        value = clamp(value * ((int64_t)1 << shift), INT32_MIN, INT32_MAX);
    }
    value = shift_right(value * multiplier + ((int64_t)1 << 30), 31); /* ties upwards */
    if (shift < 0) {                                                  /* ties away from zero */
        const int64_t mask = ((int64_t)1 << -shift) - 1;
        const int64_t threshold = (mask >> 1) + (value < 0);
        value = shift_right(value, -shift) + ((value & mask) > threshold);
    }
    return (int32_t)value;
}

/* x has at most 48 bits: the exporter refuses a network in which it could have more. */
static int32_t one_rounding(int64_t x, int32_t multiplier, int32_t shift)
{
    const int64_t reduced = clamp(((int64_t)multiplier + 0x8000) >> 16, 0, 0x7FFF);
    const int32_t total = 15 - shift;
    return (int32_t)clamp(shift_right(x * reduced + ((int64_t)1 << (total - 1)), total), INT32_MIN,
                          INT32_MAX);
}

int32_t cq_requantize_one(int64_t x, int32_t rule, int32_t multiplier, int32_t shift)
{
    return rule == CQ_TWO_ROUNDINGS ? two_roundings(x, multiplier, shift)
                                    : one_rounding(x, multiplier, shift);
}

static int32_t scaled(int64_t x, const cq_scale *scale, int32_t index)
{
    return cq_requantize_one(x, scale->rule, scale->multiplier[index * scale->step],
                             scale->shift[index * scale->step]);
}

/* Tensors ------------------------------------------------------------------------------------- */

static int32_t load(const void *x, int32_t type, int32_t index)
{
    return type == CQ_S8 ? ((const int8_t *)x)[index] : ((const int16_t *)x)[index];
}

static void save(void *out, int32_t type, int32_t index, int32_t value)
{
    if (type == CQ_S8) {
        ((int8_t *)out)[index] = (int8_t)value;
    } else {
        ((int16_t *)out)[index] = (int16_t)value;
    }
}

static void store(const cq_store *how, void *out, int32_t index, int64_t value)
{
    save(out, how->type, index, (int32_t)clamp(value + how->zero_point, how->low, how->high));
}

static const void *at(const void *x, int32_t type, int32_t index)
{
    return type == CQ_S8 ? (const void *)((const int8_t *)x + index)
                         : (const void *)((const int16_t *)x + index);
}

static int32_t int4_at(const uint8_t *weight, int32_t index)
{
    const int32_t nibble = (weight[index / 2] >> (index % 2 * 4)) & 15;
    return (nibble ^ 8) - 8;
}

static int32_t weight_at(const void *weight, int32_t type, int32_t index)
{
    return type == CQ_S4 ? int4_at((const uint8_t *)weight, index) : load(weight, type, index);
}

/*
 * Goes to the next place of some dimensions, the last one fastest, and takes up to two offsets
 * along. Returns 0 after the last place.
 */
static int32_t next(int32_t rank, const int32_t *size, int32_t *place, const int32_t *a_step,
                    int32_t *a, const int32_t *b_step, int32_t *b)
{
    for (int32_t dim = rank - 1; dim >= 0; dim--) {
        *a += a_step[dim];
        *b += b_step[dim];
        if (++place[dim] < size[dim]) {
            return 1;
        }
        *a -= size[dim] * a_step[dim];
        *b -= size[dim] * b_step[dim];
        place[dim] = 0;
    }
    return 0;
}

/* Rows of accumulators ------------------------------------------------------------------------ */

/* acc[i] += w * (x[i * step] - zero_point): the innermost loop of what multiplies a lot. */
#define DEFINE_ADD_ROW(NAME, ACC, IN)                                                             \
    static void NAME(ACC *acc, const IN *x, int32_t count, int32_t step, int32_t zero_point,      \
                     int32_t w)                                                                   \
    {                                                                                             \
        if (step == 1) {                                                                          \
            for (int32_t i = 0; i < count; i++) {                                                 \
                acc[i] += (ACC)w * (x[i] - zero_point);                                           \
            }                                                                                     \
        } else {                                                                                  \
            for (int32_t i = 0; i < count; i++) {                                                 \
                acc[i] += (ACC)w * (x[i * step] - zero_point);                                    \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_ADD_ROW(add_row_s8_32, int32_t, int8_t)
DEFINE_ADD_ROW(add_row_s8_64, int64_t, int8_t)
DEFINE_ADD_ROW(add_row_s16_32, int32_t, int16_t)
DEFINE_ADD_ROW(add_row_s16_64, int64_t, int16_t)

static void add_row(void *row, int32_t wide, int32_t first, const void *x, int32_t type,
                    int32_t index, int32_t count, int32_t step, int32_t zero_point, int32_t w)
{
    const void *from = at(x, type, index);
    if (type == CQ_S8 && !wide) {
        add_row_s8_32((int32_t *)row + first, (const int8_t *)from, count, step, zero_point, w);
    } else if (type == CQ_S8) {
        add_row_s8_64((int64_t *)row + first, (const int8_t *)from, count, step, zero_point, w);
    } else if (!wide) {
        add_row_s16_32((int32_t *)row + first, (const int16_t *)from, count, step, zero_point, w);
    } else {
        add_row_s16_64((int64_t *)row + first, (const int16_t *)from, count, step, zero_point, w);
    }
}

/* The same where the row is strided and x is not: acc[i * step] += w * (x[i] - zero_point). */
static void spread_row(void *row, int32_t wide, int32_t first, const void *x, int32_t type,
                       int32_t index, int32_t count, int32_t step, int32_t zero_point, int32_t w)
{
    for (int32_t i = 0; i < count; i++) {
        const int64_t term = (int64_t)w * (load(x, type, index + i) - zero_point);
        if (wide) {
            ((int64_t *)row)[first + i * step] += term;
        } else {
            ((int32_t *)row)[first + i * step] += (int32_t)term;
        }
    }
}

static void start_row(void *row, int32_t wide, int32_t count, int32_t value)
{
    for (int32_t i = 0; i < count; i++) {
        if (wide) {
            ((int64_t *)row)[i] = value;
        } else {
            ((int32_t *)row)[i] = value;
        }
    }
}

static void store_row(const void *row, int32_t wide, int32_t count, const cq_scale *scale,
                      int32_t channel, const cq_store *how, void *out, int32_t index)
{
    for (int32_t i = 0; i < count; i++) {
        const int64_t acc = wide ? ((const int64_t *)row)[i] : ((const int32_t *)row)[i];
        store(how, out, index + i, scaled(acc, scale, channel));
    }
}

/* Sums of products ---------------------------------------------------------------------------- */

/* The sum of weight[i] * (x[i] - zero_point), starting from the bias. */
#define DEFINE_DOT(NAME, ACC, IN, WEIGHT)                                                         \
    static ACC NAME(const IN *x, const WEIGHT *weight, int32_t from, int32_t count,               \
                    int32_t zero_point, int32_t bias)                                             \
    {                                                                                             \
        ACC acc = bias;                                                                           \
        for (int32_t i = 0; i < count; i++) {                                                     \
            acc += (ACC)weight[from + i] * (x[i] - zero_point);                                   \
        }                                                                                         \
        return acc;                                                                               \
    }

/* The same with weights of 4 bits, a byte at a time. */
#define DEFINE_DOT_S4(NAME, ACC, IN)                                                              \
    static ACC NAME(const IN *x, const uint8_t *weight, int32_t from, int32_t count,              \
                    int32_t zero_point, int32_t bias)                                             \
    {                                                                                             \
        ACC acc = bias;                                                                           \
        int32_t i = 0;                                                                            \
        if (from % 2 && count) {                                                                  \
            acc += (ACC)int4_at(weight, from) * (x[i++] - zero_point);                            \
        }                                                                                         \
        for (const uint8_t *pair = weight + (from + i) / 2; i < count - 1; i += 2, pair++) {      \
            acc += (ACC)(((*pair & 15) ^ 8) - 8) * (x[i] - zero_point);                           \
            acc += (ACC)((*pair >> 4 ^ 8) - 8) * (x[i + 1] - zero_point);                         \
        }                                                                                         \
        if (i < count) {                                                                          \
            acc += (ACC)int4_at(weight, from + i) * (x[i] - zero_point);                          \
        }                                                                                         \
        return acc;                                                                               \
    }

DEFINE_DOT(dot_s8_s8_32, int32_t, int8_t, int8_t)
DEFINE_DOT(dot_s16_s8_32, int32_t, int16_t, int8_t)
DEFINE_DOT(dot_s16_s8_64, int64_t, int16_t, int8_t)
DEFINE_DOT_S4(dot_s8_s4_32, int32_t, int8_t)
DEFINE_DOT_S4(dot_s16_s4_32, int32_t, int16_t)
DEFINE_DOT_S4(dot_s16_s4_64, int64_t, int16_t)

/* The pairs that are rare: read one at a time. */
static int64_t dot_any(const void *x, int32_t x_type, const void *weight, int32_t weight_type,
                       int32_t from, int32_t count, int32_t zero_point, int32_t bias)
{
    int64_t acc = bias;
    for (int32_t i = 0; i < count; i++) {
        acc += (int64_t)weight_at(weight, weight_type, from + i) *
               (load(x, x_type, i) - zero_point);
    }
    return acc;
}

static int64_t dot(const void *x, int32_t x_type, const void *weight, int32_t weight_type,
                   int32_t wide, int32_t from, int32_t count, int32_t zero_point, int32_t bias)
{
    const int8_t *x8 = (const int8_t *)x, *w8 = (const int8_t *)weight;
    const int16_t *x16 = (const int16_t *)x;
    const uint8_t *w4 = (const uint8_t *)weight;
    if (x_type == CQ_S8 && !wide && weight_type == CQ_S4) {
        return dot_s8_s4_32(x8, w4, from, count, zero_point, bias);
    }
    if (x_type == CQ_S8 && !wide && weight_type == CQ_S8) {
        return dot_s8_s8_32(x8, w8, from, count, zero_point, bias);
    }
    if (x_type == CQ_S16 && weight_type == CQ_S4) {
        return wide ? dot_s16_s4_64(x16, w4, from, count, zero_point, bias)
                    : dot_s16_s4_32(x16, w4, from, count, zero_point, bias);
    }
    if (x_type == CQ_S16 && weight_type == CQ_S8) {
        return wide ? dot_s16_s8_64(x16, w8, from, count, zero_point, bias)
                    : dot_s16_s8_32(x16, w8, from, count, zero_point, bias);
    }
    return dot_any(x, x_type, weight, weight_type, from, count, zero_point, bias);
}

/* Convolutions -------------------------------------------------------------------------------- */

static int32_t least(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* The smallest i >= 0 with i * step + offset >= 0. */
static int32_t first_inside(int32_t offset, int32_t step)
{
    return offset >= 0 ? 0 : (-offset + step - 1) / step;
}

/* The smallest i >= 0 with i * step + offset >= size: one after the last that is inside. */
static int32_t end_inside(int32_t offset, int32_t step, int32_t size)
{
    return offset >= size ? 0 : (size - 1 - offset) / step + 1;
}

void cq_conv(const cq_conv_op *op, const void *x, const void *weight, const int32_t *bias,
             void *row, void *out)
{
    const int32_t *in = op->in, *size = op->out, *kernel = op->kernel;
    const int32_t channels = op->groups * op->out_channels;
    int32_t to = 0;
    for (int32_t place = 0; place < op->batch * channels; place++) {
        const int32_t o = place % channels;
        const int32_t image =
            (place / channels * op->groups + o / op->out_channels) * op->in_channels;
        for (int32_t line = 0; line < size[0] * size[1]; line++, to += size[2]) {
            const int32_t z0 = line / size[1] * op->stride[0] - op->before[0];
            const int32_t y0 = line % size[1] * op->stride[1] - op->before[1];
            int32_t w = o * op->in_channels * kernel[0] * kernel[1] * kernel[2];
            start_row(row, op->wide, size[2], bias ? bias[o] : 0);
            for (int32_t c = 0; c < op->in_channels; c++) {
                for (int32_t kz = 0; kz < kernel[0]; kz++) {
                    const int32_t z = z0 + kz * op->dilation[0];
                    for (int32_t ky = 0; ky < kernel[1]; ky++, w += kernel[2]) {
                        const int32_t y = y0 + ky * op->dilation[1];
                        if (z < 0 || z >= in[0] || y < 0 || y >= in[1]) {
                            continue; /* padding is the zero point, and adds nothing */
                        }
                        for (int32_t kx = 0; kx < kernel[2]; kx++) {
                            const int32_t offset = kx * op->dilation[2] - op->before[2];
                            const int32_t first = first_inside(offset, op->stride[2]);
                            const int32_t end =
                                least(end_inside(offset, op->stride[2], in[2]), size[2]);
                            if (first < end) {
                                const int32_t from =
                                    (((image + c) * in[0] + z) * in[1] + y) * in[2];
                                add_row(row, op->wide, first, x, op->in_type,
                                        from + first * op->stride[2] + offset, end - first,
                                        op->stride[2], op->in_zero_point,
                                        weight_at(weight, op->weight_type, w + kx));
                            }
                        }
                    }
                }
            }
            store_row(row, op->wide, size[2], &op->scale, o, &op->store, out, to);
        }
    }
}

/* What one output position sees: `kernel` values of each channel; the zero point is padding. */
#define DEFINE_WINDOW(NAME, TYPE)                                                                 \
    static void NAME(const cq_conv_op *op, const TYPE *x, int32_t z0, int32_t y0, int32_t x0,     \
                     TYPE *window)                                                                \
    {                                                                                             \
        const int32_t *in = op->in, *kernel = op->kernel;                                         \
        for (int32_t line = 0; line < op->in_channels * kernel[0] * kernel[1]; line++) {          \
            const int32_t c = line / (kernel[0] * kernel[1]);                                     \
            const int32_t z = z0 + line / kernel[1] % kernel[0] * op->dilation[0];                \
            const int32_t y = y0 + line % kernel[1] * op->dilation[1];                            \
            const int32_t inside = z >= 0 && z < in[0] && y >= 0 && y < in[1];                    \
            const int32_t from = ((c * in[0] + z) * in[1] + y) * in[2];                           \
            for (int32_t kx = 0; kx < kernel[2]; kx++) {                                          \
                const int32_t place = x0 + kx * op->dilation[2];                                  \
                *window++ = inside && place >= 0 && place < in[2] ? x[from + place]               \
                                                                  : (TYPE)op->in_zero_point;      \
            }                                                                                     \
        }                                                                                         \
    }

DEFINE_WINDOW(window_s8, int8_t)
DEFINE_WINDOW(window_s16, int16_t)

void cq_conv_windows(const cq_conv_op *op, const void *x, const void *weight, const int32_t *bias,
                     void *window, void *out)
{
    const int32_t *in = op->in, *size = op->out, *kernel = op->kernel, *stride = op->stride;
    const int32_t count = op->in_channels * kernel[0] * kernel[1] * kernel[2];
    const int32_t area = size[0] * size[1] * size[2];
    for (int32_t group = 0; group < op->batch * op->groups; group++) {
        const void *image =
            at(x, op->in_type, group * op->in_channels * in[0] * in[1] * in[2]);
        for (int32_t spot = 0; spot < area; spot++) {
            const int32_t z0 = spot / (size[1] * size[2]) * stride[0] - op->before[0];
            const int32_t y0 = spot / size[2] % size[1] * stride[1] - op->before[1];
            const int32_t x0 = spot % size[2] * stride[2] - op->before[2];
            if (op->in_type == CQ_S8) {
                window_s8(op, (const int8_t *)image, z0, y0, x0, (int8_t *)window);
            } else {
                window_s16(op, (const int16_t *)image, z0, y0, x0, (int16_t *)window);
            }
            for (int32_t i = 0; i < op->out_channels; i++) {
                const int32_t o = group % op->groups * op->out_channels + i;
                const int64_t acc =
                    dot(window, op->in_type, weight, op->weight_type, op->wide, o * count, count,
                        op->in_zero_point, bias ? bias[o] : 0);
                store(&op->store, out, (group * op->out_channels + i) * area + spot,
                      scaled(acc, &op->scale, o));
            }
        }
    }
}

/* Gathers: an output position sees the taps whose place in the input is a whole number. */
void cq_conv_transpose(const cq_conv_op *op, const void *x, const void *weight,
                       const int32_t *bias, void *row, void *out)
{
    const int32_t *in = op->in, *size = op->out, *kernel = op->kernel;
    const int32_t channels = op->groups * op->out_channels;
    const int32_t taps = kernel[0] * kernel[1] * kernel[2];
    int32_t to = 0;
    for (int32_t place = 0; place < op->batch * channels; place++) {
        const int32_t o = place % channels, group = o / op->out_channels;
        for (int32_t line = 0; line < size[0] * size[1]; line++, to += size[2]) {
            start_row(row, op->wide, size[2], bias ? bias[o] : 0);
            for (int32_t c = group * op->in_channels; c < (group + 1) * op->in_channels; c++) {
                const int32_t image = place / channels * op->groups * op->in_channels + c;
                const int32_t w0 = (c * op->out_channels + o % op->out_channels) * taps;
                for (int32_t tap = 0; tap < kernel[0] * kernel[1]; tap++) {
                    const int32_t z = line / size[1] + op->before[0] -
                                      tap / kernel[1] * op->dilation[0];
                    const int32_t y = line % size[1] + op->before[1] -
                                      tap % kernel[1] * op->dilation[1];
                    if (z < 0 || z % op->stride[0] || z / op->stride[0] >= in[0] || y < 0 ||
                        y % op->stride[1] || y / op->stride[1] >= in[1]) {
                        continue;
                    }
                    for (int32_t kx = 0; kx < kernel[2]; kx++) {
                        const int32_t offset = kx * op->dilation[2] - op->before[2];
                        const int32_t first = first_inside(offset, op->stride[2]);
                        const int32_t end =
                            least(end_inside(offset, op->stride[2], size[2]), in[2]);
                        if (first < end) {
                            const int32_t from = ((image * in[0] + z / op->stride[0]) * in[1] +
                                                  y / op->stride[1]) * in[2];
                            spread_row(row, op->wide, first * op->stride[2] + offset, x,
                                       op->in_type, from + first, end - first, op->stride[2],
                                       op->in_zero_point,
                                       weight_at(weight, op->weight_type,
                                                 w0 + tap * kernel[2] + kx));
                        }
                    }
                }
            }
            store_row(row, op->wide, size[2], &op->scale, o, &op->store, out, to);
        }
    }
}

/* Matrices ------------------------------------------------------------------------------------ */

void cq_linear(const cq_linear_op *op, const void *x, const void *weight, const int32_t *bias,
               void *out)
{
    for (int32_t row = 0; row < op->rows; row++) {
        const void *from = at(x, op->in_type, row * op->in_features);
        for (int32_t o = 0; o < op->out_features; o++) {
            const int64_t acc =
                dot(from, op->in_type, weight, op->weight_type, op->wide, o * op->in_features,
                    op->in_features, op->in_zero_point, bias ? bias[o] : 0);
            store(&op->store, out, row * op->out_features + o, scaled(acc, &op->scale, o));
        }
    }
}

void cq_matmul(const cq_matmul_op *op, const void *a, const void *b, void *row, void *out)
{
    int32_t place[MOST_DIMENSIONS] = {0};
    int32_t a_at = 0, b_at = 0, to = 0;
    do {
        for (int32_t i = 0; i < op->rows; i++, to += op->columns) {
            start_row(row, op->wide, op->columns, 0);
            for (int32_t k = 0; k < op->inner; k++) {
                const int32_t value = load(a, op->a_type, a_at + i * op->inner + k);
                add_row(row, op->wide, 0, b, op->b_type, b_at + k * op->columns, op->columns, 1,
                        op->b_zero_point, value - op->a_zero_point);
            }
            store_row(row, op->wide, op->columns, &op->scale, 0, &op->store, out, to);
        }
    } while (next(op->rank, op->size, place, op->a_step, &a_at, op->b_step, &b_at));
}

/* Elements ------------------------------------------------------------------------------------ */

void cq_binary(const cq_binary_op *op, const void *a, const void *b, void *out)
{
    const int64_t unit = (int64_t)1 << op->left_shift;
    int32_t place[MOST_DIMENSIONS] = {0};
    int32_t a_at = 0, b_at = 0, to = 0;
    do {
        int64_t left = load(a, op->a_type, a_at) - op->a_zero_point;
        int64_t right = load(b, op->b_type, b_at) - op->b_zero_point;
        if (op->kind == CQ_MUL) {
            left = scaled(left * right, &op->scale, 0);
        } else {
            left = scaled(left * unit, &op->a_scale, 0);
            right = scaled(right * unit, &op->b_scale, 0);
            if (op->kind == CQ_MAXIMUM) {
                left = left > right ? left : right;
            } else if (op->kind == CQ_MINIMUM) {
                left = left < right ? left : right;
            } else {
                left = scaled(op->kind == CQ_ADD ? left + right : left - right, &op->scale, 0);
            }
        }
        store(&op->store, out, to++, left);
    } while (next(op->rank, op->size, place, op->a_step, &a_at, op->b_step, &b_at));
}

void cq_requantize(const cq_requantize_op *op, const void *x, void *out)
{
    for (int32_t i = 0; i < op->count; i++) {
        const int32_t value = load(x, op->in_type, i) - op->in_zero_point;
        store(&op->store, out, i, scaled(value, &op->scale, 0));
    }
}

void cq_clamp(const cq_clamp_op *op, const void *x, void *out)
{
    for (int32_t i = 0; i < op->count; i++) {
        save(out, op->type, i, (int32_t)clamp(load(x, op->type, i), op->low, op->high));
    }
}

void cq_table(const cq_table_op *op, const void *x, const void *table, void *out)
{
    int32_t i = 0;
    for (int32_t place = 0; place < op->outer * op->channels; place++) {
        const int32_t row = place % op->channels * op->levels - op->quant_min;
        for (int32_t k = 0; k < op->inner; k++, i++) {
            save(out, op->out_type, i, load(table, op->out_type, row + load(x, op->in_type, i)));
        }
    }
}

/* Means and pools ----------------------------------------------------------------------------- */

void cq_mean(const cq_mean_op *op, const void *x, void *out)
{
    int32_t place[MOST_DIMENSIONS] = {0};
    int32_t start = 0, same = 0, to = 0;
    do {
        int32_t inner[MOST_DIMENSIONS] = {0};
        int32_t from = start, unused = 0;
        int64_t sum = 0;
        do {
            sum += load(x, op->in_type, from) - op->in_zero_point;
        } while (next(op->summed_rank, op->summed_size, inner, op->summed_step, &from,
                      op->summed_step, &unused));
        store(&op->store, out, to++, scaled(sum, &op->scale, 0));
    } while (next(op->kept_rank, op->kept_size, place, op->kept_step, &start, op->kept_step,
                  &same));
}

/* How many of the positions start, start + 1, ... (`size` of them) lie in [low, high). */
static int32_t held(int32_t start, int32_t size, int32_t low, int32_t high)
{
    const int32_t first = start > low ? start : low;
    return least(start + size, high) - first;
}

void cq_avg_pool2d(const cq_pool_op *op, const void *x, void *out)
{
    int32_t to = 0;
    for (int32_t place = 0; place < op->images * op->out[0] * op->out[1]; place++) {
        const int32_t image = place / (op->out[0] * op->out[1]) * op->in[0];
        const int32_t y0 = place / op->out[1] % op->out[0] * op->stride[0] - op->before[0];
        const int32_t x0 = place % op->out[1] * op->stride[1] - op->before[1];
        const int32_t rows = op->count_padding * op->before[0];
        const int32_t columns = op->count_padding * op->before[1];
        const int32_t count =
            held(y0, op->kernel[0], -rows, op->in[0] + op->count_padding * op->after[0]) *
            held(x0, op->kernel[1], -columns, op->in[1] + op->count_padding * op->after[1]);
        int64_t sum = 0;
        for (int32_t y = y0; y < y0 + op->kernel[0]; y++) {
            for (int32_t k = x0; k < x0 + op->kernel[1]; k++) {
                if (y >= 0 && y < op->in[0] && k >= 0 && k < op->in[1]) {
                    sum += load(x, op->in_type, (image + y) * op->in[1] + k) - op->in_zero_point;
                }
            }
        }
        if (op->scale.multiplier) {
            int32_t row = 0;
            while (op->count[row] != count) {
                row++;
            }
            sum = scaled(sum, &op->scale, row);
        } else { /* one scale and zero point: divided as stored, ties away from zero */
            const int64_t stored = sum + (int64_t)count * op->in_zero_point;
            const int64_t size = ((stored < 0 ? -stored : stored) + count / 2) / count;
            sum = (stored < 0 ? -size : size) - op->store.zero_point;
        }
        store(&op->store, out, to++, sum);
    }
}

void cq_max_pool2d(const cq_pool_op *op, const void *x, void *out)
{
    int32_t to = 0;
    for (int32_t place = 0; place < op->images * op->out[0] * op->out[1]; place++) {
        const int32_t image = place / (op->out[0] * op->out[1]) * op->in[0];
        const int32_t y0 = place / op->out[1] % op->out[0] * op->stride[0] - op->before[0];
        const int32_t x0 = place % op->out[1] * op->stride[1] - op->before[1];
        int32_t largest = INT32_MIN;
        for (int32_t ky = 0; ky < op->kernel[0]; ky++) {
            for (int32_t kx = 0; kx < op->kernel[1]; kx++) {
                const int32_t y = y0 + ky * op->dilation[0], k = x0 + kx * op->dilation[1];
                if (y >= 0 && y < op->in[0] && k >= 0 && k < op->in[1]) {
                    const int32_t value = load(x, op->in_type, (image + y) * op->in[1] + k);
                    largest = value > largest ? value : largest;
                }
            }
        }
        save(out, op->store.type, to++, largest);
    }
}

/* Resizing ------------------------------------------------------------------------------------ */

/* Between two neighbours of a line, times `unit`, of which a pixel has so many. */
static int64_t between(int64_t first, int64_t second, int32_t position, int32_t unit)
{
    return first * unit + (second - first) * (position % unit);
}

void cq_resize_bilinear(const cq_resize_op *op, const void *x, void *out)
{
    const int32_t unit = (int32_t)1 << op->fraction, shift = 2 * op->fraction;
    const int64_t half = (int64_t)1 << (shift - 1);
    int32_t to = 0;
    for (int32_t line = 0; line < op->images * op->out[0]; line++) {
        const int32_t row = op->rows[line % op->out[0]], top = row / unit;
        const int32_t bottom = top + 1 < op->in[0] ? top + 1 : top;
        const int32_t image = line / op->out[0] * op->in[0];
        const int32_t upper = (image + top) * op->in[1], lower = (image + bottom) * op->in[1];
        for (int32_t i = 0; i < op->out[1]; i++) {
            const int32_t column = op->columns[i], left = column / unit;
            const int32_t right = left + 1 < op->in[1] ? left + 1 : left;
            const int64_t above = between(load(x, op->type, upper + left),
                                          load(x, op->type, upper + right), column, unit);
            const int64_t below = between(load(x, op->type, lower + left),
                                          load(x, op->type, lower + right), column, unit);
            const int64_t sum = between(above, below, row, unit) + half;
            save(out, op->type, to++, (int32_t)(sum >> shift));
        }
    }
}

/* Movement ------------------------------------------------------------------------------------ */

void cq_copy(const cq_copy_op *op, const void *x, void *out)
{
    const unsigned char *from = (const unsigned char *)x;
    unsigned char *to = (unsigned char *)out;
    const int32_t last = op->rank - 1, run = op->rank ? op->size[last] : 1;
    const int32_t dense = !op->rank || (op->in_step[last] == 1 && op->out_step[last] == 1);
    int32_t place[MOST_DIMENSIONS] = {0};
    int32_t a = op->in_offset, b = op->out_offset;
    do {
        if (dense) {
            memcpy(to + b * op->bytes, from + a * op->bytes, (size_t)(run * op->bytes));
        } else {
            for (int32_t i = 0; i < run; i++) {
                memcpy(to + (b + i * op->out_step[last]) * op->bytes,
                       from + (a + i * op->in_step[last]) * op->bytes, (size_t)op->bytes);
            }
        }
    } while (next(last, op->size, place, op->in_step, &a, op->out_step, &b));
}

void cq_fill(void *out, int32_t type, int32_t count, int32_t value)
{
    for (int32_t i = 0; i < count; i++) {
        save(out, type, i, value);
    }
}
