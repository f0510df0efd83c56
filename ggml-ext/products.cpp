// Our own products inside llama.cpp's graphs on the CPU, with an adapter's B and with a model's weights, and our attention, by ggml's extension
// point for that: "extra" buffer types, which every node is offered to before ggml computes it. Ours owns no memory.
// Contract: ggml-ext.h.

#include "ggml-ext.h"
#include "internal.h"

#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/traits.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

namespace bupo {

namespace {

std::atomic<bupo_product> product{ nullptr };
std::atomic<bupo_product> weight_product{ nullptr };
std::atomic<bupo_product> wide_product{ nullptr };
std::atomic<int64_t>      wide_columns{ 0 };
std::atomic<bupo_attention> attention{ nullptr };
std::atomic<int64_t>        most_heads{ 0 };

// The thread pools that decode with our products at the moment.
struct Decoding {
    std::atomic<const ggml_threadpool *> pool{ nullptr };
    std::atomic<bupo_products>           products{ BUPO_PRODUCTS_GGML };
    std::atomic<const bupo_lineage *>    lineages{ nullptr };
};

Decoding decoding[64];

const Decoding * decoding_of(const ggml_threadpool * pool) {
    for (const Decoding & d : decoding) {
        if (d.pool.load(std::memory_order_acquire) == pool) {
            return &d;
        }
    }
    return nullptr;
}

bupo_products products_of(const ggml_threadpool * pool) {
    const Decoding * d = decoding_of(pool);
    return d ? d->products.load(std::memory_order_relaxed) : BUPO_PRODUCTS_GGML;
}

struct Product : ggml::cpu::tensor_traits {
    bool work_size(int, const ggml_tensor *, size_t & size) override {
        size = 0;
        return true;
    }
    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        // The kernel for a factor cuts columns into tiles, in which sums are formed in another order.
        const bool invariant = products_of(params->threadpool) == BUPO_PRODUCTS_INVARIANT;
        (invariant ? weight_product : product).load(std::memory_order_acquire)(op, params->ith, params->nth);
        return true;
    }
};

Product traits;

// With weights of one type.
struct WeightProduct : ggml::cpu::tensor_traits {
    std::atomic<int64_t> columns{ 0 }; // from which ours is the faster one; 0: never

    // What ggml's own product needs, for it may be the one that is taken.
    bool work_size(int, const ggml_tensor *, size_t &) override { return false; }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const bupo_products wanted = products_of(params->threadpool);
        const int64_t       faster = columns.load(std::memory_order_relaxed);
        const int64_t       wide   = wide_columns.load(std::memory_order_relaxed);
        if (wanted == BUPO_PRODUCTS_FASTER && faster > 0 && wide > 0 && op->op == GGML_OP_MUL_MAT && columns_of(op) >= wide) {
            wide_product.load(std::memory_order_acquire)(op, params->ith, params->nth);
            return true;
        }
        const bool          always = wanted == BUPO_PRODUCTS_EXACT || (wanted == BUPO_PRODUCTS_INVARIANT && faster > 0);
        if (wanted == BUPO_PRODUCTS_GGML || (!always && (faster == 0 || columns_of(op) < faster))) {
            return false;
        }
        weight_product.load(std::memory_order_acquire)(op, params->ith, params->nth);
        return true;
    }

private:
    // Columns that a row of the weight is multiplied with; of experts the mean.
    static int64_t columns_of(const ggml_tensor * op) {
        return op->op == GGML_OP_MUL_MAT ? ggml_nrows(op->src[1]) : ggml_nelements(op->src[2]) / op->src[0]->ne[2];
    }
};

WeightProduct weight_traits[GGML_TYPE_COUNT];

// Of many sequences that decode one token each, and of prompts.
struct Attention : ggml::cpu::tensor_traits {
    // What ggml's own needs, for it may be the one that is taken.
    bool work_size(int, const ggml_tensor *, size_t &) override { return false; }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const Decoding *    ours   = decoding_of(params->threadpool);
        const bupo_products wanted = ours ? ours->products.load(std::memory_order_relaxed) : BUPO_PRODUCTS_GGML;
        const int64_t       least  = wanted == BUPO_PRODUCTS_INVARIANT ? 1 : BUPO_ATTENTION_SEQUENCES;
        if (wanted == BUPO_PRODUCTS_GGML || !serves(op, least)) {
            return false;
        }
        const bupo_lineage * lineages = ours->lineages.load(std::memory_order_relaxed);
        attention.load(std::memory_order_acquire)(op, lineages ? lineages + first_stream(op->src[1]) : nullptr,
                                                  wanted != BUPO_PRODUCTS_FASTER, params->ith, params->nth);
        return true;
    }

