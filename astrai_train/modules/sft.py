"""Instruction tuning."""

from astrai_train.modules.tokens import TokenModule


class SFTModule(TokenModule):
    """Learns the assistant's tokens of conversations; the labels of all others are ignored."""
