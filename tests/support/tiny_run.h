#pragma once
// A model and a corpus so small that a test trains it in a second, on any layout of the ranks at hand.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/reader.h"
#include "data/token_dataset.h"
#include "parallel/mesh.h"
#include "support/corpus.h"
#include "support/mpi_world.h"
#include "support/scratch.h"
#include "train/expand.h"
#include "train/trainer.h"

namespace tforge::test {

/// A folder that all ranks of the test share, with a corpus in it.
class Lab {
 public:
  Lab() {
    if (test_world().rank() == 0) {
      own_.emplace();
      write_corpus();
    }
    folder_ = test_world().all_gather_bytes(own_ ? own_->folder() : std::string())[0];
    dataset_.emplace(path("corpus.h5"));
  }
  Lab(const Lab&) = delete;
  Lab& operator=(const Lab&) = delete;
  ~Lab() { test_world().barrier(); }  // nobody reads any more when rank 0 removes it

  std::string path(const std::string& name) const { return folder_ + "/" + name; }
  const TokenDataset& dataset() const { return *dataset_; }

  /// Four heads, 256 words and five token counts of which most cannot be split evenly over 2 or 3 ranks.
  RunConfig config(DType dtype, PattentionNorm norm = PattentionNorm::l2_norm_gelu) const {
    RunConfig c;
    c.model.layers = 2;
    c.model.dim = 32;
    c.model.heads = 4;
    c.model.vocab = dataset_->vocab();
    c.model.max_seq = 32;
    c.model.tokens = {25, 25, 24, 40, 97};
    c.model.norm = norm;
    c.data.path = dataset_->path();
    c.train.batch = 6;
    c.train.steps = 50;
    c.train.lr = 3e-3;
    c.train.warmup_steps = 5;
    c.train.dtype = dtype;
    c.run.dir = path("run");
    return c;
  }

 private:
  /// Documents of many lengths; among those for validation one of a single token and one of two.
  void write_corpus() const {
    const Tokenizer tokenizer = Tokenizer::bytes();
    TokenDatasetWriter writer(own_->path("corpus.h5"), tokenizer, "generated lines");
    const auto add = [&](Split split, const std::string& text) {
      std::vector<std::int32_t> tokens;
      tokenizer.encode(text, tokens);
      writer.add(split, tokens);
      writer.end_document(split, text.size(), static_cast<std::uint64_t>(std::ranges::count(text, ' ')) + 1);
    };
    for (const Split split : kSplits) {
      const int documents = split == Split::train ? 60 : 8;
      for (int d = 0; d < documents; ++d) {
        std::string text;
        const unsigned seed = 1000U * static_cast<unsigned>(split) + static_cast<unsigned>(d);
        for (const std::string& line : generated_lines(1 + d % 7, seed)) text += line + "\n";
        add(split, text);
      }
    }
    add(Split::validation, "a");
    add(Split::validation, "ab");
    writer.commit();
  }

  std::optional<Scratch> own_;
  std::string folder_;
  std::optional<TokenDataset> dataset_;
};

/// `config` with virtual shards, by default four of each kind.
inline RunConfig independent(RunConfig config, std::int64_t virtual_dp = 4, std::int64_t virtual_tp = 4) {
  config.run.deterministic = Determinism::layout_independent;
  config.parallel.virtual_dp = virtual_dp;
  config.parallel.virtual_tp = virtual_tp;
  config.parallel.reduction = Reduction::blocking;
  return config;
}

/// A mesh of this rank alone.
inline Mesh alone() { return {1, 1, 0, 0, create_self(), create_self()}; }

/// Every dp x tp of the ranks at hand.
inline std::vector<std::pair<int, int>> layouts() {
  std::vector<std::pair<int, int>> all;
  for (int dp = test_world().size(); dp >= 1; --dp) {
    if (test_world().size() % dp == 0) all.emplace_back(dp, test_world().size() / dp);
  }
  return all;
}

inline std::string text_of(std::pair<int, int> layout) { return fmt::format("{}x{}", layout.first, layout.second); }
inline Mesh mesh_of(std::pair<int, int> layout) { return Mesh::create(test_world(), layout.first, layout.second); }

/// A trainer together with what it needs to live.
struct TinyRun {
  TinyRun(const RunConfig& config, const Lab& lab, Mesh its_mesh)
      : mesh(std::move(its_mesh)), trainer(config, lab.dataset(), mesh, allocator, stream) {}
  /// Goes on from a checkpoint, whose model replaces that of `config`.
  TinyRun(RunConfig config, const Lab& lab, Mesh its_mesh, const std::string& checkpoint)
      : mesh(std::move(its_mesh)),
        trainer(with_model_of(std::move(config), checkpoint), lab.dataset(), mesh, allocator, stream,
                CheckpointReader::open(checkpoint)) {}

