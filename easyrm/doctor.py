"""Is this machine, or every host of this pod, fit to train? `python -m easyrm.doctor [flags of train_rm]`."""

import importlib.metadata
import sys

_SHOWN = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")


def main() -> None:
    """Examine this host, with all others that run the same; exit status 0 where all is healthy, else 2."""
    try:
        from easyrm.health.command import run
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:  # of packages that do not fit together
        versions = ", ".join(f"{name} {_version(name)}" for name in _SHOWN)
        print(
            f"easyrm: nothing can be examined, for a package does not load ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); installed are {versions}; "
            "pip install --constraint constraints.txt --editable .",
            file=sys.stderr,
        )
        sys.exit(2)
    run()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
