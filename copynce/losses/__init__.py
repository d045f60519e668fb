"""Losses: CopyNCE on patch tokens, InfoNCE and KoLeo on descriptors."""

from __future__ import annotations

from copynce.losses.copynce import CopyNCELoss, copynce_loss
from copynce.losses.descriptor import INITIAL_LOG_SCALE, info_nce, koleo

__all__ = ["INITIAL_LOG_SCALE", "CopyNCELoss", "copynce_loss", "info_nce", "koleo"]
