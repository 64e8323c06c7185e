"""Operations on the head's low-resolution logits; each file begins with its equation.

README.md is the lesson. Nothing here imports `common` or the scripts.
"""

from kernels.contrast import memory_contrast
from kernels.cross_entropy import cross_entropy
from kernels.interpolation import set_backend
from kernels.percentile import drop_unreliable, masked_percentile
from kernels.pseudo_label import PseudoLabel, pseudo_label
from kernels.soft_consistency import SoftConsistency, soft_consistency

__all__ = [
    "PseudoLabel",
    "SoftConsistency",
    "cross_entropy",
    "drop_unreliable",
    "masked_percentile",
    "memory_contrast",
    "pseudo_label",
    "set_backend",
    "soft_consistency",
]
