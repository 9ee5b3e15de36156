// The MemoryFormer on every layout of the ranks: one function, one run, what it sends and what it keeps; and what a
// table's rows see of AdamW.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <set>

#include "core/errors.h"
#include "model/generator.h"
#include "model/memoryformer.h"
#include "support/run_checks.h"

namespace tforge::test {
namespace {

/// Eight tables for q, k and v and for the first layer of the Memory Block, nine for its second: most cannot be split
/// evenly over 2, 3 or 4 ranks.
RunConfig memoryformer(const Lab& lab, DType dtype) {
  RunConfig c = lab.config(dtype);
  c.model.kind = "memoryformer";
  c.model.hash_bits = {4, 4, 5};
  c.model.memory_width = 45;
  c.model.hash_weight = HashWeight::l1_times_p;
  return c;
}

TEST(MemoryFormer, Learns50StepsAlikeOnEveryLayoutInF64) {
  const Lab lab;
  for (const HashWeight weight : {HashWeight::p, HashWeight::l1_times_p}) {
    RunConfig config = memoryformer(lab, DType::f64);
    config.model.hash_weight = weight;
    const bool paper = weight == HashWeight::p;
    config.model.head = paper ? Head::tied : Head::untied;
    config.model.biases = paper ? Biases::none : Biases::all;
    config.model.stream_norm = paper ? StreamNorm::layernorm : StreamNorm::rmsnorm;
    config.train.idle_rows = paper ? IdleRows::update : IdleRows::skip;
    const int steps = paper ? 15 : 50;
    train_and_save(lab, config, steps, lab.path("alone.h5"));
    for (const auto& layout : layouts()) {
      config.parallel.zero = layout.first > 1 && paper ? 1 : 0;
      TinyRun run(config, lab, mesh_of(layout));
      const double first = run.trainer.step().loss;
      const double last = train(run.trainer, steps - 1).back().loss;
      EXPECT_LT(last, first - 0.1) << text_of(layout);
      run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
      expect_close_content(lab.path("layout.h5"), lab.path("alone.h5"), 1e-8);
    }
  }
}

/// What each block gives for some text, [T, d] each.
std::vector<std::vector<double>> blocks_of(TinyRun& run, const Lab& lab) {
  std::vector<std::int32_t> text(64);
  lab.dataset().split(Split::test).copy(0, text.size(), text.data());
  Tape tape(run.allocator, run.stream, TapeMode::inference);
  std::vector<Tensor> blocks;
  run.trainer.model().logits(tape, Tensor::of<std::int32_t>(run.allocator, Shape{64}, text, Purpose::activations), 2,
                             &blocks);
  std::vector<std::vector<double>> values;
  for (const Tensor& block : blocks) values.push_back(values_of(block));
  return values;
}

// A sum in another order may flip a sign, and y jumps there: in f32 only the first step is promised.
TEST(MemoryFormer, FirstStepInF32AndTheShareOfFlippedBits) {
  const Lab lab;
  const RunConfig config = memoryformer(lab, DType::f32);
  TinyRun one(config, lab, alone());
  const std::vector<std::vector<double>> want = blocks_of(one, lab);
  const double loss = one.trainer.step().loss;
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout));
    const std::vector<std::vector<double>> got = blocks_of(run, lab);
    const auto d = static_cast<std::size_t>(config.model.dim);
    std::size_t flipped = 0, bits = 0;
    for (std::size_t b = 0; b < got.size();
         ++b) {  // the norm behind a block, and so the next hash, looks at these signs
      for (std::size_t row = 0; row < got[b].size(); row += d) {
        const auto sign = [&](const std::vector<double>& values, std::size_t i) {
          const auto first = values.begin() + static_cast<std::ptrdiff_t>(row);
          return values[row + i] >= std::accumulate(first, first + static_cast<std::ptrdiff_t>(d), 0.0) / double(d);
        };
        for (std::size_t i = 0; i < d; ++i, ++bits) flipped += sign(got[b], i) != sign(want[b], i) ? 1 : 0;
      }
    }
    const double change = relative(run.trainer.step().loss, loss);
    if (test_world().rank() == 0) {
      std::printf("memoryformer f32 %s: %zu of %zu bits flipped (%.2g), first loss off by %.2g\n",
                  text_of(layout).c_str(), flipped, bits, static_cast<double>(flipped) / static_cast<double>(bits),
                  change);
    }
    EXPECT_LT(change, 1e-4) << text_of(layout);
    EXPECT_LT(flipped, bits / 100);
  }
}

