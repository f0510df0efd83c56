// The only file that sees llama.cpp internals (ggml-cpu's: products.cpp). Contract: ggml-ext.h.

#include "ggml-ext.h"
#include "internal.h"

#include "llama-adapter.h"
#include "llama-ext.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using bupo::fail;
using bupo::guarded;

static thread_local std::string last_error;

bupo_status bupo::fail(bupo_status status, const std::string & words) {
    last_error = words;
    return status;
}

namespace {

bupo_status check_pair(const llama_model & model, const bupo_lora_pair & pair) {
    const std::string name = pair.weight ? pair.weight : "";
    const ggml_tensor * w = model.get_tensor(name.c_str());
    if (!w || !pair.a || !pair.b) {
        return fail(BUPO_ERR_ARGUMENT, "adapter for '" + name + "': no such weight, or no tensors");
    }
    const bool f32 = pair.a->type == GGML_TYPE_F32 && pair.b->type == GGML_TYPE_F32;
    const bool fits = pair.a->ne[0] == w->ne[0] && pair.b->ne[1] == w->ne[1] && pair.a->ne[1] == pair.b->ne[0] &&
                      pair.a->ne[2] == w->ne[2] && pair.b->ne[2] == w->ne[2];
    if (!f32 || !fits || !pair.a->data || !pair.b->data) {
        return fail(BUPO_ERR_ARGUMENT, "adapter for '" + name + "': A and B must be F32, allocated, and fit the weight");
    }
    return BUPO_OK;
}

} // namespace

const char * bupo_last_error(void) {
    return last_error.c_str();
}

