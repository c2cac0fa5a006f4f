"""Keys, key wrapping, sealed bundles and canonical encoding: thin over pyca/cryptography, no primitive of our own."""
