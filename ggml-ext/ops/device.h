// What the kernels in this folder are written against: a device with a stream, scratch memory, matrix products
// and converters of the ggml types. device-cuda.cu is a GPU; device-host.cpp is the host, for tests (emulate.h).
//
// Each op's file is compiled once for either. `run_<op>` puts an op's work on the device's stream and returns at
// once; sources, shapes and formula are those of its twin src/ops/<op>.rs, which has checked them when the node
// was made. Whatever fails throws Failure; backend.cpp makes a status of it.
#pragma once

#include "../ggml-ext.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>

#ifdef BUPO_EMULATE
#    include "emulate.h"
#    define BUPO_DEVICE emulated
#else
#    include <cuda_fp16.h>
#    include <cuda_runtime.h>
#    define BUPO_DEVICE cuda
#endif

namespace bupo::BUPO_DEVICE {

using half = __half;

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Type of the factors of a matrix product; results are F32 always.
//
// F16 and not BF16, for it has three bits more: on the golden models gradients are off by up to 1.6 % instead of 9 %. What it
// lacks in range is made up by a power of two per tensor (Values).
enum class Kind { F32, F16 };

inline size_t size_of(Kind kind) {
    return kind == Kind::F32 ? sizeof(float) : sizeof(half);
}

// A tensor as factors; what it stands for is `data` times `*shrink`, a power of two in the device's memory (null: 1).
struct Values {
    const void *  data;
    const float * shrink;
};

// Column-major, as cuBLAS has it: element (i, j) of matrix b of a batch at data[b * stride + j * ld + i], or, turned,
// with i and j exchanged.
struct Factor {
    const void *  data;
    Kind          kind;
    int64_t       ld;
    bool          turned = false;
    int64_t       stride = 0;
    const float * shrink = nullptr; // as in Values

    // The same from element `n` on.
    Factor from(int64_t n) const {
        Factor out = *this;
        out.data   = static_cast<const char *>(data) + n * (int64_t) size_of(kind);
        return out;
    }
};

// C = alpha A B + beta C, A: m x k, B: k x n, C: m x n, `batch` times.
struct Product {
    int64_t m, n, k;
    float   alpha  = 1.0f;
    float   beta   = 0.0f;
    int64_t batch  = 1;
    int64_t stride = 0; // between the C of a batch
};

class Device {
public:
    // A GPU that computes on `stream` (a cudaStream_t); on the host both are ignored. `precise`: products of
    // dequantised weights and activations in F32 instead of F16.
    Device(int index, void * stream, bool precise);
    ~Device();
    Device(const Device &) = delete;
    Device & operator=(const Device &) = delete;

    // Before the first op of a graph: the calling thread may have been at another GPU.
    void enter();

    // Type in which weights and activations are multiplied.
    Kind kind() const { return precise_ ? Kind::F32 : Kind::F16; }

    // Memory until the innermost Scope ends. Padded, so that a converter which works in whole super-blocks may
    // write past the end.
    void *  scratch(size_t bytes);
    float * floats(size_t n) { return static_cast<float *>(scratch(n * sizeof(float))); }
    // Bytes that all scratch memory takes; it is kept for the next op.
    size_t  scratch_bytes() const;
    // Gives it back; nothing may be lent, and all work must be done.
    void    release();

    // Gives back the scratch memory lent in its life. Safe without waiting, for the next user's work stands behind
    // the last one's on the stream.
    class Scope {
    public:
        explicit Scope(Device & device);
        ~Scope();
        Scope(const Scope &) = delete;
        Scope & operator=(const Scope &) = delete;

    private:
        Device & device_;
        size_t   chunk_, used_, lent_;
    };

    void zero(void * to, size_t bytes);
    void copy(void * to, const void * from, size_t bytes);

    void multiply(const Product & product, const Factor & a, const Factor & b, float * c, int64_t c_ld);

    // Rows [first, first + n) of a matrix of any type, contiguous, in scratch or, where they need no converting,
    // where they lie.
    const void * rows(const ggml_tensor * matrix, int64_t first, int64_t n, Kind kind);

    // `n` floats as `kind`, in scratch or where they lie. As F16 they are scaled to at most 2^`exponent`.
    Values activations(const float * x, size_t n, Kind kind, int exponent = 14);

