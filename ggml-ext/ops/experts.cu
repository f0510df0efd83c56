// Mixtures of experts: routes, products with stacked weights in both directions, gradients of the experts' adapters, and what
// stands between slots and a token's weights. Twins: src/ops/experts/ and src/ops/gate_rows.rs, which have the formulas.
//
// Where each expert's slots begin is read back from the device, for cuBLAS is told sizes by the host. Experts follow one
// another on the stream, so that sums by token are formed in their order.

#include "device.h"

#include <cmath>
#include <vector>

namespace bupo::BUPO_DEVICE {

namespace {

constexpr float FLOOR = 6.1035156e-5f;

struct Choice {
    float value;
    int   expert; // -1: none yet
};

} // namespace

__device__ static void softmax_of(int n, float * x) {
    float max = -INFINITY;
    for (int i = 0; i < n; ++i) {
        max = Largest()(max, x[i]);
    }
    float sum = 0.0f;
    for (int i = 0; i < n; ++i) {
        x[i] = expf(x[i] - max);
        sum += x[i];
    }
    for (int i = 0; i < n; ++i) {
        x[i] /= sum;
    }
}

// Probabilities of all experts; of BUPO_GATING_CHOSEN the logits themselves.
__device__ static void probabilities(uint32_t gating, int n, const float * logits, float * p) {
    for (int i = 0; i < n; ++i) {
        p[i] = gating == BUPO_GATING_SIGMOID ? 1.0f / (1.0f + expf(-logits[i])) : logits[i];
    }
    if (gating == BUPO_GATING_SOFTMAX) {
        softmax_of(n, p);
    }
}

// Weights of the chosen ones from their probabilities, in place, without the scale; gives what they were divided by.
__device__ static float weigh(const bupo_route_params & params, float * w) {
    const int used = (int) params.used;
    if (params.gating == BUPO_GATING_CHOSEN) {
        softmax_of(used, w);
    }
    if (!params.normalise) {
        return 1.0f;
    }
    float sum = 0.0f;
    for (int k = 0; k < used; ++k) {
        sum += w[k];
    }
    sum = Largest()(sum, FLOOR);
    for (int k = 0; k < used; ++k) {
        w[k] /= sum;
    }
    return sum;
}

// The likeliest experts, the lower of equals, into `experts` in ascending order.
__device__ static void choose(int n, int used, const float * p, const float * bias, float * experts) {
    Choice last = { INFINITY, -1 };
    for (int k = 0; k < used; ++k) {
        Choice best = { -INFINITY, -1 };
        for (int e = 0; e < n; ++e) {
            const float value = p[e] + (bias ? bias[e] : 0.0f);
            const bool  left  = value < last.value || (value == last.value && e > last.expert);
            if (left && (best.expert < 0 || value > best.value)) {
                best = { value, e };
            }
        }
        if (best.expert < 0) {
            best.expert = k; // not a number
        }
        int at = k;
        for (; at > 0 && experts[at - 1] > (float) best.expert; --at) {
            experts[at] = experts[at - 1];
        }
        experts[at] = (float) best.expert;
        last = best;
    }
}

// A thread per token; `p` is scratch for the probabilities of all.
static __global__ void route(int n_tokens, int n, bupo_route_params params, const float * logits, const float * bias,
                             const float * given, float * p, float * out) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n_tokens) {
        return;
    }
    const int used    = (int) params.used;
    float *   weights = out + (size_t) t * used;
    float *   experts = out + (size_t) (n_tokens + t) * used;
    p += (size_t) t * n;
    probabilities(params.gating, n, logits + (size_t) t * n, p);
    if (given && given[(size_t) t * used] >= 0.0f) {
        for (int k = 0; k < used; ++k) {
            experts[k] = given[(size_t) t * used + k];
        }
    } else {
        choose(n, used, p, bias, experts);
    }
    for (int k = 0; k < used; ++k) {
        weights[k] = p[(int) experts[k]];
    }
    weigh(params, weights);
    for (int k = 0; k < used; ++k) {
        weights[k] *= params.scale;
    }
}

