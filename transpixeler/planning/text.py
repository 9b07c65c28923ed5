"""Write a plan as text for people: a `Plan` goes in, lines and tables come out."""

from __future__ import annotations

from collections.abc import Sequence

from transpixeler.data.buckets import batch_sizes
from transpixeler.planning.plan import GIB, Plan
from transpixeler.training import estimates
from transpixeler.training.estimates import Memory
from transpixeler.training.room import USABLE_MEMORY

LISTED_CLIPS = 40  # dropped clips that the text names


def describe(plan: Plan) -> str:
    """Return a plan for people."""
    return "\n\n".join(
        ["\n".join(part) for part in (_head(plan), _buckets(plan), _dropped(plan), _held(plan), _ways(plan))]
    )


def _head(plan: Plan) -> list[str]:
    config, batches = plan.config, batch_sizes(plan.config)
    shares = "; ".join(f"{batch} samples a step, {batch // plan.layout.data} a data rank" for batch in batches)
    epochs = config.train.epochs if plan.whole_epochs else plan.steps / plan.steps_epoch
    lines = {
        "trains": f"{plan.trainable_parameters:,} parameters ({config.lora}) of {plan.parameters:,}",
        "layout": f"{plan.layout}, {shares}",
        "steps": f"{plan.steps:,} in all, {plan.steps_epoch:.4g} an epoch; {epochs:.3g} epochs",
        "work": f"{plan.flop_step / 1e12:.4g} TFLOP a step, recompute: {plan.recompute}",
        **({"auto": f"recompute: {plan.recompute}, as {plan.why}"} if plan.why else {}),
        "time": _time(plan),
        "cache": f"{_bytes(plan.cache_latents)} of latents{_drawn(plan)}, about {_bytes(plan.cache_texts)} of texts",
        **({"caching": _caching(plan)} if plan.caching else {}),
        "scan": f"{plan.scan_seconds:.2g} s to probe the files",
    }
    if config.parallel.keep_gb:
        kept = zip(plan.rows, plan.kept_whole, strict=True)
        each = [f"{whole.blocks} at {row.bucket}, for {_bytes(whole.bytes)} more" for row, whole in kept]
        lines["keeps"] = f"blocks of the first rank that recompute nothing: {'; '.join(each)}"
    told = [f"{name:8} {said}" for name, said in lines.items()]
    of_experts = plan.experts.lines(run=config.train.expert_steps)
    if len(plan.experts.experts) > 1:
        where = "stays on the device" if plan.idle_on_device else "waits in host memory"
        of_experts[0] += f"; the idle one's base {where}"
    return [*told, *(f"experts  {said}" for said in of_experts)]


def _time(plan: Plan) -> str:
    peak, gpus = plan.machine.flops, plan.machine.gpus
    if not peak:
        return "unknown; give --peak TFLOPS"
    assumed = f"at {estimates.UTILISATION:.0%} of {peak / 1e12:g} TFLOP/s on {gpus} × {plan.device} (an assumption)"
    return f"{_step(plan.seconds_step)} a step, {_span(plan.seconds_step * plan.steps)} in all, {assumed}"


def _step(seconds: float) -> str:
    unit, name = next((one for one in ((1.0, "s"), (1e-3, "ms")) if seconds >= one[0] / 10), (1e-6, "µs"))
    return f"{seconds / unit:.3g} {name}"


def _span(seconds: float) -> str:
    unit, name = next((one for one in ((3600.0, "h"), (60.0, "min")) if seconds >= 2 * one[0]), (1.0, "s"))
    return f"{seconds / unit:,.2g} {name}" if seconds < 10 * unit else f"{seconds / unit:,.0f} {name}"


def _caching(plan: Plan) -> str:
    """Say what the networks that read captions take while they fill the cache."""
    each = ", then ".join(f"{_bytes(size)} of {name}" for name, size in plan.caching.items())
    kind = plan.config.model.quantize_encoders
    how = "in bf16" if kind == "none" else f"in {kind}"
    return f"{each}, {how}, one at a time on the device while texts are encoded"


def _drawn(plan: Plan) -> str:
    """Say how much of what may be drawn each epoch is."""
    if plan.config.data.draw == "once":
        return ""
    every = sum(row.clips for row in plan.rows)
    return f" ({plan.drawn:,} of the {every:,} clips below, which this run's epochs draw)"


def _buckets(plan: Plan) -> list[str]:
    names = ("bucket", "clips", "an epoch", "batch", "micro batch", "steps", "tokens", "TFLOP a sample")
    rows = [
        (
            str(r.bucket),
            f"{r.clips:,}",
            f"{r.seen:,.6g}",
            r.batch,
            r.micro_batch,
            f"{r.steps:.4g}",
            f"{r.tokens:,}",
            f"{r.tflop:.4g}",
        )
        for r in plan.rows
    ]
    return _table(names, rows)


def _dropped(plan: Plan) -> list[str]:
    lines = [f"note on data.{key}: {note}" for key, notes in plan.notes.items() for note in notes]
    if not any(plan.dropped.values()):
        return [*lines, "dropped  nothing"]
    for key, pairs in plan.dropped.items():
        if pairs:
            lines.append(f"dropped from data.{key}: {len(pairs):,}")
            lines += [f"  {name}: {reason}" for name, reason in pairs[:LISTED_CLIPS]]
            lines += (
                [f"  … and {len(pairs) - LISTED_CLIPS:,} more, which --json names"] if len(pairs) > LISTED_CLIPS else []
            )
    return lines


def _held(plan: Plan) -> list[str]:
    names = ("memory of a rank", *Memory._fields, "total")
    rows = [
        (f"{mode}{' (this config)' if mode == str(plan.recompute) else ''}", *map(_bytes, (*memory, memory.total)))
        for mode, memory in plan.memory.items()
    ]
    return _table(names, rows)


def _ways(plan: Plan) -> list[str]:
    machine = plan.machine
    used = f"{USABLE_MEMORY:.0%} of it used at most"
    machines = f"{machine.gpus} × {plan.device}, {machine.memory / GIB:g} GiB each ({used})"
    if not machine.memory:
        return ["layouts  give --memory GB to find the ones that fit"]
    if not plan.fits:
        return [f"no layout fits {machines}; use smaller or shorter clips, a smaller train.micro_batch, or more GPUs"]
    lines = [f"layouts that fit {machines}, the fastest first"]
    for way in plan.fits:
        lines.append(f"  {_bytes(way.memory.total):>9}  {_step(way.seconds):>10} a step  {' '.join(way.settings)}")
        lines.append(f"             {way.why}")
    return lines


def _table(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [tuple(map(str, row)) for row in (names, *rows)]
    first, *widths = (max(map(len, column)) for column in zip(*cells))
    return ["  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], widths))]) for row in cells]


def _bytes(number: float) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if number >= unit / 10:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 1024:,.1f} KiB"
