"""Each TPM command against swtpm."""

from __future__ import annotations

import hashlib
import os
import socket

import pytest

from cloister.errors import TransportError
from cloister.tpm import templates
from cloister.tpm.commands import Tpm, extended, pcr_policy
from cloister.tpm.wire import (
    HT_TRANSIENT,
    RC_INTEGRITY,
    RC_POLICY_FAIL,
    RH_ENDORSEMENT,
    RH_OWNER,
    Command,
    TpmError,
    u32,
)
from tests.tpm.conftest import Swtpm, running
from tests.tpm.extra import Extra, send

pytestmark = pytest.mark.tpm
COUNTER = 0x1500


def loaded(tpm: Tpm) -> int:
    """How many objects are in the TPM."""
    _, response = tpm.run(Command.GET_CAPABILITY, parameters=u32(1) + u32(HT_TRANSIENT << 24) + u32(16))
    response.take(5)
    return response.number(4)


def test_primary_keys_are_the_same_after_a_restart(swtpm: Swtpm) -> None:
    names = []
    for _ in range(2):
        with swtpm.open() as tpm, tpm.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
            assert key.name == b"\0\x0b" + hashlib.sha256(key.public).digest()
            names.append(key.name)
        swtpm.restart()
    assert names[0] == names[1]


def test_another_label_or_tpm_gives_another_key(tpm: Tpm, other_swtpm: Swtpm) -> None:
    names = set()
    for label in ("cloister", "other"):
        with tpm.primary(RH_ENDORSEMENT, templates.attestation_key(label)) as key:
            names.add(key.name)
    with other_swtpm.open() as other, other.primary(RH_ENDORSEMENT, templates.attestation_key()) as key:
        names.add(key.name)
    assert len(names) == 3


def test_endorsement_key_is_made_from_the_standard_template(tpm: Tpm) -> None:
    with tpm.primary(RH_ENDORSEMENT, templates.ENDORSEMENT_KEY) as key:
        assert key.public.startswith(templates.ENDORSEMENT_KEY_START)
        assert len(key.public) == len(templates.ENDORSEMENT_KEY)


def test_nothing_stays_loaded(swtpm: Swtpm) -> None:
    with swtpm.open() as tpm:
        with tpm.primary(RH_OWNER, templates.STORAGE_ROOT_KEY):
            assert loaded(tpm) == 1
        assert loaded(tpm) == 0
        with pytest.raises(KeyError), tpm.primary(RH_OWNER, templates.STORAGE_ROOT_KEY):
            raise KeyError
        assert loaded(tpm) == 0


def test_what_a_dead_client_left_is_flushed(swtpm: Swtpm) -> None:
    """swtpm holds three objects; clients that die at the wrong moment must not use them up."""
    for _ in range(5):
        with swtpm.open() as tpm:
            tpm.create_primary(RH_OWNER, templates.STORAGE_ROOT_KEY)
            tpm.policy_session().__enter__()
    with swtpm.open() as tpm:
        assert loaded(tpm) == 0


def test_startup_is_sent_where_nobody_did() -> None:
    with running(flags="not-need-init") as swtpm, swtpm.open() as tpm:
        assert tpm.pcr_read([0]) == {0: bytes(32)}
        tpm.startup()  # a second time is no error


def test_pcrs(tpm: Tpm) -> None:
    before = tpm.pcr_read(range(24))
    assert list(before) == list(range(24))
    assert before[14] == bytes(32)
    assert before[17] == b"\xff" * 32
    digest = hashlib.sha256(b"event").digest()
    tpm.pcr_extend(14, digest)
    assert tpm.pcr_read(range(24)) == before | {14: extended(bytes(32), digest)}
    with pytest.raises(ValueError, match="32"):
        tpm.pcr_extend(14, b"short")
    with pytest.raises(ValueError, match="0 to 23"):
        tpm.pcr_read([24])


def test_workload_pcr_cannot_be_reset(tpm: Tpm) -> None:
    """Why PCR 14 and not 16 or 23: those any program may set back to zero, and measure something else."""
    for pcr in (14, 16, 23):
        tpm.pcr_extend(pcr, b"d" * 32)
    for pcr in (16, 23):
        send(tpm, Extra.PCR_RESET, (pcr,))
    with pytest.raises(TpmError):
        send(tpm, Extra.PCR_RESET, (14,))
    now = tpm.pcr_read([14, 16, 23])
    assert (now[14] == bytes(32), now[16], now[23]) == (False, bytes(32), bytes(32))


