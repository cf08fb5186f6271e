// SPDX-License-Identifier: Apache-2.0
// The whole stack by chance, thousands of times: servers with several shards and their clients in a simulation do what
// a seed says under the faults it says, and afterwards everything must be accounted for. A seed that fails is named;
// MSGTRANS_SEED=<n> runs that one alone, and prints what happened in it.
#include "support/fixture.hpp"
#include "support/history.hpp"
#include "support/sanitized.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <malloc.h>
#include <map>
#include <msgtrans/testing/simulation.hpp>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using testing::Faults;
using testing::Simulation;
using Time = Simulation::Clock::time_point;

constexpr std::uint64_t groups = 8;
/// Of each group: together thousands a run, unless a sanitizer makes each take far longer.
constexpr std::uint64_t seeds_in_group = sanitized ? 40 : 300;

/// What one end of a session sends in one lane, numbered in the order in which it is to arrive.
struct Stream {
  struct Sent {
    enum class Fate : std::uint8_t { unknown, taken, refused };
    Fate fate = Fate::unknown;
    bool arrived = false;
    std::uint32_t behind = 0;  ///< so many of the other stream of its lane must have come before it, or never come
  };
  std::vector<Sent> sent;
  std::uint32_t settled = 0;   ///< the first whose fate may be unknown
  std::uint32_t next = 0;      ///< none before this may arrive any more
  std::uint32_t other = 0;     ///< that of what may wait, for what does not, and the other way round
  const void* from = nullptr;  ///< its end
  const void* to = nullptr;    ///< the end at which its messages arrive: always the same
};

/// Which way a message took; each has an order of its own. What is sent in a handler overtakes what waits for room.
/// What may wait is behind all that was sent before it, and before all that is sent once it was taken.
enum class Way : std::uint8_t { send, wait, answer };

struct Client {
  std::optional<ClientTransport> transport;  ///< none: it has been destroyed
  bool connecting = false;
  int connected = 0;  ///< times
  int lost = 0;
};

/// One end of a session.
struct Side {
  Side(Session s, const Client* owner) : session(std::move(s)), client(owner), server(owner == nullptr) {}

  Session session;
  const Client* const client;
  const bool server;
  bool refused = false;
  bool expects_end = true;  ///< its handlers are still called
  int went = 0;
  bool answers = false;  ///< it has sent some, which are over the budget
  std::size_t longest = 0;
  std::array<std::array<std::uint32_t, 2>, 3> streams{};  ///< by way and lane; 0: none yet
  std::array<std::uint32_t, 2> broadcasts{};              ///< the first that may still arrive, by lane
};

/// One asynchronous operation.
struct Waiter {
  const char* what = "";
  int told = 0;
  bool starting = true;
  Time begun;
  std::chrono::milliseconds timeout{0};
  asio::cancellation_signal signal;
  bool cancelled = false;
};

/// What has happened in some runs at all.
struct Effects {
  std::uint64_t arrived = 0;  ///< messages
  std::uint64_t to_groups = 0;
  std::uint64_t rejected = 0;
  std::uint64_t throttled = 0;
};

class Run;
thread_local Run* current = nullptr;

