#include "train/config_schema.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/printable.h"
#include "kernels/attention.h"
#include "model/attention.h"
#include "model/models.h"
#include "parallel/communicator.h"
#include "parallel/ordered_sum.h"

namespace tforge {

namespace {

constexpr double kMaxTokens = 1e18;                // of a run; they are counted in 64 bits
constexpr std::int64_t kMaxCount = 1'000'000'000;  // of what is counted in 32 bits: ranks, threads, files

struct Check {
  std::string want;
  std::function<bool(double)> ok;
};

Check at_least(std::int64_t low) {
  return {fmt::format("at least {}", low), [low](double v) { return v >= static_cast<double>(low); }};
}
Check between(std::int64_t low, std::int64_t high) {
  return {fmt::format("{} to {}", low, high),
          [=](double v) { return v >= static_cast<double>(low) && v <= static_cast<double>(high); }};
}
Check positive() {
  return {"more than 0", [](double v) { return v > 0 && std::isfinite(v); }};
}
Check not_negative() {
  return {"0 or more", [](double v) { return v >= 0 && std::isfinite(v); }};
}
Check fraction() {
  return {"a fraction from 0 to 1", [](double v) { return v >= 0 && v <= 1; }};
}
Check below_one() {
  return {"from 0 to below 1", [](double v) { return v >= 0 && v < 1; }};
}

/// `member` is a generic lambda from a RunConfig (const or not) to a reference to the member.
template <class Member>
Field number_field(std::string key, FieldType type, Member member, const Check& check, std::string doc) {
  using T = std::remove_cvref_t<decltype(member(std::declval<RunConfig&>()))>;
  Field f{std::move(key), type, std::move(doc), {}, check.want, {}, {}, {}};
  if (check.ok) {
    f.in_range = [ok = check.ok](const FieldValue& v) { return ok(static_cast<double>(std::get<T>(v))); };
  }
  f.get = [member](const RunConfig& c) { return FieldValue(member(c)); };
  f.set = [member](RunConfig& c, const FieldValue& v) { member(c) = std::get<T>(v); };
  return f;
}

template <class Member>
Field integer(std::string key, Member member, const Check& check, std::string doc) {
  return number_field(std::move(key), FieldType::integer, member, check, std::move(doc));
}

template <class Member>
Field real(std::string key, Member member, const Check& check, std::string doc) {
  return number_field(std::move(key), FieldType::real, member, check, std::move(doc));
}

template <class Member>
Field duration(std::string key, Member member, std::string doc) {
  return number_field(std::move(key), FieldType::duration, member, not_negative(), std::move(doc));
}

enum class Text { required, may_be_empty };

template <class Member>
Field text(std::string key, Member member, Text need, std::string doc) {
  Field f{std::move(key), FieldType::text, std::move(doc), {}, "", {}, {}, {}};
  if (need == Text::required) {
    f.want = "a text that is not empty, without control characters";
    f.in_range = [](const FieldValue& v) {
      const auto& given = std::get<std::string>(v);
      return !given.empty() && printable(given) == given;
    };
  }
  f.get = [member](const RunConfig& c) { return FieldValue(member(c)); };
  f.set = [member](RunConfig& c, const FieldValue& v) { member(c) = std::get<std::string>(v); };
  return f;
}

/// `names` in the order of the enumerators, which count from 0.
template <class Member>
Field choice(std::string key, Member member, const std::vector<std::string>& names, std::string doc) {
  using E = std::remove_cvref_t<decltype(member(std::declval<RunConfig&>()))>;
  Field f{std::move(key), FieldType::choice, std::move(doc), names, "", {}, {}, {}};
  f.get = [member, names](const RunConfig& c) { return FieldValue(names[static_cast<std::size_t>(member(c))]); };
  f.set = [member, names](RunConfig& c, const FieldValue& v) {
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (names[i] == std::get<std::string>(v)) member(c) = static_cast<E>(i);
    }
  };
  return f;
}

/// Of an enum of two, the first of which stands for false.
template <class Member>
Field flag(std::string key, Member member, std::string doc) {
  using E = std::remove_cvref_t<decltype(member(std::declval<RunConfig&>()))>;
  Field f{std::move(key), FieldType::flag, std::move(doc), {}, "", {}, {}, {}};
  f.get = [member](const RunConfig& c) { return FieldValue(member(c) == static_cast<E>(1)); };
  f.set = [member](RunConfig& c, const FieldValue& v) { member(c) = static_cast<E>(std::get<bool>(v)); };
  return f;
}

/// A key that some values of another one alone have: models of some kinds, unless told otherwise.
Field only_of(const std::vector<std::string>& owners, Field field, const char* owner = "model.kind") {
  field.doc += fmt::format(" ({})", fmt::join(owners, ", "));
  field.owner = owner;
  field.owners = owners;
  return field;
}
Field only_of(const char* model_kind, Field field) {
  return only_of(std::vector<std::string>{model_kind}, std::move(field));
}
Field only_of_attention(AttentionKind kind, Field field) {
  return only_of({std::string(name_of(kind))}, std::move(field), "model.attention.kind");
}

std::string kind_names() {
  std::string names;
  for (const ModelKind* kind : model_kinds()) names += fmt::format("{}{}", names.empty() ? "" : ", ", kind->name());
  return names;
}

#define MEMBER(path) \
  [](auto& c) -> auto& { return c.path; }

Field token_count(TokenGroup group) {
  return integer(
      fmt::format("model.tokens.{}", name_of(group)),
      [i = static_cast<std::size_t>(group)](auto& c) -> auto& { return c.model.tokens[i]; }, at_least(1),
      fmt::format("parameter tokens of the {} layer of each block", name_of(group)));
}

const char* memory_layers(MemoryGroup group) {
  switch (group) {
    case MemoryGroup::attention: return "q, k and v";
    case MemoryGroup::ffn_in: return "first of the Memory Block";
    case MemoryGroup::ffn_out: return "second of the Memory Block";
  }
  return "?";
}

std::vector<Field> make_fields() {
  const auto norms = {std::string(name_of(PattentionNorm::l2_norm_gelu)),
                      std::string(name_of(PattentionNorm::gelu_l2_norm)),
                      std::string(name_of(PattentionNorm::softmax))};
  std::vector<Field> f;
  f.push_back(text("model.kind", MEMBER(model.kind), Text::required, "architecture: " + kind_names()));
  f.push_back(integer("model.layers", MEMBER(model.layers), at_least(1), "blocks"));
  f.push_back(integer("model.dim", MEMBER(model.dim), at_least(1), "width of the residual stream"));
  f.push_back(integer("model.heads", MEMBER(model.heads), at_least(1), "attention heads; a divisor of model.dim"));
  f.push_back(integer("model.vocab", MEMBER(model.vocab), at_least(0), "vocabulary; 0 takes the dataset's"));
  f.push_back(integer("model.max_seq", MEMBER(model.max_seq), at_least(1), "longest sequence the model is used with"));
  f.push_back(only_of("tokenformer", choice("model.norm", MEMBER(model.norm), norms, "normalisation of Pattention")));
  f.push_back(only_of("transformer", integer("model.ffn_dim", MEMBER(model.ffn_dim), at_least(0),
                                             "neurons of the MLP; 0: 4 * model.dim")));
  f.push_back(only_of({"transformer", "memoryformer"},
                      flag("model.tied", MEMBER(model.head), "the head's weights are the embedding's")));
  f.push_back(only_of({"transformer", "memoryformer"},
                      flag("model.bias", MEMBER(model.biases), "the projections have biases")));
  f.push_back(only_of("memoryformer", choice("model.hash_weight", MEMBER(model.hash_weight), {"p", "l1_times_p"},
                                             "weight of a table's row: of the paper; of its public code")));
  f.push_back(only_of("memoryformer", real("model.temperature", MEMBER(model.temperature), positive(),
                                           "temperature of the weight \"p\"")));
  f.push_back(only_of("memoryformer", integer("model.memory_width", MEMBER(model.memory_width), at_least(0),
                                              "width between the two layers of the Memory Block; 0: "
                                              "model.hash_bits.ffn_out for each chunk of model.dim")));
  f.push_back(only_of("memoryformer", integer("model.table_seed", MEMBER(model.table_seed), at_least(0),
                                              "seed of the permutations of coordinates that tables are added with")));
  f.push_back(only_of("memoryformer", choice("model.stream_norm", MEMBER(model.stream_norm), {"layernorm", "rmsnorm"},
                                             "norm of the residual stream")));
  f.push_back(only_of("memoryformer", real("model.rmsnorm_eps", MEMBER(model.rmsnorm_eps), positive(),
                                           "epsilon of RMSNorm, added to the root")));
  f.push_back(real("model.rotary_fraction", MEMBER(model.rotary_fraction), fraction(),
                   "share of each head's dimensions that rotary embedding turns"));
  f.push_back(real("model.rotary_base", MEMBER(model.rotary_base), positive(), "base of the rotary frequencies"));
  f.push_back(real("model.layernorm_eps", MEMBER(model.layernorm_eps), positive(), "epsilon of LayerNorm"));
  for (const TokenGroup group : kTokenGroups) f.push_back(only_of("tokenformer", token_count(group)));
  const auto by_memory_group = [&](const char* key, auto member, const Check& check, const char* doc) {
    for (const MemoryGroup group : kMemoryGroups) {
      f.push_back(only_of("memoryformer", integer(
                                              fmt::format("model.{}.{}", key, name_of(group)),
                                              [ member, i = static_cast<std::size_t>(group) ](auto& c) -> auto& {
                                                return (c.model.*member)[i];
                                              },
                                              check, fmt::format("{}: {}", doc, memory_layers(group)))));
    }
  };
  by_memory_group("hash_bits", &ModelConfig::hash_bits, between(1, 16), "bits of a hash, whose table has 2^bits rows");
  by_memory_group("tables", &ModelConfig::tables, at_least(0), "tables; 0: one a chunk of the coordinates");
  by_memory_group("chunk_bits", &ModelConfig::chunk_bits, between(0, 16),
                  "bits of a table at birth, the coordinates of a chunk; 0: all bits");
  by_memory_group("weight_bits", &ModelConfig::weight_bits, between(0, 16), "bits that the weight looks at; 0: all");

  std::vector<std::string> attention_kinds;
  for (const AttentionKind kind : kAttentionKinds) attention_kinds.emplace_back(name_of(kind));
  f.push_back(choice("model.attention.kind", MEMBER(model.attention.kind), attention_kinds,
                     "attention between positions; docs/attention.md says what is published of each"));
  f.push_back(only_of_attention(AttentionKind::linformer,
                                integer("model.attention.block", MEMBER(model.attention.block), between(1, kMostBlock),
                                        "positions that are projected together, once all are past")));
  f.push_back(only_of_attention(AttentionKind::linformer,
                                integer("model.attention.slots", MEMBER(model.attention.slots), between(1, kMostBlock),
                                        "projections of a block, for each head")));
  f.push_back(
      only_of_attention(AttentionKind::performer,
                        integer("model.attention.features", MEMBER(model.attention.features), between(0, kMostFeatures),
                                "random features of a head; 0: head_dim ln(head_dim)")));
  f.push_back(only_of_attention(AttentionKind::performer,
                                integer("model.attention.feature_seed", MEMBER(model.attention.feature_seed),
                                        at_least(0), "seed of the random features, which nothing trains")));

  f.push_back(text("data.path", MEMBER(data.path), Text::required, "token dataset written by tf_prepare"));

  f.push_back(integer("train.seq", MEMBER(train.seq), at_least(0), "tokens of a sequence; 0 takes model.max_seq"));
  f.push_back(integer("train.batch", MEMBER(train.batch), at_least(1), "sequences of an update, over all ranks"));
  f.push_back(integer("train.micro_batch", MEMBER(train.micro_batch), at_least(0),
                      "sequences a rank computes at once; 0 takes all of its share of the batch"));
  f.push_back(integer("train.steps", MEMBER(train.steps), at_least(1),
                      "ends the run after this many updates, counted from birth through all growths"));
  f.push_back(integer("train.max_tokens", MEMBER(train.max_tokens), at_least(0),
                      "ends the run after this many tokens, counted likewise; 0 sets no limit"));
  f.push_back(duration("train.max_time", MEMBER(train.max_time),
                       "ends this process, saved, before so long: seconds or \"1h30m\"; 0 sets no limit"));
  f.push_back(real("train.lr", MEMBER(train.lr), positive(), "peak learning rate"));
  f.push_back(choice("train.schedule", MEMBER(train.schedule), {"cosine", "wsd", "constant"},
                     "learning rate after the warm-up: cosine to the floor; flat, then linear to the floor; flat"));
  f.push_back(integer("train.warmup_steps", MEMBER(train.warmup_steps), at_least(0), "updates of linear warm-up"));
  f.push_back(integer("train.decay_steps", MEMBER(train.decay_steps), at_least(0),
                      "updates of the decay; 0: all after the warm-up (cosine), the last tenth (wsd)"));
  f.push_back(real("train.final_lr_fraction", MEMBER(train.final_lr_fraction), fraction(),
                   "floor of the schedule as a fraction of its peak"));
  f.push_back(real("train.beta1", MEMBER(train.beta1), below_one(), "AdamW: decay of the first moment"));
  f.push_back(real("train.beta2", MEMBER(train.beta2), below_one(), "AdamW: decay of the second moment"));
  f.push_back(real("train.eps", MEMBER(train.eps), positive(), "AdamW: epsilon"));
  f.push_back(real("train.weight_decay", MEMBER(train.weight_decay), not_negative(),
                   "AdamW: decoupled decay, of all but norms and biases"));
  f.push_back(
      only_of("memoryformer", choice("train.idle_rows", MEMBER(train.idle_rows), {"update", "skip"},
                                     "AdamW: rows of tables that no token of an update hit are updated like the "
                                     "others, or left as they are, moments and decay included")));
  f.push_back(real("train.clip", MEMBER(train.clip), not_negative(), "bound of the global gradient norm; 0: none"));
  f.push_back(integer("train.eval_every", MEMBER(train.eval_every), at_least(0),
                      "updates between evaluations on the validation split; 0: none"));
  f.push_back(integer("train.eval_tokens", MEMBER(train.eval_tokens), at_least(0),
                      "tokens of such an evaluation; 0: the whole split"));
  f.push_back(integer("train.max_bad_steps", MEMBER(train.max_bad_steps), between(1, kMaxCount),
                      "stops the run after so many non-finite updates in a row; each is skipped"));
  f.push_back(integer("train.seed", MEMBER(train.seed), at_least(0), "seed of initialisation and sample order"));
  f.push_back(
      choice("train.dtype", MEMBER(train.dtype), {"f32", "f64", "bf16"},
             "arithmetic of the model; bf16 (run.device = \"cuda\"): of products, activations and what reads them, "
             "with parameters, moments, sums and row statistics in f32"));
  f.push_back(flag("train.tf32", MEMBER(train.f32_products),
                   "whether a device multiplies f32 with operands rounded to tf32: faster, and off by 2^-11"));
  f.push_back(
      choice("train.recompute", MEMBER(train.saves.recompute), {"none", "scores", "block"},
             "computed again in backward instead of kept, with the same bits: nothing; the scores of Pattention; "
             "all of a block but its input"));
  f.push_back(choice("train.saved_dtype", MEMBER(train.saves.dtype), {"same", "bf16"},
                     "what is kept for backward: in train.dtype, or rounded to bf16 in half the memory"));

  f.push_back(choice("train.growth.schedule", MEMBER(train.growth.schedule), {"restart", "continue"},
                     "after a growth the schedule starts again, over the steps left, or goes on"));
  f.push_back(real("train.growth.restart_peak_fraction", MEMBER(train.growth.restart_peak_fraction), positive(),
                   "peak of a restarted schedule as a fraction of train.lr"));
  f.push_back(choice("train.growth.moments", MEMBER(train.growth.moments), {"keep", "reset"},
                     "moments and ages of old rows at a growth"));
  f.push_back(choice("train.growth.old_rows", MEMBER(train.growth.old_rows), {"train", "freeze", "rate"},
                     "old rows after a growth: trained, frozen, or trained at old_rows_rate"));
  f.push_back(real("train.growth.old_rows_rate", MEMBER(train.growth.old_rows_rate), not_negative(),
                   "learning-rate factor of old rows where old_rows = \"rate\""));
  f.push_back(integer("train.growth.new_rows_warmup_steps", MEMBER(train.growth.new_rows_warmup_steps), at_least(0),
                      "updates of linear warm-up of new rows, over their own age"));

  f.push_back(text("run.dir", MEMBER(run.dir), Text::required, "folder of checkpoints and metrics.jsonl"));
  f.push_back(text("run.name", MEMBER(run.name), Text::may_be_empty, "a name to find the run by"));
  f.push_back(integer("run.save_every", MEMBER(run.save_every), at_least(0),
                      "updates between checkpoints; 0: only at the end"));
  f.push_back(integer("run.keep_last", MEMBER(run.keep_last), between(1, kMaxCount),
                      "checkpoints kept besides the ends of stages"));
  f.push_back(choice("run.save", MEMBER(run.save), {"async", "blocking"},
                     "checkpoints are written beside the training, from a copy in memory, or while it waits"));
  f.push_back(duration("run.save_retry_s", MEMBER(run.save_retry_s),
                       "time after which a save that the disk refused is tried again"));
  f.push_back(integer("run.log_every", MEMBER(run.log_every), at_least(1), "updates between lines of progress"));
  f.push_back(integer("run.threads", MEMBER(run.threads), between(0, kMaxCount),
                      "threads of a rank; 0: cores it may use / ranks on the node"));
  f.push_back(text("run.resume", MEMBER(run.resume), Text::required,
                   "auto: from the latest checkpoint in run.dir; never; or a checkpoint's path"));
  f.push_back(integer("run.expect_ranks", MEMBER(run.expect_ranks), between(0, kMaxCount),
                      "fails at once with another number of ranks; 0: only asks the launcher"));
  f.push_back(choice("run.deterministic", MEMBER(run.deterministic), {"same_layout", "layout_independent"},
                     "what gives the same bits: the same parallel.dp and parallel.tp; or any, at a price"));
  f.push_back(choice("run.device", MEMBER(run.device), {"cpu", "cuda"},
                     "where the model computes: the processors, or an NVIDIA device for each rank"));
  f.push_back(choice("run.products", MEMBER(run.products), {"rule", "measured"},
                     "how a device chooses the algorithm of a matrix product: by cuBLASLt's rule; or by the times of "
                     "several in the first update, kept in run.dir for every later start"));
  f.push_back(number_field("run.grace_s", FieldType::duration, MEMBER(run.grace_s), positive(),
                           "time from SIGTERM to SIGKILL (SLURM: KillWait), in which the run stops"));
  f.push_back(integer("run.max_restarts", MEMBER(run.max_restarts), at_least(0),
                      "restarts that save no new step before the run ends with code 13; 0: any number"));

  f.push_back(integer("parallel.dp", MEMBER(parallel.dp), between(0, kMaxCount),
                      "ranks that share the batch; 0: ranks / parallel.tp"));
  f.push_back(integer("parallel.tp", MEMBER(parallel.tp), between(0, kMaxCount),
                      "ranks that share the parameter tokens; 0: ranks / parallel.dp"));
  f.push_back(choice("parallel.token_shards", MEMBER(parallel.token_shards), {"even", "append"},
                     "borders of parameter tokens: split anew, or added ranks own only added tokens"));
  f.push_back(choice("parallel.reduction", MEMBER(parallel.reduction), {"blocking", "nonblocking", "polled"},
                     "sum of the gradients over dp: after backward; started bucket by bucket while it runs; likewise, "
                     "and helped on after each op; with run.deterministic = \"layout_independent\" the first"));
  f.push_back(real("parallel.bucket_mb", MEMBER(parallel.bucket_mb), positive(),
                   "MiB of gradients that are reduced together while backward runs"));
  f.push_back(integer("parallel.zero", MEMBER(parallel.zero), between(0, 1),
                      "moments of AdamW: 0: on every rank that has the parameter; 1: each on one rank of dp (ZeRO-1)"));
  f.push_back(
      integer("parallel.virtual_dp", MEMBER(parallel.virtual_dp), between(1, kMaxShards),
              "with run.deterministic = \"layout_independent\": shards of the batch, dealt whole to the ranks of "
              "dp; the checkpoint's on resume"));
  f.push_back(integer("parallel.virtual_tp", MEMBER(parallel.virtual_tp), between(1, kMaxShards),
                      "likewise: shards of parameter tokens and vocabulary, dealt to the ranks of tp"));
  f.push_back(duration("parallel.timeout_s", MEMBER(parallel.timeout_s),
                       "longest time of one collective before the job ends with code 12; 0 waits for ever"));
  f.push_back(text("parallel.heartbeat", MEMBER(parallel.heartbeat), Text::required,
                   "how ranks tell rank 0 what they do, so that a hang is named: udp; udp:INTERFACE, over that network "
                   "of rank 0's node; local: not at all"));
  f.push_back(flag("parallel.share_device", MEMBER(parallel.share_device),
                   "whether several ranks may use one device; collectives then go through the host's memory"));
  return f;
}

#undef MEMBER

}  // namespace

