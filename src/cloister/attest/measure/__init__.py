"""Reference values: what a machine that runs exactly this image will measure, computed before it ever runs.

Every function is pure: bytes in, `Reference` out, or DataError for a malformed file. A `Reference` never claims more
than was computed: registers that cannot be known from the image are `missing`, each with the reason, and the policy
text made from it does not load until somebody has filled them in from a first boot that they trust.

    pe.py      PE files: sections, Authenticode digest          tpm.py     PCR 4, 11, 12 of a unified kernel image
    uki.py     unified kernel images, systemd-stub's order      tdx.py     RTMR 1 to 3; tdvf.py: MRTD of a firmware
    sgx.py     MRENCLAVE, MRSIGNER of a SIGSTRUCT               snp.py     launch digest (library sev-snp-measure)
    nitro.py   PCR 0 to 2 of an enclave image file (EIF)        reference.py   what comes out, as a policy's table
"""

from cloister.attest.measure.reference import Reference

__all__ = ["Reference"]
