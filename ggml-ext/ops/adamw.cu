// Sums of squares and the step of AdamW. Twin: src/ops/adamw.rs.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

// A block per BUPO_SUM_SQUARES_RUN values.
static __global__ void sum_squares(int64_t n, const float * x, float * sums) {
    const int64_t first = (int64_t) blockIdx.x * BUPO_SUM_SQUARES_RUN;
    float         sum   = 0.0f;
    for (int64_t i = first + threadIdx.x; i < n && i < first + BUPO_SUM_SQUARES_RUN; i += blockDim.x) {
        sum += x[i] * x[i];
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
    }
}

static __global__ void adamw(size_t n, float * p, const float * g, float * m, float * v, bupo_adamw_params c) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float gradient = c.clip * g[i];
        m[i] = c.beta1 * m[i] + (1.0f - c.beta1) * gradient;
        v[i] = c.beta2 * v[i] + (1.0f - c.beta2) * gradient * gradient;
        const float update = m[i] * c.unbias1 / (sqrtf(v[i] * c.unbias2) + c.eps);
        p[i] -= c.learning_rate * (update + c.weight_decay * p[i]);
    }
}

void run_sum_squares(Device & device, ggml_tensor * dst) {
    device.launch(sum_squares, (size_t) dst->ne[0], THREADS, ggml_nelements(dst->src[0]), data_of(dst->src[0]), data_of(dst));
}

void run_adamw(Device & device, ggml_tensor * dst, const bupo_adamw_params & params) {
    const size_t n = ggml_nelements(dst);
    device.launch(adamw, blocks_for(n), THREADS, n, data_of(dst), data_of(dst->src[1]), data_of(dst->src[2]),
                  data_of(dst->src[3]), params);
}

} // namespace bupo::BUPO_DEVICE
