"""A checkpoint to a Hugging Face directory: `python -m easyrm.convert --checkpoint=RUN_DIR --output=HF_DIR`."""

from absl import flags
from etils import epath

from easyrm import run
from easyrm.distributed import say, start_distributed
from easyrm.errors import InputError, writing
from easyrm.export import export_run
from easyrm.flags import run_command
from easyrm.hf.directory import refuse_existing
from easyrm.models.config import LlamaConfig
from easyrm.sharding import make_mesh
from easyrm.training.program import abstract_model
from easyrm.training.saved_step import restore_model

_CHECKPOINT = flags.DEFINE_string("checkpoint", "", "RUN_DIR, or RUN_DIR/checkpoints/STEP; the newest step by default")
_OUTPUT = flags.DEFINE_string("output", "", "the Hugging Face directory to write; must not exist")
_DTYPE = flags.DEFINE_enum("dtype", "bf16", ["bf16", "fp32"], "of the written weights")
_MESH_DIM = flags.DEFINE_string("mesh_dim", "1,-1,1", "dp,fsdp,mp, as in train_rm")
_DISTRIBUTED = flags.DEFINE_enum("distributed", "auto", ["auto", "true", "false"], "as in train_rm")


def convert() -> None:
    """Restore one step's parameters, sharded, and export them. Raises InputError for what is not there."""
    if not _CHECKPOINT.value or not _OUTPUT.value:
        raise InputError("--checkpoint=RUN_DIR[/checkpoints/STEP] and --output=HF_DIR are both needed")
    directory, step = run.split_checkpoint(_CHECKPOINT.value)
    record = run.read_record(directory)
    refuse_existing(_OUTPUT.value)
    start_distributed(_DISTRIBUTED.value)
    model = abstract_model(LlamaConfig(**record["model"]), make_mesh(_MESH_DIM.value))
    params, step = restore_model(directory / "checkpoints", step, model)
    say(f"restored step {step} of {record['total_steps']} from {directory}")
    with writing(f"--output={_OUTPUT.value}"):
        export_run(params, directory, epath.Path(_OUTPUT.value), step=step, dtype=_DTYPE.value, say=say)


if __name__ == "__main__":
    run_command(convert)
