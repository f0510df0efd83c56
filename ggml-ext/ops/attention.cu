// Causal attention over packed segments with shared prefixes, and its vjp. Twin: src/ops/attention.rs, which has the
// formulas.
//
// A tile of queries of one segment against all keys it sees: scores by cuBLAS (the prefix's and the segment's own keys
// one below the other), a block per row for the softmax, products with V by cuBLAS. Scores exist for one tile at a
// time, so memory is O(tokens). Keys lie in the order of their positions, so that those which a query sees are a run of
// them, with a window as without. Heads j, j + group, j + 2 group, .. are a batch, one for each key/value head: within
// it both queries and keys lie at equal distances.

#include "device.h"

#include <cmath>

namespace bupo::BUPO_DEVICE {

namespace {

// Scores of a tile: [pitch, queries] for each key/value head, keys contiguous.
struct Tile {
    int query;   // first query: token
    int queries;
    int at;      // position of the first query
    int from;    // position of the first key
    int prefix;  // keys of the prefix, which come first
    int own;     // keys of the segment, up to the last query
    int window;  // keys that a query sees at most
    int pitch;
};

// Keys [first, last) of a tile.
struct Run {
    int first;
    int last;
};

struct Heads {
    int size;
    int n;
    int group; // query heads per key/value head
    int first; // head of key/value head 0 in this batch: 0 .. group
};

} // namespace

// Keys that query i of the tile sees.
__device__ static Run seen(const Tile & tile, int i) {
    const int last = tile.at + i + 1 - tile.from;
    return { last > tile.window ? last - tile.window : 0, last };
}

// A block per (key/value head, query): scores become probabilities in `p`. With a softcap (not 0) the scores of keys that
// are seen are bent in place before. Sinks may be null.
template <typename E>
static __global__ void softmax(Tile tile, Heads heads, float softcap, const float * sinks, float * scores, E * p, float * lse) {
    const int     i    = blockIdx.x % tile.queries;
    const int     kv   = blockIdx.x / tile.queries;
    const size_t  skip = (size_t) blockIdx.x * tile.pitch;
    float *       s    = scores + skip;
    const Run     live = seen(tile, i);
    float         max  = -INFINITY;
    for (int j = live.first + threadIdx.x; j < live.last; j += blockDim.x) {
        if (softcap > 0.0f) {
            s[j] = capped(s[j], softcap).value;
        }
        max = Largest()(max, s[j]);
    }
    const int head = kv * heads.group + heads.first;
    max = over_block<Largest>(sinks ? Largest()(max, sinks[head]) : max);
    float sum = 0.0f;
    for (int j = live.first + threadIdx.x; j < live.last; j += blockDim.x) {
        sum += expf(s[j] - max);
    }
    sum = over_block<Sum>(sum) + (sinks ? expf(sinks[head] - max) : 0.0f);
    const float scale = PROBABILITY_SCALE<E> / sum;
    for (int j = threadIdx.x; j < tile.prefix + tile.own; j += blockDim.x) {
        const bool visible = j >= live.first && j < live.last;
        p[skip + j]        = from_float<E>(visible ? scale * expf(s[j] - max) : 0.0f);
    }
    if (threadIdx.x == 0) {
        lse[(size_t) (tile.query + i) * heads.n + head] = max + logf(sum);
    }
}

// A block per (key/value head, query): scores become probabilities in `p`, their cotangents those of the scores in `ds`.
// `d_p` and `ds` are of the scale of d_out's factors: `shrink` times too large.
template <typename E>
static __global__ void softmax_back(Tile tile, Heads heads, float softcap, const float * scores, const float * d_p,
                                    const float * lse, const float * out, const float * d_out, const float * shrink, E * p,
                                    E * ds) {
    const int    i     = blockIdx.x % tile.queries;
    const int    kv    = blockIdx.x / tile.queries;
    const int    head  = kv * heads.group + heads.first;
    const size_t row   = (size_t) (tile.query + i) * heads.n + head;
    const size_t skip  = (size_t) blockIdx.x * tile.pitch;
    const Run    live  = seen(tile, i);
    float        inner = 0.0f;
    for (int e = threadIdx.x; e < heads.size; e += blockDim.x) {
        inner += out[row * heads.size + e] * d_out[row * heads.size + e];
    }
    inner = over_block<Sum>(inner) / (shrink ? *shrink : 1.0f);
    const float own_lse = lse[row];
    for (int j = threadIdx.x; j < tile.prefix + tile.own; j += blockDim.x) {
        float probability = 0.0f, cotangent = 0.0f;
        if (j >= live.first && j < live.last) {
            const float  x     = scores[skip + j];
            const Capped score = softcap > 0.0f ? capped(x, softcap) : Capped{ x, 1.0f };
            probability = expf(score.value - own_lse);
            cotangent   = probability * (d_p[skip + j] - inner) * score.slope;
        }
        p[skip + j]  = from_float<E>(PROBABILITY_SCALE<E> * probability);
        ds[skip + j] = from_float<E>(cotangent);
    }
}

namespace {

// What forward and backward share: shapes, and the walk over tiles and batches of heads.
struct Walk {
    Device &                      device;
    const bupo_attention_params & params;
    Kind                          kind;
    int64_t                       size, kv, group, q_width, kv_width;

