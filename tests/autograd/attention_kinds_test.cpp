// Attention other than the softmax over all positions: gradients, causality, and sequences in pieces.
#include <cmath>
#include <cstring>
#include <functional>

#include "autograd/grad_check.h"
#include "autograd/ops/attention.h"
#include "autograd/ops/block_attention.h"
#include "autograd/ops/linear_attention.h"
#include "core/errors.h"
#include "kernels/gemm.h"
#include "support/scratch.h"
#include "values.h"

namespace tforge {
namespace {

using kernels::Features;
using test::error_of;

class AttentionKinds : public testing::Test {
 protected:
  static void SetUpTestSuite() { kernels::start_cpu_runtime(1); }
  Tensor random(const Shape& shape, const char* name, double size = 1) {
    return test::random(allocator_, shape, name, size);
  }
  AttentionFeatures features(Features kind, std::int64_t head_dim) {
    if (kind == Features::relu_cosine) {
      Tensor table = Tensor::empty(allocator_, Shape{200, 2}, DType::f64, Purpose::weights);
      kernels::cosine_features(stream_, table.view());
      return {kind, 2 * head_dim, table};
    }
    constexpr std::int64_t kCount = 9;
    Tensor table =
        Tensor::empty(allocator_, Shape{head_dim, kernels::feature_columns(kCount)}, DType::f64, Purpose::weights);
    kernels::orthogonal_features(stream_, 1, "test", kCount, table.view());
    return {kind, kCount, table};
  }

  /// The functions under test, of [q | k | v] and, for the blocks, E and F.
  struct Kind {
    const char* name;
    std::vector<Tensor> more;
    std::function<Var(Tape&, std::span<const Var>)> attend;
  };
  std::vector<Kind> kinds(std::int64_t batch, std::int64_t heads, std::int64_t head_dim, std::int64_t block = 4) {
    std::vector<Kind> all;
    for (const Features kind : {Features::random_exponential, Features::relu_cosine}) {
      all.push_back({kind == Features::relu_cosine ? "cosformer" : "performer",
                     {},
                     [batch, heads, of = features(kind, head_dim)](Tape& tape, std::span<const Var> in) {
                       return linear_attention(tape, in[0], batch, heads, of);
                     }});
    }
    all.push_back({"linformer",
                   {random(Shape{heads * 2, block}, "keys", 0.5), random(Shape{heads * 2, block}, "values", 0.5)},
                   [batch, heads](Tape& tape, std::span<const Var> in) {
                     return block_attention(tape, in[0], batch, heads, {in[1], in[2]});
                   }});
    return all;
  }