TEST(MemoryFormer, ResumesBitEqual) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    RunConfig config = memoryformer(lab, DType::f32);
    config.model.stream_norm = StreamNorm::rmsnorm;
    config.train.idle_rows = IdleRows::skip;
    config.parallel.zero = layout.first > 1 ? 1 : 0;
    TinyRun whole(config, lab, mesh_of(layout));
    train(whole.trainer, 3);
    whole.trainer.save(test_world(), lab.path("middle.h5"), Retention::rolling);
    train(whole.trainer, 3);
    whole.trainer.save(test_world(), lab.path("whole.h5"), Retention::rolling);
    TinyRun resumed(config, lab, mesh_of(layout), lab.path("middle.h5"));
    train(resumed.trainer, 3);
    resumed.trainer.save(test_world(), lab.path("resumed.h5"), Retention::rolling);
    expect_same_content(lab.path("whole.h5"), lab.path("resumed.h5"));
  }
}

TEST(MemoryFormer, LayoutIndependentRunsGiveTheSameBits) {
  const Lab lab;
  RunConfig config = memoryformer(lab, DType::f32);
  config.run.deterministic = Determinism::layout_independent;
  config.parallel.reduction = Reduction::blocking;
  train_and_save(lab, config, 3, lab.path("alone.h5"));
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout));
    train(run.trainer, 3);
    run.trainer.save(test_world(), lab.path("layout.h5"), Retention::rolling);
    expect_same_content(lab.path("alone.h5"), lab.path("layout.h5"));
  }
}

TEST(MemoryFormer, RecomputesTheSameBits) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    RunConfig config = memoryformer(lab, DType::f32);
    config.train.micro_batch = 2;
    TinyRun kept(config, lab, mesh_of(layout));
    const double want = train(kept.trainer, 3).back().loss;
    for (const Recompute recompute : {Recompute::scores, Recompute::block}) {
      config.train.saves.recompute = recompute;
      TinyRun run(config, lab, mesh_of(layout));
      EXPECT_EQ(train(run.trainer, 3).back().loss, want) << text_of(layout);
    }
    config.train.saves = {Recompute::none, SavedDType::bf16};
    TinyRun rounded(config, lab, mesh_of(layout));
    EXPECT_LT(relative(train(rounded.trainer, 3).back().loss, want), 1e-2) << text_of(layout);
  }
}

TEST(MemoryFormer, SendsWhatTheFormulasSay) {
  const Lab lab;
  for (const auto& layout : layouts()) {
    for (const Determinism mode : {Determinism::same_layout, Determinism::layout_independent}) {
      RunConfig config = memoryformer(lab, DType::f32);
      if (mode == Determinism::layout_independent) config = independent(config);
      else config.train.saves.recompute = Recompute::block;
      config.train.micro_batch = 2;
      TinyRun run(config, lab, mesh_of(layout));
      expect_traffic_of_formula(run, config, text_of(layout));
    }
  }
}

TEST(MemoryFormer, TakesWhatIsRehearsed) {
  const Lab lab;
  for (const Recompute recompute : {Recompute::none, Recompute::block}) {
    for (const SavedDType dtype : {SavedDType::same, SavedDType::bf16}) {
      RunConfig config = memoryformer(lab, DType::f32);
      config.model.layers = 4;
      config.model.dim = 96;
      config.model.memory_width = 0;
      config.model.max_seq = 64;
      config.train.batch = 4;
      config.train.saves = {recompute, dtype};
      for (const auto& layout : layouts()) expect_rehearsed(lab, config, layout, "memoryformer");
    }
  }
}

