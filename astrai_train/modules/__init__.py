"""Objectives, as LightningModules."""

from astrai_train.modules.base import LMModule
from astrai_train.modules.dpo import DPOModule
from astrai_train.modules.grpo import GRPOModule
from astrai_train.modules.seq import SEQModule
from astrai_train.modules.sft import SFTModule
from astrai_train.modules.tokens import TokenModule

__all__ = ["DPOModule", "GRPOModule", "LMModule", "SEQModule", "SFTModule", "TokenModule"]
