"""Objectives, as LightningModules."""

from astrai_train.modules.base import LMModule
from astrai_train.modules.seq import SEQModule
from astrai_train.modules.sft import SFTModule

__all__ = ["LMModule", "SEQModule", "SFTModule"]
