// The gated delta rule over packed segments with shared prefixes, and its vjp, chunk by chunk. Twin: src/ops/delta/, which
// has the formulas and the names.
//
// Products are batches over key heads, in F32 whatever the device's type of factors: states add up over whole sequences.
// Here value head j n_k + i reads key head i, so that the value heads of one j stand one after another beside all key heads; where
// they are grouped, it is head i n_v / n_k + j of the rows that come in and go out (`outer`).

#include "device.h"

#include <vector>

namespace bupo::BUPO_DEVICE {

namespace {

constexpr int CHUNK = 64;

struct Chunk {
    int first, n;
    int before, after; // states, -1: none
    bool is_first, to_completions;
};

// As src/ops/delta/chunks.rs.
std::vector<Chunk> chunks_of(const bupo_delta_params & params) {
    std::vector<Chunk> chunks;
    int states = 0, prefix = -1;
    for (uint32_t i = 0; i < params.n_segments; ++i) {
        const bupo_segment & s         = params.segments[i];
        const bool           is_prompt = s.prefix_begin == s.prefix_end;
        const bool           followed  = is_prompt && i + 1 < params.n_segments &&
                                         params.segments[i + 1].prefix_begin != params.segments[i + 1].prefix_end;
        int before = is_prompt ? -1 : prefix;
        for (int first = s.begin; first < s.end; first += CHUNK) {
            const int  n    = std::min(CHUNK, s.end - first);
            const bool last = first + n == s.end;
            const int  after = !last || followed ? states++ : -1;
            chunks.push_back({ first, n, before, after, first == s.begin, last && followed });
            before = after;
        }
        if (is_prompt) {
            prefix = before;
        }
    }
    return chunks;
}

// Sizes, sources, and where a chunk's rows lie.
struct Job {
    int           n_k, n_v, d, t;
    float         eps;
    const float * qkv;
    const float * alpha;
    const float * beta;
    const float * decay;
    const float * bias;
    bool          grouped;

    __host__ __device__ int heads() const { return 2 * n_k + n_v; }
    __host__ __device__ int outer(int head) const { return grouped ? head % n_k * (n_v / n_k) + head / n_k : head; }
    __host__ __device__ size_t row(int token, int head) const { return ((size_t) token * heads() + head) * d; }
    __host__ __device__ size_t value(int token, int head) const { return row(token, 2 * n_k + outer(head)); }
    __host__ __device__ size_t gate(int token, int head) const { return (size_t) token * n_v + outer(head); }
    __host__ __device__ size_t out(int token, int head) const { return gate(token, head) * d; }
    // From one of the value heads of one j to the next one in the result.
    int64_t between() const { return (int64_t) (grouped ? n_v / n_k : 1) * d; }
};

// Gates of the value heads' tokens: [CHUNK] of each head.
struct Gates {
    float *  beta;
    float *  rest;
    float *  slope;
    double * sum;
    float *  since;
    float *  until;
};

} // namespace

// Rows of q and k of length 1/sqrt(d) and 1, [head][token][d], and 1 / sqrt(|x|^2 + eps), [head][CHUNK]; a block per row.
static __global__ void pack_keys(Job job, int first, int n, float * packed, float * inverse) {
    const int     head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    const float * x    = job.qkv + job.row(first + token, head);
    float         sum  = 0.0f;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        sum += x[i] * x[i];
    }
    const float r      = 1.0f / sqrtf(over_block<Sum>(sum) + job.eps);
    const float factor = head < job.n_k ? r / sqrtf((float) job.d) : r;
    float *     y      = packed + ((size_t) head * CHUNK + token) * job.d;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        y[i] = factor * x[i];
    }
    if (threadIdx.x == 0) {
        inverse[head * CHUNK + token] = r;
    }
}

