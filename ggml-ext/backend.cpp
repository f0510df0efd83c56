// A ggml backend around another one: ggml's own nodes go to the inner backend in runs as long as possible, ours to the
// kernels of ops/*.cu, on the inner backend's stream and in its buffers. Contract: ggml-ext.h.
//
// Compiled for the host in every build (BUPO_EMULATE, around the CPU backend), and for CUDA with the feature `cuda`.

#include "ops/device.h"
#include "internal.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#ifdef BUPO_EMULATE
#    include "ggml-cpu.h"
#else
#    include "device-cuda.h"
#    include "ggml-cuda.h"
#endif

#include <cstring>
#include <memory>
#include <string>

namespace bupo::BUPO_DEVICE {

namespace {

struct FreeBackend {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};

struct Context : BackendContext {
    std::unique_ptr<ggml_backend, FreeBackend> inner;
    std::string                                name;
    Device                                     device;

    Context(ggml_backend_t inner, int index, void * stream, bool precise)
        : inner(inner), name(std::string("bupo-") + ggml_backend_name(inner)), device(index, stream, precise) {}

    size_t scratch_bytes() const override { return device.scratch_bytes(); }

    bupo_rates rates(int64_t n, size_t bytes, int reps) override {
        device.enter();
        return measure_rates(device, n, bytes, reps);
    }

