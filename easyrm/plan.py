"""Know before paying: `python -m easyrm.plan --recipe=llama3.1-tulu2-70b-uf --topology=v5p:2x4x4`."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# libtpu reads these when JAX loads it: ask no cloud for a TPU, mind no other process that uses it, look for no hosts.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable

import jax
from absl import flags

from easyrm.chips import TPUS
from easyrm.config import RunConfig
from easyrm.errors import InputError
from easyrm.flags import define_run_flags, run_command, run_config
from easyrm.models.config import LlamaConfig
from easyrm.planning.compiled import Plan, compile_plan
from easyrm.planning.model import model_shape
from easyrm.planning.report import as_dict, as_text, search_table
from easyrm.planning.search import all_slices, fewer_idle, rank, to_compile
from easyrm.planning.topology import Slice, check_libtpu, parse_topology
from easyrm.planning.workload import TYPICAL_PAIRS, Demand, demand_of_rows, read_demand, typical_demand, work_on
from easyrm.sharding import parse_mesh_dim

SHOWN = 10  # candidates that --search prints beside those that it compiles
TRIES = 3  # candidates that --search compiles for each one that it wants


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked beside the run's own flags; zeros mean "not given", see the flags below."""

    topology: str
    price: str
    rows: int
    row_length: int
    pair_tokens: int
    pairs: int
    best: int


def define_plan_flags() -> None:
    """Register the run's flags and those of the plan."""
    define_run_flags()
    flags.DEFINE_string("topology", "", "the slice, as v5p:2x4x4; with --search, a list of slices to look at")
    flags.DEFINE_string("price", "", "USD a chip-hour: one number, or one a generation as v5e=1.2,v5p=4.2")
    flags.DEFINE_bool("search", False, "look for the cheapest slice, mesh, micro-batches and remat that fit")
    flags.DEFINE_bool("json", False, "print one JSON object, with --search one a compiled plan, and nothing else")
    flags.DEFINE_integer("rows", 0, "rows a step, each one conversation of --row_length tokens: the worst case")
    flags.DEFINE_integer("row_length", 0, "tokens a row, with --rows (0: --data.max_length)")
    flags.DEFINE_integer("pair_tokens", 0, "unique tokens a pair, where no data is read (0: what is typical)")
    flags.DEFINE_integer("pairs", 0, f"pairs an epoch, where no data is read (0: {TYPICAL_PAIRS})")
    flags.DEFINE_integer("best", 3, "with --search: compile until so many plans fit")


def requested(config: RunConfig, values: flags.FlagValues) -> Request:
    """The plan's own flags. Raises InputError for values out of range, in the run's flags too."""
    request = Request(**{field.name: values[field.name].value for field in dataclasses.fields(Request)})
    for name in ("rows", "row_length", "pair_tokens", "pairs"):
        if getattr(request, name) < 0:
            raise InputError(f"--{name}={getattr(request, name)}: choose 1 or more, or 0 for the default")
    if request.best < 1:
        raise InputError(f"--best={request.best}: choose 1 or more")
    if request.row_length and not request.rows:
        raise InputError("--row_length needs --rows beside it; --data.row_length sets the length of packed rows")
    if config.model.config:
        config.model.init_from = ""
    if config.model.config or config.model.init_from:
        config.model.validate()
    config.validate_values()
    return request


def prices_of(price: str) -> dict[str, float]:
    """USD a chip-hour by generation, {} where none is given. Raises InputError for what is no price."""
    try:
        named = dict(part.split("=") for part in price.split(",")) if "=" in price else dict.fromkeys(TPUS, price)
        prices = {name: float(value) for name, value in named.items()} if price else {}
    except ValueError:
        prices = {"": 0}
    if set(prices) - set(TPUS) or not all(0 < value < float("inf") for value in prices.values()):
        raise InputError(f"--price={price}: expected USD a chip-hour, as 4.2 or v5e=1.2,v5p=4.2")
    return prices


def demand_of(config: RunConfig, llama: LlamaConfig, request: Request, groups: int) -> Demand:
    """What a step computes: forced rows, else the run's own pairs if its data and tokenizer are files, else typical."""
    pairs = request.pairs or TYPICAL_PAIRS
    if request.rows:
        return demand_of_rows(config, request.rows, request.row_length or config.data.max_length, pairs)
    if config.data.train and not config.data.train.startswith("hf://") and not request.pair_tokens:
        return read_demand(config, llama, groups, lambda line: print(line, file=sys.stderr))
    return typical_demand(config, request.pair_tokens, pairs)