// A block per value head, a thread per token.
static __global__ void make_gates(Job job, int first, int n, Gates gates) {
    const int head = (int) blockIdx.x, token = (int) threadIdx.x, at = head * CHUNK + token;
    double    all = 0.0;
    if (token < n) {
        const double decay = job.decay[job.outer(head)], bias = job.bias[job.outer(head)];
        for (int i = 0; i < n; ++i) {
            const double a        = (double) job.alpha[job.gate(first + i, head)] + bias;
            const double small    = exp(-fabs(a));
            const double softplus = fmax(a, 0.0) + log1p(small);
            all += decay * softplus;
            if (i == token) {
                const float b   = job.beta[job.gate(first + i, head)];
                gates.sum[at]   = all;
                gates.slope[at] = (float) (decay * (a >= 0.0 ? 1.0 : small) / (1.0 + small));
                gates.beta[at]  = 1.0f / (1.0f + expf(-b));
                gates.rest[at]  = 1.0f / (1.0f + expf(b));
            }
        }
        gates.since[at] = expf((float) gates.sum[at]);
        gates.until[at] = expf((float) (all - gates.sum[at]));
    }
}

// A, M and e of a value head from the products of its key head: rows of CHUNK values; a block per row.
static __global__ void make_triangles(Job job, int n, Gates gates, const float * kk, const float * qk, float * a, float * m, float * e) {
    const int    head = (int) blockIdx.x / n, t = (int) blockIdx.x % n;
    const size_t at   = ((size_t) head * CHUNK + t) * CHUNK;
    const size_t from = ((size_t) (head % job.n_k) * CHUNK + t) * CHUNK;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float between = i <= t ? expf((float) (gates.sum[head * CHUNK + t] - gates.sum[head * CHUNK + i])) : 0.0f;
        e[at + i] = between;
        a[at + i] = i < t ? between * kk[from + i] : 0.0f;
        m[at + i] = i <= t ? between * qk[from + i] : 0.0f;
    }
}

// Rows v of the value heads, [head][token][d]; a block per row.
static __global__ void pack_values(Job job, int first, int n, float * z) {
    const int     head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    const float * v    = job.qkv + job.value(first + token, head);
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        z[((size_t) head * CHUNK + token) * job.d + i] = v[i];
    }
}

// Rows of x, [head mod heads][token][d], times `by`, [head][CHUNK]; a block per row of each value head.
static __global__ void scale_tokens(int d, int n, int heads, const float * x, const float * by, float * y) {
    const int    head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    const size_t from = ((size_t) (head % heads) * CHUNK + token) * d, to = ((size_t) head * CHUNK + token) * d;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        y[to + i] = by[head * CHUNK + token] * x[from + i];
    }
}

// Rows that lie in the result's order, [token][head][d]; likewise.
static __global__ void pack_out(Job job, int first, int n, const float * x, float * y) {
    const int head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        y[((size_t) head * CHUNK + token) * job.d + i] = x[job.out(first + token, head) + i];
    }
}

// z = y - A u, u = diag(beta) z; a thread per column of each value head.
static __global__ void solve(int d, int n, int n_v, const float * a, const float * beta, float * z, float * u) {
    const int i = (int) (blockIdx.x * blockDim.x + threadIdx.x), head = i / d, column = i % d;
    if (head < n_v) {
        const size_t at = (size_t) head * CHUNK * d + column;
        for (int t = 0; t < n; ++t) {
            const float * row = a + ((size_t) head * CHUNK + t) * CHUNK;
            float         x   = z[at + (size_t) t * d];
            for (int s = 0; s < t; ++s) {
                x -= row[s] * u[at + (size_t) s * d];
            }
            z[at + (size_t) t * d] = x;
            u[at + (size_t) t * d] = beta[head * CHUNK + t] * x;
        }
    }
}

// c = y - A^T dz, dz = diag(beta) c; likewise.
static __global__ void solve_back(int d, int n, int n_v, const float * a, const float * beta, float * c, float * dz) {
    const int i = (int) (blockIdx.x * blockDim.x + threadIdx.x), head = i / d, column = i % d;
    if (head < n_v) {
        const size_t at = (size_t) head * CHUNK * d + column;
        for (int t = n - 1; t >= 0; --t) {
            float x = c[at + (size_t) t * d];
            for (int s = t + 1; s < n; ++s) {
                x -= a[((size_t) head * CHUNK + s) * CHUNK + t] * dz[at + (size_t) s * d];
            }
            c[at + (size_t) t * d]  = x;
            dz[at + (size_t) t * d] = beta[head * CHUNK + t] * x;
        }
    }
}

