// What bupo-gguf adds to ggml and llama.cpp, behind one C header.
//
// Contract of every function: no C++ exception leaves it. It returns BUPO_OK or a status below and,
// on failure, leaves its outputs untouched; bupo_last_error() then holds one line of text (per thread).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

enum bupo_status {
    BUPO_OK            = 0,
    BUPO_ERR_ARGUMENT  = 1, // an argument is null, out of range or of the wrong shape
    BUPO_ERR_EXCEPTION = 2, // llama.cpp threw; bupo_last_error() has its words
    BUPO_ERR_DEVICE    = 3, // CUDA or its driver refused
};

// The last failure of this thread; valid until the next failing call of this thread.
const char * bupo_last_error(void);

// ---------------------------------------------------------------------------------------------
// Ops. A GGML_OP_CUSTOM node's userdata points to one of these structs; each begins with its id, so
// that a backend which is not the CPU's can tell the ops apart and read the same parameters.
// The contract (sources, shapes, formula) of each op stands in src/ops/<op>.rs.

enum bupo_op {
    BUPO_OP_LINEAR         = 1, // Y = W X (+ low-rank term) (+ bias)
    BUPO_OP_LINEAR_BACK    = 2, // dX = W^T dY (+ low-rank term) (+ accumulate)
    BUPO_OP_OUTER          = 3, // G += scale * X dY^T, in place
    BUPO_OP_LOGPROB        = 4, // log-prob, log-sum-exp, entropy (+ gradient) from hidden states
    BUPO_OP_ATTENTION      = 5, // packed causal attention with shared prefixes
    BUPO_OP_ATTENTION_BACK = 6,
    BUPO_OP_RMS_NORM       = 7, // norm and weight in one pass
    BUPO_OP_RMS_NORM_BACK  = 8,
    BUPO_OP_GLU            = 9,  // activation of a gate, times another tensor
    BUPO_OP_GLU_BACK       = 10,
    BUPO_OP_SCALE_ROWS     = 11,
    BUPO_OP_POLICIES       = 12, // entropy, KL, rank and top tokens of many policies in one pass
    BUPO_OP_TAKEN_LOGITS   = 13, // one logit per hidden state
    BUPO_OP_SUM_SQUARES    = 14, // of each run of BUPO_SUM_SQUARES_RUN values
    BUPO_OP_ADAMW          = 15, // a step of the optimiser, in place
    BUPO_OP_DIVERGENCE     = 20, // KL, top-1 and log-probs of two models' hidden states
    BUPO_OP_CONV           = 24, // causal depthwise convolution over packed segments, SiLU after it
    BUPO_OP_CONV_BACK      = 25,
    BUPO_OP_DELTA          = 26, // gated delta rule over packed segments with shared prefixes
    BUPO_OP_DELTA_BACK     = 27,
    BUPO_OP_DISTILL        = 30, // a divergence from a teacher, and its gradient by the student's hidden states
    BUPO_OP_ROUTE          = 50, // which experts a token takes, with what weights
    BUPO_OP_ROUTE_BACK     = 51,
    BUPO_OP_ROUTE_ORDER    = 52, // slots sorted by expert
    BUPO_OP_EXPERTS        = 53, // products with stacked weights, any direction
    BUPO_OP_EXPERTS_OUTER  = 54, // G_e += scale * X dY^T of each expert's slots, in place
    BUPO_OP_SLOT_WEIGHTS   = 55, // weights in sorted order
    BUPO_OP_WEIGHTS_BACK   = 56,
    BUPO_OP_GATE_ROWS      = 57, // columns times the sigmoid of a number of theirs
    BUPO_OP_GATE_ROWS_BACK = 58,
};

#define BUPO_SUM_SQUARES_RUN 4096

