"""What a reward model is worth: `python -m easyrm.evaluate --model=... --data=rewardbench,heldout.jsonl`."""

import jax
from absl import flags
from etils import epath

from easyrm import run
from easyrm.distributed import say, start_distributed
from easyrm.errors import InputError, writing
from easyrm.evaluation_files import HELD_OUT, evaluations_of, write_evaluation
from easyrm.flags import run_command
from easyrm.scoring.evaluation import Evaluation, judge, read_questions
from easyrm.scoring.scorer import BATCH_TOKENS, find_model
from easyrm.suites.registry import parse_suites

_MODEL = flags.DEFINE_string("model", "", "a Hugging Face directory or hub name, or RUN_DIR[/checkpoints/STEP]")
_DATA = flags.DEFINE_string(
    "data", "", "what to evaluate on: files of pairs, rewardbench, rewardbench2, rm-bench (from the hub) or SUITE:FILE"
)
_OUTPUT = flags.DEFINE_string(
    "output", "", "the directory for figures and scores; by default a run's own, and none for an export"
)
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the matmuls")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp, as in train_rm")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "true", "false"], "as in train_rm")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", BATCH_TOKENS, "tokens computed at once", lower_bound=128)
_MAX_LENGTH = flags.DEFINE_integer("max_length", 0, "tokens a conversation; 0: as the model was trained", lower_bound=0)


def evaluate() -> None:
    """Print the figures of each suite and file of pairs, and keep them with all scores where there is an --output.

    A tie is wrong, and counted. Raises InputError for what is not there, before anything is compiled.
    """
    if not _MODEL.value or not _DATA.value:
        raise InputError("--model=HF_DIR or RUN_DIR and --data=FILE or a suite's name are both needed")
    requests = parse_suites(_DATA.value, taken=(HELD_OUT,))
    start_distributed(_DISTRIBUTED.value)
    model = find_model(_MODEL.value)
    max_length = _MAX_LENGTH.value or model.max_length
    asked = [read_questions(request, model.tokenizer, max_length, model.llama.vocab_size, say) for request in requests]
    scorer = model.open(
        mesh_dim=_MESH_DIM.value, dtype=_DTYPE.value, batch_tokens=_BATCH_TOKENS.value, max_length=max_length
    )
    output = epath.Path(_OUTPUT.value) if _OUTPUT.value else None
    if output is None and scorer.step is not None:
        output = evaluations_of(run.split_checkpoint(_MODEL.value)[0], scorer.step)
    if output is not None:
        with writing(f"--output={output}"):  # before anything is computed
            output.mkdir(parents=True, exist_ok=True)
    for questions in asked:
        found = judge(questions, scorer, _DTYPE.value)
        say("\n" + table(found))
        if output is not None and jax.process_index() == 0:
            with writing(f"--output={output}"):
                write_evaluation(output, *found)
    if output is not None:
        say(f"\nkept in {output}")


def table(found: Evaluation) -> str:
    """The figures, then the subsets with their 95 % intervals, in per cent; margins are differences of rewards."""
    report = found.report
    lines = [f"{report['name']}: {report['scored']} of {report['read']} records of {report['source']}"]
    lines += [f"  {name:<27}{_text(name, value):>10}" for name, value in report["figures"].items()]
    if report["subsets"]:
        lines.append(f"  {'subset':<27}{'accuracy':>10}   {'95 % interval':<16}{'of':>6}{'ties':>6}{'margin':>10}")
    for name, about in report["subsets"].items():
        low, high = about["interval"]
        lines.append(
            f"  {name:<27}{about['accuracy']:>10.1%}   {f'{low:.1%} to {high:.1%}':<16}{about['count']:>6}"
            f"{about['ties']:>6}{about['margin']:>+10.3f}"
        )
    tokens = ", ".join(f"{name} {report[name]}" for name in ("tokens_computed", "tokens_unique", "tokens"))
    return "\n".join([*lines, f"  {report['seconds']:.1f} s, {tokens}"])


def _text(name: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:+.3f}" if name == "margin" else f"{value:.1%}"


if __name__ == "__main__":
    run_command(evaluate)
