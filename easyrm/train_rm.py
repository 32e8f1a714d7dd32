"""Train a reward model: `python -m easyrm.train_rm --model.init_from=... --data.train=... --output_dir=...`."""

import dataclasses
import functools
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from safetensors import SafetensorError

from easyrm import run
from easyrm.agreement import agree, code_version
from easyrm.config import RunConfig
from easyrm.data.stream import prefetch
from easyrm.data.tokenizer import load_tokenizer
from easyrm.distributed import say, start_distributed
from easyrm.errors import TOLD, InputError, NonFiniteLoss, Resumable, SaveFailed
from easyrm.evaluation_files import HELD_OUT
from easyrm.evaluator import Evaluator
from easyrm.export import export_run
from easyrm.file_digests import recorded_parameters
from easyrm.flags import define_run_flags, run_command, run_config
from easyrm.hf.export import digests_as_imported
from easyrm.hf.source import ModelSource
from easyrm.planning.search import idle_devices
from easyrm.planning.workload import demand_of_inputs
from easyrm.sharding import check_heads, make_mesh, row_groups
from easyrm.suites.registry import parse_suites
from easyrm.training.checkpoint import Checkpoints
from easyrm.training.inputs import Inputs
from easyrm.training.interrupt import Interrupt
from easyrm.training.metrics import MetricsLog, QuietLog, check_sinks, open_metrics
from easyrm.training.nonfinite import NonFinite
from easyrm.training.optimizer import learning_rate_schedule
from easyrm.training.profile import Profile, parse_profile_steps
from easyrm.training.program import Program
from easyrm.training.progress import START, Progress
from easyrm.training.report import StepReport
from easyrm.training.retention import Retention
from easyrm.training.save_clock import SaveClock
from easyrm.training.step import TrainState

_AGAIN = "free space, or mend the bucket, and run the same command again"
PREFETCH = 4  # batches packed before the devices ask for them


def train(config: RunConfig) -> None:
    """One whole run, from flags to checkpoints and, where asked for, a Hugging Face directory.

    Raises InputError for what no run can be made of, before anything is compiled; NonFiniteLoss where training
    diverged; SaveFailed where a state could not be saved that had to be; Resumable after Ctrl-C or SIGTERM.
    """
    config.validate()
    with Interrupt() as interrupt:
        with interrupt.nothing_unsaved("before it started"):
            start_distributed(config.distributed, config.distributed_timeout)
            interrupt.met()
        with interrupt.nothing_unsaved("before its first step"):
            job = prepare(config)
        with job.checkpoints, job.open_metrics() as log:
            progress = take_steps(job, log, interrupt)
        finish(job, progress, interrupt)


@dataclasses.dataclass
class Job:
    """A run that is ready for its next step: what was read, what was compiled, and the state after `start`."""

    config: RunConfig
    directory: epath.Path
    source: ModelSource
    inputs: Inputs
    evaluator: Evaluator
    program: Program
    record: dict[str, Any]
    checkpoints: Checkpoints
    state: TrainState
    start: Progress

    def open_metrics(self) -> MetricsLog | QuietLog:
        """metrics.jsonl as it was at `start`, to be written on."""
        return open_metrics(self.config, self.directory, self.record, self.start)


