"""Rewards of conversations, whoever asks for them."""