// States times what is left of them at the chunk's end, [head][d * d]; a thread per value.
static __global__ void decay_states(size_t len, int n, int n_v, const float * since, const float * from, float * to) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < len * n_v) {
        to[i] = since[i / len * CHUNK + n - 1] * from[i];
    }
}

static __global__ void add_states(size_t n, const float * from, float * to) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        to[i] += from[i];
    }
}

// e^(G_n) dS . S of each value head; a block each.
static __global__ void dot_states(size_t len, int n, const float * since, const float * a, const float * b, double * out) {
    const size_t skip = (size_t) blockIdx.x * len;
    float        sum  = 0.0f;
    for (size_t i = threadIdx.x; i < len; i += blockDim.x) {
        sum += a[skip + i] * b[skip + i];
    }
    sum = over_block<Sum>(sum);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = (double) (since[blockIdx.x * CHUNK + n - 1] * sum);
    }
}

// Row sums less column sums of dA A + dM M; a block per value head, a thread per token.
static __global__ void sum_triangles(int n, const float * a, const float * m, const float * da, const float * dm, double * d_sum) {
    const size_t skip = (size_t) blockIdx.x * CHUNK * CHUNK;
    const int    t    = (int) threadIdx.x;
    if (t < n) {
        double sum = 0.0;
        for (int i = 0; i < t; ++i) {
            const size_t at = skip + (size_t) t * CHUNK + i;
            sum += (double) (da[at] * a[at]) + (double) (dm[at] * m[at]);
        }
        for (int s = t + 1; s < n; ++s) {
            const size_t at = skip + (size_t) s * CHUNK + t;
            sum -= (double) (da[at] * a[at]) + (double) (dm[at] * m[at]);
        }
        d_sum[blockIdx.x * CHUNK + t] = sum;
    }
}

// dA e and dM e, in place, without A's diagonal; a block per row.
static __global__ void through_decay(int n, const float * e, float * da, float * dm) {
    const int    t  = (int) blockIdx.x % n;
    const size_t at = ((size_t) (blockIdx.x / n) * CHUNK + t) * CHUNK;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        da[at + i] = i < t ? e[at + i] * da[at + i] : 0.0f;
        dm[at + i] *= e[at + i];
    }
}

// Rows `mixed` of the value heads j n_k to (j + 1) n_k - 1 are added to those of their key heads; what they are along x is added
// to d_sum; a block per row.
static __global__ void take_up(int d, int n, int first_head, const float * mixed, const float * x, float * dx, double * d_sum) {
    const int    key = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    const size_t from = ((size_t) (first_head + key) * CHUNK + token) * d, to = ((size_t) key * CHUNK + token) * d;
    float        along = 0.0f;
    for (int i = threadIdx.x; i < d; i += blockDim.x) {
        along += mixed[from + i] * x[to + i];
        dx[to + i] += mixed[from + i];
    }
    along = over_block<Sum>(along);
    if (threadIdx.x == 0) {
        d_sum[(first_head + key) * CHUNK + token] += (double) along;
    }
}

// d alpha and d beta; where there is a state after the chunk, `written` is what it hands on along k, and `kept` its product with
// the state before; a block per row.
static __global__ void store_gates(Job job, int first, int n, Gates gates, const double * d_sum, const double * written,
                                   const double * kept, const float * c, const float * z, float * d_alpha, float * d_beta) {
    const int head = (int) blockIdx.x / n, token = (int) blockIdx.x % n, at = head * CHUNK + token;
    float     along = 0.0f;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        along += c[(size_t) at * job.d + i] * z[(size_t) at * job.d + i];
    }
    along = over_block<Sum>(along);
    if (threadIdx.x == 0) {
        double d_g = kept ? kept[head] : 0.0;
        for (int s = 0; s < n; ++s) {
            const int other = head * CHUNK + s;
            if (s >= token) {
                d_g += d_sum[other];
            }
            if (written && s < token) { // the sum of all at the chunk's end, less those from this token on
                d_g += written[other];
            }
        }
        const size_t out = job.gate(first + token, head);
        d_alpha[out] = (float) d_g * gates.slope[at];
        d_beta[out]  = along * gates.beta[at] * gates.rest[at];
    }
}

