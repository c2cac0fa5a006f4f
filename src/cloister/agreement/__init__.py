"""What the parties agree to, in signed form: the job, the manifest of its bundles, the release of data keys."""

from cloister.agreement.manifest import Manifest
from cloister.agreement.signing import (
    APPROVAL_LABEL,
    KEYS_LABEL,
    MANIFEST_LABEL,
    approval_message,
    keys_message,
    wrap_info,
)

__all__ = [
    "APPROVAL_LABEL",
    "KEYS_LABEL",
    "MANIFEST_LABEL",
    "Manifest",
    "approval_message",
    "keys_message",
    "wrap_info",
]
