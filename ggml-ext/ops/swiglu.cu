// silu(gate) * up and its vjp, a thread per value. Twin: src/ops/swiglu.rs.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

static __global__ void swiglu(size_t n, const float * gate, const float * up, float * h) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        h[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}

static __global__ void swiglu_back(size_t n, const float * gate, const float * up, const float * dh, float * d_gate, float * d_up) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float g = gate[i];
        const float s = 1.0f / (1.0f + expf(-g));
        d_up[i]   = dh[i] * g * s;
        d_gate[i] = dh[i] * up[i] * s * (1.0f + g * (1.0f - s));
    }
}

void run_swiglu(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst);
    device.launch(swiglu, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

void run_swiglu_back(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst->src[0]);
    device.launch(swiglu_back, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst->src[2]),
                  data_of(dst), data_of(dst) + n);
}

} // namespace bupo::BUPO_DEVICE