def steps_of(config: RunConfig, demand: Demand) -> int:
    """Optimizer updates of the whole run."""
    return config.total_steps or max(1, int(config.num_epochs * demand.pairs / demand.batch_size))


def plan_one(config: RunConfig, llama: LlamaConfig, tpu: Slice, request: Request) -> tuple[Plan, str]:
    """The plan of the one slice and mesh that the flags name, and a mesh without idle devices where it has some."""
    dp, fsdp, _ = parse_mesh_dim(config.mesh_dim, tpu.chips)
    demand = demand_of(config, llama, request, dp * fsdp)
    work = work_on(demand, config, dp * fsdp, config.data.micro_batches)
    prices = prices_of(request.price)
    if prices and tpu.generation not in prices:
        raise InputError(f"--price={request.price}: it has no price of {tpu.generation}, which --topology names")
    price = prices.get(tpu.generation)
    plan = compile_plan(config, llama, tpu, demand, work, steps=steps_of(config, demand), price=price)
    return plan, fewer_idle(llama, tpu.chips, demand, config) if work.idle else ""


def plan_search(
    config: RunConfig, llama: LlamaConfig, slices: list[Slice], request: Request, say: Callable[[str], None]
) -> list[Plan]:
    """Rank every way to run the recipe by arithmetic, compile the best until `best` fit, and say so in a table."""
    prices = prices_of(request.price)
    slices = [tpu for tpu in slices if not prices or tpu.generation in prices]
    if not slices:
        raise InputError(f"--price={request.price}: it has no price of any slice that is looked at")
    # Row counts follow the mesh: real pairs are laid out for one group of devices, and filled up for more.
    demand = demand_of(config, llama, request, 1)
    if demand.fixed and not request.rows:
        demand = dataclasses.replace(demand, fixed=None)
    ranked, dropped = rank(config, llama, demand, slices, prices)
    steps = steps_of(config, demand)
    say(f"{len(ranked)} candidates, ranked by an estimate; {dropped} others cannot fit; compiling the best of them")
    plans = []
    for candidate in itertools.islice(to_compile(ranked), TRIES * request.best):
        if sum(plan.memory.fits for plan in plans) == request.best:
            break
        say(f"  compiling {candidate.slice.name} {candidate.mesh_dim} {candidate.remat}")
        chosen = dataclasses.replace(
            config, mesh_dim=candidate.mesh_dim, model=dataclasses.replace(config.model, remat=candidate.remat)
        )
        price = prices.get(candidate.slice.generation)
        plans.append(compile_plan(chosen, llama, candidate.slice, demand, candidate.work, steps=steps, price=price))
        say(f"    {'fits' if plans[-1].memory.fits else plans[-1].memory.refused} ({plans[-1].compile_seconds:.0f} s)")
    compiled = {(plan.slice.name, plan.remat, tuple(plan.mesh.values())) for plan in plans}
    rest = (found for found in to_compile(ranked) if (found.slice.name, found.remat, found.mesh) not in compiled)
    say(search_table(plans, itertools.islice(rest, SHOWN), steps, bool(prices)))
    return plans


def main() -> None:
    """Flags in, one table or JSON out."""

    def plan():
        values = flags.FLAGS
        config = run_config()
        request = requested(config, values)
        llama = model_shape(config.model)
        if not request.topology and not values.search:
            raise InputError("--topology is empty: name a slice, as --topology=v5p:2x4x4, or give --search")
        named = [parse_topology(name) for name in request.topology.split(",") if name]
        check_libtpu()
        # Programs for chips that are not there cannot be read back from the cache.
        jax.config.update("jax_enable_compilation_cache", False)
        if values.search:
            say = (lambda line: None) if values.json else lambda line: print(line, flush=True)
            found = plan_search(config, llama, named or all_slices(), request, say)
            if values.json:
                print("\n".join(json.dumps(as_dict(plan)) for plan in found))
            return
        found, better_mesh = plan_one(config, llama, parse_topology(request.topology), request)
        as_json = {**as_dict(found), "better_mesh": better_mesh or None}
        print(json.dumps(as_json) if values.json else as_text(found, better_mesh))

    run_command(plan, define_plan_flags)


if __name__ == "__main__":
    main()