    Walk(Device & device, const bupo_attention_params & params)
        : device(device), params(params), kind(device.kind()), size(params.head_size), kv(params.n_head_kv),
          group(params.n_head / params.n_head_kv), q_width(size * params.n_head), kv_width(size * kv) {}

    Heads heads(int64_t j) const { return { (int) size, (int) params.n_head, (int) group, (int) j }; }

    template <typename F> void each(F && body) const {
        for (uint32_t i = 0; i < params.n_segments; ++i) {
            const bupo_segment & s      = params.segments[i];
            const int            prefix = s.prefix_end - s.prefix_begin;
            const int64_t        all    = prefix + s.end - s.begin;
            // No more queries than the window is wide: half of the scores are of keys that are seen.
            const int64_t        wide   = std::max<int64_t>(32, ((int64_t) params.window + 31) / 32 * 32);
            const bool           cut    = params.window > 0 && 2 * wide < all;
            const int64_t        most   = ((cut ? 2 * wide : all) + 7) / 8 * 8;
            const int64_t        fit    = (int64_t) TILE_BYTES / (int64_t) sizeof(float) / (most * kv);
            const int64_t        fitted = std::max<int64_t>(1, fit >= 32 ? fit / 32 * 32 : fit);
            const int64_t        step   = cut ? std::min(fitted, wide) : fitted;
            for (int64_t first = s.begin; first < s.end; first += step) {
                Tile tile = {};
                tile.query    = (int) first;
                tile.queries  = (int) std::min<int64_t>(step, s.end - first);
                tile.at       = prefix + tile.query - s.begin;
                tile.window   = params.window > 0 ? (int) std::min<int64_t>(params.window, all) : (int) all;
                tile.from     = std::max(0, tile.at + 1 - tile.window);
                tile.prefix   = std::max(0, prefix - tile.from);
                tile.own      = tile.at + tile.queries - std::max(prefix, tile.from);
                tile.pitch    = (tile.prefix + tile.own + 7) / 8 * 8;
                for (int64_t j = 0; j < group; ++j) {
                    const Device::Scope scope(device);
                    body(s, tile, j);
                }
            }
        }
    }

    size_t scores(const Tile & tile) const { return (size_t) tile.pitch * tile.queries * kv; }

    // Queries (or what has their shape) of the tile: size x queries, batch of heads.
    Factor queries(const Values & q, const Tile & tile, int64_t j) const {
        return Factor{ q.data, kind, q_width, false, group * size, q.shrink }.from(tile.query * q_width + j * size);
    }

    // Keys or values from token `first` on: size x tokens, batch of heads.
    Factor keys(const Values & k, int64_t first) const {
        return Factor{ k.data, kind, kv_width, false, size, k.shrink }.from(first * kv_width);
    }

    // A tile of scores from key `first` on: keys x queries.
    Factor tile_of(const void * p, const Tile & tile, int64_t first, const float * shrink = nullptr) const {
        return Factor{ p, kind, tile.pitch, false, (int64_t) tile.pitch * tile.queries, shrink }.from(first);
    }

    // The tile's keys of the prefix and of the segment: body(first token, tokens, first in the tile).
    template <typename F> void each_part(const bupo_segment & s, const Tile & tile, F && body) const {
        if (tile.prefix > 0) {
            body((int64_t) s.prefix_end - tile.prefix, (int64_t) tile.prefix, (int64_t) 0);
        }
        body((int64_t) tile.query + tile.queries - tile.own, (int64_t) tile.own, (int64_t) tile.prefix);
    }

