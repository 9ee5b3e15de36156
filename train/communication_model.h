#pragma once
// What a training step sends, as formulas of (dp, tp, shapes, dtype, norm): a pure function, which a test holds
// against the bytes that the communicators count; and what that costs over a given link, as a model.
//
// Letters as in docs/conventions.md; T: rows of a micro-batch of this rank, p: ranks of the axis, e: bytes of an
// element, c_r: columns of the heads of tp rank r. Bytes are those that one rank hands to its collectives.
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/shard_plan.h"
#include "parallel/buckets.h"
#include "parallel/exchange.h"
#include "train/config.h"

namespace tforge {

/// Which rank of which mesh, without a communicator.
struct MeshPlace {
  int dp = 1;
  int tp = 1;
  int dp_index = 0;
  int tp_index = 0;
};

/// All collectives of one training step (without evaluation and checkpoints) on one rank; `buckets` are those of its
/// parameters. An axis of one rank has none. Over dp, once a step:
///   gradients   all_reduce of all of them (with the padding): one call, or one a bucket; with parallel.zero = 1
///               reduce_scatter, one a bucket or one a bucket and owner
///   values      with parallel.zero = 1 all_gather of what this rank owns, one call a bucket; and all_reduce of 16 for
///               the norm
///   rows        all_gather of the looked-up tokens and of their gradients, T (d e + 4), when the lookup is kept apart
///   loss        all_reduce of 8
/// Over tp, of each micro-batch (p = tp), the blocks by their kind (ModelKind::add_block_exchanges), here TokenFormer:
///   lookup      all_reduce of T d e
///   a layer     forward: q, k, v reduce_scatter T 3 d e; heads all_gather T c_r e; proj and ffn all_reduce 2 T d e
///               backward: the inputs of q, k, v and of ffn all_reduce 2 T d e; heads reduce_scatter T d e;
///               q, k, v all_gather T 3 c_r e
///               row numbers (norms, or the maxima of softmax) all_reduce T (3 + 1 + 1) e: forward with l2_norm_gelu
///               and softmax, backward with l2_norm_gelu
///               gelu_l2_norm and softmax: columns beside the values: forward 3 p of q, k, v and 1 of proj and of ffn,
///               backward 3 of q, k, v
///               train.recompute = "block": what forward sends, once more
///   head        all_reduce: of T e (maximum) and 2 T e (sums) in chunks of rows, and T d e backward
/// and once a step of 8 for the norm.
/// With run.deterministic = "layout_independent" every sum is an all_gather of what the k virtual shards of this rank
/// give. Over dp: gradients, k times all of them in pieces of parallel.bucket_mb; loss 8 k; values as above. Over tp:
///   lookup      k T d e
///   a layer     forward: q, k, v k T 3 d e; heads T c_r e; proj and ffn 2 k T d e (gelu_l2_norm and softmax: a column
///               more each); backward: the inputs of q, k, v, of proj and of ffn 3 k T d e; q, k, v T 3 c_r e
///               row numbers k times those above
///   head        k T (1 + 2 + d) e in chunks of rows;   norm 8 k
std::vector<Exchange> step_exchanges(const RunConfig& config, const ShardPlan& plan, std::span<const Bucket> buckets,
                                     const MeshPlace& place);

/// Calls and bytes of an axis.
struct Volume {
  std::int64_t calls = 0;
  std::int64_t bytes = 0;
};
Volume volume_of(std::span<const Exchange> exchanges, MeshAxis axis);

/// A link between ranks: bytes a second that a rank sends while it receives as many, and the seconds of a message.
struct Link {
  double bytes_per_second = 0;
  double latency = 0;
};

/// Seconds of ring collectives over p ranks: an all_reduce of N bytes takes 2 (p-1) (latency + N/p / bandwidth), a
/// reduce_scatter of N half of that, an all_gather of N a rank (p-1) (latency + N / bandwidth).
double ring_seconds(const Exchange& exchange, int ranks, const Link& link);

/// A step as a model predicts it.
struct PredictedStep {
  double communication = 0;  // seconds of all collectives
  double exposed = 0;        // of them, what compute does not hide
};
/// Collectives in line are exposed; of those during backward, what is longer than `backward` seconds, and at least the
/// last of them, which starts when backward ends.
PredictedStep predict(std::span<const Exchange> exchanges, const MeshPlace& place, const Link& link, double backward);

/// The exchanges of this rank as lines of text.
std::string communication_text(std::span<const Exchange> exchanges);

}  // namespace tforge