TEST(MemoryFormer, CachedTokensAreTheRecomputedOnes) {
  const Lab lab;
  const RunConfig config = memoryformer(lab, DType::f64);
  train_and_save(lab, config, 10, lab.path("model.h5"));
  TinyRun run(config, lab, mesh_of(layouts().back()), lab.path("model.h5"));
  std::vector<std::int32_t> prompt(6);
  lab.dataset().split(Split::test).copy(3, prompt.size(), prompt.data());
  GenerateOptions options;
  options.sampling.temperature = 1;
  options.sampling.seed = 5;
  options.tokens = 20;
  options.cache = CacheUse::cached;
  const auto cached = generate(run.trainer.model(), run.allocator, run.stream, prompt, options)[0];
  options.cache = CacheUse::recomputed;
  EXPECT_EQ(cached, generate(run.trainer.model(), run.allocator, run.stream, prompt, options)[0]);
}

TEST(MemoryFormer, IdleRowsWaitWhenTheyAreSkipped) {
  const Lab lab;
  RunConfig config = memoryformer(lab, DType::f64);
  config.model.hash_bits = {8, 8, 9};  // so many rows that most are not hit
  config.train.steps = 4;
  config.train.warmup_steps = 0;
  TinyRun born(config, lab, alone());
  for (const IdleRows idle : {IdleRows::update, IdleRows::skip}) {
    config.train.idle_rows = idle;
    TinyRun run(config, lab, alone());
    train(run.trainer, 2);
    std::size_t as_born = 0, decayed = 0;
    for (const Parameter& p : run.trainer.model().parameters().all()) {
      if (!p.path().ends_with(".tables")) continue;
      const Tensor before = born.trainer.model().parameters().find(p.path()).value();
      for (std::int64_t row = 0; row < p.rows; ++row) {
        const std::vector<double> a = rows_of(before, row, 1), b = rows_of(p.value(), row, 1);
        as_born += a == b ? 1 : 0;
        const double first = b[0] / a[0];
        bool scaled = a != b;
        for (std::size_t i = 0; i < a.size(); ++i) scaled = scaled && std::abs(b[i] / a[i] - first) < 1e-12;
        decayed += scaled ? 1 : 0;
      }
    }
    if (idle == IdleRows::skip) {
      EXPECT_GT(as_born, 1000U);
      EXPECT_LT(decayed, 50U);  // rows that were hit where the gradient is 0
    } else {
      EXPECT_EQ(as_born, 0U);
      EXPECT_GT(decayed, 1000U);
    }
  }
}