def prepare(config: RunConfig) -> Job:
    """All that comes before the first step, the cheap before the expensive."""
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    agree({"code": code_version(), **config.to_dict()}, "settings")
    check_sinks(config)
    directory = run.check_output_dir(config, say)
    mesh = make_mesh(config.mesh_dim)
    source = ModelSource(config.model.init_from, config.model.config)
    check_heads(mesh, source.config.num_attention_heads, source.config.num_key_value_heads)
    tokenizer = load_tokenizer(config.tokenizer or config.model.init_from, config.data.pad_token)
    say(f"pad token {tokenizer.pad} (id {tokenizer.pad_id}): {tokenizer.pad_reason}")
    parse_suites(config.eval.suites, taken=(HELD_OUT,))  # a wrong name is told before all data are read
    retention = Retention(
        config.keep_checkpoints, best=config.keep_best, metric=config.best_metric, every=config.keep_every
    )
    checkpoints = Checkpoints(directory / "checkpoints", retention, strict=config.strict_saves, say=say)
    inputs = Inputs(
        config, tokenizer, source.config, row_groups=row_groups(mesh), say=say, start=checkpoints.newest() or START
    )
    if (steps := parse_profile_steps(config.profile_steps)) and steps[0] > inputs.steps:
        raise InputError(f"--profile_steps={config.profile_steps}: the run has {inputs.steps} steps")
    evaluator = Evaluator(
        config,
        directory,
        inputs,
        tokenizer,
        vocab_size=source.config.vocab_size,
        row_groups=row_groups(mesh),
        say=say,
    )
    agree(inputs.fingerprints() | evaluator.fingerprints(), "data")
    if note := idle_devices(config, source.config, mesh, demand_of_inputs(config, inputs)):
        say(f"note: {note}")

    program = Program(config, source.config, mesh, inputs.steps)
    record = run.describe(config, source, tokenizer, mesh, inputs)
    run.open_run(directory, record, tokenizer, inputs.train.store.examples, config, say)
    agree({"remat": program.compile(inputs.train, say)}, "compiled programs")

    # Where the state comes from: 1. the newest whole checkpoint; 2. --model.init_from; 3. random weights.
    start = START
    if restored := checkpoints.restore(program.abstract):
        state, start = restored[0], restored[1].told_by(config.best_metric)
        say(f"resumed after step {start.step} of {inputs.steps}, {start.position} pairs into the data")
    elif source.path is not None:
        model = source.load(program.abstract.model, score_std=config.model.score_std, seed=config.seed)
        state = program.state_of(model)
    else:
        state = program.random_state()
    return Job(config, directory, source, inputs, evaluator, program, record, checkpoints, state, start)


def take_steps(job: Job, log: MetricsLog | QuietLog, interrupt: Interrupt) -> Progress:
    """Train to the last step or to a stop, save there, and say where that is; `job.state` is the state then.

    Evaluation comes before a save, so that a checkpoint knows its figures. A stop cuts an evaluation short: the
    checkpoint says that it is pending, and the resumed run begins with it.
    """
    config, inputs, program, checkpoints = job.config, job.inputs, job.program, job.checkpoints
    nonfinite = NonFinite(job.directory, skip=config.on_nonfinite == "skip", most=config.max_nonfinite)
    report = StepReport(
        log.write,
        log_freq=config.log_freq,
        schedule=learning_rate_schedule(config.optimizer, inputs.steps),
        llama=job.source.config,
        pairs=inputs.train.store,
        nonfinite=nonfinite,
    )

    def evaluated(progress: Progress) -> Progress:
        report.flush()
        rewards_of = functools.partial(program.rewards, job.state.model)
        figures = job.evaluator(rewards_of, progress.step, interrupt.requested)
        report.restart_clock()
        if figures is None:
            return dataclasses.replace(progress, pending_eval=True)
        log.write({"step": progress.step, **figures})
        return progress.evaluated(figures, config.best_metric)

    def save(progress: Progress) -> None:
        report.flush()  # a state that came of a non-finite loss is never saved
        checkpoints.save(job.state, progress, job.record)
        clock.saved(progress.step)

    clock = SaveClock(config.save_freq, config.save_minutes, job.start.step)
    profile = Profile(config.profile_steps, job.directory)
    batches = prefetch(inputs.train(inputs.order(job.start)), PREFETCH)
    try:
        progress = job.start
        if progress.pending_eval:
            asked = bool(job.evaluator)
            progress = evaluated(progress) if asked else dataclasses.replace(progress, pending_eval=False)
            if not progress.pending_eval:
                checkpoints.evaluated(progress)
        for step, (indices, batch) in enumerate(batches, job.start.step + 1):
            if interrupt.requested() or learned_enough(config, progress):
                break
            profile.before(step)
            job.state, metrics = program.train_step(job.state, batch)
            profile.after(step, metrics)
            report.add(step, metrics, indices, batch)
            progress = progress.after(step, config.data.batch_size)
            checkpoints.check()
            if job.evaluator and (step == inputs.steps or _due(step, config.eval_freq)):
                progress = evaluated(progress)
            if clock.due(step) or (config.keep_best and progress.metrics):
                save(progress)
        if progress.step > job.start.step:
            save(progress)
    except NonFiniteLoss as error:
        if error.before and error.step > job.start.step + 1:
            checkpoints.save(job.state, progress.after(error.step - 1, config.data.batch_size), job.record)
        checkpoints.settle()
        newest = checkpoints.newest()
        raise NonFiniteLoss(f"{error}; {_last_good(newest)}", error.step, before=error.before) from error
    finally:
        profile.close()
        batches.close()
    if nonfinite.skipped:
        say(f"{nonfinite.skipped} updates were skipped; their pairs, in nonfinite.jsonl, count as trained on below")
    return progress


