"""What a run asks of a bucket before it begins, by Google's own client against a server here."""

import http.server
import json
import threading

import pytest

from easyrm import buckets
from easyrm.buckets import check_bucket
from easyrm.config import RunConfig
from easyrm.errors import InputError, Unavailable
from easyrm.run import check_output_dir

pytest.importorskip("google.cloud.storage", reason="the extra `gcs` is not installed")


@pytest.fixture
def storage(monkeypatch):
    """A server of which `status` can be set, and that keeps the `asked` paths."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path.partition("?")[0])
            body = json.dumps({"name": "lab", "error": {"code": server.status, "message": "no"}}).encode()
            self.send_response(server.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.asked, server.status = [], 200
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(buckets, "_SECONDS", 1.0)
        yield server
        server.shutdown()


def test_a_bucket_that_answers(storage):
    check_bucket("gs://lab/runs/rm70b")
    check_bucket("gs://lab")
    assert storage.asked == ["/storage/v1/b/lab"] * 2


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (403, InputError, "--output_dir=gs://lab/run: this account may not ask gs://lab .*roles/storage.legacyBucketR"),
        (404, InputError, "--output_dir=gs://lab/run: there is no bucket gs://lab; check"),
        (401, InputError, "--output_dir=gs://lab/run: gs://lab cannot be asked .*log in"),
        (503, Unavailable, "--output_dir=gs://lab/run: gs://lab does not answer"),
        (429, Unavailable, "--output_dir=gs://lab/run: gs://lab does not answer"),
    ],
)
def test_a_run_learns_at_its_start_what_would_stop_it_hours_later(storage, status, error, says):
    storage.status = status
    with pytest.raises(error, match=says):
        check_output_dir(RunConfig(output_dir="gs://lab/run"), print)


def test_other_directories_are_not_asked(storage, tmp_path):
    check_output_dir(RunConfig(output_dir=str(tmp_path / "run")), print)
    assert storage.asked == []
