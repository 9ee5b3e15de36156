#pragma once
// Reads what another implementation computed with a model (hidden states, logits, loss, gradients) in HDF5: a published
// TokenFormer or MemoryFormer, with its tensors under the names of the public code, or any kind of model under our
// names and layouts.
//
//   of the public code:
//   attributes  layers hidden heads vocab batch seq rotary_pct rotary_base loss
//     of a TokenFormer   qkv_slots proj_slots ffn_slots norm_activation layernorm_eps
//     of a MemoryFormer  tau (hash bits) extra_bits tables norm ("layernorm" or "rmsnorm") weight ("p" or "l1_times_p",
//                        perhaps with a remark behind a blank) bit_order ("msb_first")
//   weights/, grads/
//     of a TokenFormer   sequential.0.word_embeddings.weight, sequential.{2+i}.attention.{query,key,value,proj}.
//                        {key,value}_param_tokens, sequential.{2+i}.mlp.{key,value}_param_tokens,
//                        sequential.{L+3}.norm.{weight,bias}
//     of a MemoryFormer  embedding, head, block.i.{q,k,v,ml1,ml2}.{tables,bias}, block.i.{norm1,norm2}.{weight,bias} or
//                        .scale, block.i.inner.{weight,bias}, final_norm.{weight,bias} or .scale
//   layer/   of a MemoryFormer: one Memory Layer with its gradients: x, tables, bias, y, dy, dx, dtables, dbias
//   under our names:
//   attributes  config (TOML: [model]) batch seq loss
//   weights/, grads/   our parameters, layers.0.attention.query.weight
//   both:
//   hidden/i [batch, seq, hidden]   output of block i      logits [batch, seq, vocab]      tokens, labels [batch, seq]
#include <cstdint>
#include <string>
#include <vector>

#include "core/hash_weight.h"
#include "core/pattention_norm.h"
#include "storage/hdf5_file.h"

namespace tforge {

enum class PublishedKind : std::uint8_t { tokenformer, memoryformer };
enum class PublishedNorm : std::uint8_t { layernorm, rmsnorm };

class PublishedFile {
 public:
  /// Throws DataError when the file is not of this form.
  explicit PublishedFile(const std::string& path);

  std::string config;  // [model]; empty: of the public code
  std::int64_t batch = 0, seq = 0;
  double loss = 0;
  // Of the public code.
  PublishedKind kind = PublishedKind::tokenformer;
  std::int64_t layers = 0, dim = 0, heads = 0, vocab = 0;
  double rotary_fraction = 0, rotary_base = 0;
  // Of a TokenFormer.
  std::int64_t qkv_tokens = 0, proj_tokens = 0, ffn_tokens = 0;
  PattentionNorm norm = PattentionNorm::l2_norm_gelu;
  double layernorm_eps = 1e-5;
  // Of a MemoryFormer.
  std::int64_t hash_bits = 0, extra_bits = 0;
  HashWeight hash_weight = HashWeight::p;
  PublishedNorm stream_norm = PublishedNorm::layernorm;

  std::vector<std::int32_t> tokens() const { return file_.read<std::int32_t>("tokens"); }
  std::vector<std::int32_t> labels() const { return file_.read<std::int32_t>("labels"); }
  /// The values of a tensor of `elements` elements. Throws DataError when it is missing or of another size.
  std::vector<double> tensor(const std::string& path, std::int64_t elements) const;
  /// The name that a parameter of ours has here.
  std::string name_of(const std::string& parameter) const;
  const std::string& file_path() const { return file_.file_path(); }

 private:
  Hdf5File file_;
};

/// The published name of a parameter of our TokenFormer: "layers.0.ffn.keys" -> "sequential.2.mlp.key_param_tokens".
/// Throws InternalError for a path that has none.
std::string published_name(const std::string& path, std::int64_t layers);
/// The same of a MemoryFormer: "layers.0.ffn.norm.weight" -> "block.0.norm2.scale" with RMSNorm.
std::string published_memory_name(const std::string& path, PublishedNorm norm);

}  // namespace tforge
