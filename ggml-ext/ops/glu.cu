// A gate and its vjp, a thread per value. Twin: src/ops/glu.rs, which has the formulas.

#include "device.h"

#include <cmath>
#include <string>

namespace bupo::BUPO_DEVICE {

namespace {

// act(g) and its slope.
struct Gate {
    float value;
    float slope;
};

struct Silu {
    __device__ Gate operator()(float g) const {
        const float s = 1.0f / (1.0f + expf(-g));
        return { g * s, s * (1.0f + g * (1.0f - s)) };
    }
};

struct Sigmoid {
    __device__ Gate operator()(float g) const {
        const float s = 1.0f / (1.0f + expf(-g));
        return { s, s / (1.0f + expf(g)) };
    }
};

struct Gelu {
    __device__ Gate operator()(float g) const {
        constexpr float A = 0.044715f;
        constexpr float K = 1.5957692f; // 2 sqrt(2/pi)
        const float x      = fminf(fmaxf(g, -10.0f), 10.0f);
        const float square = x * x;
        const float e      = expf(-K * x * (1.0f + A * square));
        const float s      = 1.0f / (1.0f + e);
        return { g * s, s * (1.0f + x * (K * (1.0f + 3.0f * A * square)) * (e * s)) };
    }
};

} // namespace

template <typename Act> static __global__ void glu(size_t n, const float * gate, const float * up, float * y) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = Act()(gate[i]).value * up[i];
    }
}

template <typename Act>
static __global__ void glu_back(size_t n, const float * gate, const float * up, const float * dy, float * d_gate, float * d_up) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const Gate act = Act()(gate[i]);
        d_up[i]   = dy[i] * act.value;
        d_gate[i] = dy[i] * up[i] * act.slope;
    }
}

// gpt-oss's gate and line, which are cut off.
constexpr float LIMIT     = 7.0f;
constexpr float STEEPNESS = 1.702f;

static __global__ void clamped_swiglu(size_t n, const float * gate, const float * up, float * y) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float a = fminf(gate[i], LIMIT);
        const float s = 1.0f / (1.0f + expf(-STEEPNESS * fmaxf(a, -50.0f)));
        y[i] = a * s * (fminf(fmaxf(up[i], -LIMIT), LIMIT) + 1.0f);
    }
}

static __global__ void clamped_swiglu_back(size_t n, const float * gate, const float * up, const float * dy, float * d_gate,
                                           float * d_up) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float a    = fminf(gate[i], LIMIT);
        const float s    = 1.0f / (1.0f + expf(-STEEPNESS * fmaxf(a, -50.0f)));
        const float line = fminf(fmaxf(up[i], -LIMIT), LIMIT) + 1.0f;
        d_gate[i] = gate[i] <= LIMIT ? dy[i] * line * s * (1.0f + STEEPNESS * a * (1.0f - s)) : 0.0f;
        d_up[i]   = fabsf(up[i]) <= LIMIT ? dy[i] * a * s : 0.0f;
    }
}

template <typename Act> static void forward(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst);
    device.launch(glu<Act>, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

template <typename Act> static void backward(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst->src[0]);
    device.launch(glu_back<Act>, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst->src[2]),
                  data_of(dst), data_of(dst) + n);
}

static void clamped_forward(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst);
    device.launch(clamped_swiglu, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

static void clamped_backward(Device & device, ggml_tensor * dst) {
    const size_t n = ggml_nelements(dst->src[0]);
    device.launch(clamped_swiglu_back, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst->src[2]),
                  data_of(dst), data_of(dst) + n);
}

[[noreturn]] static void refuse(uint32_t activation) {
    throw Failure("activation " + std::to_string(activation) + " is not known here");
}

void run_glu(Device & device, ggml_tensor * dst, const bupo_glu_params & params) {
    switch (params.activation) {
        case BUPO_ACTIVATION_SILU:           return forward<Silu>(device, dst);
        case BUPO_ACTIVATION_GELU:           return forward<Gelu>(device, dst);
        case BUPO_ACTIVATION_SIGMOID:        return forward<Sigmoid>(device, dst);
        case BUPO_ACTIVATION_CLAMPED_SWIGLU: return clamped_forward(device, dst);
        default:                             refuse(params.activation);
    }
}

void run_glu_back(Device & device, ggml_tensor * dst, const bupo_glu_params & params) {
    switch (params.activation) {
        case BUPO_ACTIVATION_SILU:           return backward<Silu>(device, dst);
        case BUPO_ACTIVATION_GELU:           return backward<Gelu>(device, dst);
        case BUPO_ACTIVATION_SIGMOID:        return backward<Sigmoid>(device, dst);
        case BUPO_ACTIVATION_CLAMPED_SWIGLU: return clamped_backward(device, dst);
        default:                             refuse(params.activation);
    }
}

} // namespace bupo::BUPO_DEVICE
