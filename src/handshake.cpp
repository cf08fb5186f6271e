// SPDX-License-Identifier: Apache-2.0
#include "handshake.hpp"

#include <cerrno>
#include <new>
#include <sys/socket.h>
#include <utility>

namespace msgtrans::detail {

Handshake::Handshake(std::shared_ptr<Shard> shard, Link link, Done done)
    : shard_(std::move(shard)), link_(std::move(link)), done_(std::move(done)), timer_(*this) {}

Handshake::~Handshake() = default;

void Handshake::start(std::chrono::milliseconds timeout) {
  timeout_ = timeout;
  shard_->add(shared_from_this());
  try {
    // Always for writing at first: the first step is when the socket says so, which it does at once.
    link_.watch(shard_->poller(), *this, true, true);
  } catch (...) {
    shard_->remove(*this);
    throw;
  }
  watched_ = watching_write_ = true;
  if (timeout.count() != 0) shard_->timers().arm(timer_, shard_->now() + std::min(timeout, longest_duration));
}

bool Handshake::refuse(bool ends_now) {
  // Those who are refused may come in floods: they may hold so many descriptors, and each for so long.
  constexpr std::size_t most_refusing = 64;
  constexpr std::chrono::seconds longest{2};
  if (shard_->refusing >= most_refusing) return false;
  if (!ends_now) {
    start(longest);
  } else {
    shard_->add(shared_from_this());
    try {
      link_.watch(shard_->poller(), *this, true, false);
    } catch (...) {
      shard_->remove(*this);
      throw;
    }
    watched_ = true;
    failed(Error(Errc::refused));
  }
  refuses_ = true;
  ++shard_->refusing;
  return true;
}

void Handshake::on_ready(bool readable, bool, bool) {
  Shard::Scope scope(*shard_);
  const auto keep = shared_from_this();
  if (done_) {
    step();
  } else if (readable) {
    discard();
  } else {
    leave();
  }
}

void Handshake::step() {
  try {
    switch (link_.connection->handshake()) {
      case Connection::Status::done: {
        Link link = std::move(link_);
        shard_->timers().disarm(timer_);
        link.end_watch(shard_->poller(), *this);
        watched_ = false;
        const auto keep = shared_from_this();
        shard_->remove(*this);
        return tell({}, std::move(link));
      }
      case Connection::Status::blocked: {
        const bool write = link_.connection->wants_write();
        if (!link_.ready && write != watching_write_) link_.change_watch(shard_->poller(), *this, true, write);
        watching_write_ = write;
        return;
      }
      default: {
        const Error error = link_.connection->error();
        return failed(error ? error : Error(Errc::handshake_failed));
      }
    }
  } catch (const std::exception& failure) {
    failed(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
  }
}

/// The peer may have been told why, which a reset would take from it: so what it still sends is read, for a while.
void Handshake::failed(Error error) noexcept {
  constexpr std::chrono::seconds linger{1};
  if (!link_.socket) {
    const auto keep = shared_from_this();
    leave();
    return tell(std::move(error), {});
  }
  link_.connection.reset();
  tell(std::move(error), {});
  ::shutdown(link_.socket.get(), SHUT_WR);
  if (watching_write_) link_.change_watch(shard_->poller(), *this, true, false);
  watching_write_ = false;
  shard_->timers().arm(timer_, shard_->now() + linger);
}

void Handshake::discard() noexcept {
  const auto buffer = Shard::read_buffer();
  const ssize_t count = ::recv(link_.socket.get(), buffer.data(), buffer.size(), 0);
  if (count > 0 || (count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) return;
  leave();
}

void Handshake::expired() noexcept {
  if (!done_) return leave();
  Error late(Errc::handshake_timeout);
  try {
    late.text = "the handshake was not finished within " + std::to_string(timeout_.count()) + " ms";
    if (const auto waits = link_.connection->describe_handshake(); !waits.empty()) late.text += ": " + waits;
    (void)link_.connection->shut_down(late);  // tells the peer, if its transport can
  } catch (const std::exception&) {
    // The code says enough.
  }
  failed(std::move(late));
}

void Handshake::end(const Error& why) noexcept {
  const auto keep = shared_from_this();
  try {
    if (link_.connection) (void)link_.connection->shut_down(why);
  } catch (const std::exception&) {
    // The peer sees the end without a word.
  }
  leave();
  if (done_) tell(why, {});
}

void Handshake::leave() noexcept {
  if (std::exchange(refuses_, false)) --shard_->refusing;
  shard_->timers().disarm(timer_);
  if (watched_) link_.end_watch(shard_->poller(), *this);
  watched_ = false;
  link_ = {};
  shard_->remove(*this);
}

void Handshake::tell(Error error, Link link) noexcept {
  const Done done = std::exchange(done_, nullptr);
  done(std::move(error), std::move(link));
}

}  // namespace msgtrans::detail