    void release() override {
        ggml_backend_synchronize(inner.get());
        device.enter();
        device.release();
    }
};

Context & context_of(ggml_backend_t backend) {
    return *static_cast<Context *>(static_cast<BackendContext *>(backend->context));
}

// The parameters of a node of ours, which begin with the op's id.
const void * params_of(const ggml_tensor * node) {
    ggml_custom_op_params custom;
    std::memcpy(&custom, node->op_params, sizeof(custom));
    return custom.userdata;
}

template <typename T> const T & params_as(const void * params) {
    return *static_cast<const T *>(params);
}

void run_custom(Device & device, ggml_tensor * node) {
    const void * params = params_of(node);
    if (!params) {
        throw Failure("a custom node without parameters");
    }
    switch (params_as<uint32_t>(params)) {
        case BUPO_OP_LINEAR:         return run_linear(device, node, params_as<bupo_linear_params>(params));
        case BUPO_OP_LINEAR_BACK:    return run_linear_back(device, node, params_as<bupo_linear_params>(params));
        case BUPO_OP_OUTER:          return run_outer(device, node, params_as<bupo_linear_params>(params));
        case BUPO_OP_LOGPROB:        return run_logprob(device, node, params_as<bupo_logprob_params>(params));
        case BUPO_OP_TAKEN_LOGITS:   return run_taken_logits(device, node, params_as<bupo_taken_logits_params>(params));
        case BUPO_OP_POLICIES:       return run_policies(device, node, params_as<bupo_policies_params>(params));
        case BUPO_OP_DIVERGENCE:     return run_divergence(device, node, params_as<bupo_divergence_params>(params));
        case BUPO_OP_DISTILL:        return run_distill(device, node, params_as<bupo_distill_params>(params));
        case BUPO_OP_ATTENTION:      return run_attention(device, node, params_as<bupo_attention_params>(params));
        case BUPO_OP_ATTENTION_BACK: return run_attention_back(device, node, params_as<bupo_attention_params>(params));
        case BUPO_OP_RMS_NORM:       return run_rms_norm(device, node, params_as<bupo_norm_params>(params));
        case BUPO_OP_RMS_NORM_BACK:  return run_rms_norm_back(device, node, params_as<bupo_norm_params>(params));
        case BUPO_OP_GLU:            return run_glu(device, node, params_as<bupo_glu_params>(params));
        case BUPO_OP_GLU_BACK:       return run_glu_back(device, node, params_as<bupo_glu_params>(params));
        case BUPO_OP_CONV:           return run_conv(device, node, params_as<bupo_conv_params>(params));
        case BUPO_OP_CONV_BACK:      return run_conv_back(device, node, params_as<bupo_conv_params>(params));
        case BUPO_OP_DELTA:          return run_delta(device, node, params_as<bupo_delta_params>(params));
        case BUPO_OP_DELTA_BACK:     return run_delta_back(device, node, params_as<bupo_delta_params>(params));
        case BUPO_OP_SCALE_ROWS:     return run_scale_rows(device, node);
        case BUPO_OP_ROUTE:          return run_route(device, node, params_as<bupo_route_params>(params));
        case BUPO_OP_ROUTE_BACK:     return run_route_back(device, node, params_as<bupo_route_params>(params));
        case BUPO_OP_ROUTE_ORDER:    return run_route_order(device, node, params_as<bupo_order_params>(params));
        case BUPO_OP_EXPERTS:        return run_experts(device, node, params_as<bupo_experts_params>(params));
        case BUPO_OP_EXPERTS_OUTER:  return run_experts_outer(device, node, params_as<bupo_experts_outer_params>(params));
        case BUPO_OP_SLOT_WEIGHTS:   return run_slot_weights(device, node, params_as<bupo_slots_params>(params));
        case BUPO_OP_WEIGHTS_BACK:   return run_weights_back(device, node, params_as<bupo_slots_params>(params));
        case BUPO_OP_GATE_ROWS:      return run_gate_rows(device, node);
        case BUPO_OP_GATE_ROWS_BACK: return run_gate_rows_back(device, node);
        case BUPO_OP_SUM_SQUARES:    return run_sum_squares(device, node);
        case BUPO_OP_ADAMW:          return run_adamw(device, node, params_as<bupo_adamw_params>(params));
        default:                     throw Failure("an op that this backend does not know");
    }
}

std::string describe(const ggml_tensor * node) {
    std::string text = ggml_op_name(node->op);
    if (node->op == GGML_OP_CUSTOM && params_of(node)) {
        text = "op " + std::to_string(params_as<uint32_t>(params_of(node)));
    }
    for (int i = 0; i < GGML_MAX_SRC && node->src[i]; ++i) {
        const ggml_tensor * s = node->src[i];
        text += std::string(i ? ", " : " of ") + ggml_type_name(s->type) + " [" + std::to_string(s->ne[0]) + ", " +
                std::to_string(s->ne[1]) + ", " + std::to_string(s->ne[2]) + "]";
    }
    return text;
}

// Nodes of ours, and ggml's own that need, or are better off with, code of ours.
bool takes(const ggml_tensor * node) {
    return node->op == GGML_OP_CUSTOM || node->op == GGML_OP_GET_ROWS_BACK ||
           (node->op == GGML_OP_GET_ROWS && Device::far(node->src[0]));
}

void run(Device & device, ggml_tensor * node) {
    switch (node->op) {
        case GGML_OP_GET_ROWS:      return run_far_rows(device, node);
        case GGML_OP_GET_ROWS_BACK: return run_rows_back(device, node);
        default:                    return run_custom(device, node);
    }
}

ggml_status compute_inner(ggml_backend_t inner, ggml_cgraph * graph, int first, int last) {
    if (first == last) {
        return GGML_STATUS_SUCCESS;
    }
    ggml_cgraph view = ggml_graph_view(graph, first, last);
    return inner->iface.graph_compute(inner, &view);
}

ggml_status graph_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    Context & context = context_of(backend);
    int       first   = 0; // of the inner backend's run
    if (guarded([&] { return context.device.enter(), BUPO_OK; }) != BUPO_OK) {
        return GGML_STATUS_FAILED;
    }
    for (int i = 0; i < graph->n_nodes; ++i) {
        ggml_tensor * node = graph->nodes[i];
        if (!takes(node)) {
#ifndef BUPO_EMULATE
            for (int s = 0; s < GGML_MAX_SRC && node->src[s]; ++s) {
                if (Device::far(node->src[s])) {
                    // The rope factors of a model with --gpu-layers, say.
                    fail(BUPO_ERR_ARGUMENT, describe(node) + ": a source lies in host memory; leave --gpu-layers out");
                    return GGML_STATUS_FAILED;
                }
            }
#endif
            continue;
        }
        if (const ggml_status status = compute_inner(context.inner.get(), graph, first, i); status != GGML_STATUS_SUCCESS) {
            return status;
        }
        first = i + 1;
        const bupo_status status = guarded([&] {
            const Device::Scope scope(context.device);
            run(context.device, node);
            return BUPO_OK;
        });
        if (status != BUPO_OK) {
            fail(status, describe(node) + ": " + bupo_last_error());
            return GGML_STATUS_FAILED;
        }
    }
    return compute_inner(context.inner.get(), graph, first, graph->n_nodes);
}

const char * get_name(ggml_backend_t backend) {
    return context_of(backend).name.c_str();
}

void free_backend(ggml_backend_t backend) {
    delete &context_of(backend);
    delete backend;
}

void synchronize(ggml_backend_t backend) {
    ggml_backend_synchronize(context_of(backend).inner.get());
}

ggml_guid_t guid() {
    static ggml_guid id = { 0xb0, 0x70, 0x66, 0x67, 0x67, 0x6d, 0x6c, 0x2d, 0x65, 0x78, 0x74, 0x2d, 0x64, 0x65, 0x76, sizeof(void *) };
    return &id;
}

ggml_backend_t wrap(std::unique_ptr<Context> context) {
    ggml_backend_i iface = {};
    iface.get_name      = get_name;
    iface.free          = free_backend;
    iface.synchronize   = synchronize;
    iface.graph_compute = graph_compute;
    ggml_backend_dev_t device = context->inner->device;
    BackendContext *   owned  = context.release();
    return new ggml_backend{ guid(), iface, device, owned };
}

} // namespace

} // namespace bupo::BUPO_DEVICE

