"""Who saw what: the drawing of a run, and the table of what each side could learn (DESIGN section 2).

The drawing shows the run as it was. Where no confidential hardware held the enclave, the operator's column says that
everything in it was readable: a simulated run must not look like a protected one.
"""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from cloister.report import svg
from cloister.report.model import Party, RunReport
from cloister.report.summary import size

MAX_DRAWN = 6
"""With more parties, the drawing shows the first ones and counts the rest."""
_CARD, _GAP, _TOP = 58.0, 14.0, 46.0
_PARTY_X, _PARTY_WIDTH = 4.0, 232.0
_NET_X, _NET_WIDTH = 392.0, 170.0
_ENCLAVE_X, _ENCLAVE_WIDTH = 700.0, 296.0


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What each side could see of one thing: "yes", "no", "sealed", or a word more."""

    thing: str
    owner: str
    others: str
    operator: str
    enclave: str


def knowledge(report: RunReport) -> list[Knowledge]:
    """The table of who could see what."""
    inside = "no" if report.attestation.confidential else "readable"
    released = ", ".join(report.released_to)
    adapter = f"released to {released}" if released else "no"
    return [
        Knowledge(thing="a party's prompts, as text", owner="yes", others="no", operator="no", enclave="no"),
        Knowledge(
            thing="its activations at the cut, its response tokens",
            owner="yes",
            others="no",
            operator="sealed" if inside == "no" else inside,
            enclave="yes",
        ),
        Knowledge(thing="the tuned parameters", owner=adapter, others=adapter, operator=inside, enclave="yes"),
        Knowledge(thing="scores of single examples", owner="yes", others="no", operator=inside, enclave="yes"),
        Knowledge(
            thing="pooled scores, declared by the job", owner="yes", others="yes", operator=inside, enclave="yes"
        ),
        Knowledge(thing="sizes, timings, who took part", owner="yes", others="yes", operator="yes", enclave="yes"),
    ]


def drawing(report: RunReport) -> Markup:
    """Parties on the left, the network and its operator between, the enclave on the right."""
    shown = report.parties if len(report.parties) <= MAX_DRAWN else report.parties[: MAX_DRAWN - 1]
    cards = len(shown) + (len(report.parties) > len(shown))
    height = max(cards, 4) * (_CARD + _GAP) - _GAP
    wire = {entry.party: entry for entry in report.wire.parties}
    parts = [_zone_titles(), _network(height), _enclave(report, height)]
    for index, party in enumerate(shown):
        y = _TOP + index * (_CARD + _GAP)
        parts.append(_party(party, y))
        if party.name in wire:
            parts.append(_lane(y, size(wire[party.name].bytes_up), size(wire[party.name].bytes_down)))
    if cards > len(shown):
        y = _TOP + len(shown) * (_CARD + _GAP)
        more = f"and {len(report.parties) - len(shown)} more parties"
        parts.append(svg.text(_PARTY_X + 16, y + 30, more, "label"))
    return svg.drawing(1000, _TOP + height + 36, "Who saw what", *parts, _lane_legend(_TOP + height + 30))


def _zone_titles() -> Markup:
    middle = _NET_X + _NET_WIDTH / 2
    return svg.join(
        [
            svg.text(_PARTY_X, 16, "Parties", "zone"),
            svg.text(_PARTY_X, 33, "each sees its own text", "small"),
            svg.text(middle, 16, "Network and operator", "zone", "middle"),
            svg.text(middle, 33, "ciphertext, sizes, timings", "small", "middle"),
            svg.text(_ENCLAVE_X, 16, "Enclave", "zone"),
            svg.text(_ENCLAVE_X, 33, "measured code of this job only", "small"),
        ]
    )


def _party(party: Party, y: float) -> Markup:
    name = party.name if len(party.name) <= 19 else party.name[:18] + "\u2026"
    page = svg.join(
        [
            svg.rect(_PARTY_X + 14, y + 13, 24, 32, "page", 2),
            *(
                svg.line(_PARTY_X + 19, y + 21 + 6 * i, _PARTY_X + (33 if i < 3 else 28), y + 21 + 6 * i, "ink")
                for i in range(4)
            ),
        ]
    )
    return svg.element(
        "g",
        svg.rect(_PARTY_X, y, _PARTY_WIDTH, _CARD, "card", 8),
        page,
        svg.text(_PARTY_X + 52, y + 25, name, "label strong"),
        svg.text(_PARTY_X + 52, y + 43, f"{party.records.train:,} records, former layers", "small"),
    )


def _network(height: float) -> Markup:
    hatch = [
        svg.line(_NET_X + 14 * i, _TOP, _NET_X + 14 * i, _TOP + height, "hatch")
        for i in range(1, int(_NET_WIDTH // 14) + 1)
    ]
    return svg.join([svg.rect(_NET_X, _TOP, _NET_WIDTH, height, "network", 8), *hatch])


def _lane(y: float, up: str, down: str) -> Markup:
    """One party's two flows: sealed bundle to the right, own results to the left."""
    start, end = _PARTY_X + _PARTY_WIDTH + 8, _ENCLAVE_X - 8
    high, low = y + 19, y + 41
    return svg.join(
        [
            svg.line(start, high, end - 7, high, "flow"),
            _arrow(end, high, 1, "flow-head"),
            _lock(_NET_X + _NET_WIDTH / 2, high),
            svg.text(start + 6, high - 5, up, "small"),
            svg.line(start + 7, low, end, low, "flow back"),
            _arrow(start, low, -1, "flow-head back"),
            _lock(_NET_X + _NET_WIDTH / 2, low),
            svg.text(end - 6, low + 14, down, "small", "end"),
        ]
    )


