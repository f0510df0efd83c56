// What the C++ files of this folder share: how a failure gets through ggml-ext.h, and what every backend of ours has.
#pragma once

#include "ggml-ext.h"

#include <exception>
#include <string>

namespace bupo {

// Sets bupo_last_error() and gives `status` back.
bupo_status fail(bupo_status status, const std::string & words);

// Runs `body`, which returns a status; whatever it throws becomes `thrown`.
template <typename F> bupo_status guarded(F && body, bupo_status thrown = BUPO_ERR_EXCEPTION) {
    try {
        return body();
    } catch (const std::exception & e) {
        return fail(thrown, e.what());
    } catch (...) {
        return fail(thrown, "unknown exception");
    }
}

// From now on products with the factor `b`, a tensor in host memory, are computed by `kernel` (products.cpp).
void mark_factor(ggml_tensor * b, bupo_product kernel);

// From now on products with models' weights in host memory, matrices and stacks of experts', and attention are computed by the kernels of `decoding`
// where OwnProducts asks for them.
void offer(const bupo_decoding & decoding);

// The buffer type by which a CPU backend asks for our products.
ggml_backend_buffer_type_t products_type(ggml_backend_reg_t cpu);

// In its life, these products with weights, and with them our attention, are taken in what `pool` computes.
class OwnProducts {
public:
    OwnProducts(const ggml_threadpool * pool, bupo_products products, const bupo_lineage * lineages);
    ~OwnProducts();
    OwnProducts(const OwnProducts &) = delete;
    OwnProducts & operator=(const OwnProducts &) = delete;

private:
    void * place_ = nullptr;
};

// The `context` of a backend made in backend.cpp.
struct BackendContext {
    virtual ~BackendContext() = default;
    virtual size_t scratch_bytes() const = 0;
    virtual void   release() = 0;
    virtual bupo_rates rates(int64_t n, size_t bytes, int reps) = 0;
};

} // namespace bupo