  Allocator allocator_;
  Stream stream_;
};

TEST_F(AttentionKinds, GradientsAreThoseOfDifferences) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kHeadDim = 3;
  for (const std::int64_t seq : {3, 14}) {  // blocks of 4: one that is not complete; three and a half
    for (const Kind& kind : kinds(kBatch, kHeads, kHeadDim)) {
      std::vector<Tensor> inputs = {random(Shape{kBatch * seq, 3 * kHeads * kHeadDim}, "qkv")};
      if (seq < 4 && !kind.more.empty()) {  // E and F take no part, and get no gradient
        const Var keys(kind.more[0]), values(kind.more[1]);
        EXPECT_EQ(grad_check(
                      allocator_, stream_,
                      [&](Tape& tape, std::span<const Var> in) {
                        return block_attention(tape, in[0], kBatch, kHeads, {keys, values});
                      },
                      inputs),
                  "");
        continue;
      }
      inputs.insert(inputs.end(), kind.more.begin(), kind.more.end());
      EXPECT_EQ(grad_check(allocator_, stream_, kind.attend, inputs), "") << kind.name << " of " << seq;
    }
  }
}

TEST_F(AttentionKinds, GradientsOverSeveralChunks) {
  for (const Kind& kind : kinds(1, 1, 2, 30)) {
    std::vector<Tensor> inputs = {random(Shape{140, 6}, "qkv")};
    inputs.insert(inputs.end(), kind.more.begin(), kind.more.end());
    EXPECT_EQ(grad_check(allocator_, stream_, kind.attend, inputs), "") << kind.name;
  }
}

TEST_F(AttentionKinds, TheFutureDoesNotTouchThePast) {
  constexpr std::int64_t kSeq = 140, kColumns = 2 * 5;
  for (const Kind& kind : kinds(1, 2, 5, 12)) {
    for (const std::int64_t cut : {1, 11, 12, 13, 64, 100}) {
      const auto run = [&](Tensor qkv) {
        Tape tape(allocator_, stream_, TapeMode::inference);
        std::vector<Var> in = {Var(std::move(qkv))};
        for (const Tensor& t : kind.more) in.emplace_back(t);
        return kind.attend(tape, in).value();
      };
      Tensor qkv = random(Shape{kSeq, 3 * kColumns}, "qkv");
      const Tensor before = run(qkv.clone(allocator_));
      for (double& x : qkv.span<double>().subspan(static_cast<std::size_t>(cut * 3 * kColumns))) x = 3 - 2 * x;
      const Tensor after = run(std::move(qkv));
      for (std::int64_t r = 0; r < kSeq; ++r) {
        const auto at = static_cast<std::size_t>(r * kColumns);
        const bool same = std::memcmp(&before.span<double>()[at], &after.span<double>()[at], kColumns * 8) == 0;
        ASSERT_EQ(same, r < cut) << kind.name << ": row " << r << " after a change from " << cut;
      }
    }
  }
}

/// The formula in f64, query by query, with the whole list of what it attends to.
TEST_F(AttentionKinds, BlocksFollowTheFormula) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kDim = 3, kSeq = 23, kBlock = 5, kSlots = 2, kColumns = kHeads * kDim;
  const Tensor qkv = random(Shape{kBatch * kSeq, 3 * kColumns}, "qkv");
  const Tensor e = random(Shape{kHeads * kSlots, kBlock}, "e"), f = random(Shape{kHeads * kSlots, kBlock}, "f");
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Tensor out = block_attention(tape, Var(qkv), kBatch, kHeads, {Var(e), Var(f)}).value();
  for (std::int64_t b = 0; b < kBatch; ++b) {
    for (std::int64_t h = 0; h < kHeads; ++h) {
      const auto at = [&](int part, std::int64_t t, std::int64_t c) {
        return qkv
            .span<double>()[static_cast<std::size_t>((b * kSeq + t) * 3 * kColumns + part * kColumns + h * kDim + c)];
      };
      for (std::int64_t i = 0; i < kSeq; ++i) {
        std::vector<std::vector<double>> keys, values;
        const std::int64_t own = i / kBlock;
        for (std::int64_t past = 0; past < own; ++past) {
          for (std::int64_t s = 0; s < kSlots; ++s) {
            std::vector<double> key(kDim), value(kDim);
            for (std::int64_t j = 0; j < kBlock; ++j) {
              const auto weight = static_cast<std::size_t>((h * kSlots + s) * kBlock + j);
              for (std::int64_t c = 0; c < kDim; ++c) {
                key[static_cast<std::size_t>(c)] += e.span<double>()[weight] * at(1, past * kBlock + j, c);
                value[static_cast<std::size_t>(c)] += f.span<double>()[weight] * at(2, past * kBlock + j, c);
              }
            }
            keys.push_back(key);
            values.push_back(value);
          }
        }
        for (std::int64_t j = own * kBlock; j <= i; ++j) {
          keys.push_back({at(1, j, 0), at(1, j, 1), at(1, j, 2)});
          values.push_back({at(2, j, 0), at(2, j, 1), at(2, j, 2)});
        }
        double total = 0;
        std::vector<double> want(kDim);
        for (std::size_t j = 0; j < keys.size(); ++j) {
          double score = 0;
          for (std::int64_t c = 0; c < kDim; ++c) score += at(0, i, c) * keys[j][static_cast<std::size_t>(c)];
          const double weight = std::exp(score / std::sqrt(3.0));
          total += weight;
          for (std::size_t c = 0; c < 3; ++c) want[c] += weight * values[j][c];
        }
        for (std::int64_t c = 0; c < kDim; ++c) {
          ASSERT_NEAR(out.span<double>()[static_cast<std::size_t>((b * kSeq + i) * kColumns + h * kDim + c)],
                      want[static_cast<std::size_t>(c)] / total, 1e-12)
              << "position " << i;
        }
      }
    }
  }
}

