"""The adversary, offline: attacks on what a client released, and how they are judged."""
