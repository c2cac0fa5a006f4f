"""Benchmarks as tables for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from cloister.cli.tables import add_row, render, size, table_of
from cloister.report.bench import BenchSliceReport, BenchSplitReport


@render.register
def _(output: BenchSliceReport, width: int) -> RenderableType:
    shape = ", ".join(f"{name} {value:,}" for name, value in output.shape.items())
    table = table_of(
        "a training step", ["system", "median", "least", "most", "runs", "own CPU", "model", "in steps"], right=1
    )
    for row in output.rows:
        times = (f"{value:.2f} s" for value in (row.median_s, row.min_s, row.max_s))
        add_row(
            table,
            row.name,
            *times,
            str(row.runs),
            f"{row.cpu_s:.2f} s",
            *map(size, (row.model_bytes, row.resident_bytes)),
        )
    ratios = [Text(f"{name.replace('_', ' ')}: {value:.3f}") for name, value in output.ratios.items()]
    crossing = f"bytes per token: {output.bytes_per_token['up']:,.0f} up, {output.bytes_per_token['down']:,.0f} down"
    return Group(Text(shape), table, *ratios, Text(crossing))


@render.register
def _(output: BenchSplitReport, width: int) -> RenderableType:
    target = "the token budget" if output.target_loss is None else f"{output.target_loss:.4f} bits/byte"
    columns = [
        "system",
        "cut",
        f"s to {target}",
        "s in all",
        "before training",
        "CPU s",
        "tokens/s",
        "held-out",
        "wire",
        "peak RSS",
    ]
    table = table_of("", columns, right=1)
    for row in output.rows:
        add_row(
            table,
            row.system,
            "" if row.cut is None else str(row.cut),
            "not reached" if row.seconds_to_loss is None else f"{row.seconds_to_loss:.1f}",
            f"{row.seconds:.1f} [{row.seconds_range[0]:.1f}, {row.seconds_range[1]:.1f}]",
            f"{row.setup_s:.1f}",
            f"{row.cpu_s:.1f}",
            f"{row.tokens_per_s:,.0f}",
            "" if row.final_loss is None else f"{row.final_loss:.4f}",
            size(row.wire_bytes),
            ", ".join(f"{role} {mib:,.0f} MiB" for role, mib in row.peak_rss_mib.items()),
        )
    work = ", ".join(f"{name.replace('_', ' ')} {value:,g}" for name, value in output.workload.items())
    head = [Text(output.shape), Text(f"{work}; {output.target_share:.0%} of positions carry loss; {output.dtype}")]
    how = [
        Text(f"{row.system}{'' if row.cut is None else f' {row.cut}'}: {row.how}", style="dim") for row in output.rows
    ]
    ratios = [Text(f"{name.replace('_', ' ')}: {value:.2f}") for name, value in output.ratios.items()]
    return Group(*head, table, *ratios, *how, Text(f"clock: {output.clock}", style="dim"))
