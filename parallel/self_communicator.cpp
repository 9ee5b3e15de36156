// Communicators of which one rank is here: nothing is sent, arguments are checked and traffic is counted as if it were.
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "core/copy.h"
#include "core/errors.h"
#include "kernels/work.h"
#include "parallel/checks.h"
#include "parallel/communicator.h"

namespace tforge {
namespace {

void copy_unless_there(const Stream& stream, ConstTensorView from, TensorView to) {
  if (from.data == to.data) return;
  to.shape = from.shape;
  to.row_stride = from.row_stride;
  copy(stream, from, to);
}

class LoneCommunicator final : public Communicator {
 public:
  LoneCommunicator(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::unique_ptr<Communicator> split(int, int) override {
    if (size_ > 1) throw InternalError("split: {} of {} ranks are not there", size_ - 1, size_);
    return create_self();
  }
  void barrier() override {}
  void broadcast(Stream&, TensorView x, int root) override {
    checks::sendable("broadcast", x);
    checks::root("broadcast", root, size_);
    count(x);
  }
  void all_reduce(Stream&, TensorView x, ReduceOp) override {
    checks::sendable("all_reduce", x);
    count(x);
  }
  void all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                  std::span<const std::int64_t> counts) override {
    checks::blocks("all_gather", send, receive, counts, rank_, size_);
    copy_unless_there(stream, send, own_block(receive, counts));
    count(send);
  }
  void reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                      std::span<const std::int64_t> counts) override {
    checks::blocks("reduce_scatter", receive, send, counts, rank_, size_);
    checks::floating("reduce_scatter", send.dtype);
    copy_unless_there(stream, own_block(send, counts), receive);
    count(send);
  }
  void start_reduce(Stream&, TensorView x, int root) override {
    checks::sendable("start_reduce", x);
    checks::floating("start_reduce", x.dtype);
    if (root != kEveryRank) checks::root("start_reduce", root, size_);
    count(x);
  }
  void progress() override {}
  void finish() override {}
  std::vector<std::string> all_gather_bytes(const std::string& bytes) override {
    return std::vector<std::string>(static_cast<std::size_t>(size_), bytes);
  }
  void watched(const char*, std::uint64_t, const std::function<void()>& f) override { f(); }
  [[noreturn]] void abort(int code) override {
    std::fflush(nullptr);
    std::_Exit(code);
  }
  void shutdown() override {}
  Traffic traffic() const override { return traffic_; }

 private:
  /// This rank's block of what holds one of each.
  template <class View>
  View own_block(View all, std::span<const std::int64_t> counts) const {
    const auto own = counts.begin() + rank_;
    const std::int64_t before = std::accumulate(counts.begin(), own, std::int64_t{0});
    all.shape = Shape{all.elements(), 1};
    all.row_stride = 1;
    View block = all.row_range(before, *own);
    block.shape = Shape{*own};
    block.row_stride = *own;
    return block;
  }
  /// A rank that is alone has nobody to send to.
  void count(const ConstTensorView& sent) {
    if (size_ == 1) return;
    ++traffic_.calls;
    traffic_.bytes += static_cast<std::uint64_t>(kernels::bytes_of(sent));
  }

  int rank_, size_;
  Traffic traffic_;
};

}  // namespace

std::unique_ptr<Communicator> create_self() { return create_lone(0, 1); }

std::unique_ptr<Communicator> create_lone(int rank, int size) {
  checks::root("create_lone", rank, size);
  return std::make_unique<LoneCommunicator>(rank, size);
}

}  // namespace tforge
