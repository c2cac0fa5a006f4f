"""Any k shares give the key back, fewer do not; a wrong one is put down to its holder."""

from __future__ import annotations

import itertools

import pytest

from cloister.crypto import sharing
from cloister.crypto.sharing import SHARE_BYTES, check_share, combine, commitment, split
from cloister.errors import VerificationError

SECRET = bytes(range(32))


@pytest.mark.parametrize(("quorum", "count"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (5, 5), (20, 300)])
def test_every_quorum_gives_the_secret_back(quorum: int, count: int) -> None:
    shares = split(SECRET, quorum=quorum, count=count)
    assert len(shares) == len(set(shares)) == count
    assert {len(share) for share in shares} == {SHARE_BYTES}
    for chosen in itertools.islice(itertools.combinations(shares, quorum), 12):
        assert combine(chosen, quorum=quorum) == SECRET
        assert combine(chosen[::-1], quorum=quorum) == SECRET
    assert combine(shares, quorum=quorum) == SECRET


def test_fewer_do_not() -> None:
    shares = split(SECRET, quorum=3, count=4)
    with pytest.raises(VerificationError) as error:
        combine(shares[:2], quorum=3)
    assert error.value.code == "share"
    # Two points of a parabola, taken for a line: another secret, in both halves.
    wrong = combine(shares[:2], quorum=2)
    assert wrong[:16] != SECRET[:16]
    assert wrong[16:] != SECRET[16:]


def test_shares_are_drawn_anew_and_halves_apart() -> None:
    first, second = split(bytes(32), quorum=2, count=2), split(bytes(32), quorum=2, count=2)
    assert not set(first) & set(second)
    assert all(share[2:18] != share[18:] for share in first)  # equal halves of a secret have unequal shares


@pytest.mark.parametrize("bad", [b"", bytes(SHARE_BYTES), b"\x00\x01" + bytes(31), b"\x00\x01" + bytes(33)])
def test_what_is_no_share(bad: bytes) -> None:
    good = split(SECRET, quorum=2, count=3)
    with pytest.raises(VerificationError) as error:
        combine([*good[:2], bad], quorum=2)
    assert error.value.code == "share"


def test_one_share_twice_is_one() -> None:
    share = split(SECRET, quorum=2, count=2)[0]
    for again in (share, share[:2] + bytes(32)):
        with pytest.raises(VerificationError):
            combine([share, again], quorum=2)


@pytest.mark.parametrize(("quorum", "count"), [(0, 1), (3, 2), (1, sharing.MAX_SHARES + 1)])
def test_numbers_that_cannot_be(quorum: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot share"):
        split(SECRET, quorum=quorum, count=count)
    with pytest.raises(ValueError, match="cannot share"):
        split(SECRET[1:], quorum=1, count=1)


def test_a_wrong_share_is_its_holders() -> None:
    share = split(SECRET, quorum=2, count=2)[0]
    expected = commitment(share, b"job, instance, north")
    check_share(share, b"job, instance, north", expected, holder="north")
    for at in range(SHARE_BYTES):
        altered = share[:at] + bytes([share[at] ^ 1]) + share[at + 1 :]
        with pytest.raises(VerificationError) as error:
            check_share(altered, b"job, instance, north", expected, holder="north")
        assert (error.value.code, error.value.where) == ("share", "north")
    for wrong in (b"", share[:-1], share + b"\x00"):
        with pytest.raises(VerificationError):
            check_share(wrong, b"job, instance, north", commitment(wrong, b"job, instance, north"), holder="north")
    with pytest.raises(VerificationError):  # of another instance, or another party's
        check_share(share, b"job, instance, south", expected, holder="north")