    // out[key, query] = scale k_key . q_query.
    void products(const bupo_segment & s, const Tile & tile, const Values & k, const Factor & q, float scale, float * out) const {
        each_part(s, tile, [&](int64_t token, int64_t n, int64_t at) {
            Factor a = keys(k, token);
            a.turned = true;
            Product product = { n, tile.queries, size };
            product.alpha  = scale;
            product.batch  = kv;
            product.stride = (int64_t) tile.pitch * tile.queries;
            device.multiply(product, a, q, out + at, tile.pitch);
        });
    }
};

} // namespace

template <typename E> static void forward(Device & device, ggml_tensor * dst, const bupo_attention_params & params) {
    const Walk   walk(device, params);
    const size_t t   = (size_t) dst->src[0]->ne[1];
    const Values q   = device.activations(data_of(dst->src[0]), t * walk.q_width, walk.kind);
    const Values k   = device.activations(data_of(dst->src[1]), t * walk.kv_width, walk.kind);
    const Values v   = device.activations(data_of(dst->src[2]), t * walk.kv_width, walk.kind);
    float *      out = data_of(dst);
    float *      lse = out + t * walk.q_width;
    const float * sinks = params.sinks ? device.small(dst->src[3]) : nullptr;

    walk.each([&](const bupo_segment & s, const Tile & tile, int64_t j) {
        float * scores = device.floats(walk.scores(tile));
        E *     p      = sizeof(E) == sizeof(float) ? (E *) scores : (E *) device.scratch(walk.scores(tile) * sizeof(E));
        walk.products(s, tile, k, walk.queries(q, tile, j), params.scale, scores);
        device.launch(softmax<E>, (size_t) (tile.queries * walk.kv), threads_for(tile.pitch), tile, walk.heads(j),
                      params.softcap, sinks, scores, p, lse);
        float beta = 0.0f;
        walk.each_part(s, tile, [&](int64_t token, int64_t n, int64_t at) {
            Product product = { walk.size, tile.queries, n };
            product.alpha  = 1.0f / PROBABILITY_SCALE<E>;
            product.beta   = beta;
            product.batch  = walk.kv;
            product.stride = walk.group * walk.size;
            device.multiply(product, walk.keys(v, token), walk.tile_of(p, tile, at), out + tile.query * walk.q_width + j * walk.size,
                            walk.q_width);
            beta = 1.0f;
        });
    });
}

template <typename E> static void backward(Device & device, ggml_tensor * dst, const bupo_attention_params & params) {
    const Walk    walk(device, params);
    const size_t  t     = (size_t) dst->src[0]->ne[1];
    const Values  q     = device.activations(data_of(dst->src[0]), t * walk.q_width, walk.kind);
    const Values  k     = device.activations(data_of(dst->src[1]), t * walk.kv_width, walk.kind);
    const Values  v     = device.activations(data_of(dst->src[2]), t * walk.kv_width, walk.kind);
    const float * out   = data_of(dst->src[3]);
    const float * lse   = data_of(dst->src[4]);
    const float * d_out = data_of(dst->src[5]);
    // At most 1, so that no cotangent of a score, a sum over a head, is out of F16's range.
    const Values  d_o   = device.activations(d_out, t * walk.q_width, walk.kind, 0);
    float *       dq    = data_of(dst);
    float *       dk    = dq + t * walk.q_width;
    float *       dv    = dk + t * walk.kv_width;

    device.zero(dst->data, ggml_nbytes(dst));
    walk.each([&](const bupo_segment & s, const Tile & tile, int64_t j) {
        const size_t n_scores = walk.scores(tile);
        const bool   in_place = sizeof(E) == sizeof(float);
        float *      scores   = device.floats(n_scores);
        float *      d_p      = device.floats(n_scores);
        E *          p        = in_place ? (E *) scores : (E *) device.scratch(n_scores * sizeof(E));
        E *          ds       = in_place ? (E *) d_p : (E *) device.scratch(n_scores * sizeof(E));
        const Factor queries  = walk.queries(q, tile, j);
        const Factor d_queries = walk.queries(d_o, tile, j);
        walk.products(s, tile, k, queries, params.scale, scores);
        Factor unshrunk = d_queries;
        unshrunk.shrink = nullptr;
        walk.products(s, tile, v, unshrunk, 1.0f, d_p);
        device.launch(softmax_back<E>, (size_t) (tile.queries * walk.kv), threads_for(tile.pitch), tile, walk.heads(j),
                      params.softcap, (const float *) scores, (const float *) d_p, lse, out, d_out, d_o.shrink, p, ds);
        walk.each_part(s, tile, [&](int64_t token, int64_t n, int64_t at) {
            Product over_keys = { walk.size, tile.queries, n };
            over_keys.alpha  = params.scale;
            over_keys.beta   = 1.0f;
            over_keys.batch  = walk.kv;
            over_keys.stride = walk.group * walk.size;
            device.multiply(over_keys, walk.keys(k, token), walk.tile_of(ds, tile, at, d_o.shrink),
                            dq + tile.query * walk.q_width + j * walk.size, walk.q_width);

            Factor ds_turned = walk.tile_of(ds, tile, at, d_o.shrink);
            Factor p_turned  = walk.tile_of(p, tile, at);
            ds_turned.turned = p_turned.turned = true;
            Product over_queries = { walk.size, n, tile.queries };
            over_queries.alpha  = 1.0f / PROBABILITY_SCALE<E>;
            over_queries.beta   = 1.0f;
            over_queries.batch  = walk.kv;
            over_queries.stride = walk.size;
            device.multiply(over_queries, d_queries, p_turned, dv + token * walk.kv_width, walk.kv_width);
            over_queries.alpha = params.scale;
            device.multiply(over_queries, queries, ds_turned, dk + token * walk.kv_width, walk.kv_width);
        });
    });
}

void run_attention(Device & device, ggml_tensor * dst, const bupo_attention_params & params) {
    if (device.kind() == Kind::F32) {
        forward<float>(device, dst, params);
    } else {
        forward<half>(device, dst, params);
    }
}

void run_attention_back(Device & device, ggml_tensor * dst, const bupo_attention_params & params) {
    if (device.kind() == Kind::F32) {
        backward<float>(device, dst, params);
    } else {
        backward<half>(device, dst, params);
    }
}

} // namespace bupo::BUPO_DEVICE
