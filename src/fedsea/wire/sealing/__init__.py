"""Sealed payloads: a stream that stays closed to whoever carries it, on top of TLS that may end at a relay.

ends.py       who is at an end: key and certificate, and what the other one shows
handshake.py  a fresh secret with whoever is at the other end: X25519, signed by both certificates' keys
keys.py       every chunk under AES-256-GCM, in its order; keys move forward and are forgotten
pipe.py       both of them between a stream's messages and the transport

Nothing here knows of gRPC or of messages: chunks go in, records come out.
"""
