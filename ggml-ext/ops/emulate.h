// CUDA's kernel language on the host, as much of it as ops/*.cu use: a block is a set of fibres on one
// thread of the system that take turns at every barrier and shuffle.
//
// Exact where it matters for a test: barriers must be reached by all threads of a block, and shuffles by all
// lanes of a warp, or the process stops with a word on it; and the order in which threads run is turned around
// from barrier to barrier and from block to block, so that a missing barrier changes results.
#pragma once

#include "ggml.h"

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local

namespace bupo::emulated {

struct Index {
    unsigned x = 0;
    unsigned y = 0;
    unsigned z = 0;
};

extern thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// What __syncthreads() is on the device.
void __syncthreads();

// Runs `body` for every thread of every block.
void run_blocks(Index grid, unsigned threads, const std::function<void()> & body);

uint64_t shuffle_bits(uint64_t bits, unsigned lane_mask);

template <typename T> T __shfl_xor_sync(unsigned, T value, unsigned lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle_bits(bits, lane_mask);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

struct __half {
    ggml_fp16_t bits;
};

inline float __half2float(__half x) {
    return ggml_fp16_to_fp32(x.bits);
}

inline __half __float2half(float x) {
    return { ggml_fp32_to_fp16(x) };
}

inline int __float_as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}

inline float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}

inline int atomicMax(int * at, int value) {
    const int before = *at;
    *at = before > value ? before : value;
    return before;
}

} // namespace bupo::emulated
