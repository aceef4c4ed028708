"""The only exit: what leaves a client is made here."""