// A thread per token; `p` and `w` are scratch, [n] and [2 used] of each.
static __global__ void route_back(int n_tokens, int n, bupo_route_params params, const float * logits, const float * experts,
                                  const float * d_weights, float * p, float * w, float * d) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= n_tokens) {
        return;
    }
    const int used = (int) params.used;
    float *   dw   = w + (size_t) (2 * t + 1) * used;
    p += (size_t) t * n;
    w += (size_t) 2 * t * used;
    d += (size_t) t * n;
    experts += (size_t) t * used;
    probabilities(params.gating, n, logits + (size_t) t * n, p);
    float mean = 0.0f;
    for (int k = 0; k < used; ++k) {
        w[k]  = p[(int) experts[k]];
        dw[k] = d_weights[(size_t) t * used + k] * params.scale;
    }
    const float by = weigh(params, w);
    if (params.normalise) {
        for (int k = 0; k < used; ++k) {
            mean += by > FLOOR ? w[k] * dw[k] : 0.0f;
        }
        for (int k = 0; k < used; ++k) {
            dw[k] = (dw[k] - mean) / by;
        }
    }
    mean = 0.0f;
    for (int k = 0; k < used; ++k) {
        w[k] = p[(int) experts[k]];
    }
    if (params.gating == BUPO_GATING_CHOSEN) {
        softmax_of(used, w);
    }
    for (int k = 0; k < used; ++k) {
        mean += w[k] * dw[k];
    }
    for (int e = 0; e < n; ++e) {
        d[e] = params.gating == BUPO_GATING_SOFTMAX ? -p[e] * mean : 0.0f;
    }
    for (int k = 0; k < used; ++k) {
        float & out = d[(int) experts[k]];
        switch (params.gating) {
            case BUPO_GATING_SOFTMAX: out += w[k] * dw[k]; break;
            case BUPO_GATING_SIGMOID: out = w[k] * (1.0f - w[k]) * dw[k]; break;
            default:                  out = w[k] * (dw[k] - mean); break;
        }
    }
}

// Columns of the tokens of slots [first, first + gridDim.x), one after another.
template <typename E>
static __global__ void gather(int n, int used, const float * places, const E * x, E * packed) {
    const size_t token = (size_t) ((int) places[blockIdx.x] / used);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        packed[(size_t) blockIdx.x * n + i] = x[token * n + i];
    }
}

// A slot's column, times its weight, to its token's. Within an expert no token comes twice.
static __global__ void scatter(int n, int used, const float * places, const float * weights, const float * y, float * sums) {
    const size_t token = (size_t) ((int) places[blockIdx.x] / used);
    const float  by    = weights ? weights[blockIdx.x] : 1.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        sums[token * n + i] += by * y[(size_t) blockIdx.x * n + i];
    }
}

static __global__ void add_expert_bias(int n, const float * bias, float * y) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[(size_t) blockIdx.x * n + i] += bias[i];
    }
}

static __global__ void slot_weights(size_t n, const float * weights, const float * places, float * y) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = weights[(int) places[i]];
    }
}

// A block per place of [used, T].
static __global__ void weights_back(int n, int used, int n_expert, int d, const float * g, const float * h, const float * begins,
                                    const float * slots, const float * bias, const float * dy, float * dw) {
    const int    place = blockIdx.x;
    const int    slot  = (int) slots[place];
    const size_t skip  = (size_t) slot * n;
    float        sum   = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        sum += g[skip + i] * h[skip + i];
    }
    if (bias) {
        int expert = 0;
        while (expert + 1 < n_expert && (int) begins[expert + 1] <= slot) {
            ++expert;
        }
        for (int i = threadIdx.x; i < d; i += blockDim.x) {
            sum += bias[(size_t) expert * d + i] * dy[(size_t) (place / used) * d + i];
        }
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) {
        dw[place] = sum;
    }
}

static __global__ void gate_rows(int n, const float * x, const float * gate, float * y) {
    const size_t skip = (size_t) blockIdx.x * n;
    const float  s    = 1.0f / (1.0f + expf(-gate[blockIdx.x]));
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        y[skip + i] = s * x[skip + i];
    }
}

static __global__ void gate_rows_back(int n, const float * x, const float * gate, const float * dy, float * dx, float * dg) {
    const size_t skip = (size_t) blockIdx.x * n;
    const float  s    = 1.0f / (1.0f + expf(-gate[blockIdx.x]));
    float        sum  = 0.0f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        dx[skip + i] = s * dy[skip + i];
        sum += dy[skip + i] * x[skip + i];
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) {
        dg[blockIdx.x] = s * (1.0f - s) * sum;
    }
}

namespace {

// The order of slots: see `Routes` in src/ops/experts/mod.rs.
struct Order {
    const float *      places;
    const float *      begins_there;
    const float *      slots;
    std::vector<float> begins;
    int                used;

    Order(Device & device, const ggml_tensor * order, uint32_t n_expert, uint32_t used) : begins(n_expert + 1), used((int) used) {
        const int64_t s = (order->ne[0] - n_expert - 1) / 2;
        places       = data_of(order);
        begins_there = places + s;
        slots        = begins_there + n_expert + 1;
        device.download(begins.data(), begins_there, begins.size() * sizeof(float));
    }