struct bupo_linear_params {
    uint32_t op;       // BUPO_OP_LINEAR, BUPO_OP_LINEAR_BACK or BUPO_OP_OUTER
    float    scale;    // of the low-rank term, or of the outer product
    uint32_t low_rank; // sources 2 and 3 are the low-rank factor and its input
    uint32_t bias;     // the last source is a bias [N]
    uint32_t add;      // the last source is a tensor of dst's shape to be added
};

enum bupo_gating {
    BUPO_GATING_SOFTMAX = 0, // over all experts
    BUPO_GATING_SIGMOID = 1,
    BUPO_GATING_CHOSEN  = 2, // softmax over the chosen ones
};

struct bupo_route_params {
    uint32_t op;        // BUPO_OP_ROUTE or BUPO_OP_ROUTE_BACK
    uint32_t used;      // experts of a token
    uint32_t gating;    // enum bupo_gating
    uint32_t normalise; // weights are divided by their sum
    float    scale;     // of the weights
    uint32_t bias;      // source 1 is added for the choice
    uint32_t given;     // the last source has experts to take; negative: the token chooses
};

struct bupo_order_params {
    uint32_t op;
    uint32_t n_expert;
};

struct bupo_experts_params {
    uint32_t op;
    uint32_t n_expert;
    uint32_t used;
    uint32_t transposed; // W^T x instead of W x
    uint32_t tokens_in;  // columns of source 1 are tokens; else sorted slots
    uint32_t sum;        // columns of dst are tokens, to which their slots are summed up
    uint32_t low_rank;   // sources 3 and 4 are the low-rank factor and its input; then as far as there are any
    uint32_t weights;    // of the slots
    uint32_t bias;       // [n_out, E]
    uint32_t add;        // a tensor of dst's shape
    float    scale;      // of the low-rank term
};

struct bupo_experts_outer_params {
    uint32_t op;
    uint32_t n_expert;
    uint32_t used;
    uint32_t tokens_x;  // columns of source 1 are tokens; else sorted slots
    uint32_t tokens_dy; // of source 2
    float    scale;
};

struct bupo_slots_params {
    uint32_t op; // BUPO_OP_SLOT_WEIGHTS or BUPO_OP_WEIGHTS_BACK
    uint32_t n_expert;
    uint32_t used;
    uint32_t bias; // sources 3 and 4 are the experts' bias and the cotangent of what they add up to
};

// logits = softcap tanh(z / softcap), z = scale * (E_u h + low_scale * B u); without a softcap logits = z.
struct bupo_logit_map {
    float    scale;
    float    softcap;  // 0: none
    uint32_t low_rank; // which source is B [r, V], and the next one u [r, T], both F32; 0: no such term
    float    low_scale;
};

struct bupo_logprob_params {
    uint32_t              op;
    float                 inv_temperature; // 1/T, of the logits after the softcap
    uint32_t              targets;         // source 2 has them
    uint32_t              gradient;        // also the gradient of the log-prob by the hidden state
    struct bupo_logit_map map;
};

struct bupo_policies_params {
    uint32_t              op;
    uint32_t              group; // columns come in groups of this many; the last of each is what the others are compared with
    uint32_t              top_k; // likeliest tokens wanted per column
    uint32_t              taken; // sources 2 and 3 are the taken tokens and their logits
    struct bupo_logit_map map;
};

struct bupo_taken_logits_params {
    uint32_t              op;
    struct bupo_logit_map map;
};

struct bupo_divergence_params {
    uint32_t              op;
    struct bupo_logit_map p;
    struct bupo_logit_map q;
};

enum bupo_divergence {
    BUPO_REVERSE_KL     = 0, // KL(student || teacher)
    BUPO_FORWARD_KL     = 1, // KL(teacher || student)
    BUPO_JENSEN_SHANNON = 2, // beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
};

struct bupo_distill_params {
    uint32_t              op;
    uint32_t              divergence;      // enum bupo_divergence
    float                 beta;            // of BUPO_JENSEN_SHANNON
    float                 inv_temperature; // 1/T, of both models' logits after their softcaps
    struct bupo_logit_map student;
    struct bupo_logit_map teacher;
};

