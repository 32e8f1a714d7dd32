"""Whether every host has the same software, and whether it is software that easyrm works with."""

import importlib.metadata
import platform
from collections import Counter

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from easyrm.agreement import code_version
from easyrm.health.finding import FAIL, OK, WARN, Finding, host_numbers

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes", "tensorstore", "etils"),
    *("fsspec", "gcsfs", "huggingface_hub", "datasets", "pyarrow", "safetensors", "sentencepiece", "tokenizers"),
)
_ABSENT = "absent"
INSTALL = "install on every host: git pull && pip install --constraint constraints.txt --editable ."


def here() -> dict[str, str]:
    """Versions on this host: easyrm's with a digest of its code, Python's, and those of PACKAGES."""
    own = {"easyrm": code_version(), "Python": platform.python_version()}
    return own | {name: _version(name) for name in PACKAGES}


def in_range(versions: dict[str, str]) -> Finding:
    """Whether what is installed is what the package's metadata (setup.cfg) asks for."""
    try:
        requirements = importlib.metadata.requires("easyrm") or []
        python = importlib.metadata.metadata("easyrm").get("Requires-Python") or ""
    except importlib.metadata.PackageNotFoundError:
        return Finding("versions", WARN, "easyrm is not installed, so ranges of versions are not known", INSTALL)
    wrong, interpreter = [], platform.python_version()
    if interpreter not in SpecifierSet(python):
        wrong.append(f"Python {interpreter} ({python})")
    for text in requirements:
        try:
            asked = Requirement(text)
        except InvalidRequirement:
            continue
        if asked.marker and not asked.marker.evaluate({"extra": ""}):
            continue
        found = _version(asked.name)
        if found == _ABSENT or not asked.specifier.contains(found, prereleases=True):
            wrong.append(f"{asked.name} {found} ({asked.specifier})")
    if wrong:
        return Finding("versions", FAIL, f"not what easyrm asks for: {', '.join(wrong)}", INSTALL)
    shown = ", ".join(f"{name} {versions[name]}" for name in ("easyrm", "Python", "jax", "jaxlib", "libtpu"))
    return Finding("versions", OK, f"{shown}; all in the ranges of setup.cfg")


def differences(everyone: dict[int, dict[str, str]], check: str, way_out: str) -> list[tuple[int, Finding]]:
    """(host, finding) for each fact that is not the same on all hosts: the finding is theirs who are fewer."""
    found = []
    for name in dict.fromkeys(name for facts in everyone.values() for name in facts):
        holders: dict[str, list[int]] = {}
        for host, facts in sorted(everyone.items()):
            holders.setdefault(facts.get(name, _ABSENT), []).append(host)
        if len(holders) == 1:
            continue
        most = Counter({value: len(hosts) for value, hosts in holders.items()}).most_common(1)[0][0]
        usual = f"{_shown(most)} on {_hosts(holders[most])}"
        for value, hosts in holders.items():
            if value != most:
                text = f"{name} is {_shown(value)} on {_hosts(hosts)}, but {usual}"
                found += [(host, Finding(check, FAIL, text, way_out)) for host in hosts]
    return found


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _ABSENT


def _hosts(hosts: list[int]) -> str:
    return f"host{'s' * (len(hosts) > 1)} {host_numbers(hosts)}"


def _shown(value: str) -> str:
    return value if len(value) <= 40 else f"{value[:37]}..."
