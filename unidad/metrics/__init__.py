"""Scores of drawn pictures: `features` turns pictures into numbers, `distances` compares them, `evaluate` puts both together.

Nothing here trains, and nothing here is needed for training.
"""