// One run of tokens [begin, end) that attends causally to itself and, in full, to [prefix_begin, prefix_end). Its tokens'
// positions go on from its prefix's, which begin at 0.
struct bupo_segment {
    int32_t begin;
    int32_t end;
    int32_t prefix_begin;
    int32_t prefix_end;
};

struct bupo_attention_params {
    uint32_t op;
    float    scale;      // of the scores, usually 1/sqrt(head size)
    float    softcap;    // scores become softcap tanh(score / softcap); 0: none
    uint32_t window;     // a key is seen from this many positions, its own the first; 0: from all after it
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t head_size;
    uint32_t sinks;      // source 3 has a score for each head that takes probability and gives no value
    uint32_t n_segments;
    const struct bupo_segment * segments; // in token order, without gaps; a prefix stands before its segment
};

// Tokens that a convolution looks at, at most.
#define BUPO_MAX_CONV 8

struct bupo_conv_params {
    uint32_t op; // BUPO_OP_CONV or BUPO_OP_CONV_BACK
    uint32_t n_segments;
    const struct bupo_segment * segments; // as for attention
};

struct bupo_delta_params {
    uint32_t op;   // BUPO_OP_DELTA or BUPO_OP_DELTA_BACK
    uint32_t n_k;  // key heads; value head h reads key head h mod n_k, or where they are grouped h / (n_v / n_k)
    uint32_t n_v;
    uint32_t size; // of a head
    float    eps;  // added to the squared lengths of queries and keys
    uint32_t grouped;
    uint32_t n_segments;
    const struct bupo_segment * segments; // as for attention
};

enum bupo_activation {
    BUPO_ACTIVATION_SILU           = 0,
    BUPO_ACTIVATION_GELU           = 1, // in its tanh form
    BUPO_ACTIVATION_CLAMPED_SWIGLU = 2, // gpt-oss's
    BUPO_ACTIVATION_SIGMOID        = 3, // of the gate alone
};

struct bupo_glu_params {
    uint32_t op;         // BUPO_OP_GLU or BUPO_OP_GLU_BACK
    uint32_t activation; // enum bupo_activation
};

struct bupo_norm_params {
    uint32_t op; // BUPO_OP_RMS_NORM or BUPO_OP_RMS_NORM_BACK
    float    eps;
};

struct bupo_adamw_params {
    uint32_t op;
    float    learning_rate;
    float    beta1;
    float    beta2;
    float    eps;
    float    weight_decay;
    float    clip;    // factor of the gradient
    float    unbias1; // 1 / (1 - beta1^t)
    float    unbias2;
};

// ---------------------------------------------------------------------------------------------
// Backends that run ggml's own nodes on another backend and ours by the kernels of ops/*.cu (backend.cpp).

// `precise`: weights and activations are multiplied in F32 instead of F16. The caller frees `*out` with
// ggml_backend_free. A failure while computing gives GGML_STATUS_FAILED, and bupo_last_error() has the op, its shape
// and what went wrong.

// The kernels on the host (ops/emulate.h), ggml's nodes on the CPU with `n_threads`: slow, for tests.
enum bupo_status bupo_backend_emulated(int n_threads, bool precise, ggml_backend_t * out);

// GPU `index` of bupo_cuda_count.
enum bupo_status bupo_backend_cuda(int index, bool precise, ggml_backend_t * out);

// Bytes of a tile of dequantised weights, of scores or of logits, and tokens whose logits are taken at once. The host's
// are small, so that small tests have several tiles.
#define BUPO_GPU_TILE_BYTES      67108864
#define BUPO_GPU_TOKEN_TILE      2048
#define BUPO_EMULATED_TILE_BYTES 16384
#define BUPO_EMULATED_TOKEN_TILE 24

// Scratch memory of our ops in a backend made here, bytes; it is kept for the next op until it is given back.
size_t bupo_backend_scratch_bytes(ggml_backend_t backend);

// Gives the scratch memory back, once all work is done.
void bupo_backend_release(ggml_backend_t backend);

