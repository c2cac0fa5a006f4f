"""A TPM 2.0 client in plain Python: bytes to a device and back, and the commands that attestation and sealing need."""
