// SPDX-License-Identifier: Apache-2.0
#include "in_process.hpp"
#include "pipe.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/io_context.hpp>
#include <cstring>
#include <functional>
#include <map>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/testing/simulation.hpp>
#include <msgtrans/wire/header.hpp>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace msgtrans::testing {

namespace asio = detail::asio;
using detail::Pipe;
using Clock = Simulation::Clock;

/// The time of the thread, from the first member of a simulation to the last.
class TimeOfThread {
 public:
  TimeOfThread() {
    if (Clock::manual != nullptr) throw Exception(Error(Errc::wrong_state, "the thread has another simulation"));
    Clock::manual = &time_;
  }
  ~TimeOfThread() { Clock::manual = nullptr; }
  TimeOfThread(const TimeOfThread&) = delete;
  TimeOfThread& operator=(const TimeOfThread&) = delete;

  detail::ManualTime* operator->() noexcept { return &time_; }
  [[nodiscard]] bool is_here() const noexcept { return Clock::manual == &time_; }

 private:
  detail::ManualTime time_{.now = Clock::time_point(std::chrono::hours(24))};
};

struct Simulation::Core {
  explicit Core(std::uint64_t seed) : numbers(seed) {}

  /// From 0 to below 1. Not by the standard library's distributions, which differ from one library to another.
  [[nodiscard]] double fraction() { return static_cast<double>(numbers() >> 11) * 0x1p-53; }
  [[nodiscard]] bool happens(double chance) { return chance > 0 && fraction() < chance; }
  [[nodiscard]] std::uint64_t up_to(std::uint64_t most) { return most == 0 ? 0 : numbers() % (most + 1); }
  [[nodiscard]] std::chrono::microseconds between(std::chrono::microseconds least, std::chrono::microseconds most) {
    return least + std::chrono::microseconds(up_to(static_cast<std::uint64_t>((most - least).count())));
  }

  /// Those of the same time in the order of the calls.
  void at(Clock::time_point when, std::function<void()> f) {
    const bool first = due.empty() || when < due.begin()->first;
    due.emplace(when, std::move(f));
    if (first) arm();
  }
  void arm() {
    if (due.empty()) return;
    alarm.expires_at(due.begin()->first);
    alarm.async_wait([this](const error_code& error) {
      if (error) return;
      while (!due.empty() && due.begin()->first <= Clock::now()) due.extract(due.begin()).mapped()();
      arm();
    });
  }

  void run() {
    do context.restart();
    while (context.poll() != 0);
  }
  /// Has Asio look which timers are due, which it does not do by itself when the time is set, and tell us of the next.
  void check_timers() {
    checked = false;
    kick.expires_at(time->now - std::chrono::hours(1));  // before any other
    kick.async_wait([this](const error_code& error) { checked = checked || !error; });
    time->next = Clock::time_point::max();
    while (!checked) {
      context.restart();
      context.poll();
    }
    run();
  }

  /// The connection of that client, both ways; false if there is none.
  bool cut(std::string_view client) {
    bool found = false;
    const auto [first, last] = pipes.equal_range(client);
    for (auto one = first; one != last; ++one) {
      if (const auto pipe = one->second.lock()) {
        pipe->deliver_end(true);
        found = true;
      }
    }
    return found;
  }

  TimeOfThread time;
  bool checked = false;
  std::mt19937_64 numbers;
  Faults faults;
  SimulationStats stats;
  std::multimap<Clock::time_point, std::function<void()>> due;
  std::multimap<std::string, std::weak_ptr<Pipe>, std::less<>> pipes;  // by the name of their client
  std::optional<detail::PipesOfThread> made;
  asio::io_context context{1};
  Timer alarm{context};
  Timer kick{context};
};

namespace {

/// What becomes of the bytes of one direction.
class SimulatedFaults final : public detail::PipeFaults {
 public:
  using Core = Simulation::Core;

  SimulatedFaults(std::weak_ptr<Core> core, std::string client) noexcept
      : core_(std::move(core)), client_(std::move(client)) {}

