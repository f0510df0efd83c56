// The device of device.h on the host: kernels emulated, plain loops in place of cuBLAS, ggml's own converters.

#include "device.h"

#include <cstring>
#include <string>
#include <vector>

#include "memory.inc"

namespace bupo::emulated {

void * Device::Memory::allocate(size_t bytes) {
    return ::operator new(bytes);
}

void Device::Memory::release(void * data) {
    ::operator delete(data);
}

Device::Device(int, void *, bool precise) : memory_(std::make_unique<Memory>()), precise_(precise) {}

Device::~Device() = default;

void Device::enter() {}

void Device::zero(void * to, size_t bytes) {
    std::memset(to, 0, bytes);
}

void Device::copy(void * to, const void * from, size_t bytes) {
    std::memmove(to, from, bytes);
}

// Quantised tables take the way that on a GPU those in host memory take, so that it is tested.
bool Device::far(const ggml_tensor * tensor) {
    return ggml_is_quantized(tensor->type);
}

void Device::download(void * to, const void * from, size_t bytes) {
    std::memcpy(to, from, bytes);
}

void Device::upload(void * to, const void * from, size_t bytes) {
    std::memcpy(to, from, bytes);
}

// Matrix `batch` of a factor as `lines` runs of k values, along the other extent: k contiguous.
static std::vector<float> packed(const Factor & f, int64_t batch, int64_t lines, int64_t k, bool k_is_contiguous) {
    std::vector<float> out((size_t) (lines * k));
    const int64_t      k_step    = k_is_contiguous ? 1 : f.ld;
    const int64_t      line_step = k_is_contiguous ? f.ld : 1;
    for (int64_t line = 0; line < lines; ++line) {
        for (int64_t l = 0; l < k; ++l) {
            const int64_t at = batch * f.stride + line * line_step + l * k_step;
            out[(size_t) (line * k + l)] =
                f.kind == Kind::F32 ? static_cast<const float *>(f.data)[at] : to_float(static_cast<const half *>(f.data)[at]);
        }
    }
    return out;
}

static float dot(const float * a, const float * b, int64_t n) {
    float   lanes[16] = {};
    int64_t i         = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; ++j) {
            lanes[j] += a[i + j] * b[i + j];
        }
    }
    float sum = 0.0f;
    for (; i < n; ++i) {
        sum += a[i] * b[i];
    }
    for (float lane : lanes) {
        sum += lane;
    }
    return sum;
}

void Device::multiply(const Product & p, const Factor & a, const Factor & b, float * c, int64_t c_ld) {
    if (a.kind != b.kind) {
        throw Failure("a product of factors of two types");
    }
    const float alpha = p.alpha * (a.shrink ? *a.shrink : 1.0f) * (b.shrink ? *b.shrink : 1.0f);
    for (int64_t batch = 0; batch < p.batch; ++batch) {
        const std::vector<float> as = packed(a, batch, p.m, p.k, a.turned);
        const std::vector<float> bs = packed(b, batch, p.n, p.k, !b.turned);
        for (int64_t j = 0; j < p.n; ++j) {
            for (int64_t i = 0; i < p.m; ++i) {
                const float sum = dot(&as[(size_t) (i * p.k)], &bs[(size_t) (j * p.k)], p.k);
                float &     out = c[batch * p.stride + j * c_ld + i];
                out = alpha * sum + (p.beta == 0.0f ? 0.0f : p.beta * out);
            }
        }
    }
}

const void * Device::rows(const ggml_tensor * matrix, int64_t first, int64_t n, Kind kind) {
    const char * from = static_cast<const char *>(matrix->data) + first * (int64_t) matrix->nb[1];
    if (matrix->type == (kind == Kind::F32 ? GGML_TYPE_F32 : GGML_TYPE_F16)) {
        return from;
    }
    const size_t  count = (size_t) (n * matrix->ne[0]);
    const float * wide  = reinterpret_cast<const float *>(from);
    if (matrix->type != GGML_TYPE_F32) {
        const ggml_to_float_t convert = ggml_get_type_traits(matrix->type)->to_float;
        if (!convert) {
            throw Failure(std::string("no converter for ") + ggml_type_name(matrix->type));
        }
        float * out = floats(count);
        convert(from, out, (int64_t) count);
        wide = out;
    }
    if (kind == Kind::F32) {
        return wide;
    }
    half * out = static_cast<half *>(scratch(count * sizeof(half)));
    for (size_t i = 0; i < count; ++i) {
        out[i] = from_float<half>(wide[i]);
    }
    return out;
}

} // namespace bupo::emulated
