"""Where the documents' commands run: a folder in which the names that they use exist, and children that run programs.

A child is forked from a server that has imported what every command imports, so that a command costs a second instead
of four. In it the hub's functions answer from the folder.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import shlex
import sys
import types
from pathlib import Path

from documents import ROOT
from easylm_ancestor import make_arrays, write_stream
from runs import TINY_MODEL, make_pairs, make_tokenizer, tiny_llama, write_lines

TURN = {"role": "user", "content": "ant bee cat"}
RANKING = {"prompt": "ant bee", "responses": ["cat bee", "dog", "eel fox"], "ranks": [0, 1, 1]}
CORE = [
    {"prompt": "ant?", "chosen": f"bee {subset}", "rejected": "cat", "subset": subset, "id": i}
    for i, subset in enumerate(["alpacaeval-easy", "mt-bench-hard", "donotanswer", "hep-cpp"])
]
RM_BENCH = [
    {"prompt": "ant?", "chosen": ["bee", "bee fox", "bee *fox*"], "rejected": ["cat", "cat dog", "cat *dog*"]}
    | {"domain": domain, "id": domain}
    for domain in ("chat", "math", "code", "safety-refuse", "safety-response")
]
REWARDBENCH2 = [
    {"id": "a", "prompt": "ant?", "chosen": ["bee"], "rejected": ["cat", "dog", "eel"], "subset": "Math"}
    | {"num_correct": 1, "total_completions": 4}
]
# What the hub holds, in the columns of the data sets of these names.
HUB = {
    "Anthropic/hh-rlhf": [
        {
            "chosen": f"\n\nHuman: ant?\n\nAssistant: bee\n\nAssistant: {i}",
            "rejected": "\n\nHuman: ant?\n\nAssistant: cat",
        }
        for i in range(9)
    ],
    "nvidia/HelpSteer3": [
        {"context": [TURN], "response1": f"bee {i}", "response2": "cat", "overall_preference": i - 4} for i in range(9)
    ],
    "stanfordnlp/SHP": [
        {"history": "ant?", "human_ref_A": f"bee {i}", "human_ref_B": "cat", "labels": i % 2} for i in range(9)
    ],
    "openbmb/UltraFeedback": [
        {
            "instruction": "ant?",
            "completions": [{"response": f"bee {j}", "fine-grained_score": j % 3} for j in range(4)],
        }
        for _ in range(9)
    ],
    "allenai/reward-bench": CORE,
    "allenai/reward-bench-2": REWARDBENCH2,
    "THU-KEG/RM-Bench": RM_BENCH,
    **dict.fromkeys(
        [
            "HuggingFaceH4/ultrafeedback_binarized",
            "Skywork/Skywork-Reward-Preference-80K-v0.2",
            "allenai/tulu-2.5-preference-data",
            "trl-lib/ultrafeedback_binarized",
        ],
        make_pairs(24),
    ),
}
# Files and models by the names that the documents give them.
PAIRS = ("pairs.jsonl", "heldout.jsonl", "train.jsonl", "safety.jsonl", "many.jsonl.gz", "FILE")
PAIRS += ("demo_run/train.jsonl", "demo_run/heldout.jsonl")
MODELS = ("BASE", "DIR", "HF_DIR", "stories260K")
PRELOADED = ["datasets", "easyrm.evaluator", "easyrm.export", "easyrm.reporting.page", "easyrm.scoring.scorer"]
PRELOADED += ["easyrm.training.program", "documents_world"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOADED)


def make_folder(folder: Path) -> None:
    """Write every file and model that the documents name; `RUN_DIR` is a run of two steps."""
    for name in ("demo_run", "easylm", "gs/bucket"):
        (folder / name).mkdir(parents=True)
    for name in ("benchmarks", "demo", "tests", "tpu_launch", "setup.cfg"):
        (folder / name).symlink_to(ROOT / name)
    for name in PAIRS:
        write_lines(folder / name, make_pairs(24))
    write_lines(folder / "rankings.jsonl", [RANKING] * 9)
    write_lines(folder / "votes.jsonl", make_pairs(24, probability=lambda i: i / 24))
    write_lines(folder / "core.jsonl", CORE)
    write_lines(folder / "local.jsonl", RM_BENCH)
    make_tokenizer(folder / "tokenizer.model")
    (folder / "demo_run" / "tokenizer.model").symlink_to(folder / "tokenizer.model")
    for name in ("config.json", "demo_run/model.json"):
        (folder / name).write_text(json.dumps(TINY_MODEL))
    (folder / "my.toml").write_text(
        "[optimizer]\nlr = 1e-3\n[model]\ninit_from = 'BASE'\n[data]\ntrain = 'pairs.jsonl'\n"
    )
    write_stream(folder / "easylm" / "streaming_params_1903", make_arrays(tiny_llama()))
    train = "python -m easyrm.train_rm --model.config=config.json --tokenizer=tokenizer.model --data.train=pairs.jsonl"
    train += " --data.batch_size=4 --data.max_length=320 --total_steps=2 --output_dir=RUN_DIR --export=true"
    status, said = run_python(shlex.split(train), folder, {})
    assert status == 0, said
    for name in MODELS:
        (folder / name).symlink_to(folder / "RUN_DIR" / "export")


def run_python(
    argv: list[str], folder: Path, environment: dict[str, str], stop: str = "", wait: bool = True
) -> tuple[int | multiprocessing.Process, str]:
    """(exit status, what was printed) of `python ...`; (the running process, "") where it is not waited for.

    `stop` names a function, as in package.module.function or module:Class.method, at which a program ends well.
    """
    log = folder / ".said"
    log.write_text("")
    process = _SERVER.Process(target=_child, args=(argv[1:], folder, environment, stop, log), daemon=not wait)
    process.start()
    if not wait:
        return process, ""
    process.join(120)
    if process.is_alive():
        process.kill()
        process.join()
        return 124, f"{log.read_text()}\nno end after 120 s"
    return process.exitcode, log.read_text()


def _child(argv: list[str], folder: Path, environment: dict[str, str], stop: str, log: Path) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update({"XLA_FLAGS": "", **environment})
    _answer_from(folder)
    if "JAX_NUM_CPU_DEVICES" in environment:  # read when JAX was imported
        import jax

        jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))
    module = argv[1] if argv[0] == "-m" else ""
    sys.argv = argv[1:] if module else argv
    sys.path.insert(0, str(folder) if module else str(folder / Path(argv[0]).parent))
    if stop:
        sys.modules["trl"] = types.SimpleNamespace(RewardConfig=None, RewardTrainer=None)  # it is not called
        _stop_at(stop)
    if argv[0] == "-c":
        exec(compile(argv[1], "<documents>", "exec"), {"__name__": "__main__"})
    elif module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def _answer_from(folder: Path) -> None:
    import datasets
    import fsspec
    import huggingface_hub

    def load_dataset(name, *_, **__):
        return datasets.Dataset.from_list(HUB[name])

    def snapshot_download(*_, dry_run=False, **__):
        return [] if dry_run else str(folder / "HF_DIR")

    fsspec.register_implementation("hf", "fsspec.implementations.memory.MemoryFileSystem", clobber=True)
    datasets.load_dataset = load_dataset
    huggingface_hub.snapshot_download = snapshot_download
    huggingface_hub.hf_hub_download = lambda _, name, **__: str(folder / "HF_DIR" / name)


def _stop_at(name: str) -> None:
    place, _, function = name.rpartition(".")
    module, _, inner = place.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    before = getattr(holder, function)

    def stopped(*args, **kwargs):
        if function == "parse_args":  # else a wrong flag would not be seen
            before(*args, **kwargs)
        sys.exit(0)

    setattr(holder, function, stopped)
