// How far a student's distribution is from a teacher's over the whole vocabulary, and the gradient of that by the
// student's hidden states. Twin: src/ops/distill.rs, which has the formulas; here a block has one token. Products are F32,
// as in divergence.cu, for the terms of a small divergence cancel.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

namespace {

// D and sum p f of a token.
struct Sums {
    double value;
    double mean;
};

} // namespace

// From a product to the tempered logit, and its slope (but for factors of the product).
static __device__ Capped tempered(float z, float softcap, float inv_temperature) {
    const Capped logit = softcap > 0.0f ? capped(z, softcap) : Capped{ z, 1.0f };
    return { inv_temperature * logit.value, logit.slope };
}

// One token's part of a tile, `width` products of both sides: the teacher's become c w, the student's p w, which the sums of
// embeddings are weighted by.
static __global__ void absorb(int width, bupo_distill_params params, const float * lse_p, const float * lse_q, float * student,
                              float * teacher, Sums * sums) {
    const int t = blockIdx.x;
    float *   p = student + (size_t) t * width;
    float *   q = teacher + (size_t) t * width;
    double    value = 0.0, mean = 0.0;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        const Capped own   = tempered(p[v], params.student.softcap, params.inv_temperature);
        const float  log_p = own.value - lse_p[t];
        const float  log_q = tempered(q[v], params.teacher.softcap, params.inv_temperature).value - lse_q[t];
        const float  prob_p = expf(log_p), prob_q = expf(log_q);
        float        c;
        if (params.divergence == BUPO_REVERSE_KL) {
            c = prob_p * (log_p - log_q);
            value += (double) c;
            mean += (double) c;
        } else if (params.divergence == BUPO_FORWARD_KL) {
            c = prob_p - prob_q;
            value += (double) (prob_q * (log_q - log_p));
        } else {
            const float beta  = params.beta;
            const bool  above = log_p > log_q;
            const float rest  = above ? (1.0f - beta) + beta * expf(log_q - log_p) : beta + (1.0f - beta) * expf(log_p - log_q);
            const float log_m = (above ? log_p : log_q) + logf(fmaxf(rest, 1.17549435e-38f));
            c = (1.0f - beta) * prob_p * (log_p - log_m);
            value += (double) (beta * prob_q * (log_q - log_m) + c);
            mean += (double) c;
        }
        q[v] = c * own.slope;
        p[v] = prob_p * own.slope;
    }
    value = over_block<Sum>(value);
    mean  = over_block<Sum>(mean);
    if (threadIdx.x == 0) {
        sums[t].value += value;
        sums[t].mean += mean;
    }
}

// `second` is null for forward KL.
static __global__ void finish(int d, float factor, const Sums * sums, const float * first, const float * second, float * value,
                              float * gradient) {
    const int t = blockIdx.x;
    if (threadIdx.x == 0) {
        value[t] = (float) sums[t].value;
    }
    const float mean = (float) sums[t].mean;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        const size_t at = (size_t) t * d + i;
        gradient[at] = factor * (first[at] - (second ? mean * second[at] : 0.0f));
    }
}

void run_distill(Device & device, ggml_tensor * dst, const bupo_distill_params & params) {
    const int64_t d      = dst->src[0]->ne[0];
    const int64_t t      = dst->src[0]->ne[1];
    const int64_t v      = dst->src[1]->ne[1];
    const int64_t widest = std::max(d, dst->src[2]->ne[0]);
    const bool    pulls  = params.divergence != BUPO_FORWARD_KL;
    const float   factor = params.student.scale * params.inv_temperature;
    float *       out    = data_of(dst);

    for (int64_t first = 0; first < t; first += TOKEN_TILE) {
        const Device::Scope tokens_tile(device);
        const int64_t       n      = std::min(TOKEN_TILE, t - first);
        const int64_t       v_step = rows_of_tile((size_t) std::max(widest, n) * sizeof(float));
        Sums *              sums   = static_cast<Sums *>(device.scratch((size_t) n * sizeof(Sums)));
        float *             one    = device.floats((size_t) (d * n));
        float *             two    = pulls ? device.floats((size_t) (d * n)) : nullptr;
        device.zero(sums, (size_t) n * sizeof(Sums));
        device.zero(one, (size_t) (d * n) * sizeof(float));
        if (two) {
            device.zero(two, (size_t) (d * n) * sizeof(float));
        }
        for (int64_t vocab = 0; vocab < v; vocab += v_step) {
            const Device::Scope vocab_tile(device);
            const int64_t       width = std::min(v_step, v - vocab);
            const void *        rows[2];
            float *             products[2];
            for (int side = 0; side < 2; ++side) {
                const ggml_tensor * h = dst->src[2 * side];
                const int64_t       k = h->ne[0];
                rows[side]     = device.rows(dst->src[2 * side + 1], vocab, width, Kind::F32); // [D, width]
                products[side] = device.floats((size_t) (width * n));
                Product product = { width, n, k };
                product.alpha = side == 0 ? params.student.scale : params.teacher.scale;
                device.multiply(product, { rows[side], Kind::F32, k, true }, { data_of(h) + first * k, Kind::F32, k },
                                products[side], width);
            }
            device.launch(absorb, (size_t) n, THREADS, (int) width, params, (const float *) (data_of(dst->src[4]) + first),
                          (const float *) (data_of(dst->src[5]) + first), products[0], products[1], sums);
            Product running = { d, n, width };
            running.beta = 1.0f;
            device.multiply(running, { rows[0], Kind::F32, d }, { products[1], Kind::F32, width }, one, d);
            if (two) {
                device.multiply(running, { rows[0], Kind::F32, d }, { products[0], Kind::F32, width }, two, d);
            }
        }
        device.launch(finish, (size_t) n, threads_for(d), (int) d, factor, (const Sums *) sums, (const float *) one,
                      (const float *) two, out + first, out + t + first * d);
    }
}

} // namespace bupo::BUPO_DEVICE