// Growth of tables and of bits, on any ranks: exact, with moments and ages where they belong, and it learns at once.
TEST(MemoryFormer, GrowsExactly) {
  const Lab lab;
  RunConfig config = memoryformer(lab, DType::f64);
  train_and_save(lab, config, 6, lab.path("small.h5"));
  ExpandRequest request;
  request.checkpoint = lab.path("small.h5");
  request.output = lab.path("grown.h5");
  request.growth.counts = {{"attention.tables", 11}, {"ffn_out.tables", 12}, {"attention.bits", 5}, {"ffn_in.bits", 6}};
  const ExpandResult result = expand_checkpoint(test_world(), request);
  EXPECT_LT(result.probe_change, 1e-12);
  const CheckpointReader small = CheckpointReader::open(lab.path("small.h5"));
  const CheckpointReader grown = CheckpointReader::open(lab.path("grown.h5"));
  const auto rows = [](const CheckpointReader& reader, const std::string& path) {
    const CheckpointReader::Tensor& t = reader.tensor(path);
    std::vector<double> values(static_cast<std::size_t>(t.shape.elements()));
    reader.read_rows(path, 0, t.shape.rows(), DType::f64, values.data());
    return values;
  };
  for (const std::string& at : {std::string("model/"), std::string("optim/")}) {
    for (const char* end : at == "model/" ? std::vector<const char*>{""} : std::vector<const char*>{"/m", "/v"}) {
      const std::string path = at + "layers.1.attention.key.tables" + end;
      const std::vector<double> a = rows(small, path), b = rows(grown, path);
      ASSERT_EQ(a.size(), 8U * 16 * 32);
      ASSERT_EQ(b.size(), 11U * 32 * 32);
      double largest = 0;
      for (std::size_t i = 0; i < b.size(); ++i) {
        const std::size_t row = i / 32 / 2;
        ASSERT_EQ(b[i], row < 8U * 16 ? a[row * 32 + i % 32] : 0.0) << path << " " << i;
        largest = std::max(largest, std::abs(b[i]));
      }
      EXPECT_GT(largest, 0.0);
    }
  }
  const auto ages = std::get<std::vector<std::int64_t>>(
      grown.tensor("optim/layers.1.attention.key.tables/m").attributes.at("age_segments"));
  EXPECT_EQ(ages, (std::vector<std::int64_t>{0, 6, 0, 8 * 32, 0, 1}));
  EXPECT_EQ(grown.growth_history().size(), 4U);

  // It trains on, on every layout alike, and the new tables are not 0 any more.
  config.train.steps = 20;
  std::vector<double> losses;
  for (const auto& layout : layouts()) {
    TinyRun run(config, lab, mesh_of(layout), lab.path("grown.h5"));
    losses.push_back(train(run.trainer, 3).back().loss);
    EXPECT_LT(relative(losses.back(), losses.front()), 1e-9) << text_of(layout);
    const Parameter& p = run.trainer.model().parameters().find("layers.0.attention.query.tables");
    const std::int64_t first = std::max<std::int64_t>(8 * 32 - p.first_row, 0);
    double largest = 0;
    for (const double v : rows_of(p.value(), std::min(first, p.rows), p.rows - std::min(first, p.rows))) {
      largest = std::max(largest, std::abs(v));
    }
    EXPECT_EQ(largest > 0, first < p.rows) << text_of(layout);
  }

  // Again, from tables whose permutation is there, and with the new bits in the weight: not exact, and it says so.
  request.checkpoint = lab.path("grown.h5");
  request.output = lab.path("again.h5");
  request.growth.counts = {{"attention.tables", 12}, {"attention.bits", 6}};
  request.growth.seed = 7;
  request.growth.rule = "extend-weight";
  const ExpandResult again = expand_checkpoint(test_world(), request);
  EXPECT_GT(again.probe_change, 1e-6);
  const CheckpointReader last = CheckpointReader::open(lab.path("again.h5"));
  const ModelConfig model = parse_config(last.config(), "again").config.model;
  EXPECT_EQ(model.table_seed, 1);
  EXPECT_EQ(model.weight_bits[0], 6);
  EXPECT_EQ(model.chunk_bits[0], 4);
  EXPECT_EQ(last.growth_history().back().rule, "extend-weight");
  EXPECT_EQ(last.growth_history().back().probe_error, again.probe_change);

  for (const char* name : {"attention.tables", "ffn_out.bits", "query"}) {  // to less, or not there
    request.growth.counts = {{name, 3}};
    EXPECT_THROW(expand_checkpoint(test_world(), request), UsageError) << name;
  }
  request.growth.counts = {{"attention.tables", 13}};
  request.growth.rule = "mirror";
  EXPECT_THROW(expand_checkpoint(test_world(), request), UsageError);
}

/// Rank 0 saves what it reads of `from` as `to`, `change` having been made to its contents.
template <class Change>
void save_changed(const Lab& lab, const RunConfig& config, const std::string& from, const std::string& to,
                  const Change& change) {
  on_rank_0([&] {
    const auto self = create_self();
    TinyRun run(config, lab, alone(), from);
    CheckpointContents contents = run.trainer.contents(Retention::rolling);
    change(contents.tensors);
    save_checkpoint(*self, to, contents, OnExisting::replace);
  });
}

