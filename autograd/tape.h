#pragma once
// Tape: records the ops of one forward pass and runs them backwards.
//
// One tape lives for a whole run: clear() keeps its memory, so a steady training step allocates nothing. A backward
// pass destroys each node after running it, which gives its saved tensors back to the allocator at once.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "autograd/saved.h"
#include "autograd/var.h"
#include "core/allocator.h"
#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

/// The backward half of one op. A subclass holds its saved tensors and the slots it writes, under their names.
class Node {
 public:
  virtual ~Node() = default;
  /// Reads dy(), writes the slots of its inputs.
  virtual void backward(Tape& tape) = 0;

 protected:
  /// Declares an input: returns the slot to write to, empty when the input wants no gradient.
  Grad use(const Var& input);
  /// Gradient of this node's output.
  const Grad& dy() const { return out_; }
  Grad& dy() { return out_; }

 private:
  friend class Tape;
  static constexpr int kMaxInputs = 12;
  Grad out_;
  std::array<Grad, kMaxInputs> inputs_;
  int num_inputs_ = 0;
};

enum class TapeMode : std::uint8_t { training, inference };

class Tape {
 public:
  Tape(Allocator& allocator, Stream& stream, TapeMode mode, SavePolicy saves = {});
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  Allocator& allocator() { return allocator_; }
  Stream& stream() { return stream_; }
  bool recording() const { return mode_ == TapeMode::training; }
  const SavePolicy& saves() const { return saves_; }
  /// `hook` (may be null, else outlives the tape) hears of every node that a backward pass is done with.
  void set_hook(GradHook* hook) { hook_ = hook; }

  Tensor empty(const Shape& shape, DType dtype, Purpose purpose = Purpose::activations) {
    return Tensor::empty(allocator_, shape, dtype, purpose);
  }

  /// A node of type N in the tape's arena, or null when the tape is in inference mode. The op fills it, declares its
  /// inputs with use() in its constructor, and then calls output().
  template <class N, class... Args>
  N* record(Args&&... args) {
    if (!recording()) return nullptr;
    void* place = allocate(sizeof(N), alignof(N));
    N* node = new (place) N(std::forward<Args>(args)...);
    nodes_.push_back(node);
    return node;
  }
  /// The op's result: wants a gradient exactly when `node` has an input that does.
  Var output(Tensor value, Node* node);
  /// A value that no node of this tape made but whose gradient is wanted: the caller takes it after backward.
  Var leaf(Tensor value);

  /// Runs the recorded nodes in reverse from `loss` (one element, gradient 1) and clears the tape.
  /// Throws InternalError when the tape does not record or the loss has more than one element.
  void backward(const Var& loss);
  /// The same from any value y, whose gradient is `dy`; takes both over.
  void backward(Var y, Tensor dy);
  /// Drops all recorded nodes; keeps the memory of the tape itself.
  void clear();
  /// Another recording over the same allocator and stream, for a node that runs a part of the forward pass again in its
  /// backward. It keeps everything as it is; one at a time.
  Tape& inner();

  /// Where Pattention counts rows whose norm was below the floor (this rank's); empty in a recording by inner(), whose
  /// rows were counted in forward.
  TensorView floored_rows();
  /// The count since the last call. Waits for the device.
  std::int64_t take_floored_rows();
  /// Counts in `other` from now on.
  void share_floored_rows(Tape& other);

 private:
  friend class Grad;
  void* allocate(std::size_t bytes, std::size_t alignment);
  void retire(Node* node);
  Grad new_slot(const Tensor& value);
  void run();

  Allocator& allocator_;
  Stream& stream_;
  TapeMode mode_;
  SavePolicy saves_;
  GradHook* hook_ = nullptr;
  std::vector<Node*> nodes_;
  std::vector<std::unique_ptr<std::byte[]>> chunks_;
  std::size_t chunk_ = 0;
  std::size_t used_ = 0;
  std::vector<Grad::Slot*> free_slots_;
  std::unique_ptr<Tape> inner_;
  bool counts_ = true;
  Tensor floored_;  // [1] f64, from the first count on
};

}  // namespace tforge
