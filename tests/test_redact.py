"""Secrets reach neither what is printed, nor the record of a run, nor wandb; ordinary text stays as it is."""

import json
import sys
from types import SimpleNamespace

import pytest
from etils import epath
from runs import make_world, run

from easyrm.config import RunConfig
from easyrm.errors import InputError
from easyrm.redact import REDACTED, redact, redact_tree
from easyrm.training.metrics import open_metrics
from easyrm.training.progress import START

HF, AWS, WANDB = "hf_" + "aB3" * 11 + "x", "AKIA" + "IOSFODNN7EXAMPLE", "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"401 with {HF}.", f"401 with {REDACTED}."),
        (f"--x={AWS}", f"--x={REDACTED}"),
        ("http://me:p%40ss@host:80/a@b", f"http://{REDACTED}@host:80/a@b"),
        ("https://:pa@ss@host/x", f"https://{REDACTED}@host/x"),
        ("https://a/b?X=1&token=abc&z=2", f"https://a/b?X=1&token={REDACTED}&z=2"),
        ("https://a/b?X-Goog-Signature=0af&x=1", f"https://a/b?X-Goog-Signature={REDACTED}&x=1"),
        ("https://a/b?X-Amz-Credential=q%2Fr&sig=0#top", f"https://a/b?X-Amz-Credential={REDACTED}&sig={REDACTED}#top"),
        ("gs://b/c?access_token=x&apikey=y'", f"gs://b/c?access_token={REDACTED}&apikey={REDACTED}'"),
    ],
)
def test_secrets_of_known_form_are_redacted(text, clean):
    assert redact(text) == clean
    assert redact_tree({"x": [text, (1, text)], "n": None}) == {"x": [clean, (1, clean)], "n": None}


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "X_SECRET", "DB_PASSWORD", "A_CREDENTIALS", "my_token"],
)
def test_secrets_of_the_environment_are_redacted(monkeypatch, name):
    assert redact(WANDB) == WANDB
    monkeypatch.setenv(name, WANDB)
    monkeypatch.setenv("B_TOKEN", WANDB + "-and-more")
    monkeypatch.setenv("SHORT_KEY", "train")
    assert redact(f"train {WANDB}-and-more, {WANDB}") == f"train {REDACTED}, {REDACTED}"


@pytest.mark.parametrize(
    "text",
    [
        "/home/hf_user/models/token/key=1/config.json",
        "gs://bucket/runs/7?",
        "hf://allenai/ultrafeedback_binarized:train[:50%]",
        "fingerprint 3b6f1c" + "0a1b2c3d" * 7 + "ab",
        WANDB,
        "meta-llama/Llama-3.1-8B-Instruct",
        "<|finetune_right_pad_id|>",
        "--data.pad_token=<|finetune_right_pad_id|> --tokenizer=hf://org/name",
        "unknown flag --pad_token; hf_hub_download, hf_transfer, hf_" + "a" * 8,
        "--model.init_from=http://127.0.0.1:8080/x@y",
        "at 12:30, see https://a.org/b: mail me@b.org",
        "https://a/b?monkey=1&keys=2&design=3&step=4",
        "loss 0.6931  accuracy 0.500",
    ],
)
def test_ordinary_text_stays(text):
    assert redact(text) == text


def test_secrets_reach_neither_the_record_nor_what_is_compared_with_it(tmp_path, monkeypatch):
    """And a run whose flags hold secrets resumes."""
    monkeypatch.setenv("STORE_PASSWORD", "correct-horse")
    folder, output = tmp_path / "correct-horse", tmp_path / "run"
    folder.mkdir()
    settings = {**make_world(folder, pairs=8), "output_dir": str(output), "total_steps": 1, "recipe": f"{HF}.toml"}
    run(settings)
    for file in ("config.json", "metrics.jsonl"):
        assert not any(secret in (output / file).read_text() for secret in ("correct-horse", HF))
    assert json.loads((output / "config.json").read_text())["config"]["recipe"] == f"{REDACTED}.toml"
    assert run(settings)[-1]["step"] == 1
    with pytest.raises(InputError, match="of another configuration") as error:
        run(settings | {"seed": 1, "tokenizer": f"{folder}/other/{HF}"})
    assert "correct-horse" not in str(error.value) and HF not in str(error.value)


def test_wandb_gets_the_redacted_flags_and_the_metrics_and_nothing_else(tmp_path, monkeypatch):
    sent = {}

    class Run:
        step = 0

        @staticmethod
        def define_metric(name, **options):
            pass

        @staticmethod
        def log(metrics, step):
            sent[step] = metrics

        @staticmethod
        def finish():
            sent["finished"] = True

    wandb = SimpleNamespace(Settings=dict, init=lambda **options: sent.update(options) or Run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    record = {"config": {"data": {"train": f"https://a.org/pairs.jsonl?token={WANDB}"}, "seed": 1}, "total_steps": 1}
    line = {"step": 1, "loss": 0.5, "accuracy": 1.0, "margin": 0.1, "learning_rate": 0.1, "pairs_per_second": 1.0}
    with open_metrics(RunConfig(wandb_project="p"), epath.Path(tmp_path), record, START) as log:
        log.write(line | {"step_time": 1.0})
    assert sent["config"] == {"data": {"train": f"https://a.org/pairs.jsonl?token={REDACTED}"}, "seed": 1}
    assert sent["settings"] == {"x_disable_meta": True, "disable_git": True, "save_code": False, "console": "off"}
    assert sent[1]["loss"] == 0.5 and sent["finished"]
