"""The manifests of tpu_launch/, rendered, and what must hold of each; the checks raise AssertionError or a schema's own
exception. What Kubernetes, JobSet and SkyPilot say of a field is theirs: kubernetes-validate, kubeflow-trainer-api."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from signal import SIGABRT, SIGSEGV

import pytest
import yaml
from absl import flags

from easyrm.config import RunConfig
from easyrm.errors import Resumable
from easyrm.flags import define_run_flags, run_config
from easyrm.peers import PEER_LOST
from easyrm.planning.topology import SLICES

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the schemas of Kubernetes are absent")
JobSet = pytest.importorskip("kubeflow_trainer_api.models", reason="those of JobSet are absent").JobsetV1alpha2JobSet

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_neverToBeSeenInAnyManifest"
OURS = {"PROJECT": "lab", "BUCKET": "gs://lab-runs", "IMAGE": "us-docker.pkg.dev/lab/easyrm/easyrm:1"}
LABELS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
AGAIN, COUNTED, NEVER = "RestartJobSetAndIgnoreMaxRestarts", "RestartJobSet", "FailJobSet"
ALONE = "the pod alone"
SECRET = re.compile(r"\bhf_\w{20,}|\bAIza[\w-]{30,}|\bya29\.|-----BEGIN [A-Z ]*PRIVATE KEY|\"private_key\"")
_ENVSUBST = """import os, re, sys
if sys.argv[1:2] == ["--variables"]:
    print("\\n".join(re.findall(r"\\$\\{(\\w+)\\}", sys.argv[2])))
else:
    sys.stdout.write(re.sub(r"\\$\\{(\\w+)\\}", lambda m: os.environ.get(m[1], ""), sys.stdin.read()))