    int64_t begin(size_t expert) const { return (int64_t) begins[expert]; }
    int64_t count(size_t expert) const { return (int64_t) begins[expert + 1] - begin(expert); }
};

// Columns of an expert's slots as a factor: where they lie, or packed.
const void * columns(Device & device, const Order & order, size_t expert, bool by_token, const void * x, int64_t n, Kind kind) {
    const size_t first = (size_t) order.begin(expert), count = (size_t) order.count(expert);
    if (!by_token) {
        return static_cast<const char *>(x) + first * n * size_of(kind);
    }
    void * packed = device.scratch(count * n * size_of(kind));
    if (kind == Kind::F32) {
        device.launch(gather<float>, count, threads_for(n), (int) n, order.used, order.places + first,
                      static_cast<const float *>(x), static_cast<float *>(packed));
    } else {
        device.launch(gather<half>, count, threads_for(n), (int) n, order.used, order.places + first,
                      static_cast<const half *>(x), static_cast<half *>(packed));
    }
    return packed;
}

// W_e x, or W_e^T x, of all slots of an expert.
void product(Device & device, const ggml_tensor * w, size_t expert, bool transposed, const Factor & x, int64_t count, Kind kind,
             float * y) {
    const int64_t k = w->ne[0], n = w->ne[1], from = (int64_t) expert * n;
    const int64_t step = rows_of_tile((size_t) k * size_of(kind));
    float         beta = 0.0f;
    for (int64_t first = 0; first < n; first += step) {
        const Device::Scope tile(device);
        const int64_t       rows   = std::min(step, n - first);
        const Factor        weight = { device.rows(w, from + first, rows, kind), kind, k, !transposed };
        if (!transposed) {
            device.multiply({ rows, count, k }, weight, x, y + first, n);
            continue;
        }
        Product part = { k, count, rows };
        part.beta = beta;
        device.multiply(part, weight, x.from(first), y, k);
        beta = 1.0f;
    }
}

} // namespace

void run_route(Device & device, ggml_tensor * dst, const bupo_route_params & params) {
    const int     n      = (int) dst->src[0]->ne[0];
    const int     t      = (int) dst->src[0]->ne[1];
    const float * bias   = params.bias ? data_of(dst->src[1]) : nullptr;
    const float * given  = params.given ? data_of(dst->src[1 + params.bias]) : nullptr;
    float *       p      = device.floats((size_t) n * t);
    device.launch(route, blocks_for((size_t) t), THREADS, t, n, params, data_of(dst->src[0]), bias, given, p, data_of(dst));
}

void run_route_back(Device & device, ggml_tensor * dst, const bupo_route_params & params) {
    const int n = (int) dst->ne[0];
    const int t = (int) dst->ne[1];
    float *   p = device.floats((size_t) n * t);
    float *   w = device.floats((size_t) 2 * params.used * t);
    device.launch(route_back, blocks_for((size_t) t), THREADS, t, n, params, data_of(dst->src[0]), data_of(dst->src[1]),
                  data_of(dst->src[2]), p, w, data_of(dst));
}

// On the host: some thousand numbers, whose order is needed there in any case.
void run_route_order(Device & device, ggml_tensor * dst, const bupo_order_params & params) {
    const size_t       s = (size_t) ggml_nelements(dst->src[0]), n = params.n_expert;
    std::vector<float> experts(s), order(2 * s + n + 1);
    device.download(experts.data(), dst->src[0]->data, s * sizeof(float));
    const auto          expert = [&](size_t place) { return std::min((size_t) experts[place], n - 1); };
    std::vector<size_t> next(n + 1);
    for (size_t place = 0; place < s; ++place) {
        ++next[expert(place) + 1];
    }
    for (size_t e = 1; e <= n; ++e) {
        next[e] += next[e - 1];
    }
    for (size_t e = 0; e <= n; ++e) {
        order[s + e] = (float) next[e];
    }
    for (size_t place = 0; place < s; ++place) {
        const size_t slot = next[expert(place)]++;
        order[slot]              = (float) place;
        order[s + n + 1 + place] = (float) slot;
    }
    device.upload(dst->data, order.data(), order.size() * sizeof(float));
}

