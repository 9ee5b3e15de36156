#include "parallel/heartbeat.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <system_error>

#include "core/errors.h"
#include "parallel/communicator.h"

namespace tforge {
namespace {

using Clock = std::chrono::steady_clock;

/// How long the ranks look for an address of rank 0 that answers (at most half of the limit), and how often they ask.
constexpr double kSearchSeconds = 10;
constexpr double kSearchInterval = 0.05;

constexpr std::string_view kLocal = "local", kUdp = "udp", kUdpOver = "udp:";

std::atomic<const char*> phase_name{"start"};
std::atomic<std::int64_t> phase_step{-1};
// A short text, cut into numbers: a reader may see a mixture of two while it changes, never freed memory.
constexpr std::size_t kPlaceWords = 5;
std::array<std::atomic<std::uint64_t>, kPlaceWords> phase_place{};

[[noreturn]] void fail(const char* what) {
  throw ResourceError("heartbeats: {}: {}", what, std::generic_category().message(errno));
}

/// A descriptor that closes itself.
struct Descriptor {
  explicit Descriptor(int its_value = -1) : value(its_value) {}
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value;
};

enum class Kind : std::uint32_t { beat = 1, answer = 2, over = 3 };

template <std::size_t N>
void put(std::array<char, N>& to, const char* text) {
  std::snprintf(to.data(), N, "%s", text);
}

/// What travels, between processes of one binary.
struct Packet {
  std::uint64_t token = 0;
  Kind kind = Kind::beat;
  std::int32_t rank = 0;     // of a beat: who sends it
  std::int64_t address = 0;  // of rank 0, that the beat went to; an answer repeats it
  std::uint64_t sequence = 0;
  std::uint64_t bytes = 0;
  std::int64_t step = -1;
  double seconds = 0;  // since `sequence` last changed, in ticks of the sender
  std::array<char, 24> operation{};
  std::array<char, 32> phase{};
  std::array<char, kPlaceWords * sizeof(std::uint64_t)> place{};
};
static_assert(sizeof(Packet) == 152 && std::is_trivially_copyable_v<Packet>);

/// The IPv4 addresses of this node, by interface.
std::vector<std::pair<std::string, in_addr>> node_addresses() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) fail("the network interfaces cannot be listed");
  std::vector<std::pair<std::string, in_addr>> all;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != AF_INET || (i->ifa_flags & IFF_UP) == 0) continue;
    sockaddr_in address{};
    std::memcpy(&address, i->ifa_addr, sizeof(address));
    all.emplace_back(i->ifa_name, address.sin_addr);
  }
  ::freeifaddrs(list);
  return all;
}

std::string text_of(in_addr address) {
  std::array<char, INET_ADDRSTRLEN> text{};
  return ::inet_ntop(AF_INET, &address, text.data(), text.size()) == nullptr ? "?" : text.data();
}

std::string host_and_pid() {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '?';
  return fmt::format("{}, pid {}", host.data(), ::getpid());
}

/// "3 s", "0.25 s"
std::string seconds_text(double seconds) { return fmt::format("{:.3g} s", seconds); }

/// "phase \"forward\", step 7, layers.3.ffn.keys"
std::string place_text(const Packet& p) {
  std::string text = fmt::format("phase \"{}\"", p.phase.data());
  if (p.step >= 0) text += fmt::format(", step {}", p.step);
  if (p.place[0] != '\0') text += fmt::format(", {}", p.place.data());
  return text;
}

bool in_collective(const Packet& p) { return p.sequence % 2 == 1; }

/// "all_reduce (collective 4, 64 bytes)"
std::string collective_text(const Packet& p) {
  return fmt::format("{} (collective {}, {} bytes)", p.operation.data(), (p.sequence + 1) / 2, p.bytes);
}

}  // namespace

bool is_heartbeat_channel(std::string_view channel) {
  return channel == kLocal || channel == kUdp || (channel.starts_with(kUdpOver) && channel != kUdpOver);
}

void set_phase(const char* phase, std::int64_t step) {
  phase_name.store(phase, std::memory_order_relaxed);
  phase_step.store(step, std::memory_order_relaxed);
  set_place("");
}

void set_place(std::string_view place) {
  std::array<std::uint64_t, kPlaceWords> words{};
  std::memcpy(words.data(), place.data(), std::min(place.size(), sizeof(words) - 1));
  for (std::size_t i = 0; i < kPlaceWords; ++i) phase_place[i].store(words[i], std::memory_order_relaxed);
}

