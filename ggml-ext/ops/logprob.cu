// Log-prob, log-sum-exp, entropy and gradient straight from hidden states. Twin: src/ops/logprob.rs, which has the
// formulas; here a block has one token.
//
// For a tile of tokens and, within, a tile of the vocabulary: dequantise, multiply to logits, take them into the
// running sums (which turns them into probabilities relative to the maximum), multiply these into the running mean
// embedding.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

namespace {

// Running sums of a token, relative to the maximum. In double, for beside the maximum's own 1 a float loses the rest
// of a peaked distribution, which is all of its entropy.
struct Sums {
    float  max;
    float  target; // the target's logit, once it has been seen
    double sum;
    double weighted; // sum e^(l - max) (l - max)
};

} // namespace

// From a product to the logit that the softmax takes, and its slope (but for factors of the product).
struct Map {
    float softcap;         // 0: none, and then the product is the logit
    float inv_temperature; // of what the softcap gives

    __device__ Capped operator()(float z) const {
        if (softcap > 0.0f) {
            const Capped logit = capped(z, softcap);
            return { inv_temperature * logit.value, logit.slope };
        }
        return { z, 1.0f };
    }
};

// Sums of rows with the probabilities as weights, of E_u or of B: for each token `d` values of the running mean and of
// the target's own row, where they are wanted.
template <typename E> struct Means {
    int       d;
    const E * rows;
    float     scale; // of the target's row
    float *   gradient;
    float *   mean;
};

static __global__ void start(int n, Sums * sums) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        sums[i] = { -INFINITY, 0.0f, 0.0, 0.0 };
    }
}

// Shrinks token t's running mean; adds the target's row (negative: not in this tile).
template <typename E> static __device__ void follow(const Means<E> & means, int t, float shrink, int target, float slope) {
    for (int i = threadIdx.x; i < means.d && means.mean; i += blockDim.x) {
        const size_t at = (size_t) t * means.d + i;
        if (shrink != 1.0f) {
            means.mean[at] *= shrink;
        }
        if (target >= 0) {
            means.gradient[at] = slope * means.scale * to_float(means.rows[(size_t) target * means.d + i]);
        }
    }
}

// Products of one tile of the vocabulary, `width` per token, become e^(l - max) times the slope of l in `p` (which may be
// the same memory), and in `exact` unscaled, if that is not null (it may be `products`). The means get the target's row
// times its slope, and the new scale.
template <typename E>
static __global__ void absorb(int first, int width, Map map, const int * targets, const float * products, E * p, float * exact,
                              Sums * sums, Means<E> own_means, Means<float> low_means) {
    const int     t      = blockIdx.x;
    const float * z      = products + (size_t) t * width;
    Sums          s      = sums[t];
    const int     target = targets ? targets[t] - first : -1;
    const bool    seen   = target >= 0 && target < width;
    const Capped  own    = map(seen ? z[target] : 0.0f);
    if (seen) {
        s.target = own.value;
    }
    float largest = s.max;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        largest = Largest()(largest, map(z[v]).value);
    }
    const float max    = over_block<Largest>(largest);
    double      sum    = 0.0;
    double      weight = 0.0;
    for (int v = threadIdx.x; v < width; v += blockDim.x) {
        const Capped l = map(z[v]);
        const float  x = l.value - max;
        const float  e = expf(x);
        sum += (double) e;
        weight += (double) (e * x);
        if (exact) {
            exact[(size_t) t * width + v] = e * l.slope;
        }
        p[(size_t) t * width + v] = from_float<E>(PROBABILITY_SCALE<E> * e * l.slope);
    }
    sum    = over_block<Sum>(sum);
    weight = over_block<Sum>(weight);
    float shrink = 1.0f; // of the means
    if (max > s.max && s.sum > 0.0) {
        const double shift = (double) s.max - (double) max;
        const double scale = exp(shift);
        s.weighted = scale * (s.weighted + shift * s.sum);
        s.sum *= scale;
        shrink = (float) scale;
    }
    follow(own_means, t, shrink, seen ? target : -1, own.slope);
    follow(low_means, t, shrink, seen ? target : -1, own.slope);
    if (threadIdx.x == 0) {
        s.max = max;
        s.sum += sum;
        s.weighted += weight;
        sums[t] = s;
    }
}

static __device__ void conclude(int d, float factor, float scale, int t, const float * mean, float * gradient) {
    for (int i = threadIdx.x; i < d && mean; i += blockDim.x) {
        const size_t at = (size_t) t * d + i;
        gradient[at] = factor * (gradient[at] - scale * mean[at]);
    }
}

// d and r: widths of E_u and B; their means are null where no gradient is wanted.
static __global__ void finish(int d, int r, float factor, bool has_targets, const Sums * sums, const float * mean,
                              const float * low_mean, float * logprob, float * lse, float * entropy, float * gradient,
                              float * low_gradient) {
    const int  t = blockIdx.x;
    const Sums s = sums[t];
    if (threadIdx.x == 0) {
        const double whole = (double) s.max + log(s.sum);
        logprob[t] = has_targets ? (float) ((double) s.target - whole) : 0.0f;
        lse[t]     = (float) whole;
        entropy[t] = (float) (log(s.sum) - s.weighted / s.sum);
    }
    const float scale = (float) (1.0 / s.sum);
    conclude(d, factor, scale, t, mean, gradient);
    conclude(r, factor, scale, t, low_mean, low_gradient);
}

