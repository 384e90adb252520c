"""The same parameters with another configuration, buffer or tokenizer are another model, and refused."""
import gc
import json
import time
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from paczero.finetune import FineTuneConfig, Runtime, finetune, load_result
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.publish import load_release, save_release
from paczero.tasks import load_task
from paczero.transcript import (Chain, Transcript, TranscriptError, replay, tokenizer_identity,
                                weights_digest)
from stops import Stop
from strangers import entries_of, rechain

TASK = load_task("reviews", seed=0, n_train=16, n_dev=4, n_eval=4)
CONFIG = FineTuneConfig(steps=4, lr=1e-3, m=8, eval_every=4, seed=1)


def go(folder, model=None, tokenizer=None, callbacks=(), track="full"):
    "Begin a run there, or go on with it."
    fresh = load_model("tiny-opt", track=track)
    return finetune(model or fresh[0], tokenizer or fresh[1], TASK, ZPL(), CONFIG, folder=folder,
                    callbacks=callbacks, runtime=Runtime(test=False, parallel=False))


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def half(tmp_path):
    "A run of four steps that was stopped after two."
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", callbacks=[Stop(2)])
    return tmp_path / "run"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run."
    return go(tmp_path_factory.mktemp("done") / "run")


# ---------------------------------------------------------------- other models, with the same parameters


def gelu():
    "Another activation function, in the configuration and in the layers."
    model, _ = load_model("tiny-opt")
    model.config.activation_function = "gelu"
    for layer in model.model.decoder.layers:
        layer.activation_fn = torch.nn.GELU()
    return model


def changed(**fields):
    "A number of the configuration."
    model, _ = load_model("tiny-opt")
    for k, v in fields.items():
        setattr(model.config, k, v)
    return model


def buffered():
    "A number that is no parameter."
    model, _ = load_model("tiny-opt")
    model.register_buffer("logit_shift", torch.ones(3))
    return model


OTHERS = {
    "activation_function: 'relu' -> 'gelu'": gelu,
    "num_attention_heads: 4 -> 2": lambda: changed(num_attention_heads=2),
    "rope_parameters": lambda: changed(rope_parameters=dict(rope_theta=2.0)),
    "buffers": buffered,
}


