#!/usr/bin/env bash
# A session of the HTTP API, with curl: the server keeps the text, each request sends what is new.
# Usage: http_session.sh [URL of the server]
set -euo pipefail
api="${1:-http://localhost:5000}/api/v1"

session_id=$(curl -sS "$api/open_inference_session?max_length=256" | sed -n 's/.*"session_id":"\([^"]*\)".*/\1/p')
trap 'curl -sS "$api/close_inference_session?session_id=$session_id"' EXIT

generate() {
    curl -sS "$api/generate" -d "session_id=$session_id" -d max_new_tokens=8 "$@"
    echo
}
generate --data-urlencode "inputs=My name is Ada."
generate    # without inputs, the text goes on
generate --data-urlencode "inputs= And what is yours?"
