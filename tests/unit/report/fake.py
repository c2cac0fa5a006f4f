"""A made-up but plausible five-party run, for tests and for looking at the report by eye."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from datetime import UTC, datetime

from cloister.evaluation.outliers import fits_of
from cloister.report.model import (
    Attestation,
    Comparison,
    CrossRow,
    CurvePoint,
    Host,
    Masking,
    Metric,
    Party,
    ReceiptRef,
    Records,
    ResultRow,
    RoundParty,
    RoundRow,
    RunReport,
    Sample,
    System,
    Training,
    Truncated,
    Wire,
)

PARTIES = {"cardiology": 1.0, "dermatology": 1.18, "emergency": 0.86, "neurology": 1.09, "paediatrics": 0.94}
METRICS: tuple[Metric, ...] = ("bits_per_byte", "accuracy")
LEVEL: dict[System, float] = {"base": 1.46, "local": 1.17, "central": 1.081, "cloister": 1.094}
ACCURACY: dict[System, float] = {"base": 0.11, "local": 0.58, "central": 0.74, "cloister": 0.73}


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def result(system: System, party: str, task: str, scale: float, rng: random.Random) -> ResultRow:
    rate = LEVEL[system] * scale * rng.uniform(0.985, 1.015)
    half = (0.011 if party == "all" else 0.028) * rate
    share = min(0.97, max(0.03, ACCURACY[system] / scale**0.4 * rng.uniform(0.97, 1.03)))
    wide = 0.021 if party == "all" else 0.055
    judged = task != "answer"
    return ResultRow(
        system=system,
        party=party,
        task=task,
        examples=1500 if party == "all" else 300,
        bits_per_byte=rate,
        bits_per_byte_ci=(rate - half, rate + half),
        accuracy=share if judged else None,
        accuracy_ci=(max(0.0, share - wide), min(1.0, share + wide)) if judged else None,
        trained_on=party if system == "local" and party != "all" else None,
    )


def compared(b: System, party: str, metric: Metric, trained_on: str | None = None) -> Comparison:
    level = LEVEL if metric == "bits_per_byte" else ACCURACY
    delta = level["cloister"] - level[b] if trained_on is None else {"bits_per_byte": -0.24, "accuracy": 0.41}[metric]
    real = b != "central"
    return Comparison(
        a="cloister",
        b=b,
        party=party,
        metric=metric,
        delta=delta,
        ci=(delta - 0.015, delta + 0.015),
        p=0.001 if real else 0.09,
        p_holm=0.005 if real else 0.45,
        examples=300,
        trained_on=trained_on,
    )


def curve(start: float, end: float, steps: int, rng: random.Random) -> list[CurvePoint]:
    points = []
    for step in range(0, steps + 1, 4):
        level = end + (start - end) * math.exp(-5 * step / steps)
        evaluated = step % 20 == 0
        points.append(
            CurvePoint(
                step=step,
                tokens=step * 4096,
                train_loss=level * 1.9 + rng.gauss(0, 0.05),
                validation_bits_per_byte=level if evaluated else None,
            )
        )
    return points


def run_report(*, names: tuple[str, ...] = tuple(PARTIES), hardware: bool = False) -> RunReport:
    """A run of `names` parties with all baselines."""
    rng = random.Random(7)  # noqa: S311 - made-up numbers
    scales = dict(zip(names, itertools.cycle((1.0, 1.18, 0.86, 1.09, 0.94, 1.03, 0.97)), strict=False))
    systems: list[System] = ["base", "local", "central", "cloister"]
    results = [
        result(system, party, task, scale, rng)
        for system in systems
        for party, scale in [*scales.items(), ("all", 1.0)]
        for task in ("answer", "triage", "all")
    ]
    cross = []
    for trained_on in names:
        for party in (*(n for n in names if n != trained_on), "others"):
            rate = 1.34 * scales.get(party, 1.0) * rng.uniform(0.97, 1.06)
            cross.append(
                CrossRow(
                    trained_on=trained_on,
                    party=party,
                    task="all",
                    examples=300,
                    bits_per_byte=rate,
                    bits_per_byte_ci=(rate * 0.97, rate * 1.03),
                    accuracy=0.31 + 0.1 * (rate % 0.1),
                    accuracy_ci=(0.26, 0.37),
                )
            )
    comparisons = [compared(b, party, metric) for metric in METRICS for b in systems[:3] for party in (*names, "all")]
    if len(names) > 1:
        comparisons += [compared("local", "others", m, trained_on=n) for m in METRICS for n in names]
    curves = {"cloister": curve(1.46, 1.09, 240, rng), "central": curve(1.46, 1.08, 240, rng)}
    curves |= {f"local:{n}": curve(1.46 * scales[n], 1.17 * scales[n], 120, rng) for n in names}
    first, second = [*names, names[0]][:2]
    return RunReport(
        job_id=sha("job"),
        job_name="triage-demo",
        method="split",
        version="0.1.0",
        created=datetime(2026, 11, 21, 2, 0, tzinfo=UTC),
        command="cloister demo --out demo-run",
        model="tiny-clinic-5m",
        cut="2 of 6 layers at the parties",
        attestation=Attestation(
            type="tdx" if hardware else "simulated",
            hardware=hardware,
            confidential=hardware,
            measurement=sha("measurement"),
            policy_sha256=sha("policy"),
        ),
        parties=[
            Party(
                name=name,
                public_key_fingerprint=sha(name)[:32],
                records=Records(train=1000 + 37 * i, validation=52, test=300),
                truncated=Truncated(prompts=3 * i, responses=i),
            )
            for i, name in enumerate(names)
        ],
        results=results,
        local_cross=cross,
        comparisons=comparisons,
        wire=Wire.of({n: (31_400_000 + 900_000 * i, 212_000 + 7_000 * i) for i, n in enumerate(names)}, "bfloat16"),
        timing={
            "start and attest": 6.1,
            "former layers": 7.9,
            "upload": 2.2,
            "train cloister": 24.8,
            "train baselines": 31.5,
            "score": 13.0,
            "receipt": 0.4,
        },
        fits=fits_of({n: (4096, 1.9 * scales[n], 0.031 * scales[n] ** 2) for n in names}),
        training=Training(tokens=983_040, tokens_per_s=39_640.0, steps=240),
        curves=curves,
        adapter_sha256=sha("adapter"),
        receipt=ReceiptRef(path="receipt.json", sha256=sha("receipt")),
        samples=[
            Sample(
                party=first,
                prompt="Patient, 61, chest tightness for two hours, radiating to the left arm, sweating. Triage?",
                response="emergency: suspected acute coronary syndrome; call an ambulance and give aspirin.",
                reference="emergency: suspected acute coronary syndrome; call an ambulance, aspirin.",
            ),
            Sample(
                party=second,
                prompt="Itching rash on both forearms since gardening on Sunday, no fever. What is it?",
                response="Contact dermatitis. Wash the skin and use a mild steroid cream.",
                reference="Contact dermatitis. Wash the skin, use a mild steroid cream, avoid the plant.",
            ),
        ],
        host=Host(
            platform="Linux-6.1-x86_64",
            cpus=2,
            memory_bytes=8 * 2**30,
            python="3.11.2",
            torch="2.13.0+cpu",
            transformers="5.23.0",
            peft="0.21.0",
        ),
        warnings=["12 records were cut to 512 tokens; see the parties' table."],
    )


def slice_report(
    *,
    names: tuple[str, ...] = tuple(PARTIES),
    hardware: bool = False,
    masking: dict[str, object] | None = None,
    rounds: int = 6,
) -> RunReport:
    """A run by `slice`: the last party misses the second round, and the first one goes against the others in it."""
    used = {"pads": "precomputed", "bits": 8, "checked": True, "bytes_up": 98_304_000, "bytes_down": 196_608_000}
    return run_report(names=names, hardware=hardware).model_copy(
        update={
            "method": "slice",
            "cut": "all 6 layers' products on accelerators, behind masks",
            "fits": [],
            "masking": Masking.model_validate(used | (masking or {})),
            "rounds": [round_row(number, names) for number in range(1, rounds + 1)],
        }
    )


def round_row(number: int, names: tuple[str, ...]) -> RoundRow:
    absent = [names[-1]] if number == 2 and len(names) > 1 else []
    return RoundRow(
        round=number,
        train_loss=2.5 / number,
        validation_bits_per_byte=1.4 / number if number % 2 == 0 else None,
        parties=[
            RoundParty(
                party=name,
                tokens=5000 + i,
                train_loss=2.4 / number,
                update_norm=(0.8 + 0.07 * i) / number,
                clipped=number == 1 and i == 1,
                cosine=-0.125 if (number, i) == (2, 0) else 0.62,
            )
            for i, name in enumerate(names)
            if name not in absent
        ],
        absent=absent,
    )