// The least of `reps` times: products of two n x n matrices in the type of weights and activations, and copies of `bytes`,
// which are read and written.
struct bupo_rates {
    double flop_per_s;
    double bytes_per_s;
};

enum bupo_status bupo_backend_rates(ggml_backend_t backend, int64_t n, size_t bytes, int reps, struct bupo_rates * out);

// Whether this build has the CUDA kernels.
bool bupo_cuda_built(void);

// Whether ggml-cuda can decode weights of this type; false without CUDA.
bool bupo_cuda_decodes(enum ggml_type type);

struct bupo_gpu {
    char     name[256];
    uint32_t compute_capability; // 86 for 8.6
    uint64_t bytes_free;
    uint64_t bytes_total;
};

// GPUs that the driver shows; BUPO_ERR_DEVICE with CUDA's words when there is no driver.
enum bupo_status bupo_cuda_count(int * n);
enum bupo_status bupo_cuda_info(int index, struct bupo_gpu * out);

// What allocates memory on a GPU.
enum bupo_status bupo_cuda_buffer_type(int index, ggml_backend_buffer_type_t * out);

// ---------------------------------------------------------------------------------------------
// Bridge to llama.cpp internals (bridge.cpp is the only file that sees them).

// Hyperparameters as llama.cpp itself read them from the file, for all layers.
struct bupo_hparams {
    uint32_t n_layer;           // without blocks that only predict further tokens (MTP)
    uint32_t n_embd;
    uint32_t n_ctx_train;
    uint32_t n_expert;
    uint32_t n_ff_shared;       // width of the shared experts; 0 = none
    float    expert_scale;      // of the experts' weights; 0 = 1
    uint32_t n_embd_per_layer;  // width of per-layer embeddings; 0 = none
    uint32_t windowed;          // some layers are said to have a window
    uint32_t rope_sections[4];  // pairs of each axis of positions; all 0 = one axis
    uint32_t ssm_conv;          // of recurrent layers: tokens that the convolution looks at
    uint32_t ssm_inner;         // width of what they give
    uint32_t ssm_state;         // size of a head
    uint32_t ssm_heads;         // heads of values
    uint32_t ssm_groups;        // heads of keys
    uint32_t n_layer_kv;        // layers from here on read keys and values of earlier ones
    float    rms_eps;
    float    embedding_scale;   // 0 = not set
    float    residual_scale;    // 0 = not set
    float    logit_scale;       // 0 = not set
    float    attention_scale;   // 0 = 1/sqrt(head size)
    float    attention_softcap; // 0 = none
    float    final_softcap;     // llama.cpp's default where the architecture has none: see model/arch/
    float    temperature_scale; // of attention by position; 0 = none
    uint32_t temperature_floor;
    float    temperature_offset;
    int32_t  rope_scaling_type; // enum llama_rope_scaling_type
    int32_t  rope_type;         // enum llama_rope_type
    float    rope_freq_scale;
    uint32_t rope_ctx_orig;
    float    rope_attn_factor;
    float    yarn_ext_factor;   // < 0: not set
    float    yarn_attn_factor;
    float    yarn_beta_fast;
    float    yarn_beta_slow;
    float    yarn_log_mul;
};

enum bupo_status bupo_model_hparams(const struct llama_model * model, struct bupo_hparams * out);

// What can differ from layer to layer.
struct bupo_layer_hparams {
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t n_ff;
    uint32_t n_ff_expert;   // 0 = as n_ff
    uint32_t n_expert_used;
    uint32_t head_size_k;
    uint32_t head_size_v;
    uint32_t n_rot;
    uint32_t window;     // keys that a query sees, its own included; 0 = all
    uint32_t kv;         // it has keys and values of its own
    uint32_t rope;       // by the file's pattern; an architecture may have one of its own besides
    uint32_t recurrent;
    uint32_t state;      // floats of a sequence's state, 0 where it is not recurrent
    float    rope_freq_base;
    float    rope_freq_scale;
};

