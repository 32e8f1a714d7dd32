"""One page on a run: `python -m easyrm.report RUN_DIR [--output=RUN_DIR/report]`."""

from absl import flags
from etils import epath

from easyrm.errors import InputError
from easyrm.flags import run_command
from easyrm.redact import redact
from easyrm.reporting.load import load_run

_RUN = flags.DEFINE_string("run", "", "RUN_DIR, local or gs://; may be given without --run=")
_OUTPUT = flags.DEFINE_string("output", "", "the directory for report.html and its figures; RUN_DIR/report by default")


def report() -> None:
    """Read the run, draw, and write report.html and one PNG for each figure.

    Raises InputError for what is no run, for an output that cannot be written, and where matplotlib is not installed.
    """
    if not _RUN.value:
        raise InputError("no run is named: python -m easyrm.report RUN_DIR")
    try:
        from easyrm.reporting.page import make_page
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise InputError("figures need matplotlib, which is not installed; pip install easyrm[report]") from error
    run = load_run(epath.Path(_RUN.value))
    output = epath.Path(_OUTPUT.value) if _OUTPUT.value else run.directory / "report"
    page, pictures = make_page(run)
    try:
        output.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (output / f"{picture.name}.png").write_bytes(picture.png)
        (output / "report.html").write_text(page)
    except OSError as error:
        raise InputError(f"--output={output} cannot be written ({error}); choose another directory") from error
    for note in run.notes:
        print(redact(f"note: {note}"))
    print(f"wrote {output / 'report.html'} and {len(pictures)} figures (PNG) beside it")


if __name__ == "__main__":
    run_command(report, positional="run")
