// A communicator of one rank: nothing is sent, arguments are checked as if it were.
#include <cstdio>
#include <cstdlib>

#include "core/copy.h"
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

class SelfCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::unique_ptr<Communicator> split(int, int) override { return create_self(); }
  void barrier() override {}
  void broadcast(Stream&, TensorView x, int root) override {
    checks::sendable("broadcast", x);
    checks::root("broadcast", root, 1);
  }
  void all_reduce(Stream&, TensorView x, ReduceOp) override { checks::sendable("all_reduce", x); }
  void all_gather(Stream& stream, ConstTensorView send, TensorView receive,
                  std::span<const std::int64_t> counts) override {
    checks::blocks("all_gather", send, receive, counts, 0, 1);
    copy_unless_there(stream, send, receive);
  }
  void reduce_scatter(Stream& stream, ConstTensorView send, TensorView receive,
                      std::span<const std::int64_t> counts) override {
    checks::blocks("reduce_scatter", receive, send, counts, 0, 1);
    checks::floating("reduce_scatter", send.dtype);
    copy_unless_there(stream, send, receive);
  }
  void start_reduce(Stream&, TensorView x, int root) override {
    checks::sendable("start_reduce", x);
    checks::floating("start_reduce", x.dtype);
    if (root != kEveryRank) checks::root("start_reduce", root, 1);
  }
  void progress() override {}
  void finish() override {}
  std::vector<std::string> all_gather_bytes(const std::string& bytes) override { return {bytes}; }
  [[noreturn]] void abort(int code) override {
    std::fflush(nullptr);
    std::_Exit(code);
  }
  void shutdown() override {}
  Traffic traffic() const override { return {}; }
};

}  // namespace

std::unique_ptr<Communicator> create_self() { return std::make_unique<SelfCommunicator>(); }

}  // namespace tforge
