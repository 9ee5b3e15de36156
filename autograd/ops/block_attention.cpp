#include "autograd/ops/block_attention.h"

#include <algorithm>
#include <utility>

#include "core/errors.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/slots.h"

namespace tforge {

namespace {

using kernels::AttentionShape;
using kernels::SlotShape;

ConstTensorView view(const Tensor& t) { return t.view(); }

/// Rows [first, first + n) of each of `batch` sequences of `stride` rows, to or from one after the other elsewhere.
struct Part {
  std::int64_t first, n, stride;
};
void copy(Stream& stream, std::int64_t batch, ConstTensorView from, const Part& source, GradMode mode, TensorView to,
          const Part& target) {
  for (std::int64_t b = 0; b < batch; ++b) {
    kernels::add_to(stream, from.row_range(b * source.stride + source.first, source.n), mode,
                    to.row_range(b * target.stride + target.first, target.n));
  }
}

struct BlockAttentionNode final : Node {
  BlockAttentionNode(Tape& tape, const Var& input, const Tensor& result, Tensor lse_, std::int64_t batch_,
                     std::int64_t heads_, const BlockSlots& of)
      : qkv(tape, input.value()),
        out(tape, result),
        lse(std::move(lse_)),
        key_slots(of.keys.value()),
        value_slots(of.values.value()),
        batch(batch_),
        heads(heads_),
        dqkv(use(input)),
        dkey_slots(use(of.keys)),
        dvalue_slots(use(of.values)) {}

  void backward(Tape& tape) override {
    Stream& stream = tape.stream();
    const Tensor joint = qkv.load(tape), result = out.load(tape);
    const std::int64_t c = joint.shape().columns() / 3, seq = joint.shape().rows() / batch;
    const std::int64_t block = key_slots.shape().columns(), slots = key_slots.shape().rows() / heads;
    const std::int64_t blocks = (seq + block - 1) / block, rows = block_attention_rows(seq, block, slots);
    const auto make = [&](std::int64_t height) { return tape.empty(Shape{height, c}, joint.dtype()); };
    const auto q = joint.view().column_range(0, c), k = joint.view().column_range(c, c),
               v = joint.view().column_range(2 * c, c);
    Tensor gradient = tape.empty(joint.shape(), joint.dtype());
    const auto dq = gradient.view().column_range(0, c), dk = gradient.view().column_range(c, c),
               dv = gradient.view().column_range(2 * c, c);
    // What a block attends to, and the gradients of that; those of all slots.
    Tensor keys = make(batch * rows), values = make(batch * rows), dkeys = make(batch * rows),
           dvalues = make(batch * rows), dkey_rows = make(batch * rows), dvalue_rows = make(batch * rows);
    Tensor queries = make(batch * block), outputs = make(batch * block), douts = make(batch * block),
           dqueries = make(batch * block);
    kernels::fill(stream, dkey_rows.view(), 0);
    kernels::fill(stream, dvalue_rows.view(), 0);
    for (std::int64_t b = 0; b + 1 < blocks; ++b) {
      const SlotShape shape{batch, heads, block, slots, seq, rows};
      const auto to = [&](Tensor& all) { return all.view().row_range(b * slots, batch * rows - b * slots); };
      const std::int64_t past = b * block;
      kernels::slots_forward(stream, shape, view(key_slots), k.row_range(past, batch * seq - past), to(keys));
      kernels::slots_forward(stream, shape, view(value_slots), v.row_range(past, batch * seq - past), to(values));
    }
    const AttentionShape largest{batch, heads, rows, rows, rows};
    Tensor workspace = tape.empty(Shape{kernels::attention_workspace(largest, c / heads, stream.device())},
                                  compute_dtype(joint.dtype()), Purpose::workspace);
    for (std::int64_t b = blocks - 1; b >= 0; --b) {
      const std::int64_t past = b * block, n = std::min(block, seq - past), before = b * slots;
      const Part in_sequence{past, n, seq}, in_memory{before, n, rows}, alone{0, n, n};
      const auto first_rows = [&](Tensor& t) { return t.view().row_range(0, batch * n); };
      copy(stream, batch, k, in_sequence, GradMode::overwrite, keys.view(), in_memory);
      copy(stream, batch, v, in_sequence, GradMode::overwrite, values.view(), in_memory);
      copy(stream, batch, q, in_sequence, GradMode::overwrite, first_rows(queries), alone);
      copy(stream, batch, result.view(), in_sequence, GradMode::overwrite, first_rows(outputs), alone);
      copy(stream, batch, dy().read(), in_sequence, GradMode::overwrite, first_rows(douts), alone);
      kernels::causal_attention_backward(stream, {batch, heads, n, before + n, rows}, first_rows(queries), view(keys),
                                         view(values), first_rows(outputs),
                                         view(lse).row_range(batch * past, batch * n), first_rows(douts),
                                         first_rows(dqueries), dkeys.view(), dvalues.view(), workspace.view());
      copy(stream, batch, view(dqueries), alone, GradMode::overwrite, dq, in_sequence);
      copy(stream, batch, view(dkeys), in_memory, GradMode::overwrite, dk, in_sequence);
      copy(stream, batch, view(dvalues), in_memory, GradMode::overwrite, dv, in_sequence);
      if (before > 0) {
        const Part all_slots{0, before, rows};
        copy(stream, batch, view(dkeys), all_slots, GradMode::accumulate, dkey_rows.view(), all_slots);
        copy(stream, batch, view(dvalues), all_slots, GradMode::accumulate, dvalue_rows.view(), all_slots);
      }
      if (b + 1 == blocks) continue;  // nobody sees the slots of the last block
      const SlotShape shape{batch, heads, block, slots, seq, rows};
      const auto back = [&](const Tensor& projection, const ConstTensorView& x, const Tensor& of_slots,
                            const TensorView& dx, Grad& to) {
        GradTarget target{{}, GradMode::overwrite};
        if (to) target = to.target(tape);
        const std::int64_t left = batch * seq - past;
        kernels::slots_backward(stream, shape, view(projection), x.row_range(past, left),
                                view(of_slots).row_range(before, batch * rows - before), dx.row_range(past, left),
                                target.mode, target.view);
      };
      back(key_slots, k, dkey_rows, dk, dkey_slots);
      back(value_slots, v, dvalue_rows, dv, dvalue_slots);
    }
    if (dqkv) dqkv.adopt(tape, std::move(gradient));
  }

