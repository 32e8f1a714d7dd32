"""Train a reward model: `python -m easyrm.train_rm --model.init_from=... --data.train=... --output_dir=...`."""

import functools
import sys

import jax

from easyrm import run
from easyrm.config import RunConfig
from easyrm.data.stream import ahead
from easyrm.data.tokenizer import load_tokenizer
from easyrm.distributed import start_distributed
from easyrm.export import export_run
from easyrm.flags import define_run_flags, run_command, run_config
from easyrm.hf.source import ModelSource
from easyrm.planning.search import idle_devices
from easyrm.planning.workload import demand_of_inputs
from easyrm.sharding import check_heads, make_mesh, row_groups
from easyrm.training.checkpoint import Checkpoints
from easyrm.training.evaluation import evaluate
from easyrm.training.inputs import Inputs
from easyrm.training.interrupt import Interrupt
from easyrm.training.metrics import open_metrics
from easyrm.training.optimizer import learning_rate_schedule
from easyrm.training.profile import Profile
from easyrm.training.program import Program
from easyrm.training.report import StepReport

AHEAD = 4  # batches packed before the devices ask for them


def train(config: RunConfig) -> None:
    """One whole run, from flags to checkpoints and, where asked for, a Hugging Face directory.

    Raises InputError for what no run can be made of, before anything is compiled; NonFiniteLoss where training
    diverged; SystemExit with 128 + signal after Ctrl-C or SIGTERM, when the state is saved.
    """
    config.validate()
    start_distributed(config.distributed)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
    directory = run.check_output_dir(config)
    mesh = make_mesh(config.mesh_dim)
    source = ModelSource(config.model.init_from, config.model.config)
    check_heads(mesh, source.config.num_attention_heads, source.config.num_key_value_heads)
    tokenizer = load_tokenizer(config.tokenizer or config.model.init_from, config.data.pad_token)
    say(f"pad token {tokenizer.pad} (id {tokenizer.pad_id}): {tokenizer.pad_reason}")
    inputs = Inputs(config, tokenizer, source.config, row_groups=row_groups(mesh), say=say)
    if note := idle_devices(config, source.config, mesh, demand_of_inputs(config, inputs)):
        say(f"note: {note}")

    program = Program(config, source.config, mesh, inputs.steps)
    record = run.describe(config, source, tokenizer, mesh, inputs)
    run.open_run(directory, record, tokenizer, inputs.train.store.examples)
    program.compile(inputs.train, say)

    # Where the state comes from: 1. the newest complete checkpoint; 2. --model.init_from; 3. random weights.
    checkpoints = Checkpoints(directory / "checkpoints", config.keep_checkpoints)
    done, position = checkpoints.latest() or 0, 0
    if done:
        state, position = checkpoints.restore(done, program.abstract)
        say(f"resumed after step {done} of {inputs.steps}, {position} pairs into the data")
    elif source.path is not None:
        model = source.load(program.abstract.model, score_std=config.model.score_std, seed=config.seed)
        state = program.state_of(model)
    else:
        state = program.random_state()

    step = done
    with checkpoints, Interrupt() as interrupt, open_metrics(config, directory, record, first=done + 1) as log:
        report = StepReport(
            log.write,
            log_freq=config.log_freq,
            schedule=learning_rate_schedule(config.optimizer, inputs.steps),
            llama=source.config,
            pairs=inputs.train.store,
            last_checkpoint=checkpoints.latest,
        )
        profile = Profile(config.profile_steps, directory)
        batches = ahead(inputs.train(inputs.order(position)), AHEAD)
        for step, (indices, batch) in enumerate(batches, done + 1):
            profile.before(step)
            state, metrics = program.train_step(state, batch)
            profile.after(step, metrics)
            report.add(step, metrics, indices, batch)
            position += len(indices)
            last, stop = step == inputs.steps, interrupt.requested(step)
            if inputs.eval and (last or _due(step, config.eval_freq)):
                report.flush()
                scored = inputs.eval(inputs.eval_order())
                rewards_of = functools.partial(program.rewards, state.model)
                log.write({"step": step, **evaluate(rewards_of, scored, config.loss)})
                report.restart_clock()
            if last or stop or _due(step, config.save_freq):
                report.flush()  # a state that came of a non-finite loss is never saved
                checkpoints.save(step, state, position, record)
            if stop:
                break
        batches.close()
    if step < inputs.steps:
        say(
            f"stopped by {interrupt.signal.name}: saved after step {step} of {inputs.steps} in {directory}; "
            "run the same command again to resume"
        )
        sys.exit(128 + interrupt.signal)
    say(f"trained {inputs.steps} steps; checkpoint in {directory / 'checkpoints'}")
    if config.export and (directory / "export" / "config.json").exists():
        say(f"{directory / 'export'} is there already and stays as it is")
    elif config.export:
        export_run(state.model, directory, directory / "export", dtype=config.export_dtype, say=say)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main() -> None:
    """Flags in, one run out."""
    run_command(lambda: train(run_config()), define_run_flags)


if __name__ == "__main__":
    main()
