// Entropy, divergence from another column, rank and likeliest tokens of many hidden states, in one pass over the
// vocabulary. Twin: src/ops/policies.rs, which has the formulas; here a block has one column.
//
// Products are F32 whatever the device is set to: these figures are to be looked at, and columns of very different
// size stand side by side.

#include "device.h"

#include <cmath>
#include <utility>
#include <vector>

namespace bupo::BUPO_DEVICE {

namespace {

// Running sums of a column, relative to its maximum; `forward` and `back` also to the maximum of the column that it is
// compared with.
struct Sums {
    float  max;
    int    best;  // the first token with it
    int    above; // tokens above the taken one
    float  taken; // its logit
    double sum;
    double weighted;
    double forward;
    double back;
};

// A token among the likeliest.
struct Ranked {
    float logit;
    int   token;
};

constexpr int FIXED = 7; // values of a column before its likeliest tokens

} // namespace

// Adds to what is there with `add`.
static __global__ void taken_logits(int d, float scale, bool add, const float * row, const float * h, float * out) {
    const float * x   = h + (size_t) blockIdx.x * d;
    float         sum = 0.0f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        sum += row[i] * x[i];
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = scale * sum + (add ? out[blockIdx.x] : 0.0f);
    }
}

static __global__ void start(int n, int top_k, Sums * sums, Ranked * ranked) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        sums[i] = { -INFINITY, 0, 0, NAN, 0.0, 0.0, 0.0, 0.0 };
        for (int k = 0; k < top_k; ++k) {
            ranked[(size_t) i * top_k + k] = { NAN, -1 };
        }
    }
}

// The largest of a column's logits in this tile and before.
static __device__ float highest(float before, const float * l, int width) {
    float own = before;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        own = Largest()(own, l[v]);
    }
    return over_block<Largest>(own);
}

// The sums after one tile of the vocabulary; reads those of the column's group, which others change, from `before`.
static __global__ void absorb(int group, int first, int width, const float * logits, const int * taken, const float * taken_logit,
                              const Sums * before, Sums * after) {
    const int     c    = blockIdx.x;
    const int     last = c / group * group + group - 1;
    const float * l    = logits + (size_t) c * width;
    const float * m    = logits + (size_t) last * width;
    Sums          s    = before[c];
    const Sums    o    = before[last];
    const float   max   = highest(s.max, l, width);
    const float   other = highest(o.max, m, width);
    if (s.sum > 0.0) {
        const double up = (double) max - (double) s.max, other_up = (double) other - (double) o.max;
        const double scale = exp(-up), other_scale = exp(-other_up);
        s.back     = other_scale * (s.back + (up - other_up) * o.sum);
        s.forward  = scale * (s.forward + (other_up - up) * s.sum);
        s.weighted = scale * (s.weighted - up * s.sum);
        s.sum *= scale;
    }
    double    sum = 0.0, weighted = 0.0, forward = 0.0, back = 0.0;
    int       best = INT32_MAX, above = 0;
    const int own  = taken ? taken[c] - first : -1;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        const float x = l[v] - max, y = m[v] - other;
        const float e = expf(x), f = expf(y);
        sum += (double) e;
        weighted += (double) (e * x);
        forward += (double) (e * (x - y));
        back -= (double) (f * (x - y));
        if (l[v] == max && v < best) {
            best = v;
        }
        // Summed in another order, the taken token is not above itself.
        above += taken && v != own && l[v] > taken_logit[c];
    }
    sum      = over_block<Sum>(sum);
    weighted = over_block<Sum>(weighted);
    forward  = over_block<Sum>(forward);
    back     = over_block<Sum>(back);
    best     = over_block<Smallest>(best);
    above    = over_block<Sum>(above);
    if (threadIdx.x == 0) {
        if (max > s.max) {
            s.max  = max;
            s.best = first + best;
        }
        s.sum += sum;
        s.weighted += weighted;
        s.forward += forward;
        s.back += back;
        s.above += above;
        if (own >= 0 && own < width) {
            s.taken = l[own];
        }
        after[c] = s;
    }
}