std::span<const Field> config_fields() {
  static const std::vector<Field> fields = make_fields();
  return fields;
}

bool Field::belongs_to(const RunConfig& config) const {
  return owners.empty() ||
         std::ranges::find(owners, std::get<std::string>(find_field(owner)->get(config))) != owners.end();
}

const Field* find_field(std::string_view key) {
  for (const Field& field : config_fields()) {
    if (field.key == key) return &field;
  }
  return nullptr;
}

namespace {

/// What run.deterministic = "layout_independent" asks of the other keys.
void validate_virtual_shards(const RunConfig& config) {
  const ParallelConfig& parallel = config.parallel;
  if (config.run.device != Device::cpu) {
    throw ConfigError(
        "run.device = \"{}\": with run.deterministic = \"layout_independent\" it is \"cpu\"; on a device the same "
        "layout gives the same bits",
        name_of(config.run.device));
  }
  if (parallel.reduction != Reduction::blocking) {
    throw ConfigError(
        "parallel.reduction = \"{}\" adds in the order of the ranks; with run.deterministic = \"layout_independent\" "
        "it is \"blocking\"",
        parallel.reduction == Reduction::nonblocking ? "nonblocking" : "polled");
  }
  if (parallel.token_shards == TokenShards::append) {
    throw ConfigError(
        "parallel.token_shards = \"append\": with run.deterministic = \"layout_independent\" shards are cut by the "
        "shapes alone, so it is \"even\"");
  }
  if (parallel.dp > parallel.virtual_dp) {
    throw ConfigError("parallel.dp = {} is more than the parallel.virtual_dp = {} shards that can be dealt",
                      parallel.dp, parallel.virtual_dp);
  }
  if (parallel.tp > parallel.virtual_tp) {
    throw ConfigError("parallel.tp = {} is more than the parallel.virtual_tp = {} shards that can be dealt",
                      parallel.tp, parallel.virtual_tp);
  }
  if (config.train.batch < parallel.virtual_dp) {
    throw ConfigError("train.batch = {} leaves some of parallel.virtual_dp = {} shards without a sequence",
                      config.train.batch, parallel.virtual_dp);
  }
  for (const ShardAxis& axis : kind_of(config.model).axes(config.model)) {
    if (axis.extent < parallel.virtual_tp) {
      throw ConfigError("{} = {} cannot be cut into parallel.virtual_tp = {} shards", axis.key, axis.extent,
                        parallel.virtual_tp);
    }
  }
}

void validate_bf16(const RunConfig& config) {
  const ModelConfig& model = config.model;
  if (config.run.device == Device::cpu) {
    throw ConfigError("train.dtype = \"bf16\" is for run.device = \"cuda\"; on the processor use \"f32\"");
  }
  if (model.kind == "memoryformer") {
    throw ConfigError(
        "train.dtype = \"bf16\": model.kind = \"memoryformer\" computes in f32 or f64: a hash hangs on signs");
  }
  if (config.parallel.share_device == DeviceUse::shared && config.parallel.tp != 1) {
    throw ConfigError(
        "train.dtype = \"bf16\" with parallel.share_device = true is for parallel.tp = 1: the host adds no bf16");
  }
}

/// What there are kernels for on other devices than the processor.
void validate_device(const RunConfig& config) {
  if (config.train.dtype == DType::bf16) validate_bf16(config);
  if (config.train.f32_products == F32Products::tf32 &&
      (config.run.device == Device::cpu || config.train.dtype != DType::f32)) {
    throw ConfigError("train.tf32 = true is for run.device = \"cuda\" and train.dtype = \"f32\"");
  }
  if (config.run.products == Choosing::measured && config.run.device == Device::cpu) {
    throw ConfigError("run.products = \"measured\" is for run.device = \"cuda\"; on the processor use \"rule\"");
  }
  if (config.run.device == Device::cpu) return;
  const std::string_view device = name_of(config.run.device);
  if (const std::int64_t most = kernels::most_head_dim(config.run.device); config.model.head_dim() > most) {
    throw ConfigError(
        "run.device = \"{}\": a head of model.dim = {} and model.heads = {} is {} wide, at most {} are possible there",
        device, config.model.dim, config.model.heads, config.model.head_dim(), most);
  }
}

}  // namespace

