// How far two models' distributions are apart, token by token, in one pass over their vocabulary. Twin:
// src/ops/divergence.rs, which has the formula; here a block has one token. Products are F32, as in policies.cu.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

namespace {

// Running sums of one side, relative to its maximum.
struct Side {
    float  max;
    int    best;   // the first token with it
    float  target; // the target's logit, once it has been seen
    double sum;
};

struct Pair {
    Side   p, q;
    double cross; // sum e^(l_p - max_p) (l_p - l_q)
};

} // namespace

static __global__ void start(int n, Pair * pairs) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const Side nothing = { -INFINITY, 0, NAN, 0.0 };
        pairs[i] = { nothing, nothing, 0.0 };
    }
}

// Takes the maximum and the target's logit of a tile; gives the factor that older sums shrink by.
static __device__ double raise(Side & side, int first, int width, const float * l, int target) {
    float own = side.max;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        own = Largest()(own, l[v]);
    }
    const float max  = over_block<Largest>(own);
    int         best = INT32_MAX;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        if (l[v] == max && v < best) {
            best = v;
        }
    }
    best = over_block<Smallest>(best);
    if (target >= first && target - first < width) {
        side.target = l[target - first];
    }
    if (!(max > side.max)) {
        return 1.0;
    }
    const double scale = exp((double) side.max - (double) max);
    side.max  = max;
    side.best = first + best;
    side.sum *= scale;
    return scale;
}

static __global__ void absorb(int first, int width, const float * logits_p, const float * logits_q, const int * targets,
                              Pair * pairs) {
    const int     t = blockIdx.x;
    const float * p = logits_p + (size_t) t * width;
    const float * q = logits_q + (size_t) t * width;
    Pair          s = pairs[t];
    s.cross *= raise(s.p, first, width, p, targets[t]);
    raise(s.q, first, width, q, targets[t]);
    double sum_p = 0.0, sum_q = 0.0, cross = 0.0;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        const double e = (double) expf(p[v] - s.p.max);
        sum_p += e;
        sum_q += (double) expf(q[v] - s.q.max);
        cross += e * (double) (p[v] - q[v]);
    }
    sum_p = over_block<Sum>(sum_p);
    sum_q = over_block<Sum>(sum_q);
    cross = over_block<Sum>(cross);
    if (threadIdx.x == 0) {
        s.p.sum += sum_p;
        s.q.sum += sum_q;
        s.cross += cross;
        pairs[t] = s;
    }
}

static __global__ void finish(int n, int stride, const Pair * pairs, float * out) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < n) {
        const Pair   s     = pairs[t];
        const double lse_p = (double) s.p.max + log(s.p.sum);
        const double lse_q = (double) s.q.max + log(s.q.sum);
        out[t]              = (float) (s.cross / s.p.sum - lse_p + lse_q);
        out[stride + t]     = (float) ((double) s.p.target - lse_p);
        out[2 * stride + t] = (float) ((double) s.q.target - lse_q);
        out[3 * stride + t] = s.p.best == s.q.best ? 1.0f : 0.0f;
    }
}

void run_divergence(Device & device, ggml_tensor * dst, const bupo_divergence_params & params) {
    const int64_t t       = dst->src[0]->ne[1];
    const int64_t v       = dst->src[1]->ne[1];
    const int *   targets = static_cast<const int *>(dst->src[4]->data);
    const int64_t widest  = std::max(dst->src[0]->ne[0], dst->src[2]->ne[0]);

    for (int64_t first = 0; first < t; first += TOKEN_TILE) {
        const Device::Scope tokens_tile(device);
        const int64_t       n      = std::min(TOKEN_TILE, t - first);
        const int64_t       v_step = rows_of_tile((size_t) std::max(widest, n) * sizeof(float));
        Pair *              pairs  = static_cast<Pair *>(device.scratch((size_t) n * sizeof(Pair)));
        device.launch(start, blocks_for((size_t) n), THREADS, (int) n, pairs);
        for (int64_t vocab = 0; vocab < v; vocab += v_step) {
            const Device::Scope vocab_tile(device);
            const int64_t       width = std::min(v_step, v - vocab);
            float *             logits[2];
            for (int side = 0; side < 2; ++side) {
                const ggml_tensor * h   = dst->src[2 * side];
                const int64_t       d   = h->ne[0];
                const void *        e_u = device.rows(dst->src[2 * side + 1], vocab, width, Kind::F32); // [D, width]
                logits[side] = device.floats((size_t) (width * n));
                const bupo_logit_map & map = side == 0 ? params.p : params.q;
                Product product = { width, n, d };
                product.alpha = map.scale;
                device.multiply(product, { e_u, Kind::F32, d, true }, { data_of(h) + first * d, Kind::F32, d }, logits[side], width);
                add_low_rank(device, dst, map, vocab, width, first, n, map.scale, logits[side]);
                cap_logits(device, map, logits[side], (size_t) (width * n));
            }
            device.launch(absorb, (size_t) n, THREADS, (int) vocab, (int) width, (const float *) logits[0],
                          (const float *) logits[1], targets + first, pairs);
        }
        device.launch(finish, blocks_for((size_t) n), THREADS, (int) n, (int) t, (const Pair *) pairs, data_of(dst) + first);
    }
}

} // namespace bupo::BUPO_DEVICE
