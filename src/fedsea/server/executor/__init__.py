"""Where the engine's jobs run."""