// dv from dz; a block per row.
static __global__ void store_values(Job job, int first, int n, const float * dz, float * d_qkv) {
    const int head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        d_qkv[job.value(first + token, head) + i] = dz[((size_t) head * CHUNK + token) * job.d + i];
    }
}

// dq and dk through the norms; a block per row of q and k.
static __global__ void store_keys(Job job, int first, int n, const float * d_normed, const float * inverse, float * d_qkv) {
    const int     head = (int) blockIdx.x / n, token = (int) blockIdx.x % n;
    const size_t  at   = job.row(first + token, head), from = ((size_t) head * CHUNK + token) * job.d;
    const float * x    = job.qkv + at;
    const float   r    = inverse[head * CHUNK + token];
    float         sum  = 0.0f;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        sum += x[i] * d_normed[from + i];
    }
    const float along  = r * r * over_block<Sum>(sum);
    const float factor = head < job.n_k ? r / sqrtf((float) job.d) : r;
    for (int i = threadIdx.x; i < job.d; i += blockDim.x) {
        d_qkv[at + i] = factor * (d_normed[from + i] - along * x[i]);
    }
}

namespace {

// What forward and backward share. Rows of a chunk are columns of cuBLAS's matrices, d x n; states [k][v] are d x d with v first.
struct Walk {
    Device & device;
    Job      job;
    size_t   len;    // of a state
    float *  q;      // then k, [2 n_k][CHUNK][d]
    float *  k;
    float *  inverse;
    float *  kk;
    float *  qk;
    Gates    gates;
    float *  a;
    float *  m;
    float *  e;
    float *  z;
    float *  u;
    float *  decayed; // rows of the value heads with decays

    Walk(Device & device, const ggml_tensor * dst, const bupo_delta_params & params) : device(device) {
        job = { (int) params.n_k, (int) params.n_v, (int) params.size, (int) dst->src[0]->ne[1], params.eps,
                data_of(dst->src[0]), data_of(dst->src[1]), data_of(dst->src[2]), device.small(dst->src[3]),
                device.small(dst->src[4]), params.grouped != 0 };
        len = (size_t) job.d * job.d;
        const size_t keys = (size_t) job.n_k * CHUNK, values = (size_t) job.n_v * CHUNK;
        q       = device.floats(2 * keys * job.d);
        k       = q + keys * job.d;
        inverse = device.floats(2 * keys);
        kk      = device.floats(keys * CHUNK);
        qk      = device.floats(keys * CHUNK);
        gates   = { device.floats(values), device.floats(values), device.floats(values),
                    static_cast<double *>(device.scratch(values * sizeof(double))), device.floats(values), device.floats(values) };
        a       = device.floats(values * CHUNK);
        m       = device.floats(values * CHUNK);
        e       = device.floats(values * CHUNK);
        z       = device.floats(values * job.d);
        u       = device.floats(values * job.d);
        decayed = device.floats(values * job.d);
    }

    unsigned threads() const { return threads_for(job.d); }
    size_t   rows(int n) const { return (size_t) job.n_v * n; }

    // Factors over a batch of key heads or of as many value heads.
    Factor tokens(const float * x) const { return { x, Kind::F32, job.d, false, (int64_t) CHUNK * job.d, nullptr }; }
    Factor triangle(const float * x) const { return { x, Kind::F32, CHUNK, false, (int64_t) CHUNK * CHUNK, nullptr }; }
    Factor state(const float * x) const { return { x, Kind::F32, job.d, false, (int64_t) len, nullptr }; }
    static Factor turn(Factor f) {
        f.turned = true;
        return f;
    }

