// RMS norm and its vjp, a block per row. Twin: src/ops/norm.rs.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

// 1 / sqrt(mean(x^2) + eps) of a row.
__device__ static float inverse_rms(const float * x, int n, float eps) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        sum += x[i] * x[i];
    }
    return 1.0f / sqrtf(over_block<Sum>(sum) / (float) n + eps);
}

static __global__ void rms_norm(int n, const float * xs, const float * w, float eps, float * ys) {
    const float * x = xs + (size_t) blockIdx.x * n;
    float *       y = ys + (size_t) blockIdx.x * n;
    const float   r = inverse_rms(x, n, eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[i] = r * x[i] * w[i];
    }
}

static __global__ void rms_norm_back(int n, const float * xs, const float * w, const float * dys, const float * adds, float eps,
                                     float * dxs) {
    const size_t  skip = (size_t) blockIdx.x * n;
    const float * x    = xs + skip;
    const float * dy   = dys + skip;
    const float   r    = inverse_rms(x, n, eps);
    float         gx   = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        gx += dy[i] * w[i] * x[i];
    }
    const float c = r * r * r * over_block<Sum>(gx) / (float) n;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float dx = r * dy[i] * w[i] - c * x[i];
        dxs[skip + i] = adds ? dx + adds[skip + i] : dx;
    }
}

void run_rms_norm(Device & device, ggml_tensor * dst, const bupo_norm_params & params) {
    const int n = (int) dst->ne[0];
    device.launch(rms_norm, ggml_nrows(dst), threads_for(n), n, data_of(dst->src[0]), device.small(dst->src[1]), params.eps,
                  data_of(dst));
}

void run_rms_norm_back(Device & device, ggml_tensor * dst, const bupo_norm_params & params) {
    const int     n   = (int) dst->ne[0];
    const float * add = dst->src[3] ? data_of(dst->src[3]) : nullptr;
    device.launch(rms_norm_back, ggml_nrows(dst), threads_for(n), n, data_of(dst->src[0]), device.small(dst->src[1]),
                  data_of(dst->src[2]), add, params.eps, data_of(dst));
}

} // namespace bupo::BUPO_DEVICE