    // Whether a tensor lies where kernels cannot read it: a GPU's device and host memory.
    static bool far(const ggml_tensor * tensor);

    // Ids from the device's memory, once all work before is done.
    void download(void * to, const void * from, size_t bytes);
    void upload(void * to, const void * from, size_t bytes);

    // A small F32 tensor where kernels can read it: where it lies, or a copy if that is host memory.
    const float * small(const ggml_tensor * tensor);

#ifdef BUPO_EMULATE
    template <typename... P, typename... A> void launch(void (*kernel)(P...), size_t blocks, unsigned threads, A... args) {
        if (blocks > 0) {
            run_blocks({ grid(blocks), 1, 1 }, threads, [&] { kernel(args...); });
        }
    }
#else
    template <typename... P, typename... A> void launch(void (*kernel)(P...), size_t blocks, unsigned threads, A... args) {
        if (blocks > 0) {
            kernel<<<grid(blocks), threads, 0, stream_>>>(args...);
            check(cudaGetLastError(), "launching a kernel");
        }
    }
#endif

private:
    struct Memory;
    static unsigned grid(size_t blocks);

    std::unique_ptr<Memory> memory_;
    bool                    precise_;
#ifndef BUPO_EMULATE
    struct Blas;
    static void check(cudaError_t error, const char * what);

