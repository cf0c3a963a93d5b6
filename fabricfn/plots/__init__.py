"""Curves of what loggers wrote: `logs` reads them, `terminal` and `pictures` draw them. No torch."""
