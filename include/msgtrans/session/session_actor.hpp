// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <msgtrans/actor/actor_manager.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/session/session.hpp>
#include <utility>

namespace msgtrans {

/// What a session's coroutine is given: the actor whose mailbox the session's messages go to, and the session to talk
/// back. `receive` gives what the peer sent, and what others in the process have told this actor through
/// `ServerTransport::actor_manager()`; `OwnedMessage::respond` answers either. It gives nothing when the session has
/// ended and everything was received.
///
/// High-priority messages of the peer take the mailbox's urgent lane. While the mailbox is full the session is not read
/// from, so the peer feels it; nothing else on the shard does.
///
/// The coroutine runs on the session's shard: what it sends between two waits leaves in one write. It must not block.
class SessionActor : public ProtocolActor<OwnedMessage> {
 public:
  SessionActor(ProtocolActor<OwnedMessage> actor, Session session) noexcept
      : ProtocolActor<OwnedMessage>(std::move(actor)), session_(std::move(session)) {}

  [[nodiscard]] Session& session() noexcept { return session_; }

 private:
  Session session_;
};

/// A coroutine for each session. It ends when it likes: the session is closed then. Called again after a failure, as
/// `ActorOptions` say.
using SessionBehaviour = std::function<boost::asio::awaitable<void>(SessionActor)>;

}  // namespace msgtrans
