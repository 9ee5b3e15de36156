// Targets whose input makes an HDF5 file or the manifest beside one.
#include <nlohmann/json.hpp>

#include "checkpoint/integrity.h"
#include "checkpoint/manifest.h"
#include "checkpoint/published_file.h"
#include "checkpoint/reader.h"
#include "checkpoint/writer.h"
#include "core/printable.h"
#include "data/token_dataset.h"
#include "fuzz/all_targets.h"
#include "fuzz/input.h"
#include "model/tokenformer.h"
#include "storage/digest.h"
#include "train/run_state.h"

namespace tforge::fuzz {
namespace {

std::string change(std::uint16_t offset, const std::string& bytes) { return Change{offset, false, bytes}.text(); }

/// What `make` writes to the path that it is given.
template <class Make>
SoundFile sound_file(Make&& make) {
  const test::Scratch scratch;
  make(scratch.path("made.h5"));
  return SoundFile(bytes_of_file(scratch.path("made.h5")));
}

// ---- token dataset

const SoundFile& sound_dataset() {
  static const SoundFile file = sound_file([](const std::string& path) {
    const Tokenizer bytes = Tokenizer::bytes();
    TokenDatasetWriter writer(path, bytes, "a few lines");
    for (const Split split : kSplits) {
      for (const std::string text : {"one document", "and another"}) {
        std::vector<std::int32_t> tokens;
        bytes.encode(text, tokens);
        writer.add(split, tokens);
        writer.end_document(split, text.size(), 2);
      }
    }
    writer.commit();
  });
  return file;
}

}  // namespace

void token_dataset(Input input) {
  write_bytes(input_path(), sound_dataset().changed(input));
  refuse_or([] { stored_tokenizer(input_path()); });
  refuse_or([] {
    const TokenDataset dataset(input_path());
    for (const Split which : kSplits) {
      const TokenSplit& split = dataset.split(which);
      std::uint64_t tokens = 0;
      for (std::uint64_t i = 0; i < split.documents(); ++i) {
        const DocumentInfo document = split.document(i);
        if (document.first_token != tokens) throw Finding("documents that leave a gap");
        if (document.tokens > split.tokens() - tokens) throw Finding("a document beyond the tokens");
        tokens += document.tokens;
      }
      if (tokens != split.tokens()) throw Finding("documents that end elsewhere than their tokens");
      std::vector<std::int32_t> read(split.tokens());
      split.copy(0, read.size(), read.data());
      for (const std::int32_t token : read) {
        if (token < 0 || token >= dataset.vocab()) throw Finding("a token outside the vocabulary");
      }
    }
    dataset.verify();
  });
}

std::vector<std::string> token_dataset_seeds() {
  const std::string offsets("\0\0\0\0\0\0\0\0\x0c\0\0\0\0\0\0\0\x17\0\0\0\0\0\0\0", 24);  // of the documents of a split
  return {change(0, "\x89HDF"),
          change(700, "abc") + change(2000, std::string(8, '\xff')),
          sound_dataset().over(offsets, 7, "\1").text(),
          sound_dataset().over(offsets, 8, "\xff").text(),
          sound_dataset().over(offsets, 16, "\x0d").text(),
          sound_dataset().bytes()};
}

// ---- published file of a model, made by anybody

namespace {

const SoundFile& sound_published() {
  static const SoundFile file = sound_file([](const std::string& path) {
    Hdf5File h5 = Hdf5File::create(path);
    const std::pair<const char*, std::int64_t> numbers[] = {{"layers", 1},    {"hidden", 2},     {"heads", 1},
                                                            {"vocab", 5},     {"batch", 1},      {"seq", 3},
                                                            {"qkv_slots", 2}, {"proj_slots", 2}, {"ffn_slots", 2}};
    for (const auto& [name, value] : numbers) h5.set_attribute("/", name, value);
    for (const char* name : {"rotary_pct", "rotary_base", "layernorm_eps", "loss"}) h5.set_attribute("/", name, 0.5);
    h5.set_attribute("/", "norm_activation", std::string("softmax"));
    const std::uint64_t batch[] = {1, 3};
    for (const char* name : {"tokens", "labels"}) {
      h5.write<std::int32_t>(name, batch, std::vector<std::int32_t>{0, 1, 2});
    }
    const std::uint64_t table[] = {5, 2};
    h5.write<double>("weights/" + published_name("embedding", 1), table, std::vector<double>(10, 0.25));
    h5.write<float>("grads/" + published_name("embedding", 1), table, std::vector<float>(10, 0.25F));
    h5.close();
  });
  return file;
}

}  // namespace

void published_file(Input input) {
  write_bytes(input_path(), sound_published().changed(input));
  refuse_or([] {
    const PublishedFile file(input_path());
    for (const char* group : {"weights/", "grads/"}) {
      const std::string path = group + published_name("embedding", file.layers);
      if (file.tensor(path, file.vocab * file.dim).size() != static_cast<std::size_t>(file.vocab * file.dim)) {
        throw Finding("a tensor of another size than asked for");
      }
    }
  });
}

std::vector<std::string> published_file_seeds() {
  return {change(0, "\x89HDF"), change(300, std::string(4, '\xff')), sound_published().bytes()};
}

// ---- manifest beside a file of 6000 bytes

namespace {

constexpr std::uint64_t kFileBytes = 6000;

Manifest sound_manifest(const PlainFile& file) {
  Manifest m;
  m.file = "input.h5";
  m.uuid = "u";
  m.step = 7;
  m.bytes = kFileBytes;
  m.blocks = digest_blocks(file, m.bytes, {0, Manifest::blocks_of(m.bytes)});
  m.regions = {{"model/a", 0, 10, 100, 5000}, {"model/b", 1000, 300, 4, 2000}};
  return m;
}

/// Gives text that is a JSON object the digest that it asks for.
std::string signed_again(const std::string& text) {
  try {
    auto json = nlohmann::json::parse(text);
    json.erase("digest");
    json["digest"] = digest128(json.dump());
    return json.dump() + "\n";
  } catch (const nlohmann::json::exception&) {
    return text;
  }
}

void write_manifested_file() {
  static const bool once = [] {
    write_bytes(input_path(), std::string(kFileBytes, 'x'));
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

void manifest(Input input) {
  write_manifested_file();
  const std::string text = text_of(input);
  for (const std::string& written : {text, signed_again(text)}) {
    write_bytes(manifest_path(input_path()), written);
    refuse_or([] {
      const Manifest m = read_manifest(input_path());
      const auto inside = [&](std::uint64_t begin, std::uint64_t rows, std::uint64_t row_bytes) {
        return begin <= m.bytes && (rows == 0 || row_bytes <= (m.bytes - begin) / rows);
      };
      for (const ManifestRegion& r : m.regions) {
        if (!inside(r.offset, r.rows, r.row_bytes) || !inside(r.digests, r.rows, sizeof(std::uint64_t))) {
          throw Finding("rows outside the file");
        }
      }
      verify_blocks(PlainFile(input_path(), PlainFile::Access::read), m, block_share(m.blocks.size(), 0, 1));
      Manifest again = m;
      if (manifest_text(again) != bytes_of_file(manifest_path(input_path()))) {
        throw Finding("a manifest that is read as another one");
      }
    });
  }
}

std::vector<std::string> manifest_seeds() {
  write_manifested_file();
  Manifest sound = sound_manifest(PlainFile(input_path(), PlainFile::Access::read));
  Manifest damaged = sound;
  damaged.blocks[0] ^= 1;
  return {manifest_text(sound), manifest_text(damaged), "{\"format\":2}"};
}

// ---- checkpoint with all its digests made right again

namespace {

const SoundFile& sound_checkpoint() {
  static const SoundFile file = sound_file([](const std::string& path) {
    RunConfig config;
    config.model.layers = config.model.heads = 1;
    config.model.dim = 2;
    config.model.vocab = 4;
    config.model.max_seq = 8;
    config.model.tokens = {1, 1, 1, 1, 1};
    config.data.path = "data.h5";
    config.run.dir = "run";
    CheckpointContents c;
    c.model_kind = "tokenformer";
    c.code_version = "tokenforge";
    c.step = 3;
    c.config = to_toml(config);
    c.tokenizer = stored(Tokenizer::bytes());
    c.state = {{"dataset_fingerprint", std::string("f")}, {"layout", std::string("1x1")}};
    for (const char* name : {"tokens", "samples", "schedule_start", "skipped_steps", "growths_applied"}) {
      c.state[name] = std::int64_t{1};
    }
    GrowthRecord record;
    record.layer_group = "ffn";
    record.rule = "zero-key";
    c.growth_history = {record};
    static const std::vector<float> values(16, 0.5F);
    const auto add = [&](const std::string& name, Shape shape, Attributes attributes) {
      c.tensors.push_back({name, DType::f32, shape, {{0, shape.rows(), values.data()}}, std::move(attributes)});
    };
    add("model/embedding", Shape{4, 2}, {});
    add("model/final_norm.weight", Shape{2}, {});
    add("model/final_norm.bias", Shape{2}, {});
    for (const TokenGroup group : kTokenGroups) {
      const std::string layer = TokenFormer::layer_path(0, group);
      add("model/" + layer + ".keys", Shape{1, 2},
          {{"scale", 1.0}, {"shard_borders", std::vector<std::int64_t>{0, 1}}});
      add("model/" + layer + ".values", Shape{1, 2}, {{"shard_borders", std::vector<std::int64_t>{0, 1}}});
      add("optim/" + layer + ".keys/m", Shape{1, 2}, {{"age_segments", std::vector<std::int64_t>{0, 3, 0}}});
    }
    save_checkpoint(*create_self(), path, c);
  });
  return file;
}

/// Writes the digests inside the file anew, as far as it can be read, and its manifest. Digests tell damage, not
/// forgery: a file of other hands has the right ones.
void sign(const std::string& path) {
  const PlainFile bytes(path, PlainFile::Access::write);
  Manifest m;
  m.file = "input.h5";
  m.bytes = bytes.size();
  // Each part in a try of its own: what is not there needs no digest.
  const auto attempt = [](auto&& part) {
    try {
      part();
    } catch (const Error&) {
    }
  };
  attempt([&] {
    const Hdf5File file = Hdf5File::open(path);
    const auto write_index = [&](const char* name, auto&& digest_of) {
      attempt([&] {
        auto index = layout::parse_index(file.read_bytes(name));
        for (auto& [of, digest] : index) attempt([&, &d = digest, &o = of] { d = digest_of(o); });
        const std::string text = layout::index_text(index);
        const DatasetInfo info = file.info(name);
        if (info.mappable && text.size() == info.bytes) bytes.write_at(info.offset, text.data(), text.size());
      });
    };
    const auto digest_of_bytes = [](const std::string& all) { return digest64(all.data(), all.size()); };
    write_index(layout::kAttributes, [&](const std::string& of) {
      Attributes all;
      for (const std::string& name : file.attribute_names(of)) all[name] = file.attribute(of, name);
      return layout::digest_of(all);
    });
    write_index(layout::kBlobs, [&](const std::string& of) {
      return digest_of_bytes(of == layout::kConfig ? file.read_text(of) : file.read_bytes(of));
    });
    attempt([&] {
      const std::string paths = file.read_bytes(layout::kTensors);
      for (std::size_t begin = 0; begin < paths.size();) {
        const std::size_t end = std::min(paths.find('\n', begin), paths.size());
        const std::string name = paths.substr(begin, end - begin);
        begin = end + 1;
        attempt([&] {
          const DatasetInfo data = file.info("/" + name);
          const DatasetInfo digests = file.info(fmt::format("{}/{}", layout::kRowDigests, name));
          if (!data.mappable || !digests.mappable || digests.type != StoredType::u64) return;
          const std::uint64_t width = data.bytes / digests.elements();
          std::string row(width, '\0');
          for (std::uint64_t r = 0; r < digests.elements(); ++r) {
            bytes.read_at(data.offset + r * width, row.data(), width);
            const std::uint64_t digest = digest_of_bytes(row);
            bytes.write_at(digests.offset + r * sizeof digest, &digest, sizeof digest);
          }
        });
      }
    });
    attempt([&] { m.uuid = file.attribute<std::string>("/", "uuid"); });
    attempt([&] { m.step = file.attribute<std::int64_t>(layout::kState, "step"); });
    attempt([&] {
      m.retention = retention_from_name(file.attribute<std::string>("/", "retention")).value_or(m.retention);
    });
  });
  m.blocks = digest_blocks(bytes, m.bytes, {0, Manifest::blocks_of(m.bytes)});
  write_bytes(manifest_path(path), manifest_text(m));
}

}  // namespace

void checkpoint(Input input) {
  const std::string path = input_path();
  write_bytes(path, sound_checkpoint().changed(input));
  try {
    sign(path);
  } catch (const nlohmann::json::exception&) {
    return;  // a uuid that is no UTF-8 cannot stand in a manifest
  }
  refuse_or([&] { CheckpointReader::open(path, CheckpointReader::Verify::rows_when_read); });
  refuse_or([&] {
    const CheckpointReader reader = CheckpointReader::open(path);
    for (const CheckpointReader::Tensor& tensor : reader.tensors()) {
      refuse_or([&] { reader.verify(tensor); });
      constexpr std::string_view kMoments = "optim/", kFirst = "/m";
      if (tensor.path.starts_with(kMoments) && tensor.path.ends_with(kFirst)) {
        const std::string parameter =
            tensor.path.substr(kMoments.size(), tensor.path.size() - kMoments.size() - kFirst.size());
        refuse_or([&] { stored_ages(reader, parameter, tensor.shape.rows()); });
      }
    }
    for (const auto& [name, value] : reader.state()) {
      const auto* text = std::get_if<std::string>(&value);
      if (text != nullptr && printable(*text) != *text) throw Finding("an attribute that a terminal obeys: " + name);
    }
    refuse_or([&] { restored(reader.tokenizer(), path); });
    refuse_or([&] { load_state(reader); });
    const RunConfig config = stored_config(reader);
    std::int64_t numbers = 0;
    for (const CheckpointReader::Tensor& tensor : reader.tensors()) {
      if (tensor.path.starts_with("model/")) numbers += tensor.shape.elements();
    }
    if (config.model.parameters() != numbers) throw Finding("a configuration of another model than its tensors");
    stored_borders(reader);
  });
}

std::vector<std::string> checkpoint_seeds() {
  return {change(0, "\x89HDF"),
          change(900, std::string(3, '\x01')) + change(5000, "\xff"),
          sound_checkpoint().over("layers = 1", 9, "3").text(),
          sound_checkpoint().over("vocab = 4", 8, "9").text(),
          sound_checkpoint().over("1x1", 1, "\x1b").text(),
          sound_checkpoint().bytes()};
}

}  // namespace tforge::fuzz
