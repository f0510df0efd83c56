// F32 activations and cotangents as F16 factors, scaled by a power of two so that the largest is just below a limit:
// cotangents are far smaller than F16's smallest value.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

// The largest |x|, as the bits of a float (which order as integers), into `*largest`, which is 0 before.
static __global__ void absolute_maximum(size_t n, const float * x, int * largest) {
    float max = 0.0f;
    for (size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (size_t) gridDim.x * blockDim.x) {
        max = Largest()(max, fabsf(x[i]));
    }
    max = over_block<Largest>(max);
    if (threadIdx.x == 0) {
        atomicMax(largest, __float_as_int(max));
    }
}

static __global__ void to_half(size_t n, const float * x, const int * largest, int exponent, half * y, float * shrink) {
    const float max      = __int_as_float(*largest);
    int         own      = 0;
    const bool  scalable = max > 0.0f && max < INFINITY;
    if (scalable) {
        frexpf(max, &own); // max < 2^own
    }
    // Within what a float and its inverse can be; a tensor that is not finite stays so.
    int power = scalable ? exponent - own : 0;
    power     = power > 100 ? 100 : power < -100 ? -100 : power;
    const float  scale = ldexpf(1.0f, power);
    const size_t i     = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = from_float<half>(scale * x[i]);
    }
    if (i == 0) {
        *shrink = ldexpf(1.0f, -power);
    }
}

Values Device::activations(const float * x, size_t n, Kind kind, int exponent) {
    if (kind == Kind::F32) {
        return { x, nullptr };
    }
    half *  y       = static_cast<half *>(scratch(n * sizeof(half)));
    int *   largest = static_cast<int *>(scratch(sizeof(int)));
    float * shrink  = floats(1);
    zero(largest, sizeof(int));
    launch(absolute_maximum, std::min<size_t>(blocks_for(n), 1024), THREADS, n, x, largest);
    launch(to_half, blocks_for(n), THREADS, n, x, (const int *) largest, exponent, y, shrink);
    return { y, shrink };
}

} // namespace bupo::BUPO_DEVICE
