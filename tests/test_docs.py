"""The documents say what is so: flags, messages, links, recipes, reasons and packages that they name are there."""

import ast
import dataclasses
import importlib.util
import re

import pytest
from documents import PAGES, ROOT, anchors, blocks, links, name_of, prose, table_rows

from easyrm.config import RECIPES, RunConfig
from easyrm.data.pairs import REASONS
from easyrm.files import flatten
from easyrm.flags import _about

DOCS = ROOT / "docs"
SOURCES = sorted([*(ROOT / "easyrm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "demo").glob("*.py")])
COMMANDS = sorted(f"easyrm.{path.stem}" for path in (ROOT / "easyrm").glob("*.py") if "__main__" in path.read_text())
# The fields of TRL 1.16's RewardConfig that are its own, then those that all of TRL's configurations have anew.
REWARD_CONFIG = [
    "learning_rate",
    "model_init_kwargs",
    "trust_remote_code",
    "chat_template_path",
    "disable_dropout",
    "dataset_num_proc",
    "eos_token",
    "max_length",
    "pad_to_multiple_of",
    "center_rewards_coefficient",
    "activation_offloading",
    "pad_token",
    "logging_steps",
    "gradient_checkpointing",
    "bf16",
    "lr_scheduler_kwargs",
    "use_liger_kernel",
    "torch_empty_cache_steps",
]
# Flags in the text that are other programs' (absl, gcloud, kubectl, docker, SkyPilot) or stand for any. Whole commands
# of such programs, in blocks or between backquotes, are left out.
FOREIGN = {
    "help",
    "helpfull",
    "name",
    "machine-type",
    "tpu-topology",
    "service-account",
    "spot",
    "server-side",
    "build-arg",
    "env",
    "secret",
}
TOOLS = r"(?:gcloud|sky|kubectl|docker|xpk|hf|git|pip|curl|queued-resources)"
_FLAG = re.compile(r"(?<![\w-])--([A-Za-z_][\w.-]*\w)")


def known_flags() -> set[str]:
    """The names of all flags of all commands, as they are registered."""
    found = set(flatten(RunConfig().to_dict())) | FOREIGN
    for path in SOURCES:
        text = path.read_text()
        found |= set(re.findall(r"DEFINE_\w+\(\s*\"([\w.]+)\"", text))
        found |= set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", text))
    for path in (ROOT / "tpu_launch").glob("*.sh"):
        found |= set(_FLAG.findall(path.read_text()))
    return found


def test_every_flag_is_described_where_help_points():
    """absl shows the docstring of a group, and its sentence in RunConfig's for the rest."""
    own, groups = [], []
    for field in dataclasses.fields(RunConfig):
        (groups if dataclasses.is_dataclass(field.type) else own).append(field)
    fields = [(RunConfig, field.name) for field in own]
    fields += [(group.type, field.name) for group in groups for field in dataclasses.fields(group.type)]
    assert not [f"{owner.__name__}.{name}" for owner, name in fields if f"`{name}`" not in owner.__doc__]
    assert _about("dtype") == "`dtype`: bf16 or fp32, in which is computed; parameters are fp32."
    assert all(len(_about(field.name)) < 260 for field in own)


def messages() -> list[re.Pattern]:
    """A pattern for each string of the package that holds some words, with anything where a value is filled in."""
    found = []
    for path in (ROOT / "easyrm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if not all(isinstance(getattr(part, "value", None), str | ast.expr) for part in parts):
                continue
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if len(re.findall(r"[A-Za-z]", " ".join(filter(None, texts)))) >= 12:
                pattern = "".join(".*" if text is None else re.escape(text) for text in texts)
                found.append(re.compile(pattern, re.DOTALL))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page):
    text = page.read_text()
    if page.name in ("from-easylm.md", "from-trl.md"):  # their left columns are of another program
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    text = re.sub(r"^```sh\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(rf"^ *{TOOLS} .*$|`{TOOLS} [^`]*`", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    known = known_flags()
    groups = {name.partition(".")[0] for name in known if "." in name}  # --data.* and --keep_ name several
    unknown = {flag for flag in _FLAG.findall(text) if flag not in known | groups}
    assert not [flag for flag in unknown if not any(name.startswith(f"{flag}_") for name in known)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_in_bash_blocks(page):
    # Only there are they run by test_docs_commands.py.
    # A line with [brackets] says what a command takes.
    typed = re.compile(r"^(?: {4,}|\t)(?:\w+=\S+ )*(?:python|pip|make|curl|gcloud|sky|kubectl)\b[^[\n]*$", re.MULTILINE)
    if page.parent.name == "tpu_launch":  # test_manifest_commands.py types its sh blocks
        return
    assert not [match[0] for match in typed.finditer(prose(page))]
    assert {block.language for block in blocks(page)} <= {"bash", "python", "text", "json"}


def test_every_message_in_troubleshooting_is_printed_by_the_code():
    quoted = blocks(DOCS / "troubleshooting.md", "text")
    assert len(quoted) >= 25
    known = messages()
    for block in quoted:
        text = block.text.strip()
        assert "\n" not in text, f"line {block.line}: a message is one line"
        assert any(pattern.fullmatch(text) for pattern in known), f"line {block.line}: no code prints {text!r}"


def test_a_message_that_no_code_prints_is_found():
    known = messages()
    assert not any(pattern.fullmatch("--output_dir is missing: name a directory") for pattern in known)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_has_a_section_with_its_plan(recipe):
    section = prose(DOCS / "recipes.md").split(f"\n## {recipe}\n")[1].split("\n## ")[0]
    head = " ".join(re.findall(r"^# (.*)$", (RECIPES / f"{recipe}.toml").read_text(), re.MULTILINE))
    planned = re.search(r"on (\S+): peak (\S+) of (\S+) GiB a chip at mesh ([\d,]+\d)", head)
    facts = [f"{planned[1]}, mesh {planned[4]}", f"{planned[2]} of {planned[3]} GiB a chip"]
    facts += re.findall(r"\d+ steps of at least \S+ s|\S+ chip-hours", head)
    assert len(facts) == 4 and [fact for fact in facts if fact not in section] == []


def test_every_command_exists_and_is_told_of():
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"python -m (easyrm\.\w+|benchmarks\.\w+|demo\.\w+)", text))
    assert all(importlib.util.find_spec(name) for name in named)
    assert set(COMMANDS) <= named


@pytest.mark.parametrize("field", REWARD_CONFIG)
def test_every_field_of_rewardconfig_is_told_of(field):
    rows = table_rows(DOCS / "from-trl.md", "Fields of RewardConfig")
    told = [row for row in rows if re.match(rf"`{field}`", row[0])]
    assert len(told) == 1 and told[0][1]


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_to_drop_a_record_is_told_of(reason):
    assert [row for row in table_rows(DOCS / "data.md", "What is dropped, and counted") if row[0] == f"`{reason}`"]


def test_every_package_is_in_the_tree():
    packages = [path.parent.relative_to(ROOT) for path in (ROOT / "easyrm").glob("*/__init__.py")]
    tree = blocks(DOCS / "design.md", "text")[0].text
    named = {line.split()[0] for line in tree.splitlines()}
    assert named == {f"{path.as_posix()}/" for path in [*packages, packages[0].parent, RECIPES.relative_to(ROOT)]}


def test_the_first_page_leads_to_every_page():
    told = {(DOCS / link).resolve() for link in links(DOCS / "index.md")}
    assert set(PAGES) - {DOCS / "index.md"} <= told