struct Heartbeat::Monitor {
  /// What is known of a rank. Rank 0 keeps all of them, the others themselves and rank 0.
  struct Peer {
    Packet last;
    double silent_seconds = 0;
    sockaddr_in from{};
    bool heard = false;
    std::string name;  // host and pid
  };

  Monitor(Heartbeat& its_owner, double timeout)
      : owner(its_owner),
        timeout_seconds(timeout),
        // Late by at most a twentieth of the limit, and by a second at the most.
        interval(std::clamp(timeout / 20, 0.01, 1.0)),
        peers(static_cast<std::size_t>(its_owner.ranks_)),
        wake(::eventfd(0, EFD_CLOEXEC)) {
    if (wake.value < 0) fail("no descriptor to wake the thread with");
  }
  ~Monitor() {
    if (!thread.joinable()) return;
    stopping.store(true);
    const std::uint64_t one = 1;
    // It cannot fail: the counter is far from full.
    [[maybe_unused]] const auto written = ::write(wake.value, &one, sizeof(one));
    thread.join();
  }
  Monitor(const Monitor&) = delete;
  Monitor& operator=(const Monitor&) = delete;

  Peer& own() { return peers[static_cast<std::size_t>(owner.rank_)]; }
  bool is_rank_0() const { return owner.rank_ == 0; }
  bool has_channel() const { return socket.value >= 0; }

  void open_socket(in_addr bound_to);
  std::string offer(const std::string& interface);
  void take_offer(const std::string& text);
  bool find_rank_0();

  void run();
  void tick(double seconds);
  void observe(double seconds);
  void receive();
  void heard_beat(const Packet& packet, const sockaddr_in& from);
  void send(const Packet& packet, const sockaddr_in& to) const;
  void send_beat();
  void judge();
  std::string verdict() const;
  void judge_alone();
  void end_job(const std::string& report) {
    stopping.store(true);
    owner.give_up_(report);
  }
  std::string rank_text(std::size_t r) const { return fmt::format("rank {} ({})", r, peers[r].name); }
  /// Nobody is called missing for less.
  double missing_after() const { return std::max(10 * interval, timeout_seconds / 2); }

  Heartbeat& owner;
  const double timeout_seconds;
  const double interval;
  std::vector<Peer> peers;
  Descriptor wake;
  Descriptor socket;
  std::uint64_t token = 0;
  std::vector<sockaddr_in> addresses;  // of rank 0
  // Which of them answered. Written by the monitoring thread, waited for by start().
  std::atomic<std::int64_t> answered{-1};
  std::mutex mutex;
  std::condition_variable found;
  std::atomic<bool> stopping{false};
  std::thread thread;
};

void Heartbeat::Monitor::open_socket(in_addr bound_to) {
  socket.value = ::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket.value < 0) fail("no UDP socket");
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr = bound_to;
  if (::bind(socket.value, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    fail("the UDP socket cannot be bound");
  }
}

/// On rank 0: opens the socket and says where it can be reached: "TOKEN PORT ADDRESS ADDRESS ...".
std::string Heartbeat::Monitor::offer(const std::string& interface) {
  const auto all = node_addresses();
  std::string text, names;
  in_addr only{};
  for (const auto& [name, address] : all) {
    if (names.find(name) == std::string::npos) names += (names.empty() ? "" : ", ") + name;
    if (!interface.empty() && name != interface) continue;
    text += " " + text_of(address);
    only = address;
  }
  if (text.empty()) {
    throw ResourceError(
        "parallel.heartbeat = \"udp{}{}\": rank 0 ({}) has no such network interface with an IPv4 address; it has: {}; "
        "\"local\" does without heartbeats",
        interface.empty() ? "" : ":", interface, own().name, names);
  }
  in_addr any{};
  any.s_addr = htonl(INADDR_ANY);
  open_socket(interface.empty() ? any : only);
  sockaddr_in bound{};
  socklen_t length = sizeof(bound);
  if (::getsockname(socket.value, reinterpret_cast<sockaddr*>(&bound), &length) != 0) fail("the port is not known");
  if (::getrandom(&token, sizeof(token), 0) != sizeof(token)) fail("no random number");
  return fmt::format("{} {}{}", token, ntohs(bound.sin_port), text);
}