def lowered(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return "normaliser"


def one_more(tokenizer):
    tokenizer.add_tokens(["paczero"])
    return "added tokens"


def other_end(tokenizer):
    tokenizer.eos_token = "<s>"
    return "special tokens"


def untemplated(tokenizer):
    from tokenizers.processors import ByteLevel
    tokenizer.backend_tokenizer.post_processor = ByteLevel()
    return "template"


def two_exchanged(tokenizer):
    "Other ids for two words of the vocabulary."
    d = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = d["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(d))
    return "vocabulary"


TOKENIZERS = [lowered, one_more, other_end, untemplated, two_exchanged]


@pytest.mark.parametrize("named", OTHERS)
def test_a_run_does_not_go_on_with_another_model(half, named):
    model = OTHERS[named]()
    assert weights_digest(model) == weights_digest(load_model("tiny-opt")[0])
    before = (half / "transcript.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named.replace("[", ".")):
        go(half, model=model)
    assert (half / "transcript.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", TOKENIZERS)
def test_a_run_does_not_go_on_with_another_tokenizer(half, change):
    _, tokenizer = load_model("tiny-opt")
    part = change(tokenizer)
    with pytest.raises(ValueError, match=f"tokenizer.{part}"):
        go(half, tokenizer=tokenizer)


def test_it_goes_on_with_its_own(half):
    result = go(half)
    assert len(result.transcript) == 4 and all(
        result.transcript.verify()[k] is True for k in ("configuration named", "tokenizer named"))


@pytest.mark.parametrize("named", OTHERS)
def test_a_transcript_is_not_replayed_on_another_model(done, named):
    with pytest.raises(TranscriptError, match="another function"):
        replay(OTHERS[named](), done.transcript)
    with pytest.raises(TranscriptError, match="another function"):
        load_result(done.folder, model=OTHERS[named]())


@pytest.mark.parametrize("change", TOKENIZERS)
def test_nor_beside_another_tokenizer(done, change):
    model, tokenizer = load_model("tiny-opt")
    part = change(tokenizer)
    with pytest.raises(TranscriptError, match=f"another tokenizer than the run's: its .*{part}"):
        replay(model, done.transcript, tokenizer=tokenizer)
    assert weights_digest(model) == done.transcript.header["model"]["weights"]


# ---------------------------------------------------------------- releases


def test_a_release_of_weights_is_bound_to_its_configuration_and_tokenizer(done, tmp_path):
    _, tokenizer = load_model("tiny-opt")
    release = save_release(done, tokenizer, tmp_path / "release", "weights")
    load_release(release)
    for file, change, says in (
            ("config.json", dict(activation_function="gelu"), "activation_function: 'relu' -> 'gelu'"),
            ("config.json", dict(num_attention_heads=2), "num_attention_heads: 4 -> 2"),
            ("tokenizer.json", dict(normalizer=dict(type="Lowercase")), "normaliser")):
        kept = (release / file).read_text()
        (release / file).write_text(json.dumps(json.loads(kept) | change))
        with pytest.raises(TranscriptError, match=says):
            load_release(release)
        (release / file).write_text(kept)
    load_release(release)


def test_a_transcripts_release_is_bound_to_its_base(done, tmp_path):
    release = save_release(done, None, tmp_path / "release")
    for i, (file, change) in enumerate((("config.json", dict(activation_function="gelu")),
                                        ("tokenizer.json", dict(normalizer=dict(type="Lowercase"))))):
        base = tmp_path / f"base{i}"
        model, tokenizer = load_model("tiny-opt")
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        load_release(release, base=base)
        (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | change))
        with pytest.raises(TranscriptError, match="another (function|tokenizer)"):
            load_release(release, base=base)


# ---------------------------------------------------------------- from before it was recorded


def unnamed(description):
    "A description as it was before."
    model = {k: v for k, v in description["model"].items() if k not in ("config", "buffers", "lora_scaling")}
    return {k: v for k, v in description.items() if k != "tokenizer"} | dict(model=model)


def aged(folder):
    "Make a run's folder one that an older version left."
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(unnamed(config)))
    header, *rest = entries_of((folder / "transcript.jsonl").read_bytes())
    (folder / "transcript.jsonl").write_bytes(rechain([unnamed(header), *rest]))


def test_an_older_run_goes_on_and_says_what_is_not_compared(half):
    aged(half)
    with pytest.warns(UserWarning, match="neither its model's configuration nor its tokenizer"):
        result = go(half)
    assert "config" not in result.transcript.header["model"] and "tokenizer" not in result.transcript.header
    said = result.transcript.verify(result.metrics["transcript_digest"])
    assert said["digest as published"] is True and said["finished"] is True
    assert "not recorded" in said["configuration named"] and "not recorded" in said["tokenizer named"]
    assert weights_digest(replay(load_model("tiny-opt")[0], result.transcript)) == result.transcript.end["weights"]


def test_only_what_it_never_recorded_is_left_out(half):
    "A configuration that was taken out of config.json alone does not open a run."
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(unnamed(config)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="first line differs from this run: model.config.activation_function"):
            go(half, model=gelu())


def test_an_older_release_is_loaded_and_says_what_is_not_compared(done, tmp_path):
    import dataclasses
    t = done.transcript
    header, chain = unnamed(t.header), Chain()
    for e in (header, *({"t": i, "y": list(y)} for i, y in enumerate(t.releases)), {"end": t.end}):
        chain.line(e)
    old = dataclasses.replace(t, header=header, digest=chain.digest)
    release = save_release(dataclasses.replace(done, transcript=old), None, tmp_path / "release")
    with pytest.warns(UserWarning) as said:
        model, _ = load_release(release)
    assert weights_digest(model) == t.end["weights"]
    told = [str(w.message) for w in said if "could not be checked" in str(w.message)]
    assert len(told) == 2 and "configuration and buffers not recorded" in told[0] and "tokenizer not" in told[1]


# ---------------------------------------------------------------- tokenizers of other kinds, and time


class Slow(PreTrainedTokenizer):
    "A tokenizer without a backend."

    def __init__(self, words, **kw):
        self.words = {w: i for i, w in enumerate(words)}
        super().__init__(unk_token="<unk>", **kw)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text, **kw):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.get(token, 0)

    def _convert_id_to_token(self, index):
        return list(self.words)[index]


class Lowering(Slow):
    "The same vocabulary, and another way to read."

    def _tokenize(self, text, **kw):
        return text.lower().split()


def test_slow_tokenizers():
    words = ["<unk>", "great", "terrible", "GREAT"]
    named = tokenizer_identity(Slow(words))
    assert tokenizer_identity(Slow(words)) == named
    assert tokenizer_identity(Slow(words[::-1]))["vocabulary"] != named["vocabulary"]
    assert {k for k, v in tokenizer_identity(Lowering(words)).items() if named[k] != v} == {"sample"}


def test_cutting_and_padding_do_not_count():
    _, tokenizer = load_model("tiny-opt")
    named = tokenizer_identity(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    tokenizer.padding_side, tokenizer.pad_token = "left", "<unk>"
    assert tokenizer_identity(tokenizer) == named


def test_fifty_thousand_tokens_take_little_time():
    pairs = [(f"x{i // 250}y", f"z{i % 250}w") for i in range(50_000)]
    words = dict.fromkeys(["<unk>", *(p for pair in pairs for p in pair), *("".join(p) for p in pairs)])
    bpe = models.BPE({w: i for i, w in enumerate(words)}, pairs, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bpe), unk_token="<unk>")
    seconds = []
    for _ in range(3):
        began = time.process_time()
        tokenizer_identity(tokenizer)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.3 and gc.isenabled()


def test_an_adapter_names_its_scale(tmp_path):
    "Rank and alpha alone do not: a rank-stabilised adapter multiplies by alpha / √rank."
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", callbacks=[Stop(2)], track="lora")
    model, _ = load_model("tiny-opt", track="lora")
    for m in model.modules():
        if isinstance(getattr(m, "scaling", None), dict):
            m.scaling["default"] = 16 / 8**0.5
    with pytest.raises(ValueError, match="lora_scaling"):
        go(tmp_path / "run", model=model)
    t = Transcript.load(tmp_path / "run" / "transcript.jsonl", recover=True)
    with pytest.raises(TranscriptError, match="the adapter's scale"):
        replay(model, t)