enum bupo_status bupo_model_layer_hparams(const struct llama_model * model, uint32_t layer, struct bupo_layer_hparams * out);

// The model's own tensors with their live buffers; borrowed, valid as long as the model.
size_t               bupo_model_n_tensors(const struct llama_model * model);
enum bupo_status     bupo_model_tensor(const struct llama_model * model, size_t index, const char ** name, struct ggml_tensor ** tensor);

// One adapted weight: y += scale * b (a x). a: [n_in, rank], b: [rank, n_out], of stacked experts [n_in, rank, E] and
// [rank, n_out, E]; F32, both borrowed.
struct bupo_lora_pair {
    const char *         weight; // name of the base tensor, e.g. "blk.0.attn_q.weight"
    struct ggml_tensor * a;
    struct ggml_tensor * b;
};

// Computes dst: [N, T] F32 from src[0]: [K, N], and src[1]: [K, T] F32, contiguous in host memory; T may be several extents,
// those of sequences and of their tokens. src[0] is an adapter's B in F32, or a model's weight of any type with a converter. With a weight also a MUL_MAT_ID node: dst: [N, used, T] from
// src[0]: [K, N, E], src[1]: [K, 1 or used, T], contiguous, and src[2]: [used, T] I32, the experts of each token, in whole rows. Called by
// each of `nth` threads, with its number.
typedef void (*bupo_product)(struct ggml_tensor * dst, int ith, int nth);

// What a sequence has in common with others: its first `rows` keys and values are those of every sequence with the same `origin`, as many of them
// as both have; 0: of none.
struct bupo_lineage {
    uint32_t origin;
    uint32_t rows;
};

// A kernel for attention; `lineages`: of the node's sequences, or null; `invariant`: nothing of a sequence may depend on the others.
typedef void (*bupo_attention)(struct ggml_tensor * dst, const struct bupo_lineage * lineages, bool invariant, int ith, int nth);

// Chooses the CPU backend for this processor, makes it the one in ggml's registry, and makes it ask for our products; once,
// however often it is called, and by the functions below, too. Before a model is opened or anything is computed in this
// process: ggml's lists have no locks. Gives the backend's name: baseline, or what it was compiled for beyond it.
const char * bupo_cpu_init(void);

// Of the backend that was chosen what ggml-cpu.h has.
ggml_backend_reg_t       bupo_cpu_reg(void);
ggml_backend_t           bupo_cpu_backend(int n_threads); // NULL: out of memory
void                     bupo_cpu_set_threadpool(ggml_backend_t backend, struct ggml_threadpool * pool);
void                     bupo_cpu_set_threads(ggml_backend_t backend, int n_threads);
struct ggml_threadpool * bupo_threadpool_new(struct ggml_threadpool_params * params);
void                     bupo_threadpool_free(struct ggml_threadpool * pool);

// What this processor and system have; 0 on others than x86-64.
#define BUPO_CPU_AVX2       1u
#define BUPO_CPU_FMA        2u
#define BUPO_CPU_BMI2       4u
#define BUPO_CPU_AVX512F    8u
#define BUPO_CPU_AVX512BW   16u
#define BUPO_CPU_AVX512VL   32u
#define BUPO_CPU_AVX512VNNI 64u

uint32_t bupo_cpu_features(void);

// Which products with weights a decode takes.
enum bupo_products {
    BUPO_PRODUCTS_GGML   = 0,
    BUPO_PRODUCTS_FASTER = 1, // ours from as many columns on as bupo_decoding says
    BUPO_PRODUCTS_EXACT  = 2, // ours
    // Ours for types of which they are ever the faster ones, ggml's for others, whatever the number of columns; so is attention
    BUPO_PRODUCTS_INVARIANT = 3,
};