  std::size_t room(const std::shared_ptr<Pipe>& pipe, std::size_t room) override {
    const auto core = simulation();
    if (!core) return room;
    if (Clock::now() < stalled_until_) return 0;
    if (std::exchange(halved_, false)) {
      // The rest, after a moment.
      stall(*core, pipe, std::chrono::microseconds(1000));
      return 0;
    }
    if (core->happens(core->faults.stall)) {
      ++core->stats.stalls;
      stall(*core, pipe, core->faults.longest_stall);
      return 0;
    }
    if (!core->happens(core->faults.half_write)) return room;
    halved_ = true;
    ++core->stats.half_writes;
    constexpr std::uint64_t few = 64;
    return 1 + core->up_to(std::min<std::uint64_t>(room, few) - 1);
  }

  void push(const std::shared_ptr<Pipe>& pipe, std::span<const std::byte> bytes) override {
    const auto core = simulation();
    if (!core) {
      auto block = block_of(bytes);
      return pipe->deliver(block);
    }
    while (!bytes.empty()) {
      std::size_t count = 0;
      if (left_ != 0) {
        count = std::min(bytes.size(), left_);
        carry(*core, pipe, bytes.first(count));
      } else {
        // Held back until it is whole: what becomes of a packet is known then.
        count = std::min(bytes.size(), wire::header_size - held_);
        std::memcpy(header_.data() + held_, bytes.data(), count);
        held_ += count;
        if (held_ == wire::header_size) {
          held_ = 0;
          begin_packet(*core);
          carry(*core, pipe, header_);
        }
      }
      bytes = bytes.subspan(count);
    }
  }

  void end(const std::shared_ptr<Pipe>& pipe, bool cut) override {
    const auto core = simulation();
    if (!core) return pipe->deliver_end(cut);
    if (ended_) return;
    if (held_ != 0) arrive(*core, pipe, std::span(header_).first(std::exchange(held_, 0)));
    finish(*core, pipe, cut);
  }

 private:
  static constexpr std::size_t endless = ~std::size_t{0};

  /// Null on other threads, which are not part of it, and once it has gone.
  [[nodiscard]] std::shared_ptr<Core> simulation() const {
    auto core = core_.lock();
    return core && core->time.is_here() ? core : nullptr;
  }

  static protocol::OutboundBlock block_of(std::span<const std::byte> bytes) {
    protocol::OutboundBlock block{wire::Buffer(bytes.size()), {}, 0, bytes.size()};
    std::memcpy(block.own.data(), bytes.data(), bytes.size());
    return block;
  }

  void stall(Core& core, const std::shared_ptr<Pipe>& pipe, std::chrono::microseconds longest) {
    stalled_until_ = Clock::now() + core.between(std::chrono::microseconds(1), longest);
    core.at(stalled_until_, [weak = std::weak_ptr(pipe)] {
      if (const auto alive = weak.lock()) alive->let_write();
    });
  }

  void begin_packet(Core& core) {
    constexpr wire::Limits any{.max_payload = ~std::uint32_t{0}, .max_extension = 65535};
    wire::Header header;
    // What is no packet goes on as it is.
    left_ = wire::decode_header(header_, any, header) ? endless : header.packet_size();
    ++core.stats.packets;
    until_cut_ = core.happens(core.faults.cut) ? core.up_to(std::min(left_, header.packet_size()) - 1) : endless;
    dropped_ = core.happens(core.faults.drop) && until_cut_ == endless;
    if (dropped_) ++core.stats.dropped;
    delay_ = core.between(core.faults.least_delay, core.faults.most_delay);
    if (delay_.count() != 0) ++core.stats.delayed;
  }

  /// Some bytes of the packet.
  void carry(Core& core, const std::shared_ptr<Pipe>& pipe, std::span<const std::byte> bytes) {
    if (left_ != endless) left_ -= bytes.size();
    if (ended_ || dropped_) return pipe->lose(bytes.size());
    const std::size_t whole = std::min(bytes.size(), until_cut_);
    if (whole != 0) arrive(core, pipe, bytes.first(whole));
    if (until_cut_ == endless) return;
    until_cut_ -= whole;
    if (until_cut_ != 0) return;
    pipe->lose(bytes.size() - whole);
    ++core.stats.cuts;
    ended_ = true;
    in_turn(core, pipe, [weak = core_, client = client_](Pipe&) {
      if (const auto alive = weak.lock()) alive->cut(client);
    });
  }

