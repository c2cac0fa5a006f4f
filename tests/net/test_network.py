"""The bad network itself: delays, order, losses and rates are those that are asked for."""

from __future__ import annotations

import pytest

from tests.net.network import Host, Link, Schedule

SIZE = 1000


def host(name: str, link: Link) -> Host:
    return Host(name, "", "", link, -1)


def test_a_busy_way_back_holds_nothing_up() -> None:
    near, far = host("near", Link(delay_s=0.15, jitter_s=0.05)), host("far", Link())
    schedule, now = Schedule(0), 0.0
    for _ in range(100):  # each packet answers the one before, while others come the other way
        for source, target in ((near, far), (far, near)):
            due = schedule.due(source, target, now, SIZE)
            assert due is not None
            assert now + 0.15 <= due <= now + 0.2
        now += 0.01


def test_jitter_keeps_the_order_and_reordering_changes_it() -> None:
    far = host("far", Link())
    for link, kept in ((Link(delay_s=0.1, jitter_s=0.05), True), (Link(delay_s=0.1, reorder=0.25), False)):
        schedule, near = Schedule(0), host("near", link)
        due = [schedule.due(near, far, n / 1000, SIZE) or 0.0 for n in range(400)]
        assert (due == sorted(due)) is kept


def test_one_host_does_not_hold_up_another() -> None:
    schedule, far = Schedule(0), host("far", Link())
    schedule.due(host("slow", Link(delay_s=5.0)), far, 0.0, SIZE)
    assert schedule.due(host("fast", Link(delay_s=0.01)), far, 0.0, SIZE) == 0.01


def test_losses_and_cuts_are_counted() -> None:
    schedule, near, far = Schedule(0), host("near", Link(loss=0.05)), host("far", Link())
    lost = sum(schedule.due(near, far, 0.0, SIZE) is None for _ in range(10_000))
    assert near.dropped == lost == pytest.approx(500, rel=0.2)
    assert (near.carried, far.carried_bytes) == (10_000 - lost, (10_000 - lost) * SIZE)
    near.link.cut = True
    assert schedule.due(far, near, 0.0, SIZE) is None


def test_a_rate_is_kept_each_way_and_its_queue_ends() -> None:
    schedule, near, far = Schedule(0), host("near", Link(bytes_per_s=10_000, queue_s=0.35)), host("far", Link())
    for source, target in ((near, far), (far, near)):
        due = [schedule.due(source, target, 0.0, SIZE) for _ in range(6)]
        assert due[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
        assert due[4:] == [None, None]