// Whether a token comes after another one, from the likeliest down, the first of equals before the others.
static __device__ bool comes_after(float logit, int token, Ranked known) {
    return logit < known.logit || (logit == known.logit && token > known.token);
}

// The likeliest tokens of the tile and of those before it, one after another.
static __global__ void rank_tile(int top_k, int first, int width, const float * logits, const Ranked * before, Ranked * after) {
    const float *  l    = logits + (size_t) blockIdx.x * width;
    const Ranked * old  = before + (size_t) blockIdx.x * top_k;
    Ranked         next = { INFINITY, -1 };
    for (int k = 0; k < top_k; ++k) {
        float best = -INFINITY;
        for (int v = threadIdx.x; v < width + top_k; v += blockDim.x) {
            const Ranked r = v < width ? Ranked{ l[v], first + v } : old[v - width];
            if (comes_after(r.logit, r.token, next) && r.logit > best) {
                best = r.logit;
            }
        }
        best      = over_block<Largest>(best);
        int token = INT32_MAX;
        for (int v = threadIdx.x; v < width + top_k; v += blockDim.x) {
            const Ranked r = v < width ? Ranked{ l[v], first + v } : old[v - width];
            if (comes_after(r.logit, r.token, next) && r.logit == best && r.token < token) {
                token = r.token;
            }
        }
        token = over_block<Smallest>(token);
        next  = { best, token };
        if (threadIdx.x == 0) {
            // Logits that are NaN or -inf are nobody's likeliest.
            after[(size_t) blockIdx.x * top_k + k] = best > -INFINITY ? next : Ranked{ NAN, -1 };
        }
    }
}

static __global__ void finish(int group, int top_k, bool has_taken, const Sums * sums, const Ranked * ranked, float * out) {
    const int    c     = blockIdx.x;
    const Sums   s     = sums[c];
    const Sums   o     = sums[c / group * group + group - 1];
    const double whole = (double) s.max + log(s.sum);
    float *      own   = out + (size_t) c * (FIXED + 2 * top_k);
    if (threadIdx.x == 0) {
        const double kl_to   = s.forward / s.sum - log(s.sum) + log(o.sum);
        const double kl_from = s.back / o.sum - log(o.sum) + log(s.sum);
        own[0] = (float) (log(s.sum) - s.weighted / s.sum);
        own[1] = (float) whole;
        own[2] = (float) s.best;
        own[3] = has_taken ? (float) ((double) s.taken - whole) : 0.0f;
        own[4] = (float) (1 + s.above);
        // Never below 0; what rounding makes of a zero is.
        own[5] = kl_to < 0.0 ? 0.0f : (float) kl_to;
        own[6] = kl_from < 0.0 ? 0.0f : (float) kl_from;
    }
    for (int k = threadIdx.x; k < top_k; k += blockDim.x) {
        const Ranked r         = ranked[(size_t) c * top_k + k];
        own[FIXED + k]         = (float) r.token;
        own[FIXED + top_k + k] = (float) ((double) r.logit - whole);
    }
}

