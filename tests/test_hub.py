"""Models of the hub: told from paths, downloaded where there is room, and what the hub's refusals mean."""

import functools
import http.server
import threading

import huggingface_hub
import pytest
from etils import epath
from huggingface_hub import DryRunFileInfo

from easyrm.data.tokenizer import load_tokenizer
from easyrm.errors import InputError, Unavailable
from easyrm.hf.hub import fetch, hub_name


def test_hub_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_name("runs/base") is None
    assert hub_name("allenai/tulu-2-13b") == "allenai/tulu-2-13b"
    assert hub_name("hf://runs/base") == "runs/base"
    assert hub_name("gs://bucket/model") is None
    assert hub_name(str(tmp_path / "absent")) is None


def test_what_the_hub_does_not_give_is_an_input_error(monkeypatch):
    def refuse(name, **_):
        raise OSError(f"no {name} here\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=r"hf://org/absent: .*no org/absent here") as error:
        fetch("hf://org/absent")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, InputError), (403, InputError), (429, Unavailable), (503, Unavailable)]
)
@pytest.mark.parametrize("get", [fetch, load_tokenizer])
def test_a_hub_that_cannot_now_is_asked_again_by_who_starts_the_run(tmp_path, monkeypatch, get, status, kind):
    """An answer of its client's own HTTP library, from a server here."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        def log_message(self, *_):
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        hub = functools.partial(huggingface_hub.HfApi.repo_info, huggingface_hub.HfApi(endpoint=address))
        monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", lambda _, *args, **how: hub(*args, **how))
        with pytest.raises(kind, match=r"hf://org/x: .*hub"):
            get("hf://org/x")
        server.shutdown()


def test_a_model_that_the_disk_cannot_hold_is_not_downloaded(tmp_path, monkeypatch):
    sizes, downloads = {"config.json": 600, "model-00001-of-00002.safetensors": 3 * 10**15}, []

    def hub(name, *, allow_patterns, ignore_patterns, dry_run=False):
        if not dry_run:
            downloads.append(name)
            return str(tmp_path)
        return [
            DryRunFileInfo("0", size, file, str(tmp_path / file), file in cached, file not in cached)
            for file, size in sizes.items()
        ]

    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    cached = {"config.json"}
    with pytest.raises(InputError, match=r"hf://org/large: 3000000\.0 GB to download, .* GB free; copy the model to a"):
        fetch("hf://org/large")
    assert not downloads
    cached = set(sizes)
    assert fetch("hf://org/large") == epath.Path(tmp_path)


def test_what_the_cache_holds_needs_no_hub(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--cached" / "snapshots" / "0123"
    for name, text in {snapshot / "config.json": "{}", snapshot.parents[1] / "refs" / "main": "0123"}.items():
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_text(text)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fetch("hf://org/cached") == epath.Path(snapshot)
