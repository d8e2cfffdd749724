"""Model cards and uploads, against a local stand-in for the Hub's HTTP API."""

import base64
import json

import pytest
import yaml

from rlhf_engine.config import load_config
from rlhf_engine.files import write_json
from rlhf_engine.recipes import run_ppo
from rlhf_engine.recipes.hub import License, model_card, published, push
from tests.engine.helpers.cli_run import new_run, rlhf
from tests.engine.helpers.http_server import serving


class Hub:
    """Answers the requests with which huggingface_hub creates a repository and commits files; keeps what it received."""

    def __init__(self, refuse=None):
        self.refuse, self.created, self.files, self.url = refuse, [], {}, ""

    def __call__(self, path, content, number):
        if self.refuse is not None:
            return self.refuse, {"error": "You don't have the rights"}, {}
        if path == "/api/repos/create":
            self.created.append(json.loads(content))
            return 200, {"url": f"{self.url}/someone/tiny", "id": "someone/tiny"}, {}
        if path.endswith("/preupload/main"):
            files = json.loads(content)["files"]
            modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return 200, {"files": modes}, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/someone/tiny/commit/0"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        return 404, {"error": f"no {path}"}, {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """Return the folder of a policy after one update, next to a plan."""
    run = new_run(tmp_path_factory.mktemp("run"), base)
    (run / "score.py").write_text("def score(prompts, responses):\n    return [float(len(one)) for one in responses]\n")
    sets = [f"reward.function={run / 'score.py'}:score", "ppo.value_init=zero", "ppo.kl_coef=0.3"]
    run_ppo(load_config(run / "run.yaml", sets))
    return run / "out" / "ppo"


def test_the_card_has_the_base_fingerprints_settings_kl_and_plan(trained):
    card = model_card(trained, base="someone/base", license=License("apache-2.0"))
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "someone/base" and head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers" and "ppo" in head["tags"]
    for part in (
        "| `data.prompts` | `",
        "| KL to the reference, nats per response | ",
        "ppo.kl_coef: 0.3",
        "Planned peak ",
    ):
        assert part in card, card
    assert str(trained.parent.parent) not in card  # no path of this machine
    assert "Win rate" not in card


def test_the_card_has_the_win_rate_of_this_model_only(trained, tmp_path):
    rate = {"rate": 0.625, "low": 0.5, "high": 0.75, "prompts": 40, "ties": 0.1}
    for candidate in (trained, tmp_path / "other"):
        setting = {"candidate": str(candidate), "baseline": "runs/sft", "judge": "runs/judge", "split": "test"}
        (tmp_path / "eval").mkdir(exist_ok=True)
        write_json(tmp_path / "eval" / "report.json", {"win_rate": rate, "eval": setting})
        (trained.parent / "eval").mkdir(exist_ok=True)
        write_json(trained.parent / "eval" / "report.json", {"win_rate": rate, "eval": setting})
        line = "0.625 over sft, 95% interval 0.500 to 0.750, on 40 prompts of split test, by the judge judge"
        assert (line in model_card(trained)) == (candidate == trained)
        assert line in model_card(trained, evaluation=tmp_path / "eval")
    with pytest.raises(ValueError, match=r"none: the file report.json is missing"):
        model_card(trained, evaluation=tmp_path / "none")


def test_a_push_is_one_commit_of_the_model_and_the_card(trained):
    hub = Hub()
    with serving(hub, by_path=True) as served:
        hub.url = served.url
        url = push(trained, "someone/tiny", card="# card", private=True, endpoint=served.url, token="t")
    assert url == f"{hub.url}/someone/tiny/commit/0"
    assert hub.created[0]["name"] == "tiny" and "private" in (hub.created[0].get("visibility"), *hub.created[0])
    assert hub.files["README.md"] == b"# card"
    assert hub.files["model.safetensors"] == (trained / "model.safetensors").read_bytes()
    assert not {"rlhf.yaml", "trainer.json", "optimizer.safetensors", "manifest.json"} & hub.files.keys()
    assert {str(path.relative_to(trained)) for path in published(trained)} | {"README.md"} == hub.files.keys()


def test_what_cannot_be_published_is_named(trained, tmp_path, capsys):
    with (
        serving(Hub(refuse=403), by_path=True) as served,
        pytest.raises(ValueError, match=r"the Hub, someone/tiny: .*403"),
    ):
        push(trained, "someone/tiny", card="c", endpoint=served.url, token="t")
    with pytest.raises(ValueError, match="the Hub, a/b/c: HFValidationError"):
        push(trained, "a/b/c", card="c")
    with pytest.raises(ValueError, match=r"config.json is missing; give the folder of a model"):
        push(tmp_path, "someone/tiny", card="c")
    with pytest.raises(ValueError, match="'other' needs --license-name and --license-link"):
        License("other")
    code, _, shown = rlhf(capsys, "push", tmp_path, "someone/tiny")
    assert code == 2 and "give a folder that rlhf sft, rlhf rm or rlhf ppo wrote" in shown


def test_a_dry_run_prints_the_card_and_the_files(trained, capsys):
    code, shown, _ = rlhf(capsys, "push", trained, "someone/tiny", "--dry-run")
    assert code == 0 and "# ppo: reinforcement learning" in shown and "model.safetensors" in shown
