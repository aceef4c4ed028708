#!/usr/bin/env bash
# Regenerates src/fedsea/wire/proto/messages_pb2.py and its .pyi from messages.proto.
#
# The generator is pinned, in an environment of its own: generated code refuses to load with an older protobuf runtime
# than the one that it was made for, so a newer generator would raise the "protobuf" floor in pyproject.toml.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "grpcio-tools==1.75.1"  # protoc 31.1: code for protobuf 6.31.1 and later
"$folder/venv/bin/python" -m grpc_tools.protoc \
    --proto_path=src --python_out=src --pyi_out=src src/fedsea/wire/proto/messages.proto
grep -o "Protobuf Python Version: .*" src/fedsea/wire/proto/messages_pb2.py