  static RunConfig with_model_of(RunConfig config, const std::string& checkpoint) {
    config.model = parse_config(CheckpointReader::open(checkpoint).config(), checkpoint).config.model;
    return config;
  }

  Allocator allocator;
  Stream stream;
  Mesh mesh;
  Trainer trainer;
};

inline std::vector<StepResult> train(Trainer& trainer, int steps) {
  std::vector<StepResult> results;
  for (int i = 0; i < steps; ++i) results.push_back(trainer.step());
  return results;
}

/// Rank 0 does `work`, when no rank reads any longer what it may replace; all go on when it is done.
template <class Work>
void on_rank_0(const Work& work) {
  test_world().barrier();
  if (test_world().rank() == 0) work();
  test_world().barrier();
}

/// Saves what `run` holds on this rank alone (the mesh is alone()): rank 0's file, which all ranks may read after this.
inline void save_alone(TinyRun& run, const std::string& path) {
  const auto self = create_self();
  on_rank_0([&] { run.trainer.save(*self, path, Retention::rolling); });
}

/// A checkpoint of a model that rank 0 has trained alone for `steps`.
inline void train_and_save(const Lab& lab, const RunConfig& config, int steps, const std::string& path) {
  on_rank_0([&] {
    const auto self = create_self();
    TinyRun run(config, lab, alone());
    train(run.trainer, steps);
    run.trainer.save(*self, path, Retention::rolling);
  });
}

/// Of a TokenFormer, by TokenGroup; a group of which there are 0 is left out.
inline std::map<std::string, std::int64_t> counts_of(const std::array<std::int64_t, 5>& tokens) {
  std::map<std::string, std::int64_t> counts;
  for (const TokenGroup group : kTokenGroups) {
    const std::int64_t count = tokens[static_cast<std::size_t>(group)];
    if (count > 0) counts[std::string(name_of(group))] = count;
  }
  return counts;
}

/// Rank 0 grows a checkpoint alone. What went wrong there is a failure on rank 0.
inline void expand_alone(const ExpandRequest& request) {
  on_rank_0([&] {
    const auto self = create_self();
    expand_checkpoint(*self, request);
  });
}

inline double relative(double a, double b) { return std::abs(a - b) / std::abs(b); }

/// Rows [first, first + rows) of a parameter-like tensor, as doubles (exact for f32).
inline std::vector<double> rows_of(const Tensor& tensor, std::int64_t first, std::int64_t rows) {
  std::vector<double> values;
  with_compute_type("rows_of", tensor.dtype(), [&](auto zero) {
    const Tensor part = tensor.rows(first, rows);
    for (const auto v : part.span<decltype(zero)>()) values.push_back(static_cast<double>(v));
  });
  return values;
}
inline std::vector<double> values_of(const Tensor& tensor) { return rows_of(tensor, 0, tensor.shape()[0]); }

/// Both checkpoints hold the same bits: tensors with their scales and ages, and counters.
inline void expect_same_content(const std::string& a, const std::string& b) {
  const CheckpointReader x = CheckpointReader::open(a), y = CheckpointReader::open(b);
  ASSERT_EQ(x.tensors().size(), y.tensors().size());
  for (const CheckpointReader::Tensor& t : x.tensors()) {
    const CheckpointReader::Tensor& other = y.tensor(t.path);
    EXPECT_EQ(t.content_digest, other.content_digest) << t.path;
    for (const char* name : {"scale", "age_segments"}) {
      const auto p = t.attributes.find(name), q = other.attributes.find(name);
      ASSERT_EQ(p == t.attributes.end(), q == other.attributes.end()) << t.path << " " << name;
      if (p == t.attributes.end()) continue;
      EXPECT_TRUE(p->second == q->second) << t.path << " " << name;
    }
  }
  for (const char* name : {"step", "tokens", "samples", "schedule_start", "skipped_steps", "growths_applied"}) {
    EXPECT_EQ(state_value<std::int64_t>(x.state(), name), state_value<std::int64_t>(y.state(), name)) << name;
  }
}

}  // namespace tforge::test