void run_taken_logits(Device & device, ggml_tensor * dst, const bupo_taken_logits_params & params) {
    const ggml_tensor *  h   = dst->src[0];
    const ggml_tensor *  e_u = dst->src[1];
    const int64_t        d   = h->ne[0];
    std::vector<int32_t> ids((size_t) h->ne[1]);
    device.download(ids.data(), dst->src[2]->data, ids.size() * sizeof(int32_t));
    for (size_t c = 0; c < ids.size();) {
        // Columns of a group have the same token.
        size_t end = c;
        while (end < ids.size() && ids[end] == ids[c]) {
            ++end;
        }
        const Device::Scope scope(device);
        const float *       row = static_cast<const float *>(device.rows(e_u, ids[c], 1, Kind::F32));
        device.launch(taken_logits, end - c, threads_for(d), (int) d, params.map.scale, false, row,
                      (const float *) data_of(h) + c * (size_t) d, data_of(dst) + c);
        if (params.map.low_rank) {
            const ggml_tensor * b = dst->src[params.map.low_rank];
            const ggml_tensor * u = dst->src[params.map.low_rank + 1];
            const size_t        r = (size_t) b->ne[0];
            device.launch(taken_logits, end - c, threads_for((int64_t) r), (int) r, params.map.scale * params.map.low_scale, true,
                          (const float *) data_of(b) + (size_t) ids[c] * r, (const float *) data_of(u) + c * r, data_of(dst) + c);
        }
        c = end;
    }
    cap_logits(device, params.map, data_of(dst), ids.size());
}

void run_policies(Device & device, ggml_tensor * dst, const bupo_policies_params & params) {
    const ggml_tensor * h       = dst->src[0];
    const ggml_tensor * e_u     = dst->src[1];
    const int *         taken   = params.taken ? static_cast<const int *>(dst->src[2]->data) : nullptr;
    const float *       logit   = params.taken ? data_of(dst->src[3]) : nullptr;
    const int64_t       d       = h->ne[0];
    const int64_t       columns = h->ne[1];
    const int64_t       v       = e_u->ne[1];
    const int           group   = (int) params.group;
    const int           top_k   = (int) params.top_k;
    const int64_t       step    = std::max<int64_t>(1, TOKEN_TILE / group) * group;

    for (int64_t first = 0; first < columns; first += step) {
        const Device::Scope columns_tile(device);
        const int64_t       n      = std::min(step, columns - first);
        const int64_t       v_step = rows_of_tile((size_t) std::max(d, n) * sizeof(float));
        Sums *              sums[2];
        Ranked *            ranked[2];
        for (int i = 0; i < 2; ++i) {
            sums[i]   = static_cast<Sums *>(device.scratch((size_t) n * sizeof(Sums)));
            ranked[i] = static_cast<Ranked *>(device.scratch((size_t) (n * top_k) * sizeof(Ranked)));
        }
        device.launch(start, blocks_for((size_t) n), THREADS, (int) n, top_k, sums[0], ranked[0]);
        const Factor hidden = { data_of(h) + first * d, Kind::F32, d };
        for (int64_t vocab = 0; vocab < v; vocab += v_step) {
            const Device::Scope vocab_tile(device);
            const int64_t       width  = std::min(v_step, v - vocab);
            const void *        rows   = device.rows(e_u, vocab, width, Kind::F32); // [D, width]
            float *             logits = device.floats((size_t) (width * n));
            Product             product = { width, n, d };
            product.alpha = params.map.scale;
            device.multiply(product, { rows, Kind::F32, d, true }, hidden, logits, width);
            add_low_rank(device, dst, params.map, vocab, width, first, n, params.map.scale, logits);
            cap_logits(device, params.map, logits, (size_t) (width * n));
            device.launch(absorb, (size_t) n, THREADS, group, (int) vocab, (int) width, (const float *) logits,
                          taken ? taken + first : nullptr, logit ? logit + first : nullptr, (const Sums *) sums[0], sums[1]);
            std::swap(sums[0], sums[1]);
            if (top_k > 0) {
                device.launch(rank_tile, (size_t) n, THREADS, top_k, (int) vocab, (int) width, (const float *) logits,
                              (const Ranked *) ranked[0], ranked[1]);
                std::swap(ranked[0], ranked[1]);
            }
        }
        device.launch(finish, (size_t) n, 32u, group, top_k, taken != nullptr, (const Sums *) sums[0], (const Ranked *) ranked[0],
                      data_of(dst) + first * (FIXED + 2 * top_k));
    }
}

} // namespace bupo::BUPO_DEVICE
