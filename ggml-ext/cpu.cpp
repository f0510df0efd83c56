// Which of the CPU backends in this program computes, and what the program itself needs of a processor. Contract: ggml-ext.h.
//
// With the feature `portable` the program holds ggml's CPU backend more than once (vendor/ggml-sys/build/variants.rs), each
// under names of its own. llama.cpp takes backends from ggml's registry alone, so that the one registered there is the one
// that computes.

#include "ggml-ext.h"
#include "internal.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/traits.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

namespace {

using ExtraTypes = std::vector<ggml_backend_buffer_type_t> & (*) ();

struct Variant {
    const char * name;
    bool (*fits)();
    ggml_backend_reg_t (*reg)();
    ggml_backend_t (*init)();
    void (*set_n_threads)(ggml_backend_t, int);
    void (*set_threadpool)(ggml_backend_t, ggml_threadpool_t);
    ggml_threadpool * (*threadpool_new)(ggml_threadpool_params *);
    void (*threadpool_free)(ggml_threadpool *);
    ExtraTypes extra_types;
};

#ifdef BUPO_CPU_VARIANTS

#define NAMED(variant, symbol) asm(#variant "_" #symbol)
#define DECLARE(variant)                                                                                                   \
    ggml_backend_reg_t variant##_reg() NAMED(variant, ggml_backend_cpu_reg);                                               \
    ggml_backend_t variant##_init() NAMED(variant, ggml_backend_cpu_init);                                                 \
    void variant##_set_n_threads(ggml_backend_t, int) NAMED(variant, ggml_backend_cpu_set_n_threads);                      \
    void variant##_set_threadpool(ggml_backend_t, ggml_threadpool_t) NAMED(variant, ggml_backend_cpu_set_threadpool);      \
    ggml_threadpool * variant##_threadpool_new(ggml_threadpool_params *) NAMED(variant, ggml_threadpool_new);              \
    void variant##_threadpool_free(ggml_threadpool *) NAMED(variant, ggml_threadpool_free);                                \
    std::vector<ggml_backend_buffer_type_t> & variant##_extra_types()                                                      \
        NAMED(variant, _Z39ggml_backend_cpu_get_extra_buffer_typesv);

#define VARIANT(variant, text, fits)                                                                                       \
    { text, fits, variant##_reg, variant##_init, variant##_set_n_threads, variant##_set_threadpool,                        \
      variant##_threadpool_new, variant##_threadpool_free, variant##_extra_types }

} // namespace

DECLARE(avx512)
DECLARE(avx512_vnni)

namespace {

// Also whether the system saves the registers.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

#endif

bool always() {
    return true;
}

// The best first.
const Variant variants[] = {
#ifdef BUPO_CPU_VARIANTS
    VARIANT(avx512_vnni, "avx512-vnni", has_avx512_vnni),
    VARIANT(avx512, "avx512", has_avx512),
#endif
    { "baseline", always, ggml_backend_cpu_reg, ggml_backend_cpu_init, ggml_backend_cpu_set_n_threads,
      ggml_backend_cpu_set_threadpool, ggml_threadpool_new, ggml_threadpool_free, ggml_backend_cpu_get_extra_buffer_types },
};

const Variant & choose() {
    // For tests and measurements; a name that is none, or does not fit, changes nothing.
    const char * wanted = getenv("BUPO_CPU");
    for (const Variant & variant : variants) {
        if (wanted && !strcmp(wanted, variant.name) && variant.fits()) {
            return variant;
        }
    }
    for (const Variant & variant : variants) {
        if (variant.fits()) {
            return variant;
        }
    }
    return variants[sizeof variants / sizeof *variants - 1];
}

const Variant & chosen() {
    static const Variant * variant = nullptr;
    static std::once_flag  once;
    std::call_once(once, [] {
        variant                 = &choose();
        ggml_backend_reg_t base = ggml_backend_cpu_reg(), ours = variant->reg();
        if (ours != base) {
            ggml_backend_unload(base);
            ggml_backend_register(ours);
        }
        variant->extra_types().push_back(bupo::products_type(ours));
    });
    return *variant;
}

} // namespace

const char * bupo_cpu_init(void) {
    return chosen().name;
}

ggml_backend_reg_t bupo_cpu_reg(void) {
    return chosen().reg();
}

ggml_backend_t bupo_cpu_backend(int n_threads) {
    ggml_backend_t backend = chosen().init();
    if (backend) {
        chosen().set_n_threads(backend, n_threads);
    }
    return backend;
}

void bupo_cpu_set_threadpool(ggml_backend_t backend, struct ggml_threadpool * pool) {
    chosen().set_threadpool(backend, pool);
}

void bupo_cpu_set_threads(ggml_backend_t backend, int n_threads) {
    chosen().set_n_threads(backend, n_threads);
}

struct ggml_threadpool * bupo_threadpool_new(struct ggml_threadpool_params * params) {
    return chosen().threadpool_new(params);
}

void bupo_threadpool_free(struct ggml_threadpool * pool) {
    chosen().threadpool_free(pool);
}

uint32_t bupo_cpu_features(void) {
    uint32_t features = 0;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    features |= __builtin_cpu_supports("avx2") ? BUPO_CPU_AVX2 : 0;
    features |= __builtin_cpu_supports("fma") ? BUPO_CPU_FMA : 0;
    features |= __builtin_cpu_supports("bmi2") ? BUPO_CPU_BMI2 : 0;
    features |= __builtin_cpu_supports("avx512f") ? BUPO_CPU_AVX512F : 0;
    features |= __builtin_cpu_supports("avx512bw") ? BUPO_CPU_AVX512BW : 0;
    features |= __builtin_cpu_supports("avx512vl") ? BUPO_CPU_AVX512VL : 0;
    features |= __builtin_cpu_supports("avx512vnni") ? BUPO_CPU_AVX512VNNI : 0;
#endif
    return features;
}
