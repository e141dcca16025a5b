"""Pre-training."""

from astrai_train.modules.tokens import TokenModule


class SEQModule(TokenModule):
    """Learns the next token of running text: every token is a label."""
