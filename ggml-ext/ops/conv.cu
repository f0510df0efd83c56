// Causal depthwise convolution over packed segments with SiLU after it, and its vjp, a thread per value. Twin:
// src/ops/conv.rs, which has the formulas.

#include "device.h"

namespace bupo::BUPO_DEVICE {

namespace {

// A segment and the channels.
struct Run {
    int          begin, end, prefix_begin, prefix_end;
    int          channels, k;
    const float * w; // [K, channels]

    __device__ float weight(int channel, int back) const { return w[channel * k + k - 1 - back]; }

    // The token `back` places before t in its sequence; -1 before the first.
    __device__ int before(int t, int back) const {
        const int own = t - begin;
        if (back <= own) {
            return t - back;
        }
        const int into = back - own;
        return into <= prefix_end - prefix_begin ? prefix_end - into : -1;
    }

    __device__ float sum(const float * x, int t, int channel) const {
        float s = 0.0f;
        for (int back = k - 1; back >= 0; --back) {
            const int source = before(t, back);
            if (source >= 0) {
                s += weight(channel, back) * x[(size_t) source * channels + channel];
            }
        }
        return s;
    }
};

// Calls body(run, values) with every segment and how many values it has.
template <typename F> void each(Device & device, const ggml_tensor * dst, const bupo_conv_params & params, F && body) {
    const float * w        = device.small(dst->src[1]);
    const int     channels = (int) dst->ne[0], k = (int) dst->src[1]->ne[0];
    for (uint32_t i = 0; i < params.n_segments; ++i) {
        const bupo_segment & s   = params.segments[i];
        const Run            run = { s.begin, s.end, s.prefix_begin, s.prefix_end, channels, k, w };
        body(run, (size_t) (s.end - s.begin) * channels);
    }
}

} // namespace

static __global__ void conv(Run run, const float * x, float * y) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    const int    t = run.begin + (int) (i / run.channels);
    if (t < run.end) {
        const int   channel = (int) (i % run.channels);
        const float s       = run.sum(x, t, channel);
        y[(size_t) t * run.channels + channel] = s / (1.0f + expf(-s));
    }
}

// ds of each value.
static __global__ void conv_slope(Run run, const float * x, const float * dy, float * ds) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    const int    t = run.begin + (int) (i / run.channels);
    if (t < run.end) {
        const int    channel = (int) (i % run.channels);
        const float  s       = run.sum(x, t, channel);
        const float  sigmoid = 1.0f / (1.0f + expf(-s));
        const size_t at      = (size_t) t * run.channels + channel;
        ds[at] = dy[at] * sigmoid * (1.0f + s * (1.0f - sigmoid));
    }
}

// What the tokens of a segment hand back to those of its own.
static __global__ void conv_own(Run run, const float * ds, float * dx) {
    const size_t i = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    const int    t = run.begin + (int) (i / run.channels);
    if (t < run.end) {
        const int channel = (int) (i % run.channels);
        float     sum     = 0.0f;
        for (int ahead = 0; ahead < run.k && t + ahead < run.end; ++ahead) {
            sum += run.weight(channel, ahead) * ds[(size_t) (t + ahead) * run.channels + channel];
        }
        dx[(size_t) t * run.channels + channel] = sum;
    }
}

// And to the last of its prefix.
static __global__ void conv_prefix(Run run, const float * ds, float * dx) {
    const size_t i    = (size_t) blockIdx.x * blockDim.x + threadIdx.x;
    const int    into = 1 + (int) (i / run.channels); // 1: the prefix's last token
    if (into < run.k && into <= run.prefix_end - run.prefix_begin) {
        const int channel = (int) (i % run.channels);
        float     sum     = 0.0f;
        for (int t = run.begin; t < run.end && t - run.begin + into < run.k; ++t) {
            sum += run.weight(channel, t - run.begin + into) * ds[(size_t) t * run.channels + channel];
        }
        dx[(size_t) (run.prefix_end - into) * run.channels + channel] += sum;
    }
}

void run_conv(Device & device, ggml_tensor * dst, const bupo_conv_params & params) {
    const float * x = data_of(dst->src[0]);
    each(device, dst, params,
         [&](const Run & run, size_t n) { device.launch(conv, blocks_for(n), THREADS, run, x, data_of(dst)); });
}

void run_conv_back(Device & device, ggml_tensor * dst, const bupo_conv_params & params) {
    const float * x  = data_of(dst->src[0]);
    const float * dy = data_of(dst->src[2]);
    float *       ds = device.floats(ggml_nelements(dst));
    const float * slopes = ds;
    each(device, dst, params, [&](const Run & run, size_t n) {
        device.launch(conv_slope, blocks_for(n), THREADS, run, x, dy, ds);
        device.launch(conv_own, blocks_for(n), THREADS, run, slopes, data_of(dst));
    });
    // One segment after the other, for those of a tree add to the same tokens.
    each(device, dst, params, [&](const Run & run, size_t) {
        const size_t n = run.prefix_end > run.prefix_begin ? (size_t) (run.k - 1) * run.channels : 0;
        device.launch(conv_prefix, blocks_for(n), THREADS, run, slopes, data_of(dst));
    });
}

} // namespace bupo::BUPO_DEVICE
