"""Operations on the head's low-resolution logits; see each file for its equation. Nothing here imports `common`."""

from kernels.cross_entropy import cross_entropy
from kernels.pseudo_label import PseudoLabel, pseudo_label

__all__ = ["PseudoLabel", "cross_entropy", "pseudo_label"]
