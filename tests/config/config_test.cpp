// Configuration: what a wrong file or override is answered with, and that what is printed reads back.
#include "train/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <filesystem>
#include <functional>

#include "support/source_file.h"
#include "train/config_schema.h"

namespace tforge {
namespace {

/// The least that is a configuration: ten lines of which tests replace or add some.
const std::string kMinimal =
    "[model]\n"
    "layers = 2\n"
    "dim = 32\n"
    "heads = 4\n"
    "max_seq = 16\n"
    "[data]\n"
    "path = \"d.h5\"\n"
    "[run]\n"
    "dir = \"r\"\n"
    "[train]\n";  // line 10

LoadedConfig parse(const std::string& more, const std::vector<std::string>& overrides = {}) {
  return parse_config(kMinimal + more, "c.toml", overrides);
}

/// The message of the ConfigError that `f` throws; its exit code is 2.
std::string complaint(const std::function<void()>& f) {
  try {
    f();
  } catch (const ConfigError& error) {
    EXPECT_EQ(error.code(), ExitCode::bad_input);
    EXPECT_EQ(static_cast<int>(error.code()), 2);
    const std::string what = error.what();
    EXPECT_EQ(what.find('\n'), std::string::npos) << "an error is one line";
    return what;
  }
  ADD_FAILURE() << "no ConfigError";
  return "";
}

std::string complaint_of(const std::string& more, const std::vector<std::string>& overrides = {}) {
  return complaint([&] { parse(more, overrides); });
}

TEST(Config, DefaultsHold) {
  const RunConfig c = parse("").config;
  EXPECT_EQ(c.model.dim, 32);
  EXPECT_EQ(c.model.vocab, 0);
  EXPECT_EQ(c.seq(), 16);
  EXPECT_EQ(c.train.schedule, ScheduleKind::cosine);
  EXPECT_EQ(c.train.lr, 6e-4);
  EXPECT_EQ(c.parallel.token_shards, TokenShards::even);
  EXPECT_EQ(c.parallel.bucket_mb, 4);
  EXPECT_EQ(c.parallel.zero, 0);
}

TEST(Config, EveryKindOfValueIsRead) {
  const RunConfig c = parse(
                          "seq = 8\nlr = 1\nmax_time = \"1h30m\"\nschedule = \"wsd\"\ndtype = \"f64\"\n"
                          "recompute = \"block\"\n"
                          "growth = { schedule = \"continue\", moments = \"reset\", old_rows = \"rate\" }\n"
                          "[model.tokens]\nffn = 7\n[parallel]\ntoken_shards = \"append\"\nzero = 1\ntimeout_s = 2.5\n"
                          "reduction = \"polled\"\n")
                          .config;
  EXPECT_EQ(c.seq(), 8);
  EXPECT_EQ(c.train.lr, 1.0);
  EXPECT_EQ(c.train.max_time, 5400.0);
  EXPECT_EQ(c.train.schedule, ScheduleKind::wsd);
  EXPECT_EQ(c.train.dtype, DType::f64);
  EXPECT_EQ(c.train.saves, (SavePolicy{Recompute::block, SavedDType::same}));
  EXPECT_EQ(c.train.growth.schedule, GrowthSchedule::continues);
  EXPECT_EQ(c.train.growth.moments, OldMoments::reset);
  EXPECT_EQ(c.train.growth.old_rows, OldRows::rate);
  EXPECT_EQ(c.model.num_tokens(TokenGroup::ffn), 7);
  EXPECT_EQ(c.parallel.token_shards, TokenShards::append);
  EXPECT_EQ(c.parallel.zero, 1);
  EXPECT_EQ(c.parallel.timeout_s, 2.5);
  EXPECT_EQ(c.parallel.reduction, Reduction::polled);
}

TEST(Config, MisspeltKeyNamesPlaceAndNearest) {
  EXPECT_EQ(complaint_of("  warmup_step = 3\n"),
            "c.toml:11:3: unknown key train.warmup_step; did you mean `train.warmup_steps`?");
}

TEST(Config, UnknownKeyWithoutNeighbour) {
  EXPECT_EQ(complaint_of("flavour_of_the_day = 3\n"), "c.toml:11:1: unknown key train.flavour_of_the_day");
}

TEST(Config, KeyInTheWrongSection) {
  EXPECT_EQ(complaint_of("threads = 2\n"), "c.toml:11:1: unknown key train.threads; did you mean `run.threads`?");
}

TEST(Config, UnknownSectionEvenWhenEmpty) {
  EXPECT_EQ(complaint_of("[paralel]\ntp = 2\n"), "c.toml:12:1: unknown key paralel.tp; did you mean `parallel.tp`?");
  EXPECT_NE(complaint_of("[nothing]\n").find("unknown key nothing"), std::string::npos);
}

TEST(Config, WrongTypesNameLineAndColumn) {
  EXPECT_EQ(complaint_of("lr = \"fast\"\n"), "c.toml:11:6: train.lr is a string, want a number");
  EXPECT_EQ(complaint_of("steps = 1e3\n"), "c.toml:11:9: train.steps is a floating-point number, want an integer");
  EXPECT_EQ(complaint_of("schedule = 3\n"), "c.toml:11:12: train.schedule is an integer, want a string");
  EXPECT_EQ(complaint_of("steps = [1]\n"), "c.toml:11:9: train.steps is an array, want an integer");
  EXPECT_EQ(complaint_of("batch = true\n"), "c.toml:11:9: train.batch is a boolean, want an integer");
  EXPECT_EQ(complaint_of("growth = 1\n"),
            "c.toml:11:1: train.growth is a section; its keys are given below [train.growth]");
  EXPECT_EQ(complaint_of("lr = { peak = 1 }\n"), "c.toml:11:6: train.lr is a table, want a number");
}

TEST(Config, OutOfRangeAndUnknownChoice) {
  EXPECT_EQ(complaint_of("lr = -1.0\n"), "c.toml:11:6: train.lr = -1.0: want more than 0");
  EXPECT_EQ(complaint_of("lr = inf\n"), "c.toml:11:6: train.lr = inf: want more than 0");
  EXPECT_EQ(complaint_of("clip = nan\n"), "c.toml:11:8: train.clip = nan: want 0 or more");
  EXPECT_EQ(complaint_of("beta2 = 1.0\n"), "c.toml:11:9: train.beta2 = 1.0: want from 0 to below 1");
  EXPECT_EQ(complaint_of("schedule = \"cosin\"\n"),
            "c.toml:11:12: train.schedule = \"cosin\": want one of \"cosine\", \"wsd\", \"constant\"; did you mean "
            "`cosine`?");
  EXPECT_EQ(complaint_of("max_time = \"1x\"\n"),
            "c.toml:11:12: train.max_time = \"1x\" is no duration: want seconds, or hours, minutes and seconds like "
            "\"1h30m\"");
}

TEST(Config, TomlMistakesNameThePlace) {
  const std::string what = complaint_of("lr = = 3\n");
  EXPECT_EQ(what.rfind("c.toml:11:6: ", 0), 0U) << what;
  EXPECT_EQ(complaint_of("lr = 1.0\nlr = 2.0\n").rfind("c.toml:12:", 0), 0U);
}

TEST(Config, TheFirstMistakeIsReported) {
  EXPECT_EQ(complaint_of("seed = \"x\"\nbatch = \"y\"\n"), "c.toml:11:8: train.seed is a string, want an integer");
}

TEST(Config, HeadsThatDoNotDivide) {
  const std::string what =
      complaint([] { parse_config("[model]\nheads = 3\ndim = 32\n[data]\npath=\"d\"\n[run]\ndir=\"r\"\n", "c.toml"); });
  EXPECT_EQ(what, "c.toml:2:9: model.heads = 3 does not divide model.dim = 32; choose a divisor of 32");
}

TEST(Config, OddRotaryWidth) {
  const std::string what = complaint_of("", {"model.rotary_fraction=0.4"});  // int(0.4 * 8) = 3
  EXPECT_EQ(what.rfind("--set model.rotary_fraction: model.rotary_fraction = 0.4 rotates 3 of the 8 dimensions", 0), 0U)
      << what;
}

TEST(Config, ContradictionsBetweenKeys) {
  EXPECT_EQ(complaint_of("seq = 17\n"), "c.toml:11:7: train.seq = 17 is longer than model.max_seq = 16");
  EXPECT_EQ(complaint_of("micro_batch = 17\n"), "c.toml:11:15: train.micro_batch = 17 is larger than train.batch = 16");
  EXPECT_EQ(complaint_of("steps = 5\nwarmup_steps = 6\n"),
            "c.toml:12:16: train.warmup_steps = 6 is more than train.steps = 5");
  EXPECT_EQ(complaint_of("dtype = \"f64\"\nsaved_dtype = \"bf16\"\n"),
            "c.toml:12:15: train.saved_dtype = \"bf16\" is for train.dtype = \"f32\", not \"f64\"");
}

TEST(Config, RequiredKeys) {
  EXPECT_EQ(complaint([] { parse_config("[run]\ndir = \"r\"\n", "c.toml"); }),
            "c.toml: data.path is missing: token dataset written by tf_prepare");
}

TEST(Config, MissingFile) {
  EXPECT_EQ(complaint([] { load_config("/no/such/file.toml"); }),
            "/no/such/file.toml: cannot be read: No such file or directory");
  EXPECT_EQ(complaint([] { load_config("/"); }).rfind("/: cannot be read", 0), 0U);
}

TEST(Config, WhatWouldOverflowOrNestTooDeepIsRefused) {
  const std::string most = "9223372036854775807";
  for (const char* key : {"model.layers", "model.dim", "model.max_seq", "model.vocab", "model.tokens.ffn",
                          "train.steps", "train.batch", "train.decay_steps", "run.keep_last", "parallel.tp"}) {
    const std::string what = complaint_of("", {fmt::format("{}={}", key, most), "model.heads=1"});
    EXPECT_NE(what.find(key), std::string::npos) << what;
  }
  EXPECT_EQ(
      complaint_of("", {"model.layers=1000000000", "model.dim=1000000000", "model.heads=1"}),
      "--set model.layers: model.layers = 1000000000 of model.dim = 1000000000: 2.05e+21 parameters, at most 1e+15 "
      "are possible");
  std::string deep = "a";
  for (int i = 0; i < 100'000; ++i) deep += ".a";
  EXPECT_EQ(complaint_of(deep + " = 1\n"), "c.toml: 100001 dots, want at most 2000");
  EXPECT_EQ(complaint_of("# " + std::string(300'000, 'x')), "c.toml: 300098 bytes, want at most 262144");
  // As deep as it may be: walked and destroyed without trouble.
  EXPECT_NE(complaint_of(deep.substr(0, 2 * 1990 + 1) + " = 1\n").find("unknown key"), std::string::npos);
}

TEST(Config, Overrides) {
  const RunConfig c = parse("lr = 1.0\n", {"train.lr=3e-4", "train.schedule=wsd", "run.dir=out/a b", "train.seed = 7",
                                           "train.max_time=2m", "run.name=\"q\"", "train.max_tokens=1_000"})
                          .config;
  EXPECT_EQ(c.train.lr, 3e-4);
  EXPECT_EQ(c.train.schedule, ScheduleKind::wsd);
  EXPECT_EQ(c.run.dir, "out/a b");
  EXPECT_EQ(c.run.name, "q");
  EXPECT_EQ(c.train.seed, 7);
  EXPECT_EQ(c.train.max_time, 120.0);
  EXPECT_EQ(c.train.max_tokens, 1000);
}

TEST(Config, BadOverrides) {
  EXPECT_EQ(complaint_of("", {"train.lr"}), "--set train.lr: want KEY=VALUE, for example --set train.lr=3e-4");
  EXPECT_EQ(complaint_of("", {"train.l=3"}), "--set train.l: unknown key train.l; did you mean `train.lr`?");
  EXPECT_EQ(complaint_of("", {"train.lr=fast"}), "--set train.lr=fast: train.lr is a string, want a number");
  EXPECT_EQ(complaint_of("", {"train.steps=1.5"}),
            "--set train.steps=1.5: train.steps is a floating-point number, want an integer");
  EXPECT_EQ(complaint_of("", {"train.steps="}), "--set train.steps=: train.steps is a string, want an integer");
  EXPECT_EQ(complaint_of("", {"train.batch=0"}), "--set train.batch=0: train.batch = 0: want at least 1");
  EXPECT_EQ(complaint_of("", {"train=3"}), "--set train: train is a section; its keys are given below [train]");
}

TEST(Config, OverrideCannotSmuggleInASecondKey) {
  EXPECT_EQ(complaint_of("", {"train.steps=1\nw=2"}), "--set \"train.steps=1\\nw=2\": want one line");
}

TEST(Config, ResolvedTextReadsBackAsTheSameBits) {
  LoadedConfig loaded = parse("");
  RunConfig& c = loaded.config;
  // Every field gets a value that is not its default, through the table itself.
  for (const Field& field : config_fields()) {
    if (!field.belongs_to(c)) continue;
    const FieldValue old = field.get(c);
    if (std::holds_alternative<double>(old)) {
      field.set(c, field.key == "train.lr" ? 0.1 + 0.2 : std::get<double>(old) / 3 + 1e-13);
    } else if (field.type == FieldType::choice) {
      field.set(c, field.choices.back());
    } else if (field.key == "run.name") {
      field.set(c, std::string("quote \" backslash \\ tab \t line \n umlaut \xc3\xa4"));
    } else if (field.key == "train.seed") {
      field.set(c, (std::int64_t{1} << 60) + 1);
    }
  }
  c.model.rotary_fraction = 0;                     // as "cosformer" wants it,
  c.run.device = Device::cpu;                      // and this
  c.train.dtype = DType::f64;                      // bf16 is a device's
  c.train.saves.dtype = SavedDType::same;          // bf16 is for f32 alone
  c.run.products = Choosing::rule;                 // measured ones too
  c.run.deterministic = Determinism::same_layout;  // the other does not go with "polled" and "append"
  const RunConfig back = parse_config(to_toml(c), "checkpoint").config;
  for (const Field& field : config_fields()) EXPECT_EQ(field.get(back), field.get(c)) << field.key;
  EXPECT_EQ(to_toml(back), to_toml(c));
  EXPECT_EQ(std::bit_cast<std::uint64_t>(back.train.lr), std::bit_cast<std::uint64_t>(0.1 + 0.2));
  EXPECT_TRUE(diff(back, c).empty());
}

TEST(Config, ATransformersTextReadsBack) {
  const std::vector<std::string> asked = {"model.kind=transformer", "model.ffn_dim=100", "model.tied=false",
                                          "model.bias=false"};
  const RunConfig c = parse("", asked).config;
  EXPECT_EQ(c.model.head, Head::untied);
  EXPECT_EQ(c.model.biases, Biases::none);
  const std::string text = to_toml(c);
  EXPECT_EQ(text.find("model.tokens"), std::string::npos);
  EXPECT_NE(text.find("tied = false\n"), std::string::npos);
  EXPECT_EQ(parse_config(text, "checkpoint").config.model, c.model);
}

TEST(Config, AMemoryFormersTextReadsBack) {
  const std::vector<std::string> asked = {"model.kind=memoryformer",      "model.dim=96",
                                          "model.hash_bits.ffn_in=6",     "model.tables.attention=13",
                                          "model.hash_weight=l1_times_p", "train.idle_rows=skip"};
  const RunConfig c = parse("", asked).config;
  EXPECT_EQ(c.model.hash_bits, (std::array<std::int64_t, 3>{8, 6, 10}));
  EXPECT_EQ(c.model.tables, (std::array<std::int64_t, 3>{13, 0, 0}));
  EXPECT_EQ(c.model.hash_weight, HashWeight::l1_times_p);
  EXPECT_EQ(c.train.idle_rows, IdleRows::skip);
  const RunConfig back = parse_config(to_toml(c), "checkpoint").config;
  EXPECT_EQ(back.model, c.model);
  EXPECT_EQ(back.train.idle_rows, IdleRows::skip);
  EXPECT_NE(
      complaint_of("", {"model.kind=memoryformer", "model.dim=100"}).find("chunks of 8 coordinates do not divide"),
      std::string::npos);
  EXPECT_NE(
      complaint_of("", {"model.kind=memoryformer", "model.tables.ffn_in=3"}).find("coordinates in chunks of 8 need "),
      std::string::npos);
  EXPECT_NE(
      complaint_of("", {"model.kind=memoryformer", "model.weight_bits.ffn_in=9"}).find("model.weight_bits.ffn_in"),
      std::string::npos);
}

TEST(Config, KeysOfAnotherKindOfModelAreRefused) {
  EXPECT_EQ(complaint_of("", {"model.kind=transformer", "model.tokens.ffn=3"}),
            "--set model.tokens.ffn: model.tokens.ffn is a key of model.kind = \"tokenformer\", and model.kind is "
            "\"transformer\"; remove the one or change the other");
  EXPECT_EQ(complaint_of("", {"model.tied=true"}),
            "--set model.tied: model.tied is a key of model.kind = \"transformer\" or \"memoryformer\", and "
            "model.kind is \"tokenformer\"; remove the one or change the other");
  EXPECT_EQ(complaint_of("", {"model.kind=transfromer"}),
            "--set model.kind: model.kind = \"transfromer\": there is \"tokenformer\", \"transformer\", "
            "\"memoryformer\"; did you mean `transformer`?");
}

TEST(Config, TableHasEachKeyOnceAndSectionsTogether) {
  std::vector<std::string> sections;
  for (const Field& field : config_fields()) {
    EXPECT_EQ(find_field(field.key), &field) << field.key << " twice";
    EXPECT_FALSE(field.doc.empty());
    const std::string section = field.key.substr(0, field.key.rfind('.'));
    if (sections.empty() || sections.back() != section) {
      EXPECT_EQ(std::count(sections.begin(), sections.end(), section), 0) << section << " is in two pieces";
      sections.push_back(section);
    }
    EXPECT_NE(config_reference().find("| `" + field.key + "` |"), std::string::npos);
  }
}

TEST(Config, DiffNamesOldAndNew) {
  const RunConfig a = parse("").config;
  const RunConfig b = parse("lr = 0.5\n", {"run.name=x"}).config;
  EXPECT_EQ(diff(a, b), (std::vector<std::string>{"train.lr: 0.0006 -> 0.5", "run.name: \"\" -> \"x\""}));
}

TEST(Config, ResumeTakesTheCheckpointsModel) {
  RunConfig stored = parse("").config;
  stored.model.vocab = 97;
  stored.model.tokens = {9, 9, 9, 9, 30};  // grown since the file was written
  const RunConfig c = resumed(stored, parse("lr = 0.5\n"));
  EXPECT_EQ(c.model, stored.model);
  EXPECT_EQ(c.train.lr, 0.5);
  EXPECT_EQ(diff(stored, c), (std::vector<std::string>{"train.lr: 0.0006 -> 0.5"}));
}

TEST(Config, ResumeRefusesAContradiction) {
  RunConfig stored = parse("").config;
  stored.model.tokens[4] = 30;
  const std::string rest = "; remove the key, or start a new run in another run.dir (tf_expand makes a model larger)";
  EXPECT_EQ(complaint([&] { resumed(stored, parse("[model.tokens]\nffn = 20\n")); }),
            "c.toml:12:7: model.tokens.ffn = 20 contradicts the checkpoint, which has 30" + rest);
  stored.model.layers = 3;
  EXPECT_EQ(complaint([&] { resumed(stored, parse("")); }),
            "c.toml:2:10: model.layers = 2 contradicts the checkpoint, which has 3" + rest);
  EXPECT_EQ(complaint([&] { resumed(stored, parse("", {"model.layers=4"})); }),
            "--set model.layers: model.layers = 4 contradicts the checkpoint, which has 3" + rest);
}

TEST(Config, DevicesHaveKernelsForSomeModels) {
  EXPECT_NO_THROW(parse("", {"run.device=cuda", "model.attention.kind=performer"}));
  EXPECT_EQ(complaint_of("", {"train.dtype=bf16"}),
            "--set train.dtype: train.dtype = \"bf16\" is for run.device = \"cuda\"; on the processor use \"f32\"");
  EXPECT_EQ(parse("", {"train.dtype=bf16", "run.device=cuda", "model.norm=softmax"}).config.train.dtype, DType::bf16);
  EXPECT_EQ(
      complaint_of("", {"train.dtype=bf16", "run.device=cuda", "parallel.share_device=true", "parallel.tp=2"}),
      "--set train.dtype: train.dtype = \"bf16\" with parallel.share_device = true is for parallel.tp = 1: the host "
      "adds no bf16");
  EXPECT_EQ(complaint_of("", {"train.tf32=true"}),
            "--set train.tf32: train.tf32 = true is for run.device = \"cuda\" and train.dtype = \"f32\"");
  EXPECT_EQ(
      complaint_of("", {"run.products=measured"}),
      "--set run.products: run.products = \"measured\" is for run.device = \"cuda\"; on the processor use \"rule\"");
  EXPECT_EQ(
      complaint_of("", {"run.device=cuda", "model.dim=520"}),
      "--set run.device: run.device = \"cuda\": a head of model.dim = 520 and model.heads = 4 is 130 wide, at most "
      "128 are possible there");
}

TEST(Config, LayoutIndependence) {
  const std::string on = "[parallel]\nvirtual_dp = 2\n";
  const std::vector<std::string> set = {"run.deterministic=layout_independent"};
  const auto with = [&](const std::string& one_more) {
    std::vector<std::string> both = set;
    both.push_back(one_more);
    return both;
  };
  const RunConfig c = parse(on, set).config;
  EXPECT_EQ(c.run.deterministic, Determinism::layout_independent);
  EXPECT_EQ(c.parallel.virtual_dp, 2);
  EXPECT_EQ(c.parallel.virtual_tp, 4);
  EXPECT_EQ(parse("").config.run.deterministic, Determinism::same_layout);
  EXPECT_EQ(complaint_of(on, with("parallel.reduction=polled")),
            "--set parallel.reduction: parallel.reduction = \"polled\" adds in the order of the ranks; with "
            "run.deterministic = \"layout_independent\" it is \"blocking\"");
  EXPECT_EQ(complaint_of(on, with("parallel.token_shards=append")).rfind("--set parallel.token_shards: ", 0), 0U);
  EXPECT_EQ(complaint_of(on, with("run.device=cuda")),
            "--set run.device: run.device = \"cuda\": with run.deterministic = \"layout_independent\" it is \"cpu\"; "
            "on a device the same layout gives the same bits");
  EXPECT_EQ(complaint_of(on, with("parallel.dp=3")),
            "--set parallel.dp: parallel.dp = 3 is more than the parallel.virtual_dp = 2 shards that can be dealt");
  EXPECT_EQ(complaint_of(on, with("parallel.tp=5")),
            "--set parallel.tp: parallel.tp = 5 is more than the parallel.virtual_tp = 4 shards that can be dealt");
  EXPECT_EQ(complaint_of("batch = 1\n" + on, set),
            "c.toml:11:9: train.batch = 1 leaves some of parallel.virtual_dp = 2 shards without a sequence");
  EXPECT_EQ(complaint_of(on, with("model.tokens.key=3")),
            "--set model.tokens.key: model.tokens.key = 3 cannot be cut into parallel.virtual_tp = 4 shards");
  EXPECT_EQ(complaint_of(on, with("parallel.virtual_tp=65")),
            "--set parallel.virtual_tp=65: parallel.virtual_tp = 65: want 1 to 64");
}

TEST(Config, ResumeTakesTheCheckpointsVirtualShards) {
  const RunConfig stored = parse("", {"run.deterministic=layout_independent", "parallel.virtual_dp=2"}).config;
  // What is not given is the checkpoint's; what is given must not contradict it.
  const RunConfig same = resumed(stored, parse("", {"run.deterministic=layout_independent"}));
  EXPECT_EQ(same.parallel.virtual_dp, 2);
  EXPECT_EQ(
      complaint([&] {
        resumed(stored, parse("", {"run.deterministic=layout_independent", "parallel.virtual_dp=8"}));
      }),
      "--set parallel.virtual_dp: parallel.virtual_dp = 8 contradicts the checkpoint, which has 2 virtual shards; "
      "remove the key, or give up the same bits with run.deterministic = \"same_layout\"");
  // The mode goes on where the file says nothing of it, with the reduction that it needs.
  const RunConfig kept = resumed(stored, parse(""));
  EXPECT_EQ(kept.run.deterministic, Determinism::layout_independent);
  EXPECT_EQ(kept.parallel.virtual_dp, 2);
  EXPECT_EQ(kept.parallel.reduction, Reduction::blocking);
  EXPECT_NE(complaint([&] { resumed(stored, parse("", {"parallel.virtual_dp=8"})); }).find("has 2 virtual shards"),
            std::string::npos);
  EXPECT_EQ(complaint([&] {
              resumed(stored, parse("", {"parallel.reduction=polled"}));
            }).rfind("--set parallel.reduction: ", 0),
            0U);
  // Without the mode on one side the numbers decide nothing that was promised.
  const RunConfig off = resumed(stored, parse("", {"run.deterministic=same_layout", "parallel.virtual_dp=8"}));
  EXPECT_EQ(off.run.deterministic, Determinism::same_layout);
  EXPECT_EQ(off.parallel.virtual_dp, 8);
  EXPECT_EQ(resumed(parse("").config, parse("", {"run.deterministic=layout_independent", "parallel.virtual_dp=8"}))
                .parallel.virtual_dp,
            8);
}

TEST(Config, VocabularyComesFromTheDataset) {
  RunConfig c = parse("").config;
  adopt_vocab(c, 97, "d.h5");
  EXPECT_EQ(c.model.vocab, 97);
  EXPECT_NE(complaint([&] {
              adopt_vocab(c, 98, "d.h5");
            }).find("model.vocab = 97, but the dataset d.h5 has a vocabulary of 98"),
            std::string::npos);
}

TEST(Config, Durations) {
  EXPECT_EQ(parse_duration("90"), 90.0);
  EXPECT_EQ(parse_duration("1.5h"), 5400.0);
  EXPECT_EQ(parse_duration("1d2h3m4s"), 86400.0 + 7200 + 180 + 4);
  for (const char* wrong : {"", "h", "1x", "-1s", "30m1h", "1h1h", "1h 2m", "nan"}) {
    EXPECT_THROW(parse_duration(wrong), ConfigError) << wrong;
  }
}

TEST(Config, TheShippedConfigurationsLoad) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(source_file("configs"))) {
    // The plans of submit_stages and of the study are no configurations of a run.
    const std::string name = entry.path().filename();
    if (!name.ends_with(".toml") || name.starts_with("stages") || name.starts_with("study")) continue;
    EXPECT_NO_THROW(load_config(entry.path())) << entry.path();
    ++files;
  }
  EXPECT_GE(files, 2);
  // The published count, counted by the authors' own log.
  EXPECT_EQ(load_config(source_file("configs/tokenformer_150m.toml")).config.model.parameters(), 151881216);
}

}  // namespace
}  // namespace tforge
