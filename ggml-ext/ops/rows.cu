// Rows scaled, and rows added up at ids. Twins: src/ops/rows.rs, and ggml's GGML_OP_GET_ROWS_BACK.

#include "device.h"

#include <cstring>
#include <string>
#include <vector>

namespace bupo::BUPO_DEVICE {

static __global__ void scale_rows(int n, const float * x, const float * factors, float * y) {
    const size_t skip   = (size_t) blockIdx.x * n;
    const float  factor = factors[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[skip + i] = factor * x[skip + i];
    }
}

// The block of the first of several equal ids adds them all up, in their order: so the sum does not depend on
// timing, as it would with atomic additions.
static __global__ void rows_back(int n, int n_ids, const float * d, const int * ids, float * y) {
    const int own    = blockIdx.x;
    const int id     = ids[own];
    int       before = 0;
    for (int i = threadIdx.x; i < own; i += blockDim.x) {
        before += ids[i] == id;
    }
    if (over_block<Sum>(before) > 0) {
        return;
    }
    float * row = y + (size_t) id * n;
    for (int other = own; other < n_ids; ++other) {
        if (ids[other] == id) {
            for (int i = threadIdx.x; i < n; i += blockDim.x) {
                row[i] += d[(size_t) other * n + i];
            }
        }
    }
}

void run_far_rows(Device & device, ggml_tensor * dst) {
    const ggml_tensor *  table = dst->src[0];
    const size_t         width = (size_t) table->ne[0];
    std::vector<int32_t> ids((size_t) dst->src[1]->ne[0]);
    std::vector<float>   rows(ids.size() * width);
    const auto           convert = ggml_get_type_traits(table->type)->to_float;
    if (table->type != GGML_TYPE_F32 && !convert) {
        throw Failure(std::string("no converter for ") + ggml_type_name(table->type));
    }
    device.download(ids.data(), dst->src[1]->data, ids.size() * sizeof(int32_t));
    for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0 || ids[i] >= table->ne[1]) {
            throw Failure("row " + std::to_string(ids[i]) + " of a table of " + std::to_string(table->ne[1]));
        }
        const char * row = static_cast<const char *>(table->data) + (size_t) ids[i] * table->nb[1];
        if (convert) {
            convert(row, &rows[i * width], (int64_t) width);
        } else {
            std::memcpy(&rows[i * width], row, width * sizeof(float));
        }
    }
    device.upload(dst->data, rows.data(), rows.size() * sizeof(float));
}

void run_scale_rows(Device & device, ggml_tensor * dst) {
    const int n = (int) dst->ne[0];
    device.launch(scale_rows, ggml_nrows(dst), threads_for(n), n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

void run_rows_back(Device & device, ggml_tensor * dst) {
    const int n     = (int) dst->ne[0];
    const int n_ids = (int) dst->src[1]->ne[0];
    device.zero(dst->data, ggml_nbytes(dst));
    device.launch(rows_back, (size_t) n_ids, threads_for(n), n, n_ids, data_of(dst->src[0]),
                  static_cast<const int *>(dst->src[1]->data), data_of(dst));
}

} // namespace bupo::BUPO_DEVICE
