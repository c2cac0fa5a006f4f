"""Remote attestation (RATS, RFC 9334): collect evidence, verify it, appraise it against the relying party's policy."""
