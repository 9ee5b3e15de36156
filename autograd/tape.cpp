#include "autograd/tape.h"

#include "autograd/reducer.h"
#include "core/copy.h"
#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

struct Grad::Slot {
  int references = 0;
  Shape shape;
  DType dtype = DType::f32;
  Tensor gradient;  // permanent for a parameter
  bool permanent = false;
  bool written = false;
  bool seed = false;
  int pending_uses = 0;  // recorded nodes that will still write here
  GradHook* hook = nullptr;
  int parameter_id = -1;
  Tape* pool = nullptr;  // where the slot goes back to; null for a parameter
};

Grad::Grad(Slot* slot) : slot_(slot) {
  if (slot_ != nullptr) ++slot_->references;
}
Grad::Grad(const Grad& other) : Grad(other.slot_) {}
Grad::Grad(Grad&& other) noexcept : slot_(std::exchange(other.slot_, nullptr)) {}
Grad& Grad::operator=(Grad other) noexcept {
  std::swap(slot_, other.slot_);
  return *this;
}
Grad::~Grad() {
  if (slot_ == nullptr || --slot_->references > 0) return;
  if (slot_->pool == nullptr) {
    delete slot_;
    return;
  }
  slot_->gradient = Tensor();
  slot_->pool->free_slots_.push_back(slot_);
}

bool Grad::written() const { return slot_ != nullptr && slot_->written; }
bool Grad::is_seed() const { return written() && slot_->seed; }

ConstTensorView Grad::read() const {
  if (!written()) throw InternalError("a gradient was read that nothing was written to");
  return static_cast<const Tensor&>(slot_->gradient).view();
}

GradTarget Grad::target(Tape& tape) {
  slot_->seed = false;
  if (!slot_->gradient) slot_->gradient = tape.empty(slot_->shape, slot_->dtype);
  const GradMode mode = slot_->written ? GradMode::accumulate : GradMode::overwrite;
  if (!slot_->permanent && !slot_->gradient.unique()) {
    // Another slot reads the same tensor (see adopt): change a copy.
    slot_->gradient = slot_->written ? slot_->gradient.clone(tape.allocator()) : tape.empty(slot_->shape, slot_->dtype);
  }
  slot_->written = true;
  return {slot_->gradient.view(), mode};
}

// By value: the caller gives up its handle, so that the gradient can be the only one.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
void Grad::adopt(Tape& tape, Tensor gradient) {
  if (gradient.shape().elements() != slot_->shape.elements() || gradient.dtype() != slot_->dtype) {
    throw ShapeError("a gradient of shape {} was handed to a value of shape {}", gradient.shape().text(),
                     slot_->shape.text());
  }
  if (!slot_->written && !slot_->permanent) {
    slot_->gradient = gradient.reshaped(slot_->shape);
    slot_->written = true;
    slot_->seed = false;
    return;
  }
  GradTarget to = target(tape);
  kernels::add_to(tape.stream(), static_cast<const Tensor&>(gradient).view(), to.mode, to.view);
}

Tensor Grad::take(Tape& tape) {
  if (!written()) throw InternalError("a gradient was taken that nothing was written to");
  slot_->written = false;
  Tensor gradient = std::move(slot_->gradient);
  slot_->gradient = Tensor();
  return gradient.unique() ? gradient : gradient.clone(tape.allocator());
}

Tensor Grad::share() const {
  if (!written()) throw InternalError("a gradient was read that nothing was written to");
  return slot_->gradient;
}

Var Var::parameter(Tensor value, Tensor gradient, GradHook* hook, int parameter_id) {
  const bool fits = gradient.dtype() == value.dtype() || gradient.dtype() == compute_dtype(value.dtype());
  if (!(value.shape() == gradient.shape()) || !fits) {
    throw ShapeError("a parameter of shape {} and {} with a gradient of shape {} and {}", value.shape().text(),
                     name_of(value.dtype()), gradient.shape().text(), name_of(gradient.dtype()));
  }
  auto* slot = new Grad::Slot;
  slot->shape = value.shape();
  slot->dtype = gradient.dtype();
  slot->gradient = std::move(gradient);
  slot->permanent = true;
  slot->hook = hook;
  slot->parameter_id = parameter_id;
  return {std::move(value), Grad(slot)};
}

void Var::clear_grad() {
  if (grad_) grad_.slot_->written = false;
}

Grad Node::use(const Var& input) {
  if (!input.requires_grad()) return {};
  if (num_inputs_ == kMaxInputs) throw InternalError("an op declares more than {} inputs", kMaxInputs);
  inputs_[static_cast<std::size_t>(num_inputs_++)] = input.grad();
  ++input.grad().slot_->pending_uses;
  return input.grad();
}