def finish(job: Job, progress: Progress, interrupt: Interrupt) -> None:
    """Account for the run, and export. Raises Resumable where it was stopped, SaveFailed where its end is not saved."""
    steps, directory = job.inputs.steps, job.directory
    newest = job.checkpoints.newest() or START
    saved = f"saved after step {newest.step} of {steps} in {directory}" if newest.step else "nothing is saved"
    if newest.step < progress.step:
        saved += f"; step {progress.step} is not, see the warnings above"
    if progress.pending_eval or (progress.step < steps and not learned_enough(job.config, progress)):
        raise Resumable(f"stopped by {interrupt.signal.name}: {saved}; run the same command again to resume")
    if progress.step < steps:
        metric, patience = job.config.best_metric, job.config.eval.patience
        say(f"no better {metric} in {patience} evaluations (--eval.patience): the run ends early")
    say(f"trained {progress.step} steps; {saved}")
    if progress.best is not None:
        say(f"the best {job.config.best_metric} is {progress.best:.4g}, of step {progress.best_step}")
    say(job.inputs.account(progress.position))
    export = directory / "export"
    if job.config.export and (export / "config.json").exists():
        same = recorded_parameters(export) == digests_as_imported(job.state.model, job.config.export_dtype)
        say(
            f"{export} is there already and stays as it is"
            + ("" if same else f": not step {progress.step} in {job.config.export_dtype}; remove it for that")
        )
    elif job.config.export:
        _remove_unfinished(export)
        try:
            with interrupt.nothing_unsaved(f"during the export: {saved}"):
                dtype = job.config.export_dtype
                export_run(job.state.model, directory, export, step=progress.step, dtype=dtype, say=say)
        except TOLD:
            raise
        except Exception as error:
            if not isinstance(error, OSError | SafetensorError) and "://" not in str(export):
                raise
            raise SaveFailed(f"the export to {export} failed ({error}); {saved}; {_AGAIN}") from error
    if newest.step < progress.step:
        raise SaveFailed(f"the run is trained, but {saved}; {_AGAIN}")


def learned_enough(config: RunConfig, progress: Progress) -> bool:
    """Whether as many evaluations as --eval.patience says have brought nothing better."""
    return 0 < config.eval.patience <= progress.stale and not progress.pending_eval


def _remove_unfinished(export: epath.Path) -> None:
    # An object store cannot rename: there, a killed export leaves a directory without a config.json.
    if "://" in str(export):
        if jax.process_index() == 0:
            export.rmtree(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("easyrm: unfinished export removed")


def _last_good(newest: Progress | None) -> str:
    return f"the last good checkpoint is {newest.step}" if newest else "no checkpoint precedes it"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main() -> None:
    """Flags in, one run out."""
    run_command(lambda: train(run_config()), define_run_flags)


if __name__ == "__main__":
    main()
