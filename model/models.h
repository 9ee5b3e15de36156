#pragma once
// The kinds of models there are. A kind is a class derived from LanguageModel and an object derived from ModelKind,
// both in files of its own; models.cpp lists the objects, and nothing else names one (docs/adding_a_model.md).
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/saved.h"
#include "model/config.h"
#include "model/growth.h"
#include "model/language_model.h"
#include "model/parameter.h"
#include "model/shard_plan.h"
#include "parallel/exchange.h"

namespace tforge {

/// Where a share of a model stands, and the pass that is asked about.
struct BlockPass {
  int tp = 1;
  int tp_rank = 0;
  DType dtype = DType::f32;
  SavePolicy saves;
  std::int64_t rows = 0;  // T of a micro-batch
};

/// A part of a block or of a whole model.
struct ModelPart {
  std::string name;
  std::int64_t parameters = 0;
  double multiply_adds = 0;  // forward, for one token
};

/// What there is to know about the models of one kind without making one.
class ModelKind {
 public:
  virtual ~ModelKind() = default;
  /// model.kind
  virtual std::string_view name() const = 0;
  /// Throws ConfigError naming the key for what the kind's own numbers must not be; the common ones are valid.
  virtual void validate(const ModelConfig& config) const = 0;
  virtual std::vector<ShardAxis> axes(const ModelConfig& config) const = 0;
  /// The parameters of a block; their paths begin with "layers.<layer>.".
  virtual std::vector<ParameterSpec> block_specs(const ModelConfig& config, const ShardPlan& plan,
                                                 std::int64_t layer) const = 0;
  /// Whether rows of its weights are cut by attention heads: then virtual shards are of whole heads as well.
  virtual bool weights_by_heads() const = 0;
  virtual std::unique_ptr<LanguageModel> make(const ModelPlace& place) const = 0;
  /// Throws UsageError for what the kind cannot grow by, and when nothing grows.
  virtual std::unique_ptr<Growth> growth(const ModelConfig& before, const GrowthRequest& request) const = 0;
  /// The projections of one block (attention between positions, embedding, final norm and head are common).
  virtual std::vector<ModelPart> block_parts(const ModelConfig& config) const = 0;
  /// What the blocks of a micro-batch send over tp, by formula, which a test holds against the counted bytes.
  virtual void add_block_exchanges(Exchanges& to, const ModelConfig& config, const ShardPlan& plan,
                                   const BlockPass& pass) const = 0;
};

/// For ModelKind::validate(): throws ConfigError when blocks of so many parameters make a model of more than 1e15. Up
/// to that, sizes in bytes and what is computed on the way to them fit into 64 bits.
void check_size(const ModelConfig& config, double of_block);

std::span<const ModelKind* const> model_kinds();
/// Throws ConfigError naming the kinds when config.kind is none of them.
const ModelKind& kind_of(const ModelConfig& config);

/// All parameters of a model: embedding, blocks, final norm, and the head when it is not tied.
std::vector<ParameterSpec> parameter_specs(const ModelConfig& config, const ShardPlan& plan);

/// Parameters are allocated and zero; see LanguageModel::initialise. `tp`, allocator and stream outlive the model.
/// Throws ConfigError when the configuration is not valid.
std::unique_ptr<LanguageModel> make_model(Allocator& allocator, Stream& stream, const ModelConfig& config, DType dtype,
                                          Communicator& tp, const ShardPlan& plan);

}  // namespace tforge
