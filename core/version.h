#pragma once
// What this build is. The same string is printed by --version and stored in checkpoints and growth records.
#include <string>

namespace tforge {

/// "0.1.0": the version of the project.
std::string version();

/// The commit that was built, read at build time: twelve digits, "+" when the tree had changes; "unknown" outside
/// a git checkout.
std::string commit();

/// One line: "tokenforge 0.1.0, commit 1234567890ab, GNU 12.2.0 Release, OpenBLAS 0.3.21, Open MPI 4.1.4,
/// HDF5 1.10.8, CUDA none".
std::string version_text();

}  // namespace tforge
