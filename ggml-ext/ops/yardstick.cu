// How fast a device multiplies and copies: what an op's time is held against (`bupo-gguf bench ops`).

#include "device.h"

#include <chrono>

namespace bupo::BUPO_DEVICE {

// Seconds of `work`, the least of `reps`, after one run to warm up. `mark` is memory that the stream's work is waited by.
template <typename F> static double least_seconds(Device & device, int reps, const void * mark, F && work) {
    double least = 0.0;
    for (int rep = 0; rep <= reps; ++rep) {
        int32_t    word;
        const auto begin = std::chrono::steady_clock::now();
        work();
        device.download(&word, mark, sizeof(word));
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
        if (rep > 0 && (least == 0.0 || seconds < least)) {
            least = seconds;
        }
    }
    return least;
}

bupo_rates measure_rates(Device & device, int64_t n, size_t bytes, int reps) {
    const size_t square = (size_t) (n * n);
    bupo_rates   rates  = {};
    {
        const Device::Scope scope(device);
        void *              a = device.scratch(square * size_of(device.kind()));
        void *              b = device.scratch(square * size_of(device.kind()));
        float *             c = device.floats(square);
        device.zero(a, square * size_of(device.kind()));
        device.zero(b, square * size_of(device.kind()));
        const double seconds = least_seconds(device, reps, c, [&] {
            device.multiply({ n, n, n }, { a, device.kind(), n, true }, { b, device.kind(), n }, c, n);
        });
        rates.flop_per_s = 2.0 * (double) square * (double) n / seconds;
    }
    {
        const Device::Scope scope(device);
        void *              from = device.scratch(bytes);
        void *              to   = device.scratch(bytes);
        device.zero(from, bytes);
        const double seconds = least_seconds(device, reps, to, [&] { device.copy(to, from, bytes); });
        rates.bytes_per_s = 2.0 * (double) bytes / seconds; // read and written
    }
    return rates;
}

} // namespace bupo::BUPO_DEVICE
