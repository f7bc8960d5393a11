/*
 * Integer kernels of a quantized network, in C99.
 *
 * No float, no allocation, nothing of the C library but <stdint.h> and <string.h>, no undefined
 * and no implementation-defined behaviour: shifts of negative numbers and conversions that do not
 * fit are written out. Every kernel computes what custom_quantizer/reference/numpy_runner.py
 * computes, bit for bit; docs/integer_bundle.md says what that is.
 *
 * Tensors lie as in PyTorch: contiguous, (batch, channel, height, width). Signals and volumes are
 * images with a height, or height and depth, of their own: sizes, strides and so on of a
 * convolution are always three numbers, depth, height, width.
 *
 * The compiler drops what a network does not call with -ffunction-sections -Wl,--gc-sections.
 */
#ifndef CQ_KERNELS_H
#define CQ_KERNELS_H

#include <stdint.h>

/* How integers are stored. CQ_S4: weights only, two to a byte, the first in the lower half. */
enum { CQ_S4, CQ_S8, CQ_S16 };

/* How an accumulator is brought to the scale of the output. */
enum {
    CQ_TWO_ROUNDINGS, /* 8-bit activations: gemmlowp, TensorFlow Lite */
    CQ_ONE_ROUNDING   /* 16-bit activations: TensorFlow Lite */
};

/* x * multiplier * 2^(shift - 31), rounded. With a step of 1, each output channel has its own. */
typedef struct {
    int32_t rule;
    int32_t step;
    const int32_t *multiplier;
    const int8_t *shift;
} cq_scale;

/* How a result is stored: plus zero_point, then clamped to [low, high]. */
typedef struct {
    int32_t type;
    int32_t zero_point;
    int32_t low;
    int32_t high;
} cq_store;

/* conv, conv_transpose. before: padding, or of conv_transpose what is cut off in front. */
typedef struct {
    int32_t batch;
    int32_t groups;
    int32_t in_channels;  /* of a group */
    int32_t out_channels; /* of a group */
    int32_t in[3];
    int32_t out[3];
    int32_t kernel[3];
    int32_t stride[3];
    int32_t dilation[3];
    int32_t before[3];
    int32_t in_type;
    int32_t in_zero_point;
    int32_t weight_type;
    int32_t wide; /* accumulators: 0 int32_t, 1 int64_t */
    cq_scale scale;
    cq_store store;
} cq_conv_op;

typedef struct {
    int32_t rows;
    int32_t in_features;
    int32_t out_features;
    int32_t in_type;
    int32_t in_zero_point;
    int32_t weight_type;
    int32_t wide;
    cq_scale scale;
    cq_store store;
} cq_linear_op;

/* Products of matrices; a step of 0 repeats a matrix along that dimension of the batch. */
typedef struct {
    int32_t rank; /* of the batch */
    const int32_t *size;
    const int32_t *a_step;
    const int32_t *b_step;
    int32_t rows;
    int32_t inner;
    int32_t columns;
    int32_t a_type;
    int32_t a_zero_point;
    int32_t b_type;
    int32_t b_zero_point;
    int32_t wide;
    cq_scale scale;
    cq_store store;
} cq_matmul_op;

/* add, sub, mul, maximum, minimum. A step of 0 repeats an operand along that dimension. */
enum { CQ_ADD, CQ_SUB, CQ_MUL, CQ_MAXIMUM, CQ_MINIMUM };
typedef struct {
    int32_t kind;
    int32_t rank;
    const int32_t *size;
    const int32_t *a_step;
    const int32_t *b_step;
    int32_t a_type;
    int32_t a_zero_point;
    int32_t b_type;
    int32_t b_zero_point;
    int32_t left_shift;
    cq_scale a_scale;
    cq_scale b_scale;
    cq_scale scale;
    cq_store store;
} cq_binary_op;

/* requantize */
typedef struct {
    int32_t count;
    int32_t in_type;
    int32_t in_zero_point;
    cq_scale scale;
    cq_store store;
} cq_requantize_op;

