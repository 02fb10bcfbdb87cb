"""Training at the edge, through TRL and PEFT: SFT, warm-up with Adam moments, preference training, reward models."""
