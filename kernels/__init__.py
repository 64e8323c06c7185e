"""Operations on the head's low-resolution logits; see each file for its equation. Nothing but `step.py`, which
times whole training steps, imports `common` or the scripts.
"""

from kernels.contrast import memory_contrast
from kernels.cross_entropy import cross_entropy
from kernels.percentile import drop_unreliable, masked_percentile
from kernels.pseudo_label import PseudoLabel, pseudo_label

__all__ = ["PseudoLabel", "cross_entropy", "drop_unreliable", "masked_percentile", "memory_contrast", "pseudo_label"]
