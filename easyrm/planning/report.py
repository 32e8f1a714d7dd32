"""A plan as a person reads it, and as a program does."""

from collections.abc import Iterable
from typing import Any

from easyrm.chips import GIB
from easyrm.planning.compiled import Plan
from easyrm.planning.search import Candidate, idle_note


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values; bytes are those of one chip, times are the roofline's, None where the step does not fit."""
    memory, work = plan.memory, plan.work
    found = {
        "topology": plan.slice.name,
        "chips": plan.slice.chips,
        "mesh": plan.mesh,
        "remat": plan.remat,
        "rows": work.shape.rows,
        "row_length": work.shape.length,
        "micro_batches": work.micro_batches,
        "rows_needed": work.needed,
        "idle_groups": work.idle,
        "fits": memory.fits,
        "refused": memory.refused or None,
        "bytes": {
            "parameters": memory.parameters,
            "moments": memory.moments,
            "temporaries": memory.temporaries,
            "peak": memory.peak,
            "host": memory.host,
            "hbm": int(memory.hbm),
        },
        "flops": plan.flops,
        "useful_flops": plan.useful_flops,
        "compile_seconds": round(plan.compile_seconds, 1),
        "assumed": list(plan.demand.assumed),
    }
    if memory.fits:
        limits, step = plan.roofline, plan.roofline.step
        found |= {
            "collective_bytes": {kind: int(size) for kind, size in plan.traffic.sent.items()},
            "collective_calls": plan.traffic.calls,
            "unknown_loops": plan.traffic.unknown_loops,
            "seconds": {"compute": limits.compute, "hbm": limits.hbm, "ici": limits.ici, "step": step},
            "bound_by": limits.bound_by,
            "mfu": plan.mfu,
            "tokens_per_second": plan.demand.tokens / step,
            "pairs_per_hour": plan.demand.batch_size / step * 3600,
            "steps": plan.steps,
            "hours": plan.hours,
            "price": plan.price,
            "cost": plan.cost,
        }
    return found


def as_text(plan: Plan, better_mesh: str) -> str:
    """Some twenty lines; `better_mesh` is a mesh that leaves no device idle, or ""."""
    tpu, work, memory = plan.slice, plan.work, plan.memory
    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{tpu.name}: {tpu.chips} chips ({tpu.chip.kind}), mesh {axes}, remat {plan.remat}",
        f"step: {work.shape.rows} rows of {work.shape.length} tokens in {work.micro_batches} micro-batch"
        f"{'es' * (work.micro_batches > 1)}, {plan.demand.batch_size} pairs",
        *(f"  assumed: {sentence}" for sentence in plan.demand.assumed),
    ]
    if work.idle:
        lines.append("  " + idle_note(work, better_mesh))
    state = f"parameters {_gib(memory.parameters)}, moments {_gib(memory.moments)}"
    if not memory.fits:
        lines += [f"DOES NOT FIT: {memory.refused}", f"GiB a chip: {state}, HBM {_gib(memory.hbm)}"]
        return "\n".join(lines)
    host = f", on the host {_gib(memory.host)}" if memory.host else ""
    lines += [
        f"FITS: peak {_gib(memory.peak)} of {_gib(memory.hbm)} GiB a chip",
        f"GiB a chip: {state}, activations and temporaries {_gib(memory.temporaries)}{host}",
        f"FLOPs a step: {plan.flops:.3g}, of which {plan.useful_flops:.3g} useful",
        *_traffic_lines(plan),
        *_time_lines(plan),
    ]
    return "\n".join(lines)


def _traffic_lines(plan: Plan) -> list[str]:
    sent = ", ".join(
        f"{kind} {_gib(size)} ({plan.traffic.calls[kind]})" for kind, size in plan.traffic.sent.items() if size
    )
    lines = [f"GiB a chip sends in a step (collectives): {sent or 'none'}"]
    if plan.traffic.unknown_loops:
        lines.append(f"  {plan.traffic.unknown_loops} loops of unknown length are counted once: more is sent")
    return lines


def _time_lines(plan: Plan) -> list[str]:
    limits, step = plan.roofline, plan.roofline.step
    lines = [
        f"seconds a step at least: {step:.2f}, bound by {limits.bound_by} (compute {limits.compute:.2f}, "
        f"HBM {limits.hbm:.2f}, ICI {limits.ici:.2f})",
        f"at most: MFU {plan.mfu:.1%}, {plan.demand.tokens / step:,.0f} useful tokens/s, "
        f"{plan.demand.batch_size / step * 3600:,.0f} pairs/hour",
        f"run of {plan.steps} steps: at least {plan.hours:.2f} hours, {plan.hours * plan.slice.chips:.1f} chip-hours"
        + (f", ${plan.cost:,.2f}" if plan.cost is not None else ""),
        f"compiled in {plan.compile_seconds:.0f} s",
    ]
    return lines


def search_table(plans: Iterable[Plan], rest: Iterable[Candidate], steps: int, priced: bool) -> str:
    """One line a plan that was compiled, the cheapest that fit first, then candidates that were only estimated."""
    unit = "USD" if priced else "chip-h"
    rows = [("", "slice", "mesh", "rows", "micro", "remat", "GiB", "of", "step s", "bound by", "hours", unit)]
    for plan in sorted(plans, key=lambda plan: _spent(plan) if plan.memory.fits else float("inf")):
        memory, fits = plan.memory, plan.memory.fits
        rows.append((
            "fits" if fits else "does not fit",
            plan.slice.name,
            ",".join(str(size) for size in plan.mesh.values()),
            _shape(plan.work),
            str(plan.work.micro_batches),
            plan.remat,
            _gib(memory.peak) if fits else "-",
            _gib(memory.hbm),
            *((f"{plan.roofline.step:.2f}", plan.roofline.bound_by, f"{plan.hours:.2f}") if fits else ("-",) * 3),
            f"{_spent(plan):,.2f}" if fits else "-",
        ))  # fmt: skip
    for candidate in rest:
        step = candidate.roofline.step
        spent = candidate.dollars * steps / (1 if priced else 3600)
        rows.append((
            "estimated",
            candidate.slice.name,
            candidate.mesh_dim,
            _shape(candidate.work),
            str(candidate.work.micro_batches),
            candidate.remat,
            _gib(candidate.memory),
            _gib(candidate.slice.chip.hbm),
            f"{step:.2f}",
            candidate.roofline.bound_by,
            f"{step * steps / 3600:.2f}",
            f"{spent:,.2f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _spent(plan: Plan) -> float:
    return plan.hours * plan.slice.chips if plan.cost is None else plan.cost


def _shape(work) -> str:
    return f"{work.shape.rows}x{work.shape.length}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