void validate(const RunConfig& config) {
  ModelConfig model = config.model;
  if (model.vocab == 0) model.vocab = 1;  // the dataset will tell
  model.validate();
  const TrainConfig& train = config.train;
  if (train.seq > model.max_seq) {
    throw ConfigError("train.seq = {} is longer than model.max_seq = {}", train.seq, model.max_seq);
  }
  if (config.seq() < 2) throw ConfigError("train.seq = {}: at least 2 tokens are needed", config.seq());
  const double tokens =
      static_cast<double>(train.steps) * static_cast<double>(train.batch) * static_cast<double>(config.seq());
  if (tokens > kMaxTokens) {
    throw ConfigError("train.steps = {} of train.batch = {} sequences: {:.3g} tokens, at most {:.3g} are possible",
                      train.steps, train.batch, tokens, kMaxTokens);
  }
  if (train.micro_batch > train.batch) {
    throw ConfigError("train.micro_batch = {} is larger than train.batch = {}", train.micro_batch, train.batch);
  }
  if (train.saves.dtype == SavedDType::bf16 && train.dtype != DType::f32) {
    throw ConfigError("train.saved_dtype = \"bf16\" is for train.dtype = \"f32\", not \"{}\"", name_of(train.dtype));
  }
  if (train.warmup_steps > train.steps) {
    throw ConfigError("train.warmup_steps = {} is more than train.steps = {}", train.warmup_steps, train.steps);
  }
  if (train.decay_steps > train.steps - train.warmup_steps) {
    throw ConfigError("train.decay_steps = {} and train.warmup_steps = {} are together more than train.steps = {}",
                      train.decay_steps, train.warmup_steps, train.steps);
  }
  if (!is_heartbeat_channel(config.parallel.heartbeat)) {
    throw ConfigError("parallel.heartbeat = \"{}\": want \"udp\", \"udp:INTERFACE\" or \"local\"",
                      config.parallel.heartbeat);
  }
  if (config.parallel.dp == 0 && config.parallel.tp == 0) {
    throw ConfigError("parallel.dp = 0 and parallel.tp = 0: one of them can be derived, so give the other");
  }
  validate_device(config);
  if (config.run.deterministic == Determinism::layout_independent) validate_virtual_shards(config);
}

}  // namespace tforge