    // Calls body(first value head) for every batch of as many value heads as there are key heads.
    template <typename F> void each_group(F && body) const {
        for (int head = 0; head < job.n_v; head += job.n_k) {
            body((size_t) head);
        }
    }

    // C (+)= alpha A B over the batch; C's columns `ld` apart, its matrices `stride`.
    void multiply(int64_t rows, int64_t columns, int64_t inner, float alpha, float beta, const Factor & x, const Factor & y, float * c,
                  int64_t ld, int64_t stride) const {
        Product product = { rows, columns, inner };
        product.alpha  = alpha;
        product.beta   = beta;
        product.batch  = job.n_k;
        product.stride = stride;
        device.multiply(product, x, y, c, ld);
    }

    // The same into rows of a chunk, into a triangle.
    void to_tokens(int n, int64_t inner, float alpha, float beta, const Factor & x, const Factor & y, float * c) const {
        multiply(job.d, n, inner, alpha, beta, x, y, c, job.d, (int64_t) CHUNK * job.d);
    }
    void to_triangle(int n, float alpha, const Factor & x, const Factor & y, float * c) const {
        multiply(n, n, job.d, alpha, 0.0f, x, y, c, CHUNK, (int64_t) CHUNK * CHUNK);
    }

    size_t at(size_t head) const { return head * CHUNK * job.d; }
    size_t triangle_at(size_t head) const { return head * CHUNK * CHUNK; }

    // Queries, keys, gates, triangles; Z and U.
    void begin(const Chunk & chunk, const float * before) const {
        const int n = chunk.n;
        device.launch(pack_keys, (size_t) (2 * job.n_k * n), threads(), job, chunk.first, n, q, inverse);
        to_triangle(n, 1.0f, turn(tokens(k)), tokens(k), kk);
        to_triangle(n, 1.0f, turn(tokens(k)), tokens(q), qk);
        device.launch(make_gates, (size_t) job.n_v, (unsigned) CHUNK, job, chunk.first, n, gates);
        device.launch(make_triangles, rows(n), threads_for(n), job, n, gates, kk, qk, a, m, e);
        device.launch(pack_values, rows(n), threads(), job, chunk.first, n, z);
        if (before) {
            scale_keys(n, k, gates.since);
            each_group([&](size_t h) {
                to_tokens(n, job.d, -1.0f, 1.0f, state(before + h * len), tokens(decayed + at(h)), z + at(h));
            });
        }
        device.launch(solve, blocks_for((size_t) job.n_v * job.d), THREADS, job.d, n, job.n_v, a,
                      gates.beta, z, u);
    }

    // Rows of q or k with decays, for every value head.
    void scale_keys(int n, const float * x, const float * by) const {
        device.launch(scale_tokens, rows(n), threads(), job.d, n, job.n_k, x, by, decayed);
    }
    void scale_values(int n, const float * x, const float * by) const {
        device.launch(scale_tokens, rows(n), threads(), job.d, n, job.n_v, x, by, decayed);
    }
};

} // namespace

void run_delta(Device & device, ggml_tensor * dst, const bupo_delta_params & params) {
    const Walk walk(device, dst, params);
    const Job & job    = walk.job;
    float *     out    = data_of(dst);
    float *     states = out + (size_t) job.n_v * job.d * job.t;
    const size_t all   = walk.len * job.n_v;
    for (const Chunk & chunk : chunks_of(params)) {
        const int     n      = chunk.n;
        const float * before = chunk.before >= 0 ? states + chunk.before * all : nullptr;
        walk.begin(chunk, before);
        if (before) {
            walk.scale_keys(n, walk.q, walk.gates.since);
        }
        const int64_t ld = (int64_t) job.n_v * job.d;
        walk.each_group([&](size_t h) {
            float * o = out + job.out(chunk.first, (int) h);
            if (before) {
                walk.multiply(job.d, n, job.d, 1.0f, 0.0f, walk.state(before + h * walk.len), walk.tokens(walk.decayed + walk.at(h)),
                              o, ld, job.between());
            }
            walk.multiply(job.d, n, n, 1.0f, before ? 1.0f : 0.0f, walk.tokens(walk.u + walk.at(h)),
                          walk.triangle(walk.m + walk.triangle_at(h)), o, ld, job.between());
        });
        if (chunk.after < 0) {
            continue;
        }
        float * after = states + chunk.after * all;
        if (before) {
            device.launch(decay_states, blocks_for(all), THREADS, walk.len, n, job.n_v, walk.gates.since, before, after);
        }
        walk.scale_keys(n, walk.k, walk.gates.until);
        walk.each_group([&](size_t h) {
            walk.multiply(job.d, job.d, n, 1.0f, before ? 1.0f : 0.0f, walk.tokens(walk.u + walk.at(h)),
                          Walk::turn(walk.tokens(walk.decayed + walk.at(h))), after + h * walk.len, job.d, (int64_t) walk.len);
        });
    }
}

