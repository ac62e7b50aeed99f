"""How good toy models are: measured by the oracle of their world."""
