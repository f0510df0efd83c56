"""The golden GGUF models as Hugging Face modules, weights dequantised; for the scripts beside this one."""
import gguf, numpy as np, torch
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
       "output_norm.weight": "model.norm.weight"}

def tensors_of(path):
    """name -> float32 tensor, rows first."""
    out = {}
    for t in gguf.GGUFReader(path).tensors:
        data = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        out[t.name] = torch.from_numpy(data.reshape([int(n) for n in reversed(t.shape)]).copy())
    return out

def hf_model(path):
    """The model of a golden GGUF file, in F32, with llama's q and k permuted back."""
    reader = gguf.GGUFReader(path)
    get = lambda key: (lambda f: f and f.contents())(reader.get_field(key))
    arch = get("general.architecture")
    of = lambda key: get(f"{arch}.{key}")
    tensors = tensors_of(path)
    heads, kv = of("attention.head_count"), of("attention.head_count_kv")
    size = of("attention.key_length") or of("embedding_length") // heads
    base = dict(vocab_size=tensors["token_embd.weight"].shape[0], hidden_size=of("embedding_length"),
                intermediate_size=of("feed_forward_length"), num_hidden_layers=of("block_count"),
                num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=512,
                rms_norm_eps=of("attention.layer_norm_rms_epsilon"), rope_theta=of("rope.freq_base"),
                tie_word_embeddings="output.weight" not in tensors)
    if arch != "qwen2":
        base["head_dim"] = size
    if "rope_freqs.weight" in tensors:
        base["rope_parameters"] = dict(rope_type="llama3", rope_theta=base.pop("rope_theta"), factor=8.0, low_freq_factor=1.0,
                                       high_freq_factor=4.0, original_max_position_embeddings=64)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM),
                     "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[arch]
    config = config(**base)
    config._attn_implementation = "eager"
    model = model(config).float().eval()
    state = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        if name in TOP:
            state[TOP[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        middle, kind = rest.rsplit(".", 1)
        if arch == "llama" and middle in ("attn_q", "attn_k"):
            n = heads if middle == "attn_q" else kv
            tensor = tensor.reshape(n, tensor.shape[0] // n // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        state[f"model.layers.{layer}.{NAMES[middle]}.{kind}"] = tensor
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(m == "lm_head.weight" for m in missing), (missing, unexpected)
    model.tie_weights()
    return model
