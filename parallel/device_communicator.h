#pragma once
// What communicators for a device have in common: views of the host's memory and control data are another
// communicator's. Private to parallel/.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "parallel/checks.h"
#include "parallel/communicator.h"

namespace tforge {

class DeviceCommunicator : public Communicator {
 public:
  int rank() const final { return host_.rank(); }
  int size() const final { return host_.size(); }

  std::unique_ptr<Communicator> split(int color, int key) final {
    require_finished("split");
    std::unique_ptr<Communicator> part = host_.split(color, key);
    return part->size() == 1 ? std::move(part) : on_device(std::move(part));
  }
  void broadcast(Stream& stream, TensorView x, int root) final {
    require_finished("broadcast");
    if (x.device == Device::cpu) return host_.broadcast(stream, x, root);
    checks::sendable("broadcast", x);
    checks::root("broadcast", root, size());
    device_broadcast(stream, x, root);
  }
  void all_reduce(Stream& stream, TensorView x, ReduceOp op) final {
    require_finished("all_reduce");
    if (x.device == Device::cpu) return host_.all_reduce(stream, x, op);
    checks::sendable("all_reduce", x);
    if (x.dtype != DType::i32) require_sum("all_reduce", x.dtype);
    device_all_reduce(stream, x, op);
  }
  void all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                  std::span<const std::int64_t> counts) final {
    require_finished("all_gather");
    if (receive.device == Device::cpu) return host_.all_gather(stream, send, receive, counts);
    checks::blocks("all_gather", send, receive, counts, rank(), size());
    device_all_gather(stream, send, receive, counts);
  }
  void reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                      std::span<const std::int64_t> counts) final {
    require_finished("reduce_scatter");
    if (send.device == Device::cpu) return host_.reduce_scatter(stream, send, receive, counts);
    checks::blocks("reduce_scatter", receive, send, counts, rank(), size());
    require_sum("reduce_scatter", send.dtype);
    device_reduce_scatter(stream, send, receive, counts);
  }
  void start_reduce(Stream& stream, TensorView x, int root) final {
    if (x.device == Device::cpu) return host_.start_reduce(stream, x, root);
    checks::sendable("start_reduce", x);
    require_sum("start_reduce", x.dtype);
    if (root != kEveryRank) checks::root("start_reduce", root, size());
    device_start_reduce(stream, x, root);
  }
  std::vector<std::string> all_gather_bytes(const std::string& bytes) final {
    require_finished("all_gather_bytes");
    return host_.all_gather_bytes(bytes);
  }
  void barrier() final {
    require_finished("barrier");
    host_.barrier();
  }
  void watched(const char* verb, std::uint64_t bytes, const std::function<void()>& f) final {
    host_.watched(verb, bytes, f);
  }
  [[noreturn]] void abort(int code) final {
    host_.abort(code);
    std::_Exit(code);
  }
  void shutdown() final { host_.shutdown(); }

 protected:
  explicit DeviceCommunicator(Communicator& host) : host_(host) {}
  explicit DeviceCommunicator(std::unique_ptr<Communicator> host) : owned_(std::move(host)), host_(*owned_) {}
  Communicator& host() const { return host_; }

 private:
  void require_sum(const char* verb, DType dtype) const {
    if (dtype != DType::bf16 || !adds_bf16()) checks::floating(verb, dtype);
  }
  /// Whether it has sums of bf16 (the host has none).
  virtual bool adds_bf16() const = 0;
  /// Another of the same kind, for what split() has made.
  virtual std::unique_ptr<Communicator> on_device(std::unique_ptr<Communicator> part) = 0;
  /// Throws InternalError between start_reduce on the device and finish; the host's communicator sees to its own.
  virtual void require_finished(const char* verb) const = 0;
  // The verbs for operands on the device, which have been checked.
  virtual void device_broadcast(Stream& stream, TensorView x, int root) = 0;
  virtual void device_all_reduce(Stream& stream, TensorView x, ReduceOp op) = 0;
  virtual void device_all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                                 std::span<const std::int64_t> counts) = 0;
  virtual void device_reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                                     std::span<const std::int64_t> counts) = 0;
  virtual void device_start_reduce(Stream& stream, TensorView x, int root) = 0;

  std::unique_ptr<Communicator> owned_;
  Communicator& host_;
};

}  // namespace tforge
