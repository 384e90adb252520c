"""A release is of one run, of plain files, finished, and private until its owner has looked at it."""
import json
import shutil
from types import SimpleNamespace

import pytest

from paczero.finetune import FineTuneConfig, Runtime, finetune
from paczero.mechanisms import ZPL
from paczero.models import load_model
from paczero.publish.files import FORMAT, check_release
from paczero.publish.write import push_to_hub, save_release
from paczero.tasks import load_task
from paczero.transcript import ChainedLog, Transcript

UPDATE = dict(steps=1, k=1, lr=0.1, zo_eps=1e-3, lr_schedule="constant", restore="copy")
HEADER = dict(format="paczero-transcript/1", model=dict(weights="0"), design={}, mechanism={}, update=UPDATE,
              directions=dict(seed=0, z="0", device="cpu"))


@pytest.fixture
def release(tmp_path):
    "Makes a small release, made up; its transcript has one step."
    def make(name, y=1):
        to = tmp_path / name
        to.mkdir()
        with ChainedLog(to / "transcript.jsonl") as log:
            for e in (HEADER, dict(t=0, y=[y]), dict(end=dict(best_step=1, weights="1"))):
                log.append(e)
        (to / "README.md").write_text(log.chain.digest)
        said = dict(format=FORMAT, what="transcript", digest=log.chain.digest, weights="1")
        (to / "release.json").write_text(json.dumps(said))
        return to
    return make


@pytest.mark.parametrize("name", ["README.md", "transcript.jsonl", "release.json"])
def test_a_link_is_no_part_of_a_release(release, tmp_path, name):
    "Also where it leads to the right bytes: tomorrow it may lead elsewhere."
    folder = release("a")
    check_release(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} may not be in a release|has no release.json"):
        check_release(folder)


@pytest.mark.parametrize("name", ["README.md", "transcript.jsonl", "release.json"])
def test_parts_of_two_releases_are_none(release, name):
    "Each of the three names the transcript, and one of another run's is noticed."
    a, b = release("a"), release("b", y=-1)
    shutil.copy(b / name, a / name)
    with pytest.raises(ValueError, match="transcript"):
        check_release(a)
    check_release(b)


def test_an_unfinished_run_is_not_published(release, tmp_path):
    done = Transcript.load(release("a") / "transcript.jsonl")
    cut = Transcript(header=done.header, releases=done.releases, digest=done.digest)
    try:
        save_release(SimpleNamespace(transcript=cut, guarantee=None), None, tmp_path / "out")
        said = "published"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    assert said.startswith("ValueError: the run is unfinished")
    assert not (tmp_path / "out").exists()


class Hub:
    "Keeps what it was asked for."
    def create_repo(self, repo_id, **kw):
        self.repo = kw

    def upload_folder(self, **kw):
        self.upload = kw


def test_a_new_repository_is_private_until_its_owner_says_otherwise(tmp_path):
    task = load_task("reviews", seed=0, n_train=24, n_dev=8, n_eval=8)
    config = FineTuneConfig(steps=1, lr=1e-3, m=8, eval_every=1)
    result = finetune(*load_model("tiny-opt"), task, ZPL(), config, folder=tmp_path / "run",
                      runtime=Runtime(test=False))
    for asked in ({}, dict(private=True), dict(private=False)):
        hub = Hub()
        push_to_hub(result, "user/name", api=hub, **asked)
        assert hub.repo["private"] is asked.get("private", True)
        assert hub.upload["allow_patterns"] == ["README.md", "release.json", "transcript.jsonl"]
