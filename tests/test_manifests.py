"""sky.yaml and gke/: valid by the schemas of who reads them, one run on one whole slice; each check can fail."""

import re
import subprocess

import pytest
from absl import flags
from manifests import (
    OURS,
    ROOT,
    SECRET,
    asked_chips,
    check_jobset,
    check_kueue,
    check_sky,
    kubernetes_validate,
    load,
    make_place,
    render,
)

MANIFESTS = ("sky.yaml", "gke/jobset.yaml", "gke/kueue.yaml")
TYPES = [f"{name}-{size}" for name in ("v5litepod", "v6e") for size in (8, 16, 32, 64, 128, 256)]
TYPES += [f"{name}-{size}" for name in ("v4", "v5p") for size in (16, 32, 64, 128, 256, 512)]
RUN, RECIPE, ZONE = "llama31-tulu2-70b-uf", "llama3.1-tulu2-70b-uf", "us-east5-a"
REFUSALS = (AssertionError, ValueError, flags.Error, kubernetes_validate.ValidationError)
OUTPUT_DIR = f"{OURS['BUCKET']}/{RUN}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifests")
    make_place(folder)
    return folder


def rendered(place, manifest, **settings) -> str:
    result = render(place, manifest, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def texts(place) -> dict[str, str]:
    return {name: rendered(place, name) for name in MANIFESTS}


def check(text: str, accelerator_type: str) -> None:
    """All manifests, one behind the other."""
    task, jobset, *kueue = load(text)
    check_sky(task, accelerator_type, ZONE, RECIPE, OUTPUT_DIR)
    check_jobset(jobset, accelerator_type, RECIPE, OUTPUT_DIR)
    check_kueue(kueue, jobset)


@pytest.mark.parametrize("accelerator_type", TYPES)
def test_every_slice_has_its_manifests(place, accelerator_type):
    together = place / "tpu_launch" / "together.yaml"
    together.write_text("---\n".join((place / "tpu_launch" / name).read_text() for name in MANIFESTS))
    check(rendered(place, together.name, ACCELERATOR_TYPE=accelerator_type), accelerator_type)


MUTANTS = [
    ("sky.yaml", "recover_on_exit_codes: [69, 75, 134, 139]", "recover_on_exit_codes: [69, 75, 134, 139, 2]"),
    ("sky.yaml", "recover_on_exit_codes: [69, 75, 134, 139]", "recover_on_exit_codes: [69, 75, 134, 139, 137]"),
    ("sky.yaml", "recover_on_exit_codes: [69, 75, 134, 139]", "recover_on_exit_codes: [69, 134, 139]"),
    ("sky.yaml", "max_restarts_on_errors: 0", "max_restarts_on_errors: 9"),
    ("sky.yaml", 'HF_TOKEN: ""', "HF_TOKEN: hf_" + 24 * "a"),
    ("sky.yaml", "--constraint constraints.txt ", ""),
    ("sky.yaml", "bash tpu_launch/hold.sh ", ""),
    ("sky.yaml", "--export=true", "--exprot=true"),
    ("sky.yaml", "accelerators: tpu-v5p-64", "accelerators: v5p-64"),
    ("gke/jobset.yaml", "values: [2]", "values: [3]"),
    ("gke/jobset.yaml", "values: [69, 75]", "values: [75]"),
    ("gke/jobset.yaml", "type: DisruptionTarget", "type: Ready"),
    ("gke/jobset.yaml", "index [12]$", "index 1$"),
    ("gke/jobset.yaml", "index 0$", "index 4$"),
    ("gke/jobset.yaml", "maxRestarts: 10", "maxRestarts: 1000"),
    ("gke/jobset.yaml", "maxRestarts:", "maxRestart:"),
    ("gke/jobset.yaml", "containerName: train", "containerName: main"),
    ("gke/jobset.yaml", "restartPolicy: Never", "restartPolicy: OnFailure"),
    ("gke/jobset.yaml", "restartPolicy: Never", "restartPolicies: Never"),
    ("gke/jobset.yaml", "terminationGracePeriodSeconds: 600", 'terminationGracePeriodSeconds: "600"'),
    ("gke/jobset.yaml", "backoffLimit: 8", "backoffLimit: 0"),
    ("gke/jobset.yaml", "values: [2, 69, 75]", "values: [1, 2, 69, 75]"),
    ("gke/jobset.yaml", "operator: NotIn", "operator: In"),
    ("sky.yaml", "strategy: EAGER_NEXT_REGION", "strategy: FAILOVER"),
    ("gke/jobset.yaml", "completions: 8", "completions: 4"),
    ("gke/jobset.yaml", "parallelism: 8", "parallelism: 4"),
    ("gke/jobset.yaml", "google.com/tpu: 4", "google.com/tpu: 8"),
    ("gke/jobset.yaml", "2x4x4", "4x4x4"),
    ("gke/jobset.yaml", "tpu-v5p-slice", "tpu-v5-lite-podslice"),
    ("gke/jobset.yaml", "--distributed=true", "--distributed=auto"),
    ("gke/jobset.yaml", "--output_dir=gs://", "--output-dir=gs://"),
    ("gke/jobset.yaml", "--output_dir=gs://", "output_dir=gs://"),
    ("gke/jobset.yaml", "queue-name: easyrm", "queue-name: other"),
    ("gke/kueue.yaml", "nominalQuota: 32", "nominalQuota: 31"),
    ("gke/kueue.yaml", "coveredResources: [google.com/tpu]", "coveredResources: [cpu]"),
    ("gke/kueue.yaml", "2x4x4", "2x2x4"),
    ("gke/kueue.yaml", "clusterQueue: easyrm", "clusterQueue: other"),
    ("gke/kueue.yaml", "v1beta2", "v1alpha1"),
]


@pytest.mark.parametrize(("manifest", "old", "new"), MUTANTS)
def test_a_broken_manifest_is_found(texts, manifest, old, new):
    assert old in texts[manifest]
    broken = {**texts, manifest: texts[manifest].replace(old, new)}
    with pytest.raises(REFUSALS):
        check("---\n".join(broken.values()), "v5p-64")


def test_the_manifests_as_they_are_pass(texts):
    check("---\n".join(texts.values()), "v5p-64")


def test_the_schema_of_skypilot(place):
    pytest.importorskip("sky", reason="SkyPilot is 460 MB and no test dependency")
    import jsonschema
    from sky import Task
    from sky.utils import schemas

    for provisioning, spot in (("spot", True), ("on-demand", False)):
        (task,) = load(rendered(place, "sky.yaml", PROVISIONING=provisioning))
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())
        (resources,) = Task.from_yaml_config(task).resources
        assert resources.use_spot == spot and resources.zone == ZONE
        assert resources.accelerators == {"tpu-v5p-64": 1}


