"""Runs the guard over broken_tree and compares its whole answer."""
import pathlib
import subprocess
import sys

EXPECTED = """\
core/CMakeLists.txt: kernels is not below core
kernels/faults.h:1: parent-relative include
kernels/faults.h:3: cuda_runtime.h belongs to core/cuda, kernels/cuda, parallel/cuda
kernels/faults.h:4: gtest/gtest.h belongs to tests and bench
kernels/faults.h:5: hdf5.h belongs to storage
kernels/faults.h:6: mpi.h belongs to parallel
kernels/faults.h:8: a header of kernels may not include core
7 faults
"""

run = subprocess.run(sys.argv[1:] + [pathlib.Path(__file__).parent / "broken_tree"], capture_output=True, text=True)
if run.returncode != 1 or run.stdout != EXPECTED:
    sys.exit(f"exit code {run.returncode}, output:\n{run.stdout}{run.stderr}\nexpected:\n{EXPECTED}")
