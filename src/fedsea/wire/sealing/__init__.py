"""Sealed payloads: a stream that stays closed to whoever carries it, on top of TLS that may end at a relay.

handshake.py  who is at the other end, and a fresh secret with it: X25519, signed by both certificates' keys
keys.py       every chunk under AES-256-GCM, in its order; keys move forward and are forgotten
pipe.py       both of them between a stream's messages and the transport

Nothing here knows of gRPC or of messages: chunks go in, records come out.
"""
