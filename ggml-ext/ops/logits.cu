// The low-rank term of products with the unembedding, and the softcap of logits where they are not taken into sums at
// once. Twin: src/ops/logits.rs.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

static __global__ void cap(size_t n, float softcap, float * logits) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        logits[i] = capped(logits[i], softcap).value;
    }
}

void add_low_rank(Device & device, const ggml_tensor * dst, const bupo_logit_map & map, int64_t vocab, int64_t width, int64_t first,
                  int64_t n, float alpha, float * products) {
    if (map.low_rank == 0) {
        return;
    }
    const ggml_tensor * b    = dst->src[map.low_rank];
    const ggml_tensor * u    = dst->src[map.low_rank + 1];
    const int64_t       r    = b->ne[0];
    Product             term = { width, n, r };
    term.alpha = alpha * map.low_scale;
    term.beta  = 1.0f;
    device.multiply(term, { data_of(b) + vocab * r, Kind::F32, r, true }, { data_of(u) + first * r, Kind::F32, r }, products, width);
}

void cap_logits(Device & device, const bupo_logit_map & map, float * logits, size_t n) {
    if (map.softcap > 0.0f) {
        device.launch(cap, blocks_for(n), THREADS, n, map.softcap, logits);
    }
}

} // namespace bupo::BUPO_DEVICE
