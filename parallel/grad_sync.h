#pragma once
// What the ranks of a job do with gradients after, and while, backward runs.
#include <span>
#include <vector>

#include "autograd/var.h"
#include "core/allocator.h"
#include "core/tensor.h"
#include "parallel/buckets.h"
#include "parallel/communicator.h"

namespace tforge {

/// How gradients are summed over dp. blocking: all at once after backward. nonblocking: each bucket is started when its
/// last gradient is final, and all are waited for after backward. polled: likewise, and MPI, which moves data only
/// inside its own calls, is called after every op of backward.
enum class Reduction : std::uint8_t { blocking, nonblocking, polled };

/// Where the sums are complete: on every rank of dp, or each on the rank that owns it (Bucket::borders).
enum class Sums : std::uint8_t { everywhere, at_owner };

/// Sums the gradients of this rank's parameters, one flat tensor, over the ranks that hold the same shard.
/// The gradients are then those of the global batch, since each rank's loss is divided by all target tokens.
///
/// It is the GradHook of the parameters and of the tape. A step calls begin() before the last backward pass whose
/// gradients it adds, and finish() after it; outside of that the hooks do nothing.
class GradSync final : public GradHook {
 public:
  /// `dp` outlives this object. `flat` is shared with the parameters' gradients; f32 or f64, contiguous. `buckets` are
  /// started in the order given, which should be the one in which backward finishes them: a bucket that is ready
  /// before one that stands before it waits, so that all ranks start them in one order whatever happens.
  GradSync(Communicator& dp, Tensor flat, std::vector<Bucket> buckets, Reduction reduction,
           Sums sums = Sums::everywhere);

  /// The backward pass that follows completes the gradients.
  void begin(Stream& stream);
  void gradient_ready(int parameter_id) override;
  void node_done() override;
  /// Starts what was not, and waits. When this returns, the sums are complete on every rank, with the same bits, or
  /// this rank's own are and the others' places hold nothing of use. The bits are those of every run with the same
  /// ranks, the same Reduction and the same Sums. Collective over dp.
  void finish(Stream& stream);
  /// After an update: with Sums::at_owner each rank has updated what it owns of `values`, which lie like the gradients,
  /// and gets the rest from its owners. Otherwise nothing is to do. Collective over dp.
  void gather(Stream& stream, const Tensor& values);
  const std::vector<Bucket>& buckets() const { return buckets_; }

 private:
  void start_ready(Stream& stream);
  void set_counts(const Bucket& bucket);

  Communicator& dp_;
  Tensor flat_;
  std::vector<Bucket> buckets_;
  Reduction reduction_;
  Sums sums_;
  std::vector<std::size_t> bucket_of_;  // by parameter
  std::vector<int> missing_;            // parameters of each bucket that are not ready
  std::size_t started_ = 0;             // buckets, counted from the first
  Stream* stream_ = nullptr;            // between begin and finish
  std::vector<std::int64_t> counts_;    // of the bucket that is scattered or gathered, by rank
};

/// Keeps the gradient of looked-up rows apart from that of the table. In a tied model the head's gradient of the whole
/// table is ready when backward begins, and the lookup adds a few rows to it when backward ends. Kept apart, the table
/// is reduced at the beginning, and at the end the ranks exchange only the rows:
///   dtable[token, :] += sum over ranks, and over the rank's tokens t = token, of dh[t, :]     in that order
/// so that every rank has the same bits.
class LookupSync {
 public:
  /// rows[r]: the rows that dp rank r looks up in the last micro-batch of a step. Holds [sum of rows, columns] of
  /// `dtype`, and a token each.
  LookupSync(Allocator& allocator, Communicator& dp, std::vector<std::int64_t> rows, std::int64_t columns, DType dtype);

  /// `h` (this rank's rows of the table, looked up with `tokens` and complete over tp) as a value whose gradient is
  /// kept here.
  Var leaf(const Tensor& h, const Tensor& tokens);
  /// After the backward pass of leaf(): adds the rows of all ranks to `dtable`, whose first row is row `first_row` of
  /// the whole table; rows of other shards are left out. Collective over dp.
  void finish(Stream& stream, std::int64_t first_row, TensorView dtable);

  /// Whether exchanging `rows` rows (all ranks together) at the end of backward moves fewer bytes there than reducing a
  /// table of `table_rows` rows: all-gather moves (p-1)/p of the rows and their tokens, a ring all-reduce 2 (p-1)/p of
  /// the table.
  static bool pays(std::int64_t rows, std::int64_t table_rows, std::int64_t columns, DType dtype);
  /// Bytes that are held for `rows` rows of all ranks together.
  static std::int64_t bytes(std::int64_t rows, std::int64_t columns, DType dtype);

 private:
  Allocator& allocator_;
  Communicator& dp_;
  std::vector<std::int64_t> rows_, elements_;  // by rank
  Tensor tokens_, gradients_;                  // of all ranks
  Tensor own_tokens_, own_gradients_;          // this rank's part of them
  Var leaf_;
};

/// The norm of all gradients of the model, each logical element counted once, the same number on every rank of `tp`:
///   sqrt(sum over tp of sharded_squares + replicated_squares of rank 0)
/// sharded_squares: sum of squares of the rows that this rank alone owns (differs between the ranks of tp);
/// replicated_squares: of the parameters that every rank of tp holds in full (the same on all of them, up to the order
/// of addition). Both in f64, after GradSync::finish. A non-finite element anywhere gives a non-finite norm everywhere.
/// Collective.
double global_norm(Stream& stream, Communicator& tp, double sharded_squares, double replicated_squares);

}  // namespace tforge
