"""The attested session between a party and an enclave, and gRPC as the carrier of its bytes."""