  void arrive(Core& core, const std::shared_ptr<Pipe>& pipe, std::span<const std::byte> bytes) {
    auto block = block_of(bytes);
    in_turn(core, pipe,
            [block = std::make_shared<protocol::OutboundBlock>(std::move(block))](Pipe& to) { to.deliver(*block); });
  }
  void finish(Core& core, const std::shared_ptr<Pipe>& pipe, bool cut) {
    ended_ = true;
    in_turn(core, pipe, [cut](Pipe& to) { to.deliver_end(cut); });
  }
  /// Behind everything that was sent before.
  template <class F>
  void in_turn(Core& core, const std::shared_ptr<Pipe>& pipe, F f) {
    last_arrival_ = std::max(last_arrival_, Clock::now() + delay_);
    if (last_arrival_ <= Clock::now() && *under_way_ == 0) return f(*pipe);
    ++*under_way_;
    core.at(last_arrival_, [weak = std::weak_ptr(pipe), under_way = under_way_, f = std::move(f)] {
      --*under_way;
      if (const auto alive = weak.lock()) f(*alive);
    });
  }

  const std::weak_ptr<Core> core_;
  const std::string client_;
  std::array<std::byte, wire::header_size> header_;
  std::size_t held_ = 0;  // of the header
  std::size_t left_ = 0;  // of the packet
  std::size_t until_cut_ = endless;
  bool dropped_ = false;
  bool ended_ = false;
  bool halved_ = false;
  Clock::duration delay_{0};
  Clock::time_point last_arrival_{};
  Clock::time_point stalled_until_{};
  std::shared_ptr<std::size_t> under_way_ = std::make_shared<std::size_t>(0);
};

Error check(const Faults& faults) {
  Error error;
  const auto chance = [&error](const char* name, double value) {
    if (!error && !(value >= 0 && value <= 1)) {
      error = Error(Errc::invalid_option, std::string(name) + " is " + std::to_string(value) + ", must be from 0 to 1");
    }
  };
  chance("drop", faults.drop);
  chance("cut", faults.cut);
  chance("half_write", faults.half_write);
  chance("stall", faults.stall);
  if (!error && faults.longest_stall.count() < 1) error = Error(Errc::invalid_option, "longest_stall is not positive");
  if (!error && faults.least_delay.count() < 0) error = Error(Errc::invalid_option, "least_delay is negative");
  if (!error && faults.most_delay < faults.least_delay) {
    error = Error(Errc::invalid_option, "most_delay is less than least_delay");
  }
  return error;
}

}  // namespace

Simulation::Simulation(std::uint64_t seed) : core_(std::make_shared<Core>(seed)) {
  core_->made.emplace([core = std::weak_ptr(core_)](const std::string& client, const std::shared_ptr<Pipe>& pipe) {
    const auto alive = core.lock();
    if (!alive) return;  // it is just going
    std::erase_if(alive->pipes, [](const auto& entry) { return entry.second.expired(); });
    alive->pipes.emplace(client, pipe);
    pipe->set_faults(std::make_unique<SimulatedFaults>(core, client));
  });
}

Simulation::~Simulation() = default;

asio::any_io_executor Simulation::executor() const {
  return core_->context.get_executor();
}

Clock::time_point Simulation::now() const noexcept {
  return core_->time->now;
}

void Simulation::run() {
  core_->run();
}

void Simulation::advance(Clock::duration time) {
  const auto until = now() + std::clamp(time, Clock::duration{0}, Clock::time_point::max() - now());
  run();
  while (step(until)) {
  }
}

bool Simulation::step(Clock::time_point deadline) {
  auto& time = *core_->time.operator->();
  const bool last = time.next > deadline;
  time.now = last ? deadline : std::max(time.now, time.next);
  core_->check_timers();
  return !last;
}

void Simulation::set_faults(const Faults& faults) {
  if (auto error = check(faults)) throw Exception(error);
  core_->faults = faults;
}

bool Simulation::cut(const Endpoint& client) {
  return core_->cut(client.path);
}

SimulationStats Simulation::stats() const noexcept {
  return core_->stats;
}

std::uint64_t Simulation::random() noexcept {
  return core_->numbers();
}

}  // namespace msgtrans::testing
