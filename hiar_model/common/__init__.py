"""Used by all layers: checks of arguments, environment variables, torch's global settings, keyed random numbers."""
