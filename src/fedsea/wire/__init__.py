"""Bytes: frames, codecs, certificates, channels. The only room that imports grpc."""