// What is ours in decoding.
struct bupo_decoding {
    bupo_product    product;   // with weights
    const int64_t * columns;   // from which it is the faster one, by type: GGML_TYPE_COUNT numbers, 0: never
    bupo_product    wide;         // MUL_MAT, on a matrix unit
    int64_t         wide_columns; // from which that is the fastest, of types of which `product` ever is faster; 0: never
    bupo_attention  attention; // dst: a FLASH_ATTN_EXT node of BUPO_ATTENTION_SEQUENCES or more sequences of one token each (of any
                               // number with BUPO_PRODUCTS_INVARIANT), or of any number of more tokens each, q F32, k, v and mask F16 in whole rows and sinks F32 in host memory, without slopes
    int64_t         most_heads; // of queries to a head of keys, for which `attention` is made
};

// Sequences from which on attention is ours.
#define BUPO_ATTENTION_SEQUENCES 4

// Offers these for the weights of all models of the process that lie in host memory.
enum bupo_status bupo_offer_decoding(const struct bupo_decoding * decoding);

// An adapter whose tensors are the caller's: what is written into them, the next decode uses.
// `product` computes the products with B that lie in host memory. One for all adapters of the process.
// The caller frees it with bupo_adapter_free before the model and before the tensors' buffer.
enum bupo_status bupo_adapter_new(struct llama_model * model, float alpha, const struct bupo_lora_pair * pairs, size_t n_pairs,
                                  bupo_product product, struct llama_adapter_lora ** out);
void             bupo_adapter_free(struct llama_adapter_lora * adapter);

// llama_tokenize, llama_token_to_piece and llama_chat_apply_template throw on some input; these do not.
// n_written: the number of tokens/bytes; when it is larger than the capacity nothing useful was
// written and the call must be repeated with that much room.
enum bupo_status bupo_tokenize(const struct llama_vocab * vocab, const char * text, size_t n_text, bool add_special, bool parse_special,
                               llama_token * tokens, size_t capacity, size_t * n_written);
enum bupo_status bupo_token_to_piece(const struct llama_vocab * vocab, llama_token token, bool special, char * buffer, size_t capacity,
                                     size_t * n_written);
enum bupo_status bupo_chat_apply_template(const char * template_text, const struct llama_chat_message * messages, size_t n_messages,
                                          bool add_assistant, char * buffer, size_t capacity, size_t * n_written);

// A tensor as a file's table has it.
struct bupo_tensor_entry {
    const char * name;
    uint32_t     type;  // enum ggml_type
    int64_t      ne[4];
};

// The type of each tensor in a file of type `ftype` (enum llama_ftype), by the rules of llama.cpp's own
// quantiser for this model, in the order that the quantiser takes them. Without an importance matrix.
enum bupo_status bupo_quantize_types(const struct llama_model * model, int32_t ftype, const struct bupo_tensor_entry * tensors,
                                     size_t n_tensors, uint32_t * types);

// A backend sampler that draws a token in the decoding graph, where the logits lie (sampler.cpp). One per sequence; the
// caller frees it with llama_sampler_free after it was detached or the context freed. What is set before a decode holds
// for it: `uniform` in [0, 1 - 2^-23], and 1/T. llama_get_sampled_token_ith gives the token, llama_get_sampled_probs_ith
// its log-prob under the whole distribution at T.
enum bupo_status bupo_draw_new(struct llama_sampler ** out);
void             bupo_draw_set(struct llama_sampler * sampler, float uniform, float inv_temperature);
// Attaches it to a sequence of the context; null detaches.
enum bupo_status bupo_draw_attach(struct llama_context * context, llama_seq_id sequence, struct llama_sampler * sampler);

// llama_decode with exceptions stopped at the header. *result: its return value. `pool` is the context's, which computes
// with these products meanwhile; `lineages`: of every sequence of the context, which has a stream of the cache for each, or null.
enum bupo_status bupo_decode(struct llama_context * context, struct llama_batch batch, ggml_threadpool_t pool,
                             enum bupo_products products, const struct bupo_lineage * lineages, int32_t * result);

#ifdef __cplusplus
}
#endif