void run_experts(Device & device, ggml_tensor * dst, const bupo_experts_params & params) {
    const ggml_tensor * w     = dst->src[0];
    const bool          back  = params.transposed != 0;
    const int64_t       n_in  = dst->src[1]->ne[0];
    const int64_t       n_out = dst->ne[0];
    const Kind          kind  = w->type == GGML_TYPE_F32 ? Kind::F32 : device.kind();
    const Order         order(device, dst->src[2], params.n_expert, params.used);
    int                 next   = 3;
    const auto          source = [&](uint32_t there) { return there ? data_of(dst->src[next++]) : nullptr; };
    const int64_t       rank   = params.low_rank ? dst->src[4]->ne[0] : 0;
    const float *       factor = source(params.low_rank);
    const float *       u      = source(params.low_rank);
    const float *       weight = source(params.weights);
    const float *       bias   = params.bias ? device.small(dst->src[next++]) : nullptr;
    const float *       add    = source(params.add);
    float *             out    = data_of(dst);
    if (params.sum && add) {
        device.copy(out, add, ggml_nbytes(dst));
    } else if (params.sum) {
        device.zero(out, ggml_nbytes(dst));
    }
    const Values in = device.activations(data_of(dst->src[1]), (size_t) ggml_nelements(dst->src[1]), kind);
    for (size_t e = 0; e < params.n_expert; ++e) {
        const int64_t first = order.begin(e), count = order.count(e);
        if (count == 0) {
            continue;
        }
        const Device::Scope scope(device);
        const Factor x = { columns(device, order, e, params.tokens_in, in.data, n_in, kind), kind, n_in, false, 0, in.shrink };
        float *      y = params.sum ? device.floats((size_t) (n_out * count)) : out + first * n_out;
        product(device, w, e, back, x, count, kind, y);
        if (params.low_rank) {
            const float * own  = factor + (int64_t) e * n_out * rank;
            const Factor  a    = { own, Kind::F32, back ? n_out : rank, !back };
            Product       term = { n_out, count, rank };
            term.alpha = params.scale;
            term.beta  = 1.0f;
            device.multiply(term, a, { u + first * rank, Kind::F32, rank }, y, n_out);
        }
        if (bias) {
            device.launch(add_expert_bias, (size_t) count, threads_for(n_out), (int) n_out, bias + (int64_t) e * n_out, y);
        }
        if (params.sum) {
            device.launch(scatter, (size_t) count, threads_for(n_out), (int) n_out, order.used, order.places + first,
                          weight ? weight + first : nullptr, (const float *) y, out);
        }
    }
}

void run_experts_outer(Device & device, ggml_tensor * dst, const bupo_experts_outer_params & params) {
    const int64_t k = dst->ne[0], n = dst->ne[1];
    const Order   order(device, dst->src[3], params.n_expert, params.used);
    for (size_t e = 0; e < params.n_expert; ++e) {
        if (order.count(e) == 0) {
            continue;
        }
        const Device::Scope scope(device);
        const Factor x  = { columns(device, order, e, params.tokens_x, dst->src[1]->data, k, Kind::F32), Kind::F32, k };
        const Factor dy = { columns(device, order, e, params.tokens_dy, dst->src[2]->data, n, Kind::F32), Kind::F32, n, true };
        Product      sum = { k, n, order.count(e) };
        sum.alpha = params.scale;
        sum.beta  = 1.0f;
        device.multiply(sum, x, dy, data_of(dst) + (int64_t) e * k * n, k);
    }
}

void run_slot_weights(Device & device, ggml_tensor * dst, const bupo_slots_params &) {
    const size_t n = (size_t) dst->ne[0];
    device.launch(slot_weights, blocks_for(n), THREADS, n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

void run_weights_back(Device & device, ggml_tensor * dst, const bupo_slots_params & params) {
    const int     n    = (int) dst->src[0]->ne[0];
    const size_t  s    = (size_t) ggml_nelements(dst);
    const float * all  = data_of(dst->src[2]);
    const float * bias = params.bias ? device.small(dst->src[3]) : nullptr;
    const float * dy   = params.bias ? data_of(dst->src[4]) : nullptr;
    const int     d    = params.bias ? (int) dst->src[3]->ne[0] : 0;
    device.launch(weights_back, s, threads_for(n), n, (int) params.used, (int) params.n_expert, d, data_of(dst->src[0]),
                  data_of(dst->src[1]), all + s, all + s + params.n_expert + 1, bias, dy, data_of(dst));
}

void run_gate_rows(Device & device, ggml_tensor * dst) {
    const int n = (int) dst->ne[0];
    device.launch(gate_rows, (size_t) ggml_nrows(dst), threads_for(n), n, data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst));
}

void run_gate_rows_back(Device & device, ggml_tensor * dst) {
    const ggml_tensor * x = dst->src[0];
    const int           n = (int) x->ne[0];
    device.launch(gate_rows_back, (size_t) x->ne[1], threads_for(n), n, data_of(x), data_of(dst->src[1]), data_of(dst->src[2]),
                  data_of(dst), data_of(dst) + ggml_nelements(x));
}

} // namespace bupo::BUPO_DEVICE
