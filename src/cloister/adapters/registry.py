"""Making tuners of ours known to PEFT, so that `get_peft_model` and `PeftModel.from_pretrained` work with them.

PEFT names its tuners by the members of an enum of strings, which nobody can add to, but its tables are looked up with
what a configuration holds: a string of ours is as good a key. Plain PEFT, without this package, refuses such a name.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner


class TunerType(StrEnum):
    """What configurations of our tuners have for `peft_type`. transformers asks it for its `value`, as PEFT's own."""

    PTUNING = "CLOISTER_PTUNING"
    SPF = "CLOISTER_SPF"


def register_tuner(name: TunerType, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Enter a tuner under the name that its configuration has for `peft_type`."""
    # Not at the top: `import peft` registers our tuners at its end, and might have been started from here.
    from peft import mapping

    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = config  # type: ignore[index]  # see above
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = tuner  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = tuner.prefix  # type: ignore[index]
