#!/usr/bin/env bash
# Serves a LLaVA-VR checkpoint over HTTP, with vLLM's OpenAI server. docs/serving.md says how to install it.
#   examples/serve.sh [MODEL] [options of vLLM]      MODEL: folder or Hub name (default: this repository)
#   examples/serve.sh
#   examples/serve.sh path/to/a/checkpoint --port 8001 --tensor-parallel-size 2
# $PYTHON names the interpreter of vLLM's environment (default: python). --trust-request-mm-kwargs lets a client choose
# its number of image tokens; LLaVA-VR takes no other option of a request.
set -euo pipefail
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
model=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
  model=$1
  shift
fi
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server \
  --model "$model" --trust-remote-code --trust-request-mm-kwargs "$@"