  Saved qkv, out;
  Tensor lse, key_slots, value_slots;
  std::int64_t batch, heads;
  Grad dqkv, dkey_slots, dvalue_slots;
};

}  // namespace

std::int64_t block_attention_rows(std::int64_t positions, std::int64_t block, std::int64_t slots) {
  return (positions - 1) / block * slots + block;
}

Tensor block_attention_extend(Tape& tape, ConstTensorView qkv, std::int64_t batch, std::int64_t heads,
                              const BlockSlots& of, std::int64_t first, Tensor& keys, Tensor& values, Tensor lse) {
  Stream& stream = tape.stream();
  const std::int64_t c = qkv.columns() / 3, count = qkv.rows() / batch;
  const std::int64_t block = of.block(), slots = of.slots(heads), rows = keys.shape().rows() / batch;
  const auto q = qkv.column_range(0, c), k = qkv.column_range(c, c), v = qkv.column_range(2 * c, c);
  const auto make = [&](std::int64_t height) { return tape.empty(Shape{height, c}, qkv.dtype); };
  Tensor out = make(batch * count), queries = make(batch * std::min(count, block)),
         outputs = make(batch * std::min(count, block)), squeezed = make(batch * slots);
  const auto workspace_of = [&](std::int64_t q_seq, std::int64_t kv_seq) {
    return kernels::attention_workspace({batch, heads, q_seq, kv_seq, kv_seq}, c / heads, stream.device());
  };
  const std::int64_t piece = std::min(count, block);
  Tensor workspace = tape.empty(Shape{std::max(workspace_of(1, rows), workspace_of(piece, piece))},
                                compute_dtype(qkv.dtype), Purpose::workspace);
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t position = first + done, at = position % block, before = position / block * slots;
    const std::int64_t n = std::min(block - at, count - done);
    if (before + at + n > rows) {
      throw ShapeError("block_attention: position {} in a memory of {} rows", position + n - 1, rows);
    }
    const Part in_sequence{done, n, count}, in_memory{before + at, n, rows}, alone{0, n, n};
    const auto first_rows = [&](Tensor& t) { return t.view().row_range(0, batch * n); };
    copy(stream, batch, k, in_sequence, GradMode::overwrite, keys.view(), in_memory);
    copy(stream, batch, v, in_sequence, GradMode::overwrite, values.view(), in_memory);
    copy(stream, batch, q, in_sequence, GradMode::overwrite, first_rows(queries), alone);
    kernels::causal_attention_forward(
        stream, {batch, heads, n, before + at + n, rows}, first_rows(queries), view(keys), view(values),
        first_rows(outputs), lse ? lse.view().row_range(batch * done, batch * n) : TensorView{}, workspace.view());
    copy(stream, batch, view(outputs), alone, GradMode::overwrite, out.view(), in_sequence);
    done += n;
    if (at + n < block || before + slots + block > rows) continue;  // not complete, or the last that there can be
    const SlotShape shape{batch, heads, block, slots, rows, slots};
    for (const auto& [projection, memory] : {std::pair{&of.keys, &keys}, std::pair{&of.values, &values}}) {
      kernels::slots_forward(stream, shape, projection->view(), view(*memory).row_range(before, batch * rows - before),
                             squeezed.view());
      copy(stream, batch, view(squeezed), {0, slots, slots}, GradMode::overwrite, memory->view(),
           {before, slots, rows});
    }
  }
  return out;
}

Var block_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads, const BlockSlots& slots) {
  const std::int64_t rows = qkv.shape().rows(), c = qkv.shape().columns() / 3;
  if (batch < 1 || rows % batch != 0 || heads < 1 || c % heads != 0 || qkv.shape().columns() % 3 != 0) {
    throw ShapeError("block_attention: qkv of shape {} for {} sequences and {} heads", qkv.shape().text(), batch,
                     heads);
  }
  if (slots.keys.shape() != slots.values.shape() || slots.keys.shape().rows() % heads != 0) {
    throw ShapeError("block_attention: projections of shape {} and {} for {} heads", slots.keys.shape().text(),
                     slots.values.shape().text(), heads);
  }
  const Shape memory{batch * block_attention_rows(rows / batch, slots.block(), slots.slots(heads)), c};
  Tensor keys = tape.empty(memory, qkv.dtype()), values = tape.empty(memory, qkv.dtype());
  Tensor lse = tape.empty(Shape{rows, heads}, compute_dtype(qkv.dtype()));
  Tensor out = block_attention_extend(tape, qkv.view(), batch, heads, slots, 0, keys, values, lse);
  auto* node = tape.record<BlockAttentionNode>(tape, qkv, out, std::move(lse), batch, heads, slots);
  return tape.output(std::move(out), node);
}

}  // namespace tforge
