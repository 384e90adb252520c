"""Models from strangers: no code of theirs runs, no file of theirs is changed, and the error says what is wrong."""
import json
import pickle
import shutil
import struct

import pytest

from paczero.models import convert_to_safetensors, load_model
from paczero.tasks.embedded import tiny_opt_path


class Bomb:
    "A pickle that leaves a mark where it is opened."

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def bomb_code(mark):
    "Python beside a model that leaves a mark where it is imported."
    return (f"open({str(mark)!r}, 'w')\nfrom transformers import *\nclass M(OPTForCausalLM): pass\n"
            "class C(OPTConfig): model_type = 'evil'\nclass T(PreTrainedTokenizerFast): pass\n")


def edit(d, name, **changes):
    "Change a JSON file of the model."
    (d / name).write_text(json.dumps(json.loads((d / name).read_text()) | changes))


def pickled(d, mark):
    (d / "model.safetensors").unlink()
    (d / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))


def pickled_tensors(d, mark):
    import torch

    (d / "model.safetensors").unlink()
    torch.save({"model.x": Bomb(mark)}, d / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        convert_to_safetensors(d, d.parent / "new")
    assert not (d.parent / "new").exists() and not mark.exists()


def remote_model(d, mark):
    (d / "evil.py").write_text(bomb_code(mark))
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit(d, "config.json", model_type="evil", architectures=["M"], auto_map=auto_map)


def remote_tokenizer(d, mark):
    (d / "evil.py").write_text(bomb_code(mark))
    edit(d, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    (d / "tokenizer.json").unlink()


def adapter_beside(d, mark):
    mapping = dict(base_model_class="M", parent_library="evil")
    adapter = dict(peft_type="LORA", base_model_name_or_path=str(d.parent / "elsewhere"), auto_mapping=mapping)
    (d / "adapter_config.json").write_text(json.dumps(adapter))


def huge_header(d, mark):
    (d / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def index_outside(d, mark):
    (d / "model.safetensors").rename(d.parent / "outside.safetensors")
    index = dict(metadata={}, weight_map={"model.x": "../outside.safetensors"})
    (d / "model.safetensors.index.json").write_text(json.dumps(index))


def not_a_model(d, mark):
    (d / "config.json").write_text("[" * 100_000)


def custom_generate(d, mark):
    (d / "custom_generate").mkdir()
    (d / "custom_generate" / "generate.py").write_text(bomb_code(mark))
    (d / "evil.py").write_text(bomb_code(mark))
    edit(d, "config.json", auto_map={"AutoModelForCausalLM": "evil.M"})


def prepare(change, tmp_path):
    "A copy of the embedded model, changed by a stranger: (folder, the mark, its files)."
    d, mark = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(tiny_opt_path(), d)
    change(d, mark)
    return d, mark, files(d)


def files(d):
    return {p: p.read_bytes() for p in d.rglob("*") if p.is_file()}


REFUSED = [pickled, pickled_tensors, remote_model, remote_tokenizer, adapter_beside, huge_header, index_outside,
           not_a_model]


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_models_from_strangers_are_refused(change, tmp_path):
    d, mark, before = prepare(change, tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        load_model(str(d))
    assert len(str(e.value)) < 2000
    assert not mark.exists(), "code of the model was executed"
    assert files(d) == before


def test_code_beside_a_known_type_is_not_used(tmp_path):
    "The library's own class is taken."
    d, mark, before = prepare(custom_generate, tmp_path)
    model, _ = load_model(str(d))
    assert type(model).__module__.startswith("transformers.")
    assert not mark.exists(), "code of the model was executed"
    assert files(d) == before
