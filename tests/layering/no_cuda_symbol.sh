#!/usr/bin/env bash
# no_cuda_symbol.sh NM LIBRARY...: fails when one of the libraries has a symbol of CUDA, or wants one of our CUDA code.
set -euo pipefail
nm=$1
shift
symbols=$("$nm" --demangle "$@")
if grep -E '(^| )[a-zA-Z] (cuda[A-Z]|__cuda|cublas|nccl)| U tforge::(cuda|kernels::cuda)::' <<<"$symbols"; then exit 1; fi
grep -q 'T tforge::kernels::gemm' <<<"$symbols"  # what was looked at did have symbols