Tape::Tape(Allocator& allocator, Stream& stream, TapeMode mode, SavePolicy saves)
    : allocator_(allocator), stream_(stream), mode_(mode), saves_(saves) {}

Tape::~Tape() {
  clear();
  for (Grad::Slot* slot : free_slots_) delete slot;
}

Grad Tape::new_slot(const Tensor& value) {
  Grad::Slot* slot = nullptr;
  if (free_slots_.empty()) {
    slot = new Grad::Slot;
    slot->pool = this;
  } else {
    slot = free_slots_.back();
    free_slots_.pop_back();
  }
  slot->shape = value.shape();
  slot->dtype = value.dtype();
  slot->written = slot->seed = false;
  slot->pending_uses = 0;
  return Grad(slot);
}

Var Tape::output(Tensor value, Node* node) {
  if (node == nullptr || node->num_inputs_ == 0) return Var(std::move(value));
  node->out_ = new_slot(value);
  return {std::move(value), node->out_};
}

Var Tape::leaf(Tensor value) {
  Grad grad = new_slot(value);
  return {std::move(value), std::move(grad)};
}

Tape& Tape::inner() {
  if (!inner_) inner_ = std::make_unique<Tape>(allocator_, stream_, TapeMode::training);
  inner_->hook_ = hook_;
  inner_->counts_ = false;
  return *inner_;
}

TensorView Tape::floored_rows() {
  if (!counts_) return {};
  if (!floored_) floored_ = Tensor::zeros(allocator_, Shape{1}, DType::f64, Purpose::workspace);
  return floored_.view();
}

std::int64_t Tape::take_floored_rows() {
  if (!floored_) return 0;
  double count = 0;
  copy(stream_, floored_.view(), {&count, DType::f64, Device::cpu, Shape{1}, 1});
  floored_.fill_zero();
  return static_cast<std::int64_t>(count);
}

void Tape::share_floored_rows(Tape& other) {
  other.floored_rows();
  floored_ = other.floored_;
  counts_ = other.counts_;
}

void Tape::retire(Node* node) {
  for (int i = 0; i < node->num_inputs_; ++i) {
    Grad::Slot* slot = node->inputs_[static_cast<std::size_t>(i)].slot_;
    if (--slot->pending_uses == 0 && slot->hook != nullptr) slot->hook->gradient_ready(slot->parameter_id);
  }
  node->~Node();
}

void Tape::backward(const Var& loss) {
  if (loss.value().elements() != 1) {
    throw InternalError("backward starts from one number, not from shape {}", loss.shape().text());
  }
  if (loss.requires_grad()) {
    Grad root = loss.grad();
    GradTarget to = root.target(*this);
    kernels::fill(stream_, to.view, 1.0);
    root.slot_->seed = true;
  }
  run();
}

// By value: neither y nor its gradient must live longer than the nodes that read them.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
void Tape::backward(Var y, Tensor dy) {
  if (Grad root = y.grad()) root.adopt(*this, std::move(dy));
  y = Var();
  run();
}

void Tape::run() {
  if (!recording()) throw InternalError("backward on a tape that does not record");
  while (!nodes_.empty()) {
    Node* node = nodes_.back();
    if (node->out_.written()) node->backward(*this);
    nodes_.pop_back();
    retire(node);
    if (hook_ != nullptr) hook_->node_done();
  }
  clear();
}

void Tape::clear() {
  while (!nodes_.empty()) {
    Node* node = nodes_.back();
    nodes_.pop_back();
    for (int i = 0; i < node->num_inputs_; ++i) --node->inputs_[static_cast<std::size_t>(i)].slot_->pending_uses;
    node->~Node();
  }
  chunk_ = 0;
  used_ = 0;
}

void* Tape::allocate(std::size_t bytes, std::size_t alignment) {
  constexpr std::size_t kChunk = std::size_t{64} << 10;
  if (bytes > kChunk) throw InternalError("a tape node of {} bytes", bytes);
  used_ = (used_ + alignment - 1) / alignment * alignment;
  if (chunk_ < chunks_.size() && used_ + bytes > kChunk) {
    ++chunk_;
    used_ = 0;
  }
  if (chunk_ == chunks_.size()) chunks_.push_back(std::make_unique<std::byte[]>(kChunk));
  void* place = chunks_[chunk_].get() + used_;
  used_ += bytes;
  return place;
}

namespace {
class IdentityReducer final : public Reducer {
 public:
  bool is_identity() const override { return true; }
  void sum(Stream&, ConstTensorView, TensorView) override {}
  void max(Stream&, ConstTensorView, TensorView) override {}
};
}  // namespace

Reducer& identity_reducer() {
  static IdentityReducer identity;
  return identity;
}

}  // namespace tforge