    int                   index_;
    cudaStream_t          stream_;
    std::unique_ptr<Blas> blas_;
#endif
};

// Threads of a block, and bytes of a tile of dequantised weights or of scores. Less on the host, where threads take
// turns and small tests should have several tiles.
#ifdef BUPO_EMULATE
constexpr unsigned THREADS    = 64;
constexpr size_t   TILE_BYTES = BUPO_EMULATED_TILE_BYTES;
constexpr int64_t  TOKEN_TILE = BUPO_EMULATED_TOKEN_TILE;
#else
constexpr unsigned THREADS    = 256;
constexpr size_t   TILE_BYTES = BUPO_GPU_TILE_BYTES;
constexpr int64_t  TOKEN_TILE = BUPO_GPU_TOKEN_TILE;
#endif

// Rows of `row_bytes` in a tile: multiples of 32, for the tensor cores and so that most super-blocks are whole.
inline int64_t rows_of_tile(size_t row_bytes) {
    return std::max<int64_t>(32, (int64_t) (TILE_BYTES / row_bytes) / 32 * 32);
}

// Rows of the unembedding, of `row_bytes`, in a tile, so that neither they nor their logits for a tile of `n` tokens
// are more than a tile.
inline int64_t vocab_step(int64_t row_bytes, int64_t n) {
    const int64_t t = std::min(n, TOKEN_TILE);
    return rows_of_tile((size_t) std::max<int64_t>(row_bytes, t * (int64_t) sizeof(float)));
}

// Whole warps for a row of n values.
inline unsigned threads_for(int64_t n) {
    return (unsigned) std::min<int64_t>(THREADS, std::max<int64_t>(32, (n + 31) / 32 * 32));
}

inline size_t blocks_for(size_t n) {
    return (n + THREADS - 1) / THREADS;
}

struct Sum {
    template <typename T> __device__ T operator()(T a, T b) const { return a + b; }
};

struct Largest {
    template <typename T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

struct Smallest {
    template <typename T> __device__ T operator()(T a, T b) const { return a < b ? a : b; }
};

// `combine` over all threads of the block, the same value for each. All threads must call it.
template <typename Combine, typename T> __device__ T over_block(T value) {
    __shared__ T parts[32];
    for (unsigned mask = 16; mask > 0; mask /= 2) {
        value = Combine()(value, __shfl_xor_sync(0xffffffffu, value, mask));
    }
    if (threadIdx.x % 32 == 0) {
        parts[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = parts[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) {
        value = Combine()(value, parts[warp]);
    }
    __syncthreads(); // `parts` may be written again
    return value;
}

__device__ inline float to_float(float x) {
    return x;
}

__device__ inline float to_float(half x) {
    return __half2float(x);
}

template <typename E> __device__ E from_float(float x);

template <> __device__ inline float from_float<float>(float x) {
    return x;
}

template <> __device__ inline half from_float<half>(float x) {
    return __float2half(x);
}

// Probabilities as factors are multiplied by this: those below 2^-24 would be lost in F16.
template <typename E> constexpr float PROBABILITY_SCALE = 1.0f;
template <> inline constexpr float PROBABILITY_SCALE<half> = 32768.0f;

// c tanh(x / c), and its slope.
struct Capped {
    float value;
    float slope;
};

__device__ inline Capped capped(float x, float c) {
    const float y = x / c;
    const float t = expf(-2.0f * fabsf(y)); // of it the slope, which 1 - tanh^2 would lose where tanh is 1
    return { c * tanhf(y), 4.0f * t / ((1.0f + t) * (1.0f + t)) };
}

inline float * data_of(const ggml_tensor * tensor) {
    return static_cast<float *>(tensor->data);
}

// Adds alpha * low_scale * B u, where a head has such a term, to the products of rows [vocab, vocab + width) with columns
// [first, first + n): `width` of each column after the other.
void add_low_rank(Device & device, const ggml_tensor * dst, const bupo_logit_map & map, int64_t vocab, int64_t width, int64_t first,
                  int64_t n, float alpha, float * products);

// Logits of the scaled products in `logits`, in place.
void cap_logits(Device & device, const bupo_logit_map & map, float * logits, size_t n);

// What bupo_backend_rates gives.
bupo_rates measure_rates(Device & device, int64_t n, size_t bytes, int reps);

void run_linear(Device & device, ggml_tensor * dst, const bupo_linear_params & params);
void run_linear_back(Device & device, ggml_tensor * dst, const bupo_linear_params & params);
void run_outer(Device & device, ggml_tensor * dst, const bupo_linear_params & params);
void run_logprob(Device & device, ggml_tensor * dst, const bupo_logprob_params & params);
void run_taken_logits(Device & device, ggml_tensor * dst, const bupo_taken_logits_params & params);
void run_policies(Device & device, ggml_tensor * dst, const bupo_policies_params & params);
void run_divergence(Device & device, ggml_tensor * dst, const bupo_divergence_params & params);
void run_distill(Device & device, ggml_tensor * dst, const bupo_distill_params & params);
void run_attention(Device & device, ggml_tensor * dst, const bupo_attention_params & params);
void run_attention_back(Device & device, ggml_tensor * dst, const bupo_attention_params & params);
void run_rms_norm(Device & device, ggml_tensor * dst, const bupo_norm_params & params);
void run_rms_norm_back(Device & device, ggml_tensor * dst, const bupo_norm_params & params);
void run_glu(Device & device, ggml_tensor * dst, const bupo_glu_params & params);
void run_glu_back(Device & device, ggml_tensor * dst, const bupo_glu_params & params);
void run_conv(Device & device, ggml_tensor * dst, const bupo_conv_params & params);
void run_conv_back(Device & device, ggml_tensor * dst, const bupo_conv_params & params);
void run_delta(Device & device, ggml_tensor * dst, const bupo_delta_params & params);
void run_delta_back(Device & device, ggml_tensor * dst, const bupo_delta_params & params);
void run_scale_rows(Device & device, ggml_tensor * dst);
void run_route(Device & device, ggml_tensor * dst, const bupo_route_params & params);
void run_route_back(Device & device, ggml_tensor * dst, const bupo_route_params & params);
void run_route_order(Device & device, ggml_tensor * dst, const bupo_order_params & params);
void run_experts(Device & device, ggml_tensor * dst, const bupo_experts_params & params);
void run_experts_outer(Device & device, ggml_tensor * dst, const bupo_experts_outer_params & params);
void run_slot_weights(Device & device, ggml_tensor * dst, const bupo_slots_params & params);
void run_weights_back(Device & device, ggml_tensor * dst, const bupo_slots_params & params);
void run_gate_rows(Device & device, ggml_tensor * dst);
void run_gate_rows_back(Device & device, ggml_tensor * dst);
void run_sum_squares(Device & device, ggml_tensor * dst);
void run_adamw(Device & device, ggml_tensor * dst, const bupo_adamw_params & params);
// ggml's own GGML_OP_GET_ROWS of a table in host memory, where llama.cpp keeps the token embedding.
void run_far_rows(Device & device, ggml_tensor * dst);
// ggml's own GGML_OP_GET_ROWS_BACK; its CUDA kernel takes time of rows x ids x width.
void run_rows_back(Device & device, ggml_tensor * dst);

} // namespace bupo::BUPO_DEVICE