private:
    // The cache's stream that a view of keys begins with.
    static int64_t first_stream(const ggml_tensor * k) {
        return k->view_src ? ((const char *) k->data - (const char *) k->view_src->data) / (int64_t) k->nb[3] : 0;
    }

    static bool host(const ggml_tensor * t) {
        const ggml_tensor * whole = t->view_src ? t->view_src : t;
        return whole->buffer && ggml_backend_buffer_is_host(whole->buffer);
    }

    static bool serves(const ggml_tensor * op, int64_t least) {
        const ggml_tensor * q = op->src[0], * k = op->src[1], * v = op->src[2], * mask = op->src[3];
        const ggml_tensor * sinks = op->src[4];
        float bias;
        memcpy(&bias, (const float *) op->op_params + 1, sizeof bias);
        const int64_t streams = q->ne[3];
        const bool plain = bias == 0.0f && (!sinks || (sinks->type == GGML_TYPE_F32 && ggml_is_contiguous(sinks) && host(sinks)));
        const bool shapes = (q->ne[1] > 1 || streams >= least) && k->ne[3] == streams && v->ne[3] == streams &&
                            k->ne[0] == q->ne[0] && v->ne[0] == q->ne[0] && v->ne[2] == k->ne[2] && q->ne[2] % k->ne[2] == 0 &&
                            q->ne[2] / k->ne[2] <= most_heads.load(std::memory_order_relaxed);
        const bool rows = q->type == GGML_TYPE_F32 && q->nb[0] == 4 && k->type == GGML_TYPE_F16 && k->nb[0] == 2 &&
                          v->type == GGML_TYPE_F16 && v->nb[0] == 2 && ggml_is_contiguous(op) && host(k) && host(v) && host(q);
        const bool masked = !mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[0] == k->ne[1] &&
                                      mask->ne[1] >= q->ne[1] && mask->ne[2] == 1 && mask->ne[3] == streams && host(mask));
        return plain && shapes && rows && masked && attention.load(std::memory_order_relaxed);
    }
};

Attention attention_traits;

// Whether `w` is a model's weight of which our kernels read whole rows. It is not marked, for ggml keeps the fastest of its own kernels from
// tensors with an `extra`.
bool is_weight(const ggml_tensor * w) {
    return w->op == GGML_OP_NONE && !w->extra && w->buffer && ggml_backend_buffer_get_usage(w->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS &&
           ggml_backend_buffer_is_host(w->buffer) && w->ne[3] == 1 && ggml_is_contiguous(w) &&
           (w->type == GGML_TYPE_F32 || ggml_get_type_traits(w->type)->to_float);
}

struct Products : ggml::cpu::extra_buffer_type {
    // No weight is to be put into a buffer of this type.
    bool supports_op(ggml_backend_dev_t, const ggml_tensor *) override { return false; }

    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return &attention_traits;
        }
        const bool of_experts = op->op == GGML_OP_MUL_MAT_ID;
        if (op->op != GGML_OP_MUL_MAT && !of_experts) {
            return nullptr;
        }
        ggml::cpu::tensor_traits * ours = nullptr;
        if (op->src[0]->extra == &traits && !of_experts) {
            ours = &traits;
        } else if (weight_product.load(std::memory_order_acquire) && is_weight(op->src[0])) {
            ours = &weight_traits[op->src[0]->type];
        } else {
            return nullptr;
        }
        const ggml_tensor * x = op->src[1];
        // Columns may be cut into sequences, as they are behind a recurrent layer: ggml would take each sequence's by themselves.
        const bool shapes = of_experts ? op->src[2]->type == GGML_TYPE_I32 && ggml_is_matrix(op->src[2]) && op->src[2]->nb[0] == 4
                                       : ggml_is_matrix(op->src[0]);
        const bool plain = x->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_is_contiguous(op);
        return plain && shapes ? ours : nullptr;
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

void offer(const bupo_decoding & decoding) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        weight_traits[type].columns.store(decoding.columns[type], std::memory_order_relaxed);
    }
    wide_columns.store(decoding.wide_columns, std::memory_order_relaxed);
    wide_product.store(decoding.wide, std::memory_order_release);
    most_heads.store(decoding.most_heads, std::memory_order_relaxed);
    weight_product.store(decoding.product, std::memory_order_release);
    attention.store(decoding.attention, std::memory_order_release);
}

OwnProducts::OwnProducts(const ggml_threadpool * pool, bupo_products products, const bupo_lineage * lineages) {
    if (!pool || products == BUPO_PRODUCTS_GGML) {
        return;
    }
    for (Decoding & d : decoding) {
        const ggml_threadpool * free = nullptr;
        if (d.pool.compare_exchange_strong(free, pool, std::memory_order_acq_rel)) {
            d.lineages.store(lineages, std::memory_order_release);
            d.products.store(products, std::memory_order_release);
            place_ = &d;
            return;
        }
    }
    throw std::runtime_error("more than 64 decodes at once");
}

OwnProducts::~OwnProducts() {
    if (place_) {
        Decoding & d = *static_cast<Decoding *>(place_);
        d.products.store(BUPO_PRODUCTS_GGML, std::memory_order_release);
        d.lineages.store(nullptr, std::memory_order_release);
        d.pool.store(nullptr, std::memory_order_release);
    }
}

ggml_backend_buffer_type_t products_type(ggml_backend_reg_t cpu) {
    static ggml_backend_buffer_type type = {};
    type.iface.get_name      = name;
    type.iface.alloc_buffer  = alloc;
    type.iface.get_alignment = alignment;
    type.device              = ggml_backend_reg_dev_get(cpu, 0);
    type.context             = &products;
    return &type;
}

} // namespace bupo
