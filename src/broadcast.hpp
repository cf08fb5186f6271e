// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "packed_payload.hpp"
#include "session_state.hpp"

#include <cstddef>
#include <memory>
#include <msgtrans/protocol/outbound_queue.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/wire/header.hpp>
#include <vector>

namespace msgtrans::detail {

class BroadcastCommand;

/// One one-way message to many sessions: the payload is copied once, or compressed once for each way to compress that
/// its audience asks for, and each shard gets one command with its sessions. Made, used and destroyed by one thread,
/// any one; the caller's bytes must last as long.
class Broadcast {
 public:
  Broadcast(BytesView payload, const SendOptions& options);
  ~Broadcast();
  Broadcast(const Broadcast&) = delete;
  Broadcast& operator=(const Broadcast&) = delete;

  /// Takes room in its budget, as `SessionState::send` does, and notes what came of it. O(shards).
  /// \throws std::bad_alloc; then the broadcast is as it was.
  void add(const SessionPtr& session);
  /// Once: hands it over. Without it the room is given back. \returns what became of all that were added.
  [[nodiscard]] BroadcastResult send() noexcept;

  /// How often the payload was copied or compressed.
  [[nodiscard]] std::size_t encodings() const noexcept { return forms_.size(); }

 private:
  /// The payload as those sessions get it that compress it in the same way.
  struct Form {
    CompressionOptions how;
    Packing packing;
    protocol::SharedBytes payload;
    std::vector<std::unique_ptr<BroadcastCommand>> commands;  // one a shard that serves some of them
  };

  Form& form_for(const SessionState& session);
  BroadcastCommand& command_for(Form& form, Shard& shard);

  const BytesView payload_;
  const SendOptions& options_;
  const wire::Header header_;
  std::vector<Form> forms_;  // as many as listeners have ways to compress: few
  BroadcastResult result_;
};

/// Shows it to the interceptors, once and as to nobody in particular; then `send(payload, options)` with what they made
/// of it. Nobody was visited if one rejects it.
template <class Send>
BroadcastResult intercept_broadcast(const Interceptors* interceptors, BytesView payload, const SendOptions& options,
                                    Send send) {
  if (interceptors == nullptr || Interceptors::running()) return send(payload, options);
  auto message =
      Interceptors::outbound(header_for(wire::PacketType::one_way, options), options.extension, payload, nullptr);
  if (!interceptors->pass(message)) return {};
  SendOptions changed = options;
  changed.biz_type = message.biz_type();
  changed.extension = message.extension();
  return send(message.payload(), changed);
}

}  // namespace msgtrans::detail
