// The softcap of logits where they are not taken into sums at once. Twin: src/ops/logits.rs.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

static __global__ void cap(size_t n, float softcap, float * logits) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        logits[i] = capped(logits[i], softcap).value;
    }
}

void cap_logits(Device & device, const bupo_logit_map & map, float * logits, size_t n) {
    if (map.softcap > 0.0f) {
        device.launch(cap, blocks_for(n), THREADS, n, map.softcap, logits);
    }
}

} // namespace bupo::BUPO_DEVICE
