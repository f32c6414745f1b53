#!/usr/bin/env bash
# Triton's HTTP endpoint and the gateway, with nothing but curl. Each answer is JSON on a line; streams have events.
#
#   bash examples/with_curl.sh
#   TRITON=http://host:8000 GATEWAY=http://host:8080 GENERATOR=my-model EMBEDDER=my-embedder bash examples/with_curl.sh
set -euo pipefail
TRITON=${TRITON:-http://127.0.0.1:8000}
GATEWAY=${GATEWAY:-http://127.0.0.1:8080}
GENERATOR=${GENERATOR:-smollm2}
EMBEDDER=${EMBEDDER:-minilm}

# --fail-with-body prints the sentence of an error and ends with a status other than 0.
ask() {
    local status=0
    curl --silent --show-error --fail-with-body --no-buffer --header 'content-type: application/json' "$@" || status=$?
    echo
    return "$status"
}

echo "# Triton: is it ready? (an empty body and status 0)"
ask "$TRITON/v2/health/ready"

echo "# Triton: generate, all at once"
ask "$TRITON/v2/models/$GENERATOR/generate" --data '{"text_input": "1, 2, 3, 4,", "max_tokens": 8}'

echo "# Triton: generate, streamed as server-sent events"
ask "$TRITON/v2/models/$GENERATOR/generate_stream" \
    --data '{"text_input": "1, 2, 3, 4,", "max_tokens": 8, "stream": true}'

echo "# Triton: infer, the KServe v2 protocol: one row for each text"
ask "$TRITON/v2/models/$EMBEDDER/infer" --data '{"inputs": [
    {"name": "text_input", "datatype": "BYTES", "shape": [2, 1], "data": ["a cat", "rain"]}]}'

echo "# Gateway: the models"
ask "$GATEWAY/v1/models"

echo "# Gateway: chat"
CHAT='"messages": [{"role": "user", "content": "What is 2 plus 2?"}], "max_tokens": 20'
ask "$GATEWAY/v1/chat/completions" --data "{\"model\": \"$GENERATOR\", $CHAT}"

echo "# Gateway: chat, streamed; the last event is [DONE]"
ask "$GATEWAY/v1/chat/completions" --data "{\"model\": \"$GENERATOR\", \"stream\": true, $CHAT}"

echo "# Gateway: embeddings"
ask "$GATEWAY/v1/embeddings" --data "{\"model\": \"$EMBEDDER\", \"input\": [\"a cat\", \"rain\"]}"

echo "# Gateway: a mistake, whose sentence says what is wrong"
ask "$GATEWAY/v1/embeddings" --data "{\"model\": \"$GENERATOR\", \"input\": \"a cat\"}" || echo "status $?"