@pytest.mark.parametrize(
    ("provisioning", "use_spot", "operator"), [("spot", True, "Exists"), ("on-demand", False, "DoesNotExist")]
)
def test_spot_is_asked_for_where_the_settings_say_so(place, provisioning, use_spot, operator):
    (task,) = load(rendered(place, "sky.yaml", PROVISIONING=provisioning))
    (jobset,) = load(rendered(place, "gke/jobset.yaml", PROVISIONING=provisioning))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    spot = "cloud.google.com/gke-spot"
    assert task["resources"]["use_spot"] is use_spot
    assert terms == [{"matchExpressions": [{"key": spot, "operator": operator}]}]
    assert spot in [toleration["key"] for toleration in pod["tolerations"]]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"ACCELERATOR_TYPE": "v5p-8"}, "ACCELERATOR_TYPE=v5p-8"),
        ({"ACCELERATOR_TYPE": "v5p-48"}, "ACCELERATOR_TYPE=v5p-48"),
        ({"ACCELERATOR_TYPE": "h100-8", "RUNTIME_VERSION": "x"}, "ACCELERATOR_TYPE=h100-8"),
        ({"ACCELERATOR_TYPE": "v5p-large"}, "ACCELERATOR_TYPE=v5p-large"),
        ({"PROVISIONING": "cheap"}, "PROVISIONING=cheap"),
        ({"RUN": "Run_1"}, "RUN=Run_1"),
        ({"RUN": 41 * "a"}, f"RUN={41 * 'a'}"),
        ({"IMAGE": "us-docker.pkg.dev/your-project/easyrm/easyrm"}, "IMAGE=us-docker.pkg.dev/your-project"),
    ],
)
def test_bad_settings_are_one_line(place, settings, named):
    result = render(place, "gke/jobset.yaml", **settings)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith(f"render.sh: {named}")


def test_skypilot_gets_no_queued_request(place):
    """It would leave them behind, and their slices would be paid for when they come."""
    result = render(place, "sky.yaml", PROVISIONING="queued")
    assert result.returncode == 2 and "PROVISIONING=queued: SkyPilot leaves requests" in result.stderr
    assert render(place, "gke/jobset.yaml", PROVISIONING="queued").returncode == 0


def test_a_variable_that_is_no_setting_is_refused(place):
    broken = place / "tpu_launch" / "broken.yaml"
    broken.write_text("image: ${IMAGES}\n")
    result = render(place, "broken.yaml")
    assert result.returncode == 2 and "names IMAGES, which is not a setting" in result.stderr


def test_every_variable_is_put_in(texts):
    assert not any(re.search(r"\$\{?\w", text) for text in texts.values())


def test_the_run_is_that_of_tpu_sh(place, texts):
    program = '. ./settings.sh; DRY_RUN=; read_settings ./settings.env; run_flags; printf "%s\\n" "${FLAGS[@]}"'
    of_tpu_sh = subprocess.run(
        ["bash", "-euc", program], cwd=place / "tpu_launch", capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    for manifest in MANIFESTS[:2]:
        words = re.findall(r"--[a-z]\w*(?:\.\w+)?=\S+", texts[manifest].split("easyrm.train_rm", 1)[1])
        assert len(words) == len(set(words)) and set(words) == {*of_tpu_sh, "--distributed=true"}


def test_no_file_holds_a_secret():
    files = [ROOT / ".dockerignore", *(path for path in (ROOT / "tpu_launch").rglob("*") if path.is_file())]
    assert len(files) > 10
    for path in files:
        assert not SECRET.search(path.read_text()), path
    assert SECRET.search(f"token: hf_{34 * 'a'}") and SECRET.search('{"private_key": ""}')


def test_chips_are_counted_as_google_names_them():
    assert asked_chips("v5p-64") == ("v5p", 32) and asked_chips("v5litepod-32") == ("v5e", 32)