"""


def make_place(folder: Path) -> dict[str, str]:
    """tpu_launch/ in `folder`, with settings of somebody's own; the environment in which its scripts run there.

    Where the machine has no envsubst, a stand-in does what render.sh asks of it.
    """
    shutil.copytree(ROOT / "tpu_launch", folder / "tpu_launch")
    settings, own = folder / "tpu_launch" / "settings.env", OURS | {"HF_TOKEN_FILE": str(folder / "token")}
    lines = [line.partition("=") for line in settings.read_text().splitlines()]
    settings.write_text("".join(f"{key}{equals}{own.get(key, value)}\n" for key, equals, value in lines))
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "bin").mkdir()
    if not shutil.which("envsubst"):
        add_tool(folder / "bin" / "envsubst", _ENVSUBST)
    return {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder)}


def add_tool(path: Path, program: str) -> None:
    """An executable Python program."""
    path.write_text(f"#!{sys.executable} -S\n{program}")
    path.chmod(0o755)


def render(folder: Path, manifest: str, **settings: str) -> subprocess.CompletedProcess:
    """render.sh of `folder` with these settings in the environment."""
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), **settings}
    return subprocess.run(
        ["tpu_launch/render.sh", f"tpu_launch/{manifest}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def asked_chips(accelerator_type: str) -> tuple[str, int]:
    """The generation as easyrm names it, and the chips: the size of v4 and v5p counts cores, two a chip."""
    name, _, size = accelerator_type.partition("-")
    return name.replace("v5litepod", "v5e"), int(size) // (2 if name in ("v4", "v5p") else 1)


def train_config(command: str) -> RunConfig:
    """What a shell command makes train_rm do; a flag that does not exist raises."""
    words = shlex.split(command.replace("\\\n", ""))  # lines that go on, which shlex does not join
    argv = words[words.index("easyrm.train_rm") :]
    assert words[words.index("easyrm.train_rm") - 1] == "-m"
    values = flags.FlagValues()
    define_run_flags(values, argv)
    assert values(argv)[1:] == [], "a bare word is no flag"
    config = run_config(values)
    config.validate()
    return config


def check_command(command: str, recipe: str, output_dir: str) -> None:
    """The command is the run of the settings, exports, and cannot become several runs of one host each."""
    config = train_config(command)
    assert (config.recipe, config.output_dir) == (recipe, output_dir)
    assert config.export and config.distributed == "true" and config.distributed_timeout >= 1800


def outcome(jobset: dict, status: int | None, disrupted: bool = False) -> str:
    """What JobSet's controller does after a pod's exit, by the two policies; status None: no container ever ran.

    Kubernetes ends its message on a Job that a rule of podFailurePolicy failed with the rule's action and index.
    """
    (job,) = jobset["spec"]["replicatedJobs"]
    reason, message = "", ""
    for index, rule in enumerate(job["template"]["spec"]["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        conditions = {(c["type"], c["status"]) for c in rule.get("onPodConditions", [])}
        matches = status is not None and (status in codes["values"]) == (codes["operator"] == "In")
        if matches or (disrupted and ("DisruptionTarget", "True") in conditions):
            assert rule["action"] == "FailJob"
            reason, message = "PodFailurePolicy", f"Container train for pod a/b failed with exit code {status}"
            message += f" matching FailJob rule at index {index}"
            break
    if not reason:  # the Job makes the pod again by itself, so many times
        assert 0 < job["template"]["spec"]["backoffLimit"] <= 10
        return ALONE
    policy = jobset["spec"]["failurePolicy"]
    for rule in policy["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    assert 0 < policy["maxRestarts"] <= 10
    return COUNTED


def keeps(read: object, written: object) -> bool:
    """Whether all of `written` is in `read`, which may have defaults beside it."""
    if isinstance(written, dict):
        return isinstance(read, dict) and all(key in read and keeps(read[key], written[key]) for key in written)
    if isinstance(written, list):
        return len(read) == len(written) and all(map(keeps, read, written))
    return read == written


def check_jobset(jobset: dict, accelerator_type: str, recipe: str, output_dir: str) -> None:
    """One run on the whole of one slice, restarted for what a restart mends and for nothing else."""
    assert keeps(JobSet.from_dict(jobset).to_dict(), jobset), "JobSet has no such field"
    (job,) = (replicated["template"]["spec"] for replicated in jobset["spec"]["replicatedJobs"])
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "host"}, "spec": job}, "1.33", strict=True
    )
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    generation, chips = asked_chips(accelerator_type)
    hosts, topology = job["parallelism"], pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts * container["resources"]["limits"]["google.com/tpu"] == chips
    assert math.prod(map(int, topology.split("x"))) == chips and topology in SLICES[generation]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == LABELS[generation]
    # What GKE's webhook wants before it tells the pods who they are, and what makes a restart one of all pods.
    assert job["completionMode"] == "Indexed" and job["completions"] == hosts > 1
    assert jobset["spec"]["network"]["enableDNSHostnames"] and jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert pod["restartPolicy"] == "Never"
    names = {rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert names == {container["name"]}
    again = {outcome(jobset, status) for status in (Resumable.STATUS, PEER_LOST)}
    assert again == {AGAIN} == {outcome(jobset, status, disrupted=True) for status in (137, 143)}
    assert outcome(jobset, 2) == outcome(jobset, 2, disrupted=True) == NEVER
    assert outcome(jobset, 1) == outcome(jobset, 134) == outcome(jobset, 137) == COUNTED
    assert outcome(jobset, None) == ALONE and outcome(jobset, None, disrupted=True) == AGAIN
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert "command" not in container and container["args"][:2] == ["bash", "-c"], "hold.sh is the image's entrypoint"
    check_command(container["args"][2], recipe, output_dir)


def check_kueue(documents: list[dict], jobset: dict) -> None:
    """The JobSet's queue exists, is for its nodes and has room for it and for what it asks."""
    by_kind = {document["kind"]: document for document in documents}
    assert {document["apiVersion"] for document in documents} == {"kueue.x-k8s.io/v1beta2"} and len(by_kind) == 3
    queue, local = by_kind["ClusterQueue"], by_kind["LocalQueue"]
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"] == {"clusterQueue": queue["metadata"]["name"]} and queue["spec"]["namespaceSelector"] == {}
    ((group,), job) = queue["spec"]["resourceGroups"], jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert by_kind["ResourceFlavor"]["spec"] == {"nodeLabels": pod["nodeSelector"]}
    ((flavor,), limits) = group["flavors"], pod["containers"][0]["resources"]["limits"]
    assert flavor["name"] == by_kind["ResourceFlavor"]["metadata"]["name"]
    quota = {resource["name"]: resource["nominalQuota"] for resource in flavor["resources"]}
    assert set(group["coveredResources"]) == set(quota) >= set(limits)
    assert all(quota[name] >= job["parallelism"] * limit for name, limit in limits.items())


def check_sky(task: dict, accelerator_type: str, zone: str, recipe: str, output_dir: str) -> None:
    """The slice, in its zone; recovered for what a recovery mends; pinned; the token from elsewhere."""
    resources, recovery = task["resources"], task["resources"]["job_recovery"]
    assert set(task) == {"name", "workdir", "resources", "secrets", "setup", "run"}
    assert (resources["accelerators"], resources["infra"]) == (f"tpu-{accelerator_type}", f"gcp/*/{zone}")
    assert re.match(r"v2-alpha-tpu|tpu-ubuntu", resources["accelerator_args"]["runtime_version"])
    assert recovery["strategy"] == "EAGER_NEXT_REGION" and recovery["max_restarts_on_errors"] == 0
    # 137 is what SkyPilot reports for the other hosts whenever one fails, with 2 too.
    assert set(recovery["recover_on_exit_codes"]) == {Resumable.STATUS, PEER_LOST, 128 + SIGABRT, 128 + SIGSEGV}
    assert task["secrets"] == {"HF_TOKEN": ""} and task["workdir"] == "."
    assert "--python 3.11" in task["setup"] and "--constraint constraints.txt" in task["setup"]
    assert "tpu,gcs" in task["setup"] and task["setup"].startswith("set -e\n")
    words = shlex.split(task["run"])
    assert words[:3] == ["bash", "tpu_launch/hold.sh", "~/easyrm/bin/python"]
    check_command(task["run"], recipe, output_dir)


def load(text: str) -> list[dict]:
    """The documents of a manifest; a secret in it is an error."""
    assert not SECRET.search(text) and TOKEN not in text
    return list(yaml.safe_load_all(text))