using namespace bupo::BUPO_DEVICE;

#ifdef BUPO_EMULATE

size_t bupo_backend_scratch_bytes(ggml_backend_t backend) {
    return static_cast<bupo::BackendContext *>(backend->context)->scratch_bytes();
}

bupo_status bupo_backend_rates(ggml_backend_t backend, int64_t n, size_t bytes, int reps, bupo_rates * out) {
    if (!out || n < 1 || bytes < sizeof(int32_t) || reps < 1) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument, or nothing to measure");
    }
    return bupo::guarded(
        [&] {
            *out = static_cast<bupo::BackendContext *>(backend->context)->rates(n, bytes, reps);
            return BUPO_OK;
        },
        BUPO_ERR_DEVICE);
}

void bupo_backend_release(ggml_backend_t backend) {
    bupo::guarded([&] { return static_cast<bupo::BackendContext *>(backend->context)->release(), BUPO_OK; });
}

bupo_status bupo_backend_emulated(int n_threads, bool precise, ggml_backend_t * out) {
    if (!out || n_threads < 1) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument, or no threads");
    }
    return bupo::guarded([&] {
        ggml_backend_t inner = bupo_cpu_backend(n_threads);
        if (!inner) {
            return bupo::fail(BUPO_ERR_EXCEPTION, "no CPU backend");
        }
        *out = wrap(std::make_unique<Context>(inner, 0, nullptr, precise));
        return BUPO_OK;
    });
}

#    ifndef BUPO_CUDA

static bupo_status not_built() {
    return bupo::fail(BUPO_ERR_DEVICE, "this program was built without the feature `cuda`");
}

bool bupo_cuda_built(void) {
    return false;
}

bool bupo_cuda_decodes(ggml_type) {
    return false;
}

bupo_status bupo_backend_cuda(int, bool, ggml_backend_t *) {
    return not_built();
}

bupo_status bupo_cuda_count(int *) {
    return not_built();
}

bupo_status bupo_cuda_info(int, bupo_gpu *) {
    return not_built();
}

bupo_status bupo_cuda_buffer_type(int, ggml_backend_buffer_type_t *) {
    return not_built();
}

#    endif

#else

bool bupo_cuda_built(void) {
    return true;
}

bupo_status bupo_cuda_buffer_type(int index, ggml_backend_buffer_type_t * out) {
    ggml_backend_buffer_type_t type = ggml_backend_cuda_buffer_type(index);
    if (!type || !out) {
        return bupo::fail(BUPO_ERR_DEVICE, "no GPU " + std::to_string(index));
    }
    *out = type;
    return BUPO_OK;
}

bupo_status bupo_backend_cuda(int index, bool precise, ggml_backend_t * out) {
    bupo_gpu gpu;
    if (const bupo_status status = bupo_cuda_info(index, &gpu); status != BUPO_OK) {
        return status;
    }
    return bupo::guarded(
        [&] {
            ggml_backend_t inner = ggml_backend_cuda_init(index);
            if (!inner) {
                return bupo::fail(BUPO_ERR_DEVICE, "ggml's CUDA backend did not start");
            }
            *out = wrap(std::make_unique<Context>(inner, index, stream_of(inner), precise));
            return BUPO_OK;
        },
        BUPO_ERR_DEVICE);
}

#endif
