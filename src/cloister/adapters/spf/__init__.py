"""SPF (Sparsification Parameter Fine-tuning): train chosen rows of the base's own weights, beside LoRA.

Our reading of arXiv 2401.09796: in each layer the heads of q, k and v and the rows of the MLP's input projections are
ranked, the best `ratio` of them become trainable, everything else stays frozen, and LoRA sits on the attention output
projection. Storage, gradient and optimiser state exist for chosen rows only (as in S2FT, arXiv 2412.06289).

    config      what the user chooses
    rows        which rows of a module form a head, and of what
    rank        scores of rows, and the choice by them
    product     a product with a weight some rows of which are trainable
    layer       a linear module with trainable rows and LoRA
    model       the PEFT tuner that puts all this into a model
"""

from cloister.adapters.registry import TunerType, register_tuner
from cloister.adapters.spf.config import SPFConfig
from cloister.adapters.spf.layer import SPFLayer
from cloister.adapters.spf.model import SPFModel
from cloister.adapters.spf.rank import gradient_norms

__all__ = ["SPFConfig", "SPFLayer", "SPFModel", "gradient_norms"]

register_tuner(TunerType.SPF, SPFConfig, SPFModel)
