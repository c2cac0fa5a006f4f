"""The enclave process: collects sealed bundles, trains the latter layers, scores, releases, answers queries."""
