"""Loading models, turning rows into tokens, and running them: all that touches transformers' insides."""