# Sealing --------------------------------------------------------------------------------------------------------------


def test_sealed_data_opens_until_the_pcr_moves(swtpm: Swtpm) -> None:
    secret = os.urandom(128)
    with swtpm.open() as tpm:
        private, public = tpm.seal(secret, tpm.pcr_read([7, 14]))
        assert secret not in private + public
        assert tpm.unseal(private, public, [7, 14]) == secret
        tpm.pcr_extend(14, b"d" * 32)
        with pytest.raises(TpmError) as refused:
            tpm.unseal(private, public, [7, 14])
        assert refused.value.reason == RC_POLICY_FAIL
        assert loaded(tpm) == 0
    swtpm.restart()
    with swtpm.open() as tpm:
        assert tpm.unseal(private, public, [7, 14]) == secret


def test_sealed_data_does_not_open_over_other_pcrs(tpm: Tpm) -> None:
    """PCRs that still have the same values, but are not those that the data was sealed to."""
    private, public = tpm.seal(b"secret", tpm.pcr_read([14]))
    for pcrs in ([13], [13, 14], []):
        with pytest.raises(TpmError) as refused:
            tpm.unseal(private, public, pcrs)
        assert refused.value.reason == RC_POLICY_FAIL


def test_seal_to_what_will_be_measured(tpm: Tpm) -> None:
    digest = b"d" * 32
    private, public = tpm.seal(b"for the next program", {14: extended(bytes(32), digest)})
    with pytest.raises(TpmError):
        tpm.unseal(private, public, [14])
    tpm.pcr_extend(14, digest)
    assert tpm.unseal(private, public, [14]) == b"for the next program"


def test_another_tpm_does_not_open_it(tpm: Tpm, other_swtpm: Swtpm) -> None:
    private, public = tpm.seal(b"secret", tpm.pcr_read([14]))
    with other_swtpm.open() as other, pytest.raises(TpmError) as refused:
        other.unseal(private, public, [14])
    assert refused.value.reason == RC_INTEGRITY


def test_a_weaker_policy_cannot_be_put_in(tpm: Tpm) -> None:
    private, public = tpm.seal(b"secret", tpm.pcr_read([14]))
    weaker = public.replace(pcr_policy(tpm.pcr_read([14])), pcr_policy(tpm.pcr_read([13])))
    assert weaker != public
    with pytest.raises(TpmError) as refused:
        tpm.unseal(private, weaker, [13])
    assert refused.value.reason == RC_INTEGRITY


# Counters -------------------------------------------------------------------------------------------------------------


def test_counter_only_grows(swtpm: Swtpm) -> None:
    with swtpm.open() as tpm:
        tpm.nv_define_counter(COUNTER)
        assert tpm.nv_counter(COUNTER) is None
        first = tpm.nv_increment(COUNTER)
        assert [tpm.nv_increment(COUNTER) for _ in range(3)] == [first + 1, first + 2, first + 3]
    swtpm.restart()
    with swtpm.open() as tpm:
        assert tpm.nv_counter(COUNTER) == first + 3
        # Removing and defining it again does not turn it back.
        tpm.nv_undefine(COUNTER)
        with pytest.raises(TpmError):
            tpm.nv_counter(COUNTER)
        tpm.nv_define_counter(COUNTER)
        assert tpm.nv_increment(COUNTER) > first + 3


# Transport ------------------------------------------------------------------------------------------------------------


def test_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running(port) as swtpm, swtpm.open() as tpm:
        assert tpm.pcr_read([0]) == {0: bytes(32)}


def test_nobody_answers(swtpm: Swtpm) -> None:
    with swtpm.open() as tpm:
        swtpm.stop()
        with pytest.raises(TransportError, match="TPM"):
            tpm.pcr_read([0])
    with pytest.raises(TransportError, match="no software TPM"):
        swtpm.open()


def test_a_refusal_names_command_and_code(tpm: Tpm) -> None:
    with pytest.raises(TpmError, match=r"FLUSH_CONTEXT.*0x1c4"):
        tpm.flush(0x80000007)
