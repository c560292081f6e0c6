"""Header-only modules that the extensions are compiled from; nothing here is importable from Python."""