/// A block as long as the sequence leaves the exact attention, bit for bit.
TEST_F(AttentionKinds, OneBlockIsTheSoftmax) {
  const Var qkv(random(Shape{2 * 30, 3 * 8}, "qkv"));
  const Var slots(random(Shape{2 * 3, 30}, "e"));
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Tensor exact = causal_attention(tape, qkv, 2, 2).value();
  const Tensor blocks = block_attention(tape, qkv, 2, 2, {slots, slots}).value();
  EXPECT_EQ(std::memcmp(exact.view().data, blocks.view().data, exact.bytes()), 0);
}

TEST_F(AttentionKinds, BlocksInPiecesEqualTheWhole) {
  constexpr std::int64_t kBatch = 2, kHeads = 2, kDim = 7, kSeq = 50, kBlock = 12, kSlots = 3, kColumns = kHeads * kDim;
  const Tensor qkv = random(Shape{kBatch * kSeq, 3 * kColumns}, "qkv");
  const BlockSlots slots{Var(random(Shape{kHeads * kSlots, kBlock}, "e")),
                         Var(random(Shape{kHeads * kSlots, kBlock}, "f"))};
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Tensor whole = block_attention(tape, Var(qkv), kBatch, kHeads, slots).value();
  const Shape memory{kBatch * block_attention_rows(kSeq, kBlock, kSlots), kColumns};
  EXPECT_EQ(memory.rows(), kBatch * (4 * kSlots + kBlock));
  for (const std::int64_t piece : {1, 5, 12, 13, 36, 50}) {
    Tensor keys = Tensor::empty(allocator_, memory, DType::f64, Purpose::activations);
    Tensor values = Tensor::empty(allocator_, memory, DType::f64, Purpose::activations);
    for (double& x : keys.span<double>()) x = std::nan("");
    for (double& x : values.span<double>()) x = std::nan("");
    for (std::int64_t first = 0; first < kSeq; first += piece) {
      const std::int64_t n = std::min(piece, kSeq - first);
      Tensor part = Tensor::empty(allocator_, Shape{kBatch * n, 3 * kColumns}, DType::f64, Purpose::activations);
      for (std::int64_t b = 0; b < kBatch; ++b) {
        std::memcpy(part.rows(b * n, n).view().data, qkv.rows(b * kSeq + first, n).view().data,
                    static_cast<std::size_t>(n * 3 * kColumns) * 8);
      }
      const Tensor got = block_attention_extend(tape, part.view(), kBatch, kHeads, slots, first, keys, values, {});
      for (std::int64_t b = 0; b < kBatch; ++b) {
        ASSERT_EQ(std::memcmp(got.rows(b * n, n).view().data, whole.rows(b * kSeq + first, n).view().data,
                              static_cast<std::size_t>(n * kColumns) * 8),
                  0)
            << "positions from " << first << " in pieces of " << piece;
      }
    }
  }
}

TEST_F(AttentionKinds, ChecksShapes) {
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Var qkv(random(Shape{4, 6}, "qkv"));
  EXPECT_EQ(error_of<ShapeError>([&] { linear_attention(tape, qkv, 3, 1, features(Features::relu_cosine, 2)); }),
            "linear_attention: qkv of shape [4, 6] for 3 sequences and 1 heads");
  EXPECT_EQ(error_of<ShapeError>([&] { linear_attention(tape, qkv, 2, 1, features(Features::relu_cosine, 1)); }),
            "linear_attention_forward: 2 features of a head of 2, want 4");
  const Var e(random(Shape{3, 4}, "e")), f(random(Shape{2, 4}, "f"));
  EXPECT_EQ(error_of<ShapeError>([&] {
              block_attention(tape, qkv, 3, 1, {e, e});
            }),
            "block_attention: qkv of shape [4, 6] for 3 sequences and 1 heads");
  EXPECT_EQ(error_of<ShapeError>([&] {
              block_attention(tape, qkv, 2, 1, {e, f});
            }),
            "block_attention: projections of shape [3, 4] and [2, 4] for 1 heads");
  EXPECT_THROW(block_attention(tape, qkv, 2, 2, {e, e}), ShapeError);
}

}  // namespace
}  // namespace tforge