std::vector<std::int32_t> stored_permutations(const std::string& checkpoint) {
  const CheckpointReader reader = CheckpointReader::open(checkpoint);
  const CheckpointReader::Tensor& t = reader.tensor("hash/attention");
  std::vector<std::int32_t> values(static_cast<std::size_t>(t.shape.elements()));
  reader.read_rows(t.path, 0, t.shape.rows(), DType::i32, values.data());
  return values;
}

// What added tables look at is what the checkpoint holds, on any ranks and through growth, whatever the seed says.
TEST(MemoryFormer, LooksThroughThePermutationsOfItsCheckpoint) {
  const Lab lab;
  RunConfig config = memoryformer(lab, DType::f64);
  const std::string small = lab.path("small.h5"), grown = lab.path("grown.h5"), other = lab.path("other.h5"),
                    older = lab.path("older.h5"), again = lab.path("again.h5"), damaged = lab.path("damaged.h5");
  train_and_save(lab, config, 3, small);
  EXPECT_EQ(CheckpointReader::open(small).find("hash/attention"), nullptr) << "there are no added tables";
  ExpandRequest request;
  request.checkpoint = small;
  request.output = grown;
  request.growth.counts = {{"attention.tables", 11}};
  request.growth.seed = 7;
  expand_checkpoint(test_world(), request);
  const std::vector<std::int32_t> born = stored_permutations(grown);
  ASSERT_EQ(born.size(), 32U);
  EXPECT_EQ(std::set<std::int32_t>(born.begin(), born.end()).size(), 32U);

  std::vector<std::int32_t> mine(born.rbegin(), born.rend());
  const auto with = [&](std::vector<CheckpointTensor>& tensors, const std::vector<std::int32_t>& values) {
    CheckpointTensor& t = *std::ranges::find(tensors, "hash/attention", &CheckpointTensor::path);
    t.shape = Shape{1, static_cast<std::int64_t>(values.size())};
    t.blocks = {{0, 1, values.data(), Device::cpu}};
  };
  save_changed(lab, config, grown, other, [&](auto& tensors) { with(tensors, mine); });
  save_changed(lab, config, grown, older, [](auto& tensors) {
    std::erase_if(tensors, [](const CheckpointTensor& t) { return t.path == "hash/attention"; });
  });

  config.train.steps = 20;
  const auto trained = [&](const std::string& checkpoint, Mesh mesh, const std::vector<std::int32_t>& want) {
    TinyRun run(config, lab, std::move(mesh), checkpoint);
    EXPECT_EQ(run.trainer.model().state_permutations()[0].values, want);
    const double loss = train(run.trainer, 3).back().loss;
    run.trainer.save(test_world(), lab.path("trained.h5"), Retention::rolling);
    EXPECT_EQ(stored_permutations(lab.path("trained.h5")), want);
    return loss;
  };
  for (const auto& layout : layouts()) {
    const double by_seed = trained(grown, mesh_of(layout), born), by_other = trained(other, mesh_of(layout), mine);
    EXPECT_EQ(trained(older, mesh_of(layout), born), by_seed) << "the seed is all that there was once";
    EXPECT_GT(relative(by_other, by_seed), 1e-9) << text_of(layout);
    static double first = by_other;
    EXPECT_LT(relative(by_other, first), 1e-9) << text_of(layout);
  }

  // 8 tables look through each, so 17 need one more.
  request.checkpoint = other;
  request.output = again;
  request.growth.counts = {{"attention.tables", 17}};
  EXPECT_LT(expand_checkpoint(test_world(), request).probe_change, 1e-12);
  const std::vector<std::int32_t> both = stored_permutations(again);
  ASSERT_EQ(both.size(), 64U);
  EXPECT_TRUE(std::equal(mine.begin(), mine.end(), both.begin()));

  const auto refused = [&]<class E>(const std::vector<std::int32_t>& values, const std::string& says) {
    save_changed(lab, config, grown, damaged, [&](auto& tensors) { with(tensors, values); });
    std::string what;
    try {
      const TinyRun run(config, lab, alone(), damaged);
    } catch (const E& error) {
      what = error.what();
    }
    EXPECT_NE(what.find(says), std::string::npos) << "\"" << what << "\"";
    test_world().barrier();
  };
  std::vector<std::int32_t> wrong = mine;
  wrong[5] = wrong[9];
  refused.operator()<DataError>(wrong, fmt::format("row 0 of hash/attention is no permutation of 0 to 31: {} is there "
                                                   "twice",
                                                   wrong[9]));
  for (const std::int32_t outside : {-1, 32}) {
    wrong[5] = outside;
    refused.operator()<DataError>(wrong, fmt::format("{} is none of them", outside));
  }
  wrong.pop_back();
  refused.operator()<CheckpointError>(wrong,
                                      "hash/attention is i32 [1, 31], the model's configuration says i32 [1, 32]");
}

