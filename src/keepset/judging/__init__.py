"""Answers, judges, win rates, and preference pairs made of them."""