void run_delta_back(Device & device, ggml_tensor * dst, const bupo_delta_params & params) {
    const Walk    walk(device, dst, params);
    const Job &   job     = walk.job;
    const int     d       = job.d, n_v = job.n_v;
    const float * states  = data_of(dst->src[5]) + (size_t) n_v * d * job.t;
    const float * d_out   = data_of(dst->src[6]);
    float *       d_qkv   = data_of(dst);
    float *       d_alpha = d_qkv + job.row(job.t, 0);
    float *       d_beta  = d_alpha + (size_t) n_v * job.t;
    const size_t  all = walk.len * n_v, keys = (size_t) job.n_k * CHUNK * d, values = (size_t) n_v * CHUNK;
    float *       own     = device.floats(all); // of the state after the chunk, then of the one before
    float *       prompt  = device.floats(all); // of the state after the prompt, the sum over completions
    float *       next    = device.floats(all);
    float *       d_o     = device.floats(values * d); // d_out, [head][token][d]
    float *       c       = device.floats(values * d);
    float *       dz      = device.floats(values * d);
    float *       mixed   = device.floats(values * d);
    float *       dq      = device.floats(2 * keys);
    float *       dk      = dq + keys;
    float *       da      = device.floats(values * CHUNK);
    float *       dm      = device.floats(values * CHUNK);
    double *      d_sum   = static_cast<double *>(device.scratch(values * sizeof(double)));
    double *      written = static_cast<double *>(device.scratch(values * sizeof(double)));
    double *      kept    = static_cast<double *>(device.scratch((size_t) n_v * sizeof(double)));
    const std::vector<Chunk> chunks = chunks_of(params);
    for (size_t i = chunks.size(); i-- > 0;) {
        const Chunk & chunk  = chunks[i];
        const int     n      = chunk.n;
        const float * before = chunk.before >= 0 ? states + chunk.before * all : nullptr;
        const bool    after  = chunk.after >= 0;
        // The last chunk of a tree begins its sum.
        if (i + 1 == chunks.size() || (chunks[i + 1].is_first && chunks[i + 1].before < 0)) {
            device.zero(prompt, all * sizeof(float));
        }
        if (chunk.to_completions) {
            device.copy(own, prompt, all * sizeof(float));
        }
        walk.begin(chunk, before);
        device.launch(pack_out, walk.rows(n), walk.threads(), job, chunk.first, n, d_out, d_o);
        device.zero(dq, 2 * keys * sizeof(float));
        if (after) {
            walk.scale_keys(n, walk.k, walk.gates.until);
        }
        walk.each_group([&](size_t h) {
            walk.to_tokens(n, n, 1.0f, 0.0f, walk.tokens(d_o + walk.at(h)), Walk::turn(walk.triangle(walk.m + walk.triangle_at(h))),
                           c + walk.at(h));
            if (after) {
                walk.to_tokens(n, d, 1.0f, 1.0f, walk.state(own + h * walk.len), walk.tokens(walk.decayed + walk.at(h)),
                               c + walk.at(h));
            }
        });
        device.launch(solve_back, blocks_for((size_t) n_v * d), THREADS, d, n, n_v, walk.a,
                      walk.gates.beta, c, dz);
        device.launch(store_values, walk.rows(n), walk.threads(), job, chunk.first, n, dz, d_qkv);
        walk.each_group([&](size_t h) {
            const Factor u = Walk::turn(walk.tokens(walk.u + walk.at(h)));
            walk.to_triangle(n, -1.0f, u, walk.tokens(dz + walk.at(h)), da + walk.triangle_at(h));
            walk.to_triangle(n, 1.0f, u, walk.tokens(d_o + walk.at(h)), dm + walk.triangle_at(h));
        });
        device.launch(sum_triangles, (size_t) n_v, (unsigned) CHUNK, n, walk.a, walk.m,
                      da, dm, d_sum);
        device.launch(through_decay, walk.rows(n), threads_for(n), n, walk.e, da, dm);
        walk.each_group([&](size_t h) {
            const Factor a = walk.triangle(da + walk.triangle_at(h)), m = walk.triangle(dm + walk.triangle_at(h));
            walk.to_tokens(n, n, 1.0f, 1.0f, walk.tokens(walk.k), m, dq);
            walk.to_tokens(n, n, 1.0f, 1.0f, walk.tokens(walk.q), Walk::turn(m), dk);
            walk.to_tokens(n, n, 1.0f, 1.0f, walk.tokens(walk.k), a, dk);
            walk.to_tokens(n, n, 1.0f, 1.0f, walk.tokens(walk.k), Walk::turn(a), dk);
        });
        // Rows of the value heads times a state, added to q's or k's.
        const auto through_state = [&](const float * state, float sign, float * dx, const float * x, double * sums) {
            walk.each_group([&](size_t h) {
                walk.to_tokens(n, d, sign, 0.0f, Walk::turn(walk.state(state + h * walk.len)),
                               walk.tokens(walk.decayed + walk.at(h)), mixed + walk.at(h));
                device.launch(take_up, (size_t) (job.n_k * n), walk.threads(), d, n, (int) h, mixed, x, dx, sums);
            });
        };
        if (after) {
            device.zero(written, values * sizeof(double));
            walk.scale_values(n, walk.u, walk.gates.until);
            through_state(own, 1.0f, dk, walk.k, written);
        }
        if (before) {
            if (after) {
                device.launch(dot_states, (size_t) n_v, THREADS, walk.len, n, walk.gates.since, own, before,
                              kept);
            }
            walk.scale_values(n, d_o, walk.gates.since);
            through_state(before, 1.0f, dq, walk.q, d_sum);
            walk.scale_values(n, dz, walk.gates.since);
            through_state(before, -1.0f, dk, walk.k, d_sum);
            // The cotangent of the state before.
            if (after) {
                device.launch(decay_states, blocks_for(all), THREADS, walk.len, n, n_v, walk.gates.since, own,
                              next);
            }
            for (const bool keys_turn : { false, true }) {
                walk.scale_keys(n, keys_turn ? walk.k : walk.q, walk.gates.since);
                walk.each_group([&](size_t h) {
                    walk.multiply(d, d, n, keys_turn ? -1.0f : 1.0f, keys_turn || after ? 1.0f : 0.0f,
                                  walk.tokens((keys_turn ? dz : d_o) + walk.at(h)), Walk::turn(walk.tokens(walk.decayed + walk.at(h))),
                                  next + h * walk.len, d, (int64_t) walk.len);
                });
            }
            std::swap(own, next);
            if (chunk.is_first) {
                device.launch(add_states, blocks_for(all), THREADS, all, own, prompt);
            }
        }
        device.launch(store_gates, walk.rows(n), walk.threads(), job, chunk.first, n, walk.gates, d_sum,
                      (after ? written : nullptr), (after && before ? kept : nullptr),
                      c, walk.z, d_alpha, d_beta);
        device.launch(store_keys, (size_t) (2 * job.n_k * n), walk.threads(), job, chunk.first, n, dq,
                      walk.inverse, d_qkv);
    }
}

} // namespace bupo::BUPO_DEVICE
