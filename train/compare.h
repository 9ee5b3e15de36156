#pragma once
// Runs a published file (checkpoint/published_file.h) through our model and compares every tensor that it holds.
#include <string>
#include <vector>

#include "core/dtype.h"
#include "parallel/mesh.h"
#include "train/workplace.h"

namespace tforge {

struct TensorError {
  std::string name;  // "hidden/0", "logits", "loss", "grads/<published name>"
  double error = 0;  // max |ours - theirs| / max |theirs| over the whole tensor
};

/// Of any kind of model, as the file says. Computes in `dtype` at `place` on the mesh: the file's sequences are dealt
/// to the dp ranks (3 on 2: 2 and 1; the loss is the mean over all their tokens), parameter tokens, heads and
/// vocabulary to the tp ranks. Every rank returns the same list: hidden states, logits, loss, then the gradients in the
/// order of our parameters. Collective. Throws DataError for a file that is not of this form.
std::vector<TensorError> compare_with_published(const std::string& path, DType dtype, Mesh& mesh, Workplace& place);

}  // namespace tforge
