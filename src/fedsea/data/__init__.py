"""Text to tokens; the client only."""
