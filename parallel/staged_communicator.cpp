// Collectives of tensors on a device through pinned memory of the host.
#include <numeric>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "core/copy.h"
#include "core/device_queue.h"
#include "parallel/device_communicator.h"
#include "parallel/device_world.h"

namespace tforge {
namespace {

class StagedCommunicator final : public DeviceCommunicator {
 public:
  StagedCommunicator(Communicator& host, std::shared_ptr<Allocator> pinned)
      : DeviceCommunicator(host), pinned_(std::move(pinned)) {}
  StagedCommunicator(std::unique_ptr<Communicator> host, std::shared_ptr<Allocator> pinned)
      : DeviceCommunicator(std::move(host)), pinned_(std::move(pinned)) {}

  void progress() override { host().progress(); }
  void finish() override {
    host().finish();
    for (const Started& s : started_) {
      if (s.root == kEveryRank || s.root == rank()) copy(*s.stream, std::as_const(s.staged).view(), s.x);
    }
    started_.clear();
  }
  /// That of the host's communicator: waiting for the device to come so far is no communication.
  Traffic traffic() const override { return host().traffic(); }

 private:
  struct Started {
    const Stream* stream;
    TensorView x;
    Tensor staged;
    int root;
  };

  std::unique_ptr<Communicator> on_device(std::unique_ptr<Communicator> part) override {
    return std::make_unique<StagedCommunicator>(std::move(part), pinned_);
  }

  bool adds_bf16() const override { return false; }
  void require_finished(const char*) const override {}  // what was started is the host's

  void device_broadcast(Stream& stream, TensorView x, int root) override {
    Tensor staged = rank() == root ? fetched(stream, x) : room(stream, x.shape, x.dtype);
    host().broadcast(stream, staged.view(), root);
    if (rank() != root) copy(stream, std::as_const(staged).view(), x);
  }

  void device_all_reduce(Stream& stream, TensorView x, ReduceOp op) override {
    Tensor staged = fetched(stream, x);
    host().all_reduce(stream, staged.view(), op);
    copy(stream, std::as_const(staged).view(), x);
  }

  void device_all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                         std::span<const std::int64_t> counts) override {
    Tensor all = room(stream, Shape{receive.elements()}, receive.dtype);
    Tensor own = part_of(all, counts);
    copy(stream, flat(send), own.view());
    host().all_gather(stream, std::as_const(own).view(), all.view(), counts);
    copy(stream, std::as_const(all).view(), flat(receive));
  }

  void device_reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                             std::span<const std::int64_t> counts) override {
    Tensor all = fetched(stream, flat(send));
    Tensor own = part_of(all, counts);
    host().reduce_scatter(stream, std::as_const(all).view(), own.view(), counts);
    copy(stream, std::as_const(own).view(), flat(receive));
  }

  void device_start_reduce(Stream& stream, TensorView x, int root) override {
    Tensor staged = fetched(stream, x);
    host().start_reduce(stream, staged.view(), root);
    started_.push_back({&stream, x, std::move(staged), root});
  }

  /// Pinned memory that the host may write: copies to the device that read it before are over.
  Tensor room(const Stream& stream, const Shape& shape, DType dtype) {
    wait(stream);
    return Tensor::empty(*pinned_, shape, dtype, Purpose::communication);
  }
  Tensor fetched(const Stream& stream, const ConstTensorView& x) {
    Tensor staged = room(stream, x.shape, x.dtype);
    copy(stream, x, staged.view());
    return staged;
  }
  Tensor part_of(const Tensor& all, std::span<const std::int64_t> counts) const {
    const std::int64_t first = std::accumulate(counts.begin(), counts.begin() + rank(), std::int64_t{0});
    return all.rows(first, counts[static_cast<std::size_t>(rank())]);
  }
  template <class View>
  static View flat(View x) {
    x.row_stride = x.elements();
    x.shape = Shape{x.row_stride};
    return x;
  }

  std::shared_ptr<Allocator> pinned_;  // before what lies in it
  std::vector<Started> started_;
};

}  // namespace

std::unique_ptr<Communicator> create_staged(Communicator& world, const Stream& stream) {
  return std::make_unique<StagedCommunicator>(world, std::make_shared<Allocator>(stream, HostMemory::pinned));
}

}  // namespace tforge
