"""AMD SEV-SNP: reports of confidential virtual machines, signed with a chip's key (VCEK) or a cloud provider's (VLEK).

`Evidence.blob` is the report as the firmware made it (1184 bytes); `Evidence.collateral` is what
`sev_snp_certs.pack_collateral` makes, or the bare certificate. A signature says nothing about debug mode, privilege
level, migration or age of the firmware: those are checks of their own. An SNP guest has no runtime register: what it
runs beyond the launch measurement is in `host_data` or in the launched image itself.

ECDSA signatures have a twin (r, -s): never use a hash of the evidence as an identity.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384

from cloister.attest.appraisal import Appraisal
from cloister.attest.backends.sev_snp_certs import (
    Endorsement,
    check_chain,
    check_revocation,
    check_validity,
    parse_collateral,
)
from cloister.attest.backends.sev_snp_report import (
    DEBUG_ALLOWED,
    MIGRATION_ALLOWED,
    SINGLE_SOCKET,
    SMT_ALLOWED,
    SMT_ENABLED,
    SnpReport,
    Tcb,
    parse_report,
    parse_tcb,
)
from cloister.attest.claims import Report
from cloister.attest.evidence import Evidence
from cloister.attest.rules import SnpRules
from cloister.errors import VerificationError

TYPE = "sev-snp"
NO_CRL = "no revocation list came with the evidence: whether AMD has revoked its intermediate key was not checked"

_NO_MIGRATION_AGENT = b"\xff" * 32


def verify(evidence: Evidence, appraisal: Appraisal) -> Report:
    """Is it a report of AMD hardware that nobody can debug, migrate or read? See `attest.appraisal.Verifier`.

    Raises: VerificationError with code "evidence-format", "collateral", "product", "chain", "expired", "revoked",
        "signing-key", "signature", "chip", "tcb", "debug", "migration", "vmpl" or "guest-policy".
    """
    if evidence.event_log:
        raise VerificationError("evidence-format", "SEV-SNP evidence has no event log")
    with appraisal.checks.step("report format") as step:
        report = parse_report(evidence.blob)
        step.reason = f"version {report.version}, every unused byte is zero"
    with appraisal.checks.step("endorsement format") as step:
        endorsement = parse_collateral(evidence.collateral)
        step.reason = f"a {endorsement.kind.upper()} of the product line {endorsement.product}"
    return verify_report(report, endorsement, appraisal, any_level=appraisal.any_measurement)


def verify_report(snp: SnpReport, endorsement: Endorsement, appraisal: Appraisal, *, any_level: bool) -> Report:
    """The steps after parsing, in this order, for every kind of evidence that contains an SNP report.

    Args:
        any_level: whether it does not matter which privilege level inside the guest asked for the report.
    Raises: as `verify`.
    """
    has_crl = _check_endorsement(snp, endorsement, appraisal)
    checks, rules = appraisal.checks, appraisal.rules.sev_snp
    with checks.step("signing key") as step:
        _check_signing_key(snp, endorsement, rules)
        step.reason = "the report says that this kind of key signed it"
    with checks.step("report signature") as step:
        _check_signature(snp, endorsement)
        step.reason = f"ECDSA P-384 by the {endorsement.kind.upper()} over the report"
    with checks.step("chip") as step:
        step.reason = _check_chip(snp, endorsement)
    with checks.step("firmware versions") as step:
        tcb = _check_tcb(snp, endorsement, rules)
        step.reason = f"the certificate is for exactly the reported versions ({tcb}), none is older than the policy's"
    with checks.step("debug") as step:
        if snp.policy & DEBUG_ALLOWED:
            hint = "start the virtual machine with a guest policy that forbids debugging"
            raise VerificationError("debug", "its operator may read and change the memory: debugging is on", hint=hint)
        step.reason = "the guest policy forbids debugging"
    with checks.step("migration") as step:
        _check_migration(snp)
        step.reason = "no migration agent can move the memory elsewhere"
    with checks.step("privilege level") as step:
        step.reason = _check_privilege(snp, any_level)
    with checks.step("guest policy") as step:
        _check_guest(snp, rules)
        step.reason = "threads, sockets and security version are as the policy wants them"
    return _report(snp, endorsement, has_crl)


def _check_endorsement(snp: SnpReport, endorsement: Endorsement, appraisal: Appraisal) -> bool:
    """Product, chain, validity, revocation. Returns whether there was a revocation list."""
    checks = appraisal.checks
    with checks.step("product") as step:
        step.reason = _check_product(snp, endorsement)
    with checks.step("certificate chain") as step:
        chain = check_chain(endorsement, appraisal.roots)
        step.reason = f"issued by AMD's root for {endorsement.product} and {endorsement.kind.upper()}"
    with checks.step("certificate validity") as step:
        check_validity(endorsement, chain, appraisal.now)
        step.reason = f"valid until {endorsement.valid_until}"
    if endorsement.crl is None:
        return False  # a warning says so: a check that was not made is none that passed
    with checks.step("revocation") as step:
        check_revocation(endorsement, endorsement.crl, chain, appraisal.now)
        step.reason = "AMD's list names none of the certificates"
    return True


def _check_product(snp: SnpReport, endorsement: Endorsement) -> str:
    """Layout and root depend on the product: report and certificate must mean the same one."""
    if snp.cpu is None:
        return f"{endorsement.product} by the certificate; this version of the report does not name the processor"
    family, model = snp.cpu
    product = product_line(family, model)
    if product != endorsement.product:
        hint = "the certificate is for another machine than the report"
        message = f"the report is of {product or 'an unknown product'} (family {family:#x}, model {model:#x})"
        raise VerificationError("product", f"{message}, the certificate of {endorsement.product}", hint=hint)
    return f"{product} by the certificate and by the report"


def product_line(family: int, model: int) -> str | None:
    """Product line of a processor by CPUID, None if it is not known here."""
    if family == 0x19:
        # 0x00-0x0F Milan; 0x10-0x1F Genoa; 0xA0-0xAF Bergamo and Siena, which have Genoa's keys.
        return {0x0: "Milan", 0x1: "Genoa", 0xA: "Genoa"}.get(model >> 4)
    return "Turin" if family == 0x1A and model <= 0x1F else None


def _check_signing_key(snp: SnpReport, endorsement: Endorsement, rules: SnpRules) -> None:
    if snp.chip_key_masked:
        hint = "the operator has masked the chip's key: nothing proves where such a report comes from"
        raise VerificationError("signing-key", "the report is not signed", hint=hint)
    if snp.signing_key != endorsement.kind:
        message = (
            f"the report is signed with {snp.signing_key.upper()}, the certificate is a {endorsement.kind.upper()}"
        )
        raise VerificationError("signing-key", message)
    if endorsement.kind == "vlek" and not rules.vlek:
        hint = "a cloud provider's key does not name the chip; set vlek = true in [sev-snp] to accept it"
        raise VerificationError("guest-policy", "the policy accepts no keys of cloud providers (VLEK)", hint=hint)


def _check_signature(snp: SnpReport, endorsement: Endorsement) -> None:
    try:
        endorsement.public_key.verify(snp.signature, snp.signed, ec.ECDSA(SHA384()))
    except InvalidSignature as exc:
        hint = "the report was changed, or it is of another chip than the certificate"
        raise VerificationError("signature", "the certificate's key did not sign this report", hint=hint) from exc


def _check_chip(snp: SnpReport, endorsement: Endorsement) -> str:
    if endorsement.kind == "vlek":
        return f"any chip of the provider {endorsement.provider}"
    if not any(snp.chip_id):
        raise VerificationError("chip", "the report hides which chip made it (masked chip id)")
    if snp.chip_id != endorsement.chip_id:
        raise VerificationError("chip", "the certificate is for another chip than the report")
    return f"chip {snp.chip_id.hex()[:16]}..., as the certificate says"


def _check_tcb(snp: SnpReport, endorsement: Endorsement, rules: SnpRules) -> Tcb:
    """The certificate's versions are the reported ones; those are installed; none is below the policy's minimum."""
    reported, committed, current, launch = _tcbs(snp, endorsement).values()
    if reported != endorsement.tcb:
        message = f"the report claims firmware ({reported}), the certificate is for ({endorsement.tcb})"
        raise VerificationError("tcb", message, hint="fetch the certificate for the reported versions")
    if not current.is_at_least(reported) or not current.is_at_least(committed):
        message = f"the firmware that runs ({current}) is older than what is reported or committed"
        raise VerificationError("tcb", message)
    if snp.current_firmware < snp.committed_firmware:
        raise VerificationError("tcb", "the firmware that runs is older than the one it is committed to")
    minimum = Tcb(**rules.min_tcb.model_dump())
    # A guest that old firmware has launched may have been changed by then; later updates do not help it.
    for name, tcb in (("reported", reported), ("launch", launch)):
        if not tcb.is_at_least(minimum):
            hint = "the machine's operator has to update its firmware and start the virtual machine anew"
            message = f"the {name} firmware ({tcb}) is older than the policy's minimum ({minimum})"
            raise VerificationError("tcb", message, hint=hint)
    return reported


def _tcbs(snp: SnpReport, endorsement: Endorsement) -> dict[str, Tcb]:
    fields = {
        "reported": snp.reported_tcb,
        "committed": snp.committed_tcb,
        "current": snp.current_tcb,
        "launch": snp.launch_tcb,
    }
    return {name: parse_tcb(raw, endorsement.product) for name, raw in fields.items()}


def _check_migration(snp: SnpReport) -> None:
    if snp.policy & MIGRATION_ALLOWED or snp.report_id_ma != _NO_MIGRATION_AGENT:
        hint = "start the virtual machine with a guest policy that forbids migration agents"
        raise VerificationError("migration", "a migration agent may copy the memory to another machine", hint=hint)


def _check_privilege(snp: SnpReport, any_level: bool) -> str:
    """Only VMPL 0 is what the launch measurement vouches for: it may start programs below it that nobody measured."""
    if snp.vmpl == 0:
        return "asked for from the guest's highest privilege level, VMPL 0"
    if any_level:
        return f"asked for from VMPL {snp.vmpl}, which does not matter to a policy that accepts ANY measurement"
    hint = "ask for the report from VMPL 0, the highest level: what runs at others is not what was measured"
    raise VerificationError("vmpl", f"the report was asked for from privilege level VMPL {snp.vmpl}", hint=hint)


def _check_guest(snp: SnpReport, rules: SnpRules) -> None:
    if not rules.smt and (snp.policy & SMT_ALLOWED or snp.platform_info & SMT_ENABLED):
        hint = "the guest policy must forbid it, and the machine must run without it"
        raise VerificationError("guest-policy", "simultaneous multithreading is on or allowed", hint=hint)
    if rules.single_socket and not snp.policy & SINGLE_SOCKET:
        raise VerificationError("guest-policy", "the guest may run on several sockets")
    if snp.guest_svn < rules.min_guest_svn:
        message = f"the guest's security version is {snp.guest_svn}, the policy wants {rules.min_guest_svn}"
        raise VerificationError("guest-policy", message)


def _report(snp: SnpReport, endorsement: Endorsement, has_crl: bool) -> Report:
    warnings = [] if has_crl else [NO_CRL]
    if snp.vmpl:
        warnings.append(f"VMPL {snp.vmpl} asked for the report: the measured program may not be the one that asked")
    tcb = {f"{name} firmware": str(value) for name, value in _tcbs(snp, endorsement).items()}
    tcb |= {
        "product": endorsement.product,
        "signed with": f"VLEK of {endorsement.provider}" if endorsement.provider else "VCEK",
        "chip": snp.chip_id.hex() if any(snp.chip_id) else "not named",
        "firmware": "{}.{} build {}".format(*snp.current_firmware),
        "guest security version": str(snp.guest_svn),
        "privilege level": f"VMPL {snp.vmpl}",
        "multithreading": "on" if snp.platform_info & SMT_ENABLED else "off",
    }
    return Report(
        type=TYPE,
        report_data=snp.report_data,
        registers={
            "measurement": snp.measurement,
            "host_data": snp.host_data,
            "id_key_digest": snp.id_key_digest,
            "author_key_digest": snp.author_key_digest,
            "family_id": snp.family_id,
            "image_id": snp.image_id,
        },
        hardware=True,
        confidential=True,
        tcb=tcb,
        warnings=tuple(warnings),
    )
