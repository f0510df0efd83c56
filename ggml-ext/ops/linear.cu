// Linear maps with weights of any type, their vjp, and outer products. Twin: src/ops/linear.rs.
//
// A tile of weights is dequantised to the device's type of factors and multiplied by cuBLAS; low-rank terms, their
// gradients and F32 weights are multiplied in F32.

#include "device.h"

namespace bupo::BUPO_DEVICE {

static __global__ void add_bias(size_t n_all, int n, const float * bias, float * y) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n_all) {
        y[i] += bias[i % n];
    }
}

static Kind factors_with(const Device & device, const ggml_tensor * w) {
    return w->type == GGML_TYPE_F32 ? Kind::F32 : device.kind();
}

void run_linear(Device & device, ggml_tensor * dst, const bupo_linear_params & params) {
    const ggml_tensor * w    = dst->src[0];
    const int64_t       k    = w->ne[0];
    const int64_t       n    = dst->ne[0];
    const int64_t       t    = dst->ne[1];
    const Kind          kind = factors_with(device, w);
    float *             y    = data_of(dst);

    const Values  in   = device.activations(data_of(dst->src[1]), (size_t) (k * t), kind);
    const Factor  x    = { in.data, kind, k, false, 0, in.shrink };
    const int64_t step = rows_of_tile((size_t) k * size_of(kind));
    for (int64_t first = 0; first < n; first += step) {
        const Device::Scope tile(device);
        const int64_t       rows   = std::min(step, n - first);
        const Factor        weight = { device.rows(w, first, rows, kind), kind, k, true };
        device.multiply({ rows, t, k }, weight, x, y + first, n);
    }
    if (params.low_rank) {
        const int64_t r = dst->src[2]->ne[0];
        const Factor  b = { dst->src[2]->data, Kind::F32, r, true };
        const Factor  u = { dst->src[3]->data, Kind::F32, r };
        Product       term = { n, t, r };
        term.alpha = params.scale;
        term.beta  = 1.0f;
        device.multiply(term, b, u, y, n);
    }
    if (params.bias) {
        const float * bias = device.small(dst->src[2 + 2 * params.low_rank]);
        device.launch(add_bias, blocks_for((size_t) (n * t)), THREADS, (size_t) (n * t), (int) n, bias, y);
    }
}

void run_linear_back(Device & device, ggml_tensor * dst, const bupo_linear_params & params) {
    const ggml_tensor * w    = dst->src[0];
    const int64_t       k    = dst->ne[0];
    const int64_t       t    = dst->ne[1];
    const int64_t       n    = w->ne[1];
    const Kind          kind = factors_with(device, w);
    float *             dx   = data_of(dst);

    Product product = { k, t, n };
    if (params.add) {
        device.copy(dx, dst->src[2 + 2 * params.low_rank]->data, ggml_nbytes(dst));
        product.beta = 1.0f;
    }
    const Values  in   = device.activations(data_of(dst->src[1]), (size_t) (n * t), kind);
    const Factor  dy   = { in.data, kind, n, false, 0, in.shrink };
    const int64_t step = rows_of_tile((size_t) k * size_of(kind));
    for (int64_t first = 0; first < n; first += step) {
        const Device::Scope tile(device);
        product.k = std::min(step, n - first);
        const Factor weight = { device.rows(w, first, product.k, kind), kind, k };
        device.multiply(product, weight, dy.from(first), dx, k);
        product.beta = 1.0f;
    }
    if (params.low_rank) {
        const int64_t r  = dst->src[2]->ne[1];
        const Factor  a  = { dst->src[2]->data, Kind::F32, k };
        const Factor  du = { dst->src[3]->data, Kind::F32, r };
        Product       term = { k, t, r };
        term.alpha = params.scale;
        term.beta  = 1.0f;
        device.multiply(term, a, du, dx, k);
    }
}

void run_outer(Device & device, ggml_tensor * dst, const bupo_linear_params & params) {
    const int64_t k  = dst->ne[0];
    const int64_t n  = dst->ne[1];
    const Factor  x  = { dst->src[1]->data, Kind::F32, k };
    const Factor  dy = { dst->src[2]->data, Kind::F32, n, true };
    Product       product = { k, n, dst->src[1]->ne[1] };
    product.alpha = params.scale;
    product.beta  = 1.0f;
    device.multiply(product, x, dy, data_of(dst), k);
}

} // namespace bupo::BUPO_DEVICE