class Run {
 public:
  Run(std::uint64_t seed, bool tell) : seed_(seed), tell_(tell), simulation_(seed) {
    current = this;
    choose_options();
  }
  ~Run() {
    retained_.clear();
    subscription_.reset();
    clients_.clear();
    server_.reset();
    sides_.clear();
    simulation_.run();
    current = nullptr;
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  /// \returns a hash of all that was seen, in order and with its time.
  std::uint64_t play() {
    start();
    for (unsigned i = 0; i < rounds_; ++i) {
      for (auto actions = 1 + below(6); actions != 0; --actions) act();
      check_budgets();
      pass_time();
    }
    if (lossless_) finish_without_loss();
    stop();
    check_all();
    return hash_;
  }

  [[nodiscard]] const std::vector<std::string>& problems() const noexcept { return problems_; }
  void add_to(Effects& effects) const {
    effects.arrived += arrived_;
    effects.to_groups += to_groups_;
    effects.rejected += rejected_in_ + rejected_out_;
    effects.throttled += server_->stats().throttled;
  }

 private:
  // --- chance

  std::uint64_t below(std::uint64_t count) { return simulation_.random() % count; }
  bool chance(unsigned percent) { return below(100) < percent; }
  template <class T>
  T one_of(std::initializer_list<T> list) {
    return *(list.begin() + below(list.size()));
  }

  void choose_options() {
    lossless_ = chance(30);
    actors_ = chance(40);
    heartbeats_ = chance(30);
    intercepts_ = chance(30);
    shards_ = 1 + below(3);
    rounds_ = static_cast<unsigned>(15 + below(30));
    const auto session = [&] {
      SessionOptions options;
      options.outbound_bytes = one_of<std::size_t>({200, 1000, 20'000, 1'000'000});
      options.outbound_packets = one_of<std::size_t>({1, 3, 20, 4096});
      options.slow_consumer =
          lossless_ ? SlowConsumer::wait
                    : one_of({SlowConsumer::wait, SlowConsumer::wait, SlowConsumer::drop_oldest, SlowConsumer::close});
      options.request_timeout = one_of({50ms, 1000ms, 10'000ms});
      options.first_packet_timeout = 0ms;
      options.close_timeout = one_of({10ms, 1000ms, 5000ms});
      options.write_stall_timeout = one_of({200ms, 30'000ms});
      options.read_stall_timeout = one_of({200ms, 30'000ms});
      if (chance(30)) options.idle_timeout = one_of({100ms, 3000ms});
      if (chance(10)) options.compression = {.codec = one_of({Compression::zstd, Compression::zlib}), .threshold = 64};
      if (heartbeats_) options.heartbeat_interval = one_of({100ms, 1000ms});
      if (chance(15)) {
        options.packets_per_second = one_of({50U, 2000U});
        options.packet_burst = one_of({1U, 20U});
      }
      if (chance(10)) options.bytes_per_second = one_of({5000U, 100'000U});
      if (lossless_) {
        options.request_timeout = 0ms;
        options.idle_timeout = options.write_stall_timeout = options.read_stall_timeout = 0ms;
        options.close_timeout = std::chrono::hours(1);
        options.max_missed_heartbeats = 1000;
      }
      return options;
    };
    server_options_ = session();
    client_options_ = session();
    client_options_.heartbeat_interval = server_options_.heartbeat_interval;
    if (!lossless_ && chance(30)) server_options_.first_packet_timeout = one_of({50ms, 2000ms});
    max_sessions_ = !lossless_ && chance(20) ? 1 + below(4) : 1000;
    mailbox_ = one_of<std::size_t>({1, 2, 16, 1024});
    event_capacity_ = one_of<std::size_t>({1, 4, 1024});
    slowness_ = one_of<unsigned>({0, 5, 30});
    // What a handler sends of its own accord, so that nobody answers for ever.
    spontaneous_ = below(60);
  }

  Faults some_faults() {
    Faults faults;
    if (chance(60)) faults.half_write = one_of({0.01, 0.1, 0.6});
    if (chance(50)) {
      faults.stall = one_of({0.01, 0.2});
      faults.longest_stall = one_of({std::chrono::microseconds(1ms), std::chrono::microseconds(500ms)});
    }
    if (chance(60)) {
      faults.least_delay = one_of({0us, 100us});
      faults.most_delay = one_of({std::chrono::microseconds(1ms), std::chrono::microseconds(100ms)});
    }
    if (lossless_) return faults;
    if (chance(40)) faults.drop = one_of({0.001, 0.02, 0.2});
    if (chance(30)) faults.cut = one_of({0.001, 0.02});
    return faults;
  }

  // --- what is noted, and what is wrong

  void note(std::string_view what, std::uint64_t a = 0, std::uint64_t b = 0) {
    const auto time = static_cast<std::uint64_t>(simulation_.now().time_since_epoch().count());
    const auto mix = [this](std::uint64_t value) { hash_ = (hash_ ^ value) * 0x100000001b3ULL; };
    mix(time);
    for (const char c : what) mix(static_cast<unsigned char>(c));
    mix(a);
    mix(b);
    if (tell_) std::cout << time / 1000 << " us: " << what << ' ' << a << ' ' << b << '\n';
  }
  template <class... Parts>
  bool check(bool holds, const Parts&... parts) {
    if (holds || problems_.size() > 20) return holds;
    std::ostringstream text;
    (text << ... << parts);
    problems_.push_back(text.str());
    if (tell_) std::cout << "WRONG: " << text.str() << '\n';
    return false;
  }

  // --- sessions

  /// Of a client, or of the server.
  Side& side_of(Session& session, const Client* client = nullptr) {
    auto& side = sides_by_id_[session.id()];
    if (side == nullptr) {
      side = &sides_.emplace_back(session, client);
      numbers_[side] = sides_.size();
      if (client != nullptr) note("client's session", numbers_[side]);
    }
    return *side;
  }

  std::uint64_t number(const Side& side) { return numbers_[&side]; }

  Admission on_connect(Session& session) {
    check(!sides_by_id_.contains(session.id()), "a session comes twice");
    Side& side = side_of(session);
    note("came", number(side));
    join_some(session.id());
    if (chance(10)) send(side, false, 10 + below(100));
    if (!lossless_ && chance(5)) {
      side.refused = true;
      return Admission::refuse("chance");
    }
    return Admission::accept();
  }

  void on_disconnect(Side& side, const Error& reason) {
    note("went", number(side), static_cast<std::uint64_t>(reason.code.value()));
    ++side.went;
    check(side.went == 1, "a session went ", side.went, " times");
    check(!side.refused, "a refused session went");
    check(bool(reason), "a session went without a reason");
    check(!side.session.is_open(), "a session went and is open");
    if (side.server) check(server_->groups().groups_of(side.session.id()).empty(), "a session went and is in a group");
  }

  // --- groups and interceptors

  std::string some_group() { return "group " + std::to_string(below(3)); }

  void join_some(SessionId session) {
    if (!chance(50)) return;
    Error error;
    note("joins", server_->groups().join(some_group(), session, error));
    check(!error || error.code == Errc::closed || error.code == Errc::not_found, "joining: ", error.message());
  }

  /// Lets pass, or not; neither is an answer lost, nor is anything where nothing is to be.
  Verdict intercept(InterceptedMessage& message, std::uint64_t& shown, std::uint64_t& rejected) {
    ++shown;
    if (lossless_ || message.is_response() || !chance(3)) return Verdict::pass;
    note("rejects");
    ++rejected;
    return Verdict::reject;
  }

  void on_message(Side& side, Session& session, const Message& message) {
    check(side.went == 0, "a message came after the end");
    check(side.session == session, "a message came with another session");
    if (!receive(side, message.payload(), message.high_priority())) return;
    struct Delivering {
      Delivering(const Side*& which, const Side* now) : place(which) { place = now; }
      ~Delivering() { place = nullptr; }
      const Side*& place;
    } delivering(delivering_to_, &side);
    if (spontaneous_ != 0 && chance(20)) {
      --spontaneous_;
      if (chance(50)) {
        send(side, chance(20), 10 + below(300));
      } else {
        act();
      }
    }
    if (!message.is_request()) return maybe_throw(side);
    if (chance(20)) {
      retained_.emplace_back(message.retain(), &side);
      return;
    }
    if (!lossless_ && chance(3)) return;  // is never answered
    side.answers = true;
    const auto result = session.respond(message, message.payload());
    note("responds", number(side), static_cast<std::uint64_t>(result));
    if (result == SendResult::queued) taken(side);
    check(result == SendResult::queued || result == SendResult::closed, "respond: ", to_string(result));
    check(session.respond(message, "again") != SendResult::queued, "answered twice");
    maybe_throw(side);
  }

  void maybe_throw(Side& side) {
    if (lossless_ || !chance(1)) return;
    note("throws", number(side));
    throw std::runtime_error("by chance");
  }

  static asio::awaitable<void> behave(SessionActor actor) {
    Simulation::Timer timer(actor.get_executor());
    while (auto message = co_await actor.receive()) {
      Run& run = *current;
      Session session = actor.session();
      Side& side = run.side_of(session);
      run.receive(side, message->payload(), message->high_priority());
      if (run.chance(run.slowness_)) {
        timer.expires_after(std::chrono::milliseconds(1 + current->below(run.lossless_ ? 20 : 200)));
        co_await timer.async_wait(asio::as_tuple(asio::use_awaitable));
      }
      if (run.spontaneous_ != 0 && run.chance(20)) {
        --run.spontaneous_;
        run.act();
      }
      if (message->is_request() && (run.lossless_ || !run.chance(5))) run.respond(*message, side);
      if (!run.lossless_ && run.chance(1)) throw std::runtime_error("by chance");
    }
  }

  // --- messages

  static constexpr std::size_t head = 12;

  /// Also for broadcasts, whose streams are 1 and 2.
  Stream& stream(std::uint32_t index) { return streams_[index]; }

  std::uint32_t stream_of(Side& side, Way way, bool high) {
    auto& index = side.streams[static_cast<std::size_t>(way)][high ? 1 : 0];
    if (index == 0) {
      index = static_cast<std::uint32_t>(streams_.size());
      streams_.emplace_back().from = &side;
      if (way != Way::answer) {
        stream(index).other = stream_of(side, way == Way::send ? Way::wait : Way::send, high);
      }
    }
    return index;
  }

  /// The next of that stream.
  std::uint32_t add(std::uint32_t index) {
    Stream& to = stream(index);
    auto& sent = to.sent.emplace_back();
    if (to.other != 0) {
      Stream& other = stream(to.other);
      while (other.settled != other.sent.size() && other.sent[other.settled].fate != Stream::Sent::Fate::unknown) {
        ++other.settled;
      }
      sent.behind = other.settled;
    }
    return static_cast<std::uint32_t>(to.sent.size() - 1);
  }

  std::string payload(std::uint32_t stream, std::uint32_t place, std::size_t size) {
    std::string text(std::max(size, head), '\0');
    const std::array<std::uint32_t, 3> words{stream, place, static_cast<std::uint32_t>(text.size())};
    std::memcpy(text.data(), words.data(), head);
    for (std::size_t i = head; i < text.size(); ++i) text[i] = filling(words, i);
    return text;
  }
  static char filling(const std::array<std::uint32_t, 3>& words, std::size_t i) {
    return static_cast<char>((words[0] * 31 + words[1] * 7 + i / 5) & 0xff);
  }

  /// False if nothing more is to be done about it.
  bool receive(Side& side, std::span<const std::byte> bytes, bool high) {
    std::array<std::uint32_t, 3> words{};
    if (!check(bytes.size() >= head, "a message of ", bytes.size(), " bytes, which nobody has sent")) return false;
    std::memcpy(words.data(), bytes.data(), head);
    const auto [index, place, size] = words;
    bool right = size == bytes.size() && index != 0 && index < streams_.size() && place < stream(index).sent.size();
    for (std::size_t i = head; right && i < bytes.size(); ++i) right = static_cast<char>(bytes[i]) == filling(words, i);
    if (!check(right, "a message came that nobody has sent")) return false;
    note("arrives", index, place);
    ++arrived_;
    if (index <= 2) {  // a broadcast
      check(high == (index == 2), "a broadcast came in the other lane");
      auto& next = side.broadcasts[index - 1];
      check(place >= next, "broadcast ", place, " came behind ", next);
      next = place + 1;
      ++broadcasts_arrived_;
      return true;
    }
    Stream& from = stream(index);
    check(from.from != &side, "a message came back to its sender");
    if (from.to == nullptr) from.to = &side;
    check(from.to == &side, "a session's messages came to two ends");
    check(place >= from.next, "message ", place, " of stream ", index, " came behind ", from.next, ", ",
          from.sent[place].arrived ? "again" : "late");
    from.next = std::max(from.next, place + 1);
    from.sent[place].arrived = true;
    if (from.other != 0) {
      auto& other = stream(from.other);
      other.next = std::max(other.next, from.sent[place].behind);
    }
    return true;
  }

  void taken(Side& side) {
    if (side.server) ++server_took_;
  }
  void ask(Side& side, std::size_t size) { side.longest = std::max(side.longest, size + wire::header_size); }

  SendResult send(Side& side, bool high, std::size_t size) {
    const bool answer = delivering_to_ == &side;
    const auto index = stream_of(side, answer ? Way::answer : Way::send, high);
    const auto place = add(index);
    ask(side, size);
    side.answers = side.answers || answer;
    const auto result = side.session.send(payload(index, place, size), {.high_priority = high});
    stream(index).sent[place].fate =
        result == SendResult::queued ? Stream::Sent::Fate::taken : Stream::Sent::Fate::refused;
    note("sends", index, static_cast<std::uint64_t>(result));
    check(result != SendResult::too_large && result != SendResult::not_found, "send: ", to_string(result));
    check(result != SendResult::rejected || intercepts_, "send: ", to_string(result));
    if (answer) check(result != SendResult::would_block, "an answer found no room");
    if (result == SendResult::queued) taken(side);
    return result;
  }

  Waiter& wait(const char* what) {
    auto& waiter = waiters_.emplace_back();
    waiter.what = what;
    waiter.begun = simulation_.now();
    return waiter;
  }
  void told(Waiter& waiter, error_code code) {
    note(waiter.what, static_cast<std::uint64_t>(code.value()));
    check(!waiter.starting, waiter.what, " completed in the call that began it");
    ++waiter.told;
    check(waiter.told == 1, waiter.what, " completed ", waiter.told, " times");
    if (code == asio::error::operation_aborted) {
      check(waiter.cancelled || waiter.what == connecting, waiter.what, " was aborted by nobody");
    }
  }

  void async_send(Side& side, bool high, std::size_t size) {
    const auto index = stream_of(side, Way::wait, high);
    const auto place = add(index);
    ask(side, size);
    Waiter& waiter = wait("async_send");
    note("async_send to", index, place);
    auto handler =
        asio::bind_cancellation_slot(waiter.signal.slot(), [this, &waiter, &side, index, place](error_code code) {
          told(waiter, code);
          check(!code || code == Errc::closed || code == asio::error::operation_aborted ||
                    (intercepts_ && code == Errc::rejected),
                "async_send: ", code.message());
          stream(index).sent[place].fate = code ? Stream::Sent::Fate::refused : Stream::Sent::Fate::taken;
          if (!code) taken(side);
        });
    if (side.server && chance(30)) {
      server_->async_send(side.session.id(), payload(index, place, size), {.high_priority = high},
                          [handler = std::move(handler)](error_code code) mutable {
                            // A session that has gone is not known any more.
                            handler(code == Errc::not_found ? make_error_code(Errc::closed) : code);
                          });
    } else {
      side.session.async_send(payload(index, place, size), {.high_priority = high}, std::move(handler));
    }
    waiter.starting = false;
  }

  void request(Side& side, bool high, std::size_t size) {
    const auto index = stream_of(side, Way::wait, high);
    const auto place = add(index);
    ask(side, size);
    auto question = payload(index, place, size);
    Waiter& waiter = wait("async_request");
    RequestOptions options{.high_priority = high};
    if (!lossless_ && chance(70)) options.timeout = one_of({1ms, 100ms, 5000ms});
    const auto& defaults = side.server ? server_options_ : client_options_;
    waiter.timeout = options.timeout.value_or(defaults.request_timeout);
    note("async_request to", index, place);
    side.session.async_request(
        question, options,
        asio::bind_cancellation_slot(
            waiter.signal.slot(), [this, &waiter, index, place, question](error_code code, const Reply& reply) {
              told(waiter, code);
              const auto took = simulation_.now() - waiter.begun;
              if (code == Errc::request_timeout) {
                check(waiter.timeout.count() != 0 && took >= waiter.timeout, "a request timed out early");
              }
              if (waiter.timeout.count() != 0) {
                check(took <= waiter.timeout + 200ms, "a request with ", waiter.timeout.count(), " ms took longer");
              }
              check(!code || code == Errc::request_timeout || code == Errc::connection_lost || code == Errc::closed ||
                        code == asio::error::operation_aborted || (intercepts_ && code == Errc::rejected),
                    "async_request: ", code.message());
              if (code == Errc::closed || code == Errc::rejected)
                stream(index).sent[place].fate = Stream::Sent::Fate::refused;
              if (code) {
                check(!lossless_ || finishing_, "a request failed: ", code.message());
                return;
              }
              stream(index).sent[place].fate = Stream::Sent::Fate::taken;
              check(reply.text() == question, "a request got another's answer");
              check(stream(index).sent[place].arrived, "a request was answered that nobody got");
            }));
    waiter.starting = false;
  }

  void respond(OwnedMessage& message, Side& side) {
    side.answers = true;
    const auto result = message.respond(message.payload());
    note("responds later", number(side), static_cast<std::uint64_t>(result));
    if (result == SendResult::queued) taken(side);
    check(result == SendResult::queued || result == SendResult::closed, "respond: ", to_string(result));
  }

  void answer_retained() {
    if (retained_.empty()) return;
    const auto which = below(retained_.size());
    auto [message, side] = std::move(retained_[which]);
    retained_.erase(retained_.begin() + static_cast<std::ptrdiff_t>(which));
    if (!lossless_ && chance(10)) return;  // given up
    respond(message, *side);
  }

  void broadcast(bool high) {
    const std::uint32_t index = high ? 2 : 1;
    const auto place = add(index);
    const std::size_t size = chance(10) ? 20'000 : 10 + below(200);
    for (auto& side : sides_) {
      if (side.server) ask(side, size);
    }
    const SendOptions options{.high_priority = high};
    const auto text = payload(index, place, size);
    const bool to_group = chance(50);
    const auto result =
        to_group ? server_->groups().send(some_group(), text, options) : server_->broadcast(text, options);
    if (to_group) to_groups_ += result.queued;
    note("broadcast", result.queued, result.dropped + result.refused);
    broadcasts_queued_ += result.queued;
    server_took_ += result.queued;
  }

  // --- actions

  Side* some_side() {
    // Of the last few, which are likely to be there.
    std::array<Side*, 12> open{};
    std::size_t count = 0;
    for (auto one = sides_.rbegin(); one != sides_.rend() && count != open.size(); ++one) {
      // What is begun at a server or client that has gone is told of by a thread that is not in the simulation.
      if (one->server ? stopped_ : !one->client->transport) continue;
      if (one->session.is_open() || chance(2)) open[count++] = &*one;
    }
    return count == 0 ? nullptr : open[below(count)];
  }

  std::size_t some_size() {
    switch (below(20)) {
      case 0: return 17'000 + below(20'000);  // its own block
      case 1: return below(2) == 0 ? 100'000 : 5000;
      default: return head + below(250);
    }
  }

  void act() {
    const auto action = below(lossless_ ? 70 : 100);
    Side* const side = some_side();
    if (action < 20) {
      if (side != nullptr) send(*side, action < 4, some_size());
    } else if (action < 35) {
      if (side != nullptr) async_send(*side, action < 24, some_size());
    } else if (action < 48) {
      if (side != nullptr) request(*side, action < 38, some_size());
    } else if (action < 52) {
      for (auto i = 5 + below(30); side != nullptr && i != 0; --i) send(*side, chance(10), head + below(100));
    } else if (action < 56) {
      broadcast(action == 55);
    } else if (action < 60) {
      if (side != nullptr && side->server && chance(50)) join_some(side->session.id());
      if (side != nullptr && side->server && chance(20)) server_->groups().leave(some_group(), side->session.id());
      answer_retained();
    } else if (action < 64) {
      connect(clients_[below(clients_.size())]);
    } else if (action < 67) {
      if (outside_) simulation_.set_faults(some_faults());
    } else if (action < 70) {
      for (auto i = 2 + below(10); side != nullptr && i != 0; --i) async_send(*side, chance(10), head + below(300));
    } else if (action < 84) {
      cancel();
    } else if (action < 88) {
      if (side == nullptr) return;
      note("closes", number(*side));
      side->session.close("by chance");
    } else if (action < 90) {
      if (side == nullptr) return;
      note("closes by id", number(*side), server_->close(side->session.id(), "by chance"));
    } else if (action < 93) {
      if (side == nullptr || !outside_) return;
      note("cuts", number(*side), simulation_.cut(side->session.peer()));
    } else if (action < 96) {
      if (outside_) replace_client();
    } else if (action < 98) {
      note("sweeps");
      server_->session_manager().sweep(one_of({0ms, 10ms, 1000ms}));
    } else {
      if (outside_ && !stopped_) begin_stop(one_of({0ms, 10ms, 1000ms, 5000ms}));
    }
  }

  void cancel() {
    if (waiters_.empty()) return;
    // Mostly one that may still wait.
    const auto back = below(std::min<std::uint64_t>(waiters_.size(), 30));
    auto& waiter = waiters_[waiters_.size() - 1 - back];
    if (waiter.told != 0 || waiter.starting) return;
    note("cancels");
    waiter.cancelled = true;
    waiter.signal.emit(asio::cancellation_type::terminal);
  }

  static constexpr const char* connecting = "async_connect";

  std::shared_ptr<Client> make() {
    const auto client = all_clients_.emplace_back(std::make_shared<Client>());
    client->transport.emplace(
        ClientOptions{.executor = simulation_.executor(), .connect_timeout = 3000ms, .session = client_options_});
    client->transport->on_message([this, raw = client.get()](Session& session, const Message& message) {
      on_message(side_of(session, raw), session, message);
    });
    client->transport->on_disconnect([this, raw = client.get()](Session& session, const Error& reason) {
      check(raw->transport.has_value(), "a client is destroyed and told of an end");
      ++raw->lost;
      on_disconnect(side_of(session, raw), reason);
    });
    connect(client);
    return client;
  }

  void connect(const std::shared_ptr<Client>& client) {
    const bool possible = !client->connecting && !client->transport->session();
    Waiter& waiter = wait(connecting);
    if (possible) client->connecting = true;
    client->transport->async_connect(
        "inproc://" + name_,
        asio::bind_cancellation_slot(waiter.signal.slot(), [this, &waiter, possible, client](error_code code) {
          told(waiter, code);
          if (!possible) return void(check(code == Errc::wrong_state, "connected twice: ", code.message()));
          client->connecting = false;
          if (code || !client->transport) return;
          ++client->connected;
          if (auto session = client->transport->session()) (void)side_of(*session, client.get());
        }));
    waiter.starting = false;
  }

  /// One that is destroyed, whatever it is doing, and another in its place.
  void replace_client() {
    auto& client = clients_[below(clients_.size())];
    note("replaces a client");
    if (auto session = client->transport->session()) side_of(*session, client.get()).expects_end = false;
    client->transport.reset();
    client = make();
  }

  void pass_time() {
    outside_ = false;
    switch (below(10)) {
      case 0: break;
      case 1: simulation_.advance(std::chrono::milliseconds(below(3000))); break;
      case 2: simulation_.run(); break;
      default: simulation_.advance(std::chrono::microseconds(below(20'000))); break;
    }
    outside_ = true;
  }
  void advance(Simulation::Clock::duration time) {
    outside_ = false;
    simulation_.advance(time);
    outside_ = true;
  }
  template <class F>
  bool run_until(F&& condition, Simulation::Clock::duration within) {
    outside_ = false;
    const bool holds = simulation_.run_until(condition, within);
    outside_ = true;
    return holds;
  }

  // --- beginning and end

  void start() {
    std::vector<asio::any_io_executor> executors(shards_, simulation_.executor());
    server_.emplace(ServerOptions{.executors = std::move(executors),
                                  .max_sessions = max_sessions_,
                                  .event_capacity = event_capacity_,
                                  .session = server_options_});
    server_->on_connect([this](Session& session) { return on_connect(session); });
    server_->on_disconnect([this](Session& session, const Error& reason) { on_disconnect(side_of(session), reason); });
    if (intercepts_) {
      server_->intercept_inbound(
          [this](InterceptedMessage& message) { return intercept(message, shown_in_, rejected_in_); });
      server_->intercept_outbound(
          [this](InterceptedMessage& message) { return intercept(message, shown_out_, rejected_out_); });
    }
    server_->on_error([this](const ErrorEvent& event) {
      note("error", static_cast<std::uint64_t>(event.error.code.value()));
      check(!is_protocol_error(event.error.code), "a protocol error: ", event.error.message());
    });
    if (actors_) {
      server_->on_session(behave, {.mailbox = mailbox_,
                                   .on_failure = one_of({OnFailure::restart, OnFailure::stop}),
                                   .restart_delay = 5ms,
                                   .max_restarts = 2});
    } else {
      server_->on_message(
          [this](Session& session, const Message& message) { on_message(side_of(session), session, message); });
    }
    server_->listen(in_process(name_));
    subscription_.emplace(server_->subscribe());
    listen_to_events();
    server_->start();
    for (auto i = 1 + below(5); i != 0; --i) clients_.push_back(make());
    simulation_.set_faults(some_faults());
    pass_time();
  }

  void listen_to_events() {
    subscription_->async_next([this](error_code code, NextResult<Event> result) {
      if (code) {
        check(code == Errc::closed, "events ended with ", code.message());
        events_ended_ = true;
        return;
      }
      if (result) {
        const Event* const event = &*result;
        const auto found = sides_by_id_.find(event->session);
        auto* const side = found == sides_by_id_.end() ? nullptr : found->second;
        ++events_told_;
        note("event", static_cast<std::uint64_t>(event->kind), side != nullptr ? number(*side) : 0);
        if (event->kind == EventKind::session_connected) {
          check(events_[event->session]++ == 0, "a session was announced twice, or late");
        } else if (event->kind == EventKind::session_disconnected) {
          auto& seen = events_[event->session];
          const bool missed = subscription_->missed() != 0 || server_->session_manager().stats().events_dropped != 0;
          check(seen == 1 || missed, "an end was announced ", seen, " events after the beginning");
          seen = 2;
        }
      }
      listen_to_events();
    });
  }

  void begin_stop(std::chrono::milliseconds drain) {
    Waiter& waiter = wait("async_stop");
    note("stops", static_cast<std::uint64_t>(drain.count()));
    server_->async_stop(drain, [this, &waiter](const StopReport& report) {
      told(waiter, {});
      check(report.complete, "a stop that is not complete");
      if (lossless_) {
        check(report.clean(), "cut: ", report.sessions_cut, " sessions, ", report.requests_cut, " requests, ",
              report.answers_cut, " answers, ", report.packets_cut, " packets, ", report.actors_cut, " actors");
      }
      stopped_ = true;
    });
    waiter.starting = false;
  }

  /// Nothing was lost and nobody has gone, so all that was taken must arrive and be answered, also what is sent just
  /// before the end.
  void finish_without_loss() {
    spontaneous_ = 0;
    const auto idle = [this] {
      return retained_.empty() && all_arrived() &&
             std::ranges::all_of(waiters_, [](const Waiter& waiter) { return waiter.told == 1; });
    };
    for (int seconds = 0; seconds < 10'000 && !idle(); ++seconds) {
      while (!retained_.empty()) answer_retained();
      advance(1s);
    }
    check(idle(), "what was taken did not all arrive, or not all is answered: ", unfinished());
    finishing_ = true;
    for (auto& client : clients_) {
      auto session = client->transport->session();
      if (!session || chance(50)) continue;
      Side& side = side_of(*session, client.get());
      for (auto i = below(20); i != 0; --i) send(side, chance(10), some_size());
      note("closes", number(side));
      session->close();
    }
    const auto all = [this] { return all_arrived(); };
    // A heartbeat may find that the peer has gone, as any write may, while a slow mailbox still waits for what was
    // read.
    const bool all_there = run_until(all, heartbeats_ ? std::chrono::hours(1) : std::chrono::hours(5));
    check(all_there || heartbeats_, "what was taken before a close did not all arrive");
    advance(1min);  // the ends arrive, too
    for (auto& side : sides_) {
      if (!side.server || !side.session.is_open()) continue;
      for (auto i = below(20); i != 0; --i) send(side, chance(10), some_size());
    }
    begin_stop(std::chrono::hours(10));
    check(run_until([this] { return stopped_; }, std::chrono::hours(11)), "a server does not stop");
    advance(1min);
    check(all_arrived() || heartbeats_, "what was taken before a stop did not all arrive");
  }

  std::string unfinished() {
    std::ostringstream text;
    for (const auto& waiter : waiters_) {
      if (waiter.told == 0) text << waiter.what << " of " << waiter.begun.time_since_epoch() / 1us << " us; ";
    }
    for (std::size_t i = 0; i < streams_.size(); ++i) {
      const auto& sent = streams_[i].sent;
      const auto lost = std::ranges::count_if(
          sent, [](const Stream::Sent& one) { return !one.arrived && one.fate == Stream::Sent::Fate::taken; });
      if (streams_[i].from != nullptr && lost != 0) text << lost << " of stream " << i << "; ";
    }
    return std::move(text).str();
  }

  bool all_arrived() {
    return std::ranges::all_of(streams_, [](const Stream& stream) {
      return stream.from == nullptr || std::ranges::all_of(stream.sent, [](const Stream::Sent& sent) {
               return sent.arrived || sent.fate != Stream::Sent::Fate::taken;
             });
    });
  }

  void stop() {
    if (chance(50)) simulation_.set_faults({});
    if (!stopped_) begin_stop(one_of({0ms, 10ms, 1000ms, 5000ms}));
    if (chance(50)) pass_time();
    simulation_.set_faults({});
    if (chance(50)) retained_.clear();
    finishing_ = true;
    check(run_until([this] { return stopped_; }, 1h), "the server does not stop");
    retained_.clear();
    // By now every deadline has passed.
    advance(1h);
  }

  void check_budgets() {
    for (auto& side : sides_) {
      const auto& options = side.server ? server_options_ : client_options_;
      if (side.answers || side.server || options.slow_consumer == SlowConsumer::drop_oldest) continue;
      const auto stats = side.session.stats();
      // Each lane has its budget, which one message alone may exceed.
      check(stats.queued_bytes <= 2 * std::max(options.outbound_bytes, side.longest + 5), stats.queued_bytes,
            " bytes are queued, the budget is ", options.outbound_bytes);
      check(stats.queued_packets <= 2 * options.outbound_packets, stats.queued_packets,
            " packets are queued, the budget is ", options.outbound_packets);
    }
  }

  void check_all() {
    for (const auto& waiter : waiters_) check(waiter.told == 1, waiter.what, " completed ", waiter.told, " times");
    check(server_->session_count() == 0 && server_->session_manager().ids().empty(), "a session is left");
    check(server_->actor_manager().size() == 0, "an actor is left");
    std::uint64_t accepted = 0, received_by_clients = 0, written_by_clients = 0;
    for (auto& side : sides_) {
      const auto stats = side.session.stats();
      const auto name = side.server ? "the server's" : "a client's";
      check(stats.queued_bytes == 0 && stats.queued_packets == 0, name, " session has ended with ", stats.queued_bytes,
            " bytes in ", stats.queued_packets, " packets in its budget");
      check(!side.session.is_open(), name, " session is open");
      if (side.server) {
        accepted += side.refused ? 0 : 1;
        check(side.went == (side.refused ? 0 : 1), "a session of the server came, and went ", side.went, " times");
        continue;
      }
      received_by_clients += stats.packets_in;
      written_by_clients += stats.packets_out;
      if (side.expects_end) check(side.went == 1, "a client's session went ", side.went, " times");
    }
    for (const auto& client : clients_) {
      check(client->connected == client->lost, "a client has connected ", client->connected, " times, and lost it ",
            client->lost, " times");
    }
    for (const auto& stream : streams_) {
      for (std::size_t i = 0; i < stream.sent.size(); ++i) {
        check(!stream.sent[i].arrived || stream.sent[i].fate != Stream::Sent::Fate::refused, "message ", i,
              " was not taken, and arrived");
      }
    }
    check(broadcasts_arrived_ <= broadcasts_queued_, "more broadcasts arrived than were taken");

    const auto stats = server_->stats();
    const auto faults = simulation_.stats();
    check(stats.sessions == 0, stats.sessions, " sessions are counted");
    check(stats.sessions_total == accepted, stats.sessions_total, " sessions are counted, ", accepted, " came");
    check(stats.protocol_errors == 0, "protocol errors");
    check(stats.handshake_failures == 0 && stats.accept_failures == 0, "failures to accept");
    const auto accounted = stats.packets_out + stats.dropped_oldest + stats.dropped_at_close;
    const auto taken = server_took_ + stats.requests_by_outcome.sent;
    note("account", taken, accounted);
    if (heartbeats_) {
      check(accounted >= taken, taken, " packets were taken, and ", accounted, " written or counted as dropped");
    } else {
      check(accounted == taken, taken, " packets were taken, ", stats.packets_out, " written, ", stats.dropped_oldest,
            " + ", stats.dropped_at_close, " counted as dropped");
    }
    check(received_by_clients <= stats.packets_out, "clients got more than the server wrote");
    check(stats.packets_in + stats.dropped_inbound <= written_by_clients, "the server got more than clients wrote");
    check(stats.packets_in == shown_in_ || !intercepts_, stats.packets_in, " packets came, ", shown_in_, " were shown");
    check(stats.rejected_inbound == rejected_in_ && stats.rejected_outbound == rejected_out_,
          "rejections are miscounted");
    check(server_->groups().count() == 0, "a group is left");
    check(received_by_clients + stats.packets_in + faults.dropped <= faults.packets, "more came than was under way");
    if (lossless_) {
      check(broadcasts_arrived_ <= broadcasts_queued_, "broadcasts were lost");
      check(stats.dropped_oldest == 0, "dropped without a reason");
    }
    check(events_ended_, "the events do not end");
    const auto control = server_->session_manager().stats();
    check(control.events == events_told_ + subscription_->missed(), control.events, " events, ", events_told_,
          " told, ", subscription_->missed(), " missed");
    if (subscription_->missed() == 0 && control.events_dropped == 0) {
      check(events_.size() == accepted, events_.size(), " sessions were announced, ", accepted, " came");
      for (const auto& [id, seen] : events_) check(seen == 2, "the end of a session was not announced");
    }
  }

  const std::uint64_t seed_;
  const bool tell_;
  Simulation simulation_;
  const std::string name_ = unused_name();

  bool lossless_ = false;
  bool actors_ = false;
  bool heartbeats_ = false;
  bool intercepts_ = false;
  std::size_t shards_ = 1;
  unsigned rounds_ = 0;
  unsigned slowness_ = 0;
  std::size_t max_sessions_ = 1000;
  std::size_t mailbox_ = 1;
  std::size_t event_capacity_ = 1;
  std::uint64_t spontaneous_ = 0;
  SessionOptions server_options_;
  SessionOptions client_options_;

  std::optional<ServerTransport> server_;
  std::vector<std::shared_ptr<Client>> clients_;      // now
  std::vector<std::shared_ptr<Client>> all_clients_;  // also those that were destroyed
  std::optional<Subscription<Event>> subscription_;
  std::deque<Side> sides_;
  std::unordered_map<SessionId, Side*> sides_by_id_;
  std::unordered_map<const Side*, std::uint64_t> numbers_;
  std::deque<Stream> streams_ = std::deque<Stream>(3);  // none, broadcasts of normal and of high priority
  std::deque<Waiter> waiters_;
  std::vector<std::pair<OwnedMessage, Side*>> retained_;
  std::unordered_map<SessionId, int> events_;

  const Side* delivering_to_ = nullptr;
  bool outside_ = true;  // of all handlers
  bool stopped_ = false;
  bool finishing_ = false;
  bool events_ended_ = false;
  std::uint64_t server_took_ = 0;
  std::uint64_t broadcasts_queued_ = 0;
  std::uint64_t broadcasts_arrived_ = 0;
  std::uint64_t to_groups_ = 0;
  std::uint64_t arrived_ = 0;
  std::uint64_t shown_in_ = 0, rejected_in_ = 0;  // by the server's interceptors
  std::uint64_t shown_out_ = 0, rejected_out_ = 0;
  std::uint64_t events_told_ = 0;
  std::uint64_t hash_ = 0xcbf29ce484222325ULL;
  std::vector<std::string> problems_;
};

/// \returns the hash of its trace.
std::uint64_t run_seed(std::uint64_t seed, bool tell = false, Effects* effects = nullptr) {
  Run run(seed, tell);
  const auto hash = run.play();
  if (effects != nullptr) run.add_to(*effects);
  if (!run.problems().empty()) {
    std::string all;
    for (const auto& problem : run.problems()) all += "  " + problem + '\n';
    ADD_FAILURE() << all << "again: MSGTRANS_SEED=" << seed << " tests_integration --gtest_filter='SimulationSeeds.*'";
  }
  return hash;
}

std::optional<std::uint64_t> wanted_seed() {
  const char* const text = std::getenv("MSGTRANS_SEED");
  if (text == nullptr) return std::nullopt;
  return std::strtoull(text, nullptr, 10);
}

TEST(SimulationSeeds, ReplaysTheOneThatTheEnvironmentNames) {
  const auto seed = wanted_seed();
  if (!seed) GTEST_SKIP() << "MSGTRANS_SEED is not set";
  run_seed(*seed, true);
}

class SeedGroup : public ::testing::TestWithParam<std::uint64_t> {};

TEST_P(SeedGroup, AccountsForEverything) {
  if (wanted_seed()) GTEST_SKIP() << "MSGTRANS_SEED names one";
  const auto count = seeds_in_group * static_cast<std::uint64_t>(stress_factor());
  Effects effects;
  for (std::uint64_t i = 0; i < count; ++i) {
    run_seed(1 + GetParam() + i * groups, false, &effects);
    if (HasFailure()) break;
  }
  EXPECT_GT(effects.arrived, count) << "next to nothing happens";
  EXPECT_GT(effects.to_groups, 0U);
  EXPECT_GT(effects.rejected, 0U);
  EXPECT_GT(effects.throttled, 0U);
}

INSTANTIATE_TEST_SUITE_P(SimulationSeeds, SeedGroup, ::testing::Range<std::uint64_t>(0, groups));

TEST(SimulationSeeds, HappenTheSameWayAgain) {
  for (std::uint64_t seed = 1'000'001; seed < 1'000'021; ++seed) {
    const auto first = run_seed(seed);
    EXPECT_EQ(first, run_seed(seed)) << seed;
    EXPECT_NE(first, run_seed(seed + 1'000'000)) << seed;
  }
}

TEST(SimulationSeeds, LeaveNoMemoryBehind) {
  if (sanitized) GTEST_SKIP() << "the sanitizer has an allocator of its own, and finds what leaks";
  const auto in_use = [] { return static_cast<std::int64_t>(::mallinfo2().uordblks); };
  const auto run = [] {
    for (std::uint64_t seed = 2'000'000; seed < 2'000'040; ++seed) run_seed(seed);
  };
  run();  // what is made once, or kept for the next
  run();
  const auto before = in_use();
  constexpr int times = 6;
  for (int i = 0; i < times; ++i) run();
  // What is kept for the next differs by some large buffers.
  EXPECT_LT(in_use() - before, 1024 * 1024);
}

/// A session that was sent something and then refused: what was counted for it is given back, and counted as dropped.
TEST(SimulationSeeds, ARefusedSessionsBudgetIsGivenBack) {
  Simulation simulation;
  ServerTransport server({.executors = {simulation.executor()}});
  std::optional<Session> refused;
  server.on_connect([&](Session& session) {
    refused = session;
    EXPECT_EQ(session.send("you are not welcome"), SendResult::queued);
    return Admission::refuse("nobody is");
  });
  const auto name = unused_name();
  server.listen(in_process(name));
  server.start();
  ClientTransport client({.executor = simulation.executor()});
  client.async_connect("inproc://" + name, [](error_code) {});
  simulation.advance(1s);
  ASSERT_TRUE(refused);
  EXPECT_EQ(refused->stats().queued_bytes, 0U);
  EXPECT_EQ(refused->stats().queued_packets, 0U);
  EXPECT_EQ(server.stats().dropped_at_close, 1U);
}

/// Who waits for room behind answers gets it when they have been written, also if nothing else happens in the session.
TEST(SimulationSeeds, WhoWaitsBehindAnswersIsNotForgotten) {
  Simulation simulation;
  ServerTransport server({.executors = {simulation.executor()}, .session = {.outbound_bytes = 1000}});
  std::optional<Session> session;
  server.on_connect([&](Session& newcomer) { session = newcomer; });
  server.on_message([](Session& to, const Message& message) { to.respond(message, message.payload()); });
  const auto name = unused_name();
  server.listen(in_process(name));
  server.start();
  ClientTransport client({.executor = simulation.executor()});
  client.async_connect("inproc://" + name, [](error_code) {});
  simulation.run();
  simulation.set_faults({.least_delay = 1ms, .most_delay = 1ms});
  client.async_request(pattern(400), [](error_code, const Reply&) {});
  simulation.run();
  // The answer waits for a stalled connection.
  simulation.set_faults({.stall = 1, .longest_stall = 10ms});
  ASSERT_TRUE(simulation.run_until([&] { return session->stats().queued_packets != 0; }, 2ms));
  simulation.set_faults({});
  bool taken = false;
  session->async_send(pattern(800), [&](error_code code) { taken = !code; });
  EXPECT_TRUE(simulation.run_until([&] { return taken; }, 1s));
}

}  // namespace
}  // namespace msgtrans::test
