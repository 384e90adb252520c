"""torchrun's entry, as one process alone: it takes run_experiment's parameters, runs, and says what was released."""
import json

import pytest

from paczero.cli.torchrun import main


def test_one_process_is_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PACZERO_STATE_DIR", str(tmp_path / "state"))
    given = dict(steps=2, eval_every=2, n_train=24, n_dev=8, n_eval=8, m=8, device="cpu", run_id="alone",
                 results_dir=tmp_path)
    main([x for k, v in given.items() for x in ("-p", k, str(v))])
    metrics = json.loads((tmp_path / "runs" / "alone" / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["mi_spent"] == 0
    assert "artefacts: " in capsys.readouterr().out


def test_an_unknown_parameter_is_said(capsys):
    with pytest.raises(SystemExit) as e:
        main(["-p", "stepz", "3"])
    assert e.value.code == 2 and "unknown parameter 'stepz'" in capsys.readouterr().err
