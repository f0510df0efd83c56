// Our own product with an adapter's B inside llama.cpp's graphs on the CPU, by ggml's extension point for that: "extra"
// buffer types, which every node is offered to before ggml computes it. Ours owns no memory. Contract: ggml-ext.h.

#include "ggml-ext.h"
#include "internal.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/traits.h"

#include <atomic>
#include <mutex>

namespace bupo {

namespace {

std::atomic<bupo_product> product{ nullptr };

struct Product : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t & size) override {
        size = 0;
        return true;
    }
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        product.load(std::memory_order_acquire)(op, params->ith, params->nth);
        return true;
    }
};

Product traits;

struct Products : ggml::cpu::extra_buffer_type {
    // No weight is to be put into a buffer of this type.
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT || op->src[0]->extra != &traits) {
            return nullptr;
        }
        const ggml_tensor * x = op->src[1];
        const bool plain = x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_is_contiguous(op) && ggml_is_matrix(x);
        return plain ? &traits : nullptr;
    }
};

Products products;

const char * name(ggml_backend_buffer_type_t) {
    return "bupo-products";
}

ggml_backend_buffer_t alloc(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        buffer->buft = type;
    }
    return buffer;
}

size_t alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

} // namespace

void mark_factor(ggml_tensor * b, bupo_product kernel) {
    product.store(kernel, std::memory_order_release);
    b->extra = &traits;
}

} // namespace bupo

void bupo_cpu_init(void) {
    static std::once_flag once;
    std::call_once(once, [] {
        static ggml_backend_buffer_type type = {};
        type.iface.get_name      = bupo::name;
        type.iface.alloc_buffer  = bupo::alloc;
        type.iface.get_alignment = bupo::alignment;
        type.device              = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
        type.context             = &bupo::products;
        ggml_backend_cpu_get_extra_buffer_types().push_back(&type);
    });
}
