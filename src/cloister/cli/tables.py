"""Results as tables for people. Every accuracy and every loss is shown with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import singledispatch

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cloister.report.attest import (
    AttestCollectReport,
    AttestEnrolReport,
    AttestEnrolStepReport,
    AttestFetchReport,
    AttestShowReport,
    AttestVerifyReport,
)
from cloister.report.model import ALL, Attestation, Output, RunReport, Scored
from cloister.report.outputs import (
    CompareReport,
    DoctorReport,
    EvaluateReport,
    ExportReport,
    GenerateReport,
    SignReport,
    SliceTerms,
    VerifyReport,
)
from cloister.report.plan import MaskingPlan, PadsReport, PlanReport
from cloister.report.terminal import alarm, compare_view, run_view

_STATUS = {"ok": "green", "warn": "yellow", "fail": "red", "failed": "bold red", "skipped": "yellow"}
_VERDICT = {"verified": "bold green", "refused": "bold red"}


@singledispatch
def render(output: Output, width: int) -> RenderableType:
    """A result as something that rich can print, `width` columns wide."""
    return Text(output.to_json().rstrip("\n"))


@render.register
def _(output: RunReport, width: int) -> RenderableType:
    return run_view(output, width)


@render.register
def _(output: EvaluateReport, width: int) -> RenderableType:
    table = _scores_table(output.source, [(row.system, row) for row in output.results])
    return Group(table, *_warnings(output.warnings))


@render.register
def _(output: CompareReport, width: int) -> RenderableType:
    return compare_view(output)


@render.register
def _(output: PlanReport, width: int) -> RenderableType:
    where = f"{output.former_layers} of {output.layers} layers at the parties; {output.steps:,} steps"
    if output.masking is not None:
        where = f"products of all {output.layers} layers on accelerators; {output.masking.rounds:,} rounds;"
        where += f" at most {output.steps:,} steps"
    head = (
        f"{output.job_name}: {output.architecture}, {output.parameters:,} parameters, {output.trainable_parameters:,}"
        f" of them trained; {where} of {output.tokens_per_step:,} tokens"
    )
    data = table_of("records", ["party", "train", "validation", "test", "truncated"], right=1)
    for party in output.parties:
        counts = (party.records.train, party.records.validation, party.records.test, party.truncated.prompts)
        add_row(data, party.name, *(f"{count:,}" for count in counts))
    roles = table_of("needs", ["role", "name", "memory", "disk", "up", "down", "time"], right=2)
    for role in output.roles:
        amounts = (role.memory_bytes, role.disk_bytes, role.bytes_up, role.bytes_down)
        add_row(roles, role.role, role.name, *map(size, amounts), duration(role.seconds))
    times = Text(", ".join(f"{phase} {duration(seconds)}" for phase, seconds in output.timing.items()))
    pads = [] if output.masking is None else _masking_plan(output.masking)
    return Group(Text(head), data, roles, *pads, times, *_warnings(output.warnings))


def _masking_plan(plan: MaskingPlan) -> list[RenderableType]:
    """Pads and traffic of method `slice`, and what they do not protect."""
    table = table_of(f"masks: {plan.pads} pads, weights of {plan.bits} bits", [*_PAD_COLUMNS], right=1)
    for party in plan.parties:
        amounts = (size(party.disk_bytes), duration(party.pad_seconds), size(party.bytes_up), size(party.bytes_down))
        add_row(table, party.party, f"{party.steps:,}", f"{party.rows:,}", *amounts)
    up, down = (size(plan.bytes_per_token[way]) for way in ("up", "down"))
    text = f"between enclaves and accelerators, for each trained token: {up} up, {down} down, scoring included"
    return [table, Text(text), *(alarm(warning) for warning in plan.insecure)]


_PAD_COLUMNS = ("party", "steps", "pad rows", "on disk", "computed in", "up", "down")


@render.register
def _(output: PadsReport, width: int) -> RenderableType:
    done = "continued" if output.continued else "made"
    text = (
        f"{done} {output.rows:,} rows of pads in {output.streams} streams for {output.party},"
        f" {size(output.disk_bytes)}, in {duration(output.seconds)}: {output.path}"
    )
    return Group(Text(text), *_warnings(output.warnings))


@render.register
def _(output: DoctorReport, width: int) -> RenderableType:
    table = table_of("", ["check", "", "found"])
    for check in output.checks:
        found = Text(check.found)
        if check.hint:
            found.append(f"\n{check.hint}", style="dim")
        add_row(table, check.name, Text(check.status, style=_STATUS[check.status]), found)
    return table


@render.register
def _(output: VerifyReport, width: int) -> RenderableType:
    table = table_of(output.path, ["", "check", "", "detail"])
    for check in output.checks:
        status = Text(check.status, style=_STATUS[check.status])
        add_row(table, f"{check.n:2}", check.name, status, Text(check.detail))
    parts: list[RenderableType] = [table]
    if output.attestation is not None:
        parts += _banner(output.attestation)
    parts.append(Text(f"policy: {output.policy}"))
    if output.job_id is not None:
        parts.append(Text(f"job {output.job_id}\nadapter {output.adapter_sha256}"))
    parts.append(Text(_verdict(output), style=_VERDICT.get(output.verdict, "bold yellow")))
    parts += [Text(f"  {s.party}: key {s.public_key_fingerprint}, {_time(s.vouched_at)}") for s in output.signers]
    return Group(*parts, *_warnings(output.warnings))


@render.register
def _(output: AttestVerifyReport, width: int) -> RenderableType:
    table = table_of("", ["", "check", "", "reason"])
    for check in output.checks:
        word = "pass" if check.passed else "FAIL"
        status = Text(word, style="green" if check.passed else "bold red")
        add_row(table, f"{check.n:2}", check.name, status, check.reason)
    if not output.accepted:
        failed = output.checks[-1]
        verdict = f"REFUSED in step {failed.n} ({failed.name}), code {output.error_code}"
        return Group(table, Text(verdict, style="bold red"))
    claims = output.claims
    parts: list[RenderableType] = [table, Text(f"accepted: {output.type} evidence", style="bold green")]
    facts = table_of("", ["", ""])
    add_row(facts, "measurement", claims["measurement_label"] or "ANY is accepted")
    for name, value in (claims["registers"] | claims["tcb"]).items():
        add_row(facts, name, value)
    for device in claims["devices"]:
        add_row(facts, "device", describe_device(device))
    parts.append(facts)
    if not claims["confidential"]:
        parts.append(alarm(f"{output.type.upper()}: it hides nothing from the operator of its machine"))
    return Group(*parts, *_warnings(claims["warnings"]))


@render.register
def _(output: AttestShowReport, width: int) -> RenderableType:
    table = table_of(output.path, ["", ""])
    add_row(table, "type", output.type)
    add_row(table, "report data", output.report_data)
    for name, value in (output.registers | output.details).items():
        add_row(table, name, value)
    for name, count in output.sizes.items():
        add_row(table, name.replace("_", " "), f"{count:,} bytes")
    if output.devices:
        add_row(table, "devices", ", ".join(output.devices))
    parts: list[RenderableType] = [alarm("NOT VERIFIED: anybody can make evidence that says this"), table]
    for measurement in output.measurements:
        word = "matches" if measurement.matches else "DIFFERS"
        diff = table_of(f"{measurement.label} ({measurement.type}): {word}", ["register", "", "policy", "evidence"])
        for row in measurement.registers:
            sign = Text("=", style="green") if row.equal else Text("≠", style="bold red")
            add_row(diff, row.name, sign, row.expected, row.found or "(none)")
        parts.append(diff)
    return Group(*parts)


@render.register
def _(output: AttestCollectReport, width: int) -> RenderableType:
    return Text(
        f"{output.type} evidence by {output.attester}\n"
        f"bound to {output.report_data}\n"
        f"{output.bytes:,} bytes written to {output.path}"
    )


@render.register
def _(output: AttestFetchReport, width: int) -> RenderableType:
    what = (
        f"{output.type} evidence with its endorsements"
        if output.embedded
        else f"endorsements of {output.type} evidence"
    )
    return Text("\n".join([*output.sources, f"{what}: {output.bytes:,} bytes written to {output.path}"]))


@render.register
def _(output: AttestEnrolReport, width: int) -> RenderableType:
    table = Text(output.policy)
    if output.endorsed:
        return table
    owner = f"nobody vouches for this TPM: compare its endorsement key with its owner's: {output.endorsement_key}"
    return Group(table, *_warnings([owner]))


@render.register
def _(output: AttestEnrolStepReport, width: int) -> RenderableType:
    return Text(f"wrote {output.path}: {output.next}")


def _verdict(output: VerifyReport) -> str:
    if output.valid_at is None:
        failed = ", ".join(f"{check.n} ({check.name})" for check in output.checks if check.status == "failed")
        return f"REFUSED: failed in step {failed}"
    names = ", ".join(signer.party for signer in output.signers)
    if output.verdict == "verified":
        return f"verified: valid at {_time(output.valid_at)}, vouched for by {names}"
    return f"{output.verdict}; vouched for by the keys of {names}"


def _time(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


@render.register
def _(output: SignReport, width: int) -> RenderableType:
    keys = table_of("fingerprints: compare each with its party, by voice or on paper", ["party", "key"])
    for party in output.parties:
        add_row(keys, party.party, party.public_key_fingerprint)
    rules = output.inference
    allowed = rules["allow"] if isinstance(rules["allow"], str) else ", ".join(rules["allow"])
    returned = f"the {rules['top_k']} likeliest tokens" if rules["returns"] == "top-k" else "the likeliest token"
    terms = table_of("what everybody agrees to", ["", ""])
    add_row(terms, "job", f"{output.job_name}, {output.job_id}")
    add_row(terms, "gets the adapter", ", ".join(output.recipients) or "nobody: it stays in the enclave")
    if output.slice is None:
        add_row(terms, "may query", f"{allowed}; a query returns {returned}; {rules['quota_tokens']:,} tokens each")
    else:
        _add_slice_terms(terms, output.slice)
    add_row(terms, "enclaves accepted", ", ".join(output.accepts) or "none")
    for value in output.measurements:
        registers = "\n".join(f"{name} {register}" for name, register in value.registers.items())
        add_row(terms, f"program ({value.type})", f"{value.label}\n{registers}")
    if output.any_measurement:
        add_row(terms, "program", "ANY: which program runs is not checked")
    parts: list[RenderableType] = [keys, terms]
    if output.slice is not None:
        parts += [alarm(text) for text in output.slice.insecure]
    if output.path is not None:
        parts.append(Text(f"approved by {output.party}: {output.path}", style="bold green"))
    return Group(*parts)


def _add_slice_terms(terms: Table, agreed: SliceTerms) -> None:
    limit = "no limit" if agreed.clip_norm is None else f"at most {agreed.clip_norm:g} long"
    rounds = f"{agreed.rounds:,}, merged by {agreed.aggregation}; an update is {limit}"
    checked = "every product checked" if agreed.checked else "products NOT checked"
    pads = "none: accelerators see EVERYTHING" if agreed.pads == "none" else f"{agreed.pads} pads"
    add_row(terms, "rounds", f"{rounds}; {agreed.quorum} parties end one after its deadline")
    add_row(terms, "masks", f"{pads}, weights of {agreed.bits} bits, {checked}")
    add_row(terms, "your accelerators", "\n".join(agreed.accelerators) or "none named in this file yet")


@render.register
def _(output: GenerateReport, width: int) -> RenderableType:
    parts: list[RenderableType] = []
    for answer in output.answers:
        parts.append(Text(answer.response))
        parts.append(Text(f"({answer.tokens} tokens, {answer.seconds:.1f} s, ended by {answer.finish})", style="dim"))
    return Group(*parts, *_banner(output.attestation), *_warnings(output.warnings))


@render.register
def _(output: ExportReport, width: int) -> RenderableType:
    table = table_of(f"{output.kind} written to {output.path}", ["file", "size", "sha256"])
    for file in output.files:
        add_row(table, file.path, size(file.bytes), file.sha256)
    return Group(table, *_warnings(output.warnings))


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least one whole one."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float | None) -> str:
    """Seconds in words, as coarse as an estimate deserves."""
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def table_of(title: str, columns: Sequence[str], *, right: int | None = None) -> Table:
    """A plain table; columns from number `right` on hold numbers."""
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(columns):
        is_number = right is not None and number >= right
        table.add_column(name, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return table


def add_row(table: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row whose texts are shown as they are: names of tasks and files come from outside and are no markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)


def _scores_table(title: str, rows: Iterable[tuple[str, Scored]]) -> Table:
    columns = ["party", "task", "system", "examples", "bits/byte", "interval", "accuracy", "interval"]
    table = table_of(title, columns, right=3)
    before = ""
    for system, row in sorted(rows, key=lambda pair: (pair[1].party == ALL, pair[1].party, pair[1].task)):
        if before not in ("", row.party):
            table.add_section()
        before = row.party
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.3f}"
        loss = (f"{row.bits_per_byte:.4f}", _interval(row.bits_per_byte_ci, 4))
        cells = (row.party, row.task, system, f"{row.examples:,}", *loss, accuracy, _interval(row.accuracy_ci, 3))
        add_row(table, *cells, style="bold" if system == "cloister" else "")
    return table


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return "" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _banner(attestation: Attestation) -> list[RenderableType]:
    devices: list[RenderableType] = [Text(f"with {describe_device(device)}") for device in attestation.devices]
    if attestation.hardware and attestation.confidential:
        return [Text(f"attested by {attestation.type}, measurement {attestation.measurement}"), *devices]
    return [
        *devices,
        alarm(f"{attestation.type.upper()} ENCLAVE: nothing was protected from the operator of its machine"),
    ]


def describe_device(device: Mapping[str, str]) -> str:
    """An accelerator's facts in one line."""
    return f"{device['type']}: " + ", ".join(f"{name} {value}" for name, value in device.items() if name != "type")


def _warnings(warnings: Iterable[str]) -> list[Text]:
    return [Text(f"warning: {warning}", style="yellow") for warning in warnings]