bupo_status bupo_model_hparams(const llama_model * model, bupo_hparams * out) {
    if (!model || !out) {
        return fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return guarded([&] {
        const llama_hparams & h = model->hparams;
        bupo_hparams r = {};
        r.n_layer            = h.n_layer();
        r.n_embd             = h.n_embd;
        r.n_ctx_train        = h.n_ctx_train;
        r.n_expert           = h.n_expert;
        r.n_ff_shared        = h.n_ff_shexp;
        r.expert_scale       = h.expert_weights_scale;
        r.n_embd_per_layer   = h.n_embd_per_layer;
        r.windowed           = h.swa_type != LLAMA_SWA_TYPE_NONE;
        std::copy_n(h.rope_sections.begin(), 4, r.rope_sections);
        r.ssm_conv           = h.ssm_d_conv;
        r.ssm_inner          = h.ssm_d_inner;
        r.ssm_state          = h.ssm_d_state;
        r.ssm_heads          = h.ssm_dt_rank;
        r.ssm_groups         = h.ssm_n_group;
        r.n_layer_kv         = h.n_layer_kv_from_start < 0 ? r.n_layer : h.n_layer_kv_from_start;
        r.rms_eps            = h.f_norm_rms_eps;
        r.embedding_scale    = h.f_embedding_scale;
        r.residual_scale     = h.f_residual_scale;
        r.logit_scale        = h.f_logit_scale;
        r.attention_scale    = h.f_attention_scale;
        r.attention_softcap  = h.attn_soft_cap ? h.f_attn_logit_softcapping : 0.0f;
        r.final_softcap      = h.f_final_logit_softcapping;
        r.temperature_scale  = h.f_attn_temp_scale;
        r.temperature_floor  = h.n_attn_temp_floor_scale;
        r.temperature_offset = h.f_attn_temp_offset;
        r.rope_scaling_type  = h.rope_scaling_type_train;
        r.rope_type          = llama_model_rope_type(model);
        r.rope_freq_scale    = h.rope_freq_scale_train;
        r.rope_ctx_orig      = h.n_ctx_orig_yarn != 0 ? h.n_ctx_orig_yarn : h.n_ctx_train;
        r.rope_attn_factor   = h.rope_attn_factor;
        r.yarn_ext_factor    = h.yarn_ext_factor;
        r.yarn_attn_factor   = h.yarn_attn_factor;
        r.yarn_beta_fast     = h.yarn_beta_fast;
        r.yarn_beta_slow     = h.yarn_beta_slow;
        r.yarn_log_mul       = h.rope_yarn_log_mul;
        *out = r;
        return BUPO_OK;
    });
}

bupo_status bupo_model_layer_hparams(const llama_model * model, uint32_t layer, bupo_layer_hparams * out) {
    if (!model || !out || layer >= model->hparams.n_layer()) {
        return fail(BUPO_ERR_ARGUMENT, "null argument, or no such layer");
    }
    return guarded([&] {
        const llama_hparams & h = model->hparams;
        const bool windowed = h.is_swa(layer) && h.swa_type != LLAMA_SWA_TYPE_NONE;
        if (windowed && (h.swa_type != LLAMA_SWA_TYPE_STANDARD || h.n_swa == 0)) {
            return fail(BUPO_ERR_ARGUMENT, "windows of no token, or of another kind than the last n tokens");
        }
        bupo_layer_hparams r = {};
        r.n_head          = h.n_head(layer);
        r.n_head_kv       = h.n_head_kv(layer);
        r.n_ff            = h.n_ff(layer);
        r.n_ff_expert     = h.n_ff_exp(layer);
        r.n_expert_used   = h.n_expert_used(layer);
        r.head_size_k     = h.n_embd_head_k(layer);
        r.head_size_v     = h.n_embd_head_v(layer);
        r.n_rot           = h.n_rot(layer);
        r.window          = windowed ? h.n_swa : 0;
        r.kv              = h.has_kv(layer);
        r.rope            = h.has_rope(layer);
        r.recurrent       = h.is_recr(layer);
        r.state           = r.recurrent ? h.n_embd_r() + h.n_embd_s() : 0;
        r.rope_freq_base  = h.is_swa(layer) ? h.rope_freq_base_train_swa : h.rope_freq_base_train;
        r.rope_freq_scale = h.is_swa(layer) ? h.rope_freq_scale_train_swa : h.rope_freq_scale_train;
        *out = r;
        return BUPO_OK;
    });
}

size_t bupo_model_n_tensors(const llama_model * model) {
    return model ? llama_internal_get_tensor_map(model).size() : 0;
}

bupo_status bupo_model_tensor(const llama_model * model, size_t index, const char ** name, ggml_tensor ** tensor) {
    if (!model || !name || !tensor || index >= bupo_model_n_tensors(model)) {
        return fail(BUPO_ERR_ARGUMENT, "null argument or index out of range");
    }
    const auto & entry = llama_internal_get_tensor_map(model)[index];
    *name   = entry.first.c_str();
    *tensor = entry.second;
    return BUPO_OK;
}

bupo_status bupo_offer_decoding(const bupo_decoding * decoding) {
    if (!decoding || !decoding->product || !decoding->columns || !decoding->attention) {
        return fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    bupo::offer(*decoding);
    return BUPO_OK;
}

bupo_status bupo_adapter_new(llama_model * model, float alpha, const bupo_lora_pair * pairs, size_t n_pairs,
                             bupo_product product, llama_adapter_lora ** out) {
    if (!model || !pairs || !product || !out) {
        return fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return guarded([&] {
        auto adapter = std::make_unique<llama_adapter_lora>(model);
        adapter->alpha = alpha;
        for (size_t i = 0; i < n_pairs; ++i) {
            if (const bupo_status status = check_pair(*model, pairs[i]); status != BUPO_OK) {
                return status;
            }
            if (ggml_backend_buffer_is_host(pairs[i].b->buffer)) {
                bupo::mark_factor(pairs[i].b, product);
            }
            adapter->ab_map[pairs[i].weight] = llama_adapter_lora_weight(pairs[i].a, pairs[i].b);
        }
        // llama.cpp sizes its graphs by the adapters that the model knows.
        model->loras.insert(adapter.get());
        *out = adapter.release();
        return BUPO_OK;
    });
}

void bupo_adapter_free(llama_adapter_lora * adapter) {
    llama_adapter_lora_free(adapter);
}

bupo_status bupo_tokenize(const llama_vocab * vocab, const char * text, size_t n_text, bool add_special, bool parse_special,
                          llama_token * tokens, size_t capacity, size_t * n_written) {
    if (!vocab || !text || !n_written || n_text > INT32_MAX || capacity > INT32_MAX) {
        return fail(BUPO_ERR_ARGUMENT, "null argument, or text of more than 2 GiB");
    }
    return guarded([&] {
        const int32_t n = llama_tokenize(vocab, text, (int32_t) n_text, tokens, (int32_t) capacity, add_special, parse_special);
        if (n == INT32_MIN) {
            return fail(BUPO_ERR_ARGUMENT, "more than 2^31 tokens");
        }
        *n_written = (size_t) (n < 0 ? -(int64_t) n : n);
        return BUPO_OK;
    });
}

bupo_status bupo_token_to_piece(const llama_vocab * vocab, llama_token token, bool special, char * buffer, size_t capacity,
                                size_t * n_written) {
    if (!vocab || !n_written || capacity > INT32_MAX || token < 0 || token >= llama_vocab_n_tokens(vocab)) {
        return fail(BUPO_ERR_ARGUMENT, "null argument, or a token outside the vocabulary");
    }
    return guarded([&] {
        const int32_t n = llama_token_to_piece(vocab, token, buffer, (int32_t) capacity, 0, special);
        *n_written = (size_t) (n < 0 ? -(int64_t) n : n);
        return BUPO_OK;
    });
}

bupo_status bupo_chat_apply_template(const char * template_text, const llama_chat_message * messages, size_t n_messages,
                                     bool add_assistant, char * buffer, size_t capacity, size_t * n_written) {
    if (!template_text || !messages || !n_written || capacity > INT32_MAX) {
        return fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return guarded([&] {
        const int32_t n = llama_chat_apply_template(template_text, messages, n_messages, add_assistant, buffer, (int32_t) capacity);
        if (n < 0) {
            return fail(BUPO_ERR_ARGUMENT, "llama.cpp does not know this template");
        }
        *n_written = (size_t) n;
        return BUPO_OK;
    });
}

bupo_status bupo_quantize_types(const llama_model * model, int32_t ftype, const bupo_tensor_entry * tensors, size_t n_tensors,
                                uint32_t * types) {
    if (!model || !tensors || !types || llama_ftype_get_default_type((llama_ftype) ftype) == GGML_TYPE_COUNT) {
        return fail(BUPO_ERR_ARGUMENT, "null argument, or a file type that llama.cpp does not write");
    }
    return guarded([&] {
        const ggml_init_params init = { (n_tensors + 1) * ggml_tensor_overhead(), nullptr, /* no_alloc */ true };
        const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init(init), ggml_free);
        if (!context) {
            return fail(BUPO_ERR_ARGUMENT, "no memory for tensor headers");
        }
        std::vector<ggml_tensor *> headers;
        for (size_t i = 0; i < n_tensors; ++i) {
            headers.push_back(ggml_new_tensor(context.get(), (ggml_type) tensors[i].type, 4, tensors[i].ne));
            ggml_set_name(headers.back(), tensors[i].name);
        }
        const llama_model_quantize_params params = llama_model_quantize_default_params();
        const std::unique_ptr<quantize_state_impl, decltype(&llama_quant_free)> state(llama_quant_init(model, &params),
                                                                                      llama_quant_free);
        std::vector<ggml_type> chosen(n_tensors);
        llama_quant_compute_types(state.get(), (llama_ftype) ftype, headers.data(), chosen.data(), n_tensors);
        std::copy(chosen.begin(), chosen.end(), types);
        return BUPO_OK;
    });
}

bupo_status bupo_decode(llama_context * context, llama_batch batch, ggml_threadpool_t pool, bupo_products products,
                        const bupo_lineage * lineages, int32_t * result) {
    if (!context || !result) {
        return fail(BUPO_ERR_ARGUMENT, "null argument");
    }
    return guarded([&] {
        const bupo::OwnProducts own(pool, products, lineages);
        *result = llama_decode(context, batch);
        return BUPO_OK;
    });
}
