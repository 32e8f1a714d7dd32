"""From the command line to a RunConfig."""

import dataclasses
import difflib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from easyrm.config import RunConfig, apply_recipe, read_recipe
from easyrm.distributed import report, together
from easyrm.errors import TOLD, InputError
from easyrm.redact import redact

_DEFINE = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
}


def define_run_flags(values: flags.FlagValues = flags.FLAGS, argv: Sequence[str] | None = None) -> None:
    """Register a flag for each field of RunConfig; nested groups are dotted, as in --data.train.

    `argv` is what `values` will parse, sys.argv where it is None. Raises InputError for an unknown field of a group.
    """
    _check_group_flags(sys.argv if argv is None else argv)
    defaults = RunConfig()
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        if dataclasses.is_dataclass(value):
            config_flags.DEFINE_config_dataclass(
                field.name, value, f"--{field.name}.NAME: {type(value).__doc__}", flag_values=values, sys_argv=argv
            )
        else:
            _DEFINE[type(value)](field.name, value, _about(field.name), flag_values=values)


def _about(name: str) -> str:
    """What RunConfig's docstring says of a flag."""
    sentences = re.split(r"(?<=\.) (?=`)", " ".join(RunConfig.__doc__.split()))
    return next(sentence for sentence in sentences if f"`{name}`" in sentence)


def run_config(values: flags.FlagValues = flags.FLAGS) -> RunConfig:
    """The configuration that was asked for: defaults, then the recipe, then the flags given beside it."""
    config = RunConfig()
    if values.recipe:
        apply_recipe(config, read_recipe(values.recipe), values.recipe)
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if dataclasses.is_dataclass(group):
            for name, value in config_flags.get_override_values(values[field.name]).items():
                setattr(group, name, value)
        elif values[field.name].present:
            setattr(config, field.name, values[field.name].value)
    return config


def run_command(
    main: Callable[[], None], define: Callable[[], None] = lambda: None, positional: str | None = None
) -> None:
    """Parse sys.argv and call `main`; bad input is one line on stderr and exit status 2, never a traceback.

    Where one of several processes fails, all of them end (see `together`). `define` registers flags that
    have to look at the command line for that. `positional` names the flag that a single bare argument may stand for.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            define()
            flags.FLAGS.set_gnu_getopt(positional is not None)  # else parsing ends at the first bare argument
            rest = flags.FLAGS(list(argv))
        except flags.Error as error:
            _refuse(f"{error}; --helpfull lists the flags")
        except InputError as error:
            _refuse(str(error))
        if positional and len(rest) == 2 and not flags.FLAGS[positional].present:
            flags.FLAGS[positional].value = rest.pop()
        if rest[1:]:
            _refuse(f"unexpected argument {rest[1]!r}: flags are written --name=value")
        return rest

    def call(_):
        logging.set_verbosity(logging.WARNING)
        try:
            with together():
                main()
            for number in (signal.SIGINT, signal.SIGTERM):  # all is done: too late to stop anything
                signal.signal(number, signal.SIG_IGN)
        except (*TOLD, KeyboardInterrupt) as error:
            _exit(report(error), at_once=isinstance(error, KeyboardInterrupt) or getattr(error, "at_once", False))

    app.run(call, flags_parser=parse)


def _check_group_flags(argv: Sequence[str]) -> None:
    # config_flags answers an unknown field of a group with a KeyError and a traceback.
    groups = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=", 1)[0]
        group, _, field = name.partition(".")
        if argument.startswith("-") and dataclasses.is_dataclass(groups.get(group)):
            known = [known.name for known in dataclasses.fields(groups[group])]
            if not field:
                raise InputError(f"--{group} is a group of flags: {', '.join(f'--{group}.{name}' for name in known)}")
            if field not in known:
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"did you mean --{group}.{close[0]}?" if close else f"--{group} has {', '.join(known)}"
                raise InputError(f"unknown flag --{name}: {hint}")


def _refuse(message: str) -> None:
    print(redact(f"easyrm: {message}"), file=sys.stderr)
    sys.exit(2)


def _exit(status: int, *, at_once: bool) -> None:
    # Python would wait for a program that is still being compiled, and XLA may crash where it was interrupted.
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