def _arrow(x: float, y: float, way: int, class_: str) -> Markup:
    """A head that points right (way 1) or left (way -1)."""
    path = f"M{svg.number(x)} {svg.number(y)}l{-9 * way} -4.5v9z"
    return svg.element("path", d=path, class_=class_)


def _lock(x: float, y: float) -> Markup:
    shackle = f"M{svg.number(x - 3.5)} {svg.number(y - 1)}v-3a3.5 3.5 0 0 1 7 0v3"
    return svg.join([svg.element("path", d=shackle, class_="shackle"), svg.rect(x - 6, y - 1.5, 12, 9, "lock", 1.5)])


def _enclave(report: RunReport, height: float) -> Markup:
    protected = report.attestation.confidential
    kind = "vault" if protected else "vault open"
    x, width = _ENCLAVE_X, _ENCLAVE_WIDTH
    parts = [svg.rect(x, _TOP, width, height, kind, 8), _arcade(x, _TOP + height, width)]
    facts = [
        ("activations, response tokens", "of all parties; no prompt as text"),
        ("latter layers and adapter", report.cut or "trained together, once sent"),
        ("adapter leaves for", ", ".join(report.released_to) or "nobody: use by split inference"),
    ]
    for index, (head, small) in enumerate(facts):
        y = _TOP + 30 + index * 44
        parts.append(svg.text(x + 22, y, head, "label strong"))
        parts.append(svg.text(x + 22, y + 17, small if len(small) <= 44 else small[:43] + "\u2026", "small"))
    if protected:
        sealed = f"attested: {report.attestation.type}, hidden from the operator"
        parts.append(svg.text(x + width / 2, _TOP + height - 60, sealed, "sealed", "middle"))
    else:
        parts.append(_stamp(report, x, _TOP + height - 108, width))
    return svg.join(parts)


def _stamp(report: RunReport, x: float, y: float, width: float) -> Markup:
    word = "SIMULATED" if report.attestation.type == "simulated" else "NOT CONFIDENTIAL"
    return svg.join(
        [
            svg.rect(x + 16, y, width - 32, 46, "stamp", 4),
            svg.text(x + width / 2, y + 20, word, "stamp-text", "middle"),
            svg.text(x + width / 2, y + 37, "the operator could read all of this", "stamp-small", "middle"),
        ]
    )


def _arcade(x: float, bottom: float, width: float) -> Markup:
    """A row of cloister arches along the foot of the enclave."""
    count, inset = 7, 18.0
    bay = (width - 2 * inset) / count
    arches = []
    for index in range(count):
        left = x + inset + index * bay + 4
        span = bay - 8
        path = f"M{svg.number(left)} {svg.number(bottom - 8)}v-20a{svg.number(span / 2)} {svg.number(span / 2)} 0 0 1 "
        path += f"{svg.number(span)} 0v20"
        arches.append(svg.element("path", d=path, class_="arch"))
    return svg.join([*arches, svg.line(x + inset, bottom - 8, x + width - inset, bottom - 8, "arch")])


def _lane_legend(y: float) -> Markup:
    return svg.join(
        [
            svg.line(_PARTY_X, y - 4, _PARTY_X + 28, y - 4, "flow"),
            svg.text(_PARTY_X + 36, y, "sealed bundles to the attested key, each example once", "small"),
            svg.line(_PARTY_X + 392, y - 4, _PARTY_X + 420, y - 4, "flow back"),
            svg.text(_PARTY_X + 428, y, "back to each party: its own scores, its answers, the receipt", "small"),
        ]
    )
