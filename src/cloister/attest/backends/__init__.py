"""One module per kind of TEE: `collect` on the machine itself, and a pure `verify` that needs no TEE.

A backend adds its verifier to `attest.verify.VERIFIERS` and its attester to `attest.attester`.
"""
