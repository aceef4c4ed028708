"""Bytes: messages, frames, certificates, channels. The only room that imports grpc.

messages.py   what client and server say to each other, as plain dataclasses
codecs.py     how a tensor becomes bytes: fp32, bf16, fp16, int8
frames.py     a message's prefix and protobuf header
limits.py     what a peer may announce
checks.py     a header against those limits, before memory is allocated
buffers.py    memory for received tensors, used again
assembly.py   a payload on its way into that memory
encoding.py   Encoder and Decoder: messages to chunks and back
stream.py     messages over anything that carries chunks
end.py        what both ends can do with theirs
transport.py  method names, gRPC options and deadlines of both ends
address.py    where a server is, and whether a relay stands before it
calls.py      the client's channel, how a stream is let in, and why a call ended
channel.py    the client's stream: `connect`
status.py     the client's calls without a stream: `call_status`, `call_renew`
arrival.py    a stream at the server's port: who brings it, whose it is
session.py    the server's view of one stream
listening.py  where a server may listen
server.py     the server's port: `serve`
errors.py     error codes to gRPC status and to what a peer may read
sealing/      payloads that whoever carries the stream cannot read: for relays where TLS ends
identity/     who is who: certificates, enrolment, revocation, diagnosis
proto/        the header's definition and the code generated from it
"""
