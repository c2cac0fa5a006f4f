"""The outputs of `cloister bench`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister.report.model import Count, Host, Output, Part, Seconds, Share, Versioned


class BenchRow(Part):
    """One system's training steps."""

    name: str
    median_s: Seconds
    min_s: Seconds
    max_s: Seconds
    runs: Count
    cpu_s: Seconds
    """Median processor time of its own process, without accelerators."""
    model_bytes: Count
    """Memory of its own before the first step, beyond what importing torch takes: model, adapter, other libraries."""
    resident_bytes: Count
    """The same after steps, at most: with what the allocator keeps of activations."""


class BenchSliceReport(Versioned):
    """`cloister bench slice`."""

    command: str
    shape: dict[str, Count]
    """hidden, layers, vocabulary, tokens of a step, packs that they are spread over, rank."""
    rows: list[BenchRow]
    ratios: dict[str, float]
    """Of medians: precomputed_over_plain, dual_over_plain (plain in float32), the same over bfloat16; freivalds_share,
    processor time of the check in that of a precomputed step on all processors; enclave_rss_over_weights, of weights in
    float32, before the first step and in steps. What was not measured is left out."""
    bytes_per_token: dict[Literal["up", "down"], float]
    """In training, between the enclave and its accelerators."""
    host: Host


class BenchPoint(Part):
    """A training after one of its steps."""

    step: Count
    tokens: Count
    """Trained on so far."""
    seconds: Seconds
    """On the system's clock, which stands still while the held-out loss is measured."""
    train_loss: float | None = None
    """Nats per target of this step; after the last step of a round the mean of the round."""
    held_out: float | None = None
    """Validation bits per byte of all parties pooled, where it was measured."""


class BenchMeasured(Output):
    """What one run of one system of `cloister bench split` came to."""

    seconds: Seconds
    """From what the clock begins with (see `BenchSplitReport.clock`) to the trained adapter."""
    setup_s: Seconds
    """Before the first training step. With split: the parties' passes, sealing, upload and all else before training."""
    train_s: Seconds
    """The rest: all training steps."""
    start_s: Seconds
    """Starting processes and importing libraries: not in `seconds`."""
    cpu_s: Seconds
    """Processor time of all its processes within `seconds`: on a busy machine steadier than the clock."""
    tokens: Count
    """Trained on, over all epochs."""
    steps: Count
    """Optimiser steps; with fedavg of all silos together."""
    peak_rss_mib: dict[str, float]
    """By role, the largest process of each. Pages of the model's file that processes share count in each of them."""
    wire_bytes: Count
    """Between machines, if every silo had its own: adapters with fedavg; sealed activations and all else with split."""
    phases: dict[str, Seconds] = Field(default_factory=dict)
    """Of split, as in a run's report: those of parties are of the slowest one; "total" and some phases count more than
    `seconds` does."""
    how: str
    """What it ran on, in words."""
    curve: list[BenchPoint]


class BenchSplitRow(Part):
    """One system of `cloister bench split`: medians over the runs."""

    system: Literal["trainer", "central", "fedavg", "split"]
    """trainer: Hugging Face Trainer and PEFT on all data in one place. central: our loop there. fedavg: the silos' own
    Trainers, averaged each round. split: enclave and parties."""
    shape: str
    cut: Annotated[int, Field(ge=1)] | None
    """Former layers, of split."""
    seconds_to_loss: Seconds | None
    """To the target loss; without one, the whole token budget. null: the loss was not reached."""
    seconds: Seconds
    """The whole token budget."""
    seconds_range: tuple[Seconds, Seconds]
    """Least and most."""
    setup_s: Seconds
    train_s: Seconds
    start_s: Seconds
    cpu_s: Seconds
    tokens_per_s: Annotated[float, Field(ge=0)]
    """While training: tokens through `train_s`."""
    peak_rss_mib: dict[str, float]
    """The largest of all runs, see `BenchMeasured`."""
    wire_bytes: Count
    tokens: Count
    steps: Count
    runs: Count
    final_loss: float | None
    """Held-out bits per byte at the end."""
    phases: dict[str, Seconds]
    """Of the first run."""
    how: str
    curve: list[BenchPoint]
    """Of the first run."""


class BenchSplitReport(Versioned):
    """`cloister bench split`."""

    command: str
    shape: str
    """The model in words."""
    parameters: Count
    layers: Count
    dtype: Literal["float32", "bfloat16"]
    workload: dict[str, float]
    """parties, records, tokens (one epoch), epochs, batch_tokens, max_tokens, rounds (of fedavg), rank."""
    target_share: Share
    """Of the training tokens' positions that carry loss."""
    target_loss: float | None
    """Held-out bits per byte that `seconds_to_loss` counts to; null on random weights."""
    clock: str
    """What the clock covers."""
    rows: list[BenchSplitRow]
    ratios: dict[str, float]
    """Of medians, above 1 where split is faster. For each cut N: trainer_over_split_N, central_over_split_N and
    fedavg_over_split_N in seconds (to the loss, where there is one); step_split_N_over_trainer in tokens/s while
    training, step_split_N_over_central likewise, and bound_N = 1 / (1 - N / layers). cpu_trainer_over_split_N and so
    on: of processor time for the whole token budget. What was not measured is left out."""
    host: Host
