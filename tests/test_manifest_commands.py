"""What the README's sections SkyPilot and GKE tell to type, against stand-ins; the image; hold.sh around a process."""

import fnmatch
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from manifests import OURS, ROOT, TOKEN, check_command, check_jobset, check_kueue, check_sky, load, make_place

from easyrm import peers
from easyrm.errors import Resumable

TOOLS = ("pip", "sky", "gcloud", "docker", "kubectl", "xpk")
RUN, RECIPE, TYPE, ZONE = "llama31-tulu2-70b-uf", "llama3.1-tulu2-70b-uf", "v5p-64", "us-east5-a"
OUTPUT_DIR = f"{OURS['BUCKET']}/{RUN}"
RECORD = """import json, os, sys
argv = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
call = {"argv": argv, "stdin": sys.stdin.read() if argv[-1] == "-" else "", "token": os.environ.get("HF_TOKEN", "")}
call["files"] = {word: open(word).read() for word in argv if word.endswith(".yaml")}
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(call) + "\\n")
if "projectNumber" in argv[-1]:
    print(123456)
"""


class Typed:
    """The calls that a section's commands made, in a copy of tpu_launch/ with stand-ins for every tool but ours."""

    def __init__(self, folder, section):
        environment = make_place(folder)
        for tool in (*TOOLS, "../tpu_launch/tpu.sh"):
            (folder / "bin" / tool).unlink(missing_ok=True)
            (folder / "bin" / tool).write_text(f"#!{sys.executable} -S\n{RECORD}")
            (folder / "bin" / tool).chmod(0o755)
        page = (ROOT / "tpu_launch" / "README.md").read_text()
        text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]
        script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)).replace("/tmp/", f"{folder}/")
        more = {"CALLS": str(folder / "calls"), "CLUSTER": "c", "LOCATION": "us-east5"}
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", script],
            cwd=folder,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        self.calls = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
        self.folder = folder

    def one(self, *words):
        """The only call that begins with `words`."""
        (call,) = [call for call in self.calls if call["argv"][: len(words)] == list(words)]
        return call

    def flags(self, *words):
        """Its --name=value flags."""
        return dict(word[2:].partition("=")[::2] for word in self.one(*words)["argv"] if word.startswith("--"))


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    return Typed(tmp_path_factory.mktemp("sky"), "SkyPilot")


@pytest.fixture(scope="module")
def gke(tmp_path_factory):
    return Typed(tmp_path_factory.mktemp("gke"), "GKE")


def test_no_token_is_on_a_command_line_or_in_a_manifest(sky, gke):
    for call in (*sky.calls, *gke.calls):
        assert TOKEN not in json.dumps({**call, "token": ""})
    assert sky.one("sky", "jobs", "launch")["token"] == TOKEN and not any(call["token"] for call in gke.calls)


def test_skypilot_is_given_the_rendered_task(sky):
    launch = sky.one("sky", "jobs", "launch")
    (task,) = [load(text)[0] for text in launch["files"].values()]
    check_sky(task, TYPE, ZONE, RECIPE, OUTPUT_DIR)
    assert set(task["secrets"]) == {launch["argv"][launch["argv"].index("--secret") + 1]}
    for verb in ("logs", "cancel"):
        assert sky.one("sky", "jobs", verb)["argv"][3:5] == ["--name", task["name"]]
    assert sky.one("tpu.sh")["argv"] == ["tpu.sh", "export"]


def test_kubectl_is_given_the_rendered_manifests(gke):
    kueue, run = [load(call["stdin"]) for call in gke.calls if call["argv"] == ["kubectl", "apply", "-f", "-"]]
    (jobset,) = run
    check_jobset(jobset, TYPE, RECIPE, OUTPUT_DIR)
    check_kueue(kueue, jobset)
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert gke.one("kubectl", "create", "serviceaccount")["argv"][3] == pod["serviceAccountName"]
    given = [call["argv"] for call in gke.calls if call["argv"][3:4] == ["add-iam-policy-binding"]]
    roles = {word.removeprefix("--role=roles/storage.") for words in given for word in words if "--role=" in word}
    assert roles == {"objectUser", "legacyBucketReader"} and all(OURS["BUCKET"] in words for words in given)
    for member in (word for words in given for word in words if word.startswith("--member=")):
        assert "/projects/123456/" in member and member.endswith(f"/ns/default/sa/{pod['serviceAccountName']}")
    (volume,) = pod["volumes"]
    secret = gke.one("kubectl", "create", "secret", "generic")["argv"]
    key, _, file = secret[5].removeprefix("--from-file=").partition("=")
    assert (secret[4], file) == (volume["secret"]["secretName"], str(gke.folder / "token"))
    (container,) = pod["containers"]
    assert {"name": "HF_TOKEN_PATH", "value": f"{container['volumeMounts'][0]['mountPath']}/{key}"} in container["env"]
    assert f"jobset-name={jobset['metadata']['name']}," in gke.flags("kubectl", "logs")["selector"]
    assert gke.one("kubectl", "delete", "jobset")["argv"][3] == jobset["metadata"]["name"]


