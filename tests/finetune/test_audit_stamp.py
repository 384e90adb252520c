"""A run whose secret is fixed for an audit says so in every artefact; a real one never speaks of an audit."""
import pytest

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import MIBudget, ZPL
from paczero.models import load_model
from paczero.publish import model_card, save_release
from paczero.tasks import load_task

STAMP = "secret fixed for audit: no guarantee"
AUDITED = {"zpl": ZPL(audit_seed=1), "mi": MIBudget(budget=0.1, steps=5, audit_seed=1)}


def go(mechanism, folder):
    task = load_task("reviews", seed=0, n_train=40, n_dev=10, n_eval=10)
    config = FineTuneConfig(steps=5, lr=1e-3, m=64, eval_every=2, seed=3)
    return finetune(*load_model("tiny-opt"), task, mechanism, config, folder=folder, runtime=Runtime(test=False))


@pytest.fixture(scope="module", params=AUDITED)
def audited(request, tmp_path_factory):
    "(mechanism, result, folder)"
    root, mechanism = tmp_path_factory.mktemp("audited"), AUDITED[request.param]
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv("PACZERO_STATE_DIR", str(root / "state"))
        return mechanism, go(mechanism, root / "run"), root / "run"


def test_the_runs_files_are_stamped(audited):
    mechanism, r, folder = audited
    for name in ("config.json", "transcript.jsonl", "metrics.json", "guarantee.md"):
        assert STAMP in (folder / name).read_text(), name
    assert STAMP in (folder / "transcript.jsonl").read_text().splitlines()[0]
    assert STAMP in repr(mechanism) and STAMP in r.guarantee.markdown()
    assert r.metrics["guarantee_covers"] is False and r.metrics["posterior_bound"] == 1.0
    assert r.metrics["mi_bound"] is None


def test_the_release_is_stamped(audited, tmp_path):
    _, r, _ = audited
    assert "**No guarantee.**" in model_card(r).split("## Privacy guarantee")[0] and STAMP in model_card(r)
    save_release(r, None, tmp_path / "release")
    for name in ("README.md", "release.json", "transcript.jsonl"):
        assert STAMP in (tmp_path / "release" / name).read_text(), name


def test_a_real_run_never_speaks_of_an_audit(tmp_path, monkeypatch):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    go(ZPL(), tmp_path / "real")
    for p in (tmp_path / "real").iterdir():
        if p.suffix in (".json", ".jsonl", ".md"):
            assert "audit" not in p.read_text()