void Heartbeat::Monitor::take_offer(const std::string& text) {
  std::size_t at = 0;
  const auto word = [&] {
    const std::size_t end = std::min(text.find(' ', at), text.size());
    std::string part = text.substr(at, end - at);
    at = std::min(end + 1, text.size());
    return part;
  };
  token = std::stoull(word());
  const auto port = static_cast<std::uint16_t>(std::stoul(word()));
  while (at < text.size()) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    if (::inet_pton(AF_INET, word().c_str(), &address.sin_addr) == 1) addresses.push_back(address);
  }
  in_addr any{};
  any.s_addr = htonl(INADDR_ANY);
  open_socket(any);
}

/// Waits until an address of rank 0 has answered.
bool Heartbeat::Monitor::find_rank_0() {
  if (is_rank_0()) return true;
  std::unique_lock lock(mutex);
  const std::chrono::duration<double> limit(std::min(kSearchSeconds, timeout_seconds / 2));
  return found.wait_for(lock, limit, [this] { return answered.load() >= 0; });
}

void Heartbeat::Monitor::run() {
  Clock::time_point next = Clock::now();
  double seconds = 0;  // that the coming tick stands for
  while (true) {
    const auto left =
        std::max<std::int64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(next - Clock::now()).count(), 0);
    const timespec wait{left / 1'000'000'000, left % 1'000'000'000};
    std::array<pollfd, 2> wanted{{{wake.value, POLLIN, 0}, {socket.value, POLLIN, 0}}};
    // A signal or an error only makes the loop turn once more.
    ::ppoll(wanted.data(), has_channel() ? 2 : 1, &wait, nullptr);
    if (stopping.load()) return;
    if (has_channel()) receive();
    if (stopping.load()) return;
    const Clock::time_point now = Clock::now();
    if (now < next) continue;
    tick(seconds);
    // However long this thread was suspended, it was one tick.
    const bool searching = has_channel() && !is_rank_0() && answered.load() < 0;
    seconds = searching ? std::min(interval, kSearchInterval) : interval;
    next = now + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  }
}

void Heartbeat::Monitor::tick(double seconds) {
  observe(seconds);
  if (has_channel() && is_rank_0()) {
    for (std::size_t r = 1; r < peers.size(); ++r) peers[r].silent_seconds += seconds;
    judge();
    return;
  }
  if (has_channel()) {
    peers[0].silent_seconds += seconds;
    send_beat();
  }
  judge_alone();
}

/// This rank's own record.
void Heartbeat::Monitor::observe(double seconds) {
  Packet& p = own().last;
  const std::uint64_t sequence = owner.sequence_.load(std::memory_order_acquire);
  const char* operation = owner.operation_.load(std::memory_order_acquire);
  const std::uint64_t bytes = owner.bytes_.load(std::memory_order_acquire);
  // A record that changed while it was read is looked at again in the next tick; something moves.
  const bool moved = sequence != p.sequence || owner.sequence_.load(std::memory_order_acquire) != sequence;
  p.token = token;
  p.rank = owner.rank_;
  p.sequence = sequence;
  p.seconds = moved ? 0 : p.seconds + seconds;
  p.bytes = bytes;
  put(p.operation, operation);
  p.step = phase_step.load(std::memory_order_relaxed);
  put(p.phase, phase_name.load(std::memory_order_relaxed));
  for (std::size_t i = 0; i < kPlaceWords; ++i) {
    const std::uint64_t word = phase_place[i].load(std::memory_order_relaxed);
    std::memcpy(p.place.data() + i * sizeof(word), &word, sizeof(word));
  }
}

void Heartbeat::Monitor::send(const Packet& packet, const sockaddr_in& to) const {
  // What is lost is sent again with the next tick; that a network is gone shows in the answers that do not come.
  ::sendto(socket.value, &packet, sizeof(packet), 0, reinterpret_cast<const sockaddr*>(&to), sizeof(to));
}

void Heartbeat::Monitor::send_beat() {
  Packet packet = own().last;
  packet.kind = Kind::beat;
  for (std::size_t i = 0; i < addresses.size(); ++i) {
    packet.address = static_cast<std::int64_t>(i);
    if (answered.load() < 0 || answered.load() == packet.address) send(packet, addresses[i]);
  }
}