TEST(MemoryFormer, CountsItsParameters) {
  const Lab lab;
  for (const Biases biases : {Biases::all, Biases::none}) {
    for (const StreamNorm norm : {StreamNorm::layernorm, StreamNorm::rmsnorm}) {
      RunConfig config = memoryformer(lab, DType::f32);
      config.model.biases = biases;
      config.model.stream_norm = norm;
      config.model.head = Head::untied;
      std::int64_t held = 0;
      for (const ParameterSpec& spec : parameter_specs(config.model, ShardPlan::even(config.model, 1))) {
        held += spec.shape.elements();
      }
      EXPECT_EQ(config.model.parameters(), held);
    }
  }
}

TEST(MemoryFormer, AddedTablesAndBitsLookAtOtherCoordinates) {
  ModelConfig config;
  config.kind = "memoryformer";
  config.dim = 24;
  config.hash_bits = {5, 4, 6};
  config.chunk_bits = {4, 0, 0};
  config.tables = {15, 0, 0};  // two permutations beside the first, the last of them not whole
  const StatePermutations others = born_permutations(config, MemoryGroup::attention);
  EXPECT_EQ(others.rows(), 2);
  const std::vector<std::int32_t> c = memory_coordinates(config, MemoryGroup::attention, others, 0, 15);
  const auto at = [&](std::int64_t bit, std::int64_t table) { return c[static_cast<std::size_t>(bit * 15 + table)]; };
  for (std::int64_t number = 0; number < 2; ++number) {
    std::set<std::int32_t> seen;
    for (std::int64_t k = 6 * number; k < 6 * number + 6; ++k) {
      for (std::int64_t bit = 0; bit < 4; ++bit) {
        seen.insert(at(bit, k));
        EXPECT_TRUE(number > 0 || at(bit, k) == 4 * k + bit);
      }
      EXPECT_EQ(at(4, k), at(0, 6 * number + (k + 1) % 6)) << "of the chunk that follows";
    }
    EXPECT_EQ(seen.size(), 24U);
  }
  EXPECT_NE(at(0, 6), at(0, 12));
  // A part of them, as a rank asks for it, and the same whatever there is behind.
  config.tables = {9, 0, 0};
  const StatePermutations fewer = born_permutations(config, MemoryGroup::attention);
  EXPECT_EQ(fewer.rows(), 1);
  const std::vector<std::int32_t> part = memory_coordinates(config, MemoryGroup::attention, fewer, 7, 2);
  for (std::int64_t bit = 0; bit < 5; ++bit) {
    EXPECT_EQ(part[static_cast<std::size_t>(2 * bit)], at(bit, 7));
    EXPECT_EQ(part[static_cast<std::size_t>(2 * bit + 1)], at(bit, 8));
  }
}

}  // namespace
}  // namespace tforge::test
