// Drawing tokens where the logits are: a llama.cpp backend sampler of our own, which is part of the decoding graph.
//
//   p = softmax(logits / T),  token = first v with sum_{w <= v} p_w > u sum_w p_w,  log-prob = log p_token
//
// llama.cpp's own `dist` has a generator of its own for u and gives the probabilities of all tokens; here u comes from the
// caller, who keys it by prompt and completion, and one number goes back.

#include "ggml-ext.h"
#include "internal.h"

#include <memory>
#include <vector>

namespace {

struct Draw {
    float uniform         = 0.0f;
    float inv_temperature = 1.0f;
    // Inputs of the graph that was built last: [u] and [1/T].
    std::vector<ggml_tensor *> uniforms, temperatures;
};

Draw & draw_of(const llama_sampler * sampler) {
    return *static_cast<Draw *>(sampler->ctx);
}

const char * name(const llama_sampler *) {
    return "bupo-draw";
}

// Only the graph draws; nobody calls this on the host.
void apply(llama_sampler *, llama_token_data_array *) {}

void free_draw(llama_sampler * sampler) {
    delete &draw_of(sampler);
}

bool backend_init(llama_sampler *, ggml_backend_buffer_type_t, uint32_t n_outputs_max_per_seq) {
    return n_outputs_max_per_seq == 1;
}

ggml_tensor * input(ggml_context * ctx, const char * name) {
    ggml_tensor * x = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_set_name(x, name);
    ggml_set_input(x);
    return x;
}

void backend_apply(llama_sampler * sampler, ggml_context * ctx, ggml_cgraph *, llama_sampler_data * data) {
    Draw &        draw    = draw_of(sampler);
    ggml_tensor * u       = input(ctx, "draw_uniform");
    ggml_tensor * inverse = input(ctx, "draw_inv_temperature");
    draw.uniforms.push_back(u);
    draw.temperatures.push_back(inverse);
    const int64_t n      = ggml_nelements(data->logits);
    ggml_tensor * logits = ggml_reshape_1d(ctx, data->logits, n);
    ggml_tensor * probs  = ggml_soft_max(ctx, ggml_mul(ctx, logits, inverse)); // [V]
    ggml_tensor * mass   = ggml_cumsum(ctx, probs);
    ggml_tensor * all    = ggml_view_1d(ctx, mass, 1, (size_t) (n - 1) * sizeof(float));
    ggml_tensor * passed = ggml_step(ctx, ggml_sub(ctx, mass, ggml_mul(ctx, all, u))); // 1 from the token on
    ggml_tensor * count  = ggml_clamp(ctx, ggml_sum(ctx, passed), 1.0f, (float) n);
    ggml_tensor * token  = ggml_cast(ctx, ggml_scale_bias(ctx, count, -1.0f, (float) n), GGML_TYPE_I32);
    data->sampled    = token;
    data->probs      = ggml_log(ctx, ggml_get_rows(ctx, ggml_reshape_2d(ctx, probs, 1, n), token));
    data->logits     = nullptr; // nobody wants them on the host
    data->candidates = nullptr;
}

void backend_set_input(llama_sampler * sampler) {
    const Draw & draw = draw_of(sampler);
    for (ggml_tensor * u : draw.uniforms) {
        ggml_backend_tensor_set(u, &draw.uniform, 0, sizeof(float));
    }
    for (ggml_tensor * inverse : draw.temperatures) {
        ggml_backend_tensor_set(inverse, &draw.inv_temperature, 0, sizeof(float));
    }
}

void backend_reset(llama_sampler * sampler) {
    draw_of(sampler).uniforms.clear();
    draw_of(sampler).temperatures.clear();
}

llama_sampler_i interface() {
    llama_sampler_i i = {};
    i.name              = name;
    i.apply             = apply;
    i.free              = free_draw;
    i.backend_init      = backend_init;
    i.backend_apply     = backend_apply;
    i.backend_set_input = backend_set_input;
    i.backend_reset     = backend_reset;
    return i;
}

} // namespace

bupo_status bupo_draw_new(llama_sampler ** out) {
    if (!out) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return bupo::guarded([&] {
        static llama_sampler_i own  = interface();
        auto                   draw = std::make_unique<Draw>();
        // llama.cpp takes chains alone; the chain frees what is added to it.
        llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
        llama_sampler_chain_add(chain, llama_sampler_init(&own, draw.release()));
        *out = chain;
        return BUPO_OK;
    });
}

void bupo_draw_set(llama_sampler * sampler, float uniform, float inv_temperature) {
    Draw & draw          = draw_of(llama_sampler_chain_get(sampler, 0));
    draw.uniform         = uniform;
    draw.inv_temperature = inv_temperature;
}

bupo_status bupo_draw_attach(llama_context * context, llama_seq_id sequence, llama_sampler * sampler) {
    if (!context) {
        return bupo::fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return bupo::guarded([&] {
        if (!llama_set_sampler(context, sequence, sampler)) {
            return bupo::fail(BUPO_ERR_ARGUMENT, "llama.cpp does not take the sampler");
        }
        return BUPO_OK;
    });
}