void Heartbeat::Monitor::receive() {
  while (true) {
    Packet packet;
    sockaddr_in from{};
    socklen_t length = sizeof(from);
    const ssize_t count = ::recvfrom(socket.value, &packet, sizeof(packet), MSG_DONTWAIT | MSG_TRUNC,
                                     reinterpret_cast<sockaddr*>(&from), &length);
    if (count < 0) return;
    if (count != sizeof(packet) || packet.token != token) continue;  // not ours
    if (is_rank_0()) {
      if (packet.kind == Kind::beat && packet.rank > 0 && packet.rank < owner.ranks_) heard_beat(packet, from);
      continue;
    }
    if (packet.kind == Kind::over) {
      end_job("");
      return;
    }
    if (packet.kind != Kind::answer || packet.address < 0 || packet.address >= std::ssize(addresses)) continue;
    peers[0].silent_seconds = 0;
    if (answered.load() >= 0) continue;
    {
      const std::lock_guard lock(mutex);
      answered.store(packet.address);
    }
    found.notify_one();
  }
}

void Heartbeat::Monitor::heard_beat(const Packet& packet, const sockaddr_in& from) {
  Peer& peer = peers[static_cast<std::size_t>(packet.rank)];
  peer.last = packet;
  peer.last.operation.back() = peer.last.phase.back() = peer.last.place.back() = '\0';
  peer.from = from;
  peer.heard = true;
  peer.silent_seconds = 0;
  Packet answer = packet;
  answer.kind = Kind::answer;
  send(answer, from);
}

/// On rank 0: has somebody waited too long?
void Heartbeat::Monitor::judge() {
  const bool over = std::ranges::any_of(peers, [this](const Peer& p) {
    return in_collective(p.last) && p.last.seconds >= timeout_seconds && p.silent_seconds < missing_after();
  });
  if (!over) return;
  const std::string report = verdict();
  Packet packet = own().last;
  packet.kind = Kind::over;
  for (int again = 0; again < 3; ++again) {
    for (const Peer& peer : peers) {
      if (peer.heard) send(packet, peer.from);
    }
  }
  end_job(report);
}

/// Who is to blame, in one line.
std::string Heartbeat::Monitor::verdict() const {
  std::string missing, elsewhere, waiting;
  const auto add = [](std::string& list, const std::string& item) { list += (list.empty() ? "" : "; ") + item; };
  std::map<std::string, std::vector<std::size_t>> collectives;  // who waits, by what for
  for (std::size_t r = 0; r < peers.size(); ++r) {
    const Packet& p = peers[r].last;
    if (peers[r].silent_seconds >= missing_after()) {
      add(missing, fmt::format("{} is missing: no heartbeat for {}, last heard of in {}{}", rank_text(r),
                               seconds_text(peers[r].silent_seconds), place_text(p),
                               in_collective(p) ? ", " + collective_text(p) : ""));
    } else if (!in_collective(p)) {
      add(elsewhere, fmt::format("{} is stuck or slow: in no collective for {}, {}", rank_text(r),
                                 seconds_text(p.seconds), place_text(p)));
    } else {
      // Numbers count what a rank has called; in a mesh they differ between groups of ranks.
      collectives[fmt::format("{}, {} bytes", p.operation.data(), p.bytes)].push_back(r);
    }
  }
  for (const auto& [name, ranks] : collectives) {
    const auto longest = std::ranges::max_element(ranks, {}, [this](std::size_t r) { return peers[r].last.seconds; });
    const Packet& p = peers[*longest].last;
    std::string others = ranks.size() == 1 ? "waits" : fmt::format("and {} more wait", ranks.size() - 1);
    add(waiting, fmt::format("{} {} in {} for {}, {}", rank_text(*longest), others, collective_text(p),
                             seconds_text(p.seconds), place_text(p)));
  }
  std::string text = missing;
  if (!elsewhere.empty()) add(text, elsewhere);
  if (text.empty()) {
    text = collectives.size() > 1 ? "the ranks wait in different collectives, so that none can finish"
                                  : "every rank waits in the same collective and none gets on: look at the network";
  }
  return fmt::format("{}; limit {} (parallel.timeout_s): {}", text, seconds_text(timeout_seconds), waiting);
}

