"""What every layer may use: checks of arguments, torch's process settings, keyed random numbers."""
