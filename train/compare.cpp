#include "train/compare.h"

#include <algorithm>
#include <cmath>

#include "checkpoint/published_file.h"
#include "core/allocator.h"
#include "core/copy.h"
#include "core/device_queue.h"
#include "model/models.h"
#include "train/config.h"

namespace tforge {

namespace {

/// Gathers max |difference| and max |reference| of each tensor, to be reduced over the ranks in one call.
class Differences {
 public:
  explicit Differences(Allocator& host) : host_(host) {}
  void add(const std::string& name, std::span<const double> reference, const Tensor& tensor) {
    const Tensor ours = tensor.device() == Device::cpu ? tensor : tensor.clone(host_);
    double difference = 0, largest = 0;
    with_compute_type("compare", ours.dtype(), [&](auto zero) {
      const auto values = ours.span<decltype(zero)>();
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double d = std::abs(static_cast<double>(values[i]) - reference[i]);
        difference = d <= difference ? difference : d;  // a NaN sticks
        largest = std::max(largest, std::abs(reference[i]));
      }
    });
    names_.push_back(name);
    numbers_.push_back(std::isnan(difference) ? INFINITY : difference);
    numbers_.push_back(largest);
  }

  std::vector<TensorError> result(Stream& stream, Mesh& mesh) {
    const TensorView view{numbers_.data(), DType::f64, Device::cpu, Shape{static_cast<std::int64_t>(numbers_.size())},
                          static_cast<std::int64_t>(numbers_.size())};
    mesh.tp_comm->all_reduce(stream, view, ReduceOp::max);
    mesh.dp_comm->all_reduce(stream, view, ReduceOp::max);
    std::vector<TensorError> errors;
    for (std::size_t i = 0; i < names_.size(); ++i) {
      errors.push_back({names_[i], numbers_[2 * i] / std::max(numbers_[2 * i + 1], 1e-300)});
    }
    return errors;
  }

 private:
  Allocator& host_;
  std::vector<std::string> names_;
  std::vector<double> numbers_;
};

template <class T>
std::span<const T> part(const std::vector<T>& all, std::int64_t first, std::int64_t count) {
  return std::span(all).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
}

ModelConfig config_of(const PublishedFile& file) {
  if (!file.config.empty()) {
    return parse_config(file.config + "\n[data]\npath = \"none\"\n[run]\ndir = \"none\"\n", file.file_path())
        .config.model;
  }
  ModelConfig config;
  config.layers = file.layers;
  config.dim = file.dim;
  config.heads = file.heads;
  config.vocab = file.vocab;
  config.max_seq = file.seq;
  if (file.kind == PublishedKind::memoryformer) {
    config.kind = "memoryformer";
    config.hash_bits = {file.hash_bits, file.hash_bits, file.hash_bits + file.extra_bits};
    config.hash_weight = file.hash_weight;
    config.stream_norm = file.stream_norm == PublishedNorm::rmsnorm ? StreamNorm::rmsnorm : StreamNorm::layernorm;
    config.head = Head::untied;
  } else {
    config.tokens = {file.qkv_tokens, file.qkv_tokens, file.qkv_tokens, file.proj_tokens, file.ffn_tokens};
    config.norm = file.norm;
  }
  config.rotary_fraction = file.rotary_fraction;
  config.rotary_base = file.rotary_base;
  config.layernorm_eps = file.layernorm_eps;
  return config;
}

}  // namespace

std::vector<TensorError> compare_with_published(const std::string& path, DType dtype, Mesh& mesh, Workplace& place) {
  const PublishedFile file(path);
  const ModelConfig config = config_of(file);
  Allocator& allocator = place.memory();
  Stream& stream = place.stream();
  const std::unique_ptr<LanguageModel> made =
      make_model(allocator, stream, config, dtype, *mesh.tp_comm, ShardPlan::even(config, mesh.tp));
  LanguageModel& model = *made;
  for (Parameter& p : model.parameters().all()) {
    const std::vector<double> values = file.tensor("weights/" + file.name_of(p.path()), p.spec.shape.elements());
    Tensor value = Tensor::empty(place.host_memory(), p.value().shape(), dtype, Purpose::staging);
    with_compute_type("compare", dtype, [&](auto zero) {
      using T = decltype(zero);
      const auto mine = part(values, p.first_row * p.columns(), value.elements());
      std::ranges::transform(mine, value.span<T>().begin(), [](double x) { return static_cast<T>(x); });
    });
    p.value().assign(value);
    wait(stream);  // pinned memory must stay until it has been copied
  }

  const ShardBorders sequences = ShardBorders::even(file.batch, mesh.dp, "the file's sequences");
  const std::int64_t first = sequences.begin(mesh.dp_index), count = sequences.count(mesh.dp_index);
  const std::vector<std::int32_t> all_tokens = file.tokens(), all_labels = file.labels();
  const Shape shape{count * file.seq};
  const Tensor tokens =
      Tensor::of(allocator, shape, part(all_tokens, first * file.seq, count * file.seq), Purpose::activations);
  const Tensor labels =
      Tensor::of(allocator, shape, part(all_labels, first * file.seq, count * file.seq), Purpose::activations);

  Differences differences(place.host_memory());
  {
    Tape tape(allocator, stream, TapeMode::inference);
    std::vector<Tensor> blocks;
    const Tensor logits = model.logits(tape, tokens, count, &blocks);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const std::string name = fmt::format("hidden/{}", i);
      const std::vector<double> theirs = file.tensor(name, file.batch * file.seq * config.dim);
      differences.add(name, part(theirs, first * file.seq * config.dim, count * file.seq * config.dim), blocks[i]);
    }
    const std::vector<double> theirs = file.tensor("logits", file.batch * file.seq * config.vocab);
    differences.add("logits", part(theirs, first * file.seq * config.vocab, count * file.seq * config.vocab), logits);
  }

  Tape tape(allocator, stream, TapeMode::training);
  const double weight = 1.0 / static_cast<double>(file.batch * file.seq);
  HeadLoss loss = model.loss(tape, tokens, labels, count, weight);
  tape.backward(loss.loss);
  model.parameters().finish_gradients();
  mesh.dp_comm->all_reduce(stream, model.parameters().gradients().view(), ReduceOp::sum);
  double mean = number_of(stream, loss.nll_sum) * weight;
  mesh.dp_comm->all_reduce(stream, TensorView{&mean, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::sum);
  const std::vector<double> their_loss = {file.loss};
  const std::vector<double> our_loss = {mean};
  differences.add("loss", their_loss,
                  Tensor::of(allocator, Shape{1}, std::span<const double>(our_loss), Purpose::activations));
  for (const Parameter& p : model.parameters().all()) {
    const std::string name = "grads/" + file.name_of(p.path());
    const std::vector<double> theirs = file.tensor(name, p.spec.shape.elements());
    differences.add(name, part(theirs, p.first_row * p.columns(), p.gradient.elements()), p.gradient);
  }
  return differences.result(stream, mesh);
}

}  // namespace tforge