/// On any other rank, or without a channel: rank 0 would have said something by now.
void Heartbeat::Monitor::judge_alone() {
  const Packet& p = own().last;
  // One after the other, so that one line comes out before the launcher ends the rest.
  const double patience =
      has_channel() ? std::max(4 * interval, timeout_seconds / 4) + std::min(owner.rank_, 20) * interval : 0;
  if (!in_collective(p) || p.seconds < timeout_seconds + patience) return;
  const std::string waits =
      fmt::format("{} of {} waits in {} for {}, {}", rank_text(static_cast<std::size_t>(owner.rank_)), owner.ranks_,
                  collective_text(p), seconds_text(p.seconds), place_text(p));
  std::string report;
  if (!has_channel()) {
    report = fmt::format(
        "{}; limit {} (parallel.timeout_s): another rank is dead, stuck or in another collective; "
        "parallel.heartbeat = \"udp\" would name it",
        waits, seconds_text(timeout_seconds));
  } else if (peers[0].silent_seconds >= missing_after()) {
    report = fmt::format("{} is missing: no answer to heartbeats for {}; limit {} (parallel.timeout_s): {}",
                         rank_text(0), seconds_text(peers[0].silent_seconds), seconds_text(timeout_seconds), waits);
  } else {
    report = fmt::format("{}; limit {} (parallel.timeout_s): rank 0 answers, but has not ended the job", waits,
                         seconds_text(timeout_seconds));
  }
  end_job(report);
}

void Heartbeat::end_process(const std::string& report) {
  if (!report.empty()) fmt::print(stderr, "error: {}\n", report);
  std::fflush(stderr);
  std::_Exit(static_cast<int>(ExitCode::hang));
}

Heartbeat::Heartbeat(int rank, int ranks, GiveUp give_up) : rank_(rank), ranks_(ranks), give_up_(std::move(give_up)) {}

Heartbeat::~Heartbeat() = default;

void Heartbeat::start(double timeout_seconds, const std::string& channel, const Exchange& exchange) {
  if (!is_heartbeat_channel(channel)) throw InternalError("heartbeats over \"{}\"", channel);
  const bool udp = channel != kLocal;
  if (ranks_ == 1 || !(timeout_seconds > 0)) return;
  auto monitor = std::make_unique<Monitor>(*this, timeout_seconds);
  const std::string name = host_and_pid();
  monitor->own().name = name;

  // A failure on one rank is everyone's: it travels in place of what was to be told.
  const auto agree = [&](const std::function<std::string()>& f) {
    std::string text;
    try {
      text = "+" + f();
    } catch (const ResourceError& error) {
      text = fmt::format("-{}", error.what());
    }
    std::vector<std::string> all = exchange(text);
    for (std::string& one : all) {
      if (one.starts_with('-')) throw ResourceError(one.substr(1));
      one.erase(0, 1);
    }
    return all;
  };
  const std::vector<std::string> names = agree([&] { return name; });
  for (std::size_t r = 0; r < names.size(); ++r) monitor->peers[r].name = names[r];
  if (udp) {
    const std::string interface = channel == kUdp ? "" : channel.substr(kUdpOver.size());
    const std::string offer = agree([&] { return rank_ == 0 ? monitor->offer(interface) : std::string(); })[0];
    agree([&] {
      if (rank_ > 0) monitor->take_offer(offer);
      return std::string();
    });
    Monitor* const watched = monitor.get();
    monitor->thread = std::thread([watched] { watched->run(); });
    agree([&]() -> std::string {
      if (monitor->find_rank_0()) return "";
      throw ResourceError(
          "{} gets no answer to its heartbeats from {} (UDP port and addresses {}); let UDP through between the nodes, "
          "choose a network with parallel.heartbeat = \"udp:INTERFACE\", or do without with \"local\"",
          monitor->rank_text(static_cast<std::size_t>(rank_)), monitor->rank_text(0),
          offer.substr(offer.find(' ') + 1));
    });
  } else {
    Monitor* const watched = monitor.get();
    monitor->thread = std::thread([watched] { watched->run(); });
  }
  monitor_ = std::move(monitor);
}

void Heartbeat::begin(const char* operation, std::uint64_t bytes) {
  // Release: whoever sees one of these sees the end of the collective before as well.
  operation_.store(operation, std::memory_order_release);
  bytes_.store(bytes, std::memory_order_release);
  sequence_.fetch_add(1, std::memory_order_release);
}

void Heartbeat::end() { sequence_.fetch_add(1, std::memory_order_release); }

}  // namespace tforge
