// Heartbeats between threads that stand for ranks: who is named when somebody waits too long.
#include "parallel/heartbeat.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>

#include "core/errors.h"
#include "parallel/communicator.h"

namespace tforge {
namespace {

/// A job of threads.
class Ranks {
 public:
  explicit Ranks(int ranks, double timeout = 0.5, const std::string& channel = "udp") : meeting_(ranks) {
    texts_.resize(static_cast<std::size_t>(ranks));
    reports_.resize(texts_.size());
    errors_.resize(texts_.size());
    for (int r = 0; r < ranks; ++r) {
      beats_.push_back(std::make_unique<Heartbeat>(r, ranks, [this, r](const std::string& report) {
        const std::lock_guard lock(mutex_);
        EXPECT_FALSE(reports_[at(r)]) << "a rank gives up once";
        reports_[at(r)] = report;
        changed_.notify_all();
      }));
    }
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r) {
      threads.emplace_back([this, r, timeout, channel] {
        try {
          beats_[at(r)]->start(timeout, channel, [this, r](const std::string& text) { return exchange(r, text); });
        } catch (const Error& error) {
          errors_[at(r)] = error.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  Heartbeat& operator[](int r) { return *beats_[at(r)]; }
  /// No heartbeat of this rank from now on.
  void kill(int r) { beats_[at(r)].reset(); }
  /// What rank r says when it gives up, "" where another one has said it.
  std::string report(int r) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(30), [&] { return reports_[at(r)].has_value(); })) {
      ADD_FAILURE() << "rank " << r << " does not give up";
      return "?";
    }
    return *reports_[at(r)];
  }
  bool quiet() {
    const std::lock_guard lock(mutex_);
    return std::ranges::none_of(reports_, [](const auto& report) { return report.has_value(); });
  }
  const std::string& error(int r) const { return errors_[at(r)]; }
  /// "+TOKEN PORT ADDRESS ...", as rank 0 gave it to the others.
  const std::string& offer() const { return offer_; }

 private:
  static std::size_t at(int r) { return static_cast<std::size_t>(r); }

  std::vector<std::string> exchange(int r, const std::string& text) {
    texts_[at(r)] = text;
    meeting_.arrive_and_wait();
    const std::vector<std::string> all = texts_;
    meeting_.arrive_and_wait();
    if (r == 0 && text.find(" 127.0.0.1") != std::string::npos) offer_ = text;
    return all;
  }

  std::barrier<> meeting_;
  std::vector<std::string> texts_, errors_;
  std::string offer_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::optional<std::string>> reports_;
  std::vector<std::unique_ptr<Heartbeat>> beats_;
};

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

TEST(Heartbeats, NameTheRankThatIsInNoCollective) {
  Ranks ranks(3);
  ranks[1].begin("broadcast", 8);
  ranks[1].end();
  ranks[0].begin("all_reduce", 64);
  ranks[2].begin("all_reduce", 64);
  const std::string report = ranks.report(0);
  EXPECT_TRUE(has(report, "rank 1 (")) << report;
  EXPECT_TRUE(has(report, fmt::format("pid {}) is stuck or slow: in no collective for", ::getpid()))) << report;
  EXPECT_TRUE(has(report, "and 1 more wait in all_reduce (collective 1, 64 bytes) for")) << report;
  EXPECT_TRUE(has(report, "limit 0.5 s (parallel.timeout_s)")) << report;
  // Whom it does not concern ends without a word.
  EXPECT_EQ(ranks.report(1), "");
  EXPECT_EQ(ranks.report(2), "");
}

TEST(Heartbeats, NameTheRankThatIsMissing) {
  Ranks ranks(3);
  ranks.kill(2);
  ranks[0].begin("all_reduce", 64);
  ranks[1].begin("all_reduce", 64);
  const std::string report = ranks.report(0);
  EXPECT_TRUE(report.starts_with("rank 2 (")) << report;
  EXPECT_TRUE(has(report, "is missing: no heartbeat for")) << report;
  EXPECT_FALSE(has(report, "stuck")) << report;
}

TEST(Heartbeats, ARankThatWaitsIsHeardWhereRankZeroDoesNot) {
  Ranks ranks(3);
  ranks[2].begin("all_gather", 16);
  const std::string report = ranks.report(0);
  EXPECT_TRUE(has(report, "rank 0 (") && has(report, "; rank 1 (")) << report;
  EXPECT_TRUE(has(report, ") waits in all_gather (collective 1, 16 bytes)")) << report;
}

TEST(Heartbeats, RankZeroIsMissedByTheOthers) {
  Ranks ranks(3);
  ranks.kill(0);
  ranks[1].begin("all_reduce", 64);
  ranks[2].begin("all_reduce", 64);
  for (const int r : {1, 2}) {
    const std::string report = ranks.report(r);
    EXPECT_TRUE(report.starts_with("rank 0 (")) << report;
    EXPECT_TRUE(has(report, "is missing: no answer to heartbeats for")) << report;
    EXPECT_TRUE(has(report, fmt::format("rank {} (", r))) << report;
  }
}

TEST(Heartbeats, DifferentCollectivesAreTold) {
  Ranks ranks(2);
  ranks[0].begin("all_reduce", 64);
  ranks[1].begin("barrier", 0);
  const std::string report = ranks.report(0);
  EXPECT_TRUE(report.starts_with("the ranks wait in different collectives")) << report;
  EXPECT_TRUE(has(report, "all_reduce (collective 1, 64 bytes)") && has(report, "barrier (collective 1, 0 bytes)"))
      << report;
}

TEST(Heartbeats, ManyShortCollectivesAreNoHang) {
  Ranks ranks(2, 0.2);
  for (int i = 0; i < 40; ++i) {
    for (const int r : {0, 1}) ranks[r].begin("all_reduce", 64);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    for (const int r : {0, 1}) ranks[r].end();
  }
  EXPECT_TRUE(ranks.quiet());
}

TEST(Heartbeats, StrayPacketsAreIgnored) {
  Ranks ranks(2);
  const std::size_t space = ranks.offer().find(' ');
  ASSERT_NE(space, std::string::npos) << ranks.offer();
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(static_cast<std::uint16_t>(std::stoul(ranks.offer().substr(space))));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int socket = ::socket(AF_INET, SOCK_DGRAM, 0);
  const auto send = [&](const void* bytes, std::size_t count) {
    ::sendto(socket, bytes, count, 0, reinterpret_cast<const sockaddr*>(&to), sizeof(to));
  };
  // "Rank 1 waits for an hour", with the wrong number in front.
  std::array<char, 152> forged{};
  const std::uint64_t token = std::stoull(ranks.offer().substr(1)) + 1;
  const std::uint32_t kind = 1, rank = 1;
  const std::uint64_t sequence = 1;
  const double seconds = 3600;
  std::memcpy(forged.data(), &token, 8);
  std::memcpy(forged.data() + 8, &kind, 4);
  std::memcpy(forged.data() + 12, &rank, 4);
  std::memcpy(forged.data() + 24, &sequence, 8);
  std::memcpy(forged.data() + 48, &seconds, 8);
  for (int i = 0; i < 30; ++i) {
    send(forged.data(), forged.size());
    send("?", 1);
    send(forged.data(), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  EXPECT_TRUE(ranks.quiet());
  // The right number, from a rank that there is not; then the same from rank 1: what the numbers keep out.
  const std::uint64_t right = token - 1;
  const std::uint32_t no_rank = 7;
  std::memcpy(forged.data(), &right, 8);
  std::memcpy(forged.data() + 12, &no_rank, 4);
  send(forged.data(), forged.size());
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_TRUE(ranks.quiet());
  std::memcpy(forged.data() + 12, &rank, 4);
  // Until it arrives between two that rank 1 sends itself.
  for (int i = 0; i < 3000 && ranks.quiet(); ++i) {
    send(forged.data(), forged.size());
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
  EXPECT_NE(ranks.report(0), "");
  ::close(socket);
}

TEST(Heartbeats, WithoutAChannelEachRankWatchesItself) {
  Ranks ranks(2, 0.3, "local");
  ranks[1].begin("all_reduce", 64);
  const std::string report = ranks.report(1);
  EXPECT_TRUE(has(report, "of 2 waits in all_reduce (collective 1, 64 bytes)")) << report;
  EXPECT_TRUE(has(report, "another rank is dead, stuck or in another collective")) << report;
}

TEST(Heartbeats, WhatCannotBeHadIsAnErrorOnEveryRank) {
  Ranks other(2, 0.5, "udp:nosuch");
  EXPECT_TRUE(has(other.error(0), "has no such network interface with an IPv4 address; it has: ")) << other.error(0);
  EXPECT_TRUE(has(other.error(0), "lo")) << other.error(0);
  EXPECT_EQ(other.error(1), other.error(0));
  for (const char* wrong : {"", "tcp", "udp:", "udpx", "local:lo"}) EXPECT_FALSE(is_heartbeat_channel(wrong)) << wrong;
  Ranks named(2, 0.5, "udp:lo");
  EXPECT_EQ(named.error(0) + named.error(1), "");
}

TEST(Heartbeats, NoLimitWatchesNothing) {
  Ranks ranks(2, 0);
  ranks[0].begin("all_reduce", 64);
  Ranks alone(1, 0.05);
  alone[0].begin("all_reduce", 64);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_TRUE(ranks.quiet() && alone.quiet());
}

}  // namespace
}  // namespace tforge