template <typename E> static void run(Device & device, ggml_tensor * dst, const bupo_logprob_params & params, Kind kind) {
    const ggml_tensor * h       = dst->src[0];
    const ggml_tensor * e_u     = dst->src[1];
    const int *         targets = params.targets ? static_cast<const int *>(dst->src[2]->data) : nullptr;
    const ggml_tensor * b       = params.map.low_rank ? dst->src[params.map.low_rank] : nullptr;
    const int64_t       r       = b ? b->ne[0] : 0;
    const int64_t       d       = h->ne[0];
    const int64_t       n       = h->ne[1];
    const int64_t       v       = e_u->ne[1];
    const int64_t       v_step  = vocab_step(d * (int64_t) sizeof(E), n);
    float *             out     = data_of(dst);
    const Map           map     = { params.map.softcap, params.inv_temperature };
    const float         factor  = params.map.scale * params.inv_temperature; // of what d logits / dh is without a softcap

    for (int64_t first = 0; first < n; first += TOKEN_TILE) {
        const Device::Scope tokens_tile(device);
        const int64_t       t        = std::min(TOKEN_TILE, n - first);
        const int *         own      = targets ? targets + first : nullptr;
        float *             gradient = params.gradient ? out + 3 * n + first * d : nullptr;
        float *             mean     = params.gradient ? device.floats((size_t) (d * t)) : nullptr;
        const bool          low      = params.gradient && b;
        float *             low_gradient = low ? out + (3 + d) * n + first * r : nullptr;
        float *             low_mean     = low ? device.floats((size_t) (r * t)) : nullptr;
        Sums *              sums     = static_cast<Sums *>(device.scratch((size_t) t * sizeof(Sums)));
        const Values        in       = device.activations(data_of(h) + first * d, (size_t) (d * t), kind);
        const Factor        hidden   = { in.data, kind, d, false, 0, in.shrink };

        device.launch(start, blocks_for((size_t) t), THREADS, (int) t, sums);
        if (mean) {
            device.zero(mean, (size_t) (d * t) * sizeof(float));
        }
        if (low) {
            device.zero(low_mean, (size_t) (r * t) * sizeof(float));
        }
        for (int64_t vocab = 0; vocab < v; vocab += v_step) {
            const Device::Scope vocab_tile(device);
            const int64_t       width  = std::min(v_step, v - vocab);
            const void *        rows   = device.rows(e_u, vocab, width, kind); // [D, width]
            float *             logits = device.floats((size_t) (width * t));
            E * p = sizeof(E) == sizeof(float) ? (E *) logits : (E *) device.scratch((size_t) (width * t) * sizeof(E));
            Product product = { width, t, d };
            product.alpha = map.softcap > 0.0f ? params.map.scale : factor;
            device.multiply(product, { rows, kind, d, true }, hidden, logits, width);
            add_low_rank(device, dst, params.map, vocab, width, first, t, product.alpha, logits);
            const float *      factors = low ? data_of(b) + vocab * r : nullptr; // [r, width]
            const Means<E>     own_means = { (int) d, (const E *) rows, 1.0f, gradient, mean };
            const Means<float> low_means = { (int) r, factors, params.map.low_scale, low_gradient, low_mean };
            device.launch(absorb<E>, (size_t) t, THREADS, (int) vocab, (int) width, map, own, (const float *) logits, p,
                          low ? logits : nullptr, sums, own_means, low_means);
            if (mean) {
                Product running = { d, t, width };
                running.alpha = 1.0f / PROBABILITY_SCALE<E>;
                running.beta  = 1.0f;
                device.multiply(running, { rows, kind, d }, { p, kind, width }, mean, d);
            }
            if (low) {
                Product running = { r, t, width };
                running.alpha = params.map.low_scale;
                running.beta  = 1.0f;
                device.multiply(running, { factors, Kind::F32, r }, { logits, Kind::F32, width }, low_mean, r);
            }
        }
        device.launch(finish, (size_t) t, threads_for(d), (int) d, (int) r, factor, own != nullptr, (const Sums *) sums,
                      (const float *) mean, (const float *) low_mean, out + first, out + n + first, out + 2 * n + first, gradient,
                      low_gradient);
    }
}

void run_logprob(Device & device, ggml_tensor * dst, const bupo_logprob_params & params) {
    const Kind kind = dst->src[1]->type == GGML_TYPE_F32 ? Kind::F32 : device.kind();
    if (kind == Kind::F32) {
        run<float>(device, dst, params, kind);
    } else {
        run<half>(device, dst, params, kind);
    }
}

} // namespace bupo::BUPO_DEVICE
