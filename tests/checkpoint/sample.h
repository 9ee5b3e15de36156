#pragma once
// A small checkpoint with every kind of tensor, cut over the ranks in different ways, and a folder for all ranks.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/writer.h"
#include "parallel/communicator.h"
#include "support/scratch.h"

namespace tforge::test {

/// One folder for all ranks; rank 0 makes and removes it.
class SharedFolder {
 public:
  explicit SharedFolder(Communicator& world) : world_(world) {
    if (world.rank() == 0) scratch_ = std::make_unique<Scratch>();
    folder_ = world.all_gather_bytes(scratch_ ? scratch_->folder() : "")[0];
  }
  ~SharedFolder() { world_.barrier(); }
  SharedFolder(const SharedFolder&) = delete;
  SharedFolder& operator=(const SharedFolder&) = delete;
  std::string folder() const { return folder_; }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }

 private:
  Communicator& world_;
  std::unique_ptr<Scratch> scratch_;
  std::string folder_;
};

/// Bytes of row `row`: a function of the tensor and the row alone. Valid floats.
inline std::vector<std::byte> sample_row(const CheckpointTensor& t, std::int64_t row) {
  const std::int64_t columns = t.shape.columns();
  std::vector<std::byte> bytes(static_cast<std::size_t>(columns) * size_of(t.dtype));
  for (std::int64_t c = 0; c < columns; ++c) {
    const double value =
        0.25 * static_cast<double>(row) - 3.0 * static_cast<double>(c % 97) + static_cast<double>(t.path.size());
    std::byte* at = bytes.data() + static_cast<std::size_t>(c) * size_of(t.dtype);
    const auto put = [&](auto v) { std::memcpy(at, &v, sizeof v); };
    switch (t.dtype) {
      case DType::f32: put(static_cast<float>(value)); break;
      case DType::f64: put(value); break;
      case DType::bf16: put(bf16(static_cast<float>(value))); break;
      case DType::i32: put(static_cast<std::int32_t>(row * 7 + c)); break;
    }
  }
  return bytes;
}

/// What rank `rank` of `ranks` passes to a save, with the memory behind it.
struct Sample {
  CheckpointContents contents;
  std::vector<std::vector<std::byte>> memory;

  void add(std::string path, DType dtype, Shape shape, std::vector<RowBlock> blocks, Attributes attributes = {}) {
    CheckpointTensor t{std::move(path), dtype, shape, std::move(blocks), std::move(attributes)};
    for (RowBlock& block : t.blocks) {
      std::vector<std::byte>& bytes = memory.emplace_back();
      for (std::int64_t r = 0; r < block.rows; ++r) {
        const std::vector<std::byte> row = sample_row(t, block.first_row + r);
        bytes.insert(bytes.end(), row.begin(), row.end());
      }
      block.data = bytes.data();
    }
    contents.tensors.push_back(std::move(t));
  }
};

inline std::vector<RowBlock> even_block(std::int64_t rows, int rank, int ranks) {
  const std::int64_t first = rows * rank / ranks;
  return {{first, rows * (rank + 1) / ranks - first, nullptr}};
}

enum class Size : std::uint8_t { tiny, three_blocks };

inline Sample sample(int rank, int ranks, Size size, std::int64_t step = 42) {
  Sample s;
  CheckpointContents& c = s.contents;
  c.model_kind = "tokenformer";
  c.code_version = "tokenforge 0.1.0";
  c.parent_uuid = "00000000-0000-4000-8000-000000000000";
  c.step = step;
  c.config = "[model]\nkind = \"tokenformer\"  # größe\n";
  c.tokenizer = {"bytes", "f00d", std::string("\0\1\xfftok", 6)};
  c.state = {{"tokens", std::int64_t{1000}},
             {"seed", std::uint64_t{0xfedcba9876543210U}},
             {"learning_rate", 3e-4},
             {"sampler", std::string("{\"epoch\": 1}")},
             {"counters", std::vector<std::uint64_t>{1, 2, 3}}};
  GrowthRecord record;
  record.stage = 1;
  record.step = 20;
  record.tokens = 500;
  record.layer_group = "ffn";
  record.tokens_before = 16;
  record.tokens_after = 32;
  record.rule = "zero-key";
  record.seed = 7;
  record.scale_before = record.scale_after = 4.0;
  record.parent_uuid = c.parent_uuid;
  record.parent_digest = "0123456789abcdef0123456789abcdef";
  record.probe_error = 1e-15;
  record.layout = "1x2 append";
  record.code_version = c.code_version;
  record.created = "2026-01-31T12:00:00Z";
  c.growth_history.push_back(record);
  record.stage = 2;
  record.layer_group = "qkv";
  record.extra = {{"noise", 0.5}};
  c.growth_history.push_back(record);

  // Interleaved blocks: every rank owns rows r, r + ranks, ...
  std::vector<RowBlock> interleaved;
  for (std::int64_t row = rank; row < 13; row += ranks) interleaved.push_back({row, 1, nullptr});
  s.add("model/layers.0.attention.query.keys", DType::f32, {13, 5}, interleaved,
        {{"scale", 4.0}, {"age_segments", std::vector<std::int64_t>{0, 42, 8, 22}}});
  s.add("optim/layers.0.attention.query.keys/m", DType::f64, {13, 5}, even_block(13, rank, ranks));
  // Replicated: one rank passes it.
  s.add("model/norm.weight", DType::f32, {6},
        rank == ranks - 1 ? std::vector<RowBlock>{{0, 1, nullptr}} : std::vector<RowBlock>{});
  s.add("model/tables", DType::bf16, {2, 3, 4}, even_block(6, rank, ranks));
  s.add("model/counts", DType::i32, {4, 1}, even_block(4, rank, ranks));
  s.add("model/none", DType::f32, {0, 4}, {});
  if (size == Size::three_blocks) s.add("model/wide", DType::f32, {3001, 700}, even_block(3001, rank, ranks));
  return s;
}

}  // namespace tforge::test