/* clamp: input and output have one type, scale and zero point. */
typedef struct {
    int32_t count;
    int32_t type;
    int32_t low;
    int32_t high;
} cq_clamp_op;

/* table[x - quant_min], of `channels` rows of `levels` entries in the type of the output. */
typedef struct {
    int32_t outer;
    int32_t channels;
    int32_t inner;
    int32_t levels;
    int32_t quant_min;
    int32_t in_type;
    int32_t out_type;
} cq_table_op;

/* mean: sums over the dimensions `summed` at each place of the dimensions `kept`. */
typedef struct {
    int32_t kept_rank;
    const int32_t *kept_size;
    const int32_t *kept_step;
    int32_t summed_rank;
    const int32_t *summed_size;
    const int32_t *summed_step;
    int32_t in_type;
    int32_t in_zero_point;
    cq_scale scale;
    cq_store store;
} cq_mean_op;

/*
 * avg_pool2d and max_pool2d. An average divides where `scale.multiplier` is 0; else it takes the
 * entry of `scale` at the place where `count` holds how many values the window has.
 */
typedef struct {
    int32_t images;
    int32_t in[2];
    int32_t out[2];
    int32_t kernel[2];
    int32_t stride[2];
    int32_t dilation[2];
    int32_t before[2];
    int32_t after[2];
    int32_t in_type;
    int32_t in_zero_point;
    int32_t count_padding;
    int32_t counts;
    const int32_t *count;
    cq_scale scale;
    cq_store store;
} cq_pool_op;

/* resize_bilinear. Positions are in units of 2^-fraction of a pixel of the input. */
typedef struct {
    int32_t images;
    int32_t in[2];
    int32_t out[2];
    int32_t type;
    int32_t fraction;
    const int32_t *rows;
    const int32_t *columns;
} cq_resize_op;

/* Moves elements of `bytes` bytes: all of permute, slice, select, expand, cat and pad. */
typedef struct {
    int32_t bytes;
    int32_t rank;
    const int32_t *size;
    const int32_t *in_step;
    const int32_t *out_step;
    int32_t in_offset;
    int32_t out_offset;
} cq_copy_op;

/* The requantization of a single accumulator: what all of the kernels below end with. */
int32_t cq_requantize_one(int64_t x, int32_t rule, int32_t multiplier, int32_t shift);

/*
 * `row` holds the accumulators of one row of the output: int32_t, or int64_t if the op is wide.
 * `bias` may be a null pointer.
 */
void cq_conv(const cq_conv_op *op, const void *x, const void *weight, const int32_t *bias,
             void *row, void *out);
/*
 * The same for many output channels: `window` holds what one position of the output sees, of the
 * type of the input, and each channel reads it at one go.
 */
void cq_conv_windows(const cq_conv_op *op, const void *x, const void *weight, const int32_t *bias,
                     void *window, void *out);
void cq_conv_transpose(const cq_conv_op *op, const void *x, const void *weight,
                       const int32_t *bias, void *row, void *out);
void cq_matmul(const cq_matmul_op *op, const void *a, const void *b, void *row, void *out);
void cq_linear(const cq_linear_op *op, const void *x, const void *weight, const int32_t *bias,
               void *out);
void cq_binary(const cq_binary_op *op, const void *a, const void *b, void *out);
void cq_mean(const cq_mean_op *op, const void *x, void *out);
void cq_avg_pool2d(const cq_pool_op *op, const void *x, void *out);
void cq_max_pool2d(const cq_pool_op *op, const void *x, void *out);
void cq_resize_bilinear(const cq_resize_op *op, const void *x, void *out);
void cq_copy(const cq_copy_op *op, const void *x, void *out);
void cq_fill(void *out, int32_t type, int32_t count, int32_t value);

/* These three may work in place: `out` may be `x` if both have one type. */
void cq_requantize(const cq_requantize_op *op, const void *x, void *out);
void cq_clamp(const cq_clamp_op *op, const void *x, void *out);
void cq_table(const cq_table_op *op, const void *x, const void *table, void *out);

#endif
