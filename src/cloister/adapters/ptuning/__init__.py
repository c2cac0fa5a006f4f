"""P-tuning v2 (arXiv 2110.07602): trained keys and values in front of those that a layer's attention computes.

prefix     a prefix as attention takes it, and the perceptron that may compute it
model      the PEFT tuner that gives attention modules prefixes
add        putting them into a model or its latter half, as a job asks
release    what of an adapter is exported
"""

from cloister.adapters.ptuning.model import PrefixedAttention, PTuningConfig, PTuningModel
from cloister.adapters.registry import TunerType, register_tuner

__all__ = ["PTuningConfig", "PTuningModel", "PrefixedAttention"]

register_tuner(TunerType.PTUNING, PTuningConfig, PTuningModel)