def test_the_node_pool_is_the_slice(gke):
    (jobset,) = load(next(call["stdin"] for call in gke.calls if "kind: JobSet" in call["stdin"]))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pool, pod = gke.flags("gcloud", "container", "node-pools", "create"), job["template"]["spec"]
    assert pool["tpu-topology"] == pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert (pool["num-nodes"], pool["machine-type"]) == (str(job["parallelism"]), "ct5p-hightpu-4t")
    assert "spot" in pool and pool["workload-metadata"] == "GKE_METADATA"


def test_xpk_runs_the_same(gke):
    flags = gke.flags("xpk", "workload", "create")
    check_command(flags["command"], RECIPE, OUTPUT_DIR)
    assert flags["command"].startswith("exec hold.sh python ") and flags["tpu-type"] == TYPE
    assert set(map(int, flags["restart-on-exit-codes"].split(","))) == {peers.PEER_LOST, Resumable.STATUS}


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps `path`, or a folder that it is in, out of the image: the last match decides."""
    kept_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        parents = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
        deep = pattern.startswith("**/") and pattern[3:] in path.split("/")
        if line and not line.startswith("#") and (deep or any(fnmatch.fnmatch(p, pattern) for p in parents)):
            kept_out = not line.startswith("!")
    return kept_out


def check_image(dockerfile: str) -> None:
    """Pinned, without secrets, not root, and made of files that the build is given."""
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", dockerfile, flags=re.M))
    steps = [line.split(maxsplit=1) for line in joined.splitlines() if line]
    by_name = {name: [rest for other, rest in steps if other == name] for name, _ in steps}
    assert re.fullmatch(r"python:3\.1[12]-slim", *by_name["FROM"])
    for copied in by_name["COPY"]:
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists() and not ignored(source), source
    defaults = dict(argument.split("=", 1) for argument in by_name["ARG"])
    assert not any(re.search("TOKEN|KEY|SECRET|PASSWORD", value) for value in by_name["ARG"] + by_name["ENV"])
    assert any("--constraint constraints.txt" in run and '".[$EXTRAS]"' in run for run in by_name["RUN"])
    assert {"tpu", "gcs"} <= set(defaults["EXTRAS"].split(","))
    user = by_name["USER"][-1]
    assert int(defaults[user[1:]] if user.startswith("$") else user) > 0
    assert json.loads(by_name["ENTRYPOINT"][0]) == ["hold.sh"]
    assert "tpu_launch/hold.sh /usr/local/bin/" in by_name["COPY"]


def test_the_image(gke):
    build = gke.flags("docker", "build")
    check_image((ROOT / build["file"]).read_text())
    assert build["tag"] == OURS["IMAGE"] == gke.one("docker", "push")["argv"][2]
    assert gke.one("docker", "build")["argv"][-1] == "." and build["platform"] == "linux/amd64"
    kept_out = [
        ".git/config",
        ".env",
        "token",
        "runs/a/metrics.jsonl",
        "tpu_launch/settings.env",
        "easyrm/__pycache__/a",
    ]
    assert all(map(ignored, kept_out)) and not ignored("easyrm/recipes/tulu2.5-13b-uf.toml")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--constraint constraints.txt ", ""),
        ("ARG USER_ID=1000", "ARG USER_ID=0"),
        ("ARG EXTRAS=tpu,gcs", "ARG EXTRAS=tpu"),
        ("ENV PYTHON", "ENV HF_TOKEN=x PYTHON"),
        ("COPY easyrm easyrm", "COPY easyrm tests easyrm"),
        ('["hold.sh"]', '["bash"]'),
        ("python:3.11-slim", "python:latest"),
    ],
)
def test_a_broken_image_is_found(old, new):
    dockerfile = (ROOT / "tpu_launch" / "gke" / "Dockerfile").read_text()
    assert old in dockerfile
    with pytest.raises(AssertionError):
        check_image(dockerfile.replace(old, new))


def held(tmp_path, program: str, hold: str = "30") -> subprocess.Popen:
    """hold.sh around a Python program, with another HOLD."""
    script = (ROOT / "tpu_launch" / "hold.sh").read_text()
    (tmp_path / "hold.sh").write_text(re.sub(r"^HOLD=\d+$", f"HOLD={hold}", script, flags=re.M))
    return subprocess.Popen(
        ["bash", tmp_path / "hold.sh", sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_a_status_passes_hold_at_once(tmp_path, status):
    start = time.monotonic()
    assert held(tmp_path, f"raise SystemExit({status})").wait(20) == status and time.monotonic() - start < 20


def test_a_lost_process_lets_the_one_that_failed_end_first(tmp_path):
    start = time.monotonic()
    assert held(tmp_path, f"raise SystemExit({peers.PEER_LOST})", hold="2").wait(30) == peers.PEER_LOST
    assert time.monotonic() - start > 2
    hold = re.search(r"^HOLD=(\d+)$", (ROOT / "tpu_launch" / "hold.sh").read_text(), re.M)
    assert int(hold[1]) > peers.LINGER + peers._GRACE["failed"] + peers.LAST


@pytest.mark.parametrize(("program", "status"), [("signal.pause()", 75), ("raise SystemExit(69)", 69)])
def test_sigterm_passes_hold(tmp_path, program, status):
    handler = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), os._exit(75)))"
    process = held(tmp_path, f"import os, signal, time\n{handler}\nprint('up', flush=True)\n{program}")
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5 if status == 75 else 3)  # until hold.sh waits, for the program or after it
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == status
